"""How two predictions become one: a guide is (e_null, e_text) -> e. Model rows: none of its own.

cfg (Ho and Salimans, 2207.12598): e_null + w d, with d = e_text - e_null. prox (ProxEdit, Han et al., 2306.05414,
"proximal guidance"): the smallest |d| count nothing, so that the picture stays where the texts hardly differ:
e_null + w prox(d), where prox sets to zero all d not above a limit ("l0") or shrinks every d by it ("l1"). The limit
is the value that a share of |d| does not exceed, per row and picture: the authors take it over source and target
together, of which the source's d are zero after negative-prompt inversion, so that their .7 is .4 here. Left out:
limits that are given as a value.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal

from torch import Tensor

from ..options import About, Within

Guide = Callable[[Tensor, Tensor], Tensor]
PLAIN = "guidance", "cfg"  # with which the options of prox change nothing
Guidance = Annotated[Literal["cfg", "prox"], About("cfg: plain; prox: only where the texts differ most (2306.05414)")]
Norm = Annotated[Literal["l0", "l1"], About("prox drops small differences (l0), or shrinks all (l1)", PLAIN)]
Quantile = Annotated[float, Within(0, 1, "share of the differences that prox drops, 0..1", PLAIN)]


def cfg(scale: float) -> Guide:
    return lambda e_null, e_text: e_null + scale * (e_text - e_null)


def prox(scale: float, quantile: float = 0.4, norm: str = "l0") -> Guide:
    def guide(e_null: Tensor, e_text: Tensor) -> Tensor:
        d = e_text - e_null
        return e_null + scale * proximal(d, limit(d, quantile), norm)

    return guide


def limit(d: Tensor, quantile: float) -> Tensor:
    """d (r, c, h, w) -> (r, 1, 1, 1): the |d| that the share `quantile` of a row's values does not exceed; 0 for 0."""
    size = d.abs().flatten(1)
    count = math.floor(quantile * size.shape[1] + 0.5)
    found = size.kthvalue(count, dim=1).values if count else size.new_zeros(len(size))
    return found[:, None, None, None]


def proximal(d: Tensor, limit: Tensor, norm: str) -> Tensor:
    size = d.abs()
    return d * (size > limit) if norm == "l0" else d.sign() * (size - limit).clamp(min=0)


def guide_of(guidance: str, scale: float, quantile: float, norm: str) -> Guide:
    """The guide that a method's options `guidance`, `guidance_scale`, `quantile` and `norm` ask for."""
    return cfg(scale) if guidance == "cfg" else prox(scale, quantile, norm)
