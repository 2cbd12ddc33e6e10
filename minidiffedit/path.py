"""What an inversion hands to an editor: the levels of one picture, and how to walk them down again.

Five words are all an editor needs, whichever inversion made the path: `path.rows(n)`, `path.down()`, `path.null(j)`,
`path.pin(x, j)` and `step = path.walk()`, for `step(x, e, j)`. An editor works on several roles at once (source,
target, ...): rows of one tensor, role after role, each of b pictures.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .ddim import Trajectory, alpha_bar, levels

# eps(x, t, texts, *, tap=None, feature=None, given=None, deltas=None) -> one prediction per text: `sd.eps`, whose hooks
# see and change what happens inside the UNet (attention.py). Methods that use no hook ask for diffedit's `Eps`.
HookedEps = Callable[..., Sequence[Tensor]]


class Path(Trajectory):
    """Levels 0..K of x0 (b, c, h, w), and what belongs to them.

    null: the text of unguided predictions, or nulls: one for each level (null-text inversion). noises: what a step from
    level j adds (none: DDIM, eta = 0). pinned: an editor's source row is put back on the path at every level. sources:
    a source text of their own for some levels; one of twice the length gives keys by its first half, values by its
    second (see `texts`). sampler: see `improvement`.
    """

    def __init__(
        self,
        latents: Sequence[Tensor],
        steps: int,
        null: Any = None,
        *,
        nulls: Mapping[int, Any] | None = None,
        noises: Mapping[int, Tensor] | None = None,
        sources: Mapping[int, Tensor] | None = None,
        eta: float = 1.0,
        pinned: bool = False,
        sampler: str = "ddim",
    ):
        super().__init__(latents, steps)
        self.any_null, self.nulls, self.noises = null, dict(nulls or {}), dict(noises or {})
        self.sources, self.eta, self.pinned, self.sampler = dict(sources or {}), eta, pinned, sampler
        self.t, self.a = levels(steps)

    @property
    def top(self) -> int:
        """K, the noisiest level that the path holds."""
        return len(self) - 1

    def down(self) -> Iterator[int]:
        """K, ..., 1: the levels that a step leaves."""
        return iter(range(self.top, 0, -1))

    def null(self, j: int) -> Any:
        """The text of the unguided prediction at level j."""
        return self.nulls.get(j, self.any_null)

    def source(self, j: int, text: Any) -> Any:
        """The source's text at level j: `text`, unless the path has learned one."""
        return self.sources.get(j, text)

    def rows(self, roles: int) -> Tensor:
        """The top level, once for each role: (roles b, c, h, w)."""
        return torch.cat([self[self.top]] * roles)

    def texts(self, *texts: Tensor) -> Tensor:
        """One text a role, each (1 or b, 77, width) -> (roles b, 77, width), in the order of `rows`; beside one that is
        twice as long (see `sources`) the others are said twice.
        """
        longest = max(text.shape[1] for text in texts)
        texts = tuple(text.repeat(1, longest // text.shape[1], 1) for text in texts)
        return torch.cat([text.expand(len(self[0]), -1, -1) for text in texts])

    def pin(self, x: Tensor, j: int) -> Tensor:
        """x (roles b, c, h, w) with its first role put back to level j, if this path pins its source."""
        return torch.cat([self[j], x[len(self[j]) :]]) if self.pinned else x

    def walk(self) -> Callable[[Tensor, Tensor, int], Tensor]:
        """`step` for one walk down, by the sampler: one of second order looks back to the walk's step before."""
        improve = improvement(self.sampler, self.steps)
        return lambda x, e, j: self.step(x, improve(x, e, self.a[j], self.a[j - 1]), j)

    def step(self, x: Tensor, e: Tensor, j: int) -> Tensor:
        """All rows from level j to j - 1 along their predictions e: DDIM, or with noises the DDPM step."""
        mean, sigma = mean_and_sigma(x, e, self.a[j], self.a[j - 1], self.eta if self.noises else 0.0)
        return mean if not self.noises else mean + sigma * self.noises[j].repeat(len(x) // len(self.noises[j]), 1, 1, 1)

    def prefix(self, level: int) -> "Path":
        """Levels 0..level with what belongs to them."""
        return self.of([*super().prefix(level).values()])

    def by(self, sampler: str) -> "Path":
        """The same path, walked by a sampler; one with noises is walked by that which its noises were made for."""
        return self if self.noises or sampler == self.sampler else self.of([*self.values()], sampler=sampler)

    def of(self, latents: Sequence[Tensor], **other: Any) -> "Path":
        """A path through these levels with what belongs to this one, but for what is given."""
        own = {name: getattr(self, name) for name in ("nulls", "noises", "sources", "eta", "pinned", "sampler")}
        return Path(latents, self.steps, **{"null": self.any_null} | own | other)


def mean_and_sigma(x: Tensor, e: Tensor, a: float, a_to: float, eta: float) -> tuple[Tensor, float]:
    """Mean and deviation of the step from alpha_bar a down to a_to along e (2010.02502, eq. 12, sigma by eq. 16)."""
    sigma = eta * math.sqrt((1 - a_to) / (1 - a) * (1 - a / a_to))
    predicted_x0 = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
    return math.sqrt(a_to) * predicted_x0 + math.sqrt(1 - a_to - sigma**2) * e, sigma


# improved(x, e, a, a_to): the prediction to step along from alpha_bar a down to a_to, in place of e, the model's of x.
Improvement = Callable[[Tensor, Tensor, float, float], Tensor]


def improvement(sampler: str, steps: int) -> Improvement:
    """What a sampler makes of the predictions of one walk, asked from step to step in their order.

    "ddim": nothing. "dpmsolver++": DPM-Solver++(2M) (Lu et al., 2211.01095, algorithm 2; diffusers' "midpoint"): the
    clean latent D that a prediction leads to is drawn on along its change since the step before, D + (D - D_before)
    h / (2 h_before), h being the steps of lambda = log(sqrt(a) / sqrt(1 - a)). DDIM's step along that is the paper's,
    and the step with eta = 1 its stochastic form, diffusers' "sde-dpmsolver++". The first step has nothing to go by,
    and, as in diffusers, of fewer than 15 the last one does not.
    """
    before: list[tuple[float, Tensor]] = []

    def improved(x: Tensor, e: Tensor, a: float, a_to: float) -> Tensor:
        here, there = (0.5 * math.log(one / (1 - one)) for one in (a, a_to))
        D, known = (x - math.sqrt(1 - a) * e) / math.sqrt(a), [*before]
        before[:] = [(here, D)]
        if not known or (steps < 15 and a_to == alpha_bar()[0]):
            return e
        ((above, D_before),) = known
        return e - math.sqrt(a / (1 - a)) * (there - here) / (2 * (here - above)) * (D - D_before)

    return improved if sampler == "dpmsolver++" else lambda x, e, a, a_to: e
