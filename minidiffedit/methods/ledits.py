"""LEDITS++ (Brack et al., 2311.16711): several concepts added and removed at once, each where it is strongest.

On an edit-friendly path, by DDIM's levels: e = e_null + sum over concepts of s M (e_concept - e_null), s negative for
what is removed. M, "M2" in the paper, is 1 where |s (e_concept - e_null)|, summed over channels, is not below its
quantile `concept_threshold`, per picture and level. A pair of texts is two concepts: its source is taken away, its
target added, and an empty one is none. Model rows: (1 + concepts) K b, and the inversion's.
Left out: M1, which reads the concept's words from cross-attention maps; a scale, threshold and warm-up for each concept
of its own; the second-order solver (sde-dpmsolver++), for which the noises would have to be solved anew.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from ..diffedit import Eps, checked_mask
from ..options import Scale, Within
from ..path import Path


@torch.no_grad()
def ledits(
    eps: Eps,
    path: Path,
    edits: Sequence[tuple[Any, Any]],
    null: Any,
    mask: Tensor | None = None,
    *,
    concept_scale: Scale = 5.0,
    concept_threshold: Annotated[float, Within(0, 1, "share of cells that a concept leaves alone, 0..1")] = 0.9,
    warm_up: Annotated[int, Within(0, 999, "steps before concepts act")] = 0,
    cool_down: Annotated[int, Within(0, 999, "steps at the end in which they do not")] = 0,
) -> Tensor:
    """edits: pairs of texts (taken away, added), the null text for none. mask (b or 1, 1, h, w): where they may act.
    Without concepts each step is the inversion's own, and the picture comes back.
    """
    pairs = [(text, sign * concept_scale) for pair in edits for text, sign in zip(pair, (-1, 1))]
    concepts, scales = [text for text, _ in pairs if text is not null], [s for text, s in pairs if text is not null]
    x, allowed = path.rows(1), 1 if mask is None else checked_mask(mask, path[0])
    for i, j in enumerate(path.down()):
        acting = warm_up <= i < path.top - cool_down
        e_null, *e_concepts = eps(x, path.t[j], [path.null(j), *(concepts if acting else ())])
        e = e_null
        for scale, e_concept in zip(scales, e_concepts):
            d = scale * (e_concept - e_null) * allowed
            e = e + strongest(d, concept_threshold) * d
        x = path.step(x, e, j)
    return x


def strongest(d: Tensor, quantile: float) -> Tensor:
    """d (b, c, h, w) -> (b, 1, h, w): 1 where |d|, summed over channels, is not below its quantile, per picture."""
    size = d.abs().sum(dim=1, keepdim=True).float()
    least = torch.quantile(size.flatten(1), quantile, dim=1)[:, None, None, None]
    return (size >= least).to(d)
