"""Manifests of a batch: damaged files, odd cells, paths that lead out, tables of results that were cut."""

import contextlib
import csv
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from minidiffedit import cli
from minidiffedit.commands import shown
from minidiffedit.many.manifest import columns

from .harness import Case, World, drawn

SOUND = {"image": "in.png", "source": "a dog", "target": "a cat", "steps": 2, "maps": 1, "seed": 3, "output": "out.png"}
FIRST = json.dumps(SOUND).encode() + b"\n"
OUT = "kept-out"  # a batch leaves what it made, also where another row failed
ODD: tuple[Any, ...] = (
    "", " ", 0, -1, 1.5, 10**30, 1e999, float("nan"), True, [], [1], {}, {"a": 1}, "nan", "1e999", "x" * 5000, "\ud800", "\0",
    "\x1b[31m", "../in.png", "/etc/passwd",
)  # fmt: skip


def cases(world: World, rng: random.Random, scale: float) -> Iterator[Case]:
    def n(count: int) -> int:
        return max(2, round(count * scale))

    def of(name: str, content: bytes, expect: str = "refused", file: str = "m.jsonl", **more: Any) -> Case:
        make = more.pop("make", None)

        def put(folder: Path) -> None:
            (folder / file).write_bytes(content)
            if make:
                make(folder)

        return Case(name, make=put, call=batch(world, file, **more), expect=expect)

    def second(name: str, row: dict[str, Any], expect: str = "refused", make: Any = None) -> Case:
        """A row behind the sound one, which is made whatever this is."""
        return of(name, FIRST + json.dumps(row).encode() + b"\n", expect, sound_first=True, make=make)

    yield of("as it should be", FIRST, "done", sound_first=True)
    yield from files(of)
    yield from rows(second)
    for name in columns():
        for value in ODD:
            yield second(f"{name}={value!a:.20}", SOUND | {"output": "b.png", name: value}, "any")
    anything: Any = st.dictionaries(
        st.sampled_from(columns()),
        st.none() | st.booleans() | st.integers(-9, 99) | st.floats() | st.text(max_size=9) | st.sampled_from(ODD),
    )
    for row in drawn(anything, n(150), rng.randrange(2**32)):
        yield second(f"cells drawn: {row!a:.40}", SOUND | {"output": "b.png"} | row | {"steps": 2}, "any")
    table = io.StringIO()
    csv.writer(table).writerows(
        [SOUND.keys(), SOUND.values(), {**SOUND, "output": "b.png", "target": 'a "cow", too'}.values()]
    )
    for file, content in (
        ("m.jsonl", FIRST + FIRST.replace(b"out.png", b"b.png")),
        ("m.csv", table.getvalue().encode()),
    ):
        yield of(f"{file} as it should be", content, "done", file)
        for stop in sorted({*range(0, len(content), max(1, round(8 / scale))), len(content) - 1}):
            yield of(f"{file} cut at {stop}", content[:stop], "any", file)
        for _ in range(n(100)):
            damaged = bytearray(content)
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            yield of(f"{file}, a bit flipped", bytes(damaged), "any", file)
    yield from tables(of)


def files(of: Callable[..., Case]) -> Iterator[Case]:
    """What is no manifest at all."""
    contents = {
        "empty": b"", "blank lines": b"\n \n\n", "a mark of byte order alone": b"\xef\xbb\xbf", "UTF-16": FIRST.decode().encode("utf-16"),
        "Latin-1": FIRST.replace(b"cat", b"\xe9t\xe9"), "bytes": bytes(range(256)) * 9, "a list": b"[1, 2]\n", "a number": b"7\n",
        "one object over two lines": FIRST.replace(b", ", b",\n"), "nested deep": b"[" * 100_000 + b"\n",
        "a name twice": b'{"image": "in.png", "image": "mask.png", "target": "a cat"}\n', "no image": b'{"target": "a cat"}\n',
        "a line of megabytes": b'{"image": "' + b"x" * 3_000_000 + b'"}\n', "an unknown column": b'{"image": "in.png", "eval": "1"}\n',
        "a column spelled twice": b'{"image": "in.png", "mask-clip": 2, "mask_clip": 3}\n', "HTML": b"<html>no</html>\n",
        "an empty object": b"{}\n",
    }  # fmt: skip
    for name, content in contents.items():
        yield of(f"{name}, .jsonl", content)
        yield of(f"{name}, .csv", content, file="m.csv")
    header = b"image,source,target,steps,maps,seed,output\n"
    cells = b"in.png,a dog,a cat,2,1,3,out.png\n"
    for name, content in {
        "a header alone": header, "a column twice": b"image,image,target\nin.png,in.png,a cat\n", "no image": b"target\na cat\n",
        "an empty header": b"\n" + cells, "a quote left open": header + b'"in.png,a dog', "too few cells": header + b"in.png,a dog\n",
        "too many cells": header + cells[:-1] + b",more\n", 
        "semicolons": (header + cells).replace(b",", b";"), "a cell of megabytes": header + b"x" * 3_000_000 + cells,
    }.items():  # fmt: skip
        yield of(f"CSV: {name}", content, file="m.csv")
    for name, content in {"ends of Windows": (header + cells).replace(b"\n", b"\r\n"), "with its mark": b"\xef\xbb\xbf" + header + cells,
                          "no last end": (header + cells)[:-1]}.items():  # fmt: skip
        yield of(f"CSV: {name}", content, "done", "m.csv", sound_first=True)
    yield of("another suffix", FIRST, file="m.txt")
    yield of("a pipe", FIRST, make=lambda folder: os.mkfifo(folder / "pipe.jsonl"), given="pipe.jsonl")
    yield of("a missing file", FIRST, given="none.jsonl")
    yield of("a loop of links", FIRST, make=lambda folder: (folder / "l.jsonl").symlink_to("l.jsonl"), given="l.jsonl")
    yield of("an empty folder", FIRST, make=lambda folder: (folder / "none").mkdir(), given="none")
    yield of("the results are a file", FIRST, out="in.png")
    yield of("the results among the inputs", FIRST, out=".")
    for shard in ("0/2", "3/2", "1/0", "a/b", "1", "-1/2", "1/2/3", "", "\u0661/\u0662", "9" * 50 + "/1"):
        yield of(
            f"--shard {shard:.9}",
            FIRST,
            more=["--shard", shard],
            expect="any" if shard.startswith("\u0661") else "refused",
        )
    for workers in ("0", "-1", "x", "1.5"):
        yield of(f"--ray {workers:.9}", FIRST, more=["--ray", workers])
    yield of("a root that is a file", FIRST, more=["--root", "in.png"])
    yield of("a root elsewhere", FIRST, more=["--root", "/etc"])


def rows(second: Callable[..., Case]) -> Iterator[Case]:
    """One row that cannot be made beside one that can."""
    other = SOUND | {"output": "b.png"}
    for path in ("none.png", "..", ".", "../in.png", "./../in.png", "a/../../in.png", "/etc/passwd", "in.png\0", "~/in.png",
                 "file:///etc/passwd", "https://example.org/in.png", "$HOME/in.png", "m.jsonl", "in.png/x", "x" * 5000, "\ud800.png"):  # fmt: skip
        yield second(f"image {path!a:.20}", other | {"image": path})
        yield second(f"mask {path!a:.20}", other | {"mask": path})
    for path in ("./in.png", "in.png/", "x/../in.png"):
        yield second(f"image {path}", other | {"image": path}, "done")
    for name in ("a/b.png", "../b.png", "/tmp/b.png", ".b.png", "..", "b", "b.gif", "b.png ", "b.png.", "con.png", "LPT1.png", "b\n.png",
                 "b:c.png", "b\\c.png", "b?.png", "x" * 300 + ".png", "in-0123456789.png", "\ud800.png", "OUT.png", "results.jsonl"):  # fmt: skip
        yield second(f"output {name!a:.20}", other | {"output": name})
    for name, content in {
        "cut": b"\x89PNG\r\n\x1a\n", "of no bytes": b"", "a page": b"<html>", "a pickle": b"\x80\x04.",
    }.items():  # fmt: skip
        yield second(f"a picture {name}", other | {"image": "b.png"}, make=written("b.png", content))
    yield second("a pipe for a picture", other | {"image": "p.png"}, make=lambda folder: os.mkfifo(folder / "p.png"))
    yield second("a mask of another size", other | {"mask": "m.png"},
                 make=lambda folder: Image.new("L", (5, 5)).save(folder / "m.png"))  # fmt: skip
    regions = {"method": "diffedit-regions", "steps": 2, "maps": 1, "image": "in.png", "output": "b.png"}
    for value in ODD:
        yield second(f"edits={value!a:.20}", regions | {"edits": value})
    yield second("edits as they should be", regions | {"edits": [["a dog", "a cat"]]}, "done")
    for name in ("x", "sdedit+ddim", "direct+sdedit", "+", "diffedit ", "DiffEdit", "../sdedit", "masactrl"):
        yield second(f"method {name}", SOUND | {"output": "b.png", "method": name})  # masactrl has no maps
    yield second("no target", {name: value for name, value in other.items() if name != "target"})
    yield second("the prompts are equal", other | {"target": "a dog"}, "any")


def tables(of: Callable[..., Case]) -> Iterator[Case]:
    """A table of results that stands there already and is no help: its rows are made again."""
    line = {"row": 1, "key": "x", "output": "out.png", "status": "done", "sha256": "y"}
    for name, content in {
        "empty": b"", "bytes": bytes(range(256)), "cut": json.dumps(line).encode()[:-9], "of another key": json.dumps(line).encode() + b"\n",
        "a list": b"[1]\n", "nested deep": b"[" * 100_000 + b"\n", "a path for output": json.dumps(line | {"output": "../in.png"}).encode() + b"\n",
        "odd types": json.dumps(line | {"key": [], "output": {}, "sha256": 5}).encode() + b"\n", "row no number": b'{"row": "1"}\n',
    }.items():  # fmt: skip
        yield of(f"table: {name}", FIRST, "done", sound_first=True, make=written(f"{OUT}/results.jsonl", content))
    yield of("table: a folder", FIRST, make=lambda folder: (folder / OUT / "results.jsonl").mkdir(parents=True))
    yield of(
        "a folder in the place of a result", FIRST, make=lambda folder: (folder / OUT / "out.png").mkdir(parents=True)
    )
    yield of("another picture in the place of a result", FIRST, "done", sound_first=True,
             make=written(f"{OUT}/out.png", b"not a picture"))  # fmt: skip


def written(name: str, content: bytes) -> Callable[[Path], None]:
    def put(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return put


def batch(
    world: World, file: str, given: str = "", out: str = OUT, sound_first: bool = False, more: list[str] | None = None
) -> Callable[[Any], None]:
    """The command -> a call for a Case: ValueError for what it refused, the manifest or a row; AssertionError for what
    must never be. sound_first: the first row is the reference's and is made whatever becomes of the others.
    """

    def call(sd: Any) -> None:
        defaults = [
            "--steps",
            "2",
            "--maps",
            "1",
            "--size",
            "64",
            "--quiet",
            "--overwrite",
            "--model",
            str(world.model),
        ]
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                code = cli.main(["batch", given or file, "-o", out, *defaults, *(more or [])])
            except SystemExit as leaving:  # argparse
                code = leaving.code
        assert code in (0, 1, 2) and "Traceback" not in said.getvalue(), (code, said.getvalue())
        errors = [line for line in said.getvalue().splitlines() if "error: " in line]
        if errors:
            table = Path(out, "results.jsonl")
            assert code and len(errors) == 1 and not (table.is_file() and table.stat().st_size), errors
            raise ValueError(errors[0].partition("error: ")[2])
        records = [json.loads(line) for line in Path(out, "results.jsonl").read_text().splitlines()]
        assert [record["row"] for record in records] == list(range(1, len(records) + 1)), records
        failed = [record["error"] for record in records if record["status"] == "failed"]
        assert code == bool(failed) and all(len(error.split()) > 2 for error in failed), (code, failed)
        if sound_first:
            assert records[0]["status"] == "done", records[0]
            assert np.array_equal(np.asarray(Image.open(Path(out, "out.png"))), world.reference), "another picture"
        made = {record["output"] for record in records if record["status"] == "done"}
        kinds = (".png", ".jpg", ".webp")
        there = {path.name for path in Path(out).iterdir() if path.suffix.lower() in kinds and path.is_file()}
        assert made == there, (made, there)
        for name in made:
            Image.open(Path(out, name)).load()
        if failed:
            raise ValueError(shown(failed[0]))

    return call
