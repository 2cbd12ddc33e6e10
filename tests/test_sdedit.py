"""SDEdit pinned by closed forms, from pictures and from the command line. `S` is exchanged by the mutations."""

import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from mutants import load, mutant, run, source
from PIL import Image
from proofs import pipeline
from stubs import ALPHA_BAR, Counting, Model, constant, gaussian, latent, zero
from tiny import box

from minidiffedit import StableDiffusion, cli, encode, levels, masked_decode, noises
from minidiffedit import run as R
from minidiffedit.files.images import composite
from minidiffedit.methods import sdedit as S

pytestmark = pytest.mark.filterwarnings("ignore:.*rounds to level 0", "ignore:.*do not divide")


def half_mask(h=6, w=5):
    mask = torch.zeros(1, 1, h, w, dtype=torch.bool)
    mask[..., : w // 2] = True
    return mask


def first_noises(x0, count, seed=0):
    """(count, b, c, h, w): what the images of a batch draw, one after the other."""
    return torch.stack([noises(x0.shape[1:], count, seed + i) for i in range(len(x0))], dim=1).to(x0)


def levels_of(x0, *texts, predictor=gaussian, mask=None, **options):
    """Every latent that the predictor was asked about, and the result."""
    eps = Counting(predictor)
    y = S.sdedit(eps, x0, *texts, mask, **options)
    return [x for x, _, _ in eps.calls] + [y]


# ---------------------------------------------------------------- on stub predictors


def test_it_starts_from_the_stated_noise_at_the_stated_level():
    x0 = latent(2, 4, 3, 5)
    for steps, strength, t in ((50, 0.5, 481), (10, 0.58, 501), (20, 1.0, 951)):
        eps = Counting()
        S.sdedit(eps, x0, 0.3, 0.0, steps=steps, strength=strength, seed=4)
        a = float(np.float32(ALPHA_BAR[t]))
        expected = a**0.5 * x0 + (1 - a) ** 0.5 * first_noises(x0, 1, seed=4)[0]
        assert eps.calls[0][1] == t
        torch.testing.assert_close(eps.calls[0][0], expected, rtol=1e-12, atol=1e-12)


def test_at_eta_zero_it_is_ddim_from_the_encodings_own_noise():
    """The same start, an encoding's, gives what masked_decode gives, bit for bit, and without a mask plain DDIM."""
    x0 = latent(2, 4, 6, 5, dtype=torch.float32)
    up = encode(gaussian, x0, 0.0, steps=20, strength=0.8)
    for mask in (torch.ones(1, 1, 6, 5), half_mask().float(), 0.4 * half_mask()):
        for g, texts in ((7.5, [-0.2, 0.8]), (1, [0.8])):
            ours, theirs = Counting(), Counting()
            y = S.denoise(ours, up, mask, texts, iter(()), guidance_scale=g, eta=0.0)
            assert torch.equal(y, masked_decode(theirs, up, mask, 0.8, -0.2, guidance_scale=g))
            assert [(t, asked) for _, t, asked in ours.calls] == [(t, asked) for _, t, asked in theirs.calls]
            assert len(ours.calls) == 16 and all(torch.equal(a[0], b[0]) for a, b in zip(ours.calls, theirs.calls))


def test_the_whole_at_eta_zero_is_masked_decode_under_one_noise():
    x0 = latent(1, 4, 6, 5)
    under = S.noised(x0, noises((4, 6, 5), 1, 3), steps=20, strength=0.6)
    ours = S.sdedit(gaussian, x0, 0.8, -0.2, half_mask(), steps=20, strength=0.6, seed=3)
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
        vp, ve = (S.sdedit(gaussian, x0, 0.8, -0.2, form=form, **options) for form in ("vp", "ve"))
        torch.testing.assert_close(ve, vp, rtol=1e-9, atol=1e-9)


def test_empty_masks_and_strength_zero_return_the_source_without_a_call():
    x0, eps = latent(2, 4, 6, 5, dtype=torch.float32), Counting()
    for options in ({"mask": torch.zeros(1, 1, 6, 5)}, {"strength": 0.0}, {"strength": 0.004, "repeats": 3}):
        for eta, form in ((0.0, "vp"), (1.0, "ve")):
            assert torch.equal(S.sdedit(eps, x0, 1.0, 0.0, eta=eta, form=form, **options), x0) and eps.rows == 0
    one_empty = torch.cat([torch.zeros(1, 1, 6, 5), torch.ones(1, 1, 6, 5)])
    result = S.sdedit(gaussian, x0, 1.0, 0.0, one_empty, eta=1.0, repeats=2)
    assert torch.equal(result[0], x0[0]) and not torch.equal(result[1], x0[1])


@pytest.mark.parametrize("form", ["vp", "ve"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_outside_the_mask_every_level_holds_the_one_noise(form, eta):
    x0 = latent(2, 4, 6, 5, dtype=torch.float32)
    options = {"steps": 10, "strength": 0.8, "eta": eta, "repeats": 3, "form": form, "seed": 2}
    seen = levels_of(x0, 1.0, 0.0, mask=half_mask(), **options)
    noise, a = first_noises(x0, 1, seed=2)[0], levels(10).a
    outside = ~half_mask().expand_as(x0)
    for i, y in enumerate(seen):
        j = 0 if i == 24 else 8 - i % 8
        held = x0 if j == 0 else math.sqrt(a[j]) * x0 + math.sqrt(1 - a[j]) * noise
        exact = {"rtol": 0, "atol": 0} if form == "vp" or j == 0 else {}  # VE's own arithmetic rounds otherwise
        torch.testing.assert_close(y[outside], held[outside], **exact)
        assert i == 0 or not torch.allclose(y[~outside], held[~outside])
    assert len(seen) == 25


@pytest.mark.parametrize("form", ["vp", "ve"])
def test_ancestral_noise_has_the_papers_size_and_comes_in_order(form):
    """Nothing is predicted: what a step adds is sigma (DDIM, eq. 16) times the next draw of each image's generator."""
    x0 = latent(2, 4, 3, 5)
    options = {"steps": 10, "strength": 0.4, "eta": 0.5, "form": form, "seed": 7}
    once, twice = (levels_of(x0, 1.0, 0.0, predictor=zero, repeats=n, **options) for n in (1, 2))
    drawn, a = list(first_noises(x0, 10, seed=7)), levels(10).a
    for top, *rest in (once, [twice[4], *twice[5:]]):
        guide = x0 if top is once[0] else once[4]
        torch.testing.assert_close(top, math.sqrt(a[4]) * guide + math.sqrt(1 - a[4]) * drawn.pop(0))
        for j, y in zip((4, 3, 2, 1), rest):
            sigma = 0.5 * math.sqrt((1 - a[j - 1]) / (1 - a[j])) * math.sqrt(1 - a[j] / a[j - 1])
            torch.testing.assert_close(y, math.sqrt(a[j - 1] / a[j]) * top + sigma * drawn.pop(0))
            top = y
    assert drawn == [] and len(twice) == 9


@pytest.mark.parametrize("form", ["vp", "ve"])
def test_ancestral_sampling_draws_from_the_predictors_gaussian(form):
    """N(1, .7^2) is what the predictor knows; mean and variance also against their own recursion, step by step."""
    options = {"steps": 100, "strength": 1.0, "guidance_scale": 1, "eta": 1.0, "form": form}
    y = S.sdedit(gaussian, torch.zeros(1, 4, 128, 128), 1.0, -1.0, **options)
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
    y = S.sdedit(constant(noise), x0, "a", "b", steps=10, strength=0.7)
    torch.testing.assert_close(y, math.sqrt(a0) * x0 + math.sqrt(1 - a0) * noise)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_it_is_what_diffusers_computes(folder, tmp_path, kind):
    """At eta = 0, the latter under a mask on the plain weights, which every level outside holds under one noise."""
    import diffusers

    peer, sd = pipeline(getattr(diffusers, kind), folder, tmp_path), StableDiffusion.load(folder, dtype="float32")
    x0, mask, given, M = latent(1, 4, 8, 8, dtype=torch.float32), torch.zeros(1, 1, 64, 64), {}, None
    if "Inpaint" in kind:
        mask[..., :24] = 1
        given, M = {"mask_image": mask, "masked_image_latents": x0, "height": 64, "width": 64}, mask[..., ::8, ::8]
    theirs = peer(
        "a zebra", image=x0, strength=0.6, num_inference_steps=10, guidance_scale=3.0, output_type="latent",
        generator=torch.Generator().manual_seed(4), **given,
    ).images  # fmt: skip
    texts = [sd.text([text]) for text in ("a zebra", "")]
    ours, other = (S.sdedit(sd.eps, x0, *texts, M, steps=10, strength=0.6, guidance_scale=3, seed=i) for i in (4, 5))
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm() < (other - theirs).norm()


def test_rows_and_texts():
    x0, text = latent(2, 4, 6, 5), torch.tensor(0.8)
    for g, null, repeats, texts in (
        (7.5, -0.2, 1, [-0.2, text]), (1, -0.2, 1, [text]), (7.5, -0.2, 3, [-0.2, text]), (7.5, text, 2, [text]),
    ):  # fmt: skip
        eps = Counting()
        S.sdedit(eps, x0, text, null, steps=10, guidance_scale=g, repeats=repeats)
        assert eps.rows == len(texts) * 2 * 5 * repeats and all(asked == texts for _, _, asked in eps.calls)
        assert [t for _, t, _ in eps.calls] == list(levels(10).t[5:0:-1]) * repeats


def test_images_of_a_batch_are_the_images_alone_and_the_global_generator_rests():
    x0, mask = latent(3, 4, 6, 5, dtype=torch.float32), half_mask()
    state = torch.random.get_rng_state()
    options = {"mask": mask, "steps": 10, "eta": 1.0, "repeats": 2}
    together = S.sdedit(gaussian, x0, 1.0, 0.0, seed=5, **options)
    for i in range(3):
        alone = S.sdedit(gaussian, x0[i : i + 1], 1.0, 0.0, seed=5 + i, **options)
        assert torch.equal(alone[0], together[i])
    assert torch.equal(together, S.sdedit(gaussian, x0, 1.0, 0.0, seed=[5, 6, 7], **options))
    assert not torch.equal(together, S.sdedit(gaussian, x0, 1.0, 0.0, seed=0, **options))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_arguments_are_left_alone_and_half_types_widen():
    x0, mask = latent(1, 4, 6, 5, dtype=torch.float16), half_mask()
    before = x0.clone()
    y = S.sdedit(gaussian, x0, 1.0, 0.0, mask, steps=4, eta=1.0)
    assert y.dtype == torch.float32 and torch.equal(x0, before) and torch.equal(mask, half_mask())


@pytest.mark.parametrize("options", [
    {"steps": 0}, {"strength": 2}, {"seed": -1}, {"seed": [1]}, {"mask": torch.ones(6, 5)},
    {"mask": torch.full((1, 1, 6, 5), 2.0)},
], ids=str)  # fmt: skip
def test_what_does_not_fit(options):
    eps = Counting()
    with pytest.raises(ValueError):
        S.sdedit(eps, latent(2, 4, 6, 5), 1.0, 0.0, **options)
    assert eps.rows == 0


def test_nan_is_an_error():
    with pytest.raises(ArithmeticError), np.errstate(all="ignore"):
        S.sdedit(constant(torch.full((1, 4, 3, 3), math.nan)), latent(1, 4, 3, 3), 1.0, 0.0, steps=2)


# ---------------------------------------------------------------- from picture to picture


QUICK = {"steps": 10, "seed": 0}


@pytest.fixture(scope="module")
def sd():
    return Model()


def redrawn(sd, picture, **options):
    return R.edit(sd, picture, "sdedit", **QUICK | options)


def test_a_picture_is_redrawn_as_its_latent_is(sd, picture):
    options = {"steps": 10, "strength": 0.4, "guidance_scale": 2.5, "eta": 0.5, "repeats": 2, "form": "ve", "seed": 3}
    done = R.edit(sd, picture, "sdedit", target="a zebra", negative_prompt="a car", **options)
    by_hand = S.sdedit(sd.eps, done.x0, sd.text(["a zebra"]), sd.text(["a car"]), **options)
    assert torch.equal(done.latent, by_hand) and done.evaluations == {"decode": 16}
    assert done.image.size == picture.size and done.mask is done.paste_mask is None
    assert options.items() <= done.settings.items() and json.loads(json.dumps(done.settings))["method"] == "sdedit"


def test_what_it_costs(sd, picture):
    before = sd.evaluations
    assert R.edit(sd, picture, "sdedit", target="a zebra", seed=0).evaluations == {"decode": 50}
    for options, rows in (
        ({}, 5), ({"guidance_scale": 1.0, "target": "a zebra"}, 5), ({"negative_prompt": "a car"}, 10),
        ({"target": "a zebra", "repeats": 3}, 30), ({"target": "a zebra", "mask": box()}, 10),
        ({"target": "a car", "negative_prompt": "a car"}, 5),
    ):  # fmt: skip
        assert redrawn(sd, picture, **options).evaluations == {"decode": rows}, options
    assert sd.evaluations - before == 50 + 5 + 5 + 10 + 30 + 10 + 5


def test_without_text_guidance_changes_nothing(sd, picture):
    plain, guided = (redrawn(sd, picture, guidance_scale=g) for g in (1.0, 7.5))
    assert torch.equal(plain.latent, guided.latent)


def test_outside_the_mask_the_picture_stays(sd, picture):
    done = redrawn(sd, picture, target="a zebra", mask=box())
    untouched = np.asarray(done.paste_mask) == 0
    assert 0.1 < untouched.mean() < 0.9
    assert np.array_equal(np.asarray(done.image)[untouched], np.asarray(picture)[untouched])
    outside = (done.latent_mask == 0).expand_as(done.x0)
    assert torch.equal(done.latent[outside], done.x0[outside])
    assert not torch.equal(done.latent[~outside], done.x0[~outside])
    plain = redrawn(sd, picture, target="a zebra", mask=box(), paste=False)
    assert plain.paste_mask is None and torch.equal(plain.latent, done.latent)
    assert not np.array_equal(np.asarray(plain.image)[untouched], np.asarray(picture)[untouched])


def test_a_patch_is_pasted_and_redrawn(sd, picture):
    laid, region = composite(picture, np.full((10, 20, 3), (255, 0, 0), dtype=np.uint8), (30, 20, 50, 30))
    done = redrawn(sd, laid, mask=region)
    assert 0 < done.latent_mask.mean() < 0.2 and done.image.tobytes() != laid.tobytes()


# ---------------------------------------------------------------- the command


@pytest.fixture
def here(tmp_path, monkeypatch, picture):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    box().save("m.png")
    return tmp_path


def said(capsys, *argv):
    command = ["edit", "in.png", "--method", "sdedit", "--steps", "4", "--json"]
    assert cli.main([*command, *map(str, argv)]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    return json.loads(out)


def test_the_command_writes_what_the_function_makes(here, folder, capsys, picture):
    options = ["--strength", "0.75", "--eta", "0.5", "--repeats", "2", "--guidance-scale", "2", "--mask", "m.png"]
    result = said(capsys, "--target", "a zebra", "--seed", "3", *options, "--model", folder, "-o", "o.png")
    assert result["output"] == "o.png" and result["seed"] == 3 and result["evaluations"] == {"decode": 12}
    assert result["method"] == "sdedit" and result["rows"] == {"predicted": 12, "paid": 12}
    assert result["versions"]["torch"] and result["model"]["id"] == str(folder) and result["seconds"]
    settings = {"strength": 0.75, "eta": 0.5, "repeats": 2, "guidance_scale": 2, "steps": 4, "seed": 3, "mask": box()}
    done = R.edit(StableDiffusion.load(folder, device="cpu"), picture, "sdedit", target="a zebra", **settings)
    with Image.open("o.png") as file:
        assert file.tobytes() == done.image.tobytes()


def test_what_stands_in_the_picture_makes_it_again(here, folder, capsys):
    """The seed is drawn; the file's own settings, as options, write the same file."""
    said(capsys, "--target", "a zebra", "--eta", "1", "--repeats", "2", "--model", folder)
    with Image.open("in-edited.png") as file:
        record = json.loads(file.info["minidiffedit"])
    assert record["method"] == "sdedit" and record["edited"] is True and record["mask"] == "none"
    names = ("target", "negative_prompt", "strength", "eta", "repeats", "steps", "guidance_scale", "seed", "form")
    again = [text for name in names for text in (f"--{name.replace('_', '-')}", str(record[name]))]
    said(capsys, *again, "--model", folder, "-o", "again.png")
    assert Path("again.png").read_bytes() == Path("in-edited.png").read_bytes()


@pytest.mark.parametrize("option, value, word, code", [
    ("--eta", "2", "eta", 1), ("--eta", "nan", "eta", 1), ("--repeats", "0", "repeats", 1), ("--form", "x", "form", 2),
    ("--strength", "2", "strength", 1), ("--source", "a", "--source", 2), ("-o", "m.png", "overwrite", 1),
])  # fmt: skip
def test_the_command_refuses_before_a_model_is_loaded(here, capsys, option, value, word, code):
    argv = ["edit", "in.png", "--method", "sdedit", "--mask", "m.png", option, value, "--model", "no-such-model"]
    try:
        assert cli.main(argv) == code
    except SystemExit as stop:
        assert stop.code == code
    out, err = capsys.readouterr()
    assert out == "" and word in err


# ---------------------------------------------------------------- each mistake turns a test red

# name: (where in methods/sdedit.py, what stands there, what a mistake would put, the test that must fail)
MUTATIONS = {
    "variance for its root": ("vp_noised", "math.sqrt(1 - a) * noise", "(1 - a) * noise",
        test_it_starts_from_the_stated_noise_at_the_stated_level),
    "no signal's scale": ("vp_noised", "math.sqrt(a) * x0", "x0",
        test_it_starts_from_the_stated_noise_at_the_stated_level),
    "VE from too weak a noise": ("ve_noised", "math.sqrt((1 - a) / a) * noise", "math.sqrt(1 - a) * noise",
        test_ve_and_vp_are_one_process),
    "VE not scaled to what the model takes": ("ve_step", "math.sqrt(a_to) * (x +", "(x +",
        test_ve_and_vp_are_one_process),
    "VE's sigma without its root": ("ve_step", "math.sqrt(1 - (s_to / s) ** 2)", "(1 - (s_to / s) ** 2)",
        test_ancestral_noise_has_the_papers_size_and_comes_in_order),
    "VE keeps the noise it replaces": ("ve_step", "math.sqrt(s_to**2 - sigma**2) - s", "s_to - s",
        test_ancestral_sampling_draws_from_the_predictors_gaussian),
    "VP keeps the noise it replaces": ("vp_step", "math.sqrt(1 - a_to - sigma**2) * e", "math.sqrt(1 - a_to) * e",
        test_ancestral_sampling_draws_from_the_predictors_gaussian),
    "sigma without its denominator": ("vp_step", "(1 - a_to) / (1 - a) *", "(1 - a_to) *",
        test_ancestral_noise_has_the_papers_size_and_comes_in_order),
    "no ancestral noise": ("vp_step", "return x + sigma * next(draw).to(x) if eta else x", "return x",
        test_ancestral_noise_has_the_papers_size_and_comes_in_order),
    "noise at eta 0": ("vp_step", "sigma = eta *", "sigma = (eta or 0.1) *",
        test_at_eta_zero_it_is_ddim_from_the_encodings_own_noise),
    "blend with the level just left": ("denoise", "start[j - 1]", "start[j]",
        test_outside_the_mask_every_level_holds_the_one_noise),
    "noise at level 0": ("noised", "[x0, *(add(x0, noise.to(x0), a[j]) for j in range(1,", "[*(add(x0, noise.to(x0), a[j]) for j in range(0,",
        test_the_whole_at_eta_zero_is_masked_decode_under_one_noise),
    "outside moves with the repeats": ("sdedit", "M * again + (1 - M) * outside[K]", "again",
        test_outside_the_mask_every_level_holds_the_one_noise),
    "repeats that continue the first picture": ("sdedit", "(y, next(draw)", "(x0, next(draw)",
        test_ancestral_noise_has_the_papers_size_and_comes_in_order),
    "repeats that share a noise": ("sdedit", "next(draw).to(y)", "first_noises_of(x0)",
        test_ancestral_noise_has_the_papers_size_and_comes_in_order),
    "one repeat only": ("sdedit", "range(repeats if K", "range(1 if K", test_rows_and_texts),
    "start one level up": ("denoise", "range(K, 0, -1)", "range(K - 1, 0, -1)",
        test_it_starts_from_the_stated_noise_at_the_stated_level),
    "the timestep of the level below": ("denoise", "eps(y, t[j], texts)", "eps(y, t[j - 1], texts)",
        test_it_starts_from_the_stated_noise_at_the_stated_level),
    "swap the guidance halves": ("sdedit", "[negative, target]", "[target, negative]",
        test_the_whole_at_eta_zero_is_masked_decode_under_one_noise),
    "a null row at guidance 1": ("sdedit", "or guidance_scale == 1", "", test_rows_and_texts),
    "rows for a guidance that cannot act": ("sdedit", "target is negative or", "", test_what_it_costs),
    "calls for an empty mask": ("sdedit", "if K and M.any() else 0", "if K else 0",
        test_empty_masks_and_strength_zero_return_the_source_without_a_call),
    "one seed for the batch": ("draws", "2**63 - b) + i for i", "2**63 - b) for i",
        test_images_of_a_batch_are_the_images_alone_and_the_global_generator_rests),
    "the global generator": ("draws", "generator=g, dtype", "dtype",
        test_images_of_a_batch_are_the_images_alone_and_the_global_generator_rests),
    "one draw for the batch": ("draws", "torch.cat([torch.randn((1, *one), generator=g, dtype=torch.float32) for g in generators])",
        "torch.randn((b, *one), generator=generators[0])",
            test_images_of_a_batch_are_the_images_alone_and_the_global_generator_rests),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, picture, monkeypatch):
    function, old, new, test = MUTATIONS[name]
    changed = mutant(f"methods.sdedit:{function}", old, new, monkeypatch)
    changed.first_noises_of = lambda x0: first_noises(x0, 1, seed=7)[0]
    monkeypatch.setattr(sys.modules[__name__], "S", changed)
    with pytest.raises((AssertionError, StopIteration, RuntimeError, IndexError)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(test, sd=sd, picture=picture)


@pytest.mark.parametrize("test", sorted({m[3] for m in MUTATIONS.values()}, key=lambda t: t.__name__))
def test_unchanged_sources_pass_in_the_same_harness(test, sd, picture, monkeypatch):
    same = load("methods.sdedit", source("methods.sdedit"), monkeypatch)
    monkeypatch.setattr(sys.modules[__name__], "S", same)
    run(test, sd=sd, picture=picture)
