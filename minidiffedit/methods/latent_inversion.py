"""Latent inversion with timestep-aware sampling (Jung et al., 2402.08601), known from its abstract alone: our reading.

The source's text learns the picture, by Adam on |n - eps(z_t, t, e)|^2 (imagic.py); under it the picture is inverted;
and it is decoded under it, unguided, in the first `source_steps`, where the layout is made, then guided under the
target. Model rows: text_steps with gradient, K, 2 K. One picture at a time.
"""

from typing import Any

import torch
from torch import Tensor

from ..options import Scale, Seed, Steps, Strength
from ..path import HookedEps
from .guidance import cfg
from .imagic import TextRate, TextSteps, learned_text
from .inversions import ddim
from .lora import one_picture
from .prompt_to_prompt import Early, first


@torch.no_grad()
def latent_inversion(
    eps: HookedEps,
    x0: Tensor,
    null: Any,
    target: Any,
    source: Tensor,
    *,
    steps: Steps = 50,
    strength: Strength = 1.0,
    source_steps: Early = 0.3,
    guidance_scale: Scale = 7.5,
    text_steps: TextSteps = 500,
    text_rate: TextRate = 1e-3,
    seed: Seed = 0,
) -> Tensor:
    x0, guide = one_picture(x0, "latent inversion"), cfg(guidance_scale)
    text = learned_text(eps, x0, source, text_steps, text_rate, seed)
    path = ddim(eps, x0, null, text, steps=steps, strength=strength)
    x, early = path.rows(1), first(source_steps, path.top)
    step = path.walk()
    for i, j in enumerate(path.down()):
        e_null, e_text = eps(x, path.t[j], [null, text if i < early else target])
        x = step(x, guide(e_null, e_text) if i >= early else e_text, j)
    return x
