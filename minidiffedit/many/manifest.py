"""Reading a manifest: its rows, the files that they name, and what results may be called.

Nothing in a manifest is run. Its paths lead only into the folder of the pictures, and results only into their own.
"""

import contextlib
import csv
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..files.images import picture_format
from ..files.masks import Steering
from ..methods.table import SYSTEMS
from ..options import Option
from ..run import GIVEN, blank_plan, like

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
LONGEST_ROW = 1 << 20  # characters
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}

# What shapes a mask, and the columns that name files: what methods are given, and the masks laid over a mask.
SHAPING = {f.name: Option(f.name, f.default, type(f.default)) for f in fields(Steering) if f.default is not None}
LAID_OVER = [f.name for f in fields(Steering) if f.default is None]
FILES = [*(name for name, given in GIVEN.items() if given.kind in ("mask", "picture")), *LAID_OVER]


@dataclass(frozen=True)
class Row:
    """One edit as a manifest asks for it. options: `plan`'s arguments and the steering's by column, not yet checked; a
    file's name as text is a path in the folder of the pictures, a Path is the user's own. fault: why the row cannot be
    made, where that is known already.
    """

    number: int
    image: str
    options: dict[str, Any]
    output: str | None = None
    fault: str = ""


def columns() -> list[str]:
    """Every column that a row may have by some method of the table."""
    plans = [blank_plan(name) for name, system in SYSTEMS.items() if system.edit]
    given = [name for name in GIVEN if any(name in plan.given for plan in plans)]
    options = dict.fromkeys(name for plan in plans for name in plan.options)
    return ["image", "output", "method", "inversion", *given, *options, *SHAPING, *LAID_OVER]


def read_manifest(path: Path, defaults: dict[str, Any]) -> list[Row]:
    """A .jsonl or .csv file, a folder with manifest.jsonl or manifest.csv in it, or one of pictures alone -> its rows.

    `-` and `_` are alike in a column's name; an empty cell or null counts as not given. defaults: values by column for
    the rows that do not give their own; rows whose method lacks an option go without it. Raises ValueError for a file
    that cannot be read as a whole, naming the line, and for a default that no row's method has. One bad value fails
    its row alone.
    """
    found = [path / name for name in ("manifest.jsonl", "manifest.csv") if (path / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{path} holds manifest.jsonl and manifest.csv; name one of them")
    path = found[0] if found else path
    rows, taken = list[Row](), dict[str, int]()
    for number, cells in enumerate(cells_of(path), 1):
        row = read_row(number, cells, defaults, text=path.suffix.lower() == ".csv")
        name = unicodedata.normalize("NFC", str(row.output)).casefold()
        if row.output is not None and taken.setdefault(name, number) != number:
            row = replace(row, output=None, fault=f"output {row.output!r} is row {taken[name]}'s already")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no {'pictures' if path.is_dir() else 'rows'}")
    used = [row.options.keys() for row in rows if not row.fault]
    if used and (unused := defaults.keys() - set().union(*used)):
        raise ValueError(f"no row's method has an option {min(unused)!r}; leave it out")
    return rows


def cells_of(path: Path) -> Iterable[dict[str, Any]]:
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith("."))
        return ({"image": name} for name in names)
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file" if path.exists() else f"{path}: no such file or folder")
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: a manifest is a .jsonl file, a .csv file or a folder")
    return READERS[path.suffix.lower()](path, columns())


def read_row(number: int, cells: dict[str, Any], defaults: dict[str, Any], text: bool = False) -> Row:
    """text: all cells are words of a table, which are parsed as those of a command line."""
    given = {name: value for name, value in cells.items() if value is not None}
    image, output = given.pop("image", ""), given.pop("output", None)
    try:
        if not isinstance(image, str) or not image:
            image, wrong = "", image
            raise ValueError(f"image must be a path, got {wrong!r}")
        if output is not None:
            check_output(output)
        return Row(number, image, options_of_row(given, defaults, text), output)
    except ValueError as error:
        return Row(number, image, given, fault=str(error))


def options_of_row(given: dict[str, Any], defaults: dict[str, Any], text: bool) -> dict[str, Any]:
    """A row's own values and the defaults that its method can use. Raises ValueError for unknown methods and words."""
    if "method" in given:  # a default inversion belongs to the default method
        defaults = {name: value for name, value in defaults.items() if name != "inversion"}
    named = {name: (defaults | given).get(name) for name in ("method", "inversion")}
    if wrong := [name for name, value in named.items() if not isinstance(value, str | None)]:
        raise ValueError(f"{wrong[0]} must be a name, got {named[wrong[0]]!r}")
    blank = blank_plan(named["method"] or "diffedit", named["inversion"])
    words = blank.options | (SHAPING if blank.steerable else {})
    known = {*named, *blank.given, *words, *(LAID_OVER if blank.steerable else ())}
    options = {name: value for name, value in defaults.items() if name in known} | given
    for name in given.keys() & words.keys():
        value, option = given[name], words[name]
        if isinstance(value, str) and (text or (option.none and value.lower() == "none")):
            options[name] = option.parse(value)
    return options


# ---------------------------------------------------------------- the two kinds of file


def read_jsonl(path: Path, known: list[str]) -> Iterator[dict[str, Any]]:
    lines = lines_of(path)
    for number in itertools.count(1):
        try:
            if not (line := next(lines, "")):
                return
            if line.isspace():
                continue
            row = json.loads(line, object_pairs_hook=unique)
            if not isinstance(row, dict):
                raise ValueError("an object {...} is wanted")
            check_columns(row, known)
        except (ValueError, RecursionError) as error:  # the first also for what is no UTF-8
            raise ValueError(f"{path}, line {number}: {error}") from error
        yield {name.replace("-", "_"): value for name, value in row.items()}


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(names := {name for name, _ in pairs}) < len(pairs):
        raise ValueError(f"a name stands twice among {', '.join(sorted(names))}")
    return dict(pairs)


def read_csv(path: Path, known: list[str]) -> Iterator[dict[str, Any]]:
    reader = csv.reader(lines_of(path), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        check_columns(header, known)
        names = [name.replace("-", "_") for name in header]
        for cells in filter(None, reader):
            if len(cells) != len(names):
                raise ValueError(f"{len(names)} cells are wanted, got {len(cells)}")
            yield {name: cell for name, cell in zip(names, cells) if cell}
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {max(reader.line_num, 1)}: {error}") from error


READERS: dict[str, Callable[[Path, list[str]], Iterator[dict[str, Any]]]] = {".jsonl": read_jsonl, ".csv": read_csv}


def lines_of(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for line in iter(lambda: file.readline(LONGEST_ROW + 1), ""):
            if len(line) > LONGEST_ROW:
                raise ValueError(f"it is longer than {LONGEST_ROW:,} characters")
            yield line


def check_columns(names: Iterable[str], known: list[str]) -> None:
    plain = [name.replace("-", "_") for name in names]
    if unknown := [name for name, one in zip(names, plain) if one not in known]:
        raise ValueError(f"unknown column {unknown[0]!r}{like(unknown[0], known)}; accepted are {', '.join(known)}")
    if "image" not in plain or len({*plain}) < len(plain):
        raise ValueError(f"one column image and each other at most once are wanted, got {', '.join(plain) or 'none'}")


# ---------------------------------------------------------------- names and folders


def check_output(name: Any) -> None:
    """Raise ValueError for a name that could lead out of the folder, or means something else on some system."""
    if not isinstance(name, str) or not name.isprintable() or set(name) & set('/\\:*?"<>|') or name[:1] in ". ":
        raise ValueError(f"output must be a plain file name, got {name!r}")
    if name.split(".")[0].strip().lower() in RESERVED or name[-1] in ". " or len(name.encode()) > 200:
        raise ValueError(f"output {name!r} is reserved on some systems or too long; choose another name")
    picture_format(Path(name))
    if re.search(r"-[0-9a-f]{10}\.png$", name):
        raise ValueError(f"output {name!r} is a name as they are chosen for rows without one; choose another")


def within(root: Path, name: str, given: Any) -> Path:
    """A manifest's path, from the folder of the pictures. Raises ValueError for one that leads out of it."""
    if not isinstance(given, str) or not given or "\0" in given:
        raise ValueError(f"{name} must be a path, got {given!r}")
    base = os.path.abspath(root)
    path = os.path.normpath(os.path.join(base, given))
    if os.path.commonpath([base, path]) != base:
        raise ValueError(f"{name} {given!r} leads out of {root}; name the folder that holds all pictures with --root")
    return Path(path)


def files_of(row: Row, root: Path) -> dict[str, Path]:
    """The picture ("image") and the other files of a row. Raises ValueError as `within`."""
    given = {"image": row.image} | {name: row.options[name] for name in FILES if row.options.get(name) is not None}
    return {name: one if isinstance(one, Path) else within(root, name, one) for name, one in given.items()}


def grouped(rows: Iterable[Row], root: Path) -> list[list[Row]]:
    """Rows of one picture together, in the order in which the pictures first come."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(os.path.normpath(os.path.join(root, row.image)), []).append(row)
    return list(groups.values())


def check_folders(rows: Sequence[Row], root: Path, out: Path) -> None:
    """Make the folder of the results; raise ValueError if it holds one of the inputs, which are never overwritten."""
    if os.path.lexists(out) and not out.is_dir():  # a loop of links, too
        raise ValueError(f"{out} is a file; name a folder for the results")
    folders = dict[Path, Path]()
    for row in rows:
        with contextlib.suppress(ValueError):  # such a row fails by itself
            folders |= {path.parent: path for path in files_of(row, root).values()}
    for folder, file in folders.items():
        if os.path.realpath(folder) == os.path.realpath(out):
            raise ValueError(f"{out} is the folder of {str(file)!r}, an input; choose another one for the results")
    out.mkdir(parents=True, exist_ok=True)
