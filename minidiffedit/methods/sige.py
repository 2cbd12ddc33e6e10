"""SIGE (Li et al., 2211.02048) on DiffEdit: the decoding is computed in one rectangle around the mask. Approximate.

The idea (section 3): an edit changes little, so what a network makes of the unchanged part is taken from the source.
Here on DiffEdit's decoding (2210.11427, step 3). The encoding asks for eps(x_j, t_j, null), so (x_j, t_j) is what the
decoding starts from outside the mask. Of each of these calls is kept, for the rectangle R of the mask's cells grown by
`margin` and to whole cells of the coarsest level:
  a 3x3 convolution's input in the frame, one cell wide, around R; a norm's mean and variance outside R;
  self-attention's keys and values outside R; eps outside R.
The decoding then asks about R alone: convolutions read the frame, norms take their statistics over R and the rest, and
queries in R look at all keys. So the network runs as if at each layer the source's own had been put back outside R.
What that misses: that an edit changes what lies around it, and that the target's text speaks there, too. If R is the
whole picture nothing is missed.

Kept for each level, of SD v1 at 64 x 64: up to 24 million values, 46 MiB in half precision, fewer for a larger R. Model
rows: K + 1 to encode, 2 K of which R alone is computed. Left out: blocks in the place of one rectangle, kernels, the
autoencoder, a negative text, weights that read more than the latent.
"""

from typing import Annotated, Any

import torch
from torch import Tensor

from ..ddim import level_at, levels, move
from ..diffedit import checked_mask, mask_at, working
from ..options import Grey, Scale, Steps, Strength, Within
from ..path import HookedEps
from .around import Around, Box

KEEPS = True  # of the encoding's calls, until the decoding: no estimate of memory knows how much
Margin = Annotated[int, Within(0, 128, "cells by which the rectangle around the mask grows; more is more exact")]


@torch.no_grad()
def sige(
    eps: HookedEps,
    x0: Tensor,
    mask: Tensor,
    null: Any,
    target: Any,
    coarsest: int,
    *,
    steps: Steps = 50,
    strength: Strength = 0.8,
    guidance_scale: Scale = 7.5,
    grey: Grey = "level",
    margin: Margin = 2,
) -> Tensor:
    """x0 (b, 4, h, w); mask (b or 1, 1, h, w): one rectangle holds those of all pictures; an empty one is free."""
    x, (t, a), K = working(x0), levels(steps), level_at(strength, steps)
    M = checked_mask(mask, x)
    if K == 0 or not M.any():
        return x
    around = Around(rectangle(M, margin, 2 ** (coarsest + 1)), x.shape[2:])
    path, kept = [x], [list[Any]() for _ in range(K + 1)]
    for j in range(K + 1):
        with around.keeping(kept[j]):
            e = eps(x, t[j], [null], tap=around.attend)[0]
        if j < K:
            x = move(x, e, a[j], a[j + 1])
            path.append(x)
    for j in range(K, 0, -1):
        with around.reading(kept.pop()):
            e_null, e_text = eps(x, t[j], [null, target], tap=around.attend)
        x = move(x, e_null + guidance_scale * (e_text - e_null), a[j], a[j - 1])
        m = mask_at(M, j - 1, K, grey)
        x = m * x + (1 - m) * path[j - 1]
    return x


def rectangle(mask: Tensor, margin: int, unit: int) -> Box:
    """Around all that is not 0 of a mask (b, 1, h, w), its ends on multiples of `unit` or on the picture's."""
    found = list[int]()
    for axis, size in enumerate(mask.shape[2:]):
        cells = mask.gt(0).any(dim=3 - axis).flatten(0, 1).any(dim=0).nonzero().flatten().tolist()
        low, high = max(min(cells) - margin, 0), min(max(cells) + 1 + margin, size)
        found += [low // unit * unit, min(-(-high // unit) * unit, size)]
    return found[0], found[2], found[1], found[3]
