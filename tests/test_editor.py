"""From picture to picture on a tiny random model: counts, reuse, doors, determinism."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from minidiffedit import edit, generate
from minidiffedit.editor import picture_mask

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


@pytest.mark.parametrize("options, verdict", [
    ({"strength": 0.0}, "strength 0"), ({"target": "a horse"}, "no difference"),
    ({"mask": Image.new("L", (93, 75))}, "given"), ({"strength": 0.0, "mask": Image.new("L", (93, 75), 255)}, "given"),
])  # fmt: skip
def test_nothing_to_edit_returns_the_source(sd, picture, options, verdict):
    before = sd.evaluations
    with pytest.warns(UserWarning, match="nothing to edit"):
        done = edit(sd, picture, **QUICK | options)
    assert done.image.tobytes() == picture.tobytes() and torch.equal(done.latent, done.x0)
    assert sd.evaluations == before and done.paste_mask is None
    assert done.verdict == ("strength 0" if options.get("strength") == 0.0 else verdict)


def test_a_further_edit_costs_mask_and_decode(sd, picture):
    first = edit(sd, picture, **QUICK)
    cow = edit(sd, picture, reuse=first, **QUICK | {"target": "a cow", "seed": None})
    assert cow.evaluations == {"mask": 2, "encode": 0, "decode": 16} and cow.seed == 0
    fresh = edit(sd, picture, **QUICK | {"target": "a cow"})
    assert torch.allclose(cow.latent, fresh.latent, rtol=1e-4, atol=1e-5)
    for changed, rows in [
        ({"strength": 0.5}, (2, 0, 10)), ({"strength": 1.0}, (2, 10, 20)), ({"mask_threshold": 0.3}, (2, 0, 16)),
        ({"seed": 1}, (4, 0, 16)), ({"source": "a dog"}, (4, 0, 16)), ({"steps": 5}, (4, 4, 8)),
        ({"encode_text": "source"}, (2, 8, 16)), ({"mask": box()}, (0, 0, 16)), ({"guidance_scale": 1.0}, (2, 0, 8)),
    ]:  # fmt: skip
        done = edit(sd, picture, reuse=first, **QUICK | changed)
        assert tuple(done.evaluations.values()) == rows, changed
        alone = edit(sd, picture, **QUICK | changed)
        assert torch.allclose(done.latent, alone.latent, rtol=1e-4, atol=1e-5), changed


def test_reuse_of_something_else_is_refused(sd, picture):
    first = edit(sd, picture, **QUICK)
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


@pytest.mark.parametrize("size", [(64, 64), (301, 203), (20, 100), (8, 64), (1, 8)])
def test_any_size_comes_back(sd, size):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    done = edit(sd, picture, **QUICK | {"steps": 2})
    assert done.image.size == size and all(side % 8 == 0 for side in done.settings["working_size"])


@pytest.mark.parametrize("options", [
    {"steps": 0}, {"steps": 1000}, {"strength": 1.5}, {"strength": math.nan}, {"guidance_scale": math.inf}, {"maps": 0},
    {"mask_clip": -1.0}, {"mask_threshold": 2.0}, {"mask_strength": -0.5}, {"seed": -1}, {"seed": 1.5}, {"size": 32},
    {"size": 2048}, {"encode_text": "nothing"}, {"refine": 0}, {"chunk": 0}, {"target": None}, {"target": "\ud800"},
    {"mask": np.full((75, 93), np.nan)}, {"mask": np.zeros((5, 5))},
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


def test_generate(sd):
    one = generate(sd, "a horse", steps=4, seed=0)
    assert one.image.size == (64, 64) and one.evaluations == {"generate": 8}
    assert torch.equal(one.latent, generate(sd, "a horse", steps=4, seed=0).latent)
    wide = generate(sd, "a horse", steps=2, seed=0, width=136, height=64, guidance_scale=1)
    assert wide.image.size == (136, 64) and wide.evaluations == {"generate": 2}
    for options in ({"width": 63}, {"width": 60}, {"height": 32768}, {"seed": -1}, {"steps": 0}):
        with pytest.raises(ValueError):
            generate(sd, "a horse", **options)


def test_half_types_run_through(picture):
    import tiny

    from minidiffedit import StableDiffusion, Tokenizer

    for dtype in (torch.bfloat16, torch.float16):
        sd = StableDiffusion(*(network.to(dtype) for network in tiny.networks()), Tokenizer())
        done = edit(sd, picture, **QUICK)
        assert done.latent.dtype == done.x0.dtype == torch.float32 and torch.isfinite(done.latent).all()
        assert done.verdict == "found"
