"""Two processes of torchrun on one host: together the files of one process, for a row of each family of methods."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from test_batch import FAMILIES

import minidiffedit

ROOT = Path(minidiffedit.__file__).parents[1]
# One thread each, in one process and in two: torch's float32 sums depend on their number, and torchrun sets it.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}


def manifest(folder: Path, pictures: int, channels: int, *extra: dict) -> int:
    """Rows of DiffEdit and of each family for weights of so many channels -> how many pictures are to come of them."""
    kinds = [{"source": "a horse", "target": target} for target in ("a zebra", "a cow") if channels == 4]
    kinds, rows = [*kinds, *(row | {"steps": 2} for row in FAMILIES[channels])], []
    Image.new("L", (72, 64), 255).save(folder / "m.png")
    for i in range(pictures):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 72, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows += [{"image": f"{i}.png"} | kind for kind in kinds]
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *extra]))
    return len(rows)


def model_of(channels: int, folder: Path, tmp_path: Path) -> Path:
    return folder if channels == 4 else tiny.write_folder(tmp_path / "weights", channels=channels, unet=tiny.QUICK)


def command(model: Path, out: str) -> list[str]:
    return ["minidiffedit", "batch", "m.jsonl", "-o", out, "--model", str(model), "--steps", "5", "--maps", "2"]


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".png"}


def lines(*tables: Path) -> list[dict]:
    """Of all tables in the rows' order, without what a clock says."""
    records = [json.loads(line) for table in tables for line in table.read_text().splitlines()]
    ordered = sorted(records, key=lambda record: record["row"])
    return [{name: value for name, value in record.items() if name != "seconds"} for record in ordered]


@pytest.mark.slow
@pytest.mark.parametrize("channels", [4, *(pytest.param(one, marks=pytest.mark.long) for one in (8, 9))])
def test_two_processes_are_one(channels, folder, tmp_path):
    """Also where a row fails: torchrun must not end the other process for it."""
    count = manifest(tmp_path, 3, channels, FAMILIES[channels][0] | {"image": "none.png"})
    folder = model_of(channels, folder, tmp_path)
    alone = subprocess.run([sys.executable, "-m", *command(folder, "one")], cwd=tmp_path, env=ENVIRONMENT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    both = subprocess.run(
        [*launch, *command(folder, "two")], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert alone.returncode == 1 and both.returncode == 0, both.stderr
    assert "exit code is 0" in both.stderr
    assert len(pictures(tmp_path / "one")) == count and pictures(tmp_path / "two") == pictures(tmp_path / "one")
    tables = [tmp_path / "two" / f"results-{i}-of-2.jsonl" for i in (1, 2)]
    assert all(len(lines(table)) for table in tables)
    assert lines(*tables) == lines(tmp_path / "one" / "results.jsonl")
