"""SDEdit pinned by closed forms, from pictures and from the command line. `S` and `A` are exchanged by the mutations."""

import inspect
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mutants import load, mutant, source
from PIL import Image
from stubs import ALPHA_BAR, Counting, constant, gaussian, latent, zero

import minidiffedit
from minidiffedit import arms as A
from minidiffedit import cli, encode, levels, masked_decode, noises
from minidiffedit.methods import sdedit as S

pytestmark = pytest.mark.filterwarnings("ignore:.*rounds to level 0", "ignore:.*do not divide")


def half_mask(h=6, w=5):
    mask = torch.zeros(1, 1, h, w, dtype=torch.bool)
    mask[..., : w // 2] = True
    return mask


def first_noises(x0, count, seed=0):
    """(count, b, c, h, w): what the images of a batch draw, one after the other."""
    return torch.stack([noises(x0.shape[1:], count, seed + i) for i in range(len(x0))], dim=1).to(x0)


# ---------------------------------------------------------------- on stub predictors


def test_it_starts_from_the_stated_noise_at_the_stated_level():
    x0 = latent(2, 4, 3, 5)
    for steps, strength, t in ((50, 0.5, 481), (10, 0.58, 501), (20, 1.0, 951)):
        eps, record = Counting(), []
        S.redraw(eps, x0, 0.3, 0.0, steps=steps, strength=strength, seed=4, record=record)
        a = float(np.float32(ALPHA_BAR[t]))
        assert eps.calls[0][1] == t and torch.equal(eps.calls[0][0], record[0])
        expected = a**0.5 * x0 + (1 - a) ** 0.5 * first_noises(x0, 1, seed=4)[0]
        torch.testing.assert_close(record[0], expected, rtol=1e-12, atol=1e-12)


def test_at_eta_zero_it_is_ddim_from_the_encodings_own_noise():
    """The same start, an encoding's, gives what masked_decode gives, bit for bit, and without a mask plain DDIM."""
    x0 = latent(2, 4, 6, 5, dtype=torch.float32)
    up = encode(gaussian, x0, 0.0, steps=20, strength=0.8)
    for mask in (torch.ones(1, 1, 6, 5), half_mask().float(), 0.4 * half_mask()):
        for g in (7.5, 1):
            ours, theirs = [], []
            S.denoise(gaussian, up, mask, 0.8, -0.2, iter(()), guidance_scale=g, eta=0.0, record=ours)
            masked_decode(gaussian, up, mask, 0.8, -0.2, guidance_scale=g, record=theirs)
            assert len(ours) == len(theirs) == 17 and all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_the_whole_at_eta_zero_is_masked_decode_under_one_noise():
    x0 = latent(1, 4, 6, 5)
    under = S.noised(x0, noises((4, 6, 5), 1, 3), steps=20, strength=0.6)
    ours = S.redraw(gaussian, x0, 0.8, -0.2, mask=half_mask(), steps=20, strength=0.6, seed=3)
    assert list(under) == list(range(13)) and torch.equal(under[0], x0)
    assert torch.equal(ours, masked_decode(gaussian, under, half_mask(), 0.8, -0.2))


def test_ve_and_vp_are_one_process():
    x0, nothing, one = latent(2, 4, 6, 5), torch.zeros(1, 4, 2, 2).double(), torch.ones(1, 4, 2, 2).double()
    for form in ("vp", "ve"):
        signal, noise = (S.noised(x, n, steps=50, strength=1.0, form=form) for x, n in ((one, nothing), (nothing, one)))
        for j, a in list(enumerate(levels(50).a))[1:]:  # the same signal, the same noise, hence the same ratio
            torch.testing.assert_close(signal[j] / noise[j], torch.full_like(one, math.sqrt(a / (1 - a))))
            torch.testing.assert_close(noise[j], torch.full_like(one, math.sqrt(1 - a)))
    for eta in (0.0, 0.4, 1.0):
        options = {"mask": half_mask() * 0.7, "steps": 20, "strength": 0.8, "eta": eta, "repeats": 2}
        vp, ve = (S.redraw(gaussian, x0, 0.8, -0.2, form=form, **options) for form in ("vp", "ve"))
        torch.testing.assert_close(ve, vp, rtol=1e-9, atol=1e-9)


def test_empty_masks_and_strength_zero_return_the_source_without_a_call():
    x0, eps = latent(2, 4, 6, 5, dtype=torch.float32), Counting()
    for options in ({"mask": torch.zeros(1, 1, 6, 5)}, {"strength": 0.0}, {"strength": 0.004, "repeats": 3}):
        for eta, form in ((0.0, "vp"), (1.0, "ve")):
            record = []
            assert torch.equal(S.redraw(eps, x0, 1.0, 0.0, eta=eta, form=form, record=record, **options), x0)
            assert eps.rows == 0 and record == []
    one_empty = torch.cat([torch.zeros(1, 1, 6, 5), torch.ones(1, 1, 6, 5)])
    result = S.redraw(gaussian, x0, 1.0, 0.0, mask=one_empty, eta=1.0, repeats=2)
    assert torch.equal(result[0], x0[0]) and not torch.equal(result[1], x0[1])


@pytest.mark.parametrize("form", ["vp", "ve"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_outside_the_mask_every_level_holds_the_one_noise(form, eta):
    x0, record = latent(2, 4, 6, 5, dtype=torch.float32), []
    options = {"steps": 10, "strength": 0.8, "eta": eta, "repeats": 3, "form": form, "seed": 2}
    S.redraw(gaussian, x0, 1.0, 0.0, mask=half_mask(), record=record, **options)
    noise, a = first_noises(x0, 1, seed=2)[0], levels(10).a
    outside = ~half_mask().expand_as(x0)
    for i, y in enumerate(record):
        j = 8 - i % 9
        held = x0 if j == 0 else math.sqrt(a[j]) * x0 + math.sqrt(1 - a[j]) * noise
        exact = {"rtol": 0, "atol": 0} if form == "vp" or j == 0 else {}  # VE's own arithmetic rounds otherwise
        torch.testing.assert_close(y[outside], held[outside], **exact)
        assert i == 0 or not torch.allclose(y[~outside], held[~outside])
    assert len(record) == 27


@pytest.mark.parametrize("form", ["vp", "ve"])
def test_ancestral_noise_has_the_papers_size_and_comes_in_order(form):
    """Nothing is predicted: what a step adds is sigma (DDIM, eq. 16) times the next draw of each image's generator."""
    x0, record = latent(2, 4, 3, 5), []
    S.redraw(zero, x0, 1.0, 0.0, steps=10, strength=0.4, eta=0.5, repeats=2, form=form, seed=7, record=record)
    drawn, a = list(first_noises(x0, 10, seed=7)), levels(10).a
    for repeat in range(2):
        top, *rest = record[5 * repeat : 5 * repeat + 5]
        guide = record[4] if repeat else x0
        torch.testing.assert_close(top, math.sqrt(a[4]) * guide + math.sqrt(1 - a[4]) * drawn.pop(0))
        for j, y in zip((4, 3, 2, 1), rest):
            sigma = 0.5 * math.sqrt((1 - a[j - 1]) / (1 - a[j])) * math.sqrt(1 - a[j] / a[j - 1])
            torch.testing.assert_close(y, math.sqrt(a[j - 1] / a[j]) * top + sigma * drawn.pop(0))
            top = y
    assert drawn == []


@pytest.mark.parametrize("form", ["vp", "ve"])
def test_ancestral_sampling_draws_from_the_predictors_gaussian(form):
    """N(1, .7^2) is what the predictor knows; mean and variance also against their own recursion, step by step."""
    y = S.redraw(gaussian, torch.zeros(1, 4, 128, 128), 1.0, -1.0, steps=100, strength=1.0, guidance_scale=1, eta=1.0,
                 form=form)  # fmt: skip
    assert y.mean() == pytest.approx(1.0, abs=0.06) and y.std() == pytest.approx(0.7, abs=0.05)
    a = [float(np.float32(ALPHA_BAR[t])) for t in (0, *range(1, 1000, 10))]
    mean, variance = 0.0, 1 - a[-1]
    for at, to in zip(a[:0:-1], a[-2::-1]):
        sigma2 = (1 - to) / (1 - at) * (1 - at / to)
        slope = (1 - at) ** 0.5 / (at * 0.7**2 + 1 - at)  # d eps / d x
        through = (1 - to - sigma2) ** 0.5 - (to * (1 - at) / at) ** 0.5
        gain = (to / at) ** 0.5 + through * slope
        mean, variance = gain * mean - through * slope * at**0.5, gain**2 * variance + sigma2
    assert y.mean() == pytest.approx(mean, abs=0.012) and y.std() == pytest.approx(variance**0.5, abs=0.008)


def test_a_constant_predictor_leaves_what_the_noise_leaves():
    """e = the noise laid: the picture comes back under a_0, whatever the guidance and the level."""
    x0 = latent(1, 4, 3, 5)
    noise, a0 = noises((4, 3, 5), 1, 0), levels(10).a[0]
    y = S.redraw(constant(noise), x0, "a", "b", steps=10, strength=0.7)
    torch.testing.assert_close(y, math.sqrt(a0) * x0 + math.sqrt(1 - a0) * noise)


def test_rows_and_texts():
    x0 = latent(2, 4, 6, 5)
    for g, repeats, rows, texts in ((7.5, 1, 2 * 5, [-0.2, 0.8]), (1, 1, 5, [0.8]), (7.5, 3, 6 * 5, [-0.2, 0.8])):
        eps, stages = Counting(), []

        def track(items, stage, stages=stages):
            stages.append(stage)
            return items

        S.redraw(eps, x0, 0.8, -0.2, steps=10, guidance_scale=g, repeats=repeats, track=track)
        assert eps.rows == 2 * rows and all(asked == texts for _, _, asked in eps.calls)
        assert [t for _, t, _ in eps.calls] == list(levels(10).t[5:0:-1]) * repeats and stages == ["decode"] * repeats


def test_images_of_a_batch_are_the_images_alone_and_the_global_generator_rests():
    x0, mask = latent(3, 4, 6, 5, dtype=torch.float32), half_mask()
    state = torch.random.get_rng_state()
    options = {"mask": mask, "steps": 10, "eta": 1.0, "repeats": 2}
    together = S.redraw(gaussian, x0, 1.0, 0.0, seed=5, **options)
    for i in range(3):
        alone = S.redraw(gaussian, x0[i : i + 1], 1.0, 0.0, seed=5 + i, **options)
        assert torch.equal(alone[0], together[i])
    assert torch.equal(together, S.redraw(gaussian, x0, 1.0, 0.0, seed=[5, 6, 7], **options))
    assert not torch.equal(together, S.redraw(gaussian, x0, 1.0, 0.0, seed=0, **options))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_arguments_are_left_alone_and_half_types_widen():
    x0, mask = latent(1, 4, 6, 5, dtype=torch.float16), half_mask()
    before = x0.clone()
    y = S.redraw(gaussian, x0, 1.0, 0.0, mask=mask, steps=4, eta=1.0)
    assert y.dtype == torch.float32 and torch.equal(x0, before) and torch.equal(mask, half_mask())


@pytest.mark.parametrize("options", [
    {"eta": -0.1}, {"eta": 1.5}, {"eta": math.nan}, {"repeats": 0}, {"repeats": 1.5}, {"form": "sub-vp"}, {"steps": 0},
    {"strength": 2}, {"guidance_scale": math.inf}, {"seed": -1}, {"seed": [1]}, {"mask": torch.ones(6, 5)},
    {"mask": torch.full((1, 1, 6, 5), 2.0)},
], ids=str)  # fmt: skip
def test_what_is_out_of_range(options):
    eps = Counting()
    with pytest.raises(ValueError):
        S.redraw(eps, latent(2, 4, 6, 5), 1.0, 0.0, **options)
    assert eps.rows == 0


def test_nan_is_an_error():
    with pytest.raises(ArithmeticError), np.errstate(all="ignore"):
        S.redraw(constant(torch.full((1, 4, 3, 3), math.nan)), latent(1, 4, 3, 3), 1.0, 0.0, steps=2)


# ---------------------------------------------------------------- from picture to picture


QUICK = {"steps": 10, "seed": 0}


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 93, 3), dtype=np.uint8))


def box():
    mask = Image.new("L", (93, 75))
    mask.paste(255, (20, 10, 50, 40))
    return mask


def test_a_picture_is_redrawn_as_its_latent_is(sd, picture):
    options = {"steps": 10, "strength": 0.4, "guidance_scale": 2.5, "eta": 0.5, "repeats": 2, "form": "ve", "seed": 3}
    done = A.sdedit(sd, picture, target="a zebra", negative_prompt="a car", **options)
    by_hand = S.redraw(sd.eps, done.x0, sd.text(["a zebra"]), sd.text(["a car"]), **options)
    assert torch.equal(done.latent, by_hand) and len(done.decoded) == 10 and done.evaluations == {"decode": 16}
    assert done.image.size == picture.size and done.mask is done.paste_mask is None
    assert options.items() <= done.settings.items() and json.loads(json.dumps(done.settings))["method"] == "sdedit"
    names = inspect.signature(A.sdedit).parameters.keys() - {"mask"}
    again = A.sdedit(sd, picture, **{name: value for name, value in done.settings.items() if name in names})
    assert torch.equal(again.latent, done.latent) and again.image.tobytes() == done.image.tobytes()


def test_what_it_costs(sd, picture):
    before = sd.evaluations
    assert A.sdedit(sd, picture, target="a zebra", seed=0).evaluations == {"decode": 50}
    for options, rows in (
        ({}, 5), ({"guidance_scale": 1.0, "target": "a zebra"}, 5), ({"negative_prompt": "a car"}, 10),
        ({"target": "a zebra", "repeats": 3}, 30), ({"target": "a zebra", "mask": box()}, 10),
    ):  # fmt: skip
        assert A.sdedit(sd, picture, **QUICK | options).evaluations == {"decode": rows}, options
    assert sd.evaluations - before == 50 + 5 + 5 + 10 + 30 + 10


def test_without_text_guidance_changes_nothing(sd, picture):
    plain, guided = (A.sdedit(sd, picture, guidance_scale=g, **QUICK) for g in (1.0, 7.5))
    assert torch.equal(plain.latent, guided.latent)


def test_outside_the_mask_the_picture_stays(sd, picture):
    done = A.sdedit(sd, picture, target="a zebra", mask=box(), **QUICK)
    untouched = np.asarray(done.paste_mask) == 0
    assert 0.1 < untouched.mean() < 0.9
    assert np.array_equal(np.asarray(done.image)[untouched], np.asarray(picture)[untouched])
    outside = (done.latent_mask == 0).expand_as(done.x0)
    assert torch.equal(done.latent[outside], done.x0[outside])
    assert not torch.equal(done.latent[~outside], done.x0[~outside])
    plain = A.sdedit(sd, picture, target="a zebra", mask=box(), paste=False, **QUICK)
    assert plain.paste_mask is None and torch.equal(plain.latent, done.latent)
    assert not np.array_equal(np.asarray(plain.image)[untouched], np.asarray(picture)[untouched])


@pytest.mark.parametrize(
    "options, why", [({"strength": 0.0}, "level 0"), ({"mask": Image.new("L", (93, 75))}, "empty")]
)
def test_nothing_to_redraw_returns_the_source(sd, picture, options, why):
    before = sd.evaluations
    with pytest.warns(UserWarning, match=f"nothing to edit: .*{why}"):
        done = A.sdedit(sd, picture, target="a zebra", **QUICK | options)
    assert done.image.tobytes() == picture.tobytes() and torch.equal(done.latent, done.x0)
    assert sd.evaluations == before and done.paste_mask is None


@pytest.mark.parametrize("options", [
    {"eta": 2}, {"repeats": 0}, {"form": "sub-vp"}, {"steps": 0}, {"strength": 1.5}, {"seed": -1}, {"size": 32},
    {"target": None}, {"mask": np.zeros((5, 5))},
], ids=str)  # fmt: skip
def test_arguments_are_refused_before_any_row(sd, picture, options):
    before = sd.evaluations
    with pytest.raises(ValueError):
        A.sdedit(sd, picture, **QUICK | options)
    assert sd.evaluations == before


def test_a_patch_is_pasted_and_redrawn(sd, picture):
    patch = np.full((10, 20, 3), (255, 0, 0), dtype=np.uint8)
    laid, region = A.composite(picture, patch, (30, 20, 50, 30))
    inside = np.zeros((75, 93), dtype=bool)
    inside[20:30, 30:50] = True
    assert np.array_equal(np.asarray(region) == 255, inside) and (np.asarray(laid)[inside] == (255, 0, 0)).all()
    assert np.array_equal(np.asarray(laid)[~inside], np.asarray(picture)[~inside])
    soft = np.zeros((10, 20), dtype=np.float32)
    soft[:, :10] = 0.6
    laid, region = A.composite(picture, patch, (30, 20, 50, 30), soft)
    mixed = 0.6 * np.array([255, 0, 0]) + 0.4 * np.asarray(picture)[20:30, 30:40]
    assert np.abs(np.asarray(laid)[20:30, 30:40] - mixed).max() <= 1 and np.asarray(region)[25, 35] == 153
    assert np.array_equal(np.asarray(laid)[20:30, 40:50], np.asarray(picture)[20:30, 40:50])
    done = A.sdedit(sd, laid, mask=region, **QUICK)
    assert 0 < done.latent_mask.mean() < 0.2 and done.image.tobytes() != laid.tobytes()
    doubled, _ = A.composite(picture, patch, (0, 0, 40, 20))
    assert (np.asarray(doubled)[:20, :40] == (255, 0, 0)).all()


@pytest.mark.parametrize("where, mask", [
    ((-1, 0, 5, 5), None), ((0, 0, 94, 5), None), ((5, 0, 5, 5), None), ((0, 9, 5, 5), None), ((0, 0, 5), None),
    ((0.5, 0, 5, 5), None), ((0, 0, 5, 5), np.ones((3, 4))), ((0, 0, 5, 5), np.full((4, 3), 2.0)),
], ids=str)  # fmt: skip
def test_patches_that_do_not_fit(picture, where, mask):
    with pytest.raises(ValueError):
        A.composite(picture, np.zeros((4, 3, 3), dtype=np.uint8), where, mask)


# ---------------------------------------------------------------- the command


@pytest.fixture
def here(tmp_path, monkeypatch, picture):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    box().save("m.png")
    return tmp_path


def said(capsys, *argv):
    assert cli.main(["sdedit", "in.png", "--steps", "4", "--json", *map(str, argv)]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    return json.loads(out)


def test_the_command_writes_what_the_function_makes(here, folder, capsys, picture):
    options = ["--strength", "0.75", "--eta", "0.5", "--repeats", "2", "--guidance-scale", "2", "--mask", "m.png"]
    result = said(capsys, "--target", "a zebra", "--seed", "3", *options, "--model", folder, "-o", "o.png")
    assert result["output"] == "o.png" and result["seed"] == 3 and result["evaluations"] == {"decode": 12}
    assert result["versions"]["torch"] and result["model"]["id"] == str(folder) and result["seconds"]
    sd = minidiffedit.StableDiffusion.load(folder, device="cpu")
    done = A.sdedit(sd, picture, target="a zebra", strength=0.75, eta=0.5, repeats=2, guidance_scale=2, steps=4, seed=3,
                    mask=box())  # fmt: skip
    with Image.open("o.png") as file:
        assert file.tobytes() == done.image.tobytes()


def test_what_stands_in_the_picture_makes_it_again(here, folder, capsys):
    """The seed is drawn; the file's own settings, as options, write the same file."""
    said(capsys, "--target", "a zebra", "--eta", "1", "--repeats", "2", "--model", folder)
    with Image.open("in-sdedit.png") as file:
        record = json.loads(file.info["minidiffedit"])
    assert record["method"] == "sdedit" and record["edited"] is True and record["mask"] == "none"
    names = ("target", "negative_prompt", "strength", "eta", "repeats", "steps", "guidance_scale", "seed")
    again = [text for name in names for text in (f"--{name.replace('_', '-')}", str(record[name]))]
    said(capsys, *again, "--model", folder, "-o", "again.png")
    assert Path("again.png").read_bytes() == Path("in-sdedit.png").read_bytes()
    said(capsys, *again, "--model", folder, "--no-metadata", "-o", "bare.png")
    with Image.open("bare.png") as file:
        assert "minidiffedit" not in file.info


def test_the_command_speaks_in_lines(here, folder, capsys):
    assert cli.main(["sdedit", "--image", "in.png", "--strength", "0", "--seed", "1", "--model", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert (
        out.startswith("in-sdedit.png\nseed 1; ")
        and err.startswith("warning: nothing to edit")
        and err.count("\n") == 1
    )
    with Image.open("in-sdedit.png") as a, Image.open("in.png") as b:
        assert a.tobytes() == b.tobytes()
    quiet = ["sdedit", "in.png", "--strength", "0", "--quiet", "--model", str(folder)]
    assert cli.main(quiet) == 0 and capsys.readouterr().err == ""


@pytest.mark.parametrize("option, value, word", [
    ("--eta", "2", "eta"), ("--eta", "nan", "eta"), ("--repeats", "0", "repeats"), ("--strength", "2", "strength"),
    ("--steps", "0", "steps"), ("--seed", "-1", "seed"), ("--size", "9", "size"), ("-o", "in.png", "overwrite"),
    ("-o", "m.png", "overwrite"), ("-o", "o.gif", "end in"), ("--target", os.fsdecode(b"\xff"), "UTF-8"),
])  # fmt: skip
def test_the_command_refuses_before_a_model_is_loaded(here, capsys, option, value, word):
    argv = ["sdedit", "in.png", "--mask", "m.png", option, value, "--model", "no-such-model"]
    assert cli.main(argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and word in err


# ---------------------------------------------------------------- each mistake turns a test red

# name: (what stands in methods/sdedit.py, what a mistake would put, the test that must fail)
MUTATIONS = {
    "variance for its root": ("return math.sqrt(a) * x0 + math.sqrt(1 - a) * noise", "return math.sqrt(a) * x0 + (1 - a) * noise",
        test_it_starts_from_the_stated_noise_at_the_stated_level),
    "no signal's scale": ("return math.sqrt(a) * x0 + math", "return x0 + math", test_it_starts_from_the_stated_noise_at_the_stated_level),
    "VE from too weak a noise": ("math.sqrt((1 - a) / a) * noise", "math.sqrt(1 - a) * noise", test_ve_and_vp_are_one_process),
    "VE not scaled to what the model takes": ("return math.sqrt(a_to) * (x +", "return (x +", test_ve_and_vp_are_one_process),
    "VE's sigma without its root": ("sigma = eta * s_to * math.sqrt(1 - (s_to / s) ** 2)", "sigma = eta * s_to * (1 - (s_to / s) ** 2)",
        test_ancestral_noise_has_the_papers_size_and_comes_in_order),
    "VE keeps the noise it replaces": ("math.sqrt(s_to**2 - sigma**2) - s", "s_to - s", test_ancestral_sampling_draws_from_the_predictors_gaussian),
    "VP keeps the noise it replaces": ("math.sqrt(1 - a_to - sigma**2) * e", "math.sqrt(1 - a_to) * e",
        test_ancestral_sampling_draws_from_the_predictors_gaussian),
    "sigma without its denominator": ("eta * math.sqrt((1 - a_to) / (1 - a) *", "eta * math.sqrt((1 - a_to) *",
        test_ancestral_noise_has_the_papers_size_and_comes_in_order),
    "no ancestral noise": ("x + sigma * next(draw).to(x) if eta else x\n\n\ndef ve", "x\n\n\ndef ve",
        test_ancestral_noise_has_the_papers_size_and_comes_in_order),
    "noise at eta 0": ("eta * math.sqrt((1", "(eta or 0.1) * math.sqrt((1", test_at_eta_zero_it_is_ddim_from_the_encodings_own_noise),
    "blend with the level just left": ("(1 - M) * trajectory[j - 1]", "(1 - M) * trajectory[j]", test_outside_the_mask_every_level_holds_the_one_noise),
    "noise at level 0": ("[x0, *(add(x0, noise.to(x0), a[j]) for j in range(1,", "[*(add(x0, noise.to(x0), a[j]) for j in range(0,",
        test_the_whole_at_eta_zero_is_masked_decode_under_one_noise),
    "outside moves with the repeats": ("M * again + (1 - M) * outside[K]", "again", test_outside_the_mask_every_level_holds_the_one_noise),
    "repeats that continue the first picture": ("(y, next(draw).to(y), levels", "(x0, next(draw).to(y), levels",
        test_ancestral_noise_has_the_papers_size_and_comes_in_order),
    "repeats that share a noise": ("(y, next(draw).to(y), levels", "(y, first_noises_of(x0), levels", test_ancestral_noise_has_the_papers_size_and_comes_in_order),
    "one repeat only": ("range(repeats if K", "range(1 if K", test_rows_and_texts),
    "start one level up": ("range(K, 0, -1), \"decode\"", "range(K - 1, 0, -1), \"decode\"", test_it_starts_from_the_stated_noise_at_the_stated_level),
    "the timestep of the level below": ("eps(y, t[j], [null, target])", "eps(y, t[j - 1], [null, target])", test_it_starts_from_the_stated_noise_at_the_stated_level),
    "swap the guidance halves": ("eps(y, t[j], [null, target])", "eps(y, t[j], [target, null])", test_at_eta_zero_it_is_ddim_from_the_encodings_own_noise),
    "a null row at guidance 1": ("if guidance_scale == 1:", "if False:", test_rows_and_texts),
    "calls for an empty mask": ("if K and M.any() else 0", "if K else 0", test_empty_masks_and_strength_zero_return_the_source_without_a_call),
    "one seed for the batch": ("2**63 - b) + i for i", "2**63 - b) for i", test_images_of_a_batch_are_the_images_alone_and_the_global_generator_rests),
    "the global generator": ("generator=g, dtype", "dtype", test_images_of_a_batch_are_the_images_alone_and_the_global_generator_rests),
    "one draw for the batch": ("yield torch.cat([torch.randn((1, *one), generator=g, dtype=torch.float32) for g in generators])",
        "yield torch.randn((b, *one), generator=generators[0])", test_images_of_a_batch_are_the_images_alone_and_the_global_generator_rests),
}  # fmt: skip


def run(test):
    """The test itself, through all its parameters."""
    cases = [{}]
    for mark in getattr(test, "pytestmark", []):
        cases = [case | {mark.args[0]: value} for case in cases for value in mark.args[1]]
    for case in cases:
        test(**case)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    old, new, test = MUTATIONS[name]
    changed = mutant("methods.sdedit", old, new, monkeypatch)
    changed.first_noises_of = lambda x0: first_noises(x0, 1, seed=7)[0]
    monkeypatch.setattr(sys.modules[__name__], "S", changed)
    with pytest.raises((AssertionError, StopIteration, RuntimeError)):
        run(test)


@pytest.mark.parametrize("test", sorted({m[2] for m in MUTATIONS.values()}, key=lambda t: t.__name__))
def test_unchanged_sources_pass_in_the_same_harness(test, monkeypatch):
    same = load("methods.sdedit", source("methods.sdedit"), monkeypatch)
    monkeypatch.setattr(sys.modules[__name__], "S", same)
    run(test)
