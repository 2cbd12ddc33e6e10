"""Inputs of attention in a field of NaN, and the answer in float64: for the interpreter and for a GPU alike."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# (queries, keys): whole blocks and ragged ones, one tile and many blocks, fewer than any tile's side
SIZES = [(128, 128), (64, 64), (33, 77), (70, 33), (1, 1), (5, 17), (130, 192), (100, 200), (40, 129)]
TOLERANCE = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # half a unit in the last place, doubled


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as its formula stands, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v


def relative(ours: Tensor, theirs: Tensor) -> float:
    """NaN, which passes no comparison, where ours holds one."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def fenced(b: int, n: int, heads: int, d: int, dtype: torch.dtype, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    """A NaN-filled (b, heads, n, d), strided as a projection's view, and the field of NaN it lies in."""
    field = torch.full((b + 2, n + 256, heads * d + 64), torch.nan, dtype=dtype, device=device)  # a tile on every side
    return field[1:-1, 128:-128, 32:-32].unflatten(-1, (heads, d)).transpose(1, 2), field


def draw(
    b: int, n: int, m: int, heads: int, d: int, dtype: torch.dtype, scale: float = 2.0, device: Any = "cpu"
) -> Any:
    """q, k and v, NaN all around them."""
    generator = torch.Generator().manual_seed(n + 1000 * m + d)
    tensors = [fenced(b, rows, heads, d, dtype, device)[0] for rows in (n, m, m)]
    return [x.copy_(torch.randn(x.shape, generator=generator) * scale) for x in tensors]


def kernel_errors(
    sizes: Iterable[tuple[int, int]], b: int, heads: int, d: int, dtype: torch.dtype, scale: float = 2.0,
    device: Any = "cpu", other: dict[str, int] | None = None,
) -> list[tuple[float, float]]:  # fmt: skip
    """The kernel's error against float64 and its distance to the twin, for every size; other: of its settings.

    Raises AssertionError where it wrote outside its output; a number read from outside its inputs makes both NaN.
    """
    from minidiffedit.kernels.attention import launch, twin

    errors = []
    for n, m in sizes:
        q, k, v = draw(b, n, m, heads, d, dtype, scale, device)
        out, field = fenced(b, n, heads, d, dtype, device)
        launch(q, k, v, out, **(other or {}))
        errors.append((relative(out, reference(q, k, v)), relative(out, twin(q, k, v))))
        out.fill_(torch.nan)
        assert field.isnan().all(), f"written outside the output: {n} queries, {m} keys, d = {d}"
    return errors
