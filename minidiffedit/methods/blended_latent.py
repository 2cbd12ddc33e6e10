"""Blended latent diffusion (Avrahami et al., 2206.02779): paint a text inside a mask, the noised picture around it.

After each step x_{j-1} <- M x_{j-1} + (1 - M) q(x_{j-1} | x_0), under a fresh noise each time; the level just reached,
where the authors' code has the one left, and at level 0 the picture itself. Progressive mask shrinking: a thin mask
starts grown by `grow` cells and shrinks to itself. Painting starts from noise, so that what was inside does not matter,
or from the noised picture (`start`), which keeps the colours of a scribble. `fit_steps`: a decoder for this picture
(decoder_fit.py), the authors take 75 steps. Model rows: 2 K b. Left out: several results, ranked by CLIP.
"""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ddim import level_at, levels, move
from ..diffedit import Eps, checked_mask, mask_at, working
from ..options import About, Grey, Scale, Seed, Steps, Strength, Within
from .decoder_fit import fitted
from .sdedit import draws, vp_noised


@torch.no_grad()
def blended_latent(
    eps: Eps,
    x0: Tensor,
    mask: Tensor,
    target: Any,
    negative: Any = "",
    vae: Any = None,
    pixels: Tensor | None = None,
    *,
    steps: Steps = 50,
    strength: Strength = 0.75,
    guidance_scale: Scale = 7.5,
    start: Annotated[Literal["noise", "picture"], About("what is inside the mask at first")] = "noise",
    grow: Annotated[int, Within(0, 64, "cells by which the mask is larger at first")] = 0,
    grey: Grey = "level",
    fit_steps: Annotated[int, Within(0, 10_000, "steps in which a decoder learns the pixels outside; slow")] = 0,
    seed: Seed = 0,
    record: dict[str, Tensor] | None = None,
) -> Tensor:
    """mask (b or 1, 1, h, w), 1 = painted. x0 (b, 4, h, w) -> the same shape. vae, pixels (b, 3, 8h, 8w): for
    fit_steps, of which record["pixels"] is what the fitted decoder shows.
    """
    x0, (t, a), K = working(x0), levels(steps), level_at(strength, steps)
    if K == 0:
        return x0
    M, draw = checked_mask(mask, x0), draws(x0.shape, seed)
    noise = next(draw).to(x0)
    x = noise if start == "noise" else vp_noised(x0, noise, a[K])
    for j in range(K, 0, -1):
        e_null, e_text = eps(x, t[j], [negative, target])
        x = move(x, e_null + guidance_scale * (e_text - e_null), a[j], a[j - 1])
        around = vp_noised(x0, next(draw).to(x0), a[j - 1]) if j > 1 else x0
        wide = mask_at(grown(M, round(grow * (j - 1) / max(K - 1, 1))), j - 1, K, grey)
        x = wide * x + (1 - wide) * around
    if fit_steps and record is not None and vae is not None and pixels is not None:
        record["pixels"] = fitted(vae, x, pixels, M, fit_steps)
    return x


def grown(M: Tensor, cells: int) -> Tensor:
    return F.max_pool2d(M, 2 * cells + 1, stride=1, padding=cells)
