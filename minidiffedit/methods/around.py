"""One call of the UNet that keeps what lies around a box, and others that compute the box alone (see sige.py).

The UNet is not written a second time: while the mode below is on, its own code runs, and torch hands the mode each norm
and convolution (torch.overrides.TorchFunctionMode); self-attention comes by the tap. Model rows: none of its own.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..attention import Attend, Site
from ..unet import fan_out
from .descent import wide

Box = tuple[int, int, int, int]  # top, left, bottom, right


class Around(TorchFunctionMode):
    """`with around.keeping(kept)` a call of the network fills a list with what lies around a box, and is as any; `with
    around.reading(kept)` a call makes the box alone, and puts that into the other's result. size: (h, w) of the latent.
    """

    def __init__(self, box: Box, size: Sequence[int]):
        super().__init__()
        self.whole, self.size, self.inside = box == (0, 0, *size), tuple(size), False
        self.kept = list[Any]()  # the output of the latest convolution, then what is kept in the order of the layers
        self.known: Iterator[Any] = iter(())  # of that what has yet to be read
        self.cells, self.boxes = dict[tuple[int, ...], Tensor](), dict[tuple[int, ...], Box]()
        for level in range(10):  # halved, and rounded up
            h, w, bottom, right = (-(-side // 2**level) for side in (*size, *box[2:]))
            self.boxes.setdefault((h, w), (box[0] >> level, box[1] >> level, bottom, right))

    def keeping(self, kept: list[Any]) -> "Around":
        self.kept, self.inside = kept, False
        kept[:] = [None]
        return self

    def reading(self, kept: list[Any]) -> "Around":
        self.kept, self.inside, self.known = kept, True, iter(kept[1:])
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.group_norm and not self.whole:
            return self.norm(*args, **(kwargs or {}))
        if func is F.conv2d and args[1].shape[-1] == 3 and not self.whole:
            return self.convolution(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor, stride: Any, *how: Any) -> Tensor:
        if not self.inside:
            frame = self.framed(x)
            sides = frame[:, :, :1], frame[:, :, 1:-1, :1], frame[:, :, 1:-1, -1:], frame[:, :, -1:]
            self.kept.append([side.clone() for side in sides])
            self.kept[0] = F.conv2d(x, weight, bias, stride, *how)
            return self.kept[0]  # type: ignore[no-any-return]
        kept = next(self.known)
        top, left, right, bottom = (fan_out(side, len(x)) for side in kept)
        first = x.shape[2:] == self.size  # of the network: it is handed all of the latent
        frame = self.framed(x) if first else torch.cat([top, torch.cat([left, x, right], dim=3), bottom], dim=2)
        made = F.conv2d(frame, weight, bias, stride)
        if kept is not self.kept[-1]:
            return made
        whole, (high, low, end, far) = fan_out(self.kept[0], len(made)).clone(), self.boxes[self.size]
        whole[:, :, high:end, low:far] = made
        return whole

    def framed(self, x: Tensor) -> Tensor:
        """The box of x (b, c, h, w) with one cell more on each side; beyond the picture 0."""
        top, left, bottom, right = self.boxes[tuple(x.shape[2:])]
        return F.pad(x, (1, 1, 1, 1))[:, :, top : bottom + 2, left : right + 2]

    def outside(self, size: Sequence[int], device: torch.device) -> Tensor:
        """The numbers of the cells outside the box."""
        if (size := tuple(size)) not in self.cells:
            cells, (top, left, bottom, right) = torch.ones(*size, dtype=torch.bool), self.boxes[size]
            cells[top:bottom, left:right] = False
            self.cells[size] = cells.flatten().nonzero().flatten().to(device)
        return self.cells[size]

    def norm(self, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """The statistics of the box and of what lies outside are put together by their numbers (Chan et al., 1979)."""
        if not self.inside:
            self.kept.append(moments(x.flatten(2)[..., self.outside(x.shape[2:], x.device)], groups))
            return F.group_norm(x, groups, weight, bias, eps)
        n, mean, variance = next(self.known)
        m, here, spread = moments(x.flatten(2), groups)
        mean, variance = fan_out(mean, len(x)), fan_out(variance, len(x))
        share = n / (n + m)
        variance = share * variance + (1 - share) * spread + share * (1 - share) * (mean - here) ** 2
        mean, scale = share * mean + (1 - share) * here, (variance + eps).rsqrt()
        mean, scale = (one.repeat_interleave(x.shape[1] // groups, dim=1)[..., None, None] for one in (mean, scale))
        scale = scale * weight[:, None, None]
        return torch.addcmul(bias[:, None, None] - mean * scale, wide(x), scale).to(x.dtype)

    def attend(self, plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site.kind == "self" and not self.whole:
            if self.inside:
                k, v = (
                    torch.cat([fan_out(far, len(near)), near], dim=2) for far, near in zip(next(self.known), (k, v))
                )
            else:
                at = self.outside([-(-side // 2**site.level) for side in self.size], k.device)
                self.kept.append((k[:, :, at], v[:, :, at]))
        return plain(site, q, k, v)


def moments(x: Tensor, groups: int) -> tuple[int, Tensor, Tensor]:
    """x (b, c, n) -> how many values a group has, and their mean and variance, each (b, groups); 0 of none."""
    values = wide(x).unflatten(1, (groups, -1)).flatten(2)
    if not (n := values.shape[2]):
        return 0, values.new_zeros(values.shape[:2]), values.new_zeros(values.shape[:2])
    variance, mean = torch.var_mean(values, dim=2, correction=0)
    return n, mean, variance
