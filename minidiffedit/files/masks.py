"""Masks one can steer: shape the mask that was found or given, then lay one's own over it.

Latent masks are (1, 1, h, w), bool or float in [0, 1], 1 = edited. Every function returns a new float32 mask, leaves
its argument alone and keeps soft values soft: nothing is cut at a threshold.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ddim import whole
from .images import latent_mask

MOST_CELLS = 1024


def dilate(mask: Tensor, cells: int) -> Tensor:
    """Grow by `cells` in all eight directions; below 0 shrink. Shrinking leaves alone what touches the border.

    Soft values: each cell takes the largest (shrinking: the smallest) within reach. Raises ValueError for what is no
    latent mask, or cells not a whole number.
    """
    M, cells = checked(mask), whole("dilate", cells, -MOST_CELLS, MOST_CELLS)
    sign, reach = (-1 if cells < 0 else 1), abs(cells)
    rows = F.max_pool2d(sign * M, (1, 2 * reach + 1), stride=1, padding=(0, reach))
    return sign * F.max_pool2d(rows, (2 * reach + 1, 1), stride=1, padding=(reach, 0))


def feather(mask: Tensor, cells: int) -> Tensor:
    """Fade outwards over `cells`: k cells away from a value v stands at least v (1 - k / (cells + 1)). Inside, nothing
    changes; to fade inwards, shrink first. Raises ValueError as `dilate` does.
    """
    faded, cells = checked(mask), whole("feather", cells, 0, MOST_CELLS)
    for k in range(1, cells + 1):
        faded = torch.maximum(faded, dilate(mask, k) * (1 - k / (cells + 1)))
    return faded


def largest_piece(mask: Tensor) -> Tensor:
    """The piece with the most cells alone, its values kept; cells above 0 that share a side are one piece. Of equally
    large pieces the first in reading order. Raises ValueError for what is no latent mask.
    """
    M = checked(mask)
    inside = M[0, 0] > 0
    if not inside.any():
        return M
    # Each cell's own number, then again and again the highest among its neighbours': one number per piece is left.
    number, spread = None, torch.arange(inside.numel(), 0, -1, device=M.device).view(inside.shape) * inside
    while number is None or not torch.equal(number, spread):
        number, p = spread, F.pad(spread, (1, 1, 1, 1))
        spread = torch.stack([number, p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]]).amax(dim=0) * inside
    sizes = torch.bincount(number[inside])
    return M * (number == (sizes == sizes.max()).nonzero().max())


def union(mask: Tensor, other: Tensor) -> Tensor:
    """Where either is: the larger value of each cell. Raises ValueError for sizes that differ."""
    return torch.maximum(*paired(mask, other))


def subtract(mask: Tensor, other: Tensor) -> Tensor:
    """Where the other is not: at most 1 - other in each cell. Raises ValueError for sizes that differ."""
    M, other = paired(mask, other)
    return torch.minimum(M, 1 - other)


def invert(mask: Tensor) -> Tensor:
    """1 - mask. Raises ValueError for what is no latent mask."""
    return 1 - checked(mask)


@dataclass(frozen=True, eq=False)
class Steering:
    """What to do with a mask, always in this order: largest, invert, dilate, feather, union, subtract.

    So the mask is shaped first, and one's own masks are laid over it as they are: what is subtracted stays 0 whatever
    else is asked. union, subtract: anything that `edit` takes as a mask; `at` brings them onto the latent grid, which
    `edit` does itself. Raises ValueError for cells out of range.
    """

    largest: bool = False
    invert: bool = False
    dilate: int = 0
    feather: int = 0
    union: Any = None
    subtract: Any = None

    def __post_init__(self) -> None:
        whole("dilate", self.dilate, -MOST_CELLS, MOST_CELLS)
        whole("feather", self.feather, 0, MOST_CELLS)
        if not (isinstance(self.largest, bool) and isinstance(self.invert, bool)):
            raise ValueError(f"largest and invert must be True or False, got {self.largest!r} and {self.invert!r}")

    def at(self, picture: tuple[int, int], working: tuple[int, int], factor: int = 8) -> "Steering":
        """The same with union and subtract as latent masks; arguments and errors as in `images.latent_mask`."""

        def cells(mask: Any) -> Tensor | None:
            return None if mask is None else latent_mask(mask, picture, working, factor)

        return replace(self, union=cells(self.union), subtract=cells(self.subtract))

    def __call__(self, mask: Tensor) -> Tensor:
        """(1, 1, h, w) -> the steered mask. Raises ValueError for one that `union` or `subtract` does not fit."""
        M = largest_piece(mask) if self.largest else checked(mask)
        M = invert(M) if self.invert else M
        M = feather(dilate(M, self.dilate), self.feather)
        M = M if self.union is None else union(M, self.union)
        return M if self.subtract is None else subtract(M, self.subtract)

    def settings(self) -> dict[str, Any]:
        """What differs from the defaults, as plain values; a latent mask by the first ten digits of its sha256."""
        shown = {name: digest(value) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return {name: value for name, value in shown.items() if value}


def digest(mask: Tensor) -> str:
    return hashlib.sha256(checked(mask).cpu().numpy().astype("<f4").tobytes()).hexdigest()[:10]


def checked(mask: Tensor) -> Tensor:
    """A latent mask as float32, a copy."""
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[:2] != (1, 1) or 0 in mask.shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"a latent mask must be a tensor (1, 1, h, w), got {got}")
    M = mask.to(torch.float32, copy=True)
    if not bool(((M >= 0) & (M <= 1)).all()):  # also false for NaN
        raise ValueError("a latent mask's values must lie in [0, 1]")
    return M


def paired(mask: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    M, other = checked(mask), checked(other)
    if M.shape != other.shape:
        raise ValueError(f"the masks must have one size, got {tuple(M.shape[2:])} and {tuple(other.shape[2:])}")
    return M, other.to(M.device)
