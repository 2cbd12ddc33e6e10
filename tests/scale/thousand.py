"""`make batch-1000`: a thousand rows on the miniature - memory per row, time against single edits, a killed run's end.

    python tests/scale/thousand.py --rows 1000 --size 64 --steps 5 --maps 2

Pictures are the miniature's scenes, each shifted by some pixels; every picture has four rows, each to another target.
Prints one JSON object; exit code 1 if outputs differ or memory grows.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from minidiffedit import StableDiffusion, edit
from minidiffedit.files.images import read_picture
from minidiffedit.many.batch import Editor, collect
from minidiffedit.many.manifest import grouped, read_manifest

MINI = Path(__file__).parents[2] / "weights" / "mini"
TARGETS = ("a zebra", "a cow", "a dog", "a bowl of fruit")
MOST_GROWTH = 8.0  # KiB per row: a row's line in the table and its hashes are remembered, nothing of a picture


def main() -> int:
    parser = argparse.ArgumentParser(description="A thousand rows on the miniature.")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--killed", type=int, default=160, help="rows of the run that is killed and goes on")
    parser.add_argument("--singles", type=int, default=24, help="rows compared with single edits")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--maps", type=int, default=2)
    args = parser.parse_args()
    options = {"size": args.size, "steps": args.steps, "maps": args.maps}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_manifest(folder, args.rows)
        editor = Editor(partial(StableDiffusion.load, MINI), folder, folder / "whole")
        memory, seconds, cpu = whole_run(editor, folder, options)
        single = single_edits(editor, folder, args.singles)
        killed = killed_run(folder, args.killed, options)
    slope = growth(memory[len(memory) // 5 :])
    found = {
        "rows": args.rows, **options, "seconds per row": seconds / args.rows, "cpu seconds per row": cpu / args.rows,
        **single, "row / single edit, cpu": cpu / args.rows / single["cpu seconds per single edit"],
        "resident MiB at rows": {row: round(kib / 1024, 1) for row, kib in memory[:: max(1, len(memory) // 10)]},
        "growth KiB per row, first fifth left out": round(slope, 2), **killed,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    return int(slope > MOST_GROWTH or not (single["singles equal"] and killed["killed run equal"]))


def write_manifest(folder: Path, rows: int) -> None:
    """m.jsonl and its pictures; the rows of one picture do not stand together."""
    scenes = json.loads((MINI / "scenes" / "scenes.json").read_text())
    lines = []
    for i in range((rows + 3) // 4):
        scene = scenes[i % len(scenes)]
        pixels = np.asarray(Image.open(MINI / "scenes" / scene["folder"] / "source.png").convert("RGB"))
        Image.fromarray(np.roll(pixels, i // len(scenes), axis=1)).save(folder / f"{i}.png")
        lines += [{"image": f"{i}.png", "source": scene["source"], "target": target} for target in TARGETS]
    random.Random(0).shuffle(lines)
    (folder / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:rows]))


def resident() -> int:
    """KiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def whole_run(editor: Editor, folder: Path, options: dict) -> tuple[list[tuple[int, int]], float, float]:
    """Every row, undisturbed -> (rows done, KiB) now and then, seconds and CPU seconds without the loading."""
    editor.out.mkdir()
    editor.sd = editor.load()
    groups, memory = grouped(read_manifest(folder / "m.jsonl", options), folder), []

    def watched():
        for number, result in enumerate(itertools.chain.from_iterable(map(editor, groups)), 1):
            if number % 10 == 0:
                memory.append((number, resident()))
            if number % 100 == 0:
                print(f"{number} rows, {resident() / 1024:.0f} MiB", file=sys.stderr, flush=True)
            yield result

    clock, cpu = time.perf_counter(), time.process_time()
    summary = collect(watched(), editor.out / "results.jsonl")
    assert summary["failed"] == 0, summary["errors"]
    return memory, time.perf_counter() - clock, time.process_time() - cpu


def single_edits(editor: Editor, folder: Path, count: int) -> dict:
    """Some rows by `edit` alone, their pixels against the batch's."""
    records = [json.loads(line) for line in (editor.out / "results.jsonl").read_text().splitlines()]
    equal, clock, cpu = True, time.perf_counter(), time.process_time()
    for record in random.Random(1).sample(records, min(count, len(records))):
        names = ("source", "target", "size", "steps", "maps", "seed")
        done = edit(editor.sd, folder / record["image"], **{name: record["settings"][name] for name in names})
        equal &= done.image.tobytes() == read_picture(editor.out / record["output"]).tobytes()
    spent = (time.perf_counter() - clock) / count, (time.process_time() - cpu) / count
    return {"singles equal": equal, "seconds per single edit": spent[0], "cpu seconds per single edit": spent[1]}


def killed_run(folder: Path, rows: int, options: dict) -> dict:
    """The first rows by the command, killed half-way and started again -> are the files those of the whole run?"""
    lines = (folder / "m.jsonl").read_text().splitlines(keepends=True)[:rows]
    (folder / "part.jsonl").write_text("".join(lines))
    command = [sys.executable, "-m", "minidiffedit", "batch", "part.jsonl", "-o", "part", "--json"]
    command += ["--model", str(MINI)]
    command += [str(a) for name, value in options.items() for a in (f"--{name}", value)]
    where = {"cwd": folder, "env": {**os.environ, "PYTHONPATH": str(MINI.parents[1])}}
    table, first = folder / "part" / "results.jsonl", subprocess.Popen(command, stdout=subprocess.DEVNULL, **where)
    while first.poll() is None and (not table.exists() or table.read_bytes().count(b"\n") < rows // 2):
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    rest = json.loads(subprocess.run(command, check=True, capture_output=True, **where).stdout)
    outputs = [json.loads(line)["output"] for line in table.read_text().splitlines()]
    same = all((folder / "part" / o).read_bytes() == (folder / "whole" / o).read_bytes() for o in outputs)
    kept = {"rows before the kill": rest["already there"], "rows after it": rest["made"]}
    return kept | {"killed run equal": same and len(outputs) == rows == rest["already there"] + rest["made"]}


def growth(memory: list[tuple[int, int]]) -> float:
    """KiB per row, the line of least squares."""
    return float(np.polyfit([row for row, _ in memory], [kib for _, kib in memory], 1)[0])


if __name__ == "__main__":
    sys.exit(main())
