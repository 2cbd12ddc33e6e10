"""`-` for a file: what comes on stdin, and what goes to stdout. Commands see files in a folder that does not stay."""

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

DASH = Path("-")
INPUTS = ("picture", "image", "mask", "union", "subtract", "reference", "reference_mask", "state")


@contextlib.contextmanager
def streams(args: argparse.Namespace) -> Iterator[Callable[[str], None]]:
    """Put files in the place of every `-`; gives what says the result: stdout's own line, or stderr where stdout takes
    the file. Raises ValueError for two files from one stdin, and a file into a terminal.
    """
    names = [name for name in INPUTS if getattr(args, name, None) == DASH]
    out = getattr(args, "stdout", "") if getattr(args, "output", None) == DASH else None
    if out == "":
        raise ValueError("what this command writes is a folder: -o cannot be - (stdout)")
    if not names and not out:
        yield print
        return
    if len(names) > 1:
        raise ValueError(f"stdin holds one file, and {' and '.join(names)} are both -")
    if out and sys.stdout.isatty():
        raise ValueError("the result would go into the terminal; name a file, or send stdout to one")
    with tempfile.TemporaryDirectory(prefix="minidiffedit-") as folder:
        for name in names:
            path = Path(folder, "stdin.safetensors" if name == "state" else "stdin")
            with path.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            setattr(args, name, path)
        if not out:
            yield print
            return
        args.output, args.piped = Path(folder, f"stdout{out}"), True
        yield lambda line: None if args.quiet else print(line.replace(str(args.output), "-"), file=sys.stderr)
        if args.output.exists():  # a dry run writes none
            with args.output.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
