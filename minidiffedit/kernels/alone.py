"""A run's own conditions, wherever it is called from: one at a time on a model, in the types that its result names.

Runs of two threads on one model would count each other's rows. Autocast would compute in another type than the model's,
and inference mode forbid the gradients that some methods take.
"""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

Made = TypeVar("Made")
TURNS = WeakKeyDictionary[Any, Any]()  # by model, the lock of the run that has it


def alone(run: Callable[..., Made]) -> Callable[..., Made]:
    """run(plan, sd, ...) without gradients but those that it asks for itself. A run may call another on its model.

    Raises ValueError for what is no model.
    """

    @wraps(run)
    def in_turn(plan: Any, sd: Any, *given: Any, **options: Any) -> Made:
        if not hasattr(sd, "eps"):
            raise ValueError(f"a model must be given, as StableDiffusion.load gives it, got {type(sd).__name__}")
        kind = sd.device.type
        plain = torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda") else nullcontext()
        with TURNS.setdefault(sd, threading.RLock()), torch.inference_mode(False), torch.no_grad(), plain:
            return run(plan, sd, *given, **options)

    return in_turn
