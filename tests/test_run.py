"""From picture to picture on a tiny random model: counts, reuse, doors, determinism."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from minidiffedit import edit, editor, encode, find_mask, generate, masked_decode, noises, picture_mask, sample
from minidiffedit.files.images import grey_picture

QUICK = {"steps": 10, "maps": 2, "target": "a zebra", "source": "a horse", "seed": 0}


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 93, 3), dtype=np.uint8))


def box(size=(93, 75)):
    mask = Image.new("L", size)
    mask.paste(255, (20, 10, 50, 40))
    return mask


def test_the_default_edit_costs_140_rows(sd, picture):
    before = sd.evaluations
    done = edit(sd, picture, target="a zebra", source="a horse", seed=0)
    assert done.verdict == "found" and done.evaluations == {"mask": 20, "encode": 40, "decode": 80}
    assert sd.evaluations - before == 140
    assert done.image.size == done.mask.size == picture.size and done.image.mode == "RGB" and done.mask.mode == "L"
    assert max(done.trajectory) == 40 and len(done.decoded) == 41 and done.heat.shape == done.latent_mask.shape
    assert set(done.seconds) == {"text", "vae encode", "mask", "encode", "decode", "vae decode"}


def test_outside_the_paste_mask_every_pixel_is_the_inputs(sd, picture):
    done = edit(sd, picture, mask=box(), **QUICK)
    untouched = np.asarray(done.paste_mask) == 0
    assert 0.1 < untouched.mean() < 0.9 and done.verdict == "given" and done.evaluations["mask"] == 0
    assert np.array_equal(np.asarray(done.image)[untouched], np.asarray(picture)[untouched])
    assert not np.array_equal(np.asarray(done.image)[~untouched], np.asarray(picture)[~untouched])
    inside = np.asarray(box()) > 0
    assert (np.asarray(done.paste_mask)[inside] == 255).all()
    plain = edit(sd, picture, mask=box(), paste=False, **QUICK)
    assert plain.paste_mask is None and torch.equal(plain.latent, done.latent)
    assert np.array_equal(np.asarray(plain.image)[inside], np.asarray(done.image)[inside])
    assert not np.array_equal(np.asarray(plain.image)[untouched], np.asarray(picture)[untouched])


def test_same_seed_same_bits_and_the_global_generator_rests(sd, picture):
    state = torch.random.get_rng_state()
    one, two = edit(sd, picture, **QUICK), edit(sd, picture, **QUICK)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one.latent, two.latent) and one.image.tobytes() == two.image.tobytes()
    other = edit(sd, picture, **QUICK | {"seed": 1})
    assert not torch.equal(other.found.maps, one.found.maps)
    drawn = edit(sd, picture, **QUICK | {"seed": None})
    again = edit(sd, picture, **QUICK | {"seed": drawn.seed})
    assert torch.equal(drawn.latent, again.latent)


def test_chunks_change_rounding_only(sd, picture):
    maps = [edit(sd, picture, **QUICK | {"maps": 5, "chunk": chunk}).found.maps for chunk in (1, 2, 5)]
    assert all((m - maps[0]).norm() <= 1e-5 * maps[0].norm() for m in maps)


@pytest.mark.parametrize("options, verdict, why", [
    ({"strength": 0.0}, "strength 0", "level 0"), ({"target": "a horse"}, "no difference", "prompts do not differ"),
    ({"mask": Image.new("L", (93, 75))}, "given", "mask is empty"),
    ({"strength": 0.0, "mask": Image.new("L", (93, 75), 255)}, "strength 0", "level 0"),
])  # fmt: skip
def test_nothing_to_edit_returns_the_source(sd, picture, options, verdict, why):
    before = sd.evaluations
    with pytest.warns(UserWarning, match=f"nothing to edit: .*{why}"):
        done = edit(sd, picture, **QUICK | options)
    assert done.image.tobytes() == picture.tobytes() and torch.equal(done.latent, done.x0)
    assert sd.evaluations == before and done.paste_mask is None and done.verdict == verdict


def test_every_setting_reaches_its_place(sd, picture, monkeypatch):
    """Distinct values for all; what each loop is called with."""
    seen = {}

    def spy(name, loop):
        def spied(*args, **options):
            seen[name] = options
            return loop(*args, **options)

        monkeypatch.setattr(editor, name, spied)

    for name in ("find_mask", "encode", "masked_decode", "sample"):
        spy(name, getattr(editor, name))
    settings = {
        "steps": 8, "strength": 0.75, "guidance_scale": 2.5, "mask_strength": 0.25, "maps": 3, "mask_clip": 4.0,
        "mask_threshold": 0.3, "refine": 2, "seed": 9, "chunk": 2,
    }  # fmt: skip
    done = edit(sd, picture, target="a zebra", source="a horse", **settings)
    expected = {
        "find_mask": {"steps": 8, "strength": 0.25, "maps": 3, "clip": 4.0, "threshold": 0.3, "seed": 9, "chunk": 2},
        "encode": {"steps": 8, "strength": 0.75, "refine": 2},
        "masked_decode": {"guidance_scale": 2.5},
    }
    for name, options in expected.items():
        assert {key: seen[name][key] for key in options} == options
    assert settings.items() <= done.settings.items() and done.coverage == float(done.latent_mask.mean())
    alone = picture_mask(sd, picture, target="a zebra", source="a horse", **{k: settings[k] for k in (
        "steps", "mask_strength", "maps", "mask_clip", "mask_threshold", "seed", "chunk")})  # fmt: skip
    assert {key: seen["find_mask"][key] for key in expected["find_mask"]} == expected["find_mask"]
    assert alone.heat.tobytes() == grey_picture(done.heat, picture.size).tobytes() != alone.mask.tobytes()
    generate(sd, "a horse", steps=4, guidance_scale=2.5, seed=1)
    assert (seen["sample"]["steps"], seen["sample"]["guidance_scale"]) == (4, 2.5)


def test_numpy_settings_become_plain(sd, picture):
    numbers = {"steps": np.int64(4), "maps": np.int32(2), "seed": np.int64(3), "strength": np.float32(0.5)}
    done = edit(sd, picture, target="a zebra", **numbers)
    assert json.loads(json.dumps(done.settings))["strength"] == 0.5
    plain = edit(sd, picture, target="a zebra", steps=4, maps=2, seed=3, strength=0.5)
    assert torch.equal(done.latent, plain.latent)


def test_soft_masks_blend_once(sd, picture):
    """Soft values act in the latents; the paste only guards what lies outside."""
    soft = np.full((75, 93), 0.5, dtype=np.float32)
    pasted, plain = (edit(sd, picture, mask=soft, paste=paste, **QUICK) for paste in (True, False))
    assert pasted.image.tobytes() == plain.image.tobytes() and pasted.paste_mask.getextrema() == (255, 255)


def test_the_model_in_a_batch(sd):
    """On the model itself: images of a batch equal the images alone to rounding."""
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = [sd.text([prompt]) for prompt in ("a horse", "a zebra", "")]

    def run(x, seed):
        found = find_mask(sd.eps, x, text[1], text[0], steps=10, maps=2, seed=seed)
        up = encode(sd.eps, x, text[2], steps=10)
        return found.maps, up[max(up)], masked_decode(sd.eps, up, torch.ones(1, 1, 8, 8), text[1], text[2])

    together = run(x0, 5)
    for i in range(3):
        # Guidance at 7.5 multiplies the rounding of a random net's predictions: 1e-4 for the final latent.
        for one, many, bound in zip(run(x0[i : i + 1], 5 + i), together, (1e-5, 1e-5, 1e-4)):
            assert (one[0] - many[i]).norm() <= bound * many[i].norm()


def test_negative_prompt_and_prompt_keep_their_sides(sd):
    one = generate(sd, "a horse", negative_prompt="a car", steps=4, seed=0)
    text = [sd.text([prompt]) for prompt in ("a horse", "a car")]
    by_hand = sample(sd.eps, noises((4, 8, 8), 1, 0), text[0], text[1], steps=4)
    assert torch.equal(one.latent, by_hand)


def test_a_further_edit_costs_mask_and_decode(sd, picture):
    first = edit(sd, picture, **QUICK)
    cow = edit(sd, picture, reuse=first, **QUICK | {"target": "a cow", "seed": None})
    assert cow.evaluations == {"mask": 2, "encode": 0, "decode": 16} and cow.seed == 0
    fresh = edit(sd, picture, **QUICK | {"target": "a cow"})
    assert torch.allclose(cow.latent, fresh.latent, rtol=1e-4, atol=1e-5)
    for changed, rows in [
        ({"strength": 0.5}, (0, 0, 10)), ({"strength": 1.0}, (0, 10, 20)), ({"mask_threshold": 0.3}, (0, 0, 16)),
        ({"seed": 1}, (4, 0, 16)), ({"source": "a dog"}, (4, 0, 16)), ({"steps": 5}, (4, 4, 8)),
        ({"encode_text": "source"}, (0, 8, 16)), ({"mask": box()}, (0, 0, 16)), ({"guidance_scale": 1.0}, (0, 0, 8)),
        ({"refine": 2}, (0, 16, 16)), ({"mask_strength": 0.3}, (4, 0, 16)), ({"maps": 3}, (6, 0, 16)),
        ({"encode_text": "source", "source": ""}, (4, 0, 16)),
    ]:  # fmt: skip
        done = edit(sd, picture, reuse=first, **QUICK | changed)
        assert tuple(done.evaluations.values()) == rows, changed
        alone = edit(sd, picture, **QUICK | changed)
        assert torch.allclose(done.latent, alone.latent, rtol=1e-4, atol=1e-5), changed


def test_reuse_compares_what_was_encoded(sd, picture):
    named = edit(sd, picture, encode_text="source", **QUICK)
    unnamed = edit(sd, picture, reuse=named, **QUICK | {"source": "", "encode_text": "source"})
    assert unnamed.evaluations["encode"] == 8


def test_reuse_of_something_else_is_refused(sd, picture):
    first = edit(sd, picture, **QUICK)
    turned = Image.frombytes("RGB", (75, 93), picture.tobytes())
    with pytest.raises(ValueError, match=r"another picture|working size"):
        edit(sd, turned, reuse=first, **QUICK)
    with pytest.raises(ValueError, match="another picture"):
        edit(sd, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), reuse=first, **QUICK)
    with pytest.raises(ValueError, match="working size"):
        edit(sd, picture, reuse=first, size=128, **QUICK)


def test_each_prompt_has_its_place(sd, picture, monkeypatch):
    """Which text conditions which pass: mask target/source, encode null or source, decode target/negative."""
    prompts, asked = {}, []
    text, eps = sd.text, sd.eps

    def named_text(texts):
        made = text(texts)
        prompts[id(made)] = (texts[0], made)
        return made

    def spying_eps(x_t, t, texts):
        asked.append([prompts[id(one)][0] for one in texts])
        return eps(x_t, t, texts)

    monkeypatch.setattr(sd, "text", named_text)
    monkeypatch.setattr(sd, "eps", spying_eps)
    for encode_text, encoded in (("null", ""), ("source", "a horse")):
        asked.clear()
        edit(sd, picture, negative_prompt="blurry", encode_text=encode_text, **QUICK)
        assert asked == [["a zebra", "a horse"]] + [[encoded]] * 8 + [["blurry", "a zebra"]] * 8
    assert len(prompts) <= 8  # every distinct prompt once per edit


def test_the_mask_alone_is_the_edits(sd, picture):
    alone = picture_mask(sd, picture, target="a zebra", source="a horse", steps=10, maps=2, seed=0)
    done = edit(sd, picture, **QUICK)
    assert torch.equal(alone.found.mask, done.found.mask) and alone.mask.tobytes() == done.mask.tobytes()
    assert alone.evaluations == {"mask": 4} and alone.mask.size == picture.size


@pytest.mark.parametrize("size", [(64, 64), (301, 203), (20, 100), (8, 64), (64, 8)])
def test_any_size_comes_back(sd, size):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    done = edit(sd, picture, **QUICK | {"steps": 2})
    assert done.image.size == size and all(side % 8 == 0 for side in done.settings["working_size"])


@pytest.mark.parametrize("options", [
    {"steps": 0}, {"steps": 1000}, {"strength": 1.5}, {"strength": math.nan}, {"strength": "0.8"}, {"strength": None},
    {"guidance_scale": math.inf}, {"guidance_scale": None}, {"maps": 0}, {"mask_clip": -1.0}, {"mask_threshold": 2.0},
    {"mask_strength": -0.5}, {"seed": -1}, {"seed": 1.5}, {"size": 32}, {"size": 2048}, {"encode_text": "nothing"},
    {"refine": 0}, {"chunk": 0}, {"target": None}, {"target": "\ud800"}, {"mask": np.full((75, 93), np.nan)},
    {"mask": np.zeros((5, 5))},
])  # fmt: skip
def test_arguments_are_refused_before_any_row(sd, picture, options):
    before = sd.evaluations
    with pytest.raises(ValueError):
        edit(sd, picture, **QUICK | options)
    assert sd.evaluations == before


def test_nan_is_an_error_not_a_picture(sd, picture, monkeypatch):
    monkeypatch.setattr(sd, "decode", lambda latent: torch.full((1, 3, 64, 80), math.nan))
    with pytest.raises(ArithmeticError, match="VAE"):
        edit(sd, picture, **QUICK)


def test_generate(sd, monkeypatch):
    one = generate(sd, "a horse", steps=4, seed=0)
    assert one.image.size == (64, 64) and one.evaluations == {"generate": 8}
    assert torch.equal(one.latent, generate(sd, "a horse", steps=4, seed=0).latent)
    wide = generate(sd, "a horse", steps=2, seed=0, width=136, height=64, guidance_scale=1)
    assert wide.image.size == (136, 64) and wide.evaluations == {"generate": 2}
    for options in ({"width": 63}, {"width": 60}, {"width": 0}, {"height": 32768}, {"seed": -1}, {"steps": 0}):
        with pytest.raises(ValueError):
            generate(sd, "a horse", **options)
    monkeypatch.setattr(editor.images, "MOST_PIXELS", 64 * 64)
    with pytest.raises(ValueError, match="got 72 x 64"):  # the side that was not given counts, too
        generate(sd, "a horse", width=72)


def test_half_types_run_through(picture):
    import tiny

    from minidiffedit import StableDiffusion, Tokenizer

    for dtype in (torch.bfloat16, torch.float16):
        sd = StableDiffusion(*(network.to(dtype) for network in tiny.networks()), Tokenizer())
        done = edit(sd, picture, **QUICK)
        assert done.latent.dtype == done.x0.dtype == torch.float32 and torch.isfinite(done.latent).all()
        assert done.verdict == "found"
