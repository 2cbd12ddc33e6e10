"""Runs behind the page: one model in memory, one run at a time, in a thread that tells how far it is.

A run stops at its next model call when its visitor cancels it or leaves. What needs no model at all, a mask cut anew
from maps that are known, is made by `cut` beside it, while another visitor's run goes on.
"""

import ctypes
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image

from ..cost import Counter, costs
from ..files import images
from ..files.masks import Steering
from ..run import Plan, Result, Step, execute_mask, open_picture
from ..views.previews import LatentRGB, apply, fit

if TYPE_CHECKING:
    from ..sd import StableDiffusion

EVERY = 0.3  # seconds between two looks at a run
Work = Callable[[Any, Any], Any]  # what a run does with the model and a Watcher


class Choice(NamedTuple):
    """A model by the names of the command line: itself, another VAE for it ("": its own), LoRAs."""

    model: str
    vae: str = ""
    loras: tuple[str, ...] = ()


class Stopped(Exception):
    """The visitor cancelled the run, or left."""


class NeedsModel(Exception):
    """What was asked for cannot be had without a model call."""


class Seen(NamedTuple):
    """A look at a run: stage, model rows done and expected, seconds left (None: not known yet), the picture that it is
    heading for (None: nothing to see yet).
    """

    stage: str
    done: int
    total: int
    left: float | None
    picture: Image.Image | None


class Ended(NamedTuple):
    """What a run made, and the warnings that it gave."""

    made: Any
    warnings: list[str]


class Watcher:
    """Watches a run: counts, shows, and stops it. `expect` says how many rows come; `sees`, how latents are shown."""

    def __init__(self, stop: threading.Event, show: Callable[[Any], None]):
        self.stop, self.show = stop, show
        self.total, self.done, self.before, self.start, self.last = 0, 0, 0, time.monotonic(), 0.0
        self.rgb: LatentRGB | None = None

    def expect(self, plans: Sequence[Plan], known: Sequence[Result], *stages: str) -> None:
        """stages: which of them are run (default: all)."""
        alone = [one for one in known if one.evaluations.keys() == {"mask"}]  # whose path is not known
        whole = [one.plan for one in known if one not in alone]
        found = costs([*whole, *plans])[len(whole) :]
        for mask in alone:
            again = costs([mask.plan, *plans])[1:]
            found = [one | {n: min(one[n], two[n]) for n in one if n == "mask"} for one, two in zip(found, again)]
        self.total = sum(rows for one in found for stage, rows in one.items() if not stages or stage in stages)
        self.start = time.monotonic()

    @torch.no_grad()
    def sees(self, sd: "StableDiffusion", picture: Image.Image, size: int | None, known: Sequence[Result]) -> None:
        x0 = known[0].x0 if known else None
        pixels = images.to_tensor(picture, open_picture(sd, picture, size)[1])
        self.rgb = fit(sd.encode(pixels) if x0 is None else x0, picture)

    def __call__(self, step: Step) -> None:
        if self.stop.is_set():
            raise Stopped
        self.done += step.rows - self.before if step.rows >= self.before else step.rows  # a new run begins at nothing
        self.before, now = step.rows, time.monotonic()
        if now - self.last < EVERY:
            return
        self.last, picture = now, None
        if self.rgb and step.stage != "mask":  # whose latents are noise on the source
            picture = apply(self.rgb, step.clean)
            picture = picture.resize((8 * picture.width, 8 * picture.height), Image.Resampling.BICUBIC)
        total = max(self.total, self.done)
        left = (now - self.start) / self.done * (total - self.done) if self.done else None
        self.show(Seen(step.stage, self.done, total, left, picture))


class Studio:
    """The one model of all visitors. choice: which comes first; forget: lets go of all that holds a model."""

    def __init__(self, load: Callable[[Choice], "StableDiffusion"], choice: Choice):
        # glibc gives each thread a heap of its own: with Gradio's forty, memory grew by some 90 MB from 20 edits to
        # 200, with one heap for all by 32 (`make page-memory`).
        with suppress(AttributeError, TypeError):  # musl, macOS and Windows have no mallopt
            ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX
        self.load, self.choice, self.runs = load, choice, queue.SimpleQueue[Callable[[], None]]()
        self.sd: StableDiffusion | None = load(choice)
        self.forget: Callable[[], None] = lambda: None
        threading.Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        """Runs one after another, all in one thread: each thread has memory of its own, which it may keep."""
        while True:
            self.runs.get()()

    def model(self, choice: Choice) -> "StableDiffusion":
        """The chosen model; another one leaves the memory before it comes."""
        if (sd := self.held(choice)) is None:
            self.sd = None
            self.forget()
            sd, self.choice = self.load(choice), choice
            self.sd = sd
        return sd

    def held(self, choice: Choice) -> "StableDiffusion | None":
        """The chosen model if it is the one in memory."""
        return self.sd if choice == self.choice else None

    def run(self, stop: threading.Event, choice: Choice, work: Work) -> Iterator[Any]:
        """Do the work in its turn: looks at it, whatever else it shows, and at last `Ended`. Raises what it raises."""
        shown: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def done() -> None:
            said: list[str] = []
            try:
                with hearing(said):
                    if stop.is_set():
                        raise Stopped
                    shown.put(Ended(work(self.model(choice), Watcher(stop, shown.put)), said))
            except BaseException as error:
                shown.put(error)

        self.runs.put(done)
        try:
            while True:
                one = shown.get()
                if isinstance(one, BaseException):
                    raise one
                yield one
                if isinstance(one, Ended):
                    return
        finally:
            stop.set()  # whoever looks on is gone


@contextmanager
def hearing(said: list[str]) -> Iterator[None]:
    """Collects the warnings of this thread, each once; those of others stay theirs."""
    me = threading.get_ident()

    def hear(message: Any, *_: Any, **__: Any) -> None:
        if threading.get_ident() == me and str(message) not in said:
            said.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = hear
        yield


def asked(*_: Any, **__: Any) -> Any:
    raise NeedsModel


def cut(found: Result, settled: Plan, steering: Steering | None) -> Result:
    """The mask that a plan finds where `found` holds all that it takes; no model row is paid. Raises NeedsModel."""
    assert found.source
    place, (_, at) = settled.functions.get("mask"), open_picture(found.sd, found.source, settled.settings["size"])
    if not place or place != found.plan.functions.get("mask") or at != found.settings["working_size"]:
        raise NeedsModel
    idle: Any = Counter(found.sd.kind)  # in the model's place: what asks it for anything is stopped
    for name in ("name", "side", "factor", "channels", "device", "scale", "unet"):
        setattr(idle, name, getattr(found.sd, name))
    idle.eps = asked
    return execute_mask(settled, idle, found.source, steering=steering, reuse=[replace(found, sd=idle)])
