"""InstructPix2Pix (Brooks et al., 2211.09800): a UNet that sees the picture, and does what an instruction says.

Eight input channels: the noisy latent, and the picture's latent, unscaled as in its training. Section 3.2, eq. 3: with
e(I, c) the prediction under picture I and instruction c, and 0 for neither,
    e = e(0, 0) + s_I (e(I, 0) - e(0, 0)) + s_T (e(I, c) - e(I, 0)).
Steps are DDIM from noise. Needs the weights of InstructPix2Pix, or those of MagicBrush (2306.10012) or HIVE
(2303.09618), which have its shape. Model rows: 3 N b. Left out: the authors' Euler ancestral sampler.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor

from ..ddim import levels, move
from ..diffedit import working
from ..options import Scale, Seed, Steps, Within
from ..path import HookedEps
from .sdedit import draws

PictureScale = Annotated[float, Within(-1000, 1000, "how strictly to keep to the picture, s_I")]


@torch.no_grad()
def instruct_pix2pix(
    eps: HookedEps,
    x0: Tensor,
    x0_unscaled: Tensor,
    null: Any,
    instruction: Any,
    *,
    steps: Steps = 100,
    guidance_scale: Scale = 7.5,
    picture_scale: PictureScale = 1.5,
    seed: Seed = 0,
) -> Tensor:
    """x0 (b, 4, h, w) is asked for its shape alone; x0_unscaled the same divided by the VAE's scaling factor."""
    (t, a), x = levels(steps), next(draws(x0.shape, seed)).to(working(x0))
    predict = predictor(eps, x0_unscaled, null, instruction, guidance_scale, picture_scale)
    for j in range(steps, 0, -1):
        x = move(x, predict(x, t[j]), a[j], a[j - 1])
    return x


def predictor(
    eps: HookedEps, x0_unscaled: Tensor, null: Any, instruction: Any, guidance_scale: float, picture_scale: float
) -> Callable[[Tensor, int], Tensor]:
    """predict(x, t) -> e, three rows a picture: without either, with the picture, with picture and instruction."""
    b = len(x0_unscaled)
    texts = torch.cat([text.expand(b, -1, -1) for text in (null, null, instruction)])
    given = torch.cat([torch.zeros_like(x0_unscaled), x0_unscaled, x0_unscaled])

    def predict(x: Tensor, t: int) -> Tensor:
        e_none, e_picture, e_both = eps(torch.cat([x] * 3), t, [texts], given=given)[0].split(b)
        return e_none + picture_scale * (e_picture - e_none) + guidance_scale * (e_both - e_picture)

    return predict
