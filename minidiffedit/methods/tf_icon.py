"""TF-ICON (Lu et al., 2307.12493): an object of another picture is set into this one, and fits in.

The object's picture (`placed`: laid over this one where `mask` wants it) and this one are inverted under the
exceptional prompt, one token at all positions without their embeddings (section 4.1). The start is the object's latent
on its shape, noise in the rest of the mask, the background's elsewhere (4.2). In the first `inject_steps`
self-attention weighs by other rows' logits (4.3): q_ref k_ref within the object, q_back k_back within the background,
q_back k_ref between the two, the generation's own where noise was; its values stay its own. In the first `hold_steps`
the background's latents are put back outside the mask. guidance_scale: 5 across domains, 2.5 within one, where the
authors' start is this same composite.

No logits are built: with q' = [q_1, q_2, q_3] and k' = [k_1, k_2, k_3], each zero but at its own keys, they are q' k',
so that fused attention stays. Model rows: 2 N b for the inversions, then 4 b a step with exchange and 2 b without. Here
both pictures are inverted by DDIM, and their rows held on it; the authors invert by DPM-Solver++(2M), too, and let them
run. Which prompt is exceptional for SD v1 is not measured: theirs is of SD 2.1's text encoder.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Attend, Site, sdpa
from ..ddim import levels
from ..diffedit import checked_mask, encode, working
from ..options import Sampler, Scale, Seed, Steps
from ..path import HookedEps, improvement, mean_and_sigma
from .prompt_to_prompt import Early, first
from .sdedit import draws


@torch.no_grad()
def tf_icon(
    eps: HookedEps,
    x0: Tensor,
    placed: Tensor,
    mask: Tensor,
    exceptional: Any,
    null: Any,
    target: Any,
    shape: Any = None,
    *,
    steps: Steps = 20,
    inject_steps: Early = 0.4,
    hold_steps: Early = 0.8,
    guidance_scale: Scale = 5.0,
    sampler: Sampler = "dpmsolver++",
    seed: Seed = 0,
) -> Tensor:
    """placed (b or 1, 4, h, w): the latent of the object laid over the picture; shape (b or 1, 1, h, w): where it lies
    (None: nowhere); mask, the same: where the edit may act. Rows of a call with exchange: background, object,
    generation without and with its text. Raises ValueError for masks outside [0, 1].
    """
    (t, a), x0 = levels(steps), working(x0)
    b, placed = len(x0), working(placed).expand_as(x0)
    shape = torch.zeros_like(x0[:, :1]) if shape is None else shape
    M, S = (checked_mask(one, x0).expand(b, -1, -1, -1) > 0 for one in (mask, shape))
    S = S & M
    back, other = (encode(eps, one, exceptional, steps=steps, strength=1.0) for one in (x0, placed))
    improve = improvement(sampler, steps)
    noise = next(draws(x0.shape, seed)).to(x0)
    y = torch.where(S, other[steps], torch.where(M, noise, back[steps]))

    def inject(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site.kind != "self":
            return plain(site, q, k, v)
        object, between = (cells(one, site.level) for one in (S, M & ~S))
        groups = object, ~object & ~between, between  # of keys
        (qb, qo), (kb, ko) = q[: 2 * b].split(b), k[: 2 * b].split(b)
        outs = [plain(site, q[: 2 * b], k[: 2 * b], v[: 2 * b])]
        for qg, kg, vg in zip(*(one[2 * b :].split(b) for one in (q, k, v))):
            of_object = composed(site, (qo, qb, qg), (ko, ko, kg), groups, vg)
            of_background = composed(site, (qb, qb, qg), (ko, kb, kg), groups, vg)
            own = plain(site, qg, kg, vg)
            outs.append(torch.where(object, of_object, torch.where(between, own, of_background)))
        return torch.cat(outs)

    for i, j in enumerate(range(steps, 0, -1)):
        if i < first(inject_steps, steps):
            # Of equal keys attention makes what it makes of one: repeated, the text says the same at any length.
            same = exceptional.repeat(1, target.shape[1] // exceptional.shape[1], 1)
            text = torch.cat([one.expand(b, -1, -1) for one in (same, same, null, target)])
            e_null, e_text = eps(torch.cat([back[j], other[j], y, y]), t[j], [text], tap=inject)[0].split(b)[2:]
        else:
            e_null, e_text = eps(y, t[j], [null, target])
        e = improve(y, e_null + guidance_scale * (e_text - e_null), a[j], a[j - 1])
        y, _ = mean_and_sigma(y, e, a[j], a[j - 1], 0.0)
        if i < first(hold_steps, steps):
            y = torch.where(M, y, back[j - 1])
    return y


def cells(mask: Tensor, level: int) -> Tensor:
    """(b, 1, h, w) bool -> (b, 1, n, 1), those of a level: every 2^level-th, as the authors do."""
    return mask[:, :, :: 2**level, :: 2**level].flatten(2)[..., None]


def composed(site: Site, qs: Any, ks: Any, groups: Any, v: Tensor) -> Tensor:
    """softmax(L / sqrt d) v, L = qs[i] ks[i]^T at the keys of group i (b, 1, n, 1): each (b, heads, n, d)."""
    q = torch.cat(qs, dim=-1) * math.sqrt(len(qs))  # sdpa divides by the root of all channels
    k = torch.cat([one * group for one, group in zip(ks, groups)], dim=-1)
    return sdpa(site, q, k, F.pad(v, (0, q.shape[-1] - v.shape[-1])))[..., : v.shape[-1]]
