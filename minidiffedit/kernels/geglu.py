"""GEGLU in one launch: value * gelu(gate) where the product of x with both halves of the weight ends (Shazeer,
2002.05202; the exact GELU, by erf).

Each program keeps two sums, one for its columns of the value and one for those of the gate, so that the halves meet
on the chip and the (m, 2 n) product is never written: at 512 x 512 that saves a write and two reads of 42 MB at the
finest level. `twin` is the same arithmetic in plain torch. In no network yet: where it is faster than the library's
product and torch.compile's GELU is not measured (tests/bench/gpu.py, figure K2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def twin(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (m, k), weight (2 n, k), the value's rows first, bias (2 n,) -> (m, n), sums and GELU in float32."""
    value, gate = (x.float() @ weight.float().T + bias.float()).chunk(2, dim=-1)
    return (value * (0.5 * gate * (1 + torch.erf(gate * 0.5**0.5)))).to(x.dtype)


@triton.jit
def product(
    x,
    weight,
    bias,
    out,
    m: tl.constexpr,
    n: tl.constexpr,
    k: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A block of rows and columns of the result. Programs: one axis, GROUP blocks of rows side by side, so that what
    they read of the weight is still in the cache.
    """
    across: tl.constexpr = (n + BLOCK_N - 1) // BLOCK_N
    down: tl.constexpr = (m + BLOCK_M - 1) // BLOCK_M
    band = tl.program_id(0) // (GROUP * across)
    high = tl.minimum(GROUP, down - band * GROUP)
    inner = tl.program_id(0) % (GROUP * across)
    rows = (band * GROUP + inner % high) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (inner // high) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m, inside_n = rows < m, columns < n
    value = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        inside_k = at < k
        part = tl.load(x + rows[:, None] * k + at[None, :], mask=inside_m[:, None] & inside_k[None, :], other=0.0)
        places, inside = columns[:, None] * k + at[None, :], inside_n[:, None] & inside_k[None, :]
        value = tl.dot(part, tl.load(weight + places, mask=inside, other=0.0).T, value)
        gate = tl.dot(part, tl.load(weight + n * k + places, mask=inside, other=0.0).T, gate)
    value += tl.load(bias + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    gate += tl.load(bias + n + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    y = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    tl.store(
        out + rows[:, None] * n + columns[None, :],
        y.to(out.dtype.element_ty),
        mask=inside_m[:, None] & inside_n[None, :],
    )


def settings(m: int, small: bool = False) -> dict[str, int]:
    """Tile sides, warps and loads in flight for m rows. small: a multiprocessor of 100 KB (attention.SMALL)."""
    if m <= 512 or small:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 8, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}


def geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (m, k), weight (2 n, k), bias (2 n,), contiguous, of one dtype, on a GPU -> (m, n): value * gelu(gate). No
    gradient. Raises ValueError for shapes and layouts that do not fit.
    """
    from . import capability
    from .attention import SMALL

    (m, k), n = x.shape, len(weight) // 2
    if weight.shape != (2 * n, k) or bias.shape != (2 * n,) or not (x.is_contiguous() and weight.is_contiguous()):
        shapes = ", ".join(str((*one.shape,)) for one in (x, weight, bias))
        raise ValueError(f"x (m, k), weight (2 n, k) and bias (2 n,), contiguous, must fit, got {shapes}")
    out, constants = x.new_empty(m, n), settings(m, capability(x.device) in SMALL)
    grid = triton.cdiv(m, constants["BLOCK_M"]) * triton.cdiv(n, constants["BLOCK_N"])
    product[(grid,)](x, weight, bias, out, m=m, n=n, k=k, **constants)
    return out
