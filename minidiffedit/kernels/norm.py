"""silu(GroupNorm(x)) in Triton for channels-last latents: two launches, each reads x once.

torch normalises channels-last tensors group by group with reads that jump, and takes SiLU in a launch of its own. Here
`moments` gives mean and squared distance of each piece of rows; `apply` joins the pieces (Chan, Golub and LeVeque,
1983: no difference of large sums), scales, shifts and takes SiLU. `twin` is the same arithmetic in plain torch. In no
network yet: where it is faster than what torch.compile makes is not measured (tests/bench/gpu.py, figure K1).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def twin(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """x (b, c, h, w), weight and bias (c,) -> silu of the normalised x, in x's dtype; moments and SiLU in float32."""
    rows = x.float().unflatten(1, (groups, -1))  # (b, groups, c / groups, h, w)
    variance, mean = torch.var_mean(rows, dim=(2, 3, 4), correction=0, keepdim=True)
    y = ((rows - mean) * (variance + eps).rsqrt()).flatten(1, 2)
    y = y * weight.float()[:, None, None] + bias.float()[:, None, None]
    return (y * torch.sigmoid(y)).to(x.dtype)


@triton.jit
def moments(
    x,
    mean,
    square,
    n: tl.constexpr,
    c: tl.constexpr,
    groups: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Mean and summed squared distance of one group in ROWS rows of one image. Programs: (pieces, groups, b)."""
    piece, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    width: tl.constexpr = c // groups
    channels = tl.arange(0, WIDTH)
    inside_c = channels < width
    base = x + b * n * c + group * width
    total, count = 0.0, 0.0
    for step in range(0, ROWS, STEP):
        rows = piece * ROWS + step + tl.arange(0, STEP)
        inside = (rows < n)[:, None] & inside_c[None, :]
        total += tl.sum(tl.load(base + rows[:, None] * c + channels[None, :], mask=inside, other=0.0).to(tl.float32))
        count += tl.sum(inside.to(tl.float32))
    middle = total / count
    distance = 0.0
    for step in range(0, ROWS, STEP):  # read again: it lies in the cache
        rows = piece * ROWS + step + tl.arange(0, STEP)
        inside = (rows < n)[:, None] & inside_c[None, :]
        part = tl.load(base + rows[:, None] * c + channels[None, :], mask=inside, other=0.0).to(tl.float32) - middle
        distance += tl.sum(tl.where(inside, part * part, 0.0))
    at = (b * groups + group) * tl.num_programs(0) + piece
    tl.store(mean + at, middle)
    tl.store(square + at, distance)


@triton.jit
def apply(
    x,
    weight,
    bias,
    out,
    mean,
    square,
    eps: tl.constexpr,
    n: tl.constexpr,
    c: tl.constexpr,
    groups: tl.constexpr,
    pieces: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The same rows and group: what its pieces found joined, then scaled, shifted, SiLU."""
    piece, group, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    width: tl.constexpr = c // groups
    one = tl.arange(0, PIECES)
    known = one < pieces
    at = (b * groups + group) * pieces + one
    counts = tl.where(known, width * tl.minimum(ROWS, n - one * ROWS), 0).to(tl.float32)
    means = tl.load(mean + at, mask=known, other=0.0)
    middle = tl.sum(counts * means) / (n * width)
    apart = means - middle
    distance = tl.sum(tl.load(square + at, mask=known, other=0.0)) + tl.sum(counts * apart * apart)
    scale = tl.rsqrt(distance / (n * width) + eps)
    channels = tl.arange(0, WIDTH)
    inside_c = channels < width
    w = tl.load(weight + group * width + channels, mask=inside_c, other=0.0).to(tl.float32)
    shift = tl.load(bias + group * width + channels, mask=inside_c, other=0.0).to(tl.float32)
    base = b * n * c + group * width
    for step in range(0, ROWS, STEP):
        rows = piece * ROWS + step + tl.arange(0, STEP)
        inside = (rows < n)[:, None] & inside_c[None, :]
        places = base + rows[:, None] * c + channels[None, :]
        y = (tl.load(x + places, mask=inside, other=0.0).to(tl.float32) - middle) * scale * w[None, :] + shift[None, :]
        y = y / (1.0 + tl.exp(-y))
        tl.store(out + places, y.to(out.dtype.element_ty), mask=inside)


def settings(n: int, width: int) -> dict[str, int]:
    """Rows of a piece and of a step, for n cells and groups of `width` channels."""
    rows = min(512, max(16, triton.next_power_of_2(n)))
    return {"ROWS": rows, "STEP": min(rows, 64), "WIDTH": triton.next_power_of_2(width)}


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """x (b, c, h, w), channels last, float16, bfloat16 or float32, on a GPU -> silu(group_norm(x)), the same layout and
    dtype. No gradient. Raises ValueError for another layout and for channels that the groups do not divide.
    """
    b, c, h, w = x.shape
    if c % groups or not x.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"x must be channels last with channels in {groups} groups, got {(*x.shape,)} {x.stride()}")
    n, out = h * w, torch.empty_like(x)
    constants = {"n": n, "c": c, "groups": groups} | settings(n, c // groups)
    pieces = triton.cdiv(n, constants["ROWS"])
    mean, square = torch.empty(2, b * groups * pieces, device=x.device)
    grid, joined = (pieces, groups, b), {"eps": eps, "pieces": pieces, "PIECES": triton.next_power_of_2(pieces)}
    moments[grid](x, mean, square, **constants)
    apply[grid](x, weight, bias, out, mean, square, **constants, **joined)
    return out
