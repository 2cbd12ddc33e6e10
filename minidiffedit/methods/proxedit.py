"""ProxEdit (Han et al., 2306.05414): guidance that ignores small differences, and latents held where they are small.

Proximal guidance (see guidance.py) on negative-prompt inversion. With R = 1 where |e_text - e_null| is not above the
limit, below `guided_below`: inversion guidance, x_{j-1} <- x_{j-1} - rate R (x_{j-1} - x*_{j-1}), x* the path, and
reconstruction guidance, x0_hat <- x0_hat - rate R (x0_hat - x*_0) inside the step, which adds
-sqrt(a_{j-1}) rate R (x0_hat - x*_0) to it. R is per channel, as in the authors' code. Model rows: 2 K b.
Left out: its use inside other editors, which is `guidance="prox"` of theirs (masactrl, replay).
"""

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffedit import Eps
from ..options import Scale, Within
from ..path import Path
from .guidance import Norm, Quantile, limit, proximal

Rate = Annotated[float, Within(0, 1, "how firmly, 0..1; 0: not at all")]


@torch.no_grad()
def proxedit(
    eps: Eps,
    path: Path,
    target: Any,
    *,
    guidance_scale: Scale = 7.5,
    quantile: Quantile = 0.4,
    norm: Norm = "l0",
    inversion_guidance: Rate = 1.0,
    reconstruction_guidance: Rate = 0.0,
    guided_below: Annotated[int, Within(0, 1000, "timestep below which latents are held")] = 400,
    grow: Annotated[int, Within(0, 64, "cells by which what is edited grows before the rest is held")] = 0,
) -> Tensor:
    """The level that a step reaches is held on the path's; where all is held the picture itself comes back."""
    x = path.rows(1)
    step = path.walk()
    for j in path.down():
        e_null, e_text = eps(x, path.t[j], [path.null(j), target])
        d = e_text - e_null
        least = limit(d, quantile)
        e = e_null + guidance_scale * proximal(d, least, norm)
        x0_hat = (x - math.sqrt(1 - path.a[j]) * e) / math.sqrt(path.a[j])
        x = step(x, e, j)
        if path.t[j] < guided_below:
            edited = (d.abs() > least).to(x)
            R = 1 - F.max_pool2d(edited, 2 * grow + 1, stride=1, padding=grow)
            x = x - math.sqrt(path.a[j - 1]) * reconstruction_guidance * R * (x0_hat - path[0])
            x = torch.lerp(x, path[j - 1], inversion_guidance * R)  # at rate 1 the path's own bits
    return x
