"""KV inversion (Huang et al., 2309.16608), known from its abstract alone: our reading.

The picture is inverted under its text. Down the path, unguided, keys and values of the decoder's self-attentions in its
`finest` levels are what is learned at each level: from the picture's own there, by Adam on |move(x, eps) - x*_{j-1}|^2,
so that they rebuild it. The edit, guided under the target, asks them with its own queries from `first_step` on, as
MasaCtrl asks the source's row (masactrl.py), but no source walks beside it.

Model rows: K to invert; at each level 1 to see keys and values, at most inner_steps with gradient, 1 for the step; 2 K.
Memory: two tensors a self-attention and level, 45 MB a level in float32 at 512 x 512. One picture at a time.
"""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Attend, Site
from ..ddim import move
from ..options import Scale, Steps, Strength, Within
from ..path import HookedEps
from .descent import Adam, slopes
from .guidance import cfg
from .inversions import ddim
from .lora import one_picture

Tables = dict[Site, tuple[Tensor, Tensor]]


@torch.no_grad()
def kv_inversion(
    eps: HookedEps,
    x0: Tensor,
    null: Any,
    target: Any,
    source: Any = "",
    *,
    steps: Steps = 50,
    strength: Strength = 1.0,
    guidance_scale: Scale = 7.5,
    inner_steps: Annotated[int, Within(0, 200, "of Adam on each level's keys and values")] = 5,
    rate: Annotated[float, Within(0, 10, "how fast they are learned", ("inner_steps", 0))] = 1e-3,
    first_step: Annotated[int, Within(0, 999, "steps before they are asked")] = 4,
    finest: Annotated[int, Within(0, 10, "the decoder's levels that have them, from the finest")] = 2,
) -> Tensor:
    path, guide = (
        ddim(eps, one_picture(x0, "KV inversion"), null, source, steps=steps, strength=strength),
        cfg(guidance_scale),
    )
    x, learned = path.rows(1), dict[int, Tables]()
    for j in path.down():
        seen: Tables = {}

        def look(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor, seen: Tables = seen) -> Tensor:
            if site.kind == "self" and site.place == "up" and site.level < finest:
                seen[site] = (k.clone(), v.clone())
            return plain(site, q, k, v)

        def stepped(*flat: Tensor, x: Tensor = x, j: int = j, seen: Tables = seen) -> Tensor:
            tables = dict(zip(seen, zip(flat[::2], flat[1::2])))
            return move(x, eps(x, path.t[j], [source], tap=Asked(tables))[0], path.a[j], path.a[j - 1])

        eps(x, path.t[j], [source], tap=look)
        flat, adam = [one.to(x) for pair in seen.values() for one in pair], Adam(rate)
        for _ in range(inner_steps if flat else 0):
            _, found = slopes(lambda *all, j=j, stepped=stepped: F.mse_loss(stepped(*all), path[j - 1]), flat)
            flat = adam.step(flat, found)
        learned[j], x = dict(zip(seen, zip(flat[::2], flat[1::2]))), stepped(*flat)
    y = path.rows(1)
    step = path.walk()
    for i, j in enumerate(path.down()):
        y = step(y, guide(*eps(y, path.t[j], [null, target], tap=Asked(learned[j]) if i >= first_step else None)), j)
    return y


class Asked:
    """A tap in which some self-attentions ask the same keys and values in all rows."""

    def __init__(self, tables: Tables):
        self.tables = tables

    def __call__(self, plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site in self.tables:
            k, v = (one.to(q).expand(len(q), -1, -1, -1) for one in self.tables[site])
        return plain(site, q, k, v)
