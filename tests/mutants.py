"""A module of the package with one piece of its source replaced: what a mistake would make of it."""

import importlib.util
import sys
import types
from pathlib import Path

import minidiffedit

ROOT = Path(minidiffedit.__file__).parent


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


def mutant(name: str, old: str, new: str, monkeypatch) -> types.ModuleType:
    count = source(name).count(old)
    assert count == 1, f"the mutation no longer applies: {old!r} stands {count} times in {name}"
    return load(name, source(name).replace(old, new), monkeypatch)
