"""The paper's ablation: what each of DiffEdit's two additions starts from, holds, shares and costs."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from mutants import mutant, run
from stubs import Model, gaussian
from tiny import box

from minidiffedit import encode, levels, masked_decode, noises
from minidiffedit import run as R

FEW = {"steps": 10, "target": "a zebra", "seed": 0}
QUICK = FEW | {"maps": 2, "source": "a horse"}


@pytest.fixture(scope="module")
def sd():
    return Model()


def everywhere(done):
    return torch.ones_like(done.x0[:, :1])


def same(one, other):
    return torch.equal(one.latent, other.latent) and one.image.tobytes() == other.image.tobytes()


def test_the_users_mask_is_diffedits(sd, picture):
    options = FEW | {"mask": box(), "negative_prompt": "blurry", "strength": 0.6, "guidance_scale": 2.0, "refine": 2}
    ours, theirs = (R.edit(sd, picture, method, **options) for method in ("user-mask", "diffedit"))
    assert same(ours, theirs) and ours.verdict == theirs.verdict == "given"
    assert ours.paste_mask.tobytes() == theirs.paste_mask.tobytes()


def test_without_mask_and_encoding_it_is_sdedit(sd, picture):
    for seed in (0, 7):
        bare = R.edit(sd, picture, "noise+encode-only", **FEW | {"seed": seed})
        assert same(bare, R.edit(sd, picture, "sdedit", strength=0.8, **FEW | {"seed": seed}))
        assert bare.found is bare.paste_mask is bare.coverage is None and bare.verdict == "edited"


def test_encoding_alone_has_no_mask(sd, picture):
    ours = R.edit(sd, picture, "encode-only", source="a horse", negative_prompt="blurry", guidance_scale=2.5, **FEW)
    null, zebra, blurry = (sd.text([prompt]) for prompt in ("", "a zebra", "blurry"))
    up = encode(sd.eps, ours.x0, null, steps=10)
    assert torch.equal(ours.latent, masked_decode(sd.eps, up, everywhere(ours), zebra, blurry, guidance_scale=2.5))
    assert ours.paste_mask is None


def test_the_mask_alone_starts_from_noise_and_holds_on_to_it(sd, picture):
    ours, both = (R.edit(sd, picture, method, **QUICK | {"seed": 5}) for method in ("mask-only", "diffedit"))
    assert torch.equal(ours.found.mask, both.found.mask) and torch.equal(ours.latent_mask, both.latent_mask)
    noise, a = noises(ours.x0.shape[1:], 1, 5), levels(10).a
    outside = (ours.latent_mask == 0).expand_as(ours.x0)
    assert 0 < outside.float().mean() < 1
    assert torch.equal(ours.decoded[0], a[8] ** 0.5 * ours.x0 + (1 - a[8]) ** 0.5 * noise)
    for j, y in zip(range(8, 0, -1), ours.decoded):
        assert torch.equal(y[outside], (a[j] ** 0.5 * ours.x0 + (1 - a[j]) ** 0.5 * noise)[outside])
    assert torch.equal(ours.latent[outside], ours.x0[outside])
    untouched = np.asarray(ours.paste_mask) == 0
    assert np.array_equal(np.asarray(ours.image)[untouched], np.asarray(picture)[untouched])


def test_reconstruction_has_one_text(sd, picture):
    for encode_text, text in (("null", ""), ("source", "a horse")):
        done = R.edit(sd, picture, "reconstruction", encode_text=encode_text, source="a horse", steps=10, seed=0)
        text = sd.text([text])
        up = encode(sd.eps, done.x0, text, steps=10)
        assert torch.equal(done.latent, masked_decode(sd.eps, up, everywhere(done), text, text, guidance_scale=1))
    for other in ({"target": "a"}, {"guidance_scale": 2.0}):
        with pytest.raises(ValueError, match="reconstruction has no option"):
            R.edit(sd, picture, "reconstruction", **other)


def test_reconstruction_comes_closer_with_the_step_count(sd, picture, monkeypatch):
    asked = []

    def smooth(x_t, t, texts):
        asked.append(len(texts))
        return gaussian(x_t, t, [0.3 for _ in texts])

    monkeypatch.setattr(sd, "eps", smooth)
    errors = []
    for steps in (10, 20, 40, 100):
        done = R.edit(sd, picture, "reconstruction", steps=steps, strength=1.0, seed=0)
        errors.append(float((done.latent - done.x0).norm() / done.x0.norm()))
    assert all(1.5 < one / two < 3 for one, two in pairwise(errors)), errors
    assert set(asked) == {1}


def test_what_each_costs(sd, picture):
    for method, options, rows in (
        ("noise+encode-only", FEW, {"encode": 0, "decode": 16}), ("encode-only", FEW, {"encode": 8, "decode": 16}),
        ("mask-only", QUICK, {"mask": 4, "encode": 0, "decode": 16}),
        ("diffedit", QUICK, {"mask": 4, "encode": 8, "decode": 16}),
        ("user-mask", FEW | {"mask": box()}, {"encode": 8, "decode": 16}),
        ("reconstruction", {"steps": 10, "seed": 0}, {"encode": 8, "decode": 8}),
    ):  # fmt: skip
        assert R.edit(sd, picture, method, **options).evaluations == rows, method


def test_no_edit_takes_a_random_start_for_an_encoding(sd, picture):
    random = R.edit(sd, picture, "mask-only", **QUICK)
    again = R.edit(sd, picture, reuse=random, **QUICK)
    assert again.evaluations == {"mask": 0, "encode": 8, "decode": 16}
    assert torch.equal(again.trajectory[8], encode(sd.eps, random.x0, sd.text([""]), steps=10)[8])


# name: (where in methods/, what stands there, what a mistake would put, the test that must fail)
MUTATIONS = {
    "the mask alone starts from another noise": ("inversions:noise", "draws(x0.shape, seed)",
        "draws(x0.shape, seed + 1)",
        test_the_mask_alone_starts_from_noise_and_holds_on_to_it),
    "a random start of another strength": ("inversions:noise", "strength=strength", "strength=0.5",
        test_without_mask_and_encoding_it_is_sdedit),
    "reconstruction under guidance": ("diffedit:reconstruct", "guidance_scale=1.0", "guidance_scale=7.5",
        test_what_each_costs),
    "reconstruction under the null text": ("diffedit:reconstruct",
        'source if encode_text == "source" else null', "null",
        test_reconstruction_has_one_text),
    "no mask is an empty mask": ("diffedit:decode_all", "torch.ones_like", "torch.zeros_like",
        test_encoding_alone_has_no_mask),
    "the negative prompt is lost": ("diffedit:decode_all", "null, target, negative", "null, target, target",
        test_encoding_alone_has_no_mask),
    "the guidance is lost": ("diffedit:decode_all", "guidance_scale=guidance_scale", "guidance_scale=7.5",
        test_encoding_alone_has_no_mask),
    "encoded under the source": ("inversions:ddim", 'source if encode_text == "source" else null', "source",
        test_encoding_alone_has_no_mask),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, picture, monkeypatch):
    place, old, new, test = MUTATIONS[name]
    mutant(f"methods.{place}", old, new, monkeypatch)  # the runner imports methods by name
    with pytest.raises((AssertionError, ValueError)):
        run(test, sd=sd, picture=picture, monkeypatch=monkeypatch)
