"""`make test-scale`: a local Ray with two workers, one killed half-way. Needs the ray extra; not in `make test`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_batch import FAMILIES
from test_torchrun import ENVIRONMENT, command, lines, manifest, model_of, pictures


def workers(driver: int) -> list[int]:
    """The actors of a driver's own Ray, by /proc."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended
            pid = int(folder.name)
            parents[pid] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[pid] = (folder / "cmdline").read_bytes()
    below = {driver}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return [pid for pid in below if b"MapWorker" in names[pid]]


def run_killing_one(argv: list[str], folder: Path, out: Path, after: int) -> str:
    """Run to the end; when so many pictures are there, one worker is killed."""
    environment = {**ENVIRONMENT, "RAY_USAGE_STATS_ENABLED": "0", "HOME": str(folder)}
    environment.pop("RAY_ADDRESS", None)
    driver = subprocess.Popen(
        argv, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    killed = None
    while driver.poll() is None and killed is None:
        if out.is_dir() and len([*out.glob("*.png")]) >= after and (alive := workers(driver.pid)):
            killed = alive[0]
            os.kill(killed, signal.SIGKILL)
        time.sleep(0.05)
    said, errors = driver.communicate(timeout=500)
    assert killed is not None and driver.returncode == 0, errors
    return said


@pytest.mark.parametrize("channels", FAMILIES)
def test_a_worker_that_dies_changes_nothing(channels, folder, tmp_path):
    """Its picture's rows are made again by another; files and table are those of one process."""
    count, folder = manifest(tmp_path, 4 if channels == 4 else 16, channels), model_of(channels, folder, tmp_path)
    subprocess.run([sys.executable, "-m", *command(folder, "one")], cwd=tmp_path, env=ENVIRONMENT, check=True)
    argv = [sys.executable, "-m", *command(folder, "ray"), "--ray", "2", "--json"]
    said = json.loads(run_killing_one(argv, tmp_path, tmp_path / "ray", after=2))
    assert (said["rows"], said["failed"]) == (count, 0)
    assert len(pictures(tmp_path / "one")) == count and pictures(tmp_path / "ray") == pictures(tmp_path / "one")
    assert lines(tmp_path / "ray" / "results.jsonl") == lines(tmp_path / "one" / "results.jsonl")
    assert not [*(tmp_path / "ray").glob(".*")], "a part of a file was left"
