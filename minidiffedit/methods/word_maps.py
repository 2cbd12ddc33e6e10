"""A mask from words: where the picture's cross-attention looks at them (Hertz et al., 2208.01626, section 3, fig. 4).

Under several noises at `mask_strength` and under the source text, the maps softmax(q k^T / sqrt d) of the coarsest
levels with text are averaged over heads, layers and noises and added up over the words' positions; rescaled to 0..1,
what is above the threshold is the mask. As `words+diffedit`, `words+user-mask` and the like it takes the place of
DiffEdit's contrast: it finds what is named, whether or not the target differs there. Model rows: n b.
"""

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Attend, Site, weights
from ..ddim import level_at, levels, noises
from ..diffedit import Mask, threshold_maps, working
from ..options import About, Seed, Steps, Within
from ..path import HookedEps
from .diffedit import Clip, MapLevel, Maps, OfTheMask, Threshold
from .words import Words, listed, refined, tokenizer, words_of

Named = Annotated[str | None, About("words of the source to be edited: horse, grass (default: what the target lacks)")]
Levels = Annotated[int, Within(1, 10, "levels whose maps are read, from the coarsest with text")]


@torch.no_grad()
def word_mask(
    eps: HookedEps,
    x0: Tensor,
    source: Any,
    source_words: Words,
    target_words: Words,
    coarsest: int,
    *,
    mask_words: Named = None,
    steps: Steps = 50,
    mask_strength: MapLevel = 0.5,
    maps: Maps = 10,
    mask_levels: Levels = 1,
    mask_clip: Clip = None,
    mask_threshold: Threshold = 0.4,
    seed: Seed = 0,
    earlier: Any = None,
) -> Mask:
    """Known maps are cut again for no rows. Raises ValueError for words that the source does not have, and where none
    is named and the target has all of them.
    """
    positions = chosen(mask_words, source_words, target_words)
    for known in earlier(*OfTheMask) if earlier else ():
        return threshold_maps(known.maps, known.flat_below, clip=mask_clip, threshold=mask_threshold)
    (t, a), j, x0 = levels(steps), level_at(mask_strength, steps, lowest=1), working(x0)
    b, found = len(x0), list[Tensor]()
    noise = torch.stack([noises(x0.shape[1:], maps, seed + i) for i in range(b)], dim=1).to(x0)  # (n, b, c, h, w)
    for one in noise:
        look = Look(positions, coarsest - mask_levels + 1, coarsest, x0.shape[2:])
        eps(math.sqrt(a[j]) * x0 + math.sqrt(1 - a[j]) * one, t[j], [source], tap=look)
        found.append(look.mean().expand(b, -1, -1))
    raw = torch.stack(found, dim=1).float()
    return threshold_maps(raw, torch.zeros(b, device=raw.device), clip=mask_clip, threshold=mask_threshold)


def check_word_mask(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """What can be refused before any work."""
    if given.get("mask") is None:
        chosen(settings["mask_words"], *(words_of(tokenizer(), given[name]) for name in ("source", "target")))


def chosen(named: str | None, source: Words, target: Words) -> list[int]:
    """The positions of the words that are named, else of those that the target does not have."""
    if named is not None:
        return [at for phrase in listed(named) or [""] for at in source.positions(phrase)]
    kept = refined(source, target).sum(1)
    if not (found := [at for at in range(1, source.end) if not kept[at]]):
        raise ValueError(
            f"the target has all words of the source ({' '.join(source.names) or 'none'}); give mask_words"
        )
    return found


class Look:
    """A tap that changes nothing, and adds up the attention at some positions on the grid of the latent."""

    def __init__(self, positions: list[int], finest: int, coarsest: int, size: Any):
        self.positions, self.levels, self.size = positions, range(finest, coarsest + 1), tuple(size)
        self.seen = list[Tensor]()

    def __call__(self, plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site.kind == "cross" and site.level in self.levels:
            grid = [-(-side // 2**site.level) for side in self.size]
            map = weights(q, k)[..., self.positions].float().mean(1).sum(-1).unflatten(1, grid)  # (b, rows, columns)
            self.seen.append(F.interpolate(map[:, None], self.size, mode="bilinear")[:, 0])
        return plain(site, q, k, v)

    def mean(self) -> Tensor:
        """(b, h, w)."""
        return torch.stack(self.seen).mean(0) if self.seen else torch.zeros(1, *self.size)
