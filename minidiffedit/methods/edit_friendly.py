"""Edit-friendly DDPM inversion (Huberman-Spiegelglas et al., 2304.06140): the noises that make DDPM return a picture.

Levels x_j = sqrt(a_j) x_0 + sqrt(1 - a_j) n_j with noises n_j independent of one another, then, from the top down, what
a step adds: z_j = (x_{j-1} - mean(x_j)) / sigma_j with eta = 1 (`path.mean_and_sigma`). A run under another text that
adds the same z_j keeps the picture's layout. Edited: replay from level K; less strength keeps more. Model rows: 2 K b
(K b under no source text, or at source_scale 1), and the editor's. The authors also pay for levels that they skip, and
set the last z to zero, after which equal texts miss x_0 (`zero_last`). Left out: their use of prompt-to-prompt.
"""

from typing import Annotated, Any

import torch
from torch import Tensor

from ..ddim import level_at, levels
from ..diffedit import Eps, working
from ..options import About, Sampler, Scale, Seed, Steps, Strength
from ..path import Path, improvement, mean_and_sigma
from .guidance import cfg
from .sdedit import draws, vp_noised

SAMPLER = "DDPM"  # as metadata name it


@torch.no_grad()
def edit_friendly(
    eps: Eps,
    x0: Tensor,
    null: Any,
    source: Any = "",
    *,
    steps: Steps = 50,
    strength: Strength = 0.64,
    source_scale: Scale = 3.5,
    zero_last: Annotated[bool, About("no noise in the last step, as the authors have it")] = False,
    sampler: Sampler = "ddim",
    seed: Seed = 0,
) -> Path:
    """The noises hold for these steps, source text and source_scale; an editor's source row is held on the path."""
    x0, a, K, draw = working(x0), levels(steps).a, level_at(strength, steps), draws(x0.shape, seed)
    x = [x0, *(vp_noised(x0, next(draw).to(x0), a[j]) for j in range(1, K + 1))]
    path = visited(eps, x, null, source, steps=steps, scale=source_scale, sampler=sampler)
    if zero_last and K:
        path.noises[1] = torch.zeros_like(x0)
    return path


def visited(
    eps: Eps,
    x: list[Tensor],
    null: Any,
    source: Any,
    *,
    steps: int,
    scale: float = 1.0,
    eta: float = 1.0,
    sampler: str = "ddim",
) -> Path:
    """The path through the levels x, (b, 4, h, w) each, with the noises that lead a sampler with eta > 0 from one to
    the next under the source text. The levels become what the steps reach, which differs by rounding; level 0 stays
    the picture's own bits, for what is held outside a mask.
    """
    (t, a), z, x0, x, improve = levels(steps), dict[int, Tensor](), x[0], [*x], improvement(sampler, steps)
    for j in range(len(x) - 1, 0, -1):
        alone = source is null or scale == 1
        e = eps(x[j], t[j], [source])[0] if alone else cfg(scale)(*eps(x[j], t[j], [null, source]))
        mean, sigma = mean_and_sigma(x[j], improve(x[j], e, a[j], a[j - 1]), a[j], a[j - 1], eta)
        z[j] = (x[j - 1] - mean) / sigma
        x[j - 1] = mean + sigma * z[j]
    return Path([x0, *x[1:]], steps, null, noises=z, eta=eta, pinned=True, sampler=sampler)
