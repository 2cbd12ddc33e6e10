"""MAG-Edit (Mao et al., 2312.11396): in the first steps the latent is moved until the mask looks at the edited words.

Under prompt-to-prompt's "refine" (prompt_to_prompt.py: the source's cross-attention for the words of both prompts, its
self-attention at the coarsest level with text), before each of the first `nudge_steps`, `nudges` times x <- x -
nudge_scale sqrt((1 - a) / a) M dL/dx (section 3.3), L from the maps A of the coarsest level, under the target's text,
of the words new in the target (section 3.2):
    token ratio    mean over layers and words of (1 - mean over M of A_word / sum of all words' A)^2,
    spatial ratio  mean over layers and words of 3 - 4 (A_word in M / A_word in all).
In the last `kept_steps` what lies outside the mask, 3 x 3 grown, is the source's. Model rows: 2 each nudge, with
gradient, and 3 K or, if the path does not hold the source's row, 4 K. One picture at a time. Left out: the pass of a
nudge is not cut after its last map; other words than those that are new have no weight of their own.
"""

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Attend, Site, weights
from ..diffedit import checked_mask
from ..options import About, Scale, Within
from ..path import HookedEps, Path
from .descent import wide
from .guidance import cfg
from .lora import one_picture
from .prompt_to_prompt import Early, first
from .words import Words, listed, refined, tokenizer, words_of

UNLESS = "nudges", 0
Edited = Annotated[
    str | None, About("words of the target that the mask shall show (default: those the source lacks)", UNLESS)
]
Ratio = Annotated[Literal["token", "spatial"], About("token: beside other words; spatial: beside other places", UNLESS)]


@torch.no_grad()
def mag_edit(
    eps: HookedEps,
    path: Path,
    mask: Tensor,
    source: Any,
    target: Any,
    source_words: Words,
    target_words: Words,
    coarsest: int,
    *,
    edited_words: Edited = None,
    ratio: Ratio = "token",
    nudges: Annotated[int, Within(0, 200, "moves of the latent before a step")] = 15,
    nudge_steps: Early = 0.5,
    nudge_scale: Annotated[float, Within(0, 10_000, "how far a move goes", UNLESS)] = 2.5,
    cross_steps: Early = 0.8,
    self_steps: Early = 0.5,
    kept_steps: Early = 0.3,
    guidance_scale: Scale = 7.5,
) -> Tensor:
    """mask (1, 1, h, w), 1 = edited. Raises ValueError for several pictures and for words the target does not have."""
    one_picture(path[0], "MAG-Edit")
    x, K, guide, words = path.rows(2), path.top, cfg(guidance_scale), chosen(edited_words, source_words, target_words)
    M, W = checked_mask(mask, x[:1]).to(x), refined(source_words, target_words).to(x)
    new, u, step = (W.sum(0) == 0).to(x), 1 if path.pinned else 2, path.walk()
    grown, grid = F.max_pool2d(M, 3, stride=1, padding=1), [-(-side // 2**coarsest) for side in x.shape[2:]]
    low = F.adaptive_max_pool2d(M, grid).flatten()
    maps, nudges = list[Tensor](), nudges if M.any() else 0

    def exchange(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The last two rows are the source's and the target's."""
        k, v = (k[:, :, :77], v[:, :, -77:]) if site.kind == "cross" else (k, v)  # of paired texts (path.Path.sources)
        (qs, qt), (ks, kt), vt = q[-2:].split(1), k[-2:].split(1), v[-1:]
        if site.kind == "self":
            if i >= first(self_steps, K) or site.level < coarsest:
                return plain(site, q, k, v)
            return torch.cat([plain(site, q[:-1], k[:-1], v[:-1]), plain(site, qs, ks, vt)])
        if site.level == coarsest:
            maps.append(wide(weights(qt, kt)[0]).mean(0))
        if i >= first(cross_steps, K):
            return plain(site, q, k, v)
        out = plain(site, qs, ks, W.to(v) @ vt) + plain(site, qt, kt, new[:, None].to(v) * vt)
        return torch.cat([plain(site, q[:-1], k[:-1], v[:-1]), out])

    for i, j in enumerate(path.down()):
        texts, scale = path.texts(path.source(j, source), target), math.sqrt((1 - path.a[j]) / path.a[j])
        for _ in range(nudges if i < first(nudge_steps, K) else 0):
            maps.clear()
            with torch.enable_grad():
                y = x[1:].detach().requires_grad_()
                eps(torch.cat([x[:1], y]), path.t[j], [texts], tap=exchange)
                (slope,) = torch.autograd.grad(unlooked(maps, words, low, target_words.end, ratio), y)
            x = torch.cat([x[:1], y.detach() - nudge_scale * scale * M * slope])
        maps.clear()
        both = path.texts(*[path.null(j)] * u, path.source(j, source), target)
        e_null, e_text = eps(torch.cat([x[-u:], x]), path.t[j], [both], tap=exchange)[0].split([u, 2])
        e = torch.cat([e_text[:-u], guide(e_null, e_text[-u:])])
        x = path.pin(step(x, e, j), j - 1)
        if i >= K - first(kept_steps, K):
            x = torch.cat([x[:1], x[:1] + grown * (x[1:] - x[:1])])
    return x[1:]


def unlooked(maps: list[Tensor], words: list[int], M: Tensor, end: int, ratio: str) -> Tensor:
    """L of maps (n, 77) and a mask (n,)."""
    losses = []
    for A in maps:
        if ratio == "token":
            share = A[:, words] / A[:, 1:end].sum(1, keepdim=True).clamp(min=1e-12)
            losses.append(((1 - (share * M[:, None]).sum(0) / M.sum()) ** 2).mean())
        else:
            losses.append((3 - 4 * (A[:, words] * M[:, None]).sum(0) / A[:, words].sum(0).clamp(min=1e-12)).mean())
    return torch.stack(losses).mean()


def chosen(named: str | None, source: Words, target: Words) -> list[int]:
    """The positions of the edited words in the target."""
    if named is not None:
        return [at for phrase in listed(named) or [""] for at in target.positions(phrase)]
    kept = refined(source, target).sum(0)
    if not (found := [at for at in range(1, target.end) if not kept[at]]):
        raise ValueError(
            f"the source has all words of the target ({' '.join(target.names) or 'none'}); give edited_words"
        )
    return found


def check_mag_edit(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """What can be refused before any work."""
    chosen(settings["edited_words"], *(words_of(tokenizer(), given[name]) for name in ("source", "target")))
