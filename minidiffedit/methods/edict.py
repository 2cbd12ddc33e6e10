"""EDICT (Wallace et al., 2211.12446): an inversion that is exact, as two latents lead each other.

Section 4: x and y are both the picture at first. A step down moves x along the prediction at y, then y along that at
the new x, and mixes them, x <- p x + (1 - p) y and y <- p y + (1 - p) x. Each of these can be undone, so the way up
under the source text is the way down backwards, and under an equal target it ends where it began. Which of the two is
moved first changes from level to level, as the authors have it. In float64, as rounding grows by 1 / p at each of two
mixings a level: where it could reach the picture (`MOST`), the run is refused.
A step asks the model twice in turn, the second time about what it made of the first: no `Path` does that, so that this
is a method, not an inversion for others. Model rows: 8 K b, or 4 K b at guidance 1.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor

from ..ddim import level_at, levels, move
from ..diffedit import Eps, working
from ..options import Scale, Steps, Strength, Within
from .guidance import cfg

MOST = 1e12  # times by which rounding may grow; float64's is 1e-16


@torch.no_grad()
def edict(
    eps: Eps,
    x0: Tensor,
    null: Any,
    target: Any,
    source: Any = "",
    *,
    steps: Steps = 50,
    strength: Strength = 0.8,
    guidance_scale: Scale = 3.0,
    mixing: Annotated[float, Within(0.5, 1, "share that each latent keeps of itself")] = 0.93,
) -> Tensor:
    """x0 (b, 4, h, w) -> x at level 0, the same shape. Raises ValueError for too many levels at this mixing."""
    check_edict({"mixing": mixing, "strength": strength, "steps": steps}, {})
    x, (t, a), p = working(x0), levels(steps), mixing
    pair = [x.double(), x.double()]

    def predict(text: Any) -> Callable[[Tensor, int], Tensor]:
        if guidance_scale == 1:
            return lambda x, j: eps(x, t[j], [text])[0]
        return lambda x, j: cfg(guidance_scale)(*eps(x, t[j], [null, text]))

    up, down, K = predict(source), predict(target), level_at(strength, steps)
    for j in range(1, K + 1):
        x, y = pair if j % 2 else pair[::-1]
        y = (y - (1 - p) * x) / p
        x = (x - (1 - p) * y) / p
        y = move(y, up(x, j), a[j - 1], a[j])
        x = move(x, up(y, j), a[j - 1], a[j])
        pair = [x, y] if j % 2 else [y, x]
    for j in range(K, 0, -1):
        x, y = pair if j % 2 else pair[::-1]
        x = move(x, down(y, j), a[j], a[j - 1])
        y = move(y, down(x, j), a[j], a[j - 1])
        x = p * x + (1 - p) * y
        y = p * y + (1 - p) * x
        pair = [x, y] if j % 2 else [y, x]
    return pair[0].to(working(x0))


def check_edict(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """What can be refused before any work."""
    p, levels_up = settings["mixing"], settings["strength"] * settings["steps"]
    if p < 1 and p ** (-2 * levels_up) > MOST:
        least, most = MOST ** (-0.5 / levels_up), int(math.log(MOST) / math.log(1 / p) / 2)
        raise ValueError(
            f"mixing {p} over {levels_up:g} levels lets rounding outgrow the picture; "
            f"give mixing {math.ceil(1000 * least) / 1000:g} or more, or steps x strength of at most {most}"
        )
