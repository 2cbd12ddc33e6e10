"""CDS (Nam et al., 2311.18608): DDS that also holds on to the picture's structure, by what self-attention says of it.

Section 4: DDS's difference (dds.py) and beside it PatchNCE (Park et al., 2007.15651) on the outputs of the decoder's
self-attentions, under the texts: at `positions` places, and again after pooling by 2, the feature of z_t shall be
nearest to that of the picture at the same place, apart from the others, by the cross-entropy of cosines / .07. Its
gradient goes through the UNet to z. z <- z - rate (difference + contrast 4096 / 2000 gradient), as the authors' loss
has the difference times 2000 / 4096. PatchNCE is least where nothing is edited yet, so it rises as the edit goes on;
what it holds back shows against DDS at the same noises, which is what contrast = 0 is, bit for bit. Model rows: 4 b for
each iteration, 2 b of them with gradient. The authors ask the target twice, once for each term, and let the picture's
features look for the edit's, where here, as in PatchNCE, the edit's look for the picture's.
"""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Site
from ..ddim import alpha_bar, whole
from ..diffedit import finite, working
from ..options import Scale, Seed, Within
from ..path import HookedEps
from .dds import HIGHEST, LOWEST, RATE, Iterations, Rate
from .descent import wide
from .guidance import cfg
from .sdedit import vp_noised

SHARE, TEMPERATURE = 4096 / 2000, 0.07
Contrast = Annotated[float, Within(0, 1000, "how strictly the picture's structure is kept; 0: DDS")]
Positions = Annotated[int, Within(2, 4096, "places told apart, of each attention", ("contrast", 0))]


@torch.no_grad()
def cds(
    eps: HookedEps,
    x0: Tensor,
    null: Any,
    target: Any,
    source: Any,
    *,
    iterations: Iterations = 200,
    rate: Rate = RATE,
    guidance_scale: Scale = 7.5,
    contrast: Contrast = 3.0,
    positions: Positions = 256,
    seed: Seed = 0,
) -> Tensor:
    """x0 (b, 4, h, w); source: what the picture shows. Each picture draws from a seed of its own, seed + i."""
    guide, found = cfg(guidance_scale), []
    for i, z0 in enumerate(working(x0).split(1)):
        generator, z = torch.Generator("cpu").manual_seed(whole("seed", seed + i, 0, 2**63 - 1)), z0
        places = torch.Generator("cpu").manual_seed(seed + i)  # of its own, so that t and noise are DDS's
        for _ in range(iterations):
            t = int(torch.randint(LOWEST, HIGHEST + 1, (), generator=generator))
            n, a = torch.randn(z0.shape, generator=generator, dtype=torch.float32).to(z0), alpha_bar()[t]
            wanted, seen = Outputs(z.shape[2:]), Outputs(z.shape[2:])
            with torch.set_grad_enabled(contrast > 0):
                y = z.detach().requires_grad_(contrast > 0)
                e = guide(*eps(vp_noised(y, n, a), t, [null, target], feature=seen)).detach()
            base = guide(*eps(vp_noised(z0, n, a), t, [null, source], feature=wanted))
            difference = e - base
            if contrast > 0:
                with torch.enable_grad():
                    (pull,) = torch.autograd.grad(contrasted(seen.maps, wanted.maps, positions, places), y)
                difference = difference + contrast * SHARE * pull
            z = z - rate * difference
        found.append(z)
    return finite(torch.cat(found), "the descent")


class Outputs:
    """A feature that changes nothing and keeps what the decoder's self-attentions give under the last text."""

    def __init__(self, size: Any):
        self.size, self.maps = tuple(size), list[Tensor]()

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        if site.place == "up" and site.kind == "self":
            grid = [-(-side // 2**site.level) for side in self.size]
            self.maps.append(wide(h[-1:]).transpose(1, 2).unflatten(2, grid))
        return h


def contrasted(ours: list[Tensor], theirs: list[Tensor], positions: int, generator: torch.Generator) -> Tensor:
    """PatchNCE, summed over attentions and both sizes: features (1, c, h, w) of the edit and of the picture."""
    total = torch.zeros(())
    for one, other in zip(ours, theirs):
        for pool in (1, 2):
            a, b = (
                F.normalize(F.avg_pool2d(y, pool, ceil_mode=True).flatten(2)[0].T, dim=1) for y in (one, other.detach())
            )
            at = torch.randperm(len(a), generator=generator)[:positions].to(a.device)
            total = total.to(a) + F.cross_entropy(a[at] @ b[at].T / TEMPERATURE, torch.arange(len(at), device=a.device))
    return total
