"""What the measuring commands share: numbers that are checked, a line for an error, what a row was made with."""

import argparse
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from minidiffedit.cli import one_line
from minidiffedit.files.hub import find_model
from minidiffedit.files.metadata import sha256


def count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"a whole number from {least} is wanted, got {text!r}")
    return int(text)


def count_or_0(text: str) -> int:
    return count(text, 0)


def above_0(text: str) -> float:
    """Also inf."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise argparse.ArgumentTypeError(f"a number above 0 is wanted, got {text!r}")
    return value


def run_command(parser: argparse.ArgumentParser, work: Callable[[argparse.Namespace], Any]) -> None:
    """Parse and work; an error or Ctrl-C ends with a line, and with whatever computes for this process."""
    args = parser.parse_args()
    try:
        work(args)
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: cut; what keeps its rows goes on with the same command\n")
    except (ValueError, OSError, ArithmeticError) as error:
        parser.exit(1, f"error: {one_line(error)}\n")
    except BrokenProcessPool:
        parser.exit(1, "error: a worker was ended from outside, for its memory perhaps; the same command goes on\n")
    finally:
        end_workers()


def end_workers() -> None:
    for process in multiprocessing.active_children():
        process.kill()


def fingerprint(model: str | Path, judge: Path) -> str:
    """Of all weights that decide a row; a hub id's are fetched. Raises ValueError where there are none."""
    path = find_model(str(model))
    weights = [path] if path.is_file() else sorted(path.glob("*/*.safetensors"))
    if not weights:
        raise ValueError(f"{path}: {'no NETWORK/*.safetensors in it' if path.is_dir() else 'no such folder'}")
    judged = judge / "judge.safetensors"
    if not judged.is_file():
        raise ValueError(f"{judged}: no such file; `python -m weights.judge` trains the judge")
    return "-".join(sha256(one)[:6] for one in (*weights, judged))
