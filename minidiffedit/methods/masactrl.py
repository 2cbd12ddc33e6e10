"""MasaCtrl (Cao et al., 2304.08465): late, and in the decoder, the edit looks for its keys and values in the source.

Section 3.2, mutual self-attention: from `first_step` on, in the decoder's finer levels, Attention(Q_target, K_source,
V_source), so that the layout follows the target text while what is painted is the source's. Model rows: 4 K b, and the
inversion's. On real pictures the source text is usually left empty. Left out: the masks that the authors read from
cross-attention maps (section 3.3) and their use with T2I-Adapter.
"""

from typing import Annotated, Any

import torch
from torch import Tensor

from ..attention import Attend, Site
from ..options import Scale, Within
from ..path import HookedEps, Path
from .guidance import Guidance, Norm, Quantile, guide_of


@torch.no_grad()
def masactrl(
    eps: HookedEps,
    path: Path,
    target: Any,
    source: Any = "",
    *,
    guidance_scale: Scale = 7.5,
    first_step: Annotated[int, Within(0, 999, "steps before the source is looked at")] = 4,
    finest: Annotated[int, Within(0, 10, "the decoder's levels that look at it, from the finest")] = 2,
    guidance: Guidance = "cfg",
    quantile: Quantile = 0.4,
    norm: Norm = "l0",
) -> Tensor:
    """Rows of a call: source and target under the null text, then source and target under their own; each half looks
    into its own source. In SD v1 the two finest levels are the authors' layers 10 to 15 (64 x 64 and 32 x 32).
    """
    x, texts, b = path.rows(2), path.texts(source, target), len(path[0])
    guide = guide_of(guidance, guidance_scale, quantile, norm)

    def mutual(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site.kind == "self" and site.place == "up" and site.level < finest:
            k, v = (y.unflatten(0, (-1, 2, b))[:, [0, 0]].flatten(0, 2) for y in (k, v))
        return plain(site, q, k, v)

    for i, j in enumerate(path.down()):
        x = path.pin(x, j)
        e_null, e_text = eps(x, path.t[j], [path.null(j), texts], tap=mutual if i >= first_step else None)
        x = path.step(x, guide(e_null, e_text), j)
    return x[b:]
