"""DragonDiffusion (Mou et al., 2307.02421): each step is also led by how alike the features at two places are.

The picture's own row walks beside the edited one, and is where its self-attention in the decoder looks (section 3.3,
"visual cross-attention"). In the first `energy_steps` the prediction gains the gradient of an energy (section 3.2):
with S = (1 + cos) / 2 of two features, the mean over a square,
    E_edit = mean over points of 1 / (1 + 4 S(F at the goal, F of the picture at the start)),
    E_content = content / (1 + 4 S(F, F of the picture)) outside what may change,
eps <- eps + energy (M dE_edit/dx + (1 - M) dE_content/dx). F: what the decoder's levels 2 and 1 hand on, at the
latent's size, of whose energies the mean is taken; M: the mask, without one the squares around starts and goals. energy
= 320 is their code's 2,000 times .04 times 4, content = 1.5 its 6 beside 4. From step to step the energies rise by
themselves, as features differ more the less noise there is: what they hold back shows against a walk without them.

Model rows: 3 K, the first ones with gradient, and the inversion's. One picture at a time. Left out: objects that are
resized or replaced, features of whole regions, the top level's latent of the start copied onto the goal, the term that
empties the start, DiffEditor's noise and repeats.
"""

from collections.abc import Sequence
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

Energy = Annotated[float, Within(0, 100_000, "how strictly features are led")]
Square = Annotated[int, Within(0, 32, "half the side of the squares around points, in cells of 8 pixels")]


@torch.no_grad()
def dragon_diffusion(
    eps: HookedEps,
    path: Path,
    places: Sequence[tuple[Place, Place]],
    source: Any = "",
    mask: Tensor | None = None,
    *,
    energy: Energy = 320.0,
    content: Annotated[float, Within(0, 1000, "weight of what shall stay, beside what moves")] = 1.5,
    energy_steps: Early = 0.6,
    square: Square = 2,
    guidance_scale: Scale = 4.0,
) -> Tensor:
    """Rows of a call: the picture's, then the edit's without and with its text. places: from where to where, in cells;
    mask (1, 1, h, w): what may change. Raises ValueError for several pictures.
    """
    one_picture(path[0], "dragging")
    x, guide = path.rows(1), cfg(guidance_scale)
    M = checked_mask(mask, x).to(x) if mask is not None else squares(x, [at for pair in places for at in pair], square)

    def remembering(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site.kind == "self" and site.place == "up":
            k, v = (y[[0, 0, 0]] for y in (k, v))
        return plain(site, q, k, v)

    step = path.walk()
    for i, j in enumerate(path.down()):
        texts, seen = path.texts(source, path.null(j), source), dict[int, Tensor]()

        def look(site: Site, h: Tensor, seen: dict[int, Tensor] = seen) -> Tensor:
            if site.place == "up" and site.kind == "block" and site.level in (1, 2):
                seen[site.level] = h
            return h

        led = i < first(energy_steps, path.top) and energy > 0
        with torch.set_grad_enabled(led):
            y = x.detach().requires_grad_(led)
            e = eps(torch.cat([path[j], y, y]), path.t[j], [texts], tap=remembering, feature=look if led else None)[0]
            _, e_null, e_text = e.split(1)
            e = guide(e_null, e_text).detach()
            if led:
                features = [F.interpolate(h.to(x), x.shape[2:], mode="bilinear") for h in seen.values()]
                edit = torch.stack([edited(h[2:], h[:1].detach(), places, square) for h in features]).mean()
                kept = torch.stack([unlike(h[2:], h[:1].detach(), 1 - M) for h in features]).mean()
                (moves,) = torch.autograd.grad(edit, y, retain_graph=True)
                (stays,) = torch.autograd.grad(content * kept, y)
                e = e + energy * (M * moves + (1 - M) * stays)
        x = step(x, e, j)
    return x


def edited(features: Tensor, source: Tensor, places: Sequence[tuple[Place, Place]], square: int) -> Tensor:
    """E_edit of (1, c, h, w) beside the picture's."""
    pairs = [(sampled(source, inner(start), square), sampled(features, inner(goal), square)) for start, goal in places]
    return torch.stack([unlike(there, here) for here, there in pairs]).mean()


def inner(place: Place) -> Place:
    """Where a place lies among cells that are counted by their middles."""
    return place[0] - 0.5, place[1] - 0.5


def unlike(one: Tensor, other: Tensor, weights: Tensor | None = None) -> Tensor:
    """1 / (1 + 4 S), S the mean over places of (1 + cos) / 2 of the features there; weights (1, 1, h, w): of places."""
    alike = (1 + F.cosine_similarity(one, other, dim=1)) / 2
    if weights is not None:
        return 1 / (1 + 4 * (alike * weights[:, 0]).sum() / weights.sum().clamp(min=1e-6))
    return 1 / (1 + 4 * alike.mean())


def squares(x: Tensor, places: Sequence[Place], radius: int) -> Tensor:
    """(1, 1, h, w) of 0 and 1: the cells around some places."""
    M = torch.zeros_like(x[:, :1])
    for r, c in places:
        M[..., max(int(r) - radius, 0) : int(r) + radius + 1, max(int(c) - radius, 0) : int(c) + radius + 1] = 1
    return M
