"""Imagic (Kawar et al., 2210.09276): the edit is made by a model that has learned the picture under a text of its own.

Section 3.2: A. the target's text e is moved, by Adam on |n - eps(z_t, t, e)|^2, until it makes the picture; B. with
that text the UNet learns the picture, here by LoRA (lora.py) where the authors train all weights; C. from noise,
guided, under share target + (1 - share) learned. Model rows: text_steps + lora_steps batch, with gradient, and 2 N. One
picture at a time. Left out: the authors' second model for higher resolutions.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from ..ddim import levels, move
from ..options import Scale, Seed, Steps, Within
from ..path import HookedEps
from .descent import Adam, slopes
from .guidance import cfg
from .lora import Batch, LoraRate, LoraSteps, Rank, adapted, denoising, drawn, lora, one_picture
from .sdedit import draws

TextSteps = Annotated[int, Within(0, 5000, "steps in which a text learns the picture")]
TextRate = Annotated[float, Within(0, 1, "how fast a text is learned", ("text_steps", 0))]
Shapes = Mapping[str, tuple[int, int]]


@torch.no_grad()
def imagic(
    eps: HookedEps,
    x0: Tensor,
    projections: Shapes,
    null: Any,
    target: Tensor,
    *,
    share: Annotated[float, Within(-10, 10, "of the target's text beside the learned one; 1: the target's")] = 0.7,
    steps: Steps = 50,
    guidance_scale: Scale = 7.5,
    text_steps: TextSteps = 500,
    text_rate: TextRate = 1e-3,
    lora_steps: LoraSteps = 250,
    rank: Rank = 16,
    lora_rate: LoraRate = 5e-4,
    batch: Batch = 4,
    seed: Seed = 0,
) -> Tensor:
    x0 = one_picture(x0, "Imagic")
    text = learned_text(eps, x0, target, text_steps, text_rate, seed)
    made = lora(
        eps, x0, projections, text, lora_steps=lora_steps, rank=rank, lora_rate=lora_rate, batch=batch, seed=seed
    )
    mixed, guide, (t, a) = share * target + (1 - share) * text.to(target), cfg(guidance_scale), levels(steps)
    eps, x = adapted(eps, made), next(draws(x0.shape, seed)).to(x0)
    for j in range(steps, 0, -1):
        x = move(x, guide(*eps(x, t[j], [null, mixed])), a[j], a[j - 1])
    return x


def learned_text(eps: HookedEps, x0: Tensor, text: Tensor, steps: int, rate: float, seed: int) -> Tensor:
    """A text (1, 77, width), from another, that makes the picture."""
    generator, adam, at = torch.Generator("cpu").manual_seed(seed), Adam(rate), text.detach().to(x0)
    for _ in range(steps):
        t, n = drawn(x0, generator)
        (at,) = adam.step([at], slopes(partial(denoising_text, eps, x0, t, n), [at])[1])
    return at


def denoising_text(eps: HookedEps, x0: Tensor, t: int, n: Tensor, text: Tensor) -> Tensor:
    return denoising(eps, x0, text, t, n)
