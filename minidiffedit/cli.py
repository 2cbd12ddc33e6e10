"""The command line: reads the arguments, runs the command, says its result or its error.

Results go to stdout, progress and warnings to stderr. Exit codes: 0 done, 1 failure, 2 usage, 130 Ctrl-C, 143 SIGTERM.
Options of a method come from its signature, and only the command and the method that were asked for are imported.
The commands stand in `commands/`.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from . import __version__
from .commands import COMMANDS, shown
from .commands.streams import streams
from .commands.typos import strange_command, strange_option, strange_words

# What torch, its libraries and the system say when memory ends; the third is oneDNN's, as terse as it stands.
NO_MEMORY = ("out of memory", "allocate memory", "could not create a primitive", "bad_alloc", "failed to map segment")


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
    args, unknown = build_parser(words).parse_known_args(words)
    parser = vars(args).pop("parser")  # the command's own; the rest of the arguments must pickle
    if unknown:
        parser.error(strange_words(unknown, COMMANDS))
    args.interrupted = interrupted  # for commands that had to import much
    say: Callable[[str], None] = print
    try:
        with spoken_warnings(args.quiet), streams(args) as say:
            result = args.run(args)
    except BrokenPipeError:  # of stdout, which took the picture
        raise
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    code = result.pop("exit", 0) if isinstance(result, dict) else 0  # of a command that can fail in part
    say(json.dumps(result) if args.json else args.say(result))
    return code


class Parser(argparse.ArgumentParser):
    """What is wrong is said in two lines, not below the usage of every option."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {shown(message)}\n`{self.prog} --help` shows what it takes\n")


def build_parser(words: list[str]) -> argparse.ArgumentParser:
    """The parser for these words: every command by name, the options of the one that is among them."""
    first = (COMMANDS[name].examples[0] for name in ("edit", "generate", "batch"))
    about = "Text-driven image editing on Stable Diffusion v1: DiffEdit and its family.\n"
    about = "\n  minidiffedit ".join([about, *first, "edit photo.png --target TEXT --model mini"])
    how = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="minidiffedit", usage="%(prog)s COMMAND ...", description=about, formatter_class=how)
    parser.add_argument("--version", action="version", version=f"minidiffedit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog="minidiffedit")
    for name, command in COMMANDS.items():
        own = command.parser(commands, name)
        if words[:1] == [name]:
            try:
                command.fill(own, name, words[1:])
                if said := strange_option(words[1:], own):
                    own.error(said)
            except ValueError as error:  # a method that there is not, say
                own.error(str(error))
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        parser.error(strange_command(words[0], COMMANDS))
    return parser


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
