"""SDEdit (Meng et al., 2108.01073): lay noise over a guide picture up to a level, and denoise it under a text.

In the manner of `diffedit.py`: the model is one callable, the loops are all here; `arms.py` joins them to pictures.
Forms: "vp" is SD's own, sqrt(a) x0 + sqrt(1-a) noise; "ve" the same process written for x0 + sigma noise with sigma =
sqrt((1-a)/a). Between steps a latent is always in the VP form, which the model takes.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..ddim import Trajectory, level_at, levels, real, whole
from ..diffedit import Eps, Track, checked_mask, finite, untracked, working

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


def check_process(eta: Any, repeats: Any, form: Any) -> tuple[float, int, Form]:
    if form not in FORMS:
        raise ValueError(f"form must be 'vp' or 've', got {form!r}")
    return real("eta", eta, 0, 1), whole("repeats", repeats, 1, 100), form


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
    eps: Eps, trajectory: Trajectory, M: Tensor, target: Any, null: Any, draw: Iterator[Tensor], *,
    guidance_scale: float, eta: float, form: Form = "vp", record: list[Tensor], track: Track = untracked,
) -> Tensor:  # fmt: skip
    """`masked_decode` with eta: what it computes at eta = 0, bit for bit in the form "vp"; M (b or 1, 1, h, w) checked.

    After each step what lies outside M is put back to the trajectory's level just reached. record receives y_K..y_0.
    """
    (t, a), step, K = levels(trajectory.steps), FORMS[form][1], max(trajectory)
    y = trajectory[K]
    record.append(y)
    for j in track(range(K, 0, -1), "decode"):
        if guidance_scale == 1:
            e = eps(y, t[j], [target])[0].to(y)
        else:
            e_null, e_text = (e.to(y) for e in eps(y, t[j], [null, target]))
            e = e_null + guidance_scale * (e_text - e_null)
        y = M * step(y, e, a[j], a[j - 1], eta, draw) + (1 - M) * trajectory[j - 1]
        record.append(y)
    return finite(y, "the decoding")


def redraw(
    eps: Eps, x0: Tensor, target: Any, null: Any, *, mask: Tensor | None = None, steps: int = 50, strength: float = 0.5,
    guidance_scale: float = 7.5, eta: float = 0.0, repeats: int = 1, form: Form = "vp", seed: int | Sequence[int] = 0,
    record: list[Tensor] | None = None, track: Track = untracked,
) -> Tensor:  # fmt: skip
    """SDEdit on latents (2108.01073, algorithm 1; with a mask, its appendix): x0 (b, 4, h, w) -> y_0, the same shape.

    mask (b or 1, 1, h, w), bool or float in [0, 1], 1 = redrawn; outside it every level holds x0 under the run's first
    noise, level 0 x0 itself (the authors' code draws one a repeat, and puts back the level just left). eta: 0
    deterministic, 1 ancestral, the last step included. Each repeat lays a new noise over the last result.
    Seeds: see `draws`. Model rows: 2 K b a repeat, K b at guidance 1, none at K = 0 or an empty mask: x0 comes back.
    Raises ValueError for values out of range, ArithmeticError when the model returns NaN or infinity.
    """
    y = x0 = working(x0)
    g = real("guidance_scale", guidance_scale, -1000, 1000)
    eta, repeats, form = check_process(eta, repeats, form)
    draw = draws(x0.shape, seed)
    outside = noised(x0, next(draw), steps=steps, strength=strength, form=form)
    M, K = torch.ones_like(x0[:, :1]) if mask is None else checked_mask(mask, x0), max(outside)
    for repeat in range(repeats if K and M.any() else 0):
        start = outside
        if repeat:
            again = FORMS[form][0](y, next(draw).to(y), levels(steps).a[K])
            start = Trajectory([*outside.prefix(K - 1).values(), M * again + (1 - M) * outside[K]], steps)
        y = denoise(
            eps, start, M, target, null, draw, guidance_scale=g, eta=eta, form=form,
            record=[] if record is None else record, track=track,
        )  # fmt: skip
    return y
