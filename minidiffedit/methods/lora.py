"""A few weights for one picture: low-rank additions to the UNet's attentions (LoRA, Hu et al., 2106.09685), by hand.

Section 4.1: each weight W (out, in) of to_q, to_k, to_v and to_out becomes W + B A with A (rank, in) from N(0,
1/rank^2) and B (out, rank) zero at first, so that nothing has changed yet. A step is one of AdamW on |n - eps(z_t, t,
text)|^2, the loss of the UNet's own training (2112.10752, eq. 2), over `batch` draws of t in 0..999 and n; they are
asked one by one, each with its t, so that memory does not grow with them. Settings are DragDiffusion's (2306.14435):
rank 16, rate 5e-4, 80 steps of 4, decay .01. Model rows: steps batch, all with gradient.

Left out: the text encoder's weights, convolutions, dropout, a factor besides the rank's (alpha = rank).
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ddim import alpha_bar
from ..diffedit import finite, working
from ..options import Seed, Within
from ..path import HookedEps
from .descent import Adam, slopes

LoRA = dict[str, tuple[Tensor, Tensor]]  # by the name of a weight: A (rank, in), B (out, rank)
LoraSteps = Annotated[int, Within(0, 5000, "steps in which weights for this picture are learned first")]
Rank = Annotated[int, Within(1, 1024, "of the learned weights", ("lora_steps", 0))]
LoraRate = Annotated[float, Within(0, 1, "how fast weights are learned", ("lora_steps", 0))]
Batch = Annotated[int, Within(1, 64, "noises of a training step", ("lora_steps", 0))]
DECAY = 0.01


@torch.no_grad()
def lora(
    eps: HookedEps,
    x0: Tensor,
    projections: Mapping[str, tuple[int, int]],
    source: Any = "",
    *,
    lora_steps: LoraSteps = 80,
    rank: Rank = 16,
    lora_rate: LoraRate = 5e-4,
    batch: Batch = 4,
    seed: Seed = 0,
    told: Callable[[int, float], None] | None = None,
) -> LoRA:
    """x0 (1, 4, h, w), the picture; source: what it shows. told: called after each step with its number and loss.
    Raises ValueError for several pictures.
    """
    x0, generator = one_picture(x0, "learning weights"), torch.Generator("cpu").manual_seed(seed)
    shapes = projections.items()
    A = [torch.randn((rank, n), generator=generator).to(x0) / rank for _, (_, n) in shapes]
    B = [torch.zeros(m, rank).to(x0) for _, (m, _) in shapes]
    adam = Adam(lora_rate, DECAY)

    def miss(*weights: Tensor) -> Tensor:
        made = dict(zip(projections, zip(weights[: len(A)], weights[len(A) :])))
        return denoising(partial(eps, deltas=deltas(made)), x0, source, t, n)

    for k in range(lora_steps):
        total, found = 0.0, [torch.zeros_like(one) for one in (*A, *B)]
        for _ in range(batch):
            t, n = drawn(x0, generator)
            value, gradients = slopes(miss, [*A, *B])
            total, found = total + float(value) / batch, [one + g / batch for one, g in zip(found, gradients)]
        moved = adam.step([*A, *B], found)
        A, B = moved[: len(A)], moved[len(A) :]
        if told:
            told(k + 1, total)
    for one in B:
        finite(one, "learning weights")
    return dict(zip(projections, zip(A, B)))


def one_picture(x0: Tensor, what: str) -> Tensor:
    if len(x0) != 1:
        raise ValueError(f"{what} takes one picture at a time, got {len(x0)}")
    return working(x0)


def drawn(x0: Tensor, generator: torch.Generator) -> tuple[int, Tensor]:
    """A timestep and a noise."""
    t = int(torch.randint(0, 1000, (), generator=generator))
    return t, torch.randn(x0.shape, generator=generator, dtype=torch.float32).to(x0)


def denoising(eps: HookedEps, x0: Tensor, text: Any, t: int, n: Tensor) -> Tensor:
    """|n - eps(z_t, t, text)|^2, mean over values."""
    a = alpha_bar()[t]
    return F.mse_loss(eps(math.sqrt(a) * x0 + math.sqrt(1 - a) * n, t, [text])[0], n)


def deltas(lora: LoRA) -> dict[str, Tensor]:
    """What `sd.eps` adds to the UNet's weights."""
    return {name: B @ A for name, (A, B) in lora.items()}


def adapted(eps: HookedEps, lora: LoRA) -> HookedEps:
    """The model with the learned weights in it; eps itself where none were learned."""
    return partial(eps, deltas=deltas(lora)) if lora else eps


def state(lora: LoRA) -> dict[str, Tensor]:
    """As diffusers names them in a file: unet.LAYER.lora_A.weight and lora_B.weight."""
    named = ((f"unet.{name.removesuffix('.weight')}", pair) for name, pair in lora.items())
    return {f"{layer}.lora_{x}.weight": one for layer, pair in named for x, one in zip("AB", pair)}
