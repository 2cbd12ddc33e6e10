"""Steering a mask: the one that was found or given is shaped, then the user's own masks are laid over it.

Latent masks are (1, 1, h, w), bool or float in [0, 1], 1 = edited. Every function returns a new float32 mask, leaves
its arguments as they are, keeps soft values soft, and raises ValueError for what is no latent mask.
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
HAZE = 1 / 64  # a mask's values up to here are a JPEG's noise


def dilate(mask: Tensor, cells: int) -> Tensor:
    """Grow by `cells`, -1024..1024, in all eight directions; below 0 shrink, but not from the picture's border. Of soft
    values each cell takes the largest (shrinking: the smallest) within reach. ValueError for other numbers of cells.
    """
    M, cells = checked(mask), whole("dilate", cells, -MOST_CELLS, MOST_CELLS)
    sign, reach = (-1 if cells < 0 else 1), abs(cells)
    rows = F.max_pool2d(sign * M, (1, 2 * reach + 1), stride=1, padding=(0, reach))
    return sign * F.max_pool2d(rows, (2 * reach + 1, 1), stride=1, padding=(reach, 0))


def feather(mask: Tensor, cells: int) -> Tensor:
    """Fade outwards over `cells`, 0..1024: k cells away from a value v the mask is at least v (1 - k / (cells + 1)).
    Inside nothing changes; to fade inwards, shrink first. ValueError for other numbers of cells.
    """
    faded, cells = checked(mask), whole("feather", cells, 0, MOST_CELLS)
    for k in range(1, cells + 1):
        faded = torch.maximum(faded, dilate(mask, k) * (1 - k / (cells + 1)))
    return faded


def largest_piece(mask: Tensor) -> Tensor:
    """Only the piece with the most cells, with its values; cells above HAZE that share a side belong to one piece. Of
    equally large pieces it is the first in reading order.
    """
    M = checked(mask)
    inside = M[0, 0] > HAZE
    if not inside.any():
        return M
    # Each cell has a number of its own and takes its neighbours' highest, until one number is left in each piece.
    number, spread = None, torch.arange(inside.numel(), 0, -1, device=M.device).view(inside.shape) * inside
    while number is None or not torch.equal(number, spread):
        number, p = spread, F.pad(spread, (1, 1, 1, 1))
        spread = torch.stack([number, p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]]).amax(dim=0) * inside
    sizes = torch.bincount(number[inside])
    return M * (number == (sizes == sizes.max()).nonzero().max())


def union(mask: Tensor, other: Tensor) -> Tensor:
    """The larger value of each cell. ValueError for sizes that differ."""
    return torch.maximum(*paired(mask, other))


def subtract(mask: Tensor, other: Tensor) -> Tensor:
    """At most 1 - other in each cell. ValueError for sizes that differ."""
    M, other = paired(mask, other)
    return torch.minimum(M, 1 - other)


def invert(mask: Tensor) -> Tensor:
    return 1 - checked(mask)


@dataclass(frozen=True, eq=False)
class Steering:
    """What to do with a mask, always in this order: largest, invert, dilate, feather, union, subtract. So what is
    subtracted stays 0 whatever else is asked.

    union, subtract: anything that `edit` takes as a mask; `edit` brings them onto the latent grid by `at`. Raises
    ValueError for numbers of cells out of range.
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
        own: dict[str, Any] = {"union": self.union, "subtract": self.subtract}
        for name, mask in own.items():
            own[name] = None if mask is None else latent_mask(mask, picture, working, factor)
        return replace(self, **own)

    def __call__(self, mask: Tensor) -> Tensor:
        """(1, 1, h, w) -> the steered mask. ValueError for another size than that of `union` and `subtract`."""
        M = largest_piece(mask) if self.largest else checked(mask)
        M = invert(M) if self.invert else M
        M = feather(dilate(M, self.dilate), self.feather)
        M = M if self.union is None else union(M, self.union)
        return M if self.subtract is None else subtract(M, self.subtract)

    def settings(self) -> dict[str, Any]:
        """What differs from the defaults, as plain values; a latent mask by its `digest`."""
        shown = {name: digest(value) if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return {name: value for name, value in shown.items() if value}


def digest(mask: Tensor) -> str:
    """The first ten digits of the sha256 of a mask's values."""
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
