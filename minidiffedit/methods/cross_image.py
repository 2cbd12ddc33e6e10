"""Cross-image attention (Alaluf et al., 2311.03335): one picture keeps its layout and takes another's looks.

Section 3.1: in the decoder's two finest levels the result's queries look for their keys and values in the reference,
at every fifth early step in the picture itself. Section 3.2: their attention is contrasted, clip((A - mean) c + mean),
guided, e + s (e_swapped - e) with s falling to its half, and after each step the latent takes the reference's mean and
deviation per channel (AdaIN). The path is the picture's edit-friendly one, whose noises the result adds; the reference
is held under noises of its own. Model rows: K b before the exchange begins, then 4 K b, and the inversion's.

Contrasting needs maps: they are built for a few queries at a time, never a whole one. In the authors' code the two
pictures' rows drift from their levels, here they are held. Left out: masks for AdaIN by clustering attention, FreeU.
"""

from typing import Annotated, Any

import torch
from torch import Tensor

from ..attention import Attend, Site, weights
from ..options import Scale, Seed, Within
from ..path import HookedEps, Path
from .prompt_to_prompt import Early, first
from .sdedit import draws, vp_noised

AT_ONCE = 1 << 19  # values of a map and head that are held together
FIFTHS = 0.4  # share of the steps in which every fifth looks at the picture itself


@torch.no_grad()
def cross_image_attention(
    eps: HookedEps,
    path: Path,
    reference: Tensor,
    source: Any = "",
    *,
    exchange_after: Early = 0.1,
    adain_after: Early = 0.2,
    contrast: Annotated[float, Within(1, 100, "of the attention; 1: none")] = 1.67,
    swap_scale: Scale = 3.5,
    seed: Seed = 0,
) -> Tensor:
    """reference (b or 1, 4, h, w): the other picture's latent; source: what both pictures show. Rows of a call:
    reference, picture, the result without and with the exchange. Shares are of the N steps, as in the authors' settings
    (10 and 20 of 100).
    """
    b, K, N, y = len(path[0]), path.top, path.steps, path.rows(1)
    reference, draw = reference.to(y).expand_as(y), draws(y.shape, seed)
    looks = [reference, *(vp_noised(reference, next(draw).to(y), path.a[j]) for j in range(1, K + 1))]

    def exchange(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site.kind != "self" or site.place != "up" or site.level > 1:
            return plain(site, q, k, v)
        own = i % 5 == 0 and i < first(FIFTHS, N)
        at = slice(b, 2 * b) if own else slice(0, b)
        return torch.cat([plain(site, q[:-b], k[:-b], v[:-b]), contrasted(q[-b:], k[at], v[at], contrast)])

    step = path.walk()
    for i, j in enumerate(path.down()):
        if i < first(exchange_after, N):
            e = eps(y, path.t[j], [source])[0]
        else:
            texts = path.texts(path.null(j), path.null(j), source, source)
            x = torch.cat([looks[j], path[j], y, y])
            _, _, e, e_swapped = eps(x, path.t[j], [texts], tap=exchange)[0].split(b)
            e = e + falling(swap_scale, i, K) * (e_swapped - e)
        y = step(y, e, j)
        if i >= first(adain_after, N):
            y = adain(y, looks[j - 1])
    return y


def falling(scale: float, i: int, steps: int) -> float:
    """From scale at the first of the steps to its half, at least 1, at the last; 1 if there is no guidance."""
    return scale + (max(scale / 2, 1.0) - scale) * i / max(steps - 1, 1) if scale > 1 else 1.0


def contrasted(q: Tensor, k: Tensor, v: Tensor, contrast: float) -> Tensor:
    """clip((A - mean) contrast + mean, 0, 1) v for A = softmax(q k^T / sqrt d), a few queries at a time; a row's mean
    is one over its keys.
    """
    m, out = k.shape[2], []
    for some in q.split(max(1, AT_ONCE // m), dim=2):
        out.append(((weights(some, k) - 1 / m) * contrast + 1 / m).clamp(0, 1) @ v)
    return torch.cat(out, dim=2)


def adain(x: Tensor, like: Tensor) -> Tensor:
    """x (b, c, h, w) with the mean and deviation of `like`, per picture and channel (Huang et al., 1703.06868)."""
    (mean, deviation), (mean_like, deviation_like) = (
        (one.mean((2, 3), keepdim=True), (one.var((2, 3), keepdim=True) + 1e-5).sqrt()) for one in (x, like)
    )
    return (x - mean) / deviation * deviation_like + mean_like
