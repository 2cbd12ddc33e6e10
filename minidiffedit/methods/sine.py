"""SINE (Zhang et al., 2212.04489): what a model has learned of the picture leads the first steps of the target's.

Section 3.1 and 3.2: the UNet learns the picture under the source's text, here by LoRA (lora.py) where the authors train
all weights; from noise, while t is above `until`, e_text = (1 - learned) eps(x, target) + learned eps_learned(x,
source), guided against the unchanged model's null text. Model rows: lora_steps batch with gradient, 2 N, and 1 for each
of these steps. One picture at a time. Left out: weights of the text encoder, patches with their positions, for any
size.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from ..ddim import levels, move
from ..options import Scale, Seed, Steps, Within
from ..path import HookedEps
from .guidance import cfg
from .lora import Batch, LoraRate, LoraSteps, Rank, adapted, lora, one_picture
from .sdedit import draws


@torch.no_grad()
def sine(
    eps: HookedEps,
    x0: Tensor,
    projections: Mapping[str, tuple[int, int]],
    null: Any,
    target: Any,
    source: Any,
    *,
    learned: Annotated[float, Within(0, 1, "share of what the picture's own weights say")] = 0.4,
    until: Annotated[int, Within(0, 1000, "the timestep down to which they are asked", ("learned", 0))] = 500,
    steps: Steps = 100,
    guidance_scale: Scale = 10.0,
    lora_steps: LoraSteps = 200,
    rank: Rank = 16,
    lora_rate: LoraRate = 5e-4,
    batch: Batch = 4,
    seed: Seed = 0,
) -> Tensor:
    """learned = 0 is plain sampling under the target, for which no weights are learned."""
    x0, (t, a), guide = one_picture(x0, "SINE"), levels(steps), cfg(guidance_scale)
    lora_steps = lora_steps if learned > 0 and t[steps] > until else 0
    made = lora(
        eps, x0, projections, source, lora_steps=lora_steps, rank=rank, lora_rate=lora_rate, batch=batch, seed=seed
    )
    own, x = adapted(eps, made), next(draws(x0.shape, seed)).to(x0)
    for j in range(steps, 0, -1):
        e_null, e_text = eps(x, t[j], [null, target])
        if t[j] > until and learned > 0:
            e_text = (1 - learned) * e_text + learned * own(x, t[j], [source])[0]
        x = move(x, guide(e_null, e_text), a[j], a[j - 1])
    return x
