"""SDEdit (Meng et al., 2108.01073): lay noise over a guide picture up to a level, and denoise it under a text.

The guide is a photograph, strokes or a pasted composite (`files.images.composite`). Two forms of the same process: "vp"
is SD's own, sqrt(a) x0 + sqrt(1-a) noise; "ve" is written for x0 + sigma noise, sigma = sqrt((1-a)/a). Between steps a
latent is always in the VP form, which the model takes. eta = 1 is the paper's SDE, 0 is deterministic (img2img).
Model rows: 2 K b for each repeat. Left out: the pixel-space checkpoints of the paper, and its 500-step grid.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..ddim import Trajectory, level_at, levels, whole
from ..diffedit import Eps, checked_mask, finite, mask_at, working
from ..options import About, Grey, Sampler, Scale, Seed, Steps, Strength, Within
from ..path import improvement

Form = Literal["vp", "ve"]


def vp_noised(x0: Tensor, noise: Tensor, a: float) -> Tensor:
    return math.sqrt(a) * x0 + math.sqrt(1 - a) * noise


def ve_noised(x0: Tensor, noise: Tensor, a: float) -> Tensor:
    return math.sqrt(a) * (x0 + math.sqrt((1 - a) / a) * noise)


def vp_step(x: Tensor, e: Tensor, a: float, a_to: float, eta: float, draw: Iterator[Tensor]) -> Tensor:
    """x (b, 4, h, w) along the prediction e from alpha_bar a to a_to (2010.02502, eq. 12, sigma by eq. 16)."""
    sigma = eta * math.sqrt((1 - a_to) / (1 - a) * (1 - a / a_to))
    predicted_x0 = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
    x = math.sqrt(a_to) * predicted_x0 + math.sqrt(1 - a_to - sigma**2) * e
    return x + sigma * next(draw).to(x) if eta else x


def ve_step(x: Tensor, e: Tensor, a: float, a_to: float, eta: float, draw: Iterator[Tensor]) -> Tensor:
    """The same step on x / sqrt(a) = x0 + s noise; at eta = 1 it is ancestral (Song et al., 2011.13456, app. F)."""
    s, s_to = math.sqrt((1 - a) / a), math.sqrt((1 - a_to) / a_to)
    sigma = eta * s_to * math.sqrt(1 - (s_to / s) ** 2)
    x = x / math.sqrt(a) + (math.sqrt(s_to**2 - sigma**2) - s) * e
    return math.sqrt(a_to) * (x + sigma * next(draw).to(x) if eta else x)


FORMS = {"vp": (vp_noised, vp_step), "ve": (ve_noised, ve_step)}


def draws(shape: Sequence[int], seed: int | Sequence[int]) -> Iterator[Tensor]:
    """Noises (b, c, h, w) float32 without end; row i is `noises` of seed + i, or of seed[i], in order."""
    b, *one = shape
    seeds = list(seed) if isinstance(seed, Sequence) else [whole("seed", seed, 0, 2**63 - b) + i for i in range(b)]
    if len(seeds) != b:
        raise ValueError(f"{len(seeds)} seeds for {b} images")
    generators = [torch.Generator("cpu").manual_seed(whole("seed", s, 0, 2**63 - 1)) for s in seeds]
    while True:
        yield torch.cat([torch.randn((1, *one), generator=g, dtype=torch.float32) for g in generators])


def noised(x0: Tensor, noise: Tensor, *, steps: int, strength: float, form: Form = "vp") -> Trajectory:
    """x0 (b, 4, h, w) under one noise at every level up to that of `strength`; level 0 is x0 itself. No model call."""
    add, a = FORMS[form][0], levels(steps).a
    return Trajectory([x0, *(add(x0, noise.to(x0), a[j]) for j in range(1, level_at(strength, steps) + 1))], steps)


@torch.no_grad()
def denoise(
    eps: Eps,
    start: Trajectory,
    M: Tensor,
    texts: Sequence[Any],
    draw: Iterator[Tensor],
    *,
    guidance_scale: float = 7.5,
    eta: float = 0.0,
    form: Form = "vp",
    grey: str = "level",
    sampler: str = "ddim",
) -> Tensor:
    """`masked_decode` with eta: what it computes at eta = 0, bit for bit in the form "vp"; M (b or 1, 1, h, w) checked.

    texts: null and target, or target alone, unguided. After each step what lies outside M is put back to the level of
    `start` just reached.
    """
    (t, a), step, K = levels(start.steps), FORMS[form][1], max(start)
    y, improve = start[K], improvement(sampler, start.steps)
    for j in range(K, 0, -1):
        *e_null, e = (e.to(y) for e in eps(y, t[j], texts))
        if e_null:
            e = e_null[0] + guidance_scale * (e - e_null[0])
        e, m = improve(y, e, a[j], a[j - 1]), mask_at(M, j - 1, K, grey)
        y = m * step(y, e, a[j], a[j - 1], eta, draw) + (1 - m) * start[j - 1]
    return finite(y, "the decoding")


@torch.no_grad()
def sdedit(
    eps: Eps,
    x0: Tensor,
    target: Any = "",
    negative: Any = "",
    mask: Tensor | None = None,
    *,
    steps: Steps = 50,
    strength: Strength = 0.5,
    guidance_scale: Scale = 7.5,
    eta: Annotated[float, Within(0, 1, "0: deterministic steps, 1: ancestral")] = 0.0,
    repeats: Annotated[int, Within(1, 100, "times that noise is laid and taken away")] = 1,
    form: Annotated[Form, About("how the process is written")] = "vp",
    grey: Grey = "level",
    sampler: Sampler = "ddim",
    seed: Seed = 0,
) -> Tensor:
    """SDEdit on latents (algorithm 1; with a mask, the paper's appendix): x0 (b, 4, h, w) -> y_0, the same shape.

    mask (b or 1, 1, h, w), bool or float in [0, 1], 1 = redrawn; outside it every level holds x0 under the run's first
    noise, level 0 x0 itself (the authors' code draws one a repeat, and puts back the level just left). Each repeat lays
    a new noise over the last result. The same object as target and negative needs no guidance: half the rows.
    """
    y = x0 = working(x0)
    texts = [target] if target is negative or guidance_scale == 1 else [negative, target]
    draw, process = draws(x0.shape, seed), dict[str, Any](eta=eta, form=form, grey=grey, sampler=sampler)
    outside = noised(x0, next(draw), steps=steps, strength=strength, form=form)
    M, K = torch.ones_like(x0[:, :1]) if mask is None else checked_mask(mask, x0), max(outside)
    for repeat in range(repeats if K and M.any() else 0):
        start = outside
        if repeat:
            again = FORMS[form][0](y, next(draw).to(y), levels(steps).a[K])
            start = Trajectory([*outside.prefix(K - 1).values(), M * again + (1 - M) * outside[K]], steps)
        y = denoise(eps, start, M, texts, draw, guidance_scale=guidance_scale, **process)
    return y
