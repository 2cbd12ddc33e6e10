"""Runs that are cut short, and what must stand on the disk afterwards: `make faults`; a short form stands in
tests/test_trust.py.

Every run is to replace results of an earlier one. Afterwards each is the old file or the whole new one, byte for byte;
nothing half-written stays beside them, save after SIGKILL, which no program can answer, one hidden `.part`; the exit
code is the signal's; the next run does its work.
"""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fuzz.forked import Child
from fuzz.harness import QUICK, World, snapshot
from safetensors import safe_open

from minidiffedit import StableDiffusion
from minidiffedit.files import images

RESULTS = ("out.png", "mask.out.png", "state.safetensors")
LATE = 10.0  # seconds from a signal to the end that are a fault; a quiet machine needs less than one
CODES = {signal.SIGINT: (130,), signal.SIGTERM: (143,), signal.SIGKILL: (-9,)}


class Faults:
    """One sound model, one picture, one command; its results by an undisturbed run."""

    def __init__(self, say: Callable[[str], None] = print):
        self.world, self.say = World(), say
        self.work = self.world.root / "faults"
        self.work.mkdir()
        os.chdir(self.work)
        self.world.picture.save("in.png")
        self.counts: dict[str, Counter[str]] = {}
        self.slowest = 0.0
        self.lay_old()
        for _ in range(2):  # the first one also starts the server
            start = time.monotonic()
            code, _, err = self.child().wait()
            assert code == 0, err
            self.seconds = time.monotonic() - start
        self.new = {name: Path(name).read_bytes() for name in RESULTS}

    def close(self) -> None:
        self.world.close()

    def lay_old(self) -> None:
        for path in self.work.iterdir():
            if path.name != "in.png":
                path.unlink()
        for name in RESULTS:
            Path(name).write_bytes(b"old")

    def child(self, surroundings: Callable[[], object] = os.getpid, *more: str, folder: str = ".") -> Child:
        out, mask, state = (f"{folder}/{name}" for name in RESULTS)
        argv = ["edit", "in.png", *QUICK, "--overwrite", "--model", str(self.world.model)]
        argv += ["-o", out, "--save-mask", mask, "--save-state", state]
        return Child(self.world.server, [*argv, *more], surroundings)

    def judge(self, section: str, name: str, code: int, err: str, codes: tuple[int, ...], folder: str = ".") -> None:
        """Files and exit code; 0 is right where the run had ended before it was disturbed."""
        faults = []
        there = snapshot(Path(folder))
        found = {one: (Path(folder) / one).read_bytes() for one in RESULTS if one in there}
        for one in RESULTS:
            if one not in found:
                faults.append(f"{one} is gone")
            elif found[one] != b"old" and not self.whole(one, Path(folder) / one):
                faults.append(f"{one} is neither the old file nor a whole new one")
        parts = [one for one in there if one.endswith(".part")]
        if len(parts) > (code == -9):
            faults.append(f"left {parts}")
        if extra := there.keys() - {*RESULTS, *parts, "in.png", "filler"}:
            faults.append(f"left {sorted(extra)}")
        if code not in (0, *codes):
            faults.append(f"exit code {code}, {codes} expected: {err[-200:]}")
        if code == 0 and any(content == b"old" for content in found.values()):
            faults.append("exit code 0 without all results")
        said = [line for line in err.splitlines() if not line.startswith("warning: ")]
        if code > 0 and (len(said) != 1 or "Traceback" in err):
            faults.append(f"not one line: {err[-300:]!r}")
        count = self.counts.setdefault(section, Counter())
        count["runs"] += 1
        count["cut short"] += code != 0
        count["old"] += sum(content == b"old" for content in found.values())
        count["new"] += sum(content != b"old" for content in found.values())
        count["parts after SIGKILL"] += len(parts)
        count["faults"] += bool(faults)
        for fault in faults:
            self.say(f"{section}: {name}: {fault}")

    def whole(self, name: str, path: Path) -> bool:
        if not name.startswith("state"):
            return path.read_bytes() == self.new[name]
        with suppress(Exception), safe_open(path, framework="pt") as file:  # it holds seconds, which differ
            return len(path.read_bytes()) > 0 and "minidiffedit" in file.metadata()
        return False

    # ---------------------------------------------------------------- what cuts a run short

    def moments(self, runs: int, rng: random.Random) -> None:
        """A signal at a random moment of the whole command."""
        for i in range(runs):
            number = rng.choice([*CODES])
            self.lay_old()
            child = self.child()
            time.sleep(rng.uniform(0, 1.2 * self.seconds))
            with suppress(ProcessLookupError):
                os.kill(child.pid, number)
            start = time.monotonic()
            code, _, err = child.wait()
            self.slowest = max(self.slowest, late := time.monotonic() - start)
            early = (-number,) if "Traceback" not in err else ()  # before the command had set its handlers
            self.judge("random moments", f"{signal.Signals(number).name} {i}", code, err, CODES[number] + early)
            if late > LATE:
                self.say(f"random moments: {late:.1f} s from the signal to the end")
                self.counts["random moments"]["faults"] += 1

    def lines(self, every: int = 1) -> None:
        """A signal at each line (or every n-th) of the functions that write, in turn."""
        for number, codes in CODES.items():
            at, reached = 0, True
            while reached:
                at += every
                self.lay_old()
                code, _, err = self.child(partial(at_line, at, number)).wait()
                self.judge("each line of a write", f"{signal.Signals(number).name} at line {at}", code, err, codes)
                reached = code in codes

    def interrupts(self, runs: int, rng: random.Random) -> None:
        """Ctrl-C while the network is busy: each of its calls takes a third of a second."""
        for i in range(runs):
            self.lay_old()
            child = self.child(slow_network)
            time.sleep(rng.uniform(0.3, 1.5))
            start = time.monotonic()
            os.kill(child.pid, signal.SIGINT)
            code, _, err = child.wait()
            self.slowest = max(self.slowest, late := time.monotonic() - start)
            self.judge("Ctrl-C in the network", str(i), code, err, (130,))
            if late > LATE:
                self.say(f"Ctrl-C in the network: {late:.1f} s to the end")
                self.counts["Ctrl-C in the network"]["faults"] += 1

    def memory(self, megabytes: list[int]) -> None:
        """So much address space is left when the command starts."""
        for room in megabytes:
            self.lay_old()
            code, _, err = self.child(partial(little_memory, room), "--size", "256").wait()
            self.new_or_old_size(code, f"{room} MB", err)

    def new_or_old_size(self, code: int, name: str, err: str) -> None:
        """Another size is another picture: whole is what can be read."""
        if code == 0:
            count = self.counts.setdefault("memory", Counter())
            count["runs"] += 1
            count["new"] += 3
            for one in RESULTS[:2]:
                images.read_picture(one)
            assert self.whole(RESULTS[2], Path(RESULTS[2])), f"{name}: a saved edit that is not whole"
        else:
            self.judge("memory", name, code, err, (1,))
            if "out of memory" not in err:
                self.say(f"memory: {name}: {err[-200:]!r}")
                self.counts["memory"]["faults"] += 1

    def disk(self, sizes: list[int]) -> None:
        """No file may grow beyond so many bytes; and, where one may be mounted, a disk with so many left."""
        for size in sizes:
            self.lay_old()
            code, _, err = self.child(partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))).wait()
            self.judge("files that may not grow", f"{size} bytes", code, err, (1,))
        disk = self.work / "disk"
        disk.mkdir()
        mounted = sys.platform == "linux" and os.geteuid() == 0
        mounted = mounted and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk]).returncode == 0
        try:
            for left in sizes if mounted else ():
                for path in disk.iterdir():
                    path.unlink()
                for name in RESULTS:
                    (disk / name).write_bytes(b"old")
                room = os.statvfs(disk)
                (disk / "filler").write_bytes(bytes(max(0, room.f_bavail * room.f_bsize - left)))
                self.lay_old_but(disk)
                code, _, err = self.child(folder="disk").wait()
                self.judge("a full disk", f"{left} bytes left", code, err, (1,), "disk")
        finally:
            if mounted:
                subprocess.run(["umount", disk], check=True)
            disk.rmdir()
        if not mounted:
            self.say("a full disk: not run here: mounting one takes root")

    def lay_old_but(self, kept: Path) -> None:
        for path in self.work.iterdir():
            if path not in (kept, self.work / "in.png"):
                path.unlink()

    def next_run(self) -> None:
        """After all that, over what SIGKILL left."""
        Path(".0123456789abcdef.part").write_bytes(b"half")
        code, _, err = self.child().wait()
        Path(".0123456789abcdef.part").unlink()
        self.judge("the next run", "", code, err, ())


# What a child is told to do before the command.


def slow_network() -> None:
    eps = StableDiffusion.eps

    def slow(*args: Any, **more: Any) -> Any:
        time.sleep(0.3)
        return eps(*args, **more)

    StableDiffusion.eps = slow  # type: ignore[method-assign]


def little_memory(megabytes: int) -> None:
    torch.ones(2**20).exp()  # OpenMP's threads: where it cannot start one it ends the process itself
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20,) * 2)


def at_line(count: int, number: int) -> None:
    """Send this process the signal when it has run so many lines of the functions that write."""
    functions, seen = {images.write_whole.__code__, images.write_picture.__code__}, 0

    def trace(frame: object, event: str, _: object) -> object:
        nonlocal seen
        if frame.f_code not in functions:  # type: ignore[attr-defined]
            return None
        if event == "line":
            seen += 1
            if seen == count:
                os.kill(os.getpid(), number)
        return trace

    sys.settrace(trace)  # type: ignore[arg-type]


def run_all(scale: float = 1.0, seed: int = 0, say: Callable[[str], None] = print) -> dict[str, Counter[str]]:
    rng = random.Random(seed)
    faults = Faults(say)
    try:
        faults.moments(round(150 * scale), rng)
        faults.lines(every=1 if scale >= 1 else 5)
        faults.interrupts(max(1, round(20 * scale)), rng)
        faults.memory([1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096][:: max(1, round(0.5 / scale))])
        faults.disk([0, 1, 100, 4096, 8192, 16_384, 32_768, 65_536, 131_072][:: max(1, round(0.5 / scale))])
        faults.next_run()
        say(f"slowest from a signal to the end: {faults.slowest:.2f} s; an undisturbed run: {faults.seconds:.2f} s")
    finally:
        faults.close()
    return faults.counts
