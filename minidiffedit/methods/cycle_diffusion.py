"""CycleDiffusion (Wu and De la Torre, 2210.05559): a picture's noises under its source text, replayed under another.

Section 3, "DPM-Encoder": x_K = sqrt(a_K) x_0 + sqrt(1 - a_K) n, then x_{j-1} is drawn from q(x_{j-1} | x_j, x_0), the
step with the true noise in the place of eps, and z_j = (x_{j-1} - mean(x_j)) / sigma_j is what a sampler with eta
adds to get there. It differs from edit-friendly inversion by its levels, which hang together. Edited: replay. Model
rows: K b (2 K b at another source_scale), and the editor's. Left out: many samples, ranked by CLIP, as in the paper.
"""

import math
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from ..ddim import level_at, levels
from ..diffedit import Eps, working
from ..options import Sampler, Scale, Seed, Steps, Strength, Within
from ..path import Path, mean_and_sigma
from .edit_friendly import visited
from .sdedit import draws, vp_noised


@torch.no_grad()
def cycle(
    eps: Eps,
    x0: Tensor,
    null: Any,
    source: Any,
    *,
    steps: Steps = 50,
    strength: Strength = 0.8,
    source_scale: Scale = 1.0,
    eta: Annotated[float, Within(0.001, 1, "how random steps are; 1: ancestral")] = 0.1,
    sampler: Sampler = "ddim",
    seed: Seed = 0,
) -> Path:
    """The noises hold for these steps, eta, source text and source_scale; a source row is held on the path."""
    x0, a, K, draw = working(x0), levels(steps).a, level_at(strength, steps), draws(x0.shape, seed)
    x = {0: x0, K: vp_noised(x0, next(draw).to(x0), a[K])} if K else {0: x0}
    for j in range(K, 1, -1):
        noise = (x[j] - math.sqrt(a[j]) * x0) / math.sqrt(1 - a[j])
        mean, sigma = mean_and_sigma(x[j], noise, a[j], a[j - 1], eta)
        x[j - 1] = mean + sigma * next(draw).to(x0)
    visit = partial(visited, steps=steps, scale=source_scale, eta=eta, sampler=sampler)
    return visit(eps, [x[j] for j in range(K + 1)], null, source)
