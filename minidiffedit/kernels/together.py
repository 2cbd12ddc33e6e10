"""Several runs at once: where they ask the model at one timestep, it is asked once for all of them.

For throughput on a GPU, which one picture leaves idle. Runs know nothing of it: each is made in a thread, which works
only while it is waited for, and stops at each call of the model; once all have stopped, the calls that fit one another
are made as one. Results are those of the runs alone up to the model's rounding between batch sizes, 1e-5 of a call in
float32 and 1e-4 of an edit's latents, not bit for bit. Calls with taps, features, gradients or learned weights are made
one by one.
"""

import copy
import queue
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .alone import own_turn

Work = Callable[[Any], Iterator[Any]]  # a run, or several: given a model, what it makes


class Call(NamedTuple):
    """Of StableDiffusion.eps."""

    x: Tensor
    t: int
    texts: list[Tensor]
    given: Tensor | None

    @property
    def kind(self) -> Any:
        """Calls of one kind can be made as one."""
        tensors = [self.x, *self.texts, *([] if self.given is None else [self.given])]
        return self.t, self.x.dtype, *(one.shape[1:] for one in tensors)


class Turn:
    """Works one after another in a thread, which stops at each call of the model until it gets the answer."""

    def __init__(self, sd: Any, left: Iterator[Work]):
        self.said, self.told = queue.SimpleQueue[Any](), queue.SimpleQueue[Any]()
        self.sd: Any = copy.copy(sd)  # which counts the rows of this thread alone
        self.sd.eps = self.eps
        threading.Thread(target=self.work, args=(left,), daemon=True).start()

    def work(self, left: Iterator[Work]) -> None:
        try:
            self.answer()
            for work in left:
                for made in work(self.sd):
                    self.said.put((made,))
            self.said.put(None)
        except BaseException as error:
            self.said.put(error)

    def answer(self) -> Any:
        if isinstance(told := self.told.get(), BaseException):
            raise told
        return told

    def eps(self, x: Tensor, t: int, texts: Any, *, given: Tensor | None = None, **hooks: Any) -> list[Tensor]:
        if torch.is_grad_enabled() or any(one is not None for one in hooks.values()):
            return type(self.sd).eps(self.sd, x, t, texts, given=given, **hooks)  # type: ignore[no-any-return]
        heard = warnings.filters, warnings.showwarning  # of this run: the others set their own while it waits
        self.said.put(Call(x, t, [*texts], given))
        try:
            predictions: list[Tensor] = self.answer()
        finally:
            warnings.filters, warnings.showwarning = heard  # type: ignore[assignment]
        self.sd.evaluations += len(x) * len(texts)
        return predictions

    def until_it_asks(self, answer: Any) -> Generator[Any, None, Call | None]:
        """What the works make -> the call at which the thread stopped, None at its end. Raises what ended it."""
        heard = warnings.filters, warnings.showwarning
        self.told.put(answer)
        try:
            while (said := self.said.get()) is not None and not isinstance(said, Call):
                if isinstance(said, BaseException):
                    raise said
                yield from said
        finally:
            warnings.filters, warnings.showwarning = heard  # type: ignore[assignment]
        return said


def answers(sd: Any, calls: dict[Turn, Call]) -> dict[Turn, Any]:
    """The predictions of each call, or what the model raised."""
    kinds, found = dict[Any, list[Turn]](), dict[Turn, Any]()
    for turn, call in calls.items():
        kinds.setdefault(call.kind, []).append(turn)
    for turns in kinds.values():
        some = [calls[turn] for turn in turns]
        sizes = [len(call.x) for call in some]
        texts = zip(*([text.expand(n, -1, -1) for text in call.texts] for n, call in zip(sizes, some)))
        given = [call.given.expand(n, -1, -1, -1) for n, call in zip(sizes, some) if call.given is not None]
        try:
            with own_turn(sd):
                x, joined = torch.cat([call.x for call in some]), torch.cat(given) if given else None
                made = sd.eps(x, some[0].t, [torch.cat(each) for each in texts], given=joined)
            found |= zip(turns, map(list, zip(*(one.split(sizes) for one in made))))
        except Exception as error:
            found |= dict.fromkeys(turns, error)
    return found


def together(sd: Any, works: Iterable[Work], count: int) -> Iterator[Any]:
    """What the works make, as it comes, `count` of them at once. Raises what one of them raises."""
    left, asked, joined = iter(works), 0, 0
    turns = [Turn(sd, left) for _ in range(count)]
    told: dict[Turn, Any] = dict.fromkeys(turns)
    try:
        while told:
            calls = dict[Turn, Call]()
            for turn, answer in told.items():
                if call := (yield from turn.until_it_asks(answer)):
                    calls[turn] = call
            told = answers(sd, calls)
            asked, joined = asked + len(calls), joined + len(calls) - len({call.kind for call in calls.values()})
        if asked and not joined and count > 1:
            said = "pictures of one size, steps and strength go together, by methods that neither tap nor learn"
            warnings.warn(f"no two calls of the model could be made as one: {said}", stacklevel=2)
    finally:
        for turn in turns:
            turn.told.put(KeyboardInterrupt())  # for those that still wait, where the run was ended
