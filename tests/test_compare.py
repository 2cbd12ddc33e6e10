"""Comparing methods: a task's rows are those of its edits alone, runs go on where they stopped, tables by hand.

Scenes are stand-ins on noise, the model is arithmetic, so that neither font nor time is needed.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from stubs import Model

from minidiffedit.many.metrics import psnr
from minidiffedit.methods.table import INVERSIONS, SYSTEMS
from minidiffedit.run import blank_plan, edit
from weights import bench as B
from weights import compare as C
from weights.scenes import Scene

SOURCE = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
MASK, CELLS = np.zeros((128, 128), bool), np.zeros((8, 8), bool)  # the model halves them
MASK[40:80, 30:90] = CELLS[2:5, 2:6] = True


class Undrawn(Scene):
    """Needs no font."""

    def picture(self):
        return SOURCE[::-1].copy()

    def alpha(self):
        return MASK.astype(np.float32) if self.things else np.zeros((128, 128), np.float32)


def stand_in(number, kind="swap"):
    """The world's own edits, a swap always of a horse for a zebra in the snow; on noise."""
    made = B.pair(number, kind)
    before, after = (Undrawn(one.place, one.look, one.things) for one in (made.before, made.after))
    if kind == "swap":
        before = before.move_to("the snow").swap("a horse")
        after = before.swap("a zebra")
    return SimpleNamespace(number=number, kind=kind, source=SOURCE, true_edit=SOURCE[:, ::-1], mask=MASK,
                           cells=CELLS, before=before, after=after)  # fmt: skip


class Blind:
    def says(self, picture):
        return {"a zebra"}, "the snow"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(C, "pair", stand_in)
    model = Model()
    monkeypatch.setattr(C, "networks", lambda *given: (model, Blind(), "ours"))
    monkeypatch.setattr(C, "fingerprint", lambda *given: "ours")
    monkeypatch.setattr(C, "ProcessPoolExecutor", lambda n, **_: ThreadPoolExecutor(1))


METHODS = ("ddim+replay", "ddim+diffedit", "ddim+masactrl", "ddim+pfb-diff", "ledits++")


def test_a_tasks_rows_are_those_of_its_edits_alone():
    rows, paid = C.work(C.Task(3, "swap", 7, METHODS), "model", "judge"), []
    for row, method in zip(rows, METHODS):
        one = stand_in(3)
        arguments = C.given(blank_plan(method), one)
        alone = edit(Model(), Image.fromarray(SOURCE), method, seed=7, paste=False, **arguments)
        assert row["rows"] == alone.rows and row["method"] == method and row["success"] is True
        assert row["background_psnr"] == pytest.approx(psnr(np.asarray(alone.image), SOURCE, ~MASK), abs=1e-6)
        assert row["psnr_true"] == pytest.approx(psnr(np.asarray(alone.image), one.true_edit), abs=1e-6)
        assert row["seconds"] > 0 and json.dumps(row)
        assert ("iou" in row) == (method == "ddim+diffedit")
        if "iou" in row:
            found = (alone.latent_mask[0, 0] > 0).numpy()
            assert row["iou"] == pytest.approx((found & CELLS).sum() / (found | CELLS).sum())
        paid.append((row["paid"], alone.rows))
    reused = [own < alone for own, alone in paid]
    assert reused == [False, False, True, True, False]  # DiffEdit encodes under no text, LEDITS++ otherwise


def test_what_a_method_is_told_of_each_kind_of_edit():
    told = {kind: C.given(blank_plan("ledits++"), stand_in(1, kind))["edits"][0] for kind in ("add", "remove", "place")}
    before, after = stand_in(1, "add").before, stand_in(1, "add").after
    assert told["add"] == ["", after.things[1].name] and before.things == after.things[:1]
    assert told["remove"] == [stand_in(1, "remove").before.things[0].name, ""]
    assert told["place"] == [stand_in(1, "place").before.place, stand_in(1, "place").after.place]
    given = {kind: C.given(blank_plan("tf-icon"), stand_in(1, kind)) for kind in ("add", "remove")}
    assert np.array_equal(np.asarray(given["add"]["reference_mask"]), 255 * MASK.astype(np.uint8))
    assert "reference_mask" not in given["remove"] and np.asarray(given["remove"]["mask"]).sum() == 255 * MASK.sum()


def test_colours_are_swaps_of_one_outline():
    for number in range(40):
        one = B.pair(number, "colour")
        (old,), (new,) = one.before.things, one.after.things
        assert {(old.name, new.name), (new.name, old.name)} & B.ALIKE.items() and one.before.place == one.after.place
        assert (old.x, old.y, old.size, old.angle, old.flip) == (new.x, new.y, new.size, new.angle, new.flip)
    assert len({B.pair(number, "colour").before.things[0].name for number in range(40)}) == 2 * len(B.ALIKE)


def test_steps_are_told_to_those_that_have_them():
    (row,) = C.work(C.Task(0, "swap", 0, ("dds",), 2), "model", "judge")
    assert row["rows"] == 800 and row["steps"] == 2


def test_what_a_method_refuses_is_a_row_and_the_others_go_on():
    bad, good = C.work(C.Task(0, "swap", 0, ("instruct-pix2pix", "sdedit")), "model", "judge")
    assert "instruct" in bad["error"] and "rows" not in bad and good["rows"] == 50


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path, monkeypatch):
    path, tasks = tmp_path / "rows.jsonl", [C.Task(n, "swap", 0, ("sdedit", "ddim+replay")) for n in (0, 1)]
    first = C.run(tasks[:1], path, "model", "judge")
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(first) == len(lines) == 2
    other = json.dumps(first[0] | {"model": "theirs", "rows": -1}).encode() + b"\n"
    path.write_bytes(other + lines[0] + lines[1][:9])  # another model's row, and one that a kill tore
    done, work = [], C.work
    monkeypatch.setattr(C, "work", lambda task, *given: done.append(task) or work(task, *given))
    rows = C.run(tasks, path, "model", "judge")
    assert [(task.number, task.methods) for task in done] == [(0, ("ddim+replay",)), (1, ("sdedit", "ddim+replay"))]
    assert [(row["number"], row["method"]) for row in rows] == [
        (key[0], key[-1]) for task in tasks for key in task.runs()
    ]
    assert all(row["rows"] > 0 for row in rows) and C.run(tasks, path, "model", "judge") == rows and len(done) == 2


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="os.kill(pid, 0) only asks on POSIX; on Windows it kills")
def test_a_worker_ends_with_the_process_that_reads_its_rows(tmp_path):
    """However that ends: a worker left behind would compute the rows that were already ordered, and wait for ever."""
    (tmp_path / "parent.py").write_text(
        "import multiprocessing, os, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from weights.compare import end_with_parent\n"
        "def work(): print(os.getpid(), flush=True); time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent).submit(work).result()\n"
    )
    with subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    ) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    ended = time.monotonic() + 20
    while time.monotonic() < ended and alive(worker):
        time.sleep(0.1)
    assert not alive(worker)


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")  # ended, nobody asked yet


def test_every_inversion_meets_every_editor_that_takes_one():
    tasks = C.matrix_tasks(2)
    names = [name for task in tasks for name in task.methods]
    assert len(names) == 2 * len(INVERSIONS) * len(C.editors()) == 2 * len({*names})
    walking = {system.edit for system in SYSTEMS.values() if system.inversion and system.weights == "base"}
    reached = {SYSTEMS[name].edit for name in C.editors()}
    assert walking - reached == {"diffedit:reconstruct", "dragon_diffusion:dragon_diffusion"}  # which make no swap
    assert "prompt-to-prompt" in C.editors()
    for name in names:
        assert not blank_plan(name).needs or C.given(blank_plan(name), stand_in(0))
        assert {*blank_plan(name).needs} <= C.given(blank_plan(name), stand_in(0)).keys()


def test_the_dear_ones_come_on_few_scenes_and_steps_are_given_to_all():
    tasks = C.matrix_tasks(C.FEW + 1, steps=5)
    names = {number: {name for t in tasks if t.number == number for name in t.methods} for number in range(C.FEW + 1)}
    dear = {name for name in names[0] if C.DEAR & {*name.split("+")}}
    assert dear and names[C.FEW - 1] == names[0] and names[C.FEW] == names[0] - dear
    (row,) = C.work(C.Task(0, "swap", 0, ("ddim+replay",), steps=5), "model", "judge")
    assert row["rows"] == 15 and row["steps"] == 5


def test_the_tables_by_hand():
    def row(method, db, success, rows, seconds):
        return {"method": method, "background_psnr": db, "success": success, "rows": rows, "seconds": seconds}

    rows = [row("ddim+replay", 20.0, True, 150, 1.0), row("ddim+replay", 30.0, False, 150, 2.0),
            row("noise+replay", None, False, 1100, 1.0), {"method": "ddim+diffedit", "error": "no"}]  # fmt: skip
    assert C.table(rows, ["replay", "diffedit"], ["ddim", "noise"], C.quality).splitlines() == [
        "| | ddim | noise |", "|---|---|---|", "| replay | 25.0 dB, 50 % | 48.1 dB, 0 % (of 1) |",
        "| diffedit | refused |  |",
    ]  # fmt: skip
    assert C.table(rows, ["replay"], ["ddim", "noise"], C.price).endswith("| 150, 1.5 s | 1,100, 1.0 s (of 1) |")


def test_losses_are_heard_and_gradients_are_stilled():
    """Of calls at one timestep the last; afterwards all is as it was."""
    sd, grad, made = Model(), torch.autograd.grad, {}
    for still in (True, False):
        x, made[still] = torch.ones(1, 4, 2, 2, requires_grad=True), []
        with C.heard(sd, still) as found:
            for factor, t in ((1, 3), (2, 3), (3, 4)):
                sd.eps(x, t, [sd.text([""])])
                made[still] += torch.autograd.grad(factor * x.sum(), x)
        ((place, losses),) = found.items()
        assert place.startswith("test_compare:") and losses == [32.0, 48.0]
        assert torch.autograd.grad is grad and "eps" not in vars(sd)
    assert not any(one.any() for one in made[True]) and [float(one.max()) for one in made[False]] == [1, 2, 3]


def test_the_losses_of_a_method_beside_a_walk_without_gradients(tmp_path, capsys):
    args = SimpleNamespace(
        model="model", judge="judge", numbers=(0,), steps=0, output=tmp_path,
        only=["pix2pix-zero", "dds", "drag-diffusion"], set=[("iterations", "2"), ("lora_steps", "0")],
    )  # fmt: skip
    C.losses(args)
    one, other, drag = (line.split(" | ") for line in (tmp_path / "losses.md").read_text().splitlines()[2:])
    assert one[0] == "| pix2pix-zero" and one[2].startswith("pix2pix_zero:") and one[3] == "50"
    assert float(one[5]) < float(one[4])  # it falls
    assert one[6] == "yes / yes" and one[9] == "100 |"
    assert other[0] == "| dds iterations=2" and other[2:4] == ["none", "0"]
    assert (
        drag[0] == "| drag-diffusion iterations=2 lora_steps=0"
        and drag[8].split(", ")[1] == "3.0"
        and drag[8].count("dB") == 1
    )
    assert len(capsys.readouterr().out.splitlines()) == 3
