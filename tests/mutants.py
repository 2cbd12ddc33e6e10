"""A module of the package with one piece of its source replaced: what a mistake would make of it.

A piece is found by its tokens, so that another layout, other comments and other quotes change nothing. Where it stands
in the module more than once, a function is named, "diffedit:masked_decode". A piece that does not stand there exactly
once is an error: a mutation must not quietly stop to apply.
"""

import ast
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import minidiffedit

ROOT = Path(minidiffedit.__file__).parent
TOKEN = re.compile(r'#[^\n]*|"""[\s\S]*?"""|"(?:\\.|[^"\\\n])*"|' + r"'(?:\\.|[^'\\\n])*'|\w+|[^\w\s]")


def source(name: str) -> str:
    """Of a module, "ddim" or "methods.sdedit"."""
    return (ROOT / f"{name.replace('.', '/')}.py").read_text()


def load(name: str, text: str, monkeypatch) -> types.ModuleType:
    """The module from the given text, in its real place until the test ends."""
    full = f"minidiffedit.{name}"
    module = types.ModuleType(full)
    module.__spec__ = importlib.util.spec_from_loader(full, loader=None)
    module.__package__ = full.rpartition(".")[0]
    monkeypatch.setitem(sys.modules, full, module)
    exec(compile(text, f"{name} (mutant)", "exec"), module.__dict__)
    return module


def mutant(place: str, old: str, new: str, monkeypatch) -> types.ModuleType:
    """place: a module, or "module:function", "module:Class.method", whose piece `old` becomes `new`."""
    name, _, function = place.partition(":")
    text = source(name)
    start, end = lines_of(text, function) if function else (0, len(text))
    found = occurrences(tokens(text[start:end]), [token for token, _, _ in tokens(old)])
    assert len(found) == 1, f"the mutation no longer applies: {old!r} stands {len(found)} times in {place}"
    first, last = found[0]
    return load(name, text[: start + first] + new.strip() + text[start + last :], monkeypatch)


def lines_of(text: str, function: str) -> tuple[int, int]:
    """Where a function or class begins and ends in a module's text."""
    body: list[Any] = ast.parse(text).body
    for part in function.split("."):
        (node,) = (one for one in body if getattr(one, "name", "") == part)
        body = node.body
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts[node.lineno - 1], starts[node.end_lineno]


def tokens(text: str) -> list[tuple[str, int, int]]:
    """(token, start, end), without comments and without the comma that closes a list over several lines."""
    found = [(one.group(), one.start(), one.end()) for one in TOKEN.finditer(text) if not one.group().startswith("#")]
    closing = [index + 1 for index, (token, _, _) in enumerate(found[1:]) if token in ")]}"]
    dropped = {index - 1 for index in closing if found[index - 1][0] == ","}
    kept = [one for index, one in enumerate(found) if index not in dropped]
    return [(f'"{t[1:-1]}"' if t[0] == t[-1] == "'" else t, start, end) for t, start, end in kept]


def occurrences(of: list[tuple[str, int, int]], wanted: list[str]) -> list[tuple[int, int]]:
    words = [token for token, _, _ in of]
    at = [i for i in range(len(words) - len(wanted) + 1) if words[i : i + len(wanted)] == wanted]
    return [(of[i][1], of[i + len(wanted) - 1][2]) for i in at]


def run(test: Callable[..., None], **fixtures: Any) -> None:
    """A test itself, through all its parameters; fixtures: those that it may ask for."""
    cases: list[dict[str, Any]] = [{}]
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names = [name.strip() for name in mark.args[0].split(",")]
            values = [value if len(names) > 1 else (value,) for value in mark.args[1]]
            cases = [case | dict(zip(names, value)) for case in cases for value in values]
    asked = inspect.signature(test).parameters
    for case in cases:
        test(**{name: value for name, value in fixtures.items() if name in asked}, **case)
