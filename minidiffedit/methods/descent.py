"""What methods that learn something share: slopes of a loss, and Adam. Model rows: none of their own."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def slopes(loss: Callable[..., Tensor], at: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss of some tensors, a number, and its gradient in each of them, zero where it does not depend on it."""
    with torch.enable_grad():
        variables = [one.detach().requires_grad_() for one in at]
        value = loss(*variables)
        return value.detach(), torch.autograd.grad(value, variables, allow_unused=True, materialize_grads=True)


def wide(x: Tensor) -> Tensor:
    """In float32 what is in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Adam:
    """Adam (Kingma and Ba, 1412.6980, algorithm 1), with the decay of AdamW (1711.05101). torch's own would bring its
    compiler along, a second of the first step.
    """

    def __init__(self, rate: float, decay: float = 0.0):
        self.rate, self.decay, self.k = rate, decay, 0
        self.means: list[Tensor] = []
        self.squares: list[Tensor] = []

    def step(self, at: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """The tensors after one step; theirs are left as they were."""
        if not self.k:
            self.means, self.squares = ([torch.zeros_like(one) for one in at] for _ in range(2))
        self.k += 1
        self.means = [0.9 * mean + 0.1 * g for mean, g in zip(self.means, gradients)]
        self.squares = [0.999 * square + 0.001 * g**2 for square, g in zip(self.squares, gradients)]
        moved = []
        for one, mean, square in zip(at, self.means, self.squares):
            root = (square / (1 - 0.999**self.k)).sqrt() + 1e-8
            kept = one.detach() * (1 - self.rate * self.decay)
            moved.append(kept - self.rate * (mean / (1 - 0.9**self.k)) / root)
        return moved
