"""What makes a program wait for its GPU, seen on a CPU: a value read back, a number copied over."""

import sys
import weakref
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import minidiffedit

ROOT = str(Path(minidiffedit.__file__).parent)
READS = {
    Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.cpu,
    Tensor.numpy, Tensor.__array__, Tensor.nonzero, torch.nonzero, Tensor.equal, torch.equal, Tensor.allclose,
    torch.allclose, Tensor.masked_select, torch.masked_select, torch.unique, Tensor.unique, torch.is_nonzero,
    Tensor.is_nonzero,
}  # fmt: skip


class Waits(TorchFunctionMode):
    """Counts by place in the package each read of a value, each tensor made of Python's numbers (which is copied over,
    and the copy waited for), each index by a mask. What a generator of the CPU drew is the host's own until it is
    worked on: reading it is no wait. Noise goes over at each draw; that is not counted.
    """

    def __init__(self):
        super().__init__()
        self.places, self.drawn = Counter(), {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.waits(func, args):
            self.places[place()] += 1
        made = func(*args, **kwargs)
        if kwargs.get("generator") is not None and isinstance(made, Tensor):
            self.drawn[id(made)] = weakref.ref(made)
        return made

    def waits(self, func, args):
        one = args[0] if args else None
        if isinstance(one, Tensor) and (found := self.drawn.get(id(one))) and found() is one:
            return False
        if func in (torch.tensor, torch.as_tensor):
            return not isinstance(one, Tensor)
        masks = [part for part in args[1:] for part in (part if isinstance(part, tuple) else (part,))]
        by_mask = any(isinstance(part, Tensor) and part.dtype == torch.bool for part in masks)
        return func in READS or (func in (Tensor.__getitem__, Tensor.__setitem__) and by_mask)


def place():
    """file:function of the innermost frame in the package."""
    frame = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith(ROOT):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).stem}:{frame.f_code.co_name}" if frame else "outside"
