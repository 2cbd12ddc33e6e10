"""DDIM (Song et al., 2010.02502) on Stable Diffusion's noise table: levels, the formula between them, the noise."""

import math
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


@cache
def alpha_bar() -> tuple[float, ...]:
    """The 1000 cumulative products of (1 - beta), float64 then rounded to float32; [0] .99915, [999] .00466.

    beta runs linearly in its square root from .00085 to .012 (SD v1's configuration, `scaled_linear`).
    """
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return tuple(torch.cumprod(1.0 - beta, dim=0).float().tolist())


class Levels(NamedTuple):
    """t[j] and a[j] = alpha_bar[t[j]] of the levels j = 0..N; level 0 is the clean latent."""

    t: tuple[int, ...]
    a: tuple[float, ...]


def levels(steps: int) -> Levels:
    """The levels of N = `steps` sampling steps: t_0 = 0, t_j = 1 + (1000 // N)(j - 1).

    Level 0 keeps a_0 = alpha_bar[0], not 1 (SD's `set_alpha_to_one = false`); the 1 is its `steps_offset`.
    Where N does not divide 1000 the top level lies below full noise. Raises ValueError unless 1 <= steps <= 999.
    """
    stride = 1000 // whole("steps", steps, 1, 999)
    t = (0, *(1 + stride * j for j in range(steps)))
    return Levels(t, tuple(alpha_bar()[i] for i in t))


def level_at(strength: float, steps: int, lowest: int = 0) -> int:
    """The level nearest to a fraction of the noise range: floor(strength * steps + 1/2), at least `lowest`.

    Raises ValueError unless 0 <= strength <= 1.
    """
    level = min(steps, max(lowest, math.floor(real("strength", strength, 0, 1) * steps + 0.5)))
    if strength > 0 and level == 0:
        warnings.warn(f"strength {strength} of {steps} steps rounds to level 0: nothing will change", stacklevel=2)
    return level


def move(x: Tensor, eps: Tensor, a_from: float, a_to: float) -> Tensor:
    """From alpha_bar a_from to a_to along the predicted noise eps; any shape, x's dtype.

    To lower noise the DDIM step at eta = 0, to higher noise the DDIM inversion (2010.02502, eq. 12, 4.3). No clipping.
    """
    x0 = (x - math.sqrt(1 - a_from) * eps) / math.sqrt(a_from)
    return math.sqrt(a_to) * x0 + math.sqrt(1 - a_to) * eps


def noises(shape: Sequence[int], count: int, seed: int) -> Tensor:
    """`count` standard normal draws of `shape` (c, h, w) -> (count, c, h, w) float32, on the CPU.

    One CPU generator per seed, one draw per noise in order: the result depends on neither device, nor batch, nor chunk;
    torch's global generator is untouched. Raises ValueError unless seed is a whole number from 0 to 2^63 - 1.
    """
    generator = torch.Generator("cpu").manual_seed(whole("seed", seed, 0, 2**63 - 1))
    return torch.cat([torch.randn((1, *shape), generator=generator, dtype=torch.float32) for _ in range(count)])


class Trajectory(Mapping[int, Tensor]):
    """Encoded latents keyed by level: trajectory[j] is x_j, (b, c, h, w), for j = 0..K; `.steps` is N."""

    def __init__(self, latents: Sequence[Tensor], steps: int):
        if not 1 <= len(latents) <= steps + 1:
            raise ValueError(f"a trajectory of {steps} steps has 1 to {steps + 1} levels, got {len(latents)}")
        self._latents = tuple(latents)
        self.steps = steps

    def __getitem__(self, level: int) -> Tensor:
        if not isinstance(level, int) or not 0 <= level < len(self._latents):
            raise KeyError(level)
        return self._latents[level]

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self._latents)))

    def __len__(self) -> int:
        return len(self._latents)

    def prefix(self, level: int) -> "Trajectory":
        """Levels 0..level: what encoding less deeply with the same steps would have given, bit for bit."""
        if not 0 <= level < len(self):
            raise ValueError(f"level {level} is not among the encoded levels 0..{len(self) - 1}")
        return Trajectory(self._latents[: level + 1], self.steps)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number (numpy's too) in low..high. Raises ValueError for anything else, True and False included."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not low <= operator.index(value) <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return operator.index(value)


def real(name: str, value: Any, low: float, high: float) -> float:
    """A finite number in low..high. Raises ValueError for anything else: text, None, NaN, True and False included."""
    if isinstance(value, bool) or not hasattr(value, "__float__") or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}")
    return float(value)
