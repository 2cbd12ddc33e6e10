"""SD inpainting: what its UNet is shown, and the same latents as diffusers' pipeline on the same weights."""

import sys
import warnings

import numpy as np
import pytest
import tiny
import torch
from explicit import error
from mutants import load, mutant, run, source
from PIL import Image
from proofs import pipeline
from stubs import Model, Shown, latent
from tiny import box

from minidiffedit import StableDiffusion, Steering, levels, noises
from minidiffedit import run as R
from minidiffedit.cost import cost
from minidiffedit.files import images
from minidiffedit.methods import inpainting as I

N = 5
OPTIONS = {"target": "a zebra", "steps": N, "seed": 3}


@pytest.fixture(scope="module")
def model():
    return Model("inpainting")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("inpainting") / "tiny", channels=9)


def filled(sd, picture, **options):
    return R.edit(sd, picture, "sd-inpainting", **OPTIONS | options)


def test_the_unet_sees_the_noisy_latent_the_mask_and_the_picture_without_its_inside(model):
    x0, outside = latent(2, 4, 6, 5, dtype=torch.float32), latent(2, 4, 6, 5, seed=1, dtype=torch.float32)
    mask, eps = torch.zeros(2, 1, 6, 5), Shown(model)
    mask[:, :, 2:4, 1:4] = 1
    target, negative = model.text(["a zebra"]), model.text(["blurry"])
    y = I.inpaint(eps, x0, mask, outside, target, negative, steps=N, seed=3)
    assert [t for _, t, _, _ in eps.calls] == list(levels(N).t[:0:-1]) and y.shape == x0.shape
    assert torch.equal(eps.calls[0][0], torch.cat([noises((4, 6, 5), 1, seed) for seed in (3, 4)]))
    for _, _, texts, given in eps.calls:
        assert texts[0] is negative and texts[1] is target
        assert torch.equal(given[:, :1], mask) and torch.equal(given[:, 1:], outside)
    x, (t, a) = eps.calls[0][0], levels(N)
    for j in range(N, 0, -1):  # plain guided DDIM, from the definition
        e_null, e_text = model.eps(x, t[j], [negative, target], given=torch.cat([mask, outside], dim=1))
        e = e_null + 7.5 * (e_text - e_null)
        x = a[j - 1] ** 0.5 * (x - (1 - a[j]) ** 0.5 * e) / a[j] ** 0.5 + (1 - a[j - 1]) ** 0.5 * e
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


def test_the_picture_without_its_inside_is_grey_there(model, picture, monkeypatch):
    """The latent of the picture with grey on every pixel of a cell whose mask is one half or more."""
    encoded, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda pixels: encoded.append(pixels) or encode(pixels))
    mask = np.zeros((8, 10), dtype=np.float32)
    mask[2:5, 3:6], mask[6, :] = 1.0, 0.4
    done = filled(model, picture, mask=mask)
    whole, outside = encoded
    inside = torch.from_numpy(np.kron(mask, np.ones((8, 8)))) >= 0.5
    assert torch.equal(whole, images.to_tensor(picture, (80, 64))) and inside.sum() == 9 * 64
    assert (outside[:, :, inside] == 0).all() and torch.equal(outside[:, :, ~inside], whole[:, :, ~inside])
    assert done.evaluations == {"decode": 2 * N} and torch.equal(done.latent_mask[0, 0], torch.from_numpy(mask))


def test_it_is_diffusers_pipeline(weights, tmp_path):
    """From the file to the last latent: loader, masked picture, order of the channels, scheduler."""
    from diffusers import StableDiffusionInpaintPipeline

    sd = StableDiffusion.load(weights, device="cpu")
    assert sd.kind == "inpainting" and sd.further == 5
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 8, 48, 40))  # whole cells
    peer = pipeline(StableDiffusionInpaintPipeline, weights, tmp_path)
    quant = peer.vae.quant_conv  # its pipeline draws from the posterior: without variance that is the mean, as here
    with torch.no_grad():
        quant.weight[4:], quant.bias[4:] = 0, -60
    for options in ({}, {"negative_prompt": "blurry", "guidance_scale": 2.0}):
        theirs = peer(
            "a zebra", image=picture, mask_image=mask, height=64, width=64, num_inference_steps=N, strength=1.0,
            latents=noises((4, 8, 8), 1, 3), output_type="latent", **{"guidance_scale": 7.5} | options,
        ).images  # fmt: skip
        ours = filled(sd, picture, mask=mask, paste=False, **options)
        assert error(ours.latent, theirs) < 1e-4 and ours.evaluations == {"decode": 2 * N}
        moved = filled(sd, picture, mask=Image.new("L", (64, 64), 255), paste=False, **options)
        assert error(moved.latent, theirs) > 1e-2  # a bound that another mask would not meet


def test_what_lies_outside_is_pasted_back(model, picture):
    done, plain = (filled(model, picture, mask=box(), paste=paste) for paste in (True, False))
    untouched = np.asarray(done.paste_mask) == 0
    assert 0.1 < untouched.mean() < 0.9 and plain.paste_mask is None and torch.equal(done.latent, plain.latent)
    assert np.array_equal(np.asarray(done.image)[untouched], np.asarray(picture)[untouched])
    assert not np.array_equal(np.asarray(plain.image)[untouched], np.asarray(picture)[untouched])


def test_a_mask_is_needed_and_an_empty_one_leaves_the_picture(model, picture):
    with pytest.raises(ValueError, match="sd-inpainting needs mask"):
        filled(model, picture)
    before = model.evaluations
    with pytest.warns(UserWarning, match="nothing to edit: the mask is empty"):
        done = filled(model, picture, mask=Image.new("L", (93, 75)))
    assert done.image.tobytes() == picture.tobytes() and model.evaluations == before


def test_on_the_tiny_network(inpainting, picture):
    done = filled(inpainting, picture, mask=box())
    assert done.evaluations == {"decode": 2 * N} and done.image.size == picture.size and done.seed == 3
    other = filled(inpainting, picture, mask=box(), seed=4)
    assert not torch.equal(done.latent, other.latent) and torch.equal(done.x0, other.x0)


def test_inpaint_anything_fills_a_mask_or_replaces_what_surrounds_it(inpainting, picture):
    """Both are this inpainting, under a given mask and under its inverse; what finds the mask is another network."""
    mask = np.zeros((8, 10), dtype=np.float32)
    mask[2:5, 3:6] = 1
    fill, replace = (
        R.edit(inpainting, picture, "inpaint-anything", mask=mask, steering=Steering(invert=invert), **OPTIONS)
        for invert in (False, True)
    )
    assert fill.latent.equal(filled(inpainting, picture, mask=mask).latent)
    assert replace.latent.equal(filled(inpainting, picture, mask=1 - mask).latent)
    assert (
        fill.evaluations
        == replace.evaluations
        == {"decode": 2 * N}
        == cost(R.plan("inpaint-anything", mask=box(), **OPTIONS))
    )
    kept = np.asarray(fill.paste_mask) == 0
    assert kept.any() and (np.asarray(fill.image)[kept] == np.asarray(picture)[kept]).all()


# name: (where, what stands there, what a mistake would put, the test that must fail)
MUTATIONS = {
    "the mask behind the picture": ("methods.inpainting:inpaint", "[mask.to(x), x0_outside.to(x)]",
        "[x0_outside.to(x), mask.to(x)]",
        test_the_unet_sees_the_noisy_latent_the_mask_and_the_picture_without_its_inside),
    "1 = keep": ("methods.inpainting:inpaint", "mask.to(x),", "1 - mask.to(x),",
        test_the_unet_sees_the_noisy_latent_the_mask_and_the_picture_without_its_inside),
    "the whole picture": ("methods.inpainting:inpaint", "x0_outside.to(x)", "x0.to(x)",
        test_the_unet_sees_the_noisy_latent_the_mask_and_the_picture_without_its_inside),
    "the texts change places": ("methods.inpainting:inpaint", "[negative, target]", "[target, negative]",
        test_the_unet_sees_the_noisy_latent_the_mask_and_the_picture_without_its_inside),
    "another seed": ("methods.inpainting:inpaint", "draws(x0.shape, seed)", "draws(x0.shape, 0)",
        test_on_the_tiny_network),
    "grey outside": ("job:Job.x0_outside", ">= 0.5", "< 0.5", test_the_picture_without_its_inside_is_grey_there),
    "grey at the faintest": ("job:Job.x0_outside", ">= 0.5", "> 0", test_the_picture_without_its_inside_is_grey_there),
    "black for grey": ("job:Job.x0_outside", "inside, 0.0,", "inside, -1.0,",
        test_the_picture_without_its_inside_is_grey_there),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, model, inpainting, picture, monkeypatch):
    place, old, new, test = MUTATIONS[name]
    changed = mutant(place, old, new, monkeypatch)
    of_job = place.startswith("job")
    changed = load("run", source("run"), monkeypatch) if of_job else changed
    monkeypatch.setattr(sys.modules[__name__], "R" if of_job else "I", changed)
    if place.startswith("methods") and test is test_on_the_tiny_network:
        seeds = [filled(inpainting, picture, mask=box(), seed=seed).latent for seed in (3, 4)]
        assert torch.equal(*seeds)
    with pytest.raises((AssertionError, RuntimeError)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(test, model=model, inpainting=inpainting, picture=picture, monkeypatch=monkeypatch)
