"""Paint by Example (Yang et al., 2211.13227): a UNet that paints what another picture shows where the mask is.

Section 3.2: the example is one vector, of its class token in CLIP, too narrow for a copy of it (clip_image.py). Nine
input channels, in another order than SD inpainting's: the noisy latent (4), the latent of the picture with grey under
the mask (4), the mask (1 = keep). Section 3.4: guidance from a learned vector, which stands for no example,
    e = e(v) + s (e(example) - e(v)).
Steps are DDIM from noise, which the authors' script has beside PLMS. What lies outside is painted again by the model
and pasted back by the runner. Needs its own checkpoint. Model rows: 2 N b. Left out: PLMS, the mask made hard at 1/2.
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
def paint(
    eps: HookedEps,
    x0: Tensor,
    mask: Tensor,
    x0_outside: Tensor,
    null: Any,
    example: Tensor,
    *,
    steps: Steps = 50,
    guidance_scale: Scale = 5.0,
    seed: Seed = 0,
) -> Tensor:
    """mask (b, 1, h, w); x0_outside (b, 4, h, w): the latent of the picture with grey where the mask is 1; null (1, 1,
    width): the learned vector; example (1 or b, 1, width): what is to be painted.
    """
    (t, a), x = levels(steps), next(draws(x0.shape, seed)).to(working(x0))
    given = torch.cat([x0_outside.to(x), 1 - mask.to(x)], dim=1)
    for j in range(steps, 0, -1):
        e_null, e_example = eps(x, t[j], [null, example], given=given)
        x = move(x, e_null + guidance_scale * (e_example - e_null), a[j], a[j - 1])
    return x
