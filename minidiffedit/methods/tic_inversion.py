"""TIC-inversion (2312.14611), our reading of its abstract: the edit looks for keys and values in the inversion itself.

The inversion's own self-attention, not that of a reconstruction that drifts, gives the edit's keys and values, in the
decoder's finer levels from `first_step` on, as in MasaCtrl; where more than looks changes, the source's and the edit's
own together (`look` union), by parts where `object_words` tell the object. An inversion of the form x_{j+1} = move(x_j,
eps(x_j, t_j)) (`ddim-paper`) asks at the very latents and levels that the edit passes, so that what it saw is had again
by one row a step, and need not be kept (at 512 x 512 over 50 steps 1.1 GiB in half precision). Model rows: 3 K b, and
the inversion's; with kept keys it would be 2 K b.
"""

from typing import Annotated, Any

import torch
from torch import Tensor

from ..attention import Attend, Site, weights
from ..options import Scale, Within
from ..path import HookedEps, Path
from .guidance import Guidance, Norm, Quantile, guide_of
from .masactrl import Look, ObjectWords, OfObjects, check_masactrl, found, mixed, objects, objects_seen

check_tic = check_masactrl


@torch.no_grad()
def tic(
    eps: HookedEps,
    path: Path,
    target: Any,
    source: Any = "",
    coarsest: int = 2,
    source_words: Any = None,
    target_words: Any = None,
    *,
    guidance_scale: Scale = 7.5,
    first_step: Annotated[int, Within(0, 999, "steps before the source is looked at")] = 4,
    finest: Annotated[int, Within(0, 10, "the decoder's levels that look at it, from the finest")] = 2,
    look: Look = "source",
    object_words: ObjectWords = None,
    object_threshold: OfObjects = 0.1,
    guidance: Guidance = "cfg",
    quantile: Quantile = 0.4,
    norm: Norm = "l0",
    record: dict[str, Tensor] | None = None,
) -> Tensor:
    """Rows of a call: the path's latent under the source text, the target without and with its own. coarsest: the
    coarsest level with text (SD v1: 2). Raises ValueError for object_words that either prompt lacks.
    """
    b, y = len(path[0]), path.rows(1)
    guide = guide_of(guidance, guidance_scale, quantile, norm)
    at = objects(object_words, source_words, target_words) if object_words is not None else None
    seen = list[Tensor]()

    def consistent(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if at and site.kind == "cross" and site.level == coarsest:
            P = weights(q, k).float().mean(1).unflatten(0, (3, b))[[0, 2]]
            seen.append(torch.stack([maps[..., words].sum(-1) for maps, words in zip(P, at)]))
        if site.kind != "self" or site.place != "up" or site.level >= finest:
            return plain(site, q, k, v)
        if look == "source" and not seen:
            return plain(site, q, *(torch.cat([one[:b]] * 3) for one in (k, v)))
        inside = found(seen, y.shape[2:], coarsest, site.level, object_threshold) if seen else None
        q, k, v = (one.unflatten(0, (3, b)) for one in (q, k, v))
        edits = [mixed(plain, site, q[i], k[[0, i]], v[[0, i]], look, inside) for i in (1, 2)]
        return torch.cat([plain(site, q[0], k[0], v[0]), *edits])

    step = path.walk()
    for i, j in enumerate(path.down()):
        seen.clear()
        texts, tap = path.texts(source, path.null(j), target), consistent if i >= first_step else None
        _, e_null, e_text = eps(torch.cat([path[j], y, y]), path.t[j], [texts], tap=tap)[0].split(b)
        y = step(y, guide(e_null, e_text), j)
        if seen and record is not None:
            record |= objects_seen(seen, y.shape[2:], coarsest, object_threshold)
    return y
