"""LEDITS++ (Brack et al., 2311.16711): several concepts added and removed at once, each where it matters.

On an edit-friendly path: e = e_null + sum over concepts of s M (e_concept - e_null), s negative for what is removed. A
pair of texts is two concepts: its source is taken away, its target added, and an empty one is none. The steps are the
paper's, of second order, with noises solved for them (`edit_friendly`, sampler "dpmsolver++", as the row asks), or
DDPM's ("ddim"). M is, per concept, picture and level, the product of two masks, each 1 where a map is not below its
quantile `concept_threshold`. M1: the attention to the concept's words at the coarsest level with text, mean over heads
and sites, smoothed. M2: |s (e_concept - e_null)|, summed over channels; not in the first steps (t > 800), as in the
authors' code. Model rows: (1 + concepts) K b, and the inversion's; a concept costs none where it does not act.
"""

import warnings
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Attend, Site, weights
from ..ddim import real
from ..diffedit import checked_mask
from ..options import About, Scale, Within
from ..path import HookedEps, Path
from .words import Words

Own = Annotated[str | None, About("each concept's own, in their order, by commas; sources first in a pair")]
LATE = 800  # timesteps above it have too much noise for M2


class Concept(NamedTuple):
    text: Any
    words: Words
    sign: int
    scale: float
    threshold: float
    warm_up: float
    cool_down: float


@torch.no_grad()
def ledits(
    eps: HookedEps,
    path: Path,
    edits: Sequence[tuple[Any, Any]],
    edits_words: Sequence[tuple[Words, Words]],
    coarsest: int,
    null: Any,
    mask: Tensor | None = None,
    *,
    concept_scale: Scale = 5.0,
    concept_threshold: Annotated[float, Within(0, 1, "share of cells that a concept leaves alone, 0..1")] = 0.9,
    concept_mask: Annotated[Literal["both", "M1", "M2"], About("M1: by attention, M2: by prediction")] = "both",
    warm_up: Annotated[int, Within(0, 999, "steps before concepts act")] = 0,
    cool_down: Annotated[int, Within(0, 999, "steps at the end in which they do not")] = 0,
    concept_scales: Own = None,
    concept_thresholds: Own = None,
    warm_ups: Own = None,
    cool_downs: Own = None,
) -> Tensor:
    """edits: pairs of texts (taken away, added), the null text for none; coarsest: the level of M1's maps; mask (b or
    1, 1, h, w): where concepts may act. Without concepts each step is the inversion's own and the picture comes back,
    if the path was made under no source text, as is usual: under one, guided, its noises hold for other predictions.
    """
    found = list[Any]()
    for pair, pair_words in zip(edits, edits_words):
        found += [one for one in zip(pair, pair_words, (-1, 1)) if one[0] is not null]
    common = {"concept_scale": concept_scale, "concept_threshold": concept_threshold}
    common |= {"warm_up": warm_up, "cool_down": cool_down}
    given = concept_scales, concept_thresholds, warm_ups, cool_downs
    own = (each(name, text, common[name], len(found)) for name, text in zip(common, given))
    concepts = [Concept(*one, *numbers) for one, *numbers in zip(found, *own)]
    x, b, allowed = path.rows(1), len(path[0]), 1 if mask is None else checked_mask(mask, path[0])
    seen: list[Tensor] = []

    def look(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site.kind == "cross" and site.level == coarsest and site.place != "mid":
            seen.append(weights(q[b:], k[b:]).to(x).mean(1))  # (concepts b, n, 77)
        return plain(site, q, k, v)

    hooks = {} if concept_mask == "M2" else {"tap": look}
    step = path.walk()
    for i, j in enumerate(path.down()):
        acting = [one for one in concepts if one.warm_up <= i < path.top - one.cool_down]
        seen.clear()
        e_null, *e_concepts = eps(x, path.t[j], [path.null(j), *(one.text for one in acting)], **hooks)
        e = e_null
        for c, (one, e_concept) in enumerate(zip(acting, e_concepts)):
            d = one.sign * one.scale * (e_concept - e_null) * allowed
            if concept_mask == "M2" or (concept_mask == "both" and path.t[j] <= LATE):
                d = d * largest(d.abs().sum(dim=1, keepdim=True), one.threshold)
            if seen:
                at = torch.stack(seen).mean(0)[c * b : (c + 1) * b, :, 1 : one.words.end].sum(2)
                M1 = largest(smoothed(at, coarsest, x), one.threshold)
                d = d * F.interpolate(M1, x.shape[2:])
            e = e + d
        x = step(x, e, j)
    return x


RANGES = {"concept_scale": (-1000, 1000), "concept_threshold": (0, 1), "warm_up": (0, 999), "cool_down": (0, 999)}


def check_ledits(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """What can be refused before any work."""
    count = sum(bool(text) for pair in given["edits"] for text in pair)
    if not count:
        warnings.warn("all texts of the edits are empty: nothing is taken away or added", stacklevel=4)
    for name in RANGES:
        each(name, settings[f"{name}s"], settings[name], count)


def each(name: str, given: str | None, common: float, count: int) -> list[float]:
    """ "5, -2" -> the numbers of `count` concepts, in their order; for None the common one. Raises ValueError."""
    texts: Sequence[Any] = [common] * count if given is None else given.split(",")
    (low, high), number = RANGES[name], float if "concept" in name else int
    try:
        found = [real(name, number(text), low, high) for text in texts]
    except ValueError:
        found = []
    if len(found) != count:
        raise ValueError(f"{name}s must be {count} numbers {low}..{high} for {count} concepts, got {given!r}")
    return found


def largest(maps: Tensor, quantile: float) -> Tensor:
    """maps (b, 1, h, w) -> 1 where they are not below their quantile, each picture its own."""
    least = torch.quantile(maps.float().flatten(1), quantile, dim=1)[:, None, None, None]
    return (maps.float() >= least).to(maps)


def smoothed(at: Tensor, level: int, x: Tensor) -> Tensor:
    """at (b, n): a value for each cell that the latent x has at that level -> (b, 1, h, w), under a 3 x 3 filter."""
    h, w = (-(-side // 2**level) for side in x.shape[2:])
    bell = torch.arange(-1.0, 2.0, device=at.device).abs().neg().exp().to(at)
    bell = bell / bell.sum()
    around = F.pad(at.unflatten(1, (1, h, w)), (1, 1, 1, 1), mode="reflect" if min(h, w) > 1 else "replicate")
    return F.conv2d(around, (bell[:, None] * bell)[None, None])
