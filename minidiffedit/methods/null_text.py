"""Null-text inversion (Mokady et al., 2211.09794): one null text for each level, found by gradients, so that guided
decoding under the source text follows the path of an unguided inversion.

Section 3.2 and 3.3, algorithm 1. For levels K..1: from the null text of the level above, at most `inner_steps` of Adam
on |move(x, e_null + w (e_text - e_null)) - x*_{j-1}|^2, then x takes the step. The authors' schedule: rate
1e-2 (1 - i/100), with more than 50 steps 1e-2 (1 - i/2N), which stays above zero; stop below 1e-5 + 2e-5 i. e_text does
not depend on the null text and is predicted once. Model rows: K for the path, K for e_text, at most K inner_steps with
gradient, K for the steps. One picture at a time.
"""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ddim import move
from ..diffedit import Eps
from ..options import Scale, Steps, Strength, Within
from ..path import Path
from .descent import Adam, slopes
from .inversions import Refine, ddim

RATE, ENOUGH, ENOUGH_MORE = 1e-2, 1e-5, 2e-5


@torch.no_grad()
def null_text(
    eps: Eps,
    x0: Tensor,
    null: Tensor,
    source: Tensor,
    *,
    steps: Steps = 50,
    strength: Strength = 1.0,
    guidance_scale: Scale = 7.5,
    inner_steps: Annotated[int, Within(0, 200, "of Adam on each level's null text, at most")] = 10,
    refine: Refine = 1,
) -> Path:
    """null, source (1, 77, width). Returns the path with a null text for each level; it holds for this guidance_scale,
    steps and source text. Raises ValueError for several pictures.
    """
    if len(x0) != 1:
        raise ValueError(f"null-text inversion takes one picture at a time, got {len(x0)}")
    path = ddim(eps, x0, null, source, steps=steps, strength=strength, refine=refine)
    x, found = path.rows(1), dict[int, Any]()
    for i, j in enumerate(path.down()):
        e_text = eps(x, path.t[j], [source])[0]

        def stepped(null: Tensor, x: Tensor = x, j: int = j, e_text: Tensor = e_text) -> Tensor:
            e_null = eps(x, path.t[j], [null])[0]
            return move(x, e_null + guidance_scale * (e_text - e_null), path.a[j], path.a[j - 1])

        null = optimised(
            null, path[j - 1], stepped, inner_steps, RATE * (1 - i / max(100, 2 * steps)), ENOUGH + ENOUGH_MORE * i
        )
        found[j] = null
        x = stepped(null)
    return Path([*path.values()], steps, null, nulls=found)


def optimised(null: Tensor, goal: Tensor, stepped: Any, most: int, rate: float, enough: float) -> Tensor:
    """Adam on |stepped(null) - goal|^2, mean over values, until it is below `enough`; that step is still taken."""
    null, adam = null.detach().float().clone(), Adam(rate)
    for _ in range(most):
        loss, found = slopes(lambda one: F.mse_loss(stepped(one), goal), [null])
        (null,) = adam.step([null], found)
        if float(loss) < enough:
            break
    return null
