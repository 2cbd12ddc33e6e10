"""Many edits: the rows of a manifest, made one after another, each equal to the single edit bit for bit.

Rows of one picture come together and share its latent and its encoding. A row is told by its content: the bytes of its
files, its settings, the model. So a run that was ended goes on where it stopped, and a row that changed is made again.
Nothing in a manifest is run, and its paths lead only into the folder of the pictures and the folder of the results.

Seeds follow from the picture and its two texts unless given: neither order, nor shards, nor sweeps of other settings
change the noise. On one machine the same rows give the same bits whatever the order, the shards or the interruptions,
as long as the number of threads is the same: torch's float32 sums depend on it on a CPU (the last digits; the mask but
for cells on the threshold), and so they do on `chunk`. Threads, device and attention are no part of a row's content:
who goes on elsewhere keeps what was made.
"""

import contextlib
import csv
import hashlib
import inspect
import itertools
import json
import os
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ddim import level_at
from ..editor import OF_THE_ENCODING, OF_THE_MAPS, Edit, check_settings, edit
from ..files.images import picture_format, read_picture, write_picture, write_whole
from ..files.metadata import identity, metadata, sha256
from ..files.states import ARGUMENTS, SHAPING, fingerprint
from ..files.masks import Steering

if TYPE_CHECKING:
    from ..sd import StableDiffusion

FORMAT = 1
OF_THESE_MAPS = (*OF_THE_MAPS, "target", "chunk")
MASKS = ("mask", "union", "subtract")
COLUMNS = ("image", "output", *ARGUMENTS, *MASKS, *SHAPING)
WHOLE = ("steps", "maps", "refine", "seed", "size", "chunk", "dilate", "feather")
REAL = ("strength", "guidance_scale", "mask_strength", "mask_clip", "mask_threshold")
FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
SWITCHES = ("paste", "largest", "invert")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
DEFAULTS = {name: p.default for name, p in inspect.signature(edit).parameters.items() if name in ARGUMENTS}
MOST_ERRORS = 20  # in the summary; the table has all
LONGEST_ROW = 1 << 20  # characters
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}

# made, already there or failed; and what the table of results holds of the row
Result = tuple[str, dict[str, Any]]


# ---------------------------------------------------------------- reading a manifest


@dataclass(frozen=True)
class Row:
    """One edit as it is asked for: options by column name, not yet checked; a mask's Path is the user's own, text a
    path in the folder of the pictures. fault: why it cannot be made, if that is known already.
    """

    number: int
    image: str
    options: dict[str, Any]
    output: str | None = None
    fault: str = ""


def read_manifest(path: Path, defaults: dict[str, Any]) -> list[Row]:
    """A .jsonl or .csv file, a folder with manifest.jsonl or manifest.csv in it, or one of pictures alone -> its rows.

    Columns are `image`, `output` (a file name; chosen if left out), and any argument or mask of `edit` and its
    steering, `-` or `_` alike; an empty cell or null is as good as none. defaults: options for rows without their own.
    Raises ValueError for a file that cannot be read as a whole, naming the line; one bad value fails its row alone.
    """
    found = [path / name for name in ("manifest.jsonl", "manifest.csv") if (path / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{path} holds manifest.jsonl and manifest.csv; name one of them")
    if found:
        path = found[0]
    if path.is_dir():
        names = sorted(p.name for p in path.iterdir() if p.suffix.lower() in PICTURES and not p.name.startswith("."))
        cells: Iterable[dict[str, Any]] = ({"image": name} for name in names)
    elif not path.is_file():
        raise ValueError(f"{path} is not a regular file" if path.exists() else f"{path}: no such file or folder")
    elif path.suffix.lower() in READERS:
        cells = READERS[path.suffix.lower()](path)
    else:
        raise ValueError(f"{path}: a manifest is a .jsonl file, a .csv file or a folder")
    rows, taken = [], dict[str, int]()
    for number, given in enumerate(cells, 1):
        row = read_row(number, given, defaults)
        name = unicodedata.normalize("NFC", str(row.output)).casefold()
        if row.output is not None and taken.setdefault(name, number) != number:
            row = replace(row, fault=f"output {row.output!r} is row {taken[name]}'s already")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no {'pictures' if path.is_dir() else 'rows'}")
    return rows


def read_row(number: int, given: dict[str, Any], defaults: dict[str, Any]) -> Row:
    known = {name: value for name, value in given.items() if value is not None}
    image, output = known.pop("image", ""), known.pop("output", None)
    fault = ""
    if not isinstance(image, str) or not image:
        image, fault = "", f"image must be a path, got {image!r}"
    elif output is not None:
        try:
            check_output(output)
        except ValueError as error:
            output, fault = None, str(error)
    return Row(number, image, defaults | known, output, fault)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
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
            check_columns(row)
        except (ValueError, RecursionError) as error:  # the first also for what is no UTF-8
            raise ValueError(f"{path}, line {number}: {error}") from error
        yield {name.replace("-", "_"): value for name, value in row.items()}


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(names := {name for name, _ in pairs}) < len(pairs):
        raise ValueError(f"a name stands twice among {', '.join(sorted(names))}")
    return dict(pairs)


def read_csv(path: Path) -> Iterator[dict[str, Any]]:
    reader = csv.reader(lines_of(path), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        check_columns(header)
        names = [name.replace("-", "_") for name in header]
        for cells in filter(None, reader):
            if len(cells) != len(names):
                raise ValueError(f"{len(names)} cells are wanted, got {len(cells)}")
            yield {name: of_text(name, cell) for name, cell in zip(names, cells) if cell}
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}, line {max(reader.line_num, 1)}: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {".jsonl": read_jsonl, ".csv": read_csv}


def lines_of(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for line in iter(lambda: file.readline(LONGEST_ROW + 1), ""):
            if len(line) > LONGEST_ROW:
                raise ValueError(f"it is longer than {LONGEST_ROW:,} characters")
            yield line


def check_columns(names: Iterable[str]) -> None:
    plain = [name.replace("-", "_") for name in names]
    if unknown := [name for name, known in zip(names, plain) if known not in COLUMNS]:
        raise ValueError(f"unknown column {unknown[0]!r}; accepted are {', '.join(COLUMNS)}")
    if "image" not in plain or len({*plain}) < len(plain):
        raise ValueError(f"one column image and each other at most once are wanted, got {', '.join(plain) or 'none'}")


def of_text(name: str, text: str) -> Any:
    """A cell of a CSV file as what it stands for; what does not parse stays text, and its row will fail."""
    try:
        if name in WHOLE:
            return int(text)
        return float(text) if name in REAL else FLAGS.get(text.lower(), text) if name in SWITCHES else text
    except ValueError:
        return text


def check_output(name: Any) -> None:
    """Raise ValueError for a name that could lead out of the folder, or means something else on some system."""
    if not isinstance(name, str) or not name.isprintable() or set(name) & set('/\\:*?"<>|') or name[:1] in ". ":
        raise ValueError(f"output must be a plain file name, got {name!r}")
    if name.split(".")[0].strip().lower() in RESERVED or name[-1] in ". " or len(name.encode()) > 200:
        raise ValueError(f"output {name!r} is reserved on some systems or too long; choose another name")
    picture_format(Path(name))
    if re.search(r"-[0-9a-f]{10}\.png$", name):
        raise ValueError(f"output {name!r} is a name as they are chosen for rows without one; choose another")


# ---------------------------------------------------------------- what a row comes to


@dataclass(frozen=True)
class Task:
    """A row that can be made. files: its masks; hashes: of picture and masks, sha256 in hex; settings: `edit`'s
    arguments, seed included; shaping: the steering's; content: sha256 of all that decides the result but the model.
    """

    row: Row
    picture: Path
    files: dict[str, Path]
    hashes: dict[str, str]
    settings: dict[str, Any]
    shaping: dict[str, Any]
    content: str
    warnings: tuple[str, ...]

    @property
    def output(self) -> str:
        named = "-".join(self.picture.with_suffix("").parts[-2:] if "/" in self.row.image else [self.picture.stem])
        stem = re.sub(r"[^\w.-]+", "_", named)[:40].strip("._-")
        return self.row.output or f"{stem or 'picture'}-{self.content[:10]}.png"

    @property
    def level(self) -> int:
        return level_at(self.settings["strength"], self.settings["steps"])

    @property
    def encoding(self) -> tuple[str, ...]:
        """Tasks of one picture for which it is the same have one encoding, up to their levels."""
        s = self.settings
        text = s["source"] if s["encode_text"] == "source" else ""
        return (str(s["size"]), str(s["steps"]), str(s["refine"]), text)

    @property
    def maps(self) -> tuple[str, ...]:
        """Tasks of one picture for which it is the same have one set of maps."""
        return tuple(str(self.settings[name]) for name in OF_THESE_MAPS)


def in_order(tasks: list[Task]) -> list[Task]:
    """One picture's tasks so that each can share with the one before: of an encoding the longest comes first, with
    those of the same maps behind it.
    """
    longest = {task.encoding: task.maps for task in sorted(tasks, key=lambda task: task.level)}

    def place(task: Task) -> tuple[Any, ...]:
        return task.encoding, task.maps != longest[task.encoding], task.maps, -task.level, task.row.number

    return sorted(tasks, key=place)


def settle(row: Row, root: Path) -> Task:
    """Check a row as far as no model is needed. Raises ValueError or OSError for what cannot be made."""
    if row.fault:
        raise ValueError(row.fault)
    picture = within(root, "image", row.image)
    given = {name: row.options[name] for name in MASKS if row.options.get(name) is not None}
    files = {name: path if isinstance(path, Path) else within(root, name, path) for name, path in given.items()}
    for path in (picture, *files.values()):
        if not os.path.isfile(path):  # a pipe would wait for ever
            raise ValueError(f"{path}: no such file" if not os.path.exists(path) else f"{path} is not a regular file")
    if row.options.get("target") is None:
        raise ValueError("target is missing: what the result shall show")
    options = {name: row.options[name] for name in ARGUMENTS if name in row.options}
    for name in SWITCHES:
        if not isinstance(row.options.get(name, False), bool):
            raise ValueError(f"{name} must be true or false, got {row.options[name]!r}")
    if options.get("mask_clip") == "none":
        options["mask_clip"] = None
    if options.get("seed") is None:
        options["seed"] = seed_of(sha256(picture), options.get("source", ""), options["target"])
    with recorded() as said:
        settings = check_settings(DEFAULTS | options)
    shaping = {name: value for name in SHAPING if (value := row.options.get(name))}
    Steering(**shaping)
    hashes = {name: sha256(path) for name, path in {"image": picture, **files}.items()}
    content = json.dumps([FORMAT, hashes, settings, shaping], sort_keys=True)
    told = hashlib.sha256(content.encode()).hexdigest()
    return Task(row, picture, files, hashes, settings, shaping, told, tuple(said))


def within(root: Path, name: str, given: Any) -> Path:
    """A manifest's path, from the folder of the pictures. Raises ValueError for one that leads out of it."""
    if not isinstance(given, str) or not given or "\0" in given:
        raise ValueError(f"{name} must be a path, got {given!r}")
    base = os.path.abspath(root)
    path = os.path.normpath(os.path.join(base, given))
    if os.path.commonpath([base, path]) != base:
        raise ValueError(f"{name} {given!r} leads out of {root}; name the folder that holds all pictures with --root")
    return Path(path)


def seed_of(picture_hash: str, source: Any, target: Any) -> int:
    """32 bits from the picture's bytes and the two texts."""
    content = json.dumps([picture_hash, source, target]).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "big")


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Warnings inside become lines of a list."""
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: said.append(" ".join(str(message).split()))
        yield said


# ---------------------------------------------------------------- sharing the work


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
    files = ((name, row.options.get(name)) for row in rows for name in MASKS)
    folders: dict[str, Any] = {}
    for name, file in itertools.chain(files, (("image", row.image) for row in rows)):
        with contextlib.suppress(ValueError):  # such a row fails by itself
            folders[os.path.dirname(file if isinstance(file, Path) else within(root, name, file))] = file
    for folder, file in folders.items():
        if os.path.realpath(folder) == os.path.realpath(out):
            raise ValueError(f"{out} is the folder of {str(file)!r}, an input; choose another one for the results")
    out.mkdir(parents=True, exist_ok=True)


# ---------------------------------------------------------------- making the rows


class Editor:
    """Makes the rows of one picture; one editor per process or worker.

    load: makes the model, e.g. functools.partial(StableDiffusion.load, "weights/mini"); called at the first row that
    needs it. root, out: the folders of the pictures and of the results. marked: write the settings into the pictures.
    An editor pickles without its model and its memory of the results: each worker loads its own.
    """

    def __init__(self, load: "Callable[[], StableDiffusion]", root: Path, out: Path, marked: bool = True):
        self.load, self.root, self.out, self.marked = load, Path(root).absolute(), Path(out).absolute(), marked
        self.sd: StableDiffusion | None = None
        self.known: dict[tuple[str, str], bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"sd": None, "known": None}

    def __call__(self, rows: Iterable[Row]) -> Iterator[Result]:
        """Each row's result as it comes, not in their order. What fails with a row is its result; what prevents every
        row, a model or a folder that cannot be used, raises.
        """
        tasks: list[Task] = []
        for row in rows:
            try:
                tasks.append(settle(row, self.root))
            except Exception as error:
                yield failed(row, error)
        last, record = None, None
        for task in in_order(tasks):
            sd, key = self.prepared(task)
            same = record is not None and (record["key"], record["output"]) == (key, task.output)  # as the row before
            if before := record if same else self.made_before(task, key):
                yield "already there", before | {"row": task.row.number, "image": task.row.image}
                continue
            try:
                with recorded() as said:
                    done = self.edit(sd, task, shared(last, task))
            except Exception as error:
                last = None
                yield failed(task.row, error)
                continue
            last = kept(done, last)
            record = self.write(done, task, key, [*task.warnings, *said])
            yield "made", record

    def prepared(self, task: Task) -> "tuple[StableDiffusion, str]":
        """The model, and the key of the task: its content and the model's, and whether the settings are left out."""
        if self.sd is None:
            self.sd = self.load()
        unmarked = [] if self.marked else ["no metadata"]
        content = json.dumps([task.content, fingerprint(self.sd), *unmarked], sort_keys=True)
        return self.sd, hashlib.sha256(content.encode()).hexdigest()

    def made_before(self, task: Task, key: str) -> dict[str, Any] | None:
        """The record of a result that stands in the folder as it was written, or None."""
        if self.known is None:
            self.known = known_results(self.out)
        line, path = self.known.get((key, task.output)), self.out / task.output
        record = json.loads(line) if line else {}
        return record if path.is_file() and sha256(path) == record.get("sha256") else None

    def edit(self, sd: "StableDiffusion", task: Task, reuse: Edit | None) -> Edit:
        picture = read_picture(task.picture)
        picture_format(self.out / task.output, picture.size)  # before the work: not every format holds every size
        masks: dict[str, Any] = {name: read_picture(path) for name, path in task.files.items()}
        mask = masks.pop("mask", None)
        steering = Steering(**task.shaping, **masks) if task.shaping or masks else None
        for name, path in {"image": task.picture, **task.files}.items():
            if sha256(path) != task.hashes[name]:
                raise ValueError(f"{path} was written to during the run; run the batch again")
        return edit(sd, picture, mask=mask, steering=steering, reuse=reuse, **task.settings)

    def write(self, done: Edit, task: Task, key: str, said: list[str]) -> dict[str, Any]:
        """The picture, then its record: a picture without one is made again."""
        settings = done.settings | identity(done.sd)
        if "mask" in task.hashes:
            settings["mask"] = task.hashes["mask"][:10]
        path = self.out / task.output
        write_picture(done.image, path, metadata(settings, settings["target"]) if self.marked else {})
        return {
            "row": task.row.number, "image": task.row.image, "output": task.output, "status": "done", "key": key,
            "sha256": sha256(path), "seed": done.seed, "verdict": done.verdict, "coverage": done.coverage,
            "evaluations": done.evaluations, "seconds": done.seconds, "settings": settings, "warnings": said,
        }  # fmt: skip


def failed(row: Row, error: Exception) -> Result:
    text = " ".join(str(error).split())
    if not text or not isinstance(error, ValueError | OSError | ArithmeticError):
        text = f"{type(error).__name__}: {text}"
    return "failed", {"row": row.number, "image": row.image, "output": row.output, "status": "failed", "error": text}


def shared(last: Edit | None, task: Task) -> Edit | None:
    """What a single edit would compute again bit for bit: latent and encoding, and the maps only where no argument
    of theirs differs. Half of them, under the source alone, would round otherwise than beside another target.
    """
    if last is None or last.settings["size"] != task.settings["size"]:
        return None
    same = all(last.settings[name] == task.settings[name] for name in OF_THESE_MAPS)
    return last if same else replace(last, found=None)


def kept(done: Edit, last: Edit | None) -> Edit:
    """The edit, with the longer encoding if the one before made it in the same way."""
    if last is None or len(last.trajectory) <= len(done.trajectory) or last.settings["size"] != done.settings["size"]:
        return done
    same = all(last.settings[name] == done.settings[name] for name in OF_THE_ENCODING)
    return replace(done, trajectory=last.trajectory) if same else done


# ---------------------------------------------------------------- the table of results


def table_name(index: int, count: int) -> str:
    return "results.jsonl" if count == 1 else f"results-{index}-of-{count}.jsonl"


def known_results(out: Path) -> dict[tuple[str, str], bytes]:
    """The lines of every table in a folder that tell of something made, by key and output."""
    lines = ((record, line) for table in sorted(out.glob("results*.jsonl")) for record, line in sound_lines(table))
    return {(str(r.get("key")), str(r.get("output"))): line for r, line in lines if r.get("status") == "done"}


def sound_lines(table: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Records and their lines; one that was cut short when the machine stopped is passed over."""
    if not table.is_file():
        return
    with table.open("rb") as file:
        file.seek(start)
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("row"), int):
                    yield record, line.rstrip() + b"\n"


def collect(results: Iterable[Result], table: Path) -> dict[str, Any]:
    """Write each result into the table as it comes, at the end the run's alone in the manifest's order -> the summary.

    Interrupted, the table holds what was made so far; a run that goes on takes it from there.
    """
    write_whole(table, b"".join(line for _, line in sound_lines(table)))
    counts = {"made": 0, "already there": 0, "failed": 0}
    evaluations, errors = 0, list[dict[str, Any]]()
    with table.open("ab") as file:
        start = file.seek(0, os.SEEK_END)
        for status, record in results:
            counts[status] += 1
            if status == "made":
                evaluations += sum(record["evaluations"].values())
            elif status == "failed" and len(errors) < MOST_ERRORS:
                errors.append({name: record[name] for name in ("row", "image", "error")})
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
    lines = sorted(sound_lines(table, start), key=lambda one: one[0]["row"])
    write_whole(table, b"".join(line for _, line in lines))
    return {"table": str(table), "rows": sum(counts.values())} | counts | {"evaluations": evaluations, "errors": errors}
