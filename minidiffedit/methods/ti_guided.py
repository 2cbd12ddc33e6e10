"""TI-Guided-Edit (2401.02126): the layout of one picture, the looks of another, led by a text.

Both pictures are inverted and their latents shown again at every level beside the edit, whose conditional row alone is
changed. From the picture (structure): queries and keys of self-attention in the first half of the steps, from
output_block 4 on, and that block's convolution branch in the first 40 of 50. From the reference (appearance): keys and
values in the decoder's two finest levels at steps 4 to 39. Where both act the edit's queries are first mixed by the
structure's attention, q' = contrast(softmax(Q_s K_s)) Q, and look at the reference and at the edit itself together:
softmax of [q' K_a + log2(sum exp(Q K) / sum exp(q' K_a)), Q K], contrasted, over [V_a, V]. The latent takes the
reference's mean and deviation (AdaIN) at steps 10 to 29, and outside a mask, if there is one, the path's in the first
40. Counts are of 50 steps, and scale with them.

Maps are built for a few queries at a time, and mixing queries needs no product of maps, since (A Q) K = A (Q K). Model
rows: 4 K b, K b for the reference's inversion, and the picture's. Left out: masks read from attention during the
inversion (`words+ti-guided-edit` gives one), and null texts of each row's own.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..attention import Attend, Site
from ..diffedit import encode
from ..options import Scale
from ..path import HookedEps, Path
from .cross_image import AT_ONCE, adain, contrasted
from .prompt_to_prompt import Early, first

CONTRAST = 1.67


@torch.no_grad()
def ti_guided_edit(
    eps: HookedEps,
    path: Path,
    reference: Tensor,
    coarsest: int,
    target: Any,
    source: Any = "",
    mask: Any = None,
    *,
    structure_steps: Early = 0.5,
    feature_steps: Early = 0.8,
    appearance_after: Early = 0.08,
    appearance_until: Early = 0.8,
    adain_after: Early = 0.2,
    adain_until: Early = 0.6,
    blend_until: Early = 0.8,
    guidance_scale: Scale = 5.0,
) -> Tensor:
    """reference (b or 1, 4, h, w): the other picture's latent; source: what the picture shows, under which both are
    inverted; mask (b or 1, 1, h, w) in 0..1, 1 = edited, None: all. Rows of a call: reference, picture, the edit
    without and with its text. coarsest: the decoder's coarsest level with text (SD v1: 2). Shares are of the steps.
    """
    b, K, y = len(path[0]), path.top, path.rows(1)
    reference, strength = reference.to(y).expand_as(y), K / path.steps
    looks = encode(eps, reference, source, steps=path.steps, strength=strength)

    def guided(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layout = site.level < coarsest or site.index > 0
        if site.kind != "self" or site.place != "up" or not layout:
            return plain(site, q, k, v)
        structure = i < first(structure_steps, K)
        appearance = site.level < 2 and first(appearance_after, K) <= i < first(appearance_until, K)
        (ka, ks, _, ko), (va, _, _, vo), (_, qs, _, qo) = (one.split(b) for one in (k, v, q))
        if structure and appearance:
            out = both(contrasted(qs, ks, qo, CONTRAST), qo, ka, ko, torch.cat([va, vo], dim=2))
        elif structure:
            out = plain(site, qs, ks, vo)
        else:
            out = plain(site, qo, ka, va) if appearance else plain(site, qo, ko, vo)
        return torch.cat([plain(site, q[:-b], k[:-b], v[:-b]), out])

    def features(site: Site, h: Tensor) -> Tensor:
        now = site == Site("up", coarsest, 1, "conv") and i < first(feature_steps, K)
        return torch.cat([h[:-b], h[b : 2 * b]]) if now else h

    step = path.walk()
    for i, j in enumerate(path.down()):
        texts = path.texts(source, source, path.null(j), target)
        x = torch.cat([looks[j], path[j], y, y])
        e_null, e_text = eps(x, path.t[j], [texts], tap=guided, feature=features)[0].split(b)[2:]
        y = step(y, e_null + guidance_scale * (e_text - e_null), j)
        if first(adain_after, K) <= i < first(adain_until, K):
            y = adain(y, looks[j - 1])
        if mask is not None and i < first(blend_until, K):
            y = mask * y + (1 - mask) * path[j - 1]
    return y


def both(mixed: Tensor, q: Tensor, k_other: Tensor, k: Tensor, values: Tensor) -> Tensor:
    """Attention over the reference and the edit together: mixed, q, k_other, k (b, heads, n, d), values (b, heads,
    2 n, d). A few queries at a time; a row's mean in the contrast is one over its keys.
    """
    n, d, out = k.shape[2], k.shape[3], []
    for some, own in zip(*(one.split(max(1, AT_ONCE // (2 * n)), dim=2) for one in (mixed, q))):
        S, L = ((one * d**-0.5) @ keys.transpose(-1, -2) for one, keys in ((some, k_other), (own, k)))
        near = (L.logsumexp(-1, keepdim=True) - S.logsumexp(-1, keepdim=True)) / math.log(2)
        P = torch.softmax(torch.cat([S + near, L], dim=-1), dim=-1)
        out.append(((P - 0.5 / n) * CONTRAST + 0.5 / n).clamp(0, 1) @ values)
    return torch.cat(out, dim=2)
