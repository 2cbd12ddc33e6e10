"""Text to picture: plain guided DDIM from noise (2010.02502; 2207.12598), or DPM-Solver++(2M) (2211.01095; see
`path.improvement`) on the same levels. No picture goes in. Model rows: 2 N b, or N b at guidance 1.
"""

from typing import Any

import torch
from torch import Tensor

from ..ddim import levels, move
from ..diffedit import Eps, finite, sample, working
from ..options import Sampler, Scale, Steps
from ..path import improvement
from .guidance import cfg


@torch.no_grad()
def text_to_image(
    eps: Eps,
    x_T: Tensor,
    target: Any,
    negative: Any = "",
    *,
    steps: Steps = 50,
    guidance_scale: Scale = 7.5,
    sampler: Sampler = "ddim",
) -> Tensor:
    """x_T (b, 4, h, w): noise at the top level -> the clean latent."""
    if sampler == "ddim":
        return sample(eps, x_T, target, negative, steps=steps, guidance_scale=guidance_scale)
    x, (t, a), improve, guide = working(x_T), levels(steps), improvement(sampler, steps), cfg(guidance_scale)
    for j in range(steps, 0, -1):
        texts = [target] if guidance_scale == 1 else [negative, target]
        found = [e.to(x) for e in eps(x, t[j], texts)]
        e = found[0] if guidance_scale == 1 else guide(*found)
        x = move(x, improve(x, e, a[j], a[j - 1]), a[j], a[j - 1])
    return finite(x, "the sampling")
