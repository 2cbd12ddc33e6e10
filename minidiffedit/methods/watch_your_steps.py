"""Watch Your Steps (Mirzaei et al., 2308.08947): InstructPix2Pix finds what its instruction concerns, and stays there.

Section 4.1, the relevance map: under one noise at `mask_strength`, |e(I, c) - e(I, 0)| summed over channels, values
beyond the third quartile by 1.5 interquartile ranges cut, rescaled to 0..1; the mask is what is above the threshold.
Section 4.2: InstructPix2Pix from noise, and after each step what lies outside the mask becomes the picture under one
noise at the level reached, at the end the picture itself. Model rows: 2 n b for the mask (their n is 1), 3 N b. Left
out: edits of scenes in three dimensions.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..ddim import level_at, levels, move, noises
from ..diffedit import Mask, mask_at, threshold_maps, working
from ..options import Grey, Scale, Seed, Steps
from ..path import HookedEps
from .diffedit import Fences, MapLevel, Maps, Threshold, fenced
from .instruct_pix2pix import PictureScale, predictor
from .sdedit import draws


@torch.no_grad()
def relevance(
    eps: HookedEps,
    x0: Tensor,
    x0_unscaled: Tensor,
    null: Any,
    instruction: Any,
    *,
    steps: Steps = 100,
    mask_strength: MapLevel = 0.8,
    maps: Maps = 1,
    mask_fence: Fences = 1.5,
    mask_threshold: Threshold = 0.5,
    seed: Seed = 0,
    earlier: Any = None,
) -> Mask:
    """Where the instruction changes what is predicted; `maps` holds one, the mean within the fence. Another threshold
    costs no rows. One picture at a time.
    """
    for known in earlier("mask_threshold") if earlier else ():
        return threshold_maps(known.maps, known.flat_below, clip=None, threshold=mask_threshold)
    if len(x0) != 1:
        raise ValueError(f"relevance maps take one picture at a time, got {len(x0)}")
    (t, a), j, x0 = levels(steps), level_at(mask_strength, steps, lowest=1), working(x0)
    noise, found = noises(x0.shape[1:], maps, seed).to(x0), []
    for one in noise.split(1):
        x_t = math.sqrt(a[j]) * x0 + math.sqrt(1 - a[j]) * one
        e_picture, e_both = eps(x_t, t[j], [null, instruction], given=x0_unscaled)
        found.append((e_both - e_picture).abs().sum(dim=1))
    raw = torch.stack(found, dim=1)
    return fenced(raw, torch.zeros(1, device=raw.device), mask_fence, mask_threshold)


@torch.no_grad()
def watch_your_steps(
    eps: HookedEps,
    x0: Tensor,
    x0_unscaled: Tensor,
    null: Any,
    instruction: Any,
    mask: Tensor,
    *,
    steps: Steps = 100,
    guidance_scale: Scale = 7.5,
    picture_scale: PictureScale = 1.5,
    grey: Grey = "level",
    seed: Seed = 0,
) -> Tensor:
    """mask (b or 1, 1, h, w) in [0, 1], 1 = edited."""
    (t, a), x0, draw = levels(steps), working(x0), draws(x0.shape, seed)
    x, outside = next(draw).to(x0), next(draw).to(x0)
    predict = predictor(eps, x0_unscaled, null, instruction, guidance_scale, picture_scale)
    M = mask.to(x0)
    for j in range(steps, 0, -1):
        x = move(x, predict(x, t[j]), a[j], a[j - 1])
        kept = math.sqrt(a[j - 1]) * x0 + math.sqrt(1 - a[j - 1]) * outside if j > 1 else x0
        m = mask_at(M, j - 1, steps, grey)
        x = m * x + (1 - m) * kept
    return x
