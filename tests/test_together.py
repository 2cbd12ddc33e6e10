"""Several pictures in one call of the model: the same edits, in fewer calls; what cannot go along goes alone."""

import json
import threading
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mutants import mutant
from PIL import Image
from stubs import latent
from test_batch import failed, here, jsonl, picture, ran, table  # noqa: F401 (a fixture)

from minidiffedit import StableDiffusion
from minidiffedit.kernels import together
from minidiffedit.many import batch, ray_batch
from minidiffedit.many.batch import Editor, at_once
from minidiffedit.many.manifest import grouped, read_manifest

FEW = {"source": "a horse", "target": "a zebra", "steps": 4, "maps": 2}
ROWS = [{"image": f"{name}.png", **FEW} for name in "abc"]


class Counted:
    """An editor's model with the rows of each call of its UNet, and the latents of each edit."""

    def __init__(self, folder, monkeypatch):
        self.rows, self.latents = [], {}
        self.sd = StableDiffusion.load(folder, device="cpu")
        unet, write = self.sd.unet.forward, Editor.write
        monkeypatch.setattr(
            self.sd.unet, "forward", lambda x, t, text, *given: self.saw(text) or unet(x, t, text, *given)
        )
        monkeypatch.setattr(Editor, "write", lambda own, done, task, *rest: self.kept(done, task) or
                            write(own, done, task, *rest))  # fmt: skip

    def saw(self, text):
        self.rows.append(len(text))

    def kept(self, done, task):
        self.latents[task.row.number] = done.latent

    def run(self, rows, out, count=0):
        """-> records in the rows' order, rows of each call, latents; count 0: one picture after another."""
        jsonl("m.jsonl", rows)
        Path(out).mkdir()
        read = read_manifest(Path("m.jsonl"), {})
        editor = Editor(lambda: self.sd, Path(), Path(out))
        groups = grouped(read, Path())
        made = at_once(editor, groups, count) if count else (one for group in groups for one in editor(group))
        records = sorted((record for _, record in made), key=lambda record: record["row"])
        calls, latents = self.rows, self.latents
        self.rows, self.latents = [], {}
        return records, calls, latents


@pytest.fixture
def counted(here, folder, monkeypatch):  # noqa: F811
    picture(2).save("c.png")
    return Counted(folder, monkeypatch)


def told(records):
    """All but what a clock says, and the result's own bytes."""
    return [{name: one for name, one in record.items() if name not in ("seconds", "sha256")} for record in records]


def apart(joined, latents):
    """By row, the largest difference of its latent, in shares of the largest number. Guidance and steps enlarge what a
    call rounds otherwise.
    """
    return [float((joined[row] - one).abs().max() / one.abs().max()) for row, one in sorted(latents.items())]


def test_pictures_together_are_the_single_edits_in_fewer_calls(counted):
    alone, calls, latents = counted.run(ROWS, "alone")
    both, fewer, joined = counted.run(ROWS, "both", 3)
    assert told(both) == told(alone) and len({one.numpy().tobytes() for one in latents.values()}) == 3
    assert max(apart(joined, latents)) <= 1e-4
    for row in latents:
        pixels = (np.asarray(Image.open(f"{out}/{alone[row - 1]['output']}"), int) for out in ("alone", "both"))
        assert abs(next(pixels) - next(pixels)).max() <= 1
    assert sum(fewer) == sum(calls) and len(fewer) * 3 == len(calls)
    assert fewer == [3 * rows for rows in calls[: len(fewer)]]


def test_pictures_that_end_early_make_room_for_others(counted):
    """Four pictures, two at once; one of other steps, one of another size: neither waits for ever, all are made."""
    picture(3, (96, 64)).save("d.png")
    rows = [*ROWS, {"image": "d.png", **FEW}, {**ROWS[0], "target": "a cow"}, {**ROWS[1], "steps": 2}]
    alone, _, latents = counted.run(rows, "alone")
    both, _, joined = counted.run(rows, "both", 2)
    assert told(both) == told(alone) and all(record["status"] == "done" for record in both)
    assert max(apart(joined, latents)) <= 1e-4


def test_what_fails_fails_alone(counted, monkeypatch):
    real = batch.read_picture

    def read(path):
        if Path(path).name == "b.png":
            raise ValueError("b.png is damaged")
        return real(path)

    monkeypatch.setattr(batch, "read_picture", read)
    records, _, latents = counted.run(ROWS, "out", 3)
    assert [record["status"] for record in records] == ["done", "failed", "done"] and len(latents) == 2
    assert records[1]["error"] == "b.png is damaged"


def test_what_the_model_raises_goes_to_all_that_asked(counted, monkeypatch):
    monkeypatch.setattr(counted.sd, "eps", lambda *_, **__: 1 / 0)
    records, _, _ = counted.run(ROWS, "out", 2)
    assert [record["error"] for record in records] == ["division by zero"] * 3


def test_warnings_go_with_their_row(counted):
    rows = [ROWS[0], {**ROWS[1], "steps": 3}, {**ROWS[2], "target": "a zebra " * 80}]
    before = warnings.filters[:], warnings.showwarning
    alone, _, _ = counted.run(rows, "alone")
    both, _, _ = counted.run(rows, "both", 3)
    said = [record["warnings"] for record in both]
    assert said == [record["warnings"] for record in alone] and len(said[0]) == 0
    assert "do not divide 1000" in said[1][0] and "cut off" in said[2][0]
    assert before == (warnings.filters[:], warnings.showwarning)


def test_calls_with_taps_go_alone_and_it_is_said(counted):
    rows = [{"image": f"{name}.png", "method": "plug-and-play", "source": "a horse", "target": "a zebra", "steps": 2}
            for name in "ab"]  # fmt: skip
    alone, calls, latents = counted.run(rows, "alone")
    both, fewer, joined = counted.run(rows, "both", 2)
    assert told(both) == told(alone)
    assert max(apart(joined, latents)) <= 1e-4 and len(calls) / 2 < len(fewer) < len(calls)
    other = [rows[0], {**ROWS[1], "steps": 3}]
    with pytest.warns(UserWarning, match="no two calls of the model could be made as one: pictures of one size"):
        counted.run(other, "other", 2)


def test_calls_of_one_kind_alone_are_joined():
    x, text, given = latent(1, 4, 8, 8), latent(1, 77, 8), latent(1, 5, 8, 8)
    one = together.Call(x, 481, [text, text], None)
    changes = [
        {"t": 461}, {"x": latent(1, 4, 8, 4)}, {"x": x.float()}, {"texts": [text]},
        {"texts": [text, latent(1, 154, 8)]}, {"given": given},
    ]  # fmt: skip
    assert len({call.kind for call in (one, *(one._replace(**change) for change in changes))}) == 7
    assert one.kind == one._replace(x=latent(3, 4, 8, 8), texts=[latent(3, 77, 8), text]).kind


def joined_answers(module=together):
    """Each of three calls of 1, 2 and 3 latents gets its own predictions, under texts of one row or of many."""

    def eps(x, t, texts, given=None):
        return [x * text.mean((1, 2))[:, None, None, None] + given.mean(1, keepdim=True) for text in texts]

    class Model:
        asked = 0

        def eps(self, x, t, texts, given):
            assert all(len(text) == len(x) == len(given) == 6 for text in texts)
            Model.asked += 1
            return eps(x, t, texts, given)

    def call(b, seed):
        texts = [latent(1, 77, 8, seed=seed + 1), latent(b, 77, 8, seed=seed + 2)]
        return module.Call(latent(b, 4, 2, 2, seed=seed), 481, texts, latent(1, 5, 2, 2, seed=seed + 3))

    calls = {"one": call(1, 10), "two": call(2, 20), "three": call(3, 30)}
    found = module.answers(Model(), calls)
    assert Model.asked == 1 and [*found] == [*calls]
    for name, (x, t, texts, given) in calls.items():
        assert len(found[name]) == 2
        for ours, theirs in zip(found[name], eps(x, t, texts, given)):
            assert torch.allclose(ours, theirs)


def test_each_call_gets_its_own_answer():
    joined_answers()


@pytest.mark.parametrize("old, new", [
    ("zip(turns, map", "zip(turns[::-1], map"), ("text.expand(n, -1, -1)", "text[:1].expand(n, -1, -1)"),
    ("one.split(sizes)", "one.split(sizes[::-1])"), ("given=joined", "given=joined.flip(0)"),
])  # fmt: skip
def test_a_mistake_in_joining_is_seen(old, new, monkeypatch):
    with pytest.raises((AssertionError, RuntimeError)):
        joined_answers(mutant("kernels.together", old, new, monkeypatch))


def test_a_run_that_is_left_leaves_no_thread(counted):
    jsonl("m.jsonl", ROWS)
    Path("out").mkdir()
    groups = grouped(read_manifest(Path("m.jsonl"), {}), Path())
    before = {*threading.enumerate()}
    outcomes = at_once(Editor(lambda: counted.sd, Path(), Path("out")), groups, 2)
    assert next(outcomes)[0] == "made"
    outcomes.close()
    for thread in {*threading.enumerate()} - before:
        thread.join(10)
        assert not thread.is_alive()


def test_from_the_shell(here, folder, capsys, monkeypatch):  # noqa: F811
    rows = [{"image": f"{name}.png", "source": "a horse", "target": "a zebra"} for name in "ab"]
    jsonl("m.jsonl", rows)
    one, two = ran(capsys, folder), ran(capsys, folder, "--together", "2", out="two")
    assert (two["made"], two["evaluations"]) == (2, one["evaluations"])
    alone, both = (table(f"{out}/results.jsonl") for out in ("out", "two"))
    assert [record["output"] for record in both] == [record["output"] for record in alone]
    assert ran(capsys, folder, "--together", "2", out="out")["already there"] == 2
    for count in ("0", "-1"):
        assert f"--together must be 1 or more pictures, got {count}" in failed(capsys, "--together", count)


def test_a_worker_of_ray_takes_several(here, folder):  # noqa: F811
    """As Ray calls it, without Ray."""
    rows = read_manifest(Path("m.jsonl"), {"steps": 2, "maps": 1})[:2]
    Path("out").mkdir()
    editor = Editor(partial(StableDiffusion.load, folder, device="cpu"), Path(), Path("out"))
    worker = ray_batch.Worker(editor, grouped(rows, Path()))
    (said,) = worker({"id": np.array([0, 1])})["results"]
    assert sorted(record["row"] for _, record in json.loads(said)) == [1, 2]
