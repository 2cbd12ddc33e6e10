"""Text to picture: plain guided DDIM from noise (2010.02502; 2207.12598). No picture goes in. Model rows: 2 N b."""

from typing import Any

from torch import Tensor

from ..diffedit import Eps, sample
from ..options import Scale, Steps


def text_to_image(
    eps: Eps, x_T: Tensor, target: Any, negative: Any = "", *, steps: Steps = 50, guidance_scale: Scale = 7.5
) -> Tensor:
    """x_T (b, 4, h, w): noise at the top level -> the clean latent."""
    return sample(eps, x_T, target, negative, steps=steps, guidance_scale=guidance_scale)
