"""NoiseDiffusion (Zheng et al., 2403.08840): a picture between two others.

Both are inverted by DDIM to the same level K and mixed there, x = alpha x1 + beta x2 with alpha, beta = cos, sin of
`fraction` of a quarter turn, which keeps the noise's variance. Photographs' inversions are no clean noise: values are
cut to +-bound, and what that costs of the pictures is put back from the pictures z1, z2 themselves:
+ (mu - alpha) sqrt(a_K) z1 + (nu - beta) sqrt(a_K) z2, where mu and nu are to `signal` as alpha and beta to their sum.
The result is cut again and decoded with guidance. Model rows: 2 K for both inversions and 2 K for the decoding.
Left out: the paper's fresh noise gamma n, which is 0 in its authors' settings for Stable Diffusion.
"""

import math
from typing import Annotated, Any

import torch
from torch import Tensor

from ..ddim import levels, move
from ..diffedit import Eps, encode
from ..options import Scale, Steps, Strength, Within


@torch.no_grad()
def noise_diffusion(
    eps: Eps,
    x0: Tensor,
    reference: Tensor,
    target: Any = "",
    negative: Any = "",
    *,
    fraction: Annotated[float, Within(0, 1, "0: the picture, 1: the reference")] = 0.5,
    steps: Steps = 200,
    strength: Strength = 0.7,
    guidance_scale: Scale = 10.0,
    bound: Annotated[float, Within(0, 1000, "values of noised latents are cut to +-this")] = 2.0,
    signal: Annotated[float, Within(0, 10, "how much of both pictures there is at the level of mixing")] = 1.2,
) -> Tensor:
    """x0, reference (b, 4, h, w); target: what both show, or what is between them. Returns (b, 4, h, w)."""
    b, a = len(x0), levels(steps).a
    path = encode(eps, torch.cat([x0, reference.to(x0)]), target, steps=steps, strength=strength)
    (z1, z2), K = path[0].split(b), max(path)
    x1, x2 = path[K].clamp(-bound, bound).split(b)
    alpha, beta = math.cos(fraction * math.pi / 2), math.sin(fraction * math.pi / 2)
    mu, nu = signal * alpha / (alpha + beta), signal * beta / (alpha + beta)
    x = alpha * x1 + beta * x2 + math.sqrt(a[K]) * ((mu - alpha) * z1 + (nu - beta) * z2)
    x = x.clamp(-bound, bound)
    for j in range(K, 0, -1):
        e_null, e_text = eps(x, levels(steps).t[j], [negative, target])
        x = move(x, e_null + guidance_scale * (e_text - e_null), a[j], a[j - 1])
    return x
