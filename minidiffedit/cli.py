"""The command line: reads the arguments, runs the command, says its result or its error.

Results go to stdout, progress and warnings to stderr. Exit codes: 0 done, 1 failure, 2 usage, 130 Ctrl-C. Only
argparse is imported before a command runs, so that --help answers at once. The commands stand in `commands/`.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from . import __version__
from .commands import editing, models, redraw

GROUPS = (editing, redraw, models)


def main(argv: list[str] | None = None) -> int:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text
    try:
        try:
            return run(argv)
        finally:
            sys.stdout.flush()
    except OSError as error:  # stdout's reader is gone or its disk full: let the interpreter not flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


def run(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    try:
        with spoken_warnings(args.quiet), remembered_interrupt() as args.interrupted:
            result = args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    print(json.dumps(result) if args.json else args.say(result))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minidiffedit", description="DiffEdit: text-driven image editing with an automatic mask, on SD v1."
    )
    parser.add_argument("--version", action="version", version=f"minidiffedit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for group in GROUPS:
        group.add(commands)
    return parser


def one_line(error: Exception) -> str:
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "out of memory; try a smaller --size, --chunk 1 or --dtype bfloat16"
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)  # a hostile file's names must not steer the terminal
    expected = isinstance(error, ValueError | OSError | ArithmeticError)
    return text if expected else f"{type(error).__name__}: {text} (--debug shows where)"


@contextlib.contextmanager
def spoken_warnings(quiet: bool) -> Iterator[None]:
    """Each warning once, as a line on stderr, or not at all."""
    said: set[str] = set()

    def speak(message: Any, *_: Any, **__: Any) -> None:
        line = " ".join(str(message).split())
        if not quiet and line not in said:
            said.add(line)
            print(f"warning: {line}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = speak
        yield


@contextlib.contextmanager
def remembered_interrupt() -> Iterator[list[int]]:
    """Ctrl-C raises as ever and is noted in a list: Python swallows one that falls into an import's callbacks."""
    noted: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, interrupt)
    except ValueError:  # not the main thread, which alone receives signals
        yield noted
        return
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
