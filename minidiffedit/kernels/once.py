"""What the UNet makes of a timestep, and of the texts, alone: the same at many calls, so made at the first of them.

Of the 638 operations of a call under two texts at SD v1's size 68 are of this kind: the timestep's features and what
each ResBlock makes of them, the keys and values of the texts. Kept are the tensors themselves, so no bit changes.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

PARTS = ("time_emb", "attn2.to_k", "attn2.to_v")  # in the names of the weights that they are made with
TIMES = 100  # timesteps that are kept, 4 MB at SD v1's size in half types; keys and values of a text take 4 MB a row


def anew(layer: Callable[..., Tensor], given: Any) -> Tensor:
    """What a layer makes of a timestep or a text, made at each call."""
    return layer(given)


class Once(threading.local):
    """Keeps what layers of one UNet made of the last texts, and of timesteps, for each thread its own.

    A weight that was moved, cast, exchanged or written to is noticed, unless its `.data` was written to in place.
    """

    def __init__(self) -> None:
        self.unet: nn.Module | None = None
        # Each with its memory, held so that no other can take its place; the address; how often it had been written to.
        self.weights: list[tuple[Tensor, torch.UntypedStorage, int, int]] = []
        self.texts: list[tuple[Tensor, int]] = []  # held, so that no other tensor can be taken for them
        self.latents = 0
        self.of_texts: dict[Any, Tensor] = {}
        self.of_times: dict[int, dict[Any, Tensor]] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Once, ()  # a copy of a model keeps nothing yet

    def keeper(self, unet: nn.Module, t: int, texts: Sequence[Tensor], latents: int) -> Callable[..., Tensor]:
        """(layer, given) -> layer(given), kept or made, for one call of the UNet at timestep t, so many latents under
        these texts. Nothing is kept where a gradient may be asked for, nor in inference mode, which counts no writes.
        """
        if torch.is_grad_enabled() or any(one.is_inference() for one in (*texts, next(unet.parameters()))):
            return anew
        if unet is not self.unet or any(p.data_ptr() != at or p._version != n for p, _, at, n in self.weights):
            read = [p for name, p in unet.named_parameters() if any(part in name for part in PARTS)]
            self.unet, self.weights = unet, [(p, p.untyped_storage(), p.data_ptr(), p._version) for p in read]
            self.of_times, self.texts = {}, []
        same = len(texts) == len(self.texts) and latents == self.latents
        if not same or any(one is not held or one._version != n for one, (held, n) in zip(texts, self.texts)):
            self.texts, self.latents, self.of_texts = [(one, one._version) for one in texts], latents, {}
        of_time = self.of_times.setdefault(t, {})
        if len(self.of_times) > TIMES:
            del self.of_times[next(iter(self.of_times))]
        return partial(self.kept, of_time)

    def kept(self, of_time: dict[Any, Tensor], layer: Callable[..., Tensor], given: Any) -> Tensor:
        made = self.of_texts if isinstance(given, Tensor) and given.ndim == 3 else of_time
        if layer not in made:
            made[layer] = layer(given)
        return made[layer]
