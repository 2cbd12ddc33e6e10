"""A run's own conditions, wherever it is called from: one at a time on a model, in the types that its result names.

Runs of two threads on one model would count each other's rows. Autocast would compute in another type than the model's,
and inference mode forbid the gradients that some methods take. What a run calls, a callback for one, must not wait for
another thread's run on the model.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

Made = TypeVar("Made")
TURNS = WeakKeyDictionary[Any, Any]()  # by model, the lock of the run that has it


@contextmanager
def own_turn(sd: Any) -> Iterator[None]:
    try:
        plain: Any = torch.autocast(getattr(sd, "device", torch.device("cpu")).type, enabled=False)
    except RuntimeError:  # of a kind of device that this torch has no autocast for
        plain = nullcontext()
    with TURNS.setdefault(sd, threading.RLock()), torch.inference_mode(False), torch.no_grad(), plain:
        yield


def alone(run: Callable[..., Made]) -> Callable[..., Made]:
    """run(plan, sd, ...) without gradients but those that it asks for itself. A run may call another on its model,
    whose rows are counted in both.

    Raises ValueError for what is no model.
    """

    @wraps(run)
    def in_turn(plan: Any, sd: Any, *given: Any, **options: Any) -> Made:
        if not hasattr(sd, "eps"):
            raise ValueError(f"a model must be given, as StableDiffusion.load gives it, got {type(sd).__name__}")
        with own_turn(sd):
            return run(plan, sd, *given, **options)

    return in_turn
