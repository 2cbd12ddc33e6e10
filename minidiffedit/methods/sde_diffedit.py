"""SDE-DiffEdit (Nie et al., 2311.01410): DiffEdit whose encoding and decoding are random, with the same noises.

Cycle-SDE: the picture goes up a Markov chain, x_j = sqrt(a_j / a_{j-1}) x_{j-1} + sqrt(1 - a_j / a_{j-1}) n, which asks
no model. z_j = (x_{j-1} - mean(x_j)) / sigma_j are the noises that lead DDPM (eta = 1) down it under the source text.
The decoding under the target adds the same z_j; after each step what lies outside the mask is the chain's level just
reached, at the end the picture. The mask is DiffEdit's. Model rows: the mask's 2 n b, 2 K b for the noises, 2 K b for
the decoding, K b less each where no guidance is asked for. The paper's drag is sde_drag.py.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..ddim import level_at, levels
from ..diffedit import Eps, checked_mask, mask_at, working
from ..options import Grey, Sampler, Scale, Seed, Steps, Strength
from ..path import Path
from .edit_friendly import visited
from .sdedit import draws

SAMPLER = "DDPM"  # as metadata name it


@torch.no_grad()
def cycle_sde(
    eps: Eps,
    x0: Tensor,
    null: Any,
    source: Any = "",
    *,
    steps: Steps = 50,
    strength: Strength = 0.7,
    guidance_scale: Scale = 7.5,
    sampler: Sampler = "ddim",
    seed: Seed = 0,
) -> Path:
    """The noises hold for these steps, source text and guidance_scale; a source row is held on the path."""
    x, a, draw = [working(x0)], levels(steps).a, draws(x0.shape, seed)
    for j in range(1, level_at(strength, steps) + 1):
        kept = a[j] / a[j - 1]
        x.append(math.sqrt(kept) * x[-1] + math.sqrt(1 - kept) * next(draw).to(x[0]))
    return visited(eps, x, null, source, steps=steps, scale=guidance_scale, sampler=sampler)


@torch.no_grad()
def decode(
    eps: Eps, mask: Tensor, path: Path, target: Any, *, guidance_scale: Scale = 7.5, grey: Grey = "level"
) -> Tensor:
    """mask (b or 1, 1, h, w) in [0, 1], 1 = edited; path: any, which says how to step (DDIM's: DiffEdit's decoding)."""
    M, y = checked_mask(mask, path[0]), path.rows(1)
    step = path.walk()
    for j in path.down():
        if guidance_scale == 1:
            e = eps(y, path.t[j], [target])[0]
        else:
            e_null, e_text = eps(y, path.t[j], [path.null(j), target])
            e = e_null + guidance_scale * (e_text - e_null)
        m = mask_at(M, j - 1, path.top, grey)
        y = m * step(y, e, j) + (1 - m) * path[j - 1]
    return y
