"""What drags share: features followed point by point (DragDiffusion, Shi et al., 2306.14435, section 3.2).

F, (1, c, h, w), is what the decoder hands to its finest level, resized to 4 values a cell of the latent along each side
(2 pixels of the picture apart). A handle h moves towards its goal g in two turns:
  point tracking (eq. 5)     h is set to the place within `reach` whose feature is nearest to that of the beginning
                             at the handle's first place, by the sum of absolute differences;
  motion supervision (eq. 3) the loss (2 r + 1)^2 mean |sg F(h + q) - F(h + d + q)| over q in the square of radius r,
                             d one step towards g: what is at h shall be found a step on.
Beside it what lies outside the mask shall stay: `outside` sum |x_{t-1} - x^0_{t-1}| (1 - M), x_{t-1} one DDIM step on.
A handle nearer than 2 to its goal rests; when all do, the drag ends. Model rows: none of its own.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Attend, Feature, Site
from ..options import Within
from ..path import HookedEps, Path
from .descent import Adam

Place = tuple[float, float]  # row and column
FINE, NEAR = 4, 2.0  # values of F a cell of the latent; how near to its goal a handle rests
Iterations = Annotated[int, Within(0, 2000, "moves of the points, at most")]
Rate = Annotated[float, Within(0, 10, "how far a move changes what is moved")]
Patch = Annotated[int, Within(0, 32, "half the side of the square around a point that is moved, in 2 pixels")]
Reach = Annotated[int, Within(1, 32, "how far a point is looked for after a move, in 2 pixels")]
Outside = Annotated[float, Within(0, 1000, "how strictly the picture outside the mask stays", ("mask", None))]


def sampled(features: Tensor, at: Place, radius: int) -> Tensor:
    """(1, c, h, w) -> (1, c, 2 radius + 1, 2 radius + 1): bilinear around a place; beyond an edge the edge's."""
    h, w = features.shape[2:]
    around = torch.arange(-radius, radius + 1).to(features)
    rows, columns = (at[0] + around).clamp(0, h - 1), (at[1] + around).clamp(0, w - 1)
    top, left = rows.floor().long().clamp(max=max(h - 2, 0)), columns.floor().long().clamp(max=max(w - 2, 0))
    down, right = (rows - top)[:, None], columns - left
    below, beside = (top + 1).clamp(max=h - 1), (left + 1).clamp(max=w - 1)
    upper, lower = (
        (1 - right) * features[:, :, one][..., left] + right * features[:, :, one][..., beside] for one in (top, below)
    )
    return (1 - down) * upper + down * lower


def distance(one: Place, other: Place) -> float:
    return ((one[0] - other[0]) ** 2 + (one[1] - other[1]) ** 2) ** 0.5


def tracked(features: Tensor, wanted: Tensor, at: Place, reach: int) -> Place:
    """The place within `reach` of `at`, rows and columns whole, whose feature is nearest to wanted (1, c, 1, 1)."""
    h, w = features.shape[2:]
    r, c = min(max(round(at[0]), 0), h - 1), min(max(round(at[1]), 0), w - 1)
    top, left = max(r - reach, 0), max(c - reach, 0)
    window = features[0, :, top : r + reach + 1, left : c + reach + 1]
    best = int((window - wanted[0]).abs().sum(0).argmin())
    return float(top + best // window.shape[2]), float(left + best % window.shape[2])


def supervision(
    features: Tensor, held: Tensor, handles: Sequence[Place], goals: Sequence[Place], radius: int
) -> Tensor:
    """The loss of the handles not yet near their goals; held: the features without gradient."""
    loss = 0 * features.sum()
    for h, g in zip(handles, goals):
        if (far := distance(h, g)) >= NEAR:
            on = (h[0] + (g[0] - h[0]) / far, h[1] + (g[1] - h[1]) / far)
            loss = loss + (2 * radius + 1) ** 2 * F.l1_loss(sampled(features, on, radius), sampled(held, h, radius))
    return loss


def dragged(
    ask: Callable[[Tensor, Feature], Tensor],
    variable: Tensor,
    places: Sequence[tuple[Place, Place]],
    mask: Tensor | None,
    *,
    iterations: int,
    rate: float,
    patch: int,
    reach: int,
    outside: float,
) -> tuple[Tensor, list[Place]]:
    """What is learned, once the points are where they shall be, and where they came to, in cells of the latent.

    ask(variable, feature): the model asked with the variable in its place -> x_{t-1}, (1, 4, h, w); feature, which only
    looks, goes along.
    """
    handles, goals = ([(FINE * r, FINE * c) for r, c in ends] for ends in zip(*places))
    adam, wanted, still = Adam(rate), list[Tensor](), Tensor()
    for k in range(iterations):
        with torch.enable_grad():
            seen, one = list[Tensor](), variable.detach().requires_grad_()

            def look(site: Site, h: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen[:] = [h] if site.place == "up" and site.level == 1 and site.kind == "block" else seen
                return h

            x = ask(one, look)
            features = F.interpolate(seen[0].to(x), [FINE * side for side in x.shape[2:]], mode="bilinear")
            held = features.detach()
            if not k:
                wanted, still = [sampled(held, h, 0) for h in handles], x.detach()
            handles = [tracked(held, want, h, reach) for want, h in zip(wanted, handles)] if k else handles
            if not afar(handles, goals):
                break
            kept = 0.0 if mask is None else ((x - still) * (1 - mask)).abs().sum()
            gradients = torch.autograd.grad(supervision(features, held, handles, goals, patch) + outside * kept, one)
        (variable,) = adam.step([variable], gradients)
    return variable, [(r / FINE, c / FINE) for r, c in handles]


def afar(handles: Sequence[Place], goals: Sequence[Place]) -> bool:
    """Whether any handle is not yet near its goal."""
    return any(distance(h, g) >= NEAR for h, g in zip(handles, goals))


@torch.no_grad()
def beside(eps: HookedEps, path: Path, x: Tensor, source: Any, feature: Feature | None = None) -> Tensor:
    """x (1, 4, h, w) led down from the path's top, unguided, beside the picture, into which its self-attentions look in
    the decoder's two finest levels (MasaCtrl, 2304.08465). Model rows: 2 K.
    """

    def mutual(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site.kind == "self" and site.place == "up" and site.level < 2:
            k, v = (y[[0, 0]] for y in (k, v))
        return plain(site, q, k, v)

    x, texts = torch.cat([path[path.top], x]), path.texts(source, source)
    step = path.walk()
    for j in path.down():
        (e,) = eps(x, path.t[j], [texts], tap=mutual, feature=feature)
        x = step(x, e, j)
    return x[1:]
