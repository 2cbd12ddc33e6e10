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

    `-` and `_` are alike in a column's name; an empty cell or null counts as not given, and text stands for a value as
    on a command line. defaults: values by column for the rows that do not give their own; rows whose method lacks an
    option go without it. Raises ValueError for a file that cannot be read as a whole, naming the line, and for a default
    that no row's method has. One bad value fails its row alone.
    """
    found = [path / name for name in ("manifest.jsonl", "manifest.csv") if (path / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{path} holds manifest.jsonl and manifest.csv; name one of them")
    path = found[0] if found else path
    rows, taken = list[Row](), dict[str, int]()
    for number, cells in enumerate(cells_of(path), 1):
        row = read_row(number, cells, defaults)
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


def read_row(number: int, cells: dict[str, Any], defaults: dict[str, Any]) -> Row:
    given = {name: value for name, value in cells.items() if value is not None}
    image, output = given.pop("image", ""), given.pop("output", None)
    try:
        if not isinstance(image, str) or not image:
            wrong, image = image, ""
            raise ValueError(f"image must be a path, got {wrong!r}")
        if output is not None:
            check_output(output)
        return Row(number, image, options_of_row(given, defaults), output)
    except ValueError as error:
        return Row(number, image, given, fault=str(error))


def options_of_row(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A row's own values and the defaults that its method has. Raises ValueError for unknown methods and words."""
    if "method" in given:  # a default inversion belongs to the default method
        defaults = {name: value for name, value in defaults.items() if name != "inversion"}
    named = {name: (defaults | given).get(name) for name in ("method", "inversion")}
    if wrong := [name for name, value in named.items() if not isinstance(value, str | None)]:
        raise ValueError(f"{wrong[0]} must be a name, got {named[wrong[0]]!r}")
    blank = blank_plan(named["method"] or "diffedit", named["inversion"])
    options = blank.options | (SHAPING if blank.steerable else {})
    known = {*named, *blank.given, *options, *(LAID_OVER if blank.steerable else ())}
    words = {name: given[name] for name in given.keys() & options.keys() if isinstance(given[name], str)}
    parsed = {name: options[name].parse(word) for name, word in words.items()}
    return {name: value for name, value in defaults.items() if name in known} | given | parsed


# ---------------------------------------------------------------- the files


class Lines:
    """The lines of a file in UTF-8, and the number of the last one that was read."""

    def __init__(self, path: Path):
        self.path, self.number = path, 0

    def __iter__(self) -> Iterator[str]:
        with self.path.open(encoding="utf-8-sig", newline="") as file:
            for self.number in itertools.count(1):
                if not (line := file.readline(LONGEST_ROW + 1)):
                    return
                if len(line) > LONGEST_ROW:
                    raise ValueError(f"it is longer than {LONGEST_ROW:,} characters")
                yield line


def jsonl(lines: Lines) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.isspace():
            row = json.loads(line, object_pairs_hook=unique)
            if not isinstance(row, dict):
                raise ValueError("an object {...} is wanted")
            yield row


def table(lines: Lines) -> Iterator[dict[str, Any]]:
    """CSV; the empty cells are None."""
    reader = csv.reader(lines, strict=True)
    header = [name.strip() for name in next(reader, [])]
    for cells in filter(None, reader):
        if len(cells) != len(header):
            raise ValueError(f"{len(header)} cells are wanted, got {len(cells)}")
        yield unique([(name, cell or None) for name, cell in zip(header, cells)])


READERS: dict[str, Callable[[Lines], Iterator[dict[str, Any]]]] = {".jsonl": jsonl, ".csv": table}


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(names := {name for name, _ in pairs}) < len(pairs):
        raise ValueError(f"a name stands twice among {', '.join(sorted(names))}")
    return dict(pairs)


def cells_of(path: Path) -> Iterator[dict[str, Any]]:
    """The cells of each row by column."""
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith("."))
        yield from ({"image": name} for name in names)
        return
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file" if path.exists() else f"{path}: no such file or folder")
    if (read := READERS.get(path.suffix.lower())) is None:
        raise ValueError(f"{path}: a manifest is a .jsonl file, a .csv file or a folder")
    lines, known = Lines(path), columns()
    try:
        for row in read(lines):
            plain = unique([(name.replace("-", "_"), value) for name, value in row.items()])
            if unknown := [name for name in plain if name not in known]:
                raise ValueError(
                    f"unknown column {unknown[0]!r}{like(unknown[0], known)}; there are {', '.join(known)}"
                )
            if "image" not in plain:
                raise ValueError(f"a column image is wanted, got {', '.join(plain) or 'none'}")
            yield plain
    except (ValueError, csv.Error, RecursionError) as error:  # ValueError also for what is no UTF-8
        raise ValueError(f"{path}, line {max(lines.number, 1)}: {error}") from error


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
