"""Several pictures at once: where their edits ask the model at one timestep, it is asked once for all of them.

For throughput on a GPU, which one picture leaves idle. Methods know nothing of it: each picture's rows are made in a
thread of their own, which works only while it is waited for, and stops at each call of the model; once all have
stopped, the calls that fit one another are made as one. Results are those of the edits alone up to the model's rounding
between batch sizes, about 1e-5 of the latents in float32, not bit for bit. Calls with taps, features, gradients or
learned weights are made one by one. A row's seconds are those that it waited for others, too.
"""

import copy
import queue
import threading
import warnings
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import Editor, Outcome
from .manifest import Row


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
    """Rows of one picture after another, in a thread that stops at each call of the model until it gets the answer."""

    def __init__(self, editor: Editor, left: Iterator[list[Row]]):
        self.said, self.told = queue.SimpleQueue[Any](), queue.SimpleQueue[Any]()
        editor = copy.copy(editor)
        self.sd: Any = copy.copy(editor.sd)  # which counts this thread's rows alone
        self.sd.eps, editor.sd = self.eps, self.sd
        threading.Thread(target=self.work, args=(editor, left), daemon=True).start()

    def work(self, editor: Editor, left: Iterator[list[Row]]) -> None:
        try:
            self.answer()
            for group in left:
                for outcome in editor(group):
                    self.said.put(outcome)
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
        heard = warnings.filters, warnings.showwarning  # of this row: the others set their own while it waits
        self.said.put(Call(x, t, [*texts], given))
        try:
            predictions: list[Tensor] = self.answer()
        finally:
            warnings.filters, warnings.showwarning = heard  # type: ignore[assignment]
        self.sd.evaluations += len(x) * len(texts)
        return predictions

    def until_it_asks(self, answer: Any) -> Generator[Outcome, None, Call | None]:
        """Outcomes as they come -> the call at which it stopped, None at the end. Raises what ended the thread."""
        heard = warnings.filters, warnings.showwarning
        self.told.put(answer)
        try:
            while (said := self.said.get()) is not None and not isinstance(said, Call):
                if isinstance(said, BaseException):
                    raise said
                yield said
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
            x, joined = torch.cat([call.x for call in some]), torch.cat(given) if given else None
            with torch.no_grad():
                made = sd.eps(x, some[0].t, [torch.cat(each) for each in texts], given=joined)
            found |= zip(turns, map(list, zip(*(one.split(sizes) for one in made))))
        except Exception as error:
            found |= dict.fromkeys(turns, error)
    return found


def at_once(editor: Editor, groups: list[list[Row]], count: int) -> Iterator[Outcome]:
    """Each row's outcome as it comes, `count` pictures at once; groups: the rows by picture. Raises as the editor."""
    editor.sd = editor.sd or editor.load()
    editor.results()  # read once for all
    left, joined = iter(groups), 0
    turns = [Turn(editor, left) for _ in range(min(count, len(groups)))]
    told: dict[Turn, Any] = dict.fromkeys(turns)
    try:
        while told:
            calls = dict[Turn, Call]()
            for turn, answer in told.items():
                if call := (yield from turn.until_it_asks(answer)):
                    calls[turn] = call
            told = answers(editor.sd, calls)
            joined += len(calls) - len({call.kind for call in calls.values()})
        if not joined and len(turns) > 1:
            said = "pictures of one size, steps and strength by methods that neither tap nor learn are edited at once"
            warnings.warn(f"no two calls of the model could be made as one: {said}", stacklevel=2)
    finally:
        for turn in turns:
            turn.told.put(KeyboardInterrupt())  # of those that still wait, if the run was ended
