"""DragDiffusion (Shi et al., 2306.14435) and DragNoise (Liu et al., 2404.01050): points of a picture are dragged.

Both first learn weights for the picture (lora.py) and invert it with them, under its text and unguided, to .7 of the
noise. There DragDiffusion moves the latent (section 3.2), DragNoise the output of the UNet's middle (section 3.2,
"semantic optimisation"), until the features of the points have gone where they shall (drag.py). The way back is
unguided, beside the picture's own (section 3.4: self-attention looks into the source in the decoder's two finest
levels); DragNoise puts the moved middle in the place of the UNet's at all levels, for both (its "propagation").

Model rows: lora_steps batch with gradient, K to invert, at most `iterations` with gradient, 2 K; DragNoise one more, to
see the middle. The picture itself comes back for points that are where they shall be. One picture at a time. Left out:
DragNoise's encoder is run again in each iteration, though only the middle varies; fp16 with scaled gradients.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention import Feature, Site
from ..ddim import move
from ..diffedit import checked_mask
from ..options import Seed, Steps, Strength
from ..path import HookedEps
from .drag import FINE, Iterations, Outside, Patch, Place, Rate, Reach, afar, beside, dragged
from .inversions import ddim
from .lora import Batch, LoraRate, LoraSteps, Rank, adapted, lora, one_picture

Places = Sequence[tuple[Place, Place]]  # from where to where, in cells of the latent
Shapes = Mapping[str, tuple[int, int]]


def drag_diffusion(
    eps: HookedEps,
    x0: Tensor,
    places: Places,
    projections: Shapes,
    null: Any,
    source: Any = "",
    mask: Tensor | None = None,
    *,
    steps: Steps = 50,
    strength: Strength = 0.7,
    iterations: Iterations = 80,
    rate: Rate = 0.01,
    patch: Patch = 1,
    reach: Reach = 3,
    outside: Outside = 0.1,
    lora_steps: LoraSteps = 80,
    rank: Rank = 16,
    lora_rate: LoraRate = 5e-4,
    batch: Batch = 4,
    seed: Seed = 0,
    record: dict[str, Tensor] | None = None,
) -> Tensor:
    """x0 (1, 4, h, w); source: what the picture shows; mask (1, 1, h, w): where it may change. record: "points", where
    they came to, (n, 2). Raises ValueError for several pictures.
    """
    drag = {"iterations": iterations, "rate": rate, "patch": patch, "reach": reach, "outside": outside}
    learn = {"lora_steps": lora_steps, "rank": rank, "lora_rate": lora_rate, "batch": batch, "seed": seed}
    down = {"steps": steps, "strength": strength}
    return run(False, eps, x0, places, projections, null, source, mask, down, drag, learn, record)


def drag_noise(
    eps: HookedEps,
    x0: Tensor,
    places: Places,
    projections: Shapes,
    null: Any,
    source: Any = "",
    mask: Tensor | None = None,
    *,
    steps: Steps = 50,
    strength: Strength = 0.7,
    iterations: Iterations = 60,
    rate: Rate = 0.01,
    patch: Patch = 1,
    reach: Reach = 3,
    outside: Outside = 0.1,
    lora_steps: LoraSteps = 60,
    rank: Rank = 16,
    lora_rate: LoraRate = 5e-4,
    batch: Batch = 4,
    seed: Seed = 0,
    record: dict[str, Tensor] | None = None,
) -> Tensor:
    """As `drag_diffusion`."""
    drag = {"iterations": iterations, "rate": rate, "patch": patch, "reach": reach, "outside": outside}
    learn = {"lora_steps": lora_steps, "rank": rank, "lora_rate": lora_rate, "batch": batch, "seed": seed}
    down = {"steps": steps, "strength": strength}
    return run(True, eps, x0, places, projections, null, source, mask, down, drag, learn, record)


@torch.no_grad()
def run(
    middle: bool,
    eps: HookedEps,
    x0: Tensor,
    places: Places,
    projections: Shapes,
    null: Any,
    source: Any,
    mask: Tensor | None,
    down: dict[str, Any],
    drag: dict[str, Any],
    learn: dict[str, Any],
    record: dict[str, Tensor] | None,
) -> Tensor:
    x0, M = one_picture(x0, "dragging"), None if mask is None else checked_mask(mask, x0).to(x0)
    starts, goals = ([(FINE * r, FINE * c) for r, c in ends] for ends in zip(*places))
    if not afar(starts, goals):
        return x0  # no row paid
    eps = adapted(eps, lora(eps, x0, projections, source, **learn) if learn["lora_steps"] else {})
    path = ddim(eps, x0, null, source, **down)
    x, K = path[path.top], path.top

    def ask(variable: Tensor, look: Feature) -> Tensor:
        y, feature = (x, partial(replaced, variable, look)) if middle else (variable, look)
        return move(y, eps(y, path.t[K], [source], feature=feature)[0], path.a[K], path.a[K - 1])

    found, ends = dragged(ask, middle_of(eps, x, path.t[K], source) if middle else x, places, M, **drag)
    if record is not None:
        record["points"] = torch.tensor(ends)
    put = partial(replaced, found, lambda site, h: h) if middle else None
    return beside(eps, path, x if middle else found, source, put)


def middle_of(eps: HookedEps, x: Tensor, t: int, text: Any) -> Tensor:
    """What the UNet's middle hands on. One model row."""
    seen: list[Tensor] = []
    eps(x, t, [text], feature=lambda site, h: seen.append(h) or h if is_middle(site) else h)  # type: ignore[func-returns-value]
    return seen[0].to(x)


def is_middle(site: Site) -> bool:
    return site.place == "mid" and site.kind == "block"


def replaced(variable: Tensor, feature: Feature, site: Site, h: Tensor) -> Tensor:
    """A feature that puts the variable in the place of the middle, and otherwise goes on as another."""
    return variable.to(h).expand_as(h) if is_middle(site) else feature(site, h)
