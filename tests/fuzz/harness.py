"""One case of bad input: run in a folder of its own, under a clock and a memory gauge, and judged by fixed rules.

The rules: exit code 0, 1 or 2; a failure says one line `error: ...` that is no traceback and no unforeseen exception,
and leaves every file as it was; a success leaves whole files, no NaN, and, where the case can tell, the right picture;
no `.part`, no raw control characters on the terminal, no endless line, no code run from a file.
"""

import contextlib
import faulthandler
import hashlib
import io
import json
import os
import random
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from PIL import Image

from minidiffedit import StableDiffusion, cli
from minidiffedit.commands import shown

from .forked import Child, Server

CPU_SECONDS = 15.0  # the tiny model's edit takes a fifth of one
COUNTED = 0.004  # seconds more for each row that a dry run counted: it takes every step of the method, on nothing
HANG = 400  # wall clock, after which the run ends with the stack
MEGABYTES = 300  # beyond what stood before the case; a case of large pictures states its own
LONGEST_LINE = 1000
QUICK = ("--target", "a cat", "--source", "a dog", "--steps", "2", "--maps", "1", "--seed", "3")
CANARY = "executed"  # what hostile files would write if something in them ran


def nothing(folder: Path) -> None:
    pass


@dataclass
class Case:
    """argv: of the command line, `MODEL` standing for the sound model's folder; or call: a function of the model.

    make: lays the bad thing into the case's folder, which holds a sound `in.png` and `mask.png`.
    expect: "refused", "done", "same" (done, and the picture is `reference`'s; or refused) or "any".
    words: what an error must match. check: called with the folder after a success; raises AssertionError.
    surroundings: called in a child process, which then runs the command (both are sent there: no closures); fresh:
    changes of the environment, for a process started from nothing. Results named `kept-...` may be left by a failure,
    and changed.
    """

    name: str
    argv: Sequence[str] = ()
    make: Callable[[Path], Any] = nothing
    expect: str = "any"
    words: str = ""
    check: Callable[[Path], Any] | None = None
    call: Callable[[StableDiffusion], Any] | None = None
    megabytes: int = MEGABYTES
    surroundings: Callable[[], Any] | None = None
    fresh: dict[str, Any] | None = None


@dataclass
class Verdict:
    outcome: str  # "refused" or "done"
    said: str
    faults: list[str]


class World:
    """The sound things that cases damage: a tiny model on disk, a picture, a mask; and the edit they give."""

    def __init__(self) -> None:
        torch.set_num_threads(1)  # on tensors this small they only wait for one another; children have the usual number
        self.root = Path(tempfile.mkdtemp(prefix="fuzz-"))
        self.model = tiny.write_folder(self.root / "model", unet=tiny.QUICK)
        self.work = self.root / "work"
        pixels = np.random.default_rng(0).integers(0, 256, (70, 91, 3), dtype=np.uint8)
        self.picture = Image.fromarray(pixels)
        self.picture.save(self.root / "in.png")
        half = np.zeros((70, 91), dtype=np.uint8)
        half[:, 40:] = 255
        Image.fromarray(half).save(self.root / "mask.png")
        self.sd = StableDiffusion.load(self.model, device="cpu")
        self.broken: Callable[[], Any] = os.getpid  # called in each child before the surroundings
        verdict = self.run(Case("reference", edit()))
        assert verdict.outcome == "done" and not verdict.faults, verdict
        self.reference = np.asarray(Image.open(self.work / "out.png"))

    @cached_property
    def server(self) -> Server:
        """What children are forked from; started when the first one is."""
        return Server(self.root, self.argv(edit("--save-state", "s.safetensors", "--save-mask", "m.png")))

    def argv(self, words: Sequence[str]) -> list[str]:
        return [str(self.model) if word == "MODEL" else word for word in words]

    def close(self) -> None:
        if "server" in self.__dict__:
            self.server.close()
        os.chdir(Path(__file__).parent)
        shutil.rmtree(self.root, ignore_errors=True)

    def copy_model(self, folder: Path, name: str = "bad") -> Path:
        """The sound model again, to be damaged: every file a link until `damage` replaces it."""
        for path in self.model.rglob("*"):
            if path.is_file():
                target = folder / name / path.relative_to(self.model)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, target)
        return folder / name

    def run(self, case: Case) -> Verdict:
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for name in ("in.png", "mask.png"):
            shutil.copy(self.root / name, self.work)
        os.chdir(self.work)
        case.make(self.work)
        before = snapshot(self.work)
        out, err = io.StringIO(), io.StringIO()
        start, resident = time.process_time(), reset_peak()
        faulthandler.dump_traceback_later(HANG, exit=True)
        try:
            if case.fresh is not None or case.surroundings:
                code, *said = self.apart(case)
                out.write(said[0])
                err.write(said[1])
            else:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), one_model(self.model, self.sd):
                    code = self.call(case) if case.call else self.command(case)
        finally:
            faulthandler.cancel_dump_traceback_later()
        seconds, megabytes = time.process_time() - start, (peak() - resident) / 1024
        faults = list(self.judge(case, code, out.getvalue(), err.getvalue(), before))
        counted = re.search(r"^UNet rows .*?(\d+)$", out.getvalue(), re.M)
        if seconds > CPU_SECONDS + COUNTED * int(counted[1] if counted else 0):
            faults.append(f"{seconds:.0f} s of computing")
        if megabytes > case.megabytes:
            faults.append(f"{megabytes:.0f} MB more than before, {case.megabytes} allowed")
        return Verdict("refused" if code else "done", err.getvalue(), faults)

    def apart(self, case: Case) -> tuple[int, str, str]:
        """In a process of its own."""
        from .environments import in_fresh_process

        argv = self.argv(case.argv)
        if case.fresh is not None:
            return in_fresh_process(argv, case.fresh, self.work)
        return Child(self.server, argv, partial(both, self.broken, case.surroundings)).wait()

    def command(self, case: Case) -> int | str:
        argv = self.argv(case.argv)
        try:
            return cli.main(argv)
        except SystemExit as leaving:
            return leaving.code  # type: ignore[return-value]
        except BaseException as error:  # to be judged
            return f"{type(error).__name__} escaped: {error}"

    def call(self, case: Case) -> int | str:
        """The library's side of the same rules: ValueError, OSError or ArithmeticError is a refusal."""
        assert case.call
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case.call(self.sd)
            return 0
        except (ValueError, OSError, ArithmeticError) as error:
            print("error:", shown(str(error)), file=__import__("sys").stderr)  # as the command line does
            return 1
        except BaseException as error:  # to be judged
            return f"{type(error).__name__} escaped: {error}"

    def judge(self, case: Case, code: int | str, out: str, err: str, before: dict[str, str]) -> Iterator[str]:
        """What is wrong with how it ended."""
        after = snapshot(self.work)
        if code not in (0, 1, 2):
            yield f"ended with {code}"
        if "Traceback" in err or "Traceback" in out:
            yield f"a traceback: {(out + err)[-600:]}"
        if "--debug shows where" in err:
            yield f"an unforeseen exception: {err.strip()[-300:]}"
        if any(c not in "\n" and not c.isprintable() for c in err):
            yield "control characters on stderr"
        said = err if "--json" in case.argv else f"{err}\n{out}"
        # argparse repeats what was typed, however long.
        if code != 2 and (longest := max(map(len, said.splitlines()), default=0)) > LONGEST_LINE:
            yield f"a line of {longest} characters"
        if CANARY in after or Path(self.root / CANARY).exists():
            yield "code from a file was run"
        if any(name.endswith(".part") for name in after):
            yield "a partial file was left"
        if changed := [name for name in before if after.get(name) != before[name] and not name.startswith("kept-")]:
            yield f"changed or gone: {changed}"
        if code:
            if new := {name for name in after.keys() - before.keys() if not name.startswith("kept-")}:
                yield f"a failure left {sorted(new)}"
            lines = err.splitlines()
            if code != 2 and sum(line.startswith("error: ") for line in lines) != 1:
                yield f"not one error line: {err[-300:]!r}"
            if "out of memory" in err:
                yield "memory ran out"
            if case.expect == "done":
                yield f"refused: {err.strip()[-300:]}"
            elif case.words and not re.search(case.words, err):
                yield f"the error lacks {case.words!r}: {err.strip()[-300:]}"
            if len(err.split()) < 4:
                yield f"an error that says nothing: {err!r}"
            return
        if case.expect == "refused":
            yield f"not refused; said {err.strip()[-200:]!r}"
        if "--json" in case.argv:
            yield from self.check_json(out)
        if case.expect == "same" and not np.array_equal(self.pixels(), self.reference):
            yield "another picture than the sound one's"
        if case.check:
            try:
                case.check(self.work)
            except AssertionError as error:
                yield f"the result is wrong: {error}"
        for name in sorted(after.keys() - before.keys()):
            if name.endswith((".png", ".jpg", ".webp")):
                try:
                    with Image.open(self.work / name) as file:
                        file.load()
                except Exception as error:
                    yield f"{name} is no whole picture: {error}"

    def pixels(self) -> np.ndarray:
        return np.asarray(Image.open(self.work / "out.png"))

    @staticmethod
    def check_json(out: str) -> Iterator[str]:
        def never(name: str) -> Any:
            raise ValueError(name)

        try:
            said = json.loads(out, parse_constant=never)
        except ValueError as error:
            yield f"no JSON, or NaN in it: {error}"
            return
        if said.get("coverage") is not None and not 0 <= said["coverage"] <= 1:
            yield f"a coverage of {said['coverage']}"


@contextlib.contextmanager
def one_model(folder: Path, sd: StableDiffusion) -> Iterator[None]:
    """The sound model is loaded once for all cases; others are loaded as ever."""
    real = StableDiffusion.load

    def load(model: Any, **options: Any) -> StableDiffusion:
        sound = str(model) == str(folder) and options.get("dtype", "auto") in ("auto", "float32")
        sound = sound and options.get("device") in ("auto", "cpu")
        sound = sound and not any(options.get(name) for name in ("variant", "vae", "lora", "embeddings"))
        return sd if sound else real(model, **options)

    StableDiffusion.load = load  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        StableDiffusion.load = real  # type: ignore[method-assign]


def both(first: Callable[[], object], then: Callable[[], object]) -> None:
    first()
    then()


def snapshot(folder: Path) -> dict[str, str]:
    """Relative name -> what stands there; files by their content (large ones, by their size and time)."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in files + folders:
            path = Path(parent) / name
            if path.is_symlink():
                what = f"-> {os.readlink(path)}"
            elif path.is_dir():
                what = "folder"
            elif not path.is_file():
                what = "special"
            elif path.stat().st_size > 2_000_000:
                what = f"{path.stat().st_size} {path.stat().st_mtime_ns}"
            else:
                what = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = what
    return found


def reset_peak() -> int:
    """Kilobytes resident now, which the peak starts from anew (Linux; elsewhere memory is not judged)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak()


def peak() -> int:
    with contextlib.suppress(OSError):
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
    return 0


def drawn(strategy: Any, n: int, number: int) -> list[Any]:
    """n examples of a hypothesis strategy, the same for the same number."""
    found: list[Any] = []

    @seed(number)
    @settings(
        max_examples=n, database=None, deadline=None, phases=[Phase.generate], derandomize=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found[:n]


def edit(*options: str, model: str = "MODEL", picture: str = "in.png") -> list[str]:
    """The reference's command, on another model or picture, with more options."""
    return ["edit", picture, *QUICK, "--model", model, "-o", "out.png", "--json", *options]


def damage(path: Path, change: Callable[[bytearray], Any]) -> None:
    """Change a file's bytes in a copy of its own: the sound one may be linked to."""
    content = bytearray(path.read_bytes())
    changed = change(content)
    path.unlink()
    path.write_bytes(content if changed is None else changed)


def flip(rng: random.Random, start: int, stop: int, bits: int = 1) -> Callable[[bytearray], None]:
    where = [(rng.randrange(start, stop), rng.randrange(8)) for _ in range(bits)]

    def change(content: bytearray) -> None:
        for at, bit in where:
            content[at % len(content)] ^= 1 << bit

    return change
