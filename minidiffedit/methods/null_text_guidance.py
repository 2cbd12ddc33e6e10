"""Null-text guidance (Zhao et al., 2305.06710): a picture as a cartoon, by disturbing what guidance leads away from.

The unguided prediction looks at another latent than the guided one: u = eps(x', t, ""), e = u + w (eps(x, t, T') - u).
Back-D: x' is the latent of `back` timesteps earlier, which has more noise; Image-D: x' is the clean picture. The model
is told t in either case. It starts from the picture under one noise at the level of `strength`; latents from before
that are the picture under the same noise at their levels. back = 0 is plain guidance. The text should describe the
picture. Model rows: 2 K b.
Left out: generation without a picture, which is plain guidance down to that level, then this.
"""

import math
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..ddim import level_at, levels, move
from ..diffedit import Eps, working
from ..options import About, Scale, Seed, Steps, Strength, Within
from .sdedit import draws, noised


@torch.no_grad()
def null_text_guidance(
    eps: Eps,
    x0: Tensor,
    null: Any,
    target: Any,
    *,
    steps: Steps = 100,
    strength: Strength = 0.4,
    guidance_scale: Scale = 10.0,
    disturb: Annotated[Literal["back", "image"], About("x' is an earlier latent (Back-D), or the picture")] = "back",
    back: Annotated[int, Within(0, 1000, "timesteps by which x' is earlier; the authors use 100 to 300")] = 200,
    seed: Seed = 0,
) -> Tensor:
    """x0 (b, 4, h, w) -> the same shape. `back` is rounded to levels; above the top level x' stays there."""
    x0, (t, a), K = working(x0), levels(steps), level_at(strength, steps)
    start = noised(x0, next(draws(x0.shape, seed)), steps=steps, strength=1.0)
    seen, earlier = dict(start), math.floor(back / 1000 * steps + 0.5)  # of all levels, those passed replaced
    x = start[K]
    for j in range(K, 0, -1):
        other = x0 if disturb == "image" else seen[min(j + earlier, steps)]
        u, e = eps(other, t[j], [null])[0], eps(x, t[j], [target])[0]
        x = seen[j - 1] = move(x, u + guidance_scale * (e - u), a[j], a[j - 1])
    return x
