"""methods: every editing system, what it needs and costs, and whether it works."""

import argparse
import inspect
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from . import flag


def add_methods(parser: argparse.ArgumentParser, words: list[str]) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="one method: its paper, inputs and options")
    parser.add_argument("--markdown", action="store_true", help="the list as the table of methods/README.md")


def run_methods(args: argparse.Namespace) -> Any:
    from ..methods.table import SYSTEMS

    if args.name is None:
        args.say = say_markdown if args.markdown else args.say
        return [row_of(name) for name in SYSTEMS]
    return row_of(args.name) | details(args.name)


def row_of(name: str) -> dict[str, Any]:
    """One system as plain values; rows at the defaults, None where it does not run."""
    from ..cost import counted_rows
    from ..methods.table import SYSTEMS
    from ..plans import blank_plan, known_system

    system = known_system(name)
    needs = list(blank_plan(name).needs) if system.edit else []
    return {
        "name": name if name in SYSTEMS else blank_plan(name).method,
        "paper": system.paper,
        "class": system.letter,
        "status": system.status,
        "weights": system.weights,
        "needs": needs,
        "rows": counted_rows(name) if system.edit else None,
        "note": system.note,
    }


def details(name: str) -> dict[str, Any]:
    """What the signatures and docstrings say."""
    from ..plans import GIVEN, blank_plan, function_at, known_system

    if not known_system(name).edit:
        return {"about": "", "functions": {}, "given": {}, "options": {}}
    found = blank_plan(name)
    function = function_at(found.functions["latent"])
    module = inspect.getmodule(function)
    options = dict[str, Any]()
    for name, one in found.options.items():
        options[name] = {"default": found.settings[name], "about": one.about, "choices": [*one.choices] or None}
    return {
        "about": "\n\n".join(filter(None, (inspect.getdoc(module), inspect.getdoc(function)))),
        "functions": found.functions,
        "given": {one: GIVEN[one].about for one in found.given},
        "options": options,
    }


def say_methods(result: Any) -> str:
    if isinstance(result, dict):
        return say_one(result)
    width = max(len(row["name"]) for row in result)
    lines = [f"{'name':{width}}  {'paper':12} {'status':8} {'rows':>6}  weights     needs"]
    for row in result:
        row |= {"rows": "" if row["rows"] is None else row["rows"]}
        row |= {"needs": ", ".join(row["needs"]) or row["note"][:60], "name": f"{row['name']:{width}}"}
        lines.append("{name}  {paper:12} {status:8} {rows:>6}  {weights:10}  {needs}".format(**row))
    lines.append("rows: UNet rows at the defaults. `minidiffedit methods NAME` shows one; INVERSION+EDITOR combines.")
    return "\n".join(lines)


def say_markdown(result: list[dict[str, Any]]) -> str:
    lines = ["| method | paper | status | class | needs | rows | |", "|---|---|---|---|---|---|---|"]
    for row in result:
        number = row["paper"]
        paper = f"[{number}](https://arxiv.org/abs/{number})" if number[:4].isdecimal() else number
        rows = "" if row["rows"] is None else f"{row['rows']:,}"
        weights = [] if row["weights"] == "base" else [f"{row['weights']} weights"]
        needs, note = ", ".join(row["needs"]), "; ".join(filter(None, [*weights, row["note"]]))
        cells = f"`{row['name']}`", paper, row["status"], row["class"], needs, rows, note
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    return "\n".join(lines)


def say_one(row: dict[str, Any]) -> str:
    works, paper = row["rows"] is not None, ("arXiv " if row["paper"][:4].isdecimal() else "") + row["paper"]
    said = [paper, row["status"], *([f"{row['weights']} weights"] if works else [])]
    lines = [f"{row['name']}: {', '.join(said)}", row["note"], row["about"], ""]
    left = {name: "" if name in row["needs"] else " (may be left out)" for name in row["given"]}
    lines += [f"  {flag(name):20} {about}{left[name]}" for name, about in row["given"].items()]
    lines += [f"  {flag(name):20} {one['about']} ({one['default']})" for name, one in row["options"].items()]
    lines += [f"\n{row['rows']} UNet rows at the defaults"] if works else []
    return "\n".join(line for i, line in enumerate(lines) if line or i != 1)


def add_tour(parser: argparse.ArgumentParser, words: list[str]) -> None:
    parser.add_argument("-o", "--output", type=Path, default=Path("."), metavar="DIR", help="where it goes (here)")


def run_tour(args: argparse.Namespace) -> dict[str, Any]:
    from ..files.images import write_whole
    from ..files.results import free

    args.output.mkdir(parents=True, exist_ok=True)
    notebook = free(args.output / "tour.ipynb")
    text = files("minidiffedit").joinpath("data/tour.ipynb").read_text("utf-8")
    write_whole(notebook, re.sub(r"\[([^][]*)\]\(\.\./[^)]*\)", r"\1", text).encode())  # links into a clone: its words
    return {"output": str(notebook)}


def say_tour(result: dict[str, Any]) -> str:
    return f"{result['output']}: open it with `jupyter lab` (pip install jupyterlab), or in an editor for notebooks"
