"""The arms of the ablation: what each starts from, holds, shares and costs. `A` is exchanged by the mutations."""

import sys
import warnings
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import test_sdedit
import torch
from mutants import mutant
from PIL import Image
from stubs import gaussian

from minidiffedit import arms as A
from minidiffedit import edit, encode, levels, masked_decode, noises, sdedit

QUICK = {"steps": 10, "maps": 2, "target": "a zebra", "source": "a horse", "seed": 0}
ARMS = get_args(A.Arm)


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 93, 3), dtype=np.uint8))


def box():
    mask = Image.new("L", (93, 75))
    mask.paste(255, (20, 10, 50, 40))
    return mask


def mask_of(name):
    return {"mask": box()} if name == "user mask" else {}


def equal(one, other):
    return torch.equal(one.latent, other.latent) and one.image.tobytes() == other.image.tobytes()


def test_both_is_edit(sd, picture):
    for options in ({}, {"strength": 0.5, "guidance_scale": 2.5, "negative_prompt": "a car", "refine": 2, "paste": False},
                    {"encode_text": "source", "mask_strength": 0.3, "mask_clip": 2.0, "mask_threshold": 0.4}):  # fmt: skip
        ours, theirs = A.arm(sd, picture, "both", **QUICK | options), edit(sd, picture, **QUICK | options)
        assert equal(ours, theirs) and torch.equal(ours.found.maps, theirs.found.maps)
        assert ours.evaluations == theirs.evaluations and ours.verdict == theirs.verdict
        assert ours.mask.tobytes() == theirs.mask.tobytes() and ours.settings == theirs.settings | {"arm": "both"}
        assert all(torch.equal(a, b) for a, b in zip(ours.decoded, theirs.decoded, strict=True))


def test_the_user_mask_is_edits(sd, picture):
    ours, theirs = A.arm(sd, picture, "user mask", mask=box(), **QUICK), edit(sd, picture, mask=box(), **QUICK)
    assert equal(ours, theirs) and ours.verdict == theirs.verdict == "given"
    assert ours.paste_mask.tobytes() == theirs.paste_mask.tobytes()


def test_the_sdedit_arm_is_sdedit(sd, picture):
    for seed in (0, 7):
        ours = A.arm(sd, picture, "sdedit", **QUICK | {"seed": seed})
        assert equal(ours, sdedit(sd, picture, target="a zebra", strength=0.8, steps=10, seed=seed))
        assert ours.found is ours.paste_mask is None and ours.coverage == 1 and ours.verdict == "no mask"


def test_encode_alone_has_no_mask(sd, picture):
    ours = A.arm(sd, picture, "encode", **QUICK)
    text = [sd.text([prompt]) for prompt in ("", "a zebra")]
    up = encode(sd.eps, ours.x0, text[0], steps=10)
    assert torch.equal(ours.latent, masked_decode(sd.eps, up, torch.ones_like(ours.x0[:, :1]), text[1], text[0]))
    assert ours.paste_mask is None


def test_the_mask_alone_starts_from_noise_and_holds_on_to_it(sd, picture):
    ours, both = (A.arm(sd, picture, name, **QUICK | {"seed": 5}) for name in ("mask", "both"))
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


def test_what_each_arm_costs(sd, picture):
    rows = {"sdedit": (0, 0, 16), "encode": (0, 8, 16), "mask": (4, 0, 16), "both": (4, 8, 16), "user mask": (0, 8, 16),
            "reconstruction": (0, 8, 8)}  # fmt: skip
    assert rows.keys() == set(ARMS)
    for name, expected in rows.items():
        before = sd.evaluations
        done = A.arm(sd, picture, name, **mask_of(name), **QUICK)
        assert tuple(done.evaluations.values()) == expected and sd.evaluations - before == sum(expected), name
        assert done.settings["arm"] == name and type(done).__name__ == "Edit"


def test_arms_share_what_they_have_in_common(sd, picture):
    """All six: one mask, one encoding; each result as it is alone, bit for bit."""
    rows, done = {}, []
    for name in ARMS:
        one = A.arm(sd, picture, name, reuse=done, **mask_of(name), **QUICK | {"seed": None if done else 0})
        assert equal(one, A.arm(sd, picture, name, **mask_of(name), **QUICK)), name
        rows[name] = tuple(one.evaluations.values())
        done.append(one)
    other_noise = A.arm(sd, picture, "sdedit", reuse=done, **QUICK | {"seed": 1})
    assert equal(other_noise, A.arm(sd, picture, "sdedit", **QUICK | {"seed": 1}))
    assert rows == {"sdedit": (0, 0, 16), "encode": (0, 8, 16), "mask": (4, 0, 16), "both": (0, 0, 16),
                    "user mask": (0, 0, 16), "reconstruction": (0, 0, 8)}  # fmt: skip


def test_arms_share_nothing_that_a_setting_changes(sd, picture):
    done = [A.arm(sd, picture, name, **QUICK) for name in ("sdedit", "both")]
    for changed, expected in (
        ({"strength": 0.5}, (0, 0, 10)), ({"strength": 1.0}, (0, 10, 20)), ({"seed": 1}, (4, 0, 16)),
        ({"target": "a cow"}, (4, 0, 16)), ({"source": "a dog"}, (4, 0, 16)), ({"mask_threshold": 0.3}, (4, 0, 16)),
        ({"mask_clip": None}, (4, 0, 16)), ({"maps": 3}, (6, 0, 16)), ({"refine": 2}, (0, 16, 16)),
        ({"encode_text": "source"}, (0, 8, 16)), ({"steps": 5}, (4, 4, 8)),
    ):  # fmt: skip
        one = A.arm(sd, picture, "both", reuse=done, **QUICK | changed)
        assert tuple(one.evaluations.values()) == expected, changed
        assert equal(one, edit(sd, picture, **QUICK | changed)), changed


def test_no_edit_takes_a_random_start_for_an_encoding(sd, picture):
    random = A.arm(sd, picture, "mask", **QUICK)
    again = edit(sd, picture, reuse=random, **QUICK)
    assert again.evaluations["encode"] == 8 and torch.equal(again.trajectory[8], encode_of(sd, random.x0)[8])


def encode_of(sd, x0):
    return encode(sd.eps, x0, sd.text([""]), steps=10)


def test_reconstruction_comes_closer_with_the_step_count(sd, picture, monkeypatch):
    asked = []

    def smooth(x_t, t, texts):
        asked.append(len(texts))
        return gaussian(x_t, t, [0.3 for _ in texts])

    monkeypatch.setattr(sd, "eps", smooth)
    errors = []
    for steps in (10, 20, 40, 100):
        done = A.arm(sd, picture, "reconstruction", target="a zebra", steps=steps, strength=1.0, seed=0)
        errors.append(float((done.latent - done.x0).norm() / done.x0.norm()))
    assert all(1.5 < one / two < 3 for one, two in pairwise(errors)), errors
    assert set(asked) == {1}


def test_reconstruction_has_one_text(sd, picture):
    plain = A.arm(sd, picture, "reconstruction", **QUICK)
    assert plain.settings["target"] == "" and plain.settings["guidance_scale"] == 1
    named = A.arm(sd, picture, "reconstruction", encode_text="source", **QUICK)
    horse, everything = sd.text(["a horse"]), torch.ones_like(named.x0[:, :1])
    up = encode(sd.eps, named.x0, horse, steps=10)
    assert torch.equal(named.latent, masked_decode(sd.eps, up, everything, horse, horse, guidance_scale=1))


@pytest.mark.parametrize("name", ARMS)
def test_strength_zero_returns_the_source(sd, picture, name):
    before = sd.evaluations
    with pytest.warns(UserWarning, match="nothing to edit: .*level 0"):
        done = A.arm(sd, picture, name, **mask_of(name), **QUICK | {"strength": 0.0})
    assert done.image.tobytes() == picture.tobytes() and torch.equal(done.latent, done.x0)
    assert sd.evaluations == before and done.verdict == "strength 0" and list(done.trajectory) == [0]


def test_equal_prompts_leave_the_masked_arms_nothing(sd, picture):
    for name in ("mask", "both"):
        with pytest.warns(UserWarning, match="prompts do not differ"):
            done = A.arm(sd, picture, name, **QUICK | {"target": "a horse"})
        assert done.image.tobytes() == picture.tobytes() and done.verdict == "no difference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert A.arm(sd, picture, "encode", **QUICK | {"target": "a horse"}).evaluations["decode"] == 16


def test_what_is_refused(sd, picture):
    first, before = edit(sd, picture, **QUICK | {"steps": 1}), sd.evaluations
    other = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for image, name, options, why in (
        (picture, "all", {}, "name must be one of sdedit"), (picture, "user mask", {}, "'user mask'"),
        (picture, "both", {"mask": box()}, "not to 'both'"), (picture, "sdedit", {"steps": 0}, "steps"),
        (other, "both", {"reuse": [first]}, "another picture"), (picture, "both", {"maps": 0}, "maps"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            A.arm(sd, image, name, **QUICK | options)
    assert sd.evaluations == before


def test_the_global_generator_rests(sd, picture):
    state = torch.random.get_rng_state()
    A.arm(sd, picture, "mask", **QUICK)
    assert torch.equal(torch.random.get_rng_state(), state)


# name: (what stands in arms.py, what a mistake would put, the test that must fail)
MUTATIONS = {
    "the mask alone starts from the encoding": ('RANDOM_START = ("sdedit", "mask")', 'RANDOM_START = ("sdedit",)',
        test_the_mask_alone_starts_from_noise_and_holds_on_to_it),
    "SDEdit under a mask": ('COMPUTED_MASK = ("mask", "both")', 'COMPUTED_MASK = ("mask", "both", "sdedit")', test_the_sdedit_arm_is_sdedit),
    "another seed's random start": ('draws(x0.shape, settings["seed"])', "draws(x0.shape, 0)", test_the_mask_alone_starts_from_noise_and_holds_on_to_it),
    "a random start passes for an encoding": ('"encoded_text": None if name in RANDOM_START else null', '"encoded_text": null',
        test_no_edit_takes_a_random_start_for_an_encoding),
    "an encoding for a random start": ("if name in RANDOM_START:", "if name in RANDOM_START and not encoded:", test_arms_share_what_they_have_in_common),
    "a mask of another seed": ('"source", "seed", "steps"', '"source", "steps"', test_arms_share_nothing_that_a_setting_changes),
    "a mask of another threshold": ('"mask_clip", "mask_threshold"', '"mask_clip"', test_arms_share_nothing_that_a_setting_changes),
    "an encoding of another text": ('earlier("steps", "refine", "encoded_text")', 'earlier("steps", "refine")', test_arms_share_nothing_that_a_setting_changes),
    "reconstruction under guidance": ('{"target": null, "guidance_scale": 1.0}', '{"target": null}', test_what_each_arm_costs),
    "reconstruction under the target": ('{"target": null, "guidance_scale": 1.0}', '{"guidance_scale": 1.0}', test_reconstruction_has_one_text),
    "no mask is an empty mask": ('float(kind == "none")', "0.0", test_what_each_arm_costs),
    "pixels put back unasked": ('M if paste and kind != "none" else None', 'M if kind != "none" else None', test_both_is_edit),
    "pixels put back where there is no mask": ('M if paste and kind != "none" else None', "M if paste else None", test_the_sdedit_arm_is_sdedit),
    "rows for a guidance that cannot act": ('1.0 if target == negative_prompt else settings["guidance_scale"]', 'settings["guidance_scale"]',
        test_sdedit.test_what_it_costs),
    "the form is dropped": ('settings["repeats"], form=form,', 'settings["repeats"],', test_sdedit.test_a_picture_is_redrawn_as_its_latent_is),
    "a patch without its mask": ("Image.composite(laid, picture, region)", "laid", test_sdedit.test_a_patch_is_pasted_and_redrawn),
    "the negative prompt is lost": ("text[negative_prompt],\n                guidance", "text[null],\n                guidance", test_both_is_edit),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, picture, monkeypatch):
    old, new, test = MUTATIONS[name]
    changed = mutant("arms", old, new, monkeypatch)
    for tests in (sys.modules[__name__], test_sdedit):
        monkeypatch.setattr(tests, "A", changed)
    with pytest.raises((AssertionError, KeyError)):
        test(sd, picture)
