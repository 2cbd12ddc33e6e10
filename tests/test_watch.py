"""Watching an edit: what is shown is what the step was based on, and the edit does not notice."""

import inspect
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import failed, ran
from PIL import Image
from stubs import ALPHA_BAR, Counting, constant, gaussian, latent

from minidiffedit import Watch, edit, encode, levels, masked_decode, sdedit
from minidiffedit.files import images
from minidiffedit.views import preview
from minidiffedit.arms import check_redraw, redrawn_rows
from minidiffedit.commands.common import progress
from minidiffedit.editor import check_settings
from minidiffedit.views.preview import decoded_x0, predicted_x0

QUICK = {"steps": 10, "maps": 2, "target": "a zebra", "source": "a horse", "seed": 0}
FAST = ["--target", "a zebra", "--source", "a horse", "--steps", "10", "--maps", "2", "--seed", "0"]
NAMES = [  # every third level of 8, and the last of each stage
    "01-encode-level-3.png", "02-encode-level-6.png", "03-encode-level-7.png", "04-decode-level-5.png",
    "05-decode-level-2.png", "06-decode-level-0.png",
]  # fmt: skip


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 91, 3), dtype=np.uint8))


# ---------------------------------------------------------------- the prediction, from two levels alone


@pytest.mark.parametrize("g", [1.0, 7.5])
def test_two_levels_give_the_clean_latent_that_the_step_was_based_on(g):
    """Against the predictor's own answers, on the way up and under guidance on the way down."""
    x0, seen, decoded = latent(1, 4, 3, 5), Counting(gaussian), []
    t = levels(20).t
    up = encode(seen, x0, 0.3, steps=20, strength=1.0)
    for j in range(20):
        (e,) = gaussian(up[j], t[j + 1], [0.3])
        asked = (up[j] - (1 - ALPHA_BAR[t[j]]) ** 0.5 * e) / ALPHA_BAR[t[j]] ** 0.5
        got = predicted_x0(up[j], up[j + 1], ALPHA_BAR[t[j]], ALPHA_BAR[t[j + 1]])
        assert torch.allclose(got, asked, rtol=0, atol=1e-5), j  # the loops' noise table is float32
    masked_decode(seen, up, torch.ones(1, 1, 3, 5), -0.4, 0.3, guidance_scale=g, record=decoded)
    for i, j in enumerate(range(20, 0, -1)):
        null, text = gaussian(decoded[i], t[j], [0.3, -0.4])
        e = null + g * (text - null)
        asked = (decoded[i] - (1 - ALPHA_BAR[t[j]]) ** 0.5 * e) / ALPHA_BAR[t[j]] ** 0.5
        got = predicted_x0(decoded[i], decoded[i + 1], ALPHA_BAR[t[j]], ALPHA_BAR[t[j - 1]])
        assert torch.allclose(got, asked, rtol=0, atol=1e-5), j


def test_it_holds_in_float32_between_the_closest_levels():
    x0, noise = latent(1, 4, 3, 5).float(), latent(1, 4, 3, 5, seed=1).float()
    a = levels(999).a
    for j in (1, 2, 500, 998):
        x, above = (a[k] ** 0.5 * x0 + (1 - a[k]) ** 0.5 * noise for k in (j, j + 1))
        assert torch.allclose(predicted_x0(x, above, a[j], a[j + 1]), x0, atol=5e-3)
    with pytest.raises(ValueError, match="equal"):
        predicted_x0(x0, x0, 0.5, 0.5)


def test_under_a_soft_mask_it_is_the_blend_of_both():
    """The step's own answer is hidden behind the blend, which is undone; outside the mask, the source."""
    M = torch.tensor([0.0, 1e-4, 0.1, 0.5, 1.0], dtype=torch.float64).expand(1, 1, 3, 5)
    up, decoded, t = encode(gaussian, latent(1, 4, 3, 5), 0.3, steps=20, strength=1.0), [], levels(20).t
    masked_decode(gaussian, up, M, -0.4, 0.3, guidance_scale=2.0, record=decoded)
    for i, j in enumerate(range(20, 0, -1)):
        null, text = gaussian(decoded[i], t[j], [0.3, -0.4])
        asked = (decoded[i] - (1 - ALPHA_BAR[t[j]]) ** 0.5 * (2 * text - null)) / ALPHA_BAR[t[j]] ** 0.5
        got = decoded_x0(decoded[i], decoded[i + 1], up[j - 1], up[0], M, ALPHA_BAR[t[j]], ALPHA_BAR[t[j - 1]])
        expected = torch.where(M < 1e-3, up[0], M * asked + (1 - M) * up[0])
        assert torch.allclose(got, expected, rtol=0, atol=1e-4), j


# ---------------------------------------------------------------- what the loops leave behind


def test_the_encoding_records_its_levels_as_they_come():
    x0, seen = latent(2, 4, 3, 5), [latent(1)]
    lengths = []

    def track(items, stage):
        for item in items:
            yield item
            lengths.append(len(seen))

    noise = latent(1, 4, 3, 5, seed=1)
    made = encode(constant(noise), x0, 0, steps=10, strength=0.4, record=seen, track=track)
    assert lengths == [1, 2, 3, 4] and len(seen) == 5 == len(made)
    assert all(torch.equal(one, made[j]) for j, one in enumerate(seen))
    plain = encode(constant(noise), x0, 0, steps=10, strength=0.4)
    assert all(torch.equal(plain[j], made[j]) for j in plain)


def test_an_edit_records_both_ways_also_what_it_took_over(sd, picture):
    record, again = {}, {}
    done = edit(sd, picture, record=record, **QUICK)
    assert all(torch.equal(one, done.trajectory[j]) for j, one in enumerate(record["encode"]))
    assert len(record["encode"]) == 9 and all(map(torch.equal, record["decode"], done.decoded))
    weaker = edit(sd, picture, record=again, reuse=done, **QUICK | {"strength": 0.4})
    assert len(again["encode"]) == 5 == len(weaker.trajectory) and len(again["decode"]) == 5


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize("decode", [False, True])
def test_every_k_levels_and_the_last_of_each_stage(sd, picture, tmp_path, decode):
    plain = edit(sd, picture, **QUICK)
    watch, rows = Watch(sd, picture, tmp_path / "p", steps=10, every=3, decode=decode), sd.evaluations
    done = edit(sd, picture, record=watch.record, track=watch.track(), **QUICK)
    assert sd.evaluations - rows == sum(plain.evaluations.values()) and torch.equal(done.latent, plain.latent)
    assert done.image.tobytes() == plain.image.tobytes()
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == NAMES == [p.name for p in watch.files]
    known, x, y, a = preview.fit(done.x0, picture), done.trajectory, done.decoded, levels(10).a
    expected = [predicted_x0(x[j - 1], x[j], a[j - 1], a[j]) for j in (3, 6, 7)]
    inside = done.latent_mask > 0
    expected += [torch.where(inside, predicted_x0(y[8 - j - 1], y[8 - j], a[j + 1], a[j]), x[0]) for j in (5, 2)]
    expected.append(y[8])
    for file, clean in zip(watch.files, expected):
        with Image.open(file) as shown:
            assert shown.size == done.settings["working_size"] and shown.mode == "RGB"
            linear = preview.apply(known, clean).resize(shown.size, Image.Resampling.BICUBIC)
            assert shown.tobytes() == (images.to_picture(sd.decode(clean)) if decode else linear).tobytes()


def test_a_reused_encoding_is_not_watched_again(sd, picture, tmp_path):
    first = edit(sd, picture, **QUICK)
    watch = Watch(sd, picture, tmp_path / "p", steps=10, every=100)
    edit(sd, picture, reuse=first, record=watch.record, track=watch.track(), **QUICK | {"mask_threshold": 0.4})
    assert [p.name for p in watch.files] == ["01-decode-level-0.png"]


@pytest.mark.filterwarnings("ignore:nothing to edit")
def test_an_edit_that_does_nothing_writes_nothing(sd, picture, tmp_path):
    watch = Watch(sd, picture, tmp_path / "p", steps=10)
    edit(sd, picture, record=watch.record, track=watch.track(), **QUICK | {"source": "a zebra"})
    assert not (tmp_path / "p").exists() and watch.files == []


# ---------------------------------------------------------------- the commands


@pytest.fixture
def here(tmp_path, monkeypatch, picture):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    return tmp_path


def test_edit_and_resume_write_previews_and_the_same_picture(here, folder, capsys):
    model = ["--model", folder]
    plain = ["edit", "in.png", *FAST, "-o", "plain.png"]
    ran(capsys, *plain, *model)
    watched = ["edit", "in.png", *FAST, "-o", "seen.png", "--preview", "p", "--preview-every", "3"]
    ran(capsys, *watched, "--save-state", "run.safetensors", *model)
    assert sorted(p.name for p in Path("p").iterdir()) == NAMES
    assert Path("seen.png").read_bytes() == Path("plain.png").read_bytes()
    resume = [
        "resume",
        "run.safetensors",
        "--mask-threshold",
        ".4",
        "--preview",
        "q",
        "--preview-decode",
        "-o",
        "r.png",
    ]
    ran(capsys, *resume, *model)
    assert [p.name for p in sorted(Path("q").iterdir())] == ["01-decode-level-3.png", "02-decode-level-0.png"]


@pytest.mark.parametrize("options, word", [
    (["--preview", "in.png"], "is a file"), (["--preview", "."], "not empty"), (["--preview", "no/where"], "no folder"),
    (["--preview", "p", "--preview-every", "0"], "preview_every"),
])  # fmt: skip
def test_a_place_that_cannot_be_is_refused_before_the_model_is_loaded(here, capsys, options, word):
    assert word in failed(capsys, "edit", "in.png", *FAST, *options, "--model", "no-such-model")
    assert {p.name for p in here.iterdir()} == {"in.png"}


def test_previews_do_not_go_with_several_edits(here, capsys):
    assert "--preview goes with --target" in failed(capsys, "edit", "in.png", "--edit", "a=>b", "--preview", "p")


# ---------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_bar_counts_model_rows_over_all_stages_and_ends_full(monkeypatch):
    """Also where a stage cost less than predicted, and a later one nothing."""
    model = SimpleNamespace(evaluations=100)  # it has worked before
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress(False, model, {"mask": 4, "encode": 10, "decode": 6}) as track:
        for stage, steps, each in (("mask", 2, 2), ("encode", 3, 1)):
            seen = []
            for item in track(range(steps), stage):
                model.evaluations += each
                seen.append(item)
            assert seen == [*range(steps)]
        running = sys.stderr.getvalue()
    said = sys.stderr.getvalue()
    assert "mask 1/2" in running and "encode 3/3" in running and "/20 samples" in running and " left" in running
    assert "| 7/7 samples" in said.split("\r")[-1] and "100%" in said.split("\r")[-1]
    for quiet, stream in ((True, Terminal()), (False, io.StringIO())):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress(quiet, model, {"mask": 4}) as track:
            assert [*track(range(3), "mask")] == [0, 1, 2]
        assert stream.getvalue() == ""


@pytest.mark.parametrize("options, rows", [
    ({}, 10), ({"repeats": 2}, 20), ({"guidance_scale": 1.0}, 5), ({"target": ""}, 5), ({"strength": 0.0}, 0),
], ids=str)  # fmt: skip
@pytest.mark.filterwarnings("ignore:nothing to edit")
def test_what_sdedit_costs_is_known_before(sd, picture, options, rows):
    parameters = inspect.signature(sdedit).parameters
    given = {name: parameters[name].default for name in parameters.keys() - {"sd", "image", "mask", "track"}}
    settings = check_redraw(check_settings(given | {"target": "x", "steps": 10, "seed": 0} | options))
    assert redrawn_rows(settings) == {"decode": rows}
    assert sdedit(sd, picture, **{"target": "x", "steps": 10, "seed": 0} | options).evaluations == {"decode": rows}
