"""Many edits: the rows of a manifest, made one after another, each equal to the single edit bit for bit.

Several pictures at once (`at_once`) are those edits up to the model's rounding, for more speed on a GPU.

Rows of one picture come together and share its latent, and what their methods compute alike: inversions, masks. A
finished row is known by its content: the bytes of its files, its settings, the model. So a run that was ended goes on
where it stopped, and a row that changed is made again.

Seeds follow from the picture and what is asked of it (texts, points, another picture) unless given: neither order, nor
shards, nor sweeps of settings change the noise. On one machine the same rows give the same bits in whatever order,
shards or interruptions, as long as the number of threads is the same: on a CPU torch's float32 sums depend on it in the
last digits, as they do on `chunk`. Threads, device and attention are no part of a row's content: who goes on elsewhere
keeps what was made.
"""

import contextlib
import copy
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.images import has_hole, picture_format, read_picture, write_picture, write_whole
from ..files.masks import Steering
from ..files.metadata import describe_result, identity, sha256
from ..files.results import is_ours
from ..files.states import fingerprint
from ..kernels.together import together
from ..plans import GIVEN, Plan, blank_plan, idle, plan
from ..result import Result
from ..run import execute
from .manifest import FILES, PARTS, SHAPING, Row, check_output, files_of

if TYPE_CHECKING:
    from ..sd import StableDiffusion

FORMAT = 2
MOST_ERRORS = 20  # in the summary; the table has all
ASKED = GIVEN.keys() - {"source", "target", "negative_prompt", "mask"}  # what a seed follows from, beside two texts

# "made", "already there" or "failed"; and what the table of results holds of the row.
Outcome = tuple[str, dict[str, Any]]


# ---------------------------------------------------------------- what a row comes to


@dataclass(frozen=True)
class Task:
    """A row that can be made. files: its picture ("image"), masks and other pictures; hashes: their sha256 in hex;
    plan: with the seed, files as paths; shaping: the steering's options; content: sha256 of all that decides the result
    but the model.
    """

    row: Row
    files: dict[str, Path]
    hashes: dict[str, str]
    plan: Plan
    shaping: dict[str, Any]
    content: str
    warnings: tuple[str, ...]

    @property
    def output(self) -> str:
        picture = self.files["image"]
        named = "-".join(picture.with_suffix("").parts[-2:] if "/" in self.row.image else [picture.stem])
        stem = re.sub(r"[^\w.-]+", "_", named)[:40].strip("._-")
        return self.row.own.get("output") or f"{stem or 'picture'}-{self.content[:10]}.png"


def in_order(tasks: list[Task]) -> list[Task]:
    """One picture's tasks so that each can share with those before: the one with the deepest path first, as the other
    paths are parts of it, then those with the same texts together, and of these the deeper ones first.
    """
    depths = [task.plan.settings.get("strength", 1.0) * task.plan.settings.get("steps", 0) for task in tasks]

    def place(i: int) -> tuple[Any, ...]:
        settled, first = tasks[i].plan, i == depths.index(max(depths))
        texts = json.dumps({name: settled.record.get(name) for name in settled.given})
        return str(settled.settings["size"]), not first, texts, -depths[i], tasks[i].row.number

    return [tasks[i] for i in sorted(range(len(tasks)), key=place)]


def settle(row: Row, root: Path) -> Task:
    """Check a row as far as no model is needed. Raises ValueError or OSError for what cannot be made."""
    if row.fault:
        raise ValueError(row.fault)
    options = row.options()
    if "output" in options:
        check_output(options["output"])
    files = files_of(options, root)
    with recorded() as said:
        if "mask" not in files and has_hole(files["image"], "mask" in blank_plan(options["method"]).given):
            files["mask"] = files["image"]
    for path in files.values():
        if not os.path.isfile(path):  # a pipe would wait for ever
            raise ValueError(f"{path}: no such file" if not os.path.exists(path) else f"{path} is not a regular file")
    shaping = Steering(**{name: options[name] for name in SHAPING if name in options}).settings()
    arguments: dict[str, Any] = {n: one for n, one in options.items() if n not in ("image", "output", *FILES, *SHAPING)}
    arguments |= {name: path for name, path in files.items() if name in GIVEN}
    with recorded() as more:
        settled = plan(**arguments)
    said += [*more, *idle(settled, row.defaults | row.own)]
    said += [f"{settled.method} takes no {name}: left out" for name in row.own if name not in {*options, *PARTS}]
    hashes = {name: sha256(path) for name, path in files.items()}
    if options.get("seed") is None:
        asked = {name: settled.given[name] for name in settled.given.keys() & ASKED if settled.given[name] is not None}
        asked |= {name: hashes[name] for name in hashes.keys() & ASKED}
        two = settled.given.get("source", ""), settled.given.get("target", "")
        seed = digest(hashes["image"], *two, *([asked] if asked else []))
        settled = replace(settled, settings=settled.settings | {"seed": int(seed[:8], 16)})
    return Task(row, files, hashes, settled, shaping, digest(FORMAT, hashes, settled.record, shaping), tuple(said))


def digest(*content: Any) -> str:
    """sha256 of plain values, in hex."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Warnings inside become lines of a list."""
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: said.append(" ".join(str(message).split()))
        yield said


# ---------------------------------------------------------------- making the rows


class Editor:
    """Makes the rows of one picture; one editor per process or worker.

    load: makes the model, e.g. functools.partial(StableDiffusion.load, "weights/mini"); called at the first row that
    needs it. root, out: the folders of the pictures and of the results. marked: write the settings into the pictures.
    overwrite: replace files of any origin, not only results of ours. `check`, once set, is asked of each row's plan
    before the model is loaded, and raises ValueError for one that does not fit it.
    An editor pickles without its model and its memory of the results: each worker loads its own.
    """

    check: Callable[[list[Plan]], None] | None = None

    def __init__(
        self, load: "Callable[[], StableDiffusion]", root: Path, out: Path, marked: bool = True, overwrite: bool = False
    ):
        self.load, self.root, self.out = load, Path(root).absolute(), Path(out).absolute()
        self.marked, self.overwrite = marked, overwrite
        self.sd: StableDiffusion | None = None
        self.known: dict[tuple[str, str], bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"sd": None, "known": None}

    def __call__(self, rows: Iterable[Row]) -> Iterator[Outcome]:
        """Each row's outcome as it comes, not in their order. What fails with a row is its outcome; what prevents every
        row, a model or a folder that cannot be used, raises.
        """
        tasks: list[Task] = []
        for row in rows:
            try:
                task = self.replaceable(settle(row, self.root))
                if self.check:
                    self.check([task.plan])
                tasks.append(task)
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
                    last = self.edit(sd, task, last)
            except Exception as error:
                last = None
                yield failed(task.row, error)
                continue
            record = self.write(last, task, key, [*task.warnings, *said])
            yield "made", record

    def prepared(self, task: Task) -> "tuple[StableDiffusion, str]":
        """The model, and the key of the task: its content and the model's, and whether the settings are left out."""
        if self.sd is None:
            self.sd = self.load()
        return self.sd, digest(task.content, fingerprint(self.sd), *([] if self.marked else ["no metadata"]))

    def replaceable(self, task: Task) -> Task:
        """The task. Raises ValueError where a file of another origin has its output's name: one that neither carries
        settings of ours nor stands in a table as it is.
        """
        path = self.out / task.output
        if self.overwrite or not path.exists() or is_ours(path):
            return task
        lines = [json.loads(line) for (_, name), line in self.results().items() if name == task.output]
        if path.is_file() and sha256(path) in [line.get("sha256") for line in lines]:
            return task
        raise ValueError(f"{path} is there, and no result of minidiffedit; --overwrite replaces it all the same")

    def results(self) -> dict[tuple[str, str], bytes]:
        self.known = known_results(self.out) if self.known is None else self.known
        return self.known

    def made_before(self, task: Task, key: str) -> dict[str, Any] | None:
        """The record of a result that stands in the folder as it was written, or None."""
        line, path = self.results().get((key, task.output)), self.out / task.output
        record = json.loads(line) if line else {}
        return record if path.is_file() and sha256(path) == record.get("sha256") else None

    def edit(self, sd: "StableDiffusion", task: Task, last: Result | None) -> Result:
        """last: the picture's result before this one, which hands on what that one and those before it computed."""
        opened = {name: read_picture(path) for name, path in task.files.items()}
        picture = opened.pop("image")
        picture_format(self.out / task.output, picture.size)  # before the work: not every format holds every size
        for name, path in task.files.items():
            if sha256(path) != task.hashes[name]:
                raise ValueError(f"{path} was written to during the run; run the batch again")
        given = {name: one for name, one in opened.items() if name in task.plan.given}
        settled = replace(task.plan, given=task.plan.given | given)
        laid_over: dict[str, Any] = {name: one for name, one in opened.items() if name not in given}
        steering = Steering(**task.shaping, **laid_over) if task.shaping or laid_over else None
        reuse = [last] if last and last.settings["size"] == settled.settings["size"] else []
        return execute(settled, sd, picture, steering=steering, reuse=reuse, bitwise=True)

    def write(self, done: Result, task: Task, key: str, said: list[str]) -> dict[str, Any]:
        """The picture, then its record: a picture without one is made again."""
        done.settings.update({name: told[:10] for name, told in task.hashes.items() if name in task.plan.given})
        path = self.out / task.output
        write_picture(done.image, path, describe_result(done) if self.marked else {})
        about = {"row": task.row.number, "image": task.row.image, "output": task.output, "status": "done", "key": key}
        about |= {"sha256": sha256(path), "method": done.method, "seed": done.seed, "verdict": done.verdict}
        about |= {"coverage": done.coverage, "evaluations": done.evaluations, "seconds": done.seconds}
        return about | {"settings": done.settings | identity(done.sd), "warnings": said}


def at_once(editor: Editor, groups: Sequence[list[Row]], count: int) -> Iterator[Outcome]:
    """Each row's outcome as it comes, `count` pictures at once (kernels/together.py); groups: the rows by picture."""
    sd = editor.sd = editor.sd or editor.load()
    editor.results()  # read once for all

    def work(group: list[Row], sd: "StableDiffusion") -> Iterator[Outcome]:
        own = copy.copy(editor)
        own.sd = sd
        return own(group)

    return together(sd, [partial(work, group) for group in groups], min(count, len(groups)))


def failed(row: Row, error: Exception) -> Outcome:
    text = " ".join(str(error).split())
    if not text or not isinstance(error, ValueError | OSError | ArithmeticError):
        text = f"{type(error).__name__}: {text}"
    output = one if isinstance(one := row.own.get("output"), str) else None
    return "failed", {"row": row.number, "image": row.image, "output": output, "status": "failed", "error": text}


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


def collect(outcomes: Iterable[Outcome], table: Path) -> dict[str, Any]:
    """Write each outcome into the table as it comes, at the end the run's alone in the manifest's order -> the summary.

    Interrupted, the table holds what was made so far; a run that goes on takes it from there.
    """
    write_whole(table, b"".join(line for _, line in sound_lines(table)))
    counts = {"made": 0, "already there": 0, "failed": 0}
    evaluations, errors = 0, list[dict[str, Any]]()
    with table.open("ab") as file:
        start = file.seek(0, os.SEEK_END)
        for status, record in outcomes:
            counts[status] += 1
            if status == "made":
                evaluations += sum(record["evaluations"].values())
            elif status == "failed" and len(errors) < MOST_ERRORS:
                errors.append({name: record[name] for name in ("row", "image", "error")})
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
    write_whole(table, b"".join(line for _, line in sorted(sound_lines(table, start), key=lambda one: one[0]["row"])))
    return {"table": str(table), "rows": sum(counts.values())} | counts | {"evaluations": evaluations, "errors": errors}
