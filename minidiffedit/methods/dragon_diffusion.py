"""DragonDiffusion (Mou et al., 2307.02421): each step is also led by how alike the features at two places are.

As its authors' code drags. The picture's own row walks beside the edited one, whose self-attention in the decoder, but
for the first tenth of the steps, looks into both (section 3.3, "memory bank"). The walk begins with the top level's
latent of each start copied onto its goal. In the first `energy_steps` it is led by the gradient of an energy (section
3.2): with S = (1 + cos) / 2 of two features, the mean over a square,
    E_edit = mean over points of 1 / (1 + 4 S(F at the goal, F of the picture at the start))
             + empty S(F, F of the picture) at the start, where it is not the goal,
    E_content = content / (1 + 4 S(F, F of the picture)) outside what may change,
g = energy (M dE_edit/dx + (1 - M) dE_content/dx) is added to the prediction that DDIM's step makes the clean latent
of, not to that along which it goes back into noise: x <- move(x - sqrt(1 - a) g). Added to both it would nearly cancel
itself: in 50 steps a twelfth were left. F: what the decoder's levels 2 and 1 hand on under the source's text,
at the latent's size, of whose energies the mean is taken; M: the mask, without one the squares around starts and goals.
energy = 320 is their 2,000 times .04 times 4; content = 1.5 and empty = .05 are their 6 and .2 beside 4.

Model rows: 3 K, in the first ones 1 more, with gradient, and the inversion's. One picture at a time. Left out: objects
that are moved whole, resized or replaced, IP-Adapter's picture tokens, DiffEditor's noise and repeats.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Attend, Site
from ..diffedit import checked_mask
from ..options import Scale, Within
from ..path import HookedEps, Path
from .drag import Place, sampled
from .guidance import cfg
from .lora import one_picture
from .prompt_to_prompt import Early, first

Places = Sequence[tuple[Place, Place]]
ALONE = 0.1  # share of the steps before the edit looks into the picture
Energy = Annotated[float, Within(0, 100_000, "how strictly features are led; 0: the picture's own walk")]
Content = Annotated[float, Within(0, 1000, "weight of what shall stay, beside what moves", ("energy", 0))]
Empty = Annotated[float, Within(0, 1000, "weight of a start that shall change, beside what moves", ("energy", 0))]
Square = Annotated[int, Within(0, 32, "half the side of the squares around points, in cells of 8 pixels")]


@torch.no_grad()
def dragon_diffusion(
    eps: HookedEps,
    path: Path,
    places: Places,
    source: Any = "",
    mask: Tensor | None = None,
    *,
    energy: Energy = 320.0,
    content: Content = 1.5,
    empty: Empty = 0.05,
    energy_steps: Early = 0.6,
    square: Square = 2,
    guidance_scale: Scale = 4.0,
) -> Tensor:
    """Rows of a call: the picture's, then the edit's without and with its text. places: from where to where, in cells;
    mask (1, 1, h, w): what may change. Raises ValueError for several pictures.
    """
    one_picture(path[0], "dragging")
    x, guide, step = path.rows(1), cfg(guidance_scale), path.walk()
    M = squares(x, [at for pair in places for at in pair], square) if mask is None else checked_mask(mask, x).to(x)
    x = copied(x, places, square) if energy > 0 else x

    def remembering(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site.kind != "self" or site.place != "up" or i < first(ALONE, path.top):
            return plain(site, q, k, v)
        both = (torch.cat([y[1:], y[[0, 0]]], dim=2) for y in (k, v))
        return torch.cat([plain(site, q[:1], k[:1], v[:1]), plain(site, q[1:], *both)])

    for i, j in enumerate(path.down()):
        texts, led = path.texts(source, path.null(j), source), i < first(energy_steps, path.top) and energy > 0
        theirs, ours = dict[int, Tensor](), dict[int, Tensor]()
        look = partial(kept, theirs) if led else None
        _, *both = eps(torch.cat([path[j], x, x]), path.t[j], [texts], tap=remembering, feature=look)[0].split(1)
        e = guide(*both)
        if led:
            with torch.enable_grad():
                y = x.detach().requires_grad_()
                eps(y, path.t[j], [source], feature=partial(kept, ours))
                sized = partial(F.interpolate, size=x.shape[2:], mode="bilinear")
                levels = [(sized(ours[level].to(x)), sized(theirs[level][:1].to(x))) for level in ours]
                edit = torch.stack([edited(*h, places, square) + empty * left(*h, places, square) for h in levels])
                (moves,) = torch.autograd.grad(edit.mean(), y, retain_graph=True)
                (stays,) = torch.autograd.grad(content * torch.stack([unlike(*h, 1 - M) for h in levels]).mean(), y)
            x = x - math.sqrt(1 - path.a[j]) * energy * (M * moves + (1 - M) * stays)
        x = step(x, e, j)
    return x


def kept(found: dict[int, Tensor], site: Site, h: Tensor) -> Tensor:
    """A feature that changes nothing and keeps what the decoder's levels hand on."""
    if site.place == "up" and site.kind == "block" and site.level in (1, 2):
        found[site.level] = h
    return h


def edited(features: Tensor, source: Tensor, places: Places, square: int) -> Tensor:
    """The first part of E_edit, of features (1, c, h, w) of the edit and of the picture."""
    pairs = [(sampled(features, inner(goal), square), sampled(source, inner(start), square)) for start, goal in places]
    return torch.stack([unlike(*pair) for pair in pairs]).mean()


def left(features: Tensor, source: Tensor, places: Places, square: int) -> Tensor:
    """The second: how alike they are in the squares around starts, but for what lies in those around their goals."""
    found = []
    for start, goal in places:
        around = torch.arange(-square, square + 1).to(features)
        rows, columns = ((around + s - g).abs() > square for s, g in zip(start, goal))
        outside, here = rows[:, None] | columns, [sampled(h, inner(start), square) for h in (features, source)]
        found.append((S(*here)[0] * outside).sum() / outside.sum().clamp(min=1))
    return torch.stack(found).mean()


def inner(place: Place) -> Place:
    """Where a place lies among cells that are counted by their middles."""
    return place[0] - 0.5, place[1] - 0.5


def S(one: Tensor, other: Tensor) -> Tensor:
    """(1, c, h, w) -> (1, h, w)."""
    return (1 + F.cosine_similarity(one, other, dim=1)) / 2


def unlike(one: Tensor, other: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 / (1 + 4 S), of the mean over places; weights (1, 1, h, w): of places."""
    W = torch.ones_like(one[:, :1]) if weights is None else weights
    return 1 / (1 + 4 * (S(one, other) * W[:, 0]).sum() / W.sum().clamp(min=1e-6))


def copied(x: Tensor, places: Places, radius: int) -> Tensor:
    """x (1, 4, h, w) with the cells around each start also around its goal."""
    y = x
    for start, goal in places:
        way = [int(g) - int(s) for s, g in zip(start, goal)]
        M = squares(x, [goal], radius) * squares(x, [start], radius).roll(way, (2, 3))
        y = torch.where(M > 0, x.roll(way, (2, 3)), y)
    return y


def squares(x: Tensor, places: Sequence[Place], radius: int) -> Tensor:
    """(1, 1, h, w) of 0 and 1: the cells around some places."""
    M = torch.zeros_like(x[:, :1])
    for r, c in places:
        M[..., max(int(r) - radius, 0) : int(r) + radius + 1, max(int(c) - radius, 0) : int(c) + radius + 1] = 1
    return M
