"""SD inpainting (Rombach et al., 2112.10752, section 4.5): a UNet that sees the mask and the picture around it.

Nine input channels: the noisy latent (4), the mask (1 = fill), the latent of the picture with grey under the mask (4).
Plain guided DDIM from noise; what lies outside is painted again by the model and pasted back by the runner. Needs the
inpainting checkpoint (conv_in of 9 channels). Model rows: 2 N b. Left out: strength below 1 (start from the picture).
"""

from typing import Any

import torch
from torch import Tensor

from ..ddim import levels, move
from ..diffedit import working
from ..options import Scale, Seed, Steps
from ..path import HookedEps
from .sdedit import draws


@torch.no_grad()
def inpaint(
    eps: HookedEps,
    x0: Tensor,
    mask: Tensor,
    x0_outside: Tensor,
    target: Any,
    negative: Any = "",
    *,
    steps: Steps = 50,
    guidance_scale: Scale = 7.5,
    seed: Seed = 0,
) -> Tensor:
    """mask (b, 1, h, w); x0_outside (b, 4, h, w): the latent of the picture with grey where the mask is 1."""
    (t, a), x = levels(steps), next(draws(x0.shape, seed)).to(working(x0))
    given = torch.cat([mask.to(x), x0_outside.to(x)], dim=1)
    for j in range(steps, 0, -1):
        e_null, e_text = eps(x, t[j], [negative, target], given=given)
        x = move(x, e_null + guidance_scale * (e_text - e_null), a[j], a[j - 1])
    return x
