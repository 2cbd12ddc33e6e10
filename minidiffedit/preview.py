"""Latents to look at without the autoencoder: a linear map to RGB, fitted on the spot to the picture at hand.

No constants: any checkpoint, any picture. What it cannot show is all that lies below a latent cell.
"""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROUNDING = 1e-12  # a variance below which a picture is one colour


class LatentRGB(NamedTuple):
    """rgb = latent @ matrix + bias, in [0, 1]: matrix (c, 3), bias (3,), float32 on the CPU; explained: the share that
    the map accounts for of the variance of the picture, averaged over each cell's pixels (1 where it has none).
    """

    matrix: Tensor
    bias: Tensor
    explained: float


def fit(x0: Tensor, picture: Image.Image) -> LatentRGB:
    """Least squares between a clean latent x0 (1, c, h, w) and its picture (RGB, any size), averaged over each cell.

    Where cells are too few or too alike for one answer, the smallest map is taken. Raises ValueError for several
    latents or a picture that is not RGB, ArithmeticError for NaN or infinity.
    """
    if x0.ndim != 4 or len(x0) != 1 or 0 in x0.shape or picture.mode != "RGB":
        raise ValueError(f"expected a latent (1, c, h, w) and an RGB picture, got {tuple(x0.shape)} and {picture.mode}")
    rows = cells(x0)
    if not bool(torch.isfinite(rows).all()):
        raise ArithmeticError("the latent holds NaN or infinity")
    reduced = np.asarray(picture.resize((x0.shape[3], x0.shape[2]), Image.Resampling.BOX))
    colours = torch.from_numpy(reduced.reshape(-1, 3) / 255)
    known = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
    solved = torch.linalg.lstsq(known, colours, driver="gelsd").solution  # gelsd: any rank
    left, spread = (known @ solved - colours).square().sum(), (colours - colours.mean(dim=0)).square().sum()
    explained = 1.0 if spread < ROUNDING * len(rows) else float(1 - left / spread)
    return LatentRGB(solved[:-1].float(), solved[-1].float(), explained)


def apply(rgb: LatentRGB, latent: Tensor) -> Image.Image:
    """A latent (1, c, h, w), noisy or not -> PIL RGB of w x h pixels, one per cell; what leaves [0, 1] is clipped."""
    if latent.ndim != 4 or latent.shape[:2] != (1, len(rgb.matrix)):
        raise ValueError(f"expected a latent (1, {len(rgb.matrix)}, h, w), got {tuple(latent.shape)}")
    colours = cells(latent) @ rgb.matrix.double() + rgb.bias.double()
    pixels = (colours.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.reshape(*latent.shape[2:], 3).numpy())


def cells(latent: Tensor) -> Tensor:
    """(1, c, h, w) -> (h w, c) float64 on the CPU."""
    return latent[0].detach().to("cpu", torch.float64).flatten(1).T
