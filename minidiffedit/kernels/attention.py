"""Attention in Triton: softmax(q k^T / sqrt(d)) v without the (n, m) matrix ever leaving the chip.

Two kernels, by the number of keys. `few_keys`: all keys in one tile and one softmax pass (cross-attention's 77, the
64 cells of the coarsest self-attention). `many_keys`: blocks of keys under a running maximum (Milakov and Gimelshein,
1805.02867; Dao et al., 2205.14135). `twin` is the same arithmetic in plain torch: the thing to read first.

SD's heads hold 40, 80 or 160 numbers, and a tile's sides must be powers of two: they are padded to 64, 128 and 256.
Two tiles that waste less, 32 + 16, 64 + 16, 128 + 32, were tried: right in the interpreter, but Triton 3.6 makes code
of them that is wrong on an H200 wherever the loop over the keys is not pipelined (2026-11-26). 77 keys are covered by
two tiles, 64 + 16 (`split`), which is right there. Sizes and strides are compile-time constants: the compiler
pipelines the loads of a loop whose bounds it knows.
"""

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import capability

ONE_TILE = 128  # as many keys still fit one tile
LOG2_E = 1.4426950408889634  # exp(x) = 2^(x log2 e), and the hardware has 2^x


def split(n: int) -> tuple[int, int]:
    """n -> two powers of two with a sum of n or more, each 16 or more (the matrix units' least), or the second 0."""
    head = max(16, 1 << (n.bit_length() - 1))
    return head, 0 if n <= head else max(16, triton.next_power_of_2(n - head))


def twin(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The kernels' arithmetic: sums in float32, the weights rounded to v's dtype before they meet v."""
    n_k = k.shape[-2]
    block = n_k if n_k <= ONE_TILE else settings(q.shape[-1], n_k)["BLOCK_K"]
    top = torch.full(q.shape[:-1], -torch.inf, device=q.device)
    total, acc = torch.zeros_like(top), torch.zeros(q.shape, device=q.device)
    for start in range(0, n_k, block):
        keys, values = (x[..., start : start + block, :].float() for x in (k, v))
        scores = LOG2_E * q.shape[-1] ** -0.5 * (q.float() @ keys.mT)
        new_top = torch.maximum(top, scores.amax(-1))
        weights, shrink = torch.exp2(scores - new_top[..., None]), torch.exp2(top - new_top)
        total = total * shrink + weights.sum(-1)
        acc = acc * shrink[..., None] + weights.to(v.dtype).float() @ values
        top = new_top
    return (acc / total[..., None]).to(q.dtype)


@triton.jit
def load(base, rows, width: tl.constexpr, stride: tl.constexpr, n: tl.constexpr, d: tl.constexpr, whole: tl.constexpr):
    """Rows of an (n, d) matrix, zeros beyond it, to width. whole: no row is beyond."""
    columns = tl.arange(0, width)
    places = base + rows[:, None] * stride + columns[None, :]
    inside = columns[None, :] < d
    if not whole:
        inside = inside & (rows[:, None] < n)
    elif width <= d:
        return tl.load(places)
    return tl.load(places, mask=inside, other=0.0)


@triton.jit
def store(base, rows, x, stride: tl.constexpr, n: tl.constexpr, d: tl.constexpr):
    columns = tl.arange(0, x.shape[1])
    inside = (rows[:, None] < n) & (columns[None, :] < d)
    tl.store(base + rows[:, None] * stride + columns[None, :], x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def score(q, k, rows, D: tl.constexpr, stride: tl.constexpr, n: tl.constexpr, d: tl.constexpr, whole: tl.constexpr):
    """Queries times the keys in these rows; -inf beyond the last key."""
    s = tl.dot(q, load(k, rows, D, stride, n, d, whole).T)
    if not whole:
        s = tl.where(rows[None, :] < n, s, float("-inf"))
    return s


@triton.jit
def add_block(
    top, total, acc, q, k, v, rows, scale: tl.constexpr, D: tl.constexpr, kn: tl.constexpr, vn: tl.constexpr,
    n: tl.constexpr, d: tl.constexpr, whole: tl.constexpr,
):  # fmt: skip
    """One block of keys and values joins the sums; what was summed under a lower maximum shrinks first."""
    s = score(q, k, rows, D, kn, n, d, whole)
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype.element_ty), load(v, rows, D, vn, n, d, whole), acc * shrink[:, None])
    return new_top, total, acc


@triton.jit
def many_keys(
    q, k, v, out, n_q: tl.constexpr, n_k: tl.constexpr, d: tl.constexpr, scale: tl.constexpr,
    qb: tl.constexpr, qh: tl.constexpr, qn: tl.constexpr, kb: tl.constexpr, kh: tl.constexpr, kn: tl.constexpr,
    vb: tl.constexpr, vh: tl.constexpr, vn: tl.constexpr, ob: tl.constexpr, oh: tl.constexpr, on: tl.constexpr,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head against all keys, a block at a time. Programs: (blocks, heads, b)."""
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    q, k, v, out = q + b * qb + head * qh, k + b * kb + head * kh, v + b * vb + head * vh, out + b * ob + head * oh
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    queries = load(q, rows, D, qn, n_q, d, n_q % BLOCK_Q == 0)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, D), tl.float32)
    end: tl.constexpr = n_k // BLOCK_K * BLOCK_K
    for start in range(0, end, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        top, total, acc = add_block(top, total, acc, queries, k, v, keys, scale, D, kn, vn, n_k, d, True)
    if end < n_k:  # the ragged end, outside the loop, so that no other block pays for its mask
        keys = end + tl.arange(0, BLOCK_K)
        top, total, acc = add_block(top, total, acc, queries, k, v, keys, scale, D, kn, vn, n_k, d, False)
    store(out, rows, acc / total[:, None], on, n_q, d)


@triton.jit
def few_keys(
    q, k, v, out, n_q: tl.constexpr, n_k: tl.constexpr, d: tl.constexpr, scale: tl.constexpr,
    qb: tl.constexpr, qh: tl.constexpr, qn: tl.constexpr, kb: tl.constexpr, kh: tl.constexpr, kn: tl.constexpr,
    vb: tl.constexpr, vh: tl.constexpr, vn: tl.constexpr, ob: tl.constexpr, oh: tl.constexpr, on: tl.constexpr,
    D: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head against all keys at once, in two parts along the keys. Programs as above."""
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    q, k, v, out = q + b * qb + head * qh, k + b * kb + head * kh, v + b * vb + head * vh, out + b * ob + head * oh
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    queries = load(q, rows, D, qn, n_q, d, n_q % BLOCK_Q == 0)
    whole0: tl.constexpr = n_k >= K0
    whole1: tl.constexpr = n_k == K0 + K1
    keys0 = tl.arange(0, K0)
    s0 = score(queries, k, keys0, D, kn, n_k, d, whole0)
    top = tl.max(s0, 1)
    if K1 > 0:
        keys1 = K0 + tl.arange(0, K1)
        s1 = score(queries, k, keys1, D, kn, n_k, d, whole1)
        top = tl.maximum(top, tl.max(s1, 1))
    p0 = tl.exp2((s0 - top[:, None]) * scale)
    total = tl.sum(p0, 1)
    acc = tl.dot(p0.to(v.dtype.element_ty), load(v, keys0, D, vn, n_k, d, whole0))
    if K1 > 0:
        p1 = tl.exp2((s1 - top[:, None]) * scale)
        total += tl.sum(p1, 1)
        acc = tl.dot(p1.to(v.dtype.element_ty), load(v, keys1, D, vn, n_k, d, whole1), acc)
    store(out, rows, acc / total[:, None], on, n_q, d)


# Other settings, by name, for what may be faster on some GPU: longer blocks are fewer steps of the running maximum.
VARIANTS: dict[str, dict[str, int]] = {"longer": {"BLOCK_K": 128}}
SMALL = ((8, 6), (8, 9), (12, 0))  # GPUs whose multiprocessor holds 48 warps and 100 KB, not 64 and 164 to 228


def settings(d: int, n_k: int, capability: tuple[int, int] = (9, 0)) -> dict[str, int]:
    """Tile sides, warps per program, loads in flight. Chosen from the compiled code (tests/test_kernels.py): nothing
    spills, and several programs fit a multiprocessor; no time was measured yet (tests/bench/gpu.py --tune).
    """
    D = max(16, triton.next_power_of_2(d))
    if n_k <= ONE_TILE:
        K0, K1 = split(n_k)
        tight = d > 80 and (capability < (9, 0) or capability in SMALL)  # as wide as this, 64 queries would spill
        sides = {"BLOCK_Q": 32, "num_warps": 8} if tight else {"BLOCK_Q": 128 if d <= 64 else 64, "num_warps": 4}
        block = {"K0": K0, "K1": K1, **sides, "num_stages": 1}
    elif d <= 64 and capability not in SMALL:
        block = {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    else:
        side = 32 if d > 80 and capability in SMALL else 64
        block = {"BLOCK_Q": 64, "BLOCK_K": side, "num_warps": 4, "num_stages": 3 if d <= 80 else 2}
    return {"D": D, **block}


def plan(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, capability: tuple[int, int] = (9, 0)
) -> tuple[Any, dict[str, Any]]:
    """The kernel for these tensors and its compile-time arguments."""
    d, n_k = q.shape[3], k.shape[2]
    constants: dict[str, Any] = {"n_q": q.shape[2], "n_k": n_k, "d": d, "scale": LOG2_E * d**-0.5}
    for name, x in (("q", q), ("k", k), ("v", v), ("o", out)):
        constants |= {name + axis: stride for axis, stride in zip("bhn", x.stride())}
    return few_keys if n_k <= ONE_TILE else many_keys, constants | settings(d, n_k, capability)


def launch(q: Tensor, k: Tensor, v: Tensor, out: Tensor, **other: int) -> None:
    """Write the attention into out. Every tensor's last stride is 1; other: settings to try in place of ours."""
    kernel, constants = plan(q, k, v, out, capability(q.device))
    constants |= other
    b, heads, n, _ = q.shape
    elsewhere = q.is_cuda and not torch.compiler.is_compiling()  # Triton launches on the current device
    with torch.cuda.device(q.device) if elsewhere else nullcontext():
        kernel[(triton.cdiv(n, constants["BLOCK_Q"]), heads, b)](q, k, v, out, **constants)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (b, heads, n, d), k and v (b, heads, m, d) -> (b, heads, n, d), a view of (b, n, heads, d)."""
    b, heads, n, d = q.shape
    assert k.shape == v.shape == (b, heads, k.shape[2], d), (
        f"{tuple(k.shape)}, {tuple(v.shape)} fit no {tuple(q.shape)}"
    )
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty((b, n, heads, d), dtype=q.dtype, device=q.device).transpose(1, 2)
    launch(q, k, v, out)
    return out
