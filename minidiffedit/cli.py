"""The command line: reads the arguments, runs the command, says its result or its error.

Results go to stdout, progress and warnings to stderr. Exit codes: 0 done, 1 failure, 2 usage, 130 Ctrl-C, 143 SIGTERM.
Options of a method come from its signature, so that only the command and the method that were asked for are imported.
The commands stand in `commands/`.
"""

import argparse
import contextlib
import difflib
import json
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

from . import __version__
from .commands import editing, learn, many, methods, models, pages
from .commands.common import Command, shown

# What torch, its libraries and the system say when memory ends; the third is oneDNN's, as terse as it stands.
NO_MEMORY = ("out of memory", "allocate memory", "could not create a primitive", "bad_alloc", "failed to map segment")
COMMANDS: dict[str, Command] = {
    name: command
    for group in (editing, learn, methods, pages, many, models)
    for name, command in group.COMMANDS.items()
}
GONE = {"sdedit": "edit --method sdedit"}  # commands of before, and what they are now


def main(argv: list[str] | None = None) -> int:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text
    noted: list[int] = []
    try:
        with remembered_interrupts(noted):
            try:
                return run(argv, noted)
            finally:
                sys.stdout.flush()
    except KeyboardInterrupt:
        ended = signal.SIGTERM in noted
        print("terminated" if ended else "interrupted", file=sys.stderr)
        return 128 + (signal.SIGTERM if ended else signal.SIGINT)
    except OSError as error:  # stdout's reader is gone or its disk full: let the interpreter not flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


def run(argv: list[str] | None, interrupted: list[int]) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in GONE:
        print(f"error: `{words[0]}` is `minidiffedit {GONE[words[0]]}` now", file=sys.stderr)
        return 2
    args, unknown = build_parser(words).parse_known_args(words)
    parser = vars(args).pop("parser")  # the command's own; the rest of the arguments must pickle
    if unknown:
        misuse(parser, args, unknown)
    args.interrupted = interrupted  # for commands that had to import much
    try:
        with spoken_warnings(args.quiet):
            result = args.run(args)
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    code = result.pop("exit", 0) if isinstance(result, dict) else 0  # of a command that can fail in part
    print(json.dumps(result) if args.json else args.say(result))
    return code


def build_parser(words: list[str]) -> argparse.ArgumentParser:
    """The parser for these words: every command by name, the options of the one that is among them."""
    parser = argparse.ArgumentParser(
        prog="minidiffedit", description="Text-driven image editing on Stable Diffusion v1: DiffEdit and its family."
    )
    parser.add_argument("--version", action="version", version=f"minidiffedit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        own = command.parser(commands, name)
        if words[:1] == [name]:
            try:
                command.add(own, words[1:])
            except ValueError as error:  # a method that there is not, say
                own.error(shown(str(error)))
    return parser


def misuse(parser: argparse.ArgumentParser, args: argparse.Namespace, unknown: list[str]) -> None:
    """Say which words nobody takes and what was meant perhaps; ends with code 2."""
    known = re.findall(r"--[\w-]+", parser.format_usage())
    close = difflib.get_close_matches(unknown[0].partition("=")[0], known, 1, 0.75)
    whose = f" of {args.method}" if getattr(args, "method", None) else ""
    suggestion = f" (did you mean {close[0]}?)" if close else ""
    parser.error(shown(f"unrecognized arguments{whose}: {' '.join(unknown)}") + suggestion)


def one_line(error: Exception) -> str:
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return "out of memory; try a smaller --size, --chunk 1 or --dtype bfloat16"
    text = shown(str(error)) or type(error).__name__
    expected = isinstance(error, ValueError | OSError | ArithmeticError)
    return text if expected else f"{type(error).__name__}: {text} (--debug shows where)"


@contextlib.contextmanager
def spoken_warnings(quiet: bool) -> Iterator[None]:
    """Each warning once, as a line on stderr, or not at all."""
    said: set[str] = set()

    def speak(message: Any, *_: Any, **__: Any) -> None:
        line = shown(str(message))
        if not quiet and line not in said:
            said.add(line)
            print(f"warning: {line}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = speak
        yield


@contextlib.contextmanager
def remembered_interrupts(noted: list[int]) -> Iterator[None]:
    """Ctrl-C raises as ever, and so does SIGTERM: nothing half-written stays. Both are noted too, as Python swallows an
    exception that falls into an import's callbacks.
    """

    def interrupt(number: int, frame: Any) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, interrupt)
    except ValueError:  # not the main thread, which alone receives signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
