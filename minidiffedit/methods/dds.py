"""DDS (Hertz et al., 2304.07090) and SDS (DreamFusion, Poole et al., 2209.14988): a picture moved by its predictions.

The latent z itself is optimised, from z0, the picture's. Each iteration draws one t of 50..948 and one noise n:
z_t = sqrt(a_t) z + sqrt(1 - a_t) n. SDS follows eps_w(z_t, target) - n (2209.14988, eq. 3, with w(t) = 1), whose bias
blurs. DDS (2304.07090, section 4) takes that bias from the picture under its own text: zs_t, z0 under the same t and n,
gives eps_w(z_t, target) - eps_w(zs_t, source), which is zero for equal texts. eps_w: classifier-free guidance. Then
z <- z - rate * gradient, where the authors' SGD has .1 and their loss 2000 / 4096. The UNet is never differentiated.
Model rows: 4 b for each iteration, SDS 2 b. Left out: other optimisers, and the paper's network that is trained by DDS.
"""

from typing import Annotated, Any

import torch
from torch import Tensor

from ..ddim import alpha_bar, whole
from ..diffedit import Eps, finite, working
from ..options import Scale, Seed, Within
from .guidance import cfg
from .sdedit import vp_noised

LOWEST, HIGHEST = 50, 948  # the timesteps that are drawn
RATE = 0.1 * 2000 / 4096
Iterations = Annotated[int, Within(1, 2000, "updates of the latent")]
Rate = Annotated[float, Within(0, 100, "how far an update follows the predictions")]

SAMPLER = "none: gradient descent"  # as metadata name it


@torch.no_grad()
def dds(
    eps: Eps,
    x0: Tensor,
    null: Any,
    target: Any,
    source: Any,
    *,
    iterations: Iterations = 200,
    rate: Rate = RATE,
    guidance_scale: Scale = 7.5,
    seed: Seed = 0,
) -> Tensor:
    """x0 (b, 4, h, w); source: what the picture shows. Each picture draws from a seed of its own, seed + i."""
    return descended(eps, x0, null, target, [source], iterations, rate, guidance_scale, seed)


@torch.no_grad()
def sds(
    eps: Eps,
    x0: Tensor,
    null: Any,
    target: Any,
    *,
    iterations: Iterations = 200,
    rate: Rate = RATE,
    guidance_scale: Scale = 7.5,
    seed: Seed = 0,
) -> Tensor:
    """x0 (b, 4, h, w). The same without a source text: the noise itself stands in the place of its prediction."""
    return descended(eps, x0, null, target, [], iterations, rate, guidance_scale, seed)


def descended(
    eps: Eps,
    x0: Tensor,
    null: Any,
    target: Any,
    source: list[Any],
    iterations: int,
    rate: float,
    scale: float,
    seed: int,
) -> Tensor:
    """source: its text, or none. Picture by picture, as each has its own timesteps."""
    guide, found = cfg(scale), []
    for i, z0 in enumerate(working(x0).split(1)):
        generator, z = torch.Generator("cpu").manual_seed(whole("seed", seed + i, 0, 2**63 - 1)), z0
        for _ in range(iterations):
            t = int(torch.randint(LOWEST, HIGHEST + 1, (), generator=generator))
            n, a = torch.randn(z0.shape, generator=generator, dtype=torch.float32).to(z0), alpha_bar()[t]
            # Two calls of the same shape, so that equal latents and texts give equal bits.
            base = guide(*eps(vp_noised(z0, n, a), t, [null, *source])) if source else n
            z = z - rate * (guide(*eps(vp_noised(z, n, a), t, [null, target])) - base)
        found.append(z)
    return finite(torch.cat(found), "the descent")
