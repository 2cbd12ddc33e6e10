"""Reading a manifest: its rows, the files that they name, and what results may be called.

Nothing in a manifest is run. Its paths lead only into the folder of the pictures, and results only into their own.
"""

import contextlib
import csv
import json
import os
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..files.images import picture_format
from ..files.masks import Steering
from ..methods.table import SYSTEMS
from ..options import Option
from ..plans import GIVEN, blank_plan, like, told_mask

PICTURES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
LONGEST_ROW = 1 << 20  # characters
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}

# What shapes a mask, and the columns that name files: what methods are given, and the masks laid over a mask.
SHAPING = {f.name: Option(f.name, f.default, type(f.default)) for f in fields(Steering) if f.default is not None}
LAID_OVER = [f.name for f in fields(Steering) if f.default is None]
PARTS = ("inversion", "mask_from")  # which the full name of a method has in it
FILES = [*(name for name, given in GIVEN.items() if given.kind in ("mask", "picture")), *LAID_OVER]


@dataclass(frozen=True)
class Row:
    """One edit as a manifest asks for it. own: its values by column, not yet checked; defaults: those of every row.
    fault: why it cannot be made, where that is known already.
    """

    number: int
    own: dict[str, Any]
    defaults: dict[str, Any]
    fault: str = ""

    @property
    def image(self) -> str:
        return image if isinstance(image := self.own.get("image"), str) else ""

    def options(self) -> dict[str, Any]:
        """Its own values and the defaults that its method takes; of its own texts, too, those that it takes.
        Raises ValueError for unknown methods and words.
        """
        method = self.own.get("method", self.defaults.get("method", "diffedit"))
        defaults = {} if "method" in self.own else self.defaults  # a default inversion belongs to the default method
        others = {name: (defaults | self.own).get(name) for name in PARTS}
        blank = blank_plan(method, **others)
        taken = {*blank.given, *blank.options, *((*SHAPING, *LAID_OVER) if blank.steerable else ())}
        found = {name: value for name, value in self.defaults.items() if name in taken}
        found |= told_mask(blank, others["mask_from"]) | self.own
        for name, option in (blank.options | SHAPING).items():
            if isinstance(word := self.own.get(name), str):
                found[name] = option.parse(word)
        unread = {name for name, given in GIVEN.items() if given.kind == "text" and name not in taken}
        found = {name: value for name, value in found.items() if value is not None or name in blank.options}
        return {n: value for n, value in found.items() if n not in {*PARTS, *unread}} | {"method": blank.method}


def columns() -> list[str]:
    """Every column that a row may have by some method of the table."""
    plans = [blank_plan(name) for name, system in SYSTEMS.items() if system.edit]
    given = [name for name in GIVEN if any(name in plan.given for plan in plans)]
    options = dict.fromkeys(name for plan in plans for name in plan.options)
    return ["image", "output", "method", *PARTS, *given, *options, *SHAPING, *LAID_OVER]


def read_manifest(path: Path, defaults: dict[str, Any], masks: Path | None = None) -> list[Row]:
    """A .jsonl or .csv file, a folder with manifest.jsonl or manifest.csv in it, or one of pictures alone -> its rows.

    `-` and `_` are alike in a column's name; an empty cell or null counts as not given; text stands for a value as on a
    command line. defaults: values by column for the rows that have none of their own, and whose method takes them; a
    file in them is a Path. masks: a folder of masks for one of pictures. Raises ValueError for a file that cannot be
    read as a whole, naming the row; a bad value fails its row alone, later.
    """
    found = [path / name for name in ("manifest.jsonl", "manifest.csv") if (path / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{path} holds manifest.jsonl and manifest.csv; name one of them")
    path = found[0] if found else path
    rows, taken = list[Row](), dict[str, int]()
    if masks and not path.is_dir():
        raise ValueError(f"--masks goes with a folder of pictures; {path.name} has a column mask")
    masked = "mask" in blank_plan(defaults.get("method") or "diffedit", defaults.get("inversion")).given
    read = pictures_of(path, masks, masked) if path.is_dir() else cells_of(path)
    for number, cells in enumerate(read, 1):
        own, fault = {name: value for name, value in cells.items() if value is not None}, ""
        if isinstance(output := own.get("output"), str):
            first = taken.setdefault(unicodedata.normalize("NFC", output).casefold(), number)
            fault = "" if first == number else f"output {output!r} is row {first}'s already"
        rows.append(Row(number, own, defaults, fault))
    if not rows:
        raise ValueError(f"{path} holds no {'pictures' if path.is_dir() else 'rows'}")
    return rows


def pictures_of(folder: Path, masks: Path | None, masked: bool) -> Iterator[dict[str, Any]]:
    """The pictures of a folder with their masks: NAME_mask beside NAME, or either name in the folder `masks`. One line
    says what is left out. masked: whether masks are taken.
    """
    if masks and not masks.is_dir():
        raise ValueError(f"{masks} is no folder; name the one that holds the masks")
    masks = None if masks and os.path.realpath(masks) == os.path.realpath(folder) else masks
    there = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    found = [path for path in there if path.suffix.lower() in PICTURES and path.is_file()]
    stems, own = {path.stem for path in found}, dict[str, Path]()
    for path in sorted(masks.iterdir()) if masks else found:
        stem = path.stem.removesuffix("_mask")
        if stem in stems and path.suffix.lower() in PICTURES and (masks or stem != path.stem):
            if stem in own:
                raise ValueError(f"{own[stem]} and {path.name} are both masks of the picture {stem}; leave one of them")
            own[stem] = path
    found = [path for path in found if masks or path not in own.values()]
    said = [f"{path.name}/" if path.is_dir() else path.name for path in there if path not in (*found, *own.values())]
    said += [path.name for path in own.values()] if not masked else []
    if said:
        shown = ", ".join(said[:5]) + (", ..." if said[5:] else "")
        warnings.warn(f"{folder}: {len(said)} left out as no picture to edit: {shown}", stacklevel=3)
    lacking = [path.name for path in found if path.stem not in own]
    if masks and masked and lacking:
        line = f"{len(lacking)} of {len(found)} pictures have no mask in {masks}: {lacking[0]}, ..."
        warnings.warn(line, stacklevel=3)
    for path in found:
        mask = own.get(path.stem) if masked else None
        yield {"image": path.name, "mask": mask and (Path(os.path.abspath(mask)) if masks else mask.name)}


def cells_of(path: Path) -> Iterator[dict[str, Any]]:
    """The cells of each row by column."""
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file" if path.exists() else f"{path}: no such file or folder")
    if (read := READERS.get(path.suffix.lower())) is None:
        raise ValueError(f"{path}: a manifest is a .jsonl file, a .csv file or a folder")
    done, known = 0, columns()
    try:
        for row in read(lines_of(path)):
            cells = unique([(name.replace("-", "_"), value) for name, value in row.items()])
            if unknown := [name for name in cells if name not in known]:
                meant = like(unknown[0], known)
                raise ValueError(f"unknown column {unknown[0]!r}{meant}; there are {', '.join(known)}")
            if "image" not in cells:
                raise ValueError(f"a column image is wanted, got {', '.join(cells) or 'none'}")
            yield cells
            done += 1
    except (ValueError, csv.Error, RecursionError) as error:  # ValueError also for what is no UTF-8
        raise ValueError(f"{path}, row {done + 1}: {error}") from error


def lines_of(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        while line := file.readline(LONGEST_ROW + 1):
            if len(line) > LONGEST_ROW:
                raise ValueError(f"it is longer than {LONGEST_ROW:,} characters")
            yield line


def jsonl(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.isspace():
            if not isinstance(row := json.loads(line, object_pairs_hook=unique), dict):
                raise ValueError("an object {...} is wanted")
            yield row


def comma_separated(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    reader = csv.reader(lines, strict=True)
    header = [name.strip() for name in next(reader, [])]
    for cells in filter(None, reader):
        if len(cells) != len(header):
            raise ValueError(f"{len(header)} cells are wanted, got {len(cells)}")
        yield unique([(name, cell or None) for name, cell in zip(header, cells)])


READERS = {".jsonl": jsonl, ".csv": comma_separated}


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(names := {name for name, _ in pairs}) < len(pairs):
        raise ValueError(f"a name stands twice among {', '.join(sorted(names))}")
    return dict(pairs)


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


def files_of(options: dict[str, Any], root: Path) -> dict[str, Path]:
    """A row's picture ("image") and other files. Raises ValueError as `within`."""
    given = {name: options.get(name) for name in ("image", *FILES) if name == "image" or options.get(name) is not None}
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
            folders |= {path.parent: path for path in files_of(row.defaults | row.own, root).values()}
    for folder, file in folders.items():
        if os.path.realpath(folder) == os.path.realpath(out):
            raise ValueError(f"{out} is the folder of {str(file)!r}, an input; choose another one for the results")
    out.mkdir(parents=True, exist_ok=True)
