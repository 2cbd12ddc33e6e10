"""SDE-Drag (Nie et al., 2311.01410): places are dragged by copying what is there, in noise, move by move.

Each move noises the picture by a Markov chain to level K. There the patch around each place is copied on its way to
where it shall be, times `boost`, and what it leaves is mostly noise: keep patch + sqrt(1 - keep^2) n. Cycle-SDE leads
back (sde_diffedit.py): DDPM's step with the noises z_j that would lead the chain itself from x_j to x_{j-1}. As
sigma z_j = x_{j-1} - mean(x_j), that is y_{j-1} = x_{j-1} + mean(y_j) - mean(x_j): without a patch the picture returns.
Outside the mask y_{j-1} is x_{j-1}. Guidance falls from guidance_scale at level K to 1 at the end. Model rows: 4 K b
for each move. The authors make one move for each 2 cells of the way. Left out: their LoRA, trained on the picture.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from ..ddim import level_at, levels
from ..diffedit import Eps, checked_mask, working
from ..options import Scale, Seed, Steps, Strength, Within
from ..path import mean_and_sigma
from .sdedit import draws

Cell = tuple[int, int]  # row and column of the latent

SAMPLER = "DDPM"  # as metadata name it


@torch.no_grad()
def sde_drag(
    eps: Eps,
    x0: Tensor,
    points: Sequence[tuple[Cell, Cell]],
    null: Any,
    source: Any = "",
    mask: Tensor | None = None,
    *,
    steps: Steps = 100,
    strength: Strength = 0.6,
    guidance_scale: Scale = 3.0,
    moves: Annotated[int, Within(1, 100, "moves in which places are dragged, about one for each 16 pixels")] = 5,
    radius: Annotated[int, Within(1, 64, "half the side of a patch, in cells of 8 pixels")] = 5,
    boost: Annotated[float, Within(0, 10, "what a copied patch is multiplied by")] = 1.1,
    keep: Annotated[float, Within(0, 1, "share of the patch that stays where it was")] = 0.3,
    seed: Seed = 0,
) -> Tensor:
    """x0 (b, 4, h, w); points: from where to where; source: what the picture shows; mask (b or 1, 1, h, w): where it
    may change. Returns the same shape.
    """
    x, (t, a), K = working(x0), levels(steps), level_at(strength, steps)
    M, draw = torch.ones_like(x[:, :1]) if mask is None else checked_mask(mask, x), draws(x0.shape, seed)
    for move in range(moves if K and any(start != goal for start, goal in points) else 0):
        chain = [x]
        for j in range(1, K + 1):
            kept = a[j] / a[j - 1]
            chain.append(math.sqrt(kept) * chain[-1] + math.sqrt(1 - kept) * next(draw).to(x))
        hops = [(along(start, goal, move / moves), along(start, goal, (move + 1) / moves)) for start, goal in points]
        y = copied(chain[K], hops, next(draw).to(x), radius, boost, keep)
        for j in range(K, 0, -1):
            both = torch.cat([chain[j], y])
            e_null, e_text = eps(both, t[j], [null, source])
            e = e_null + (1 + (guidance_scale - 1) * j / K) * (e_text - e_null)
            mean_x, mean_y = mean_and_sigma(both, e, a[j], a[j - 1], eta=1.0)[0].split(len(x))
            y = chain[j - 1] + M * (mean_y - mean_x)
        x = y
    return x


def along(start: Cell, goal: Cell, share: float) -> Cell:
    """The cell at a share of the way, rounded towards the start."""
    return start[0] + int(share * (goal[0] - start[0])), start[1] + int(share * (goal[1] - start[1]))


def copied(
    x: Tensor, hops: Sequence[tuple[Cell, Cell]], noise: Tensor, radius: int, boost: float, keep: float
) -> Tensor:
    """x (b, c, h, w) with each patch at its new place and noise where it was, as far as both places have room."""
    x, (h, w) = x.clone(), x.shape[2:]
    for (r, c), (r_to, c_to) in hops:
        up, down = min(radius, r, r_to), min(radius, h - r, h - r_to)
        left, right = min(radius, c, c_to), min(radius, w - c, w - c_to)
        here = ..., slice(r - up, r + down), slice(c - left, c + right)
        there = ..., slice(r_to - up, r_to + down), slice(c_to - left, c_to + right)
        patch = x[here].clone()
        if (r, c) != (r_to, c_to):
            x[here] = keep * patch + math.sqrt(1 - keep**2) * noise[here]
            x[there] = boost * patch
    return x
