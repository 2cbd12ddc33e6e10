"""Surroundings that fail: permissions, full disks, no network, no HOME, closed streams, few descriptors."""

import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from .harness import QUICK, Case, World, edit

NOBODY = 65534
ROOT = Path(__file__).parents[2]


def cases(world: World, rng: random.Random, scale: float) -> Iterator[Case]:
    def around(
        name: str, surroundings: Callable[[], object], expect: str = "refused", words: str = "", argv: list[str] | None = None,
        make: Callable[[Path], None] = lambda folder: None,
    ) -> Case:  # fmt: skip
        return Case(name, argv or edit(), make, expect, words, surroundings=surroundings)

    world.root.chmod(0o755)

    def someone(mode: int, *names: str) -> Callable[[], None]:
        return partial(close_to_us, mode, names)

    yield around("a folder without write permission", someone(0o555), words="cannot be written: Permission denied")
    yield around("a picture without read permission", someone(0, "in.png"), words="in.png.*permission denied")
    yield around("a mask without read permission", someone(0, "mask.png"), words="mask.png.*permission denied",
                 argv=edit("--mask", "mask.png"))  # fmt: skip
    for file in ("unet/diffusion_pytorch_model.safetensors", "vae/config.json", "text_encoder", "."):
        yield around(f"a model whose {file} may not be read", someone(0, f"bad/{file}"), words="bad|denied",
                     argv=edit(model="bad"), make=lambda folder: copied(world, folder))  # fmt: skip
    yield around("a cache without write permission", someone(0o555, "cache"), words="a/b",
                 argv=edit("--cache-dir", "cache", model="a/b"), make=lambda f: (f / "cache").mkdir())  # fmt: skip
    yield around("a cache that is a file", os.getpid, words="a/b", argv=edit("--cache-dir", "in.png", model="a/b"))
    yield around("another's file in a sticky folder", sticky, words="denied|not permitted", make=lambda folder: (folder / "mine.png").write_bytes(b"old") and None,
                 argv=edit("-o", "mine.png", "--overwrite"))  # fmt: skip
    for limit in (0, 1, 512, 4096, 8192):
        yield around(f"room for {limit} bytes", limited(limit), words="cannot be written|too large|No space")
        state = edit("--save-state", "s.safetensors", "--save-mask", "m.png")
        yield around(f"room for {limit} bytes, three results", limited(limit), "refused", argv=state)
    for several in ("-o", "--save-mask"):
        # The first result is whole when the second fails; nothing of the second is left.
        yield around(f"a state too large beside {several}", limited(30_000), "refused", "too large|No space",
                     argv=["edit", "in.png", *QUICK, "--model", "MODEL", "-o", "kept-out.png", "--save-mask", "kept-m.png",
                           "--save-state", "s.safetensors"])  # fmt: skip
    yield around("a folder that is gone", gone, words="No such file|no such file|cannot")
    yield around("no stdout", partial(stream_closed, "stdout"), "done", argv=["edit", "in.png", *QUICK, "--model", "MODEL",
                 "-o", "out.png"])  # fmt: skip
    yield around("no stderr", partial(stream_closed, "stderr"), "done")
    yield around("no stdin", partial(os.close, 0), "done")
    yield around("a mask of permissions", partial(os.umask, 0o777), "done")
    yield around("no temporary folder", no_temporary_folder, "done")
    for spare in range(6):
        yield around(f"{spare} file descriptors left", partial(few_files, spare), "any")
    for name, change in ENVIRONMENTS.items():
        yield Case(name, edit(), expect="done", fresh=change)
        yield Case(f"{name}, a model that is nowhere", edit(model="a/b"), expect="refused", words="a/b",
                   fresh=change | OFFLINE)  # fmt: skip
    yield Case("no network", edit(model="a/b"), expect="refused", words="cannot be reached", fresh=NO_NETWORK)


OFFLINE = {"HF_HUB_OFFLINE": "1"}
NO_NETWORK = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "/nonexistent/hub"}
ENVIRONMENTS: dict[str, dict[str, str | None]] = {
    "no HOME": {"HOME": None, "HF_HOME": None},
    "a HOME that is not there": {"HOME": "/nonexistent", "HF_HOME": None},
    "an ASCII terminal": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
}


def in_fresh_process(argv: list[str], change: dict[str, str | None], folder: Path) -> tuple[int, str, str]:
    """As a shell starts it, with some of the environment changed (None: unset)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | change
    kept = {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, "-m", "minidiffedit", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=kept, cwd=folder, timeout=170)
    return done.returncode, done.stdout, done.stderr


def close_to_us(mode: int, names: Sequence[str]) -> None:
    """The case's folder, or files in it, closed; then no longer root, whom modes don't hold."""
    for name in names or ("."):
        os.chmod(name, mode)
    if names:
        os.chmod(".", 0o777)
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def copied(world: World, folder: Path) -> None:
    import shutil

    shutil.copytree(world.model, folder / "bad")


def sticky() -> None:
    os.chmod(".", 0o1777)
    if os.geteuid() == 0:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    else:
        os.chmod(".", 0o555)


def limited(size: int) -> Callable[[], object]:
    """No file may grow beyond `size` bytes: what a full disk does in the middle of a write. Streams are pipes."""
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))


def gone() -> None:
    os.mkdir("sub")
    os.chdir("sub")
    os.rmdir("../sub")


def no_temporary_folder() -> None:
    os.environ["TMPDIR"] = "/nonexistent"


def stream_closed(name: str) -> None:
    os.close(1 if name == "stdout" else 2)
    setattr(sys, name, None)


def few_files(spare: int) -> None:
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + spare, highest + spare))
