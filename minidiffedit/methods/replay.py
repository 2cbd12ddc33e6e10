"""The plainest editor: walk a path down under another text. Model rows: 2 K b.

After null-text inversion it is that paper's editing without attention maps, after negative-prompt, edit-friendly or
cycle inversion theirs; after DDIM inversion it is the baseline that every method of this family improves on.
"""

from typing import Any

import torch
from torch import Tensor

from ..diffedit import Eps
from ..options import Sampler, Scale
from ..path import Path
from .guidance import Guidance, Norm, Quantile, guide_of


@torch.no_grad()
def replay(
    eps: Eps,
    path: Path,
    target: Any,
    *,
    guidance_scale: Scale = 7.5,
    guidance: Guidance = "cfg",
    quantile: Quantile = 0.4,
    norm: Norm = "l0",
    sampler: Sampler = "ddim",
) -> Tensor:
    """Guided by guidance_scale (2207.12598); each level's null text is the path's."""
    path = path.by(sampler)
    x, guide = path.rows(1), guide_of(guidance, guidance_scale, quantile, norm)
    step = path.walk()
    for j in path.down():
        e_null, e_text = eps(x, path.t[j], [path.null(j), target])
        x = step(x, guide(e_null, e_text), j)
    return x
