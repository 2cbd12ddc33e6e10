"""PFB-Diff (Huang et al., 2306.16894): the source's deep features are put back outside the mask, at several levels.

Section 3.2, progressive feature blending: the source's latent of each level is shown to the UNet beside the target's
rows, and what enters the blocks around the bottleneck (input_blocks 8 to 11, the middle, output_blocks 1 to 5) becomes
m h + (1 - m) h_source, m the mask at their size. Section 3.3, attention masking (input_blocks 7 to 11, the middle,
output_blocks 1 to 7): some words are only seen inside the mask, others only outside; where a cell may not see a word,
it attends to the rest, two fused attentions and no map. In the first `blend_steps` the latents are blended as well.

The source's row is under its own text, also where it is blended into the unguided row. Model rows: 3 K b. m is kept to
0..1, beyond which the authors' bicubic resizing overshoots; to edit the background, invert the mask.
"""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Attend, Site
from ..diffedit import checked_mask, mask_at
from ..options import About, Grey, Scale
from ..path import HookedEps, Path
from .guidance import Guidance, Norm, Quantile, guide_of
from .prompt_to_prompt import Early, first
from .words import Words, listed, refined, tokenizer, words_of

Inside = Annotated[str | None, About("words of the target seen inside the mask alone (default: what the source lacks)")]
Outside = Annotated[str | None, About("words of the target seen outside the mask alone")]


@torch.no_grad()
def pfb_diff(
    eps: HookedEps,
    path: Path,
    mask: Tensor,
    source: Any,
    target: Any,
    source_words: Words,
    target_words: Words,
    coarsest: int,
    *,
    inside_words: Inside = None,
    outside_words: Outside = None,
    blend_steps: Early = 0.5,
    guidance_scale: Scale = 7.5,
    guidance: Guidance = "cfg",
    quantile: Quantile = 0.4,
    norm: Norm = "l0",
    grey: Grey = "level",
) -> Tensor:
    """Rows of a call: source, target unguided, target. mask (b or 1, 1, h, w) in [0, 1], 1 = edited; coarsest: the
    coarsest level with text (SD v1: 2).
    """
    b, y = len(path[0]), path.rows(1)
    M, guide = checked_mask(mask, y).to(y), guide_of(guidance, guidance_scale, quantile, norm)
    inside, outside = (at.to(y.device) for at in seen(source_words, target_words, inside_words, outside_words))

    def blended(site: Site, h: Tensor) -> Tensor:
        if not deep(site, coarsest):
            return h
        own, h_source = resized(m, h.shape[2:]).to(h), h[:b]
        return torch.cat([h_source, *(own * one + (1 - own) * h_source for one in h[b:].split(b))])

    def masked(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = plain(site, q, k, v)
        if not wordy(site, coarsest):
            return out
        grid = [-(-side // 2**site.level) for side in y.shape[2:]]
        within = (resized(m, grid) > 0.5).flatten(2)[..., None]  # (b or 1, 1, n, 1)
        inner, outer = (plain(site, q[-b:], k[-b:, :, at], v[-b:, :, at]) for at in (inside, outside))
        return torch.cat([out[:-b], torch.where(within, inner, outer)])

    step = path.walk()
    for i, j in enumerate(path.down()):
        texts, m = path.texts(source, path.null(j), target), mask_at(M, j - 1, path.top, grey)
        e = eps(torch.cat([path[j], y, y]), path.t[j], [texts], tap=masked, feature=blended)[0]
        _, e_null, e_text = e.split(b)
        y = step(y, guide(e_null, e_text), j)
        if i < first(blend_steps, path.top):
            y = m * y + (1 - m) * path[j - 1]
    return y


def deep(site: Site, coarsest: int) -> bool:
    """Blocks that hand on to input_blocks 8 to 11, the middle and output_blocks 1 to 5."""
    near = site.level > coarsest or (site.level == coarsest and (site.place == "down" or site.index < 2))
    return site.kind == "block" and site.place != "mid" and near


def wordy(site: Site, coarsest: int) -> bool:
    """Cross-attentions of input_blocks 7 to 11, the middle and output_blocks 1 to 7."""
    late = site.place == "up" and site.level == coarsest - 1 and site.index < 2
    return site.kind == "cross" and (site.level >= coarsest or late)


def resized(M: Tensor, size: Any) -> Tensor:
    return F.interpolate(M, tuple(size), mode="bicubic").clamp(0, 1)


def seen(source: Words, target: Words, inside: str | None, outside: str | None) -> tuple[Tensor, Tensor]:
    """The positions that cells inside and outside the mask see. Raises ValueError for words the target lacks."""
    new = [at for at in range(1, target.end) if not refined(source, target)[:, at].any()]
    only_inside = new if inside is None else [at for phrase in listed(inside) for at in target.positions(phrase)]
    only_outside = [at for phrase in listed(outside) for at in target.positions(phrase)]
    if both := sorted({*only_inside} & {*only_outside}):
        raise ValueError(
            f"position {both[0]} of the target is in inside_words and in outside_words: no cell would see it"
        )
    return tuple(torch.tensor([at for at in range(77) if at not in no]) for no in (only_outside, only_inside))  # type: ignore


def check_pfb_diff(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """What can be refused before any work."""
    source, target = (words_of(tokenizer(), given[name]) for name in ("source", "target"))
    seen(source, target, settings["inside_words"], settings["outside_words"])
