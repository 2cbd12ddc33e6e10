"""Latents as pictures: the linear map is least squares, and nothing else; what is shown while a run goes on is what its
steps are based on, and the run does not notice.
"""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import failed, ran
from PIL import Image
from stubs import ALPHA_BAR, Counting, constant, gaussian, latent

from minidiffedit import Previews, Step, edit, encode, generate, levels, masked_decode
from minidiffedit.commands.common import progress
from minidiffedit.files import images
from minidiffedit.views import previews
from minidiffedit.views.previews import predicted_x0

QUICK = {"steps": 10, "maps": 2, "target": "a zebra", "source": "a horse", "seed": 0}
FAST = ["--target", "a zebra", "--source", "a horse", "--steps", "10", "--maps", "2", "--seed", "0"]
NAMES = [  # every third of 8 steps, and the last of each stage
    "01-encode-t201.png", "02-encode-t501.png", "03-encode-t701.png", "04-decode-t501.png",
    "05-decode-t201.png", "06-decode-t001.png",
]  # fmt: skip


# ---------------------------------------------------------------- the linear map


def cells(h=8, w=10, seed=0):
    return latent(1, 4, h, w, seed=seed, dtype=torch.float32)


def test_a_linear_truth_is_found_again():
    x0 = cells()
    matrix, bias = 0.08 * torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0.4, 0.5, 0.6])
    colours = torch.einsum("bchw,cr->hwr", x0, matrix) + bias
    blocks = np.kron((colours * 255).round().clamp(0, 255).numpy().astype(np.uint8), np.ones((8, 8, 1), np.uint8))
    rgb = previews.fit(x0, Image.fromarray(blocks))
    assert torch.allclose(rgb.matrix, matrix, atol=0.002) and torch.allclose(rgb.bias, bias, atol=0.002)
    assert rgb.explained > 0.999
    assert np.abs(np.asarray(previews.apply(rgb, x0), int) - blocks[::8, ::8]).max() <= 1


def test_it_is_numpys_least_squares_on_the_mean_of_each_block():
    x0, pixels = cells(), np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    means = pixels.reshape(8, 8, 10, 8, 3).mean(axis=(1, 3)).reshape(-1, 3) / 255
    known = np.concatenate([x0[0].flatten(1).T.numpy(), np.ones((80, 1))], axis=1)
    expected, left, *_ = np.linalg.lstsq(known, means, rcond=None)
    rgb = previews.fit(x0, Image.fromarray(pixels))
    assert np.allclose(torch.cat([rgb.matrix, rgb.bias[None]]), expected, atol=2e-3)  # Pillow rounds the means
    assert rgb.explained == pytest.approx(1 - left.sum() / (means - means.mean(axis=0)).__pow__(2).sum(), abs=0.01)


def test_any_picture_size_and_what_leaves_the_range_is_clipped():
    rgb = previews.fit(cells(), Image.new("RGB", (333, 201), (10, 200, 90)))
    assert rgb.explained == 1 and previews.apply(rgb, cells()).getpixel((3, 3)) == (10, 200, 90)
    steep = previews.LatentRGB(torch.eye(4, 3) * 100, torch.zeros(3), 1.0)
    shown = np.asarray(previews.apply(steep, torch.tensor([1.0, -1, 0.002, 0]).view(1, 4, 1, 1)))
    assert shown.tolist() == [[[255, 0, 51]]]


def test_fewer_cells_than_unknowns_and_equal_cells():
    for x0 in (cells(1, 1), cells(1, 3), torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)):
        rgb = previews.fit(x0, Image.new("RGB", (64, 64), "orange"))
        assert torch.isfinite(rgb.matrix).all() and previews.apply(rgb, x0).getpixel((0, 0)) == (255, 165, 0)


def test_refusals():
    picture = Image.new("RGB", (64, 64))
    with pytest.raises(ValueError, match="expected a latent"):
        previews.fit(torch.zeros(2, 4, 8, 8), picture)
    with pytest.raises(ValueError, match="and L"):
        previews.fit(cells(), picture.convert("L"))
    with pytest.raises(ArithmeticError, match="NaN"):
        previews.fit(torch.full((1, 4, 8, 8), torch.nan), picture)
    with pytest.raises(ValueError, match="expected a latent"):
        previews.apply(previews.fit(cells(), picture), torch.zeros(1, 3, 8, 8))


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


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize("decode", [False, True])
def test_every_k_steps_and_the_last_of_each_stage(sd, picture, tmp_path, decode):
    """What is shown are the predictions, by the map of the source; at the end nearly the result."""
    plain = edit(sd, picture, **QUICK)
    watch, rows = Previews(sd, picture, tmp_path / "p", every=3, decode=decode), sd.evaluations
    done = edit(sd, picture, watch=watch, **QUICK)
    assert sd.evaluations - rows == plain.rows and torch.equal(done.latent, plain.latent)
    assert done.image.tobytes() == plain.image.tobytes()
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == NAMES == [p.name for p in watch.files]
    known, x, y, (t, a) = previews.fit(done.x0, picture), done.trajectory, done.decoded, levels(10)
    texts = {text: sd.text([text]) for text in ("", "a zebra")}
    inside, expected = done.latent_mask > 0, []
    for j in (3, 6, 8):  # the encoding asks at x_{j-1} for t_j
        (e,) = sd.eps(x[j - 1], t[j], [texts[""]])
        expected.append((x[j - 1] - (1 - a[j]) ** 0.5 * e) / a[j] ** 0.5)
    for j in (6, 3, 1):
        null, text = sd.eps(y[8 - j], t[j], [texts[""], texts["a zebra"]])
        clean = (y[8 - j] - (1 - a[j]) ** 0.5 * (null + 7.5 * (text - null))) / a[j] ** 0.5
        expected.append(torch.where(inside, clean, x[0]))
    for file, clean in zip(watch.files, expected, strict=True):
        with Image.open(file) as shown:
            assert shown.size == done.settings["working_size"] and shown.mode == "RGB"
            linear = previews.apply(known, clean).resize(shown.size, Image.Resampling.BICUBIC)
            wanted = images.to_picture(sd.decode(clean)) if decode else linear
            assert np.abs(np.asarray(shown, int) - np.asarray(wanted, int)).max() <= 1


@pytest.mark.parametrize("method, options, names", [
    ("masactrl", {}, ["encode-t401", "encode-t901", "decode-t501", "decode-t001"]),
    ("sdedit", {"strength": 0.3, "repeats": 2}, ["decode-t001", "decode-t101", "decode-t001"]),
    ("null-text-inversion", {"strength": 0.3, "inner_steps": 2, "source": "a horse"}, ["encode-t001", "decode-t001"]),
    ("diffedit", {"strength": 0.1, "maps": 2, "source": "a horse"}, ["encode-t001", "decode-t001"]),
])  # fmt: skip
def test_any_method_can_be_watched(sd, picture, tmp_path, method, options, names):
    """Several calls at one timestep are one step, and a stage that goes down more than once ends more than once."""
    watch = Previews(sd, picture, tmp_path / "p")
    edit(sd, picture, method, target="a zebra", steps=10, seed=0, watch=watch, **options)
    assert [p.name for p in watch.files] == [f"{i:02d}-{name}.png" for i, name in enumerate(names, 1)]
    assert {*watch.files} == {*(tmp_path / "p").iterdir()}


def test_of_several_calls_in_a_step_the_last_is_shown(sd, picture, tmp_path):
    watch, x = Previews(sd, picture, tmp_path / "p", every=1), torch.zeros(1, 4, 8, 8)
    shown = []
    watch.shown = lambda clean: shown.append(float(clean.mean())) or Image.new("RGB", (8, 8))
    stages = ["mask"] * 2 + ["encode"] * 4 + ["decode"] * 3
    for i, (stage, t) in enumerate(zip(stages, (5, 5, 1, 1, 11, 11, 11, 1, 1))):
        watch(Step(stage, t, x, x + i, i))
    assert shown == [3, 5, 6, 7, 8]
    assert [p.name for p in watch.files][-2:] == ["03-decode-t011.png", "04-decode-t001.png"]
    watch.every = 2
    for t in (21, 21, 11, 11, 1):  # two calls are no two steps
        watch(Step("generate", t, x, x, 0))
    assert [p.name for p in watch.files][4:] == ["05-generate-t011.png", "06-generate-t001.png"]


def test_a_picture_made_of_text_alone_is_shown_by_the_autoencoder(sd, tmp_path):
    watch = Previews(sd, None, tmp_path / "p", every=100)
    done = generate(sd, "a horse", steps=4, seed=0, watch=watch)
    (file,) = watch.files
    with Image.open(file) as shown:
        assert file.name == "01-generate-t001.png" and shown.size == done.image.size


def test_a_reused_encoding_is_not_watched_again(sd, picture, tmp_path):
    first = edit(sd, picture, **QUICK)
    watch = Previews(sd, picture, tmp_path / "p", every=100)
    edit(sd, picture, reuse=first, watch=watch, **QUICK | {"mask_threshold": 0.4})
    assert [p.name for p in watch.files] == ["01-decode-t001.png"]


@pytest.mark.filterwarnings("ignore:nothing to edit")
def test_an_edit_that_does_nothing_writes_nothing(sd, picture, tmp_path):
    watch = Previews(sd, picture, tmp_path / "p")
    edit(sd, picture, watch=watch, **QUICK | {"source": "a zebra"})
    assert not (tmp_path / "p").exists() and watch.files == []


# ---------------------------------------------------------------- the commands


@pytest.fixture
def here(tmp_path, monkeypatch, picture):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    return tmp_path


def test_edit_and_resume_write_previews_and_the_same_picture(here, folder, capsys):
    model = ["--model", folder]
    ran(capsys, "edit", "in.png", *FAST, "-o", "plain.png", *model)
    watched = ["edit", "in.png", *FAST, "-o", "seen.png", "--preview", "p", "--preview-every", "3"]
    ran(capsys, *watched, "--save-state", "run.safetensors", *model)
    assert sorted(p.name for p in Path("p").iterdir()) == NAMES
    assert Path("seen.png").read_bytes() == Path("plain.png").read_bytes()
    again = ["resume", "run.safetensors", "--mask-threshold", ".4", "--preview", "q", "--preview-decode", "-o", "r.png"]
    ran(capsys, *again, *model)
    assert [p.name for p in sorted(Path("q").iterdir())] == ["01-decode-t301.png", "02-decode-t001.png"]


@pytest.mark.parametrize("options, word", [
    (["--preview", "in.png"], "is a file"), (["--preview", "."], "not empty"), (["--preview", "no/where"], "no folder"),
    (["--preview", "p", "--preview-every", "0"], "preview_every"),
])  # fmt: skip
def test_a_place_that_cannot_be_is_refused_before_the_model_is_loaded(here, capsys, options, word):
    assert word in failed(capsys, "edit", "in.png", *FAST, *options, "--model", "no-such-model")
    assert {p.name for p in here.iterdir()} == {"in.png"}


# ---------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_bar_counts_model_rows_over_all_stages_and_ends_full(monkeypatch):
    """Also where a stage cost less than predicted, and a later one nothing; over two runs, each from nothing."""
    x, seen = torch.zeros(1, 4, 1, 1), []
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress(False, {"mask": 4, "encode": 10, "decode": 6}, seen.append) as watch:
        for stage, rows in (("mask", 2), ("mask", 4), ("encode", 5), ("encode", 6), ("decode", 2), ("decode", 3)):
            watch(Step(stage, 1, x, x, rows))
        running = sys.stderr.getvalue()
    said = sys.stderr.getvalue()
    assert "mask" in running and "/20 samples" in running and " left" in running and len(seen) == 6
    assert "| 9/9 samples" in said.split("\r")[-1] and "100%" in said.split("\r")[-1]
    for quiet, stream in ((True, Terminal()), (False, io.StringIO())):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress(quiet, {"mask": 4}) as watch:
            watch(Step("mask", 1, x, x, 4))
        assert stream.getvalue() == ""
