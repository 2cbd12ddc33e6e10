"""Any method by name: doors, verdicts, reuse, what a watcher sees. `R` is exchanged by the mutants.

`sd` is a stand-in of a few lines; where a network must be one, it is the tiny `network`.
"""

import gc
import json
import math
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import tiny
import torch
from mutants import load, mutant, run, source
from PIL import Image
from stubs import ALPHA_BAR, Model
from tiny import box

from minidiffedit import encode, find_mask, levels, masked_decode, noises, sample, threshold_maps
from minidiffedit import run as R
from minidiffedit.files.images import latent_mask
from minidiffedit.files.masks import Steering
from minidiffedit.methods.table import SYSTEMS, System

QUICK = {"steps": 10, "maps": 2, "target": "a zebra", "source": "a horse", "seed": 0}
FEW = {"steps": 10, "target": "a zebra", "seed": 0}
EMPTY = Image.new("L", (93, 75))


@pytest.fixture(scope="module")
def sd():
    return Model()


@pytest.fixture(scope="module")
def inpainting():
    return Model("inpainting")


@pytest.fixture(scope="module")
def network():
    return tiny.model()


def same(one, other):
    return torch.equal(one.latent, other.latent) and one.image.tobytes() == other.image.tobytes()


def near(one, other):
    return torch.allclose(one.latent, other.latent, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["diffedit", "masactrl", "sdedit"])
def test_a_run_leaves_nothing_behind(sd, picture, method):
    """Without Python's sweep for circles: pictures and latents of many runs would wait for it."""
    gc.collect()
    gc.disable()
    try:
        options = {name: QUICK[name] for name in (QUICK if method == "diffedit" else FEW)}
        options |= {"source": "a horse"} if method == "masactrl" else {}
        done = R.edit(sd, picture, method, **options)
        held = [weakref.ref(one) for one in (done, done.source, done.latent, done.x0)]
        del done
        assert not any(one() is not None for one in held)
    finally:
        gc.enable()


# ---------------------------------------------------------------- the plan


@pytest.mark.parametrize("method, arguments, why", [
    ("difedit", {"target": "a"}, "no method 'difedit'.*did you mean 'diffedit'"),
    ("masa_ctrl", {}, "did you mean 'masactrl'"), ("zzz", {}, "no method 'zzz'; `minidiffedit methods`"),
    ("ddim+zzz", {"target": "a"}, "no method"), ("a+b+c", {}, "a name has one inversion"), ("", {}, "no method"),
    ("dddim+masactrl", {"target": "a"}, "inversion must be one of ddim.*got 'dddim'.*did you mean 'ddim'"),
    ("masactrl", {"target": "a", "inversion": "null_text"}, "did you mean 'null-text'"),
    ("sdedit", {"inversion": "ddim"}, "left out: sdedit takes no path"), ("ddim+sdedit", {}, "takes no path"),
    ("diffedit", {"target": "a", "strenght": 0.5}, "diffedit has no option 'strenght'.*did you mean 'strength'"),
    ("diffedit", {"target": "a", "eta": 0.5}, "no option 'eta'"), ("sdedit", {"source": "a"}, "no option 'source'"),
    ("sdedit", {"maps": 3}, "'maps', which comes with mask_from='contrast', "),
    ("masactrl", {"target": "a", "maps": 3}, "'maps', which comes with method='diffedit', "),
    ("masactrl", {"target": "a", "mask": box()}, "no option 'mask'"),
    ("masactrl", {"target": "a", "negative_prompt": "b"}, "no option 'negative_prompt'"),
    ("diffedit-regions", {"edits": [("a", "b")], "target": "c"}, "no option 'target'"),
    ("diffedit", {}, "diffedit needs target .*what the result shall show"),
    ("diffedit", {"target": None}, "needs target"),
    ("null-text-inversion", {}, "needs source and target"), ("null-text+masactrl", {"target": "a"}, "needs source"),
    ("user-mask", {"target": "a"}, "needs mask"), ("diffedit-regions", {}, "needs edits"),
    ("diffedit-regions", {"edits": []}, "edits must be pairs"), ("diffedit-regions", {"edits": ["ab"]}, "pairs"),
    ("diffedit-regions", {"edits": [("a", "b", "c")]}, "pairs"), ("diffedit-regions", {"edits": [("a", None)]}, "text"),
    ("diffedit-regions", {"edits": [("a", "\udcff")]}, "UTF-8"), ("diffedit", {"target": "\ud800"}, "UTF-8"),
    ("diffedit", {"target": 5}, "target must be text"), ("diffedit", {"target": "a", "source": b"b"}, "source"),
    (7, {}, "no method '7'"), (None, {}, "no method 'None'"), (["diffedit"], {}, r"no method .\['diffedit'\]"),
    ("masactrl", {"target": "a", "inversion": ["ddim"]}, "inversion must be one of"),
    ("diffedit", {"target": "a", "mask_from": 7}, "a mask can come from .*got '7'"),
    ("mag-edit", {"source": "a", "target": "b", "mask": box(), "edited_words": "\ud800"}, "edited_words must be text"),
])  # fmt: skip
def test_what_a_plan_refuses(method, arguments, why):
    with pytest.raises(ValueError, match=why):
        R.plan(method, **arguments)


@pytest.mark.parametrize("method, options", [
    ("diffedit", {"steps": 0}), ("diffedit", {"steps": 1000}), ("diffedit", {"steps": 10.0}),
    ("diffedit", {"steps": True}),
    ("diffedit", {"steps": None}), ("diffedit", {"strength": 1.5}), ("diffedit", {"strength": math.nan}),
    ("diffedit", {"strength": "0.8"}), ("diffedit", {"strength": None}), ("diffedit", {"guidance_scale": math.inf}),
    ("diffedit", {"guidance_scale": None}), ("diffedit", {"maps": 0}), ("diffedit", {"mask_clip": -1.0}),
    ("diffedit", {"mask_clip": 0.5}), ("diffedit", {"mask_threshold": 2.0}), ("diffedit", {"mask_strength": -0.5}),
    ("diffedit", {"seed": -1}), ("diffedit", {"seed": 1.5}), ("diffedit", {"seed": False}), ("diffedit", {"size": 32}),
    ("diffedit", {"size": 2048}), ("diffedit", {"encode_text": "nothing"}), ("diffedit", {"refine": 0}),
    ("diffedit", {"chunk": 0}), ("diffedit", {"paste": 1}), ("sdedit", {"eta": 2}), ("sdedit", {"eta": math.nan}),
    ("sdedit", {"repeats": 0}), ("sdedit", {"form": "sub-vp"}), ("masactrl", {"first_step": -1}),
    ("masactrl", {"finest": 1.5}), ("direct+replay", {"refine": 101}), ("null-text+replay", {"inner_steps": -1}),
], ids=str)  # fmt: skip
def test_values_that_a_plan_refuses(method, options):
    (name,) = options
    given = {name: "a" for name in R.blank_plan(method).needs}
    with pytest.raises(ValueError, match=f"{name} must be"):
        R.plan(method, **given, **options)


def test_a_plan_is_settled():
    """Defaults are the function's unless the row has others; numpy's numbers become plain; nothing is left open."""
    numbers = {"steps": np.int64(4), "maps": np.int32(2), "seed": np.int64(3), "strength": np.float32(0.5)}
    made = R.plan(target="a", **numbers)
    assert made.method == "diffedit" and made.given == {
        "target": "a",
        "source": "",
        "negative_prompt": "",
        "mask": None,
    }
    assert json.loads(json.dumps(made.settings)) == made.settings and made.settings["strength"] == 0.5
    assert made.settings["encode_text"] == "null" and R.plan("replay", target="a").settings["encode_text"] == "source"
    assert made.needs == ("target",) and made.settings.keys() == made.options.keys()
    open_ones = {name for name, value in made.settings.items() if value is None}
    assert open_ones == {"chunk", "size"}
    drawn = {R.plan(target="a", seed=None).settings["seed"] for _ in range(9)}
    assert len(drawn) == 9 and all(type(seed) is int and 0 <= seed < 2**32 for seed in drawn)
    assert R.plan(target="a", seed=0).settings["seed"] == 0


def test_the_defaults_are_the_papers():
    """2210.11427, section 4 and its appendix; maps are cut at three times their mean."""
    paper = {"steps": 50, "strength": 0.8, "mask_strength": 0.5, "maps": 10, "mask_threshold": 0.5, "mask_clip": 3.0}
    paper |= {"guidance_scale": 7.5, "refine": 1, "encode_text": "null", "sampler": "ddim", "paste": True}
    for method in ("diffedit", "mask-only", "diffedit-regions"):
        made = R.blank_plan(method).settings
        assert {name: made[name] for name in paper if name in made} == {n: paper[n] for n in paper if n in made}
        assert {"mask_clip", "mask_threshold", "maps", "guidance_scale"} <= made.keys()
    cut, maps = 210 / 13, torch.zeros(1, 1, 1, 16)  # three times the mean of what follows
    maps[..., :4] = torch.tensor([60, 10, 0.52 * cut, 0.48 * cut])
    found = threshold_maps(maps, torch.zeros(1))
    assert torch.allclose(found.heat[0, 0, 0, :5], torch.tensor([1, 10 / cut, 0.52, 0.48, 0]))
    assert found.mask[0, 0, 0, :5].tolist() == [True, True, True, False, False]


def test_inversions_by_either_way_of_naming():
    for plan in (R.plan("direct+replay", target="a"), R.plan("replay", target="a", inversion="direct")):
        assert plan.method == "direct+replay" and plan.functions["path"] == "inversions:direct"
    for plan in (R.plan("direct+masactrl", target="a"), R.plan("masactrl", inversion="direct", target="a")):
        assert plan.method == "masactrl"  # its own inversion needs no naming


def test_each_blank_plan_says_what_its_functions_take():
    plan = R.blank_plan("diffedit")
    assert plan.needs == ("target",) and plan.settings["seed"] is None and plan.masked and plan.steerable
    assert [*plan.functions] == ["mask", "path", "latent"]
    assert not R.blank_plan("diffedit-regions").steerable and not R.blank_plan("masactrl").masked
    assert R.blank_plan("sdedit").steerable and "mask" not in R.blank_plan("sdedit").functions
    assert R.blank_plan("null-text+masactrl").needs == ("source", "target")
    for method in (name for name, system in SYSTEMS.items() if system.edit):
        plan = R.blank_plan(method)
        assert {"paste", "seed", "size"} <= plan.options.keys() and set(
            plan.needs
        ) <= plan.given.keys() <= R.GIVEN.keys()
        assert all(one.about for one in plan.options.values()), method  # each says what it is


def test_a_row_without_a_function_says_why(monkeypatch):
    monkeypatch.setitem(SYSTEMS, "later", System("0000.00000", status="blocked", note="its weights are not public"))
    with pytest.raises(ValueError, match="later does not work yet: its weights are not public"):
        R.plan("later", target="a")


def test_an_input_that_nobody_makes_is_a_programmers_mistake(monkeypatch):
    monkeypatch.setattr("minidiffedit.methods.replay.odd", lambda eps, weather: None, raising=False)
    monkeypatch.setitem(SYSTEMS, "odd", System("0000.00000", "replay:odd"))
    with pytest.raises(TypeError, match="replay:odd asks for 'weather'"):
        R.plan("odd")


def test_steps_and_strengths_that_do_less_than_they_say_are_warned_of():
    with pytest.warns(UserWarning, match="30 steps do not divide 1000: the top level is t = 958"):
        R.plan(target="a", steps=30)
    with pytest.warns(UserWarning, match="rounds to level 0"):
        R.plan(target="a", steps=10, strength=0.04)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        R.plan(target="a", strength=0.0)


def test_only_the_methods_own_module_is_imported():
    code = (
        "import sys; from minidiffedit.run import plan; plan('sdedit')\n"
        "print(sorted(name.rpartition('.')[2] for name in sys.modules if name.startswith('minidiffedit.methods.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['sdedit', 'system', 'table']", done.stderr


def test_weights_of_another_kind_are_refused_before_any_row(sd, inpainting, picture):
    for model, method in ((sd, "sd-inpainting"), (inpainting, "diffedit")):
        before = model.evaluations
        with pytest.raises(ValueError, match=rf"{method} needs .* weights .* is {model.kind}; give another --model"):
            R.edit(model, picture, method, target="a", **({"mask": box()} if method != "diffedit" else {}))
        assert model.evaluations == before
    with pytest.raises(ValueError, match="text-to-image needs base weights"):
        R.generate(inpainting, "a")


# ---------------------------------------------------------------- from picture to picture


def test_the_default_edit_costs_140_rows(sd, picture):
    before = sd.evaluations
    done = R.edit(sd, picture, target="a zebra", source="a horse", seed=0)
    assert done.verdict == "found" and done.evaluations == {"mask": 20, "encode": 40, "decode": 80}
    assert sd.evaluations - before == done.rows == 140
    assert done.image.size == done.mask.size == picture.size and done.image.mode == "RGB" and done.mask.mode == "L"
    assert max(done.trajectory) == 40 and len(done.decoded) == 41 and done.heat.shape == done.latent_mask.shape
    assert set(done.seconds) == {"text", "vae encode", "mask", "encode", "decode", "vae decode"}


def test_it_is_the_papers_three_steps_with_every_setting_in_its_place(network, picture):
    """Written with the page's own loops, bit for bit; each setting has a value of its own."""
    settings = {
        "steps": 8, "strength": 0.75, "guidance_scale": 2.5, "mask_strength": 0.25, "maps": 3, "mask_clip": 2.0,
        "mask_threshold": 0.3, "refine": 2, "seed": 9, "chunk": 2,
    }  # fmt: skip
    prompts = {"source": "a horse", "target": "a zebra", "negative_prompt": "blurry"}
    horse, zebra, blurry, null = (network.text([prompt]) for prompt in (*prompts.values(), ""))
    for encode_text, text in (("null", null), ("source", horse)):
        done = R.edit(network, picture, encode_text=encode_text, **prompts, **settings)
        mask = {"strength": 0.25, "maps": 3, "clip": 2.0, "threshold": 0.3, "seed": 9, "chunk": 2}
        found = find_mask(network.eps, done.x0, zebra, horse, steps=8, **mask)
        up = encode(network.eps, done.x0, text, steps=8, strength=0.75, refine=2)
        down = []
        masked_decode(network.eps, up, found.mask, zebra, blurry, guidance_scale=2.5, record=down)
        assert torch.equal(done.found.maps, found.maps) and torch.equal(done.latent_mask, found.mask.float())
        assert torch.equal(done.heat, found.heat) and done.coverage == pytest.approx(found.coverage[0])
        assert all(torch.equal(done.trajectory[j], up[j]) for j in up) and len(done.trajectory) == len(up) == 7
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(done.decoded, down, strict=True))
        assert torch.equal(done.latent, down[-1]) and {**settings, **prompts}.items() <= done.settings.items()


def test_outside_the_paste_mask_every_pixel_is_the_inputs(sd, picture):
    done = R.edit(sd, picture, mask=box(), **QUICK)
    untouched = np.asarray(done.paste_mask) == 0
    assert 0.1 < untouched.mean() < 0.9 and done.verdict == "given" and done.evaluations["mask"] == 0
    assert np.array_equal(np.asarray(done.image)[untouched], np.asarray(picture)[untouched])
    assert not np.array_equal(np.asarray(done.image)[~untouched], np.asarray(picture)[~untouched])
    inside = np.asarray(box()) > 0
    assert (np.asarray(done.paste_mask)[inside] == 255).all()
    plain = R.edit(sd, picture, mask=box(), paste=False, **QUICK)
    assert plain.paste_mask is None and torch.equal(plain.latent, done.latent)
    assert np.array_equal(np.asarray(plain.image)[inside], np.asarray(done.image)[inside])
    assert not np.array_equal(np.asarray(plain.image)[untouched], np.asarray(picture)[untouched])


def test_soft_masks_are_pasted_by_their_value(sd, picture):
    """Whatever they did in the latents: a value of one half lets through half of what changed."""
    soft = np.full((75, 93), 0.5, dtype=np.float32)
    pasted, plain = (R.edit(sd, picture, mask=soft, paste=paste, **QUICK) for paste in (True, False))
    assert pasted.paste_mask.getextrema() == (128, 128)
    half = (np.asarray(picture, float) + np.asarray(plain.image, float)) / 2
    assert np.abs(np.asarray(pasted.image, float) - half).max() <= 1.5


def test_same_seed_same_bits_and_the_global_generator_rests(sd, picture):
    state = torch.random.get_rng_state()
    one, two = R.edit(sd, picture, **QUICK), R.edit(sd, picture, **QUICK)
    R.edit(sd, picture, "sdedit", **FEW, eta=1.0), R.edit(sd, picture, "noise+masactrl", **FEW)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(one, two)
    other = R.edit(sd, picture, **QUICK | {"seed": 1})
    assert not torch.equal(other.found.maps, one.found.maps)
    drawn = R.edit(sd, picture, **QUICK | {"seed": None})
    again = R.edit(sd, picture, **QUICK | {"seed": drawn.seed})
    assert torch.equal(drawn.latent, again.latent)


def test_chunks_change_rounding_only(sd, picture):
    maps = [R.edit(sd, picture, **QUICK | {"maps": 5, "chunk": chunk}).found.maps for chunk in (1, 2, 5)]
    assert all((m - maps[0]).norm() <= 1e-5 * maps[0].norm() for m in maps)


@pytest.mark.parametrize("method, options, verdict, why", [
    ("diffedit", {"strength": 0.0}, "strength 0", "level 0"), ("diffedit", {"mask": EMPTY}, "given", "mask is empty"),
    ("diffedit", {"target": "a horse"}, "no difference", "prompts do not differ: both are 'a horse'"),
    ("diffedit", {"strength": 0.0, "mask": Image.new("L", (93, 75), 255)}, "strength 0", "level 0"),
    ("diffedit", {"mask_threshold": 1.0}, "found", "mask is empty"),
    ("mask-only", {"target": "a horse"}, "no difference", "prompts do not differ"),
    ("user-mask", {"mask": EMPTY}, "given", "mask is empty"), ("sdedit", {"mask": EMPTY}, "given", "mask is empty"),
    ("diffedit-regions", {"edits": [("x", "x")]}, "0 found", "no pair of prompts finds a cell"),
    *((method, {"strength": 0.0}, "strength 0", "level 0") for method in (
        "sdedit", "encode-only", "mask-only", "reconstruction", "masactrl", "null-text-inversion", "replay")),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:edit 1 has no cell")
def test_nothing_to_edit_returns_the_source(sd, picture, method, options, verdict, why):
    plan, before = R.blank_plan(method), sd.evaluations
    given = {name: value for name, value in QUICK.items() if name in plan.given or name in plan.options}
    with pytest.warns(UserWarning, match=f"nothing to edit: .*{why}"):
        done = R.edit(sd, picture, method, **given | options)
    assert done.image.tobytes() == picture.tobytes() and torch.equal(done.latent, done.x0)
    paid = {"mask": 4} if verdict == "found" else {}
    assert sd.evaluations - before == done.rows == sum(paid.values()) and done.verdict == verdict
    assert done.paste_mask is None and done.decoded == () and done.clean == {}
    assert done.mask is None or done.mask.getextrema() == ((255, 255) if len(options) > 1 else (0, 0))


def test_methods_without_a_mask_have_none(sd, picture):
    for method in ("encode-only", "masactrl", "reconstruction", "sdedit"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            options = {"steps": 2, "seed": 0} | ({} if method == "reconstruction" else {"target": "a horse"})
            done = R.edit(sd, picture, method, **options)
        assert done.mask is done.latent_mask is done.paste_mask is done.coverage is done.heat is done.found is None
        assert done.verdict == "edited" and done.settings["mask"] == "none"
        assert not np.array_equal(np.asarray(done.image), np.asarray(picture))


@pytest.mark.parametrize("size", [(64, 64), (301, 203), (20, 100), (8, 64), (64, 8)])
def test_any_size_comes_back(sd, size):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    for method, options in (("diffedit", QUICK), ("masactrl", FEW)):
        done = R.edit(sd, picture, method, **options | {"steps": 2})
        assert done.image.size == size and all(side % 8 == 0 for side in done.settings["working_size"])


@pytest.mark.parametrize("options", [
    {"mask": np.full((75, 93), np.nan)}, {"mask": np.zeros((5, 5))}, {"mask": "no-such-file.png"}, {"mask": [1, 2]},
    {"steering": Steering(union=np.zeros((3, 3)))}, {"steps": 0},
], ids=str)  # fmt: skip
def test_what_cannot_be_used_is_refused_before_any_row(sd, picture, options):
    before = sd.evaluations
    with pytest.raises((ValueError, OSError)):
        R.edit(sd, picture, **QUICK | options)
    assert sd.evaluations == before


def test_a_picture_is_no_start_of_a_method_that_begins_with_noise(sd, picture):
    before = sd.evaluations
    with pytest.raises(ValueError, match="text-to-image takes no picture"):
        R.edit(sd, picture, "text-to-image", target="a horse")
    assert sd.evaluations == before


def test_nan_is_an_error_not_a_picture(sd, picture, monkeypatch):
    broken = {
        "encode": (lambda image: torch.full((1, 4, 8, 10), math.nan), "the VAE"),
        "decode": (lambda latent: torch.full((1, 3, 64, 80), math.nan), "the VAE"),
        "eps": (lambda x, t, texts, **hooks: [torch.full_like(x, math.nan) for _ in texts], "the"),
    }
    for name, (function, what) in broken.items():
        for method in ("diffedit", "masactrl", "sdedit", "null-text-inversion"):
            options = {"target": "a zebra", "steps": 2} | ({"source": "a horse"} if "-" in method else {})
            with monkeypatch.context() as patch, pytest.raises(ArithmeticError, match=f"{what}.*NaN"):
                patch.setattr(sd, name, function)
                R.edit(sd, picture, method, **options)


def test_half_types_run_through(picture):
    from minidiffedit import StableDiffusion, Tokenizer

    for dtype in (torch.bfloat16, torch.float16):
        sd = StableDiffusion(*(network.to(dtype) for network in tiny.networks(unet=tiny.QUICK)), Tokenizer())
        done = R.edit(sd, picture, **QUICK)
        assert done.latent.dtype == done.x0.dtype == torch.float32 and torch.isfinite(done.latent).all()
        assert done.verdict == "found" and all(one.dtype == torch.float32 for one in done.clean["decode"])
        masa = R.edit(sd, picture, "masactrl", **FEW | {"steps": 5})
        assert masa.latent.dtype == torch.float32 and torch.isfinite(masa.latent).all()


def test_the_settings_make_it_again(sd, picture):
    for method, options in (
        ("diffedit", QUICK | {"refine": 2}), ("sdedit", FEW | {"eta": 0.5, "form": "ve"}),
        ("direct+replay", FEW | {"source": "a horse"}), ("diffedit-regions", {"edits": [("a", "b")], "steps": 5}),
    ):  # fmt: skip
        done = R.edit(sd, picture, method, **options)
        told = json.loads(json.dumps(done.settings))
        assert told["method"] == method and tuple(told.pop("working_size")) == (80, 64)
        assert told.pop("mask") == ("computed" if "diffedit" in method else "none")
        assert same(R.edit(sd, picture, **told), done) and type(told["seed"]) is int


# ---------------------------------------------------------------- steering


def test_a_mask_is_steered_on_its_way(sd, picture):
    """As the same steering, made by hand, of the mask that was found or given."""
    rim = Steering(dilate=1, feather=1, subtract=box())
    by_hand = rim.at(picture.size, (80, 64))
    for options in ({}, {"mask": EMPTY}, {"mask": np.eye(8, 10, dtype=np.float32)}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = R.edit(sd, picture, **QUICK | options)
            done = R.edit(sd, picture, steering=rim, **QUICK | options)
        before = latent_mask(options["mask"], picture.size, (80, 64)) if options else plain.found.mask.float()
        assert torch.equal(done.latent_mask, by_hand(before))
        assert done.settings["steering"]["dilate"] == 1 and "steering" not in plain.settings
    inverted = R.edit(sd, picture, steering=Steering(invert=True), mask=EMPTY, **QUICK)
    assert (inverted.latent_mask == 1).all() and inverted.verdict == "given"


def test_where_there_is_no_difference_nothing_is_steered(sd, picture):
    with pytest.warns(UserWarning, match="do not differ"):
        done = R.edit(sd, picture, steering=Steering(invert=True), **QUICK | {"target": "a horse"})
    assert not done.latent_mask.any() and done.image.tobytes() == picture.tobytes()


def test_methods_that_have_no_mask_to_steer_say_so(sd, picture):
    for method, options in (("masactrl", FEW), ("diffedit-regions", {"edits": [("a", "b")]})):
        with pytest.raises(ValueError, match=f"{method} has no mask that could be steered"):
            R.edit(sd, picture, method, steering=Steering(dilate=1), **options)


# ---------------------------------------------------------------- reuse


def test_a_further_edit_costs_half_the_mask_and_no_encoding(sd, picture):
    first = R.edit(sd, picture, target="a zebra", source="a horse", seed=0)
    assert first.evaluations == {"mask": 20, "encode": 40, "decode": 80}
    cow = R.edit(sd, picture, target="a cow", source="a horse", reuse=first)
    assert cow.evaluations == {"mask": 10, "encode": 0, "decode": 80} and cow.seed == 0
    cut = R.edit(sd, picture, target="a cow", source="a horse", mask_threshold=0.3, reuse=cow)
    assert cut.evaluations == {"mask": 0, "encode": 0, "decode": 80}
    less = R.edit(sd, picture, target="a cow", source="a horse", mask_threshold=0.3, strength=0.5, reuse=cut)
    assert less.evaluations == {"mask": 0, "encode": 0, "decode": 50}
    fresh = R.edit(sd, picture, target="a cow", source="a horse", seed=0, mask_threshold=0.3, strength=0.5)
    assert near(less, fresh) and all(torch.equal(less.trajectory[j], first.trajectory[j]) for j in range(26))


def test_what_each_change_costs_and_gives(sd, picture):
    first = R.edit(sd, picture, **QUICK)
    for changed, rows in [
        ({}, (0, 0, 16)), ({"strength": 0.5}, (0, 0, 10)), ({"strength": 1.0}, (0, 10, 20)),
        ({"mask_threshold": 0.3}, (0, 0, 16)), ({"mask_clip": None}, (0, 0, 16)),
        ({"negative_prompt": "b"}, (0, 0, 16)),
        ({"seed": 1}, (4, 0, 16)), ({"source": "a dog"}, (4, 0, 16)), ({"steps": 5}, (4, 4, 8)),
        ({"encode_text": "source"}, (0, 8, 16)), ({"mask": box()}, (0, 0, 16)), ({"guidance_scale": 1.0}, (0, 0, 8)),
        ({"refine": 2}, (0, 16, 16)), ({"mask_strength": 0.3}, (4, 0, 16)), ({"maps": 3}, (6, 0, 16)),
        ({"target": "a cow"}, (2, 0, 16)), ({"encode_text": "source", "source": ""}, (4, 8, 16)),
        ({"paste": False}, (0, 0, 16)),
        ({"target": "a cow", "mask_threshold": 0.3}, (2, 0, 16)), ({"chunk": 1}, (2, 0, 16)),
    ]:  # fmt: skip
        done = R.edit(sd, picture, reuse=first, **QUICK | changed)
        assert tuple(done.evaluations.values()) == rows, changed
        assert near(done, R.edit(sd, picture, **QUICK | changed)), changed


def test_bitwise_reuses_only_what_changes_no_bit(sd, picture):
    first = R.edit(sd, picture, **QUICK)
    for changed, rows in [
        ({"target": "a cow"}, (4, 0, 16)), ({"chunk": 1}, (4, 0, 16)), ({"mask_threshold": 0.3}, (0, 0, 16)),
        ({"strength": 0.5}, (0, 0, 10)), ({}, (0, 0, 16)), ({"target": "a cow", "mask_threshold": 0.3}, (4, 0, 16)),
    ]:  # fmt: skip
        done = R.edit(sd, picture, reuse=first, bitwise=True, **QUICK | changed)
        assert tuple(done.evaluations.values()) == rows and same(done, R.edit(sd, picture, **QUICK | changed)), changed


def test_a_chain_of_further_edits_shares_the_first_ones_reference(sd, picture):
    """Also after a threshold, which makes no predictions of its own; the latest mask counts, whatever was between."""
    done = [R.edit(sd, picture, **QUICK)]
    for changed, rows in (
        ({"mask_threshold": 0.3}, 0), ({"target": "a cow"}, 2), ({"target": "a horse"}, 0), ({"target": "a dog"}, 2),
        ({"mask": box()}, 0), ({"target": "a cow", "mask_threshold": 0.2}, 0), ({}, 0),
    ):  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done.append(R.edit(sd, picture, reuse=done[-1], **QUICK | changed))
        assert done[-1].evaluations["mask"] == rows, changed
    assert len(done[-1].calls) <= R.MOST_CALLS


def test_methods_share_what_they_have_in_common(sd, picture):
    """One mask, one encoding for all; each result as it is alone, bit for bit."""
    done, rows = [], {}
    for method in ("sdedit", "encode-only", "mask-only", "diffedit", "user-mask", "reconstruction", "ddim+masactrl"):
        plan = R.blank_plan(method)
        options = {name: value for name, value in QUICK.items() if name in plan.given or name in plan.options}
        options |= {"mask": box()} if method == "user-mask" else {}
        options |= {"strength": 0.8, "encode_text": "null"} if method == "ddim+masactrl" else {}
        one = R.edit(sd, picture, method, reuse=done, bitwise=True, **options)
        assert same(one, R.edit(sd, picture, method, **options)), method
        rows[method] = tuple(one.evaluations.values())
        done.append(one)
    assert rows == {
        "sdedit": (10,), "encode-only": (8, 16), "mask-only": (4, 0, 16), "diffedit": (0, 0, 16),
        "user-mask": (0, 16), "reconstruction": (0, 8), "ddim+masactrl": (0, 32),
    }  # fmt: skip


def test_an_inversion_is_its_function_and_not_only_its_options(sd, picture):
    """ddim and direct have the same options and texts, and are no substitutes."""
    for first, then in (("ddim", "direct"), ("direct", "ddim")):
        done = R.edit(sd, picture, "masactrl", inversion=first, **FEW)
        for strength, rows in ((1.0, 10), (0.5, 5)):
            options = FEW | {"inversion": then, "strength": strength}
            one = R.edit(sd, picture, "masactrl", reuse=done, **options)
            assert one.evaluations == {"encode": rows, "decode": 4 * rows}
            assert same(one, R.edit(sd, picture, "masactrl", **options))


def test_an_encoding_under_a_text_is_that_texts(sd, picture):
    named = R.edit(sd, picture, encode_text="source", **QUICK)
    unnamed = R.edit(sd, picture, reuse=named, **QUICK | {"source": "", "encode_text": "source"})
    assert unnamed.evaluations["encode"] == 8


def test_the_seed_is_taken_over_unless_one_is_given(sd, picture):
    first = R.edit(sd, picture, **QUICK | {"seed": 5})
    assert R.edit(sd, picture, reuse=first, **QUICK | {"seed": None}).seed == 5
    assert R.edit(sd, picture, reuse=[first], **{k: v for k, v in QUICK.items() if k != "seed"}).seed == 5
    assert R.edit(sd, picture, reuse=first, **QUICK | {"seed": 6}).seed == 6


def test_reuse_of_something_else_is_refused(sd, picture):
    first, before = R.edit(sd, picture, **QUICK), None
    turned = Image.frombytes("RGB", (75, 93), picture.tobytes())
    before = sd.evaluations
    for other, image, options, why in (
        (sd, turned, {}, r"another picture|working size"), (sd, picture, {"size": 128}, "working size"),
        (sd, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), {}, "another picture"),
        (Model(), picture, {}, "model"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            R.edit(other, image, reuse=[first], **QUICK | options)
    with pytest.raises(ValueError, match=r"working size|another picture"):
        R.edit(sd, picture, reuse=R.generate(sd, "a", steps=1), **QUICK)
    assert sd.evaluations == before + 2


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
        R.edit(sd, picture, negative_prompt="blurry", encode_text=encode_text, **QUICK)
        assert asked == [["a zebra", "a horse"]] + [[encoded]] * 8 + [["blurry", "a zebra"]] * 8
    assert len(prompts) <= 8  # every distinct prompt once per edit


# ---------------------------------------------------------------- again, with changes


def test_resume_pays_for_what_changes(sd, picture):
    first = R.edit(sd, picture, **QUICK)
    for changes, rows in (
        ({"guidance_scale": 2.0}, (0, 0, 16)), ({"target": "a cow"}, (2, 0, 16)), ({"mask_threshold": 0.3}, (0, 0, 16)),
        ({"strength": 0.5}, (0, 0, 10)), ({"seed": 1}, (4, 0, 16)), ({"mask": box()}, (0, 0, 16)),
    ):  # fmt: skip
        again = R.resume(first, **changes)
        assert tuple(again.evaluations.values()) == rows and again.method == "diffedit", changes
        assert near(again, R.edit(sd, picture, **QUICK | changes)), changes
    with pytest.raises(ValueError, match=r"no option 'strenght'.*'strength'"):
        R.resume(first, strenght=0.5)
    with pytest.raises(ValueError, match="maps"):
        R.resume(first, maps=0)


def test_a_given_mask_stays_until_another_comes(sd, picture):
    first = R.edit(sd, picture, mask=box(), **QUICK)
    for changes in ({"target": "a cow"}, {"guidance_scale": 2.0}, {"strength": 0.5}, {"steps": 5}, {"seed": 3}):
        kept = R.resume(first, **changes)
        assert torch.equal(kept.latent_mask, first.latent_mask) and kept.verdict == "given", changes
        assert same(kept, R.edit(sd, picture, mask=box(), **QUICK | changes)) and kept.settings["mask"] == "given"
    for changes in ({"mask_threshold": 0.4}, {"maps": 3}, {"mask_clip": None}):
        found = R.resume(first, **changes)
        assert found.verdict == "found" and found.given_mask is None and found.settings["mask"] == "computed", changes
        assert same(found, R.edit(sd, picture, **QUICK | changes))
    other = R.resume(first, mask=np.eye(8, 10, dtype=np.float32))
    assert torch.equal(other.latent_mask[0, 0], torch.eye(8, 10)) and other.verdict == "given"


def test_steering_stays_until_another_comes(sd, picture):
    first = R.edit(sd, picture, steering=Steering(dilate=1), **QUICK)
    kept = R.resume(first, guidance_scale=2.0)
    assert torch.equal(kept.latent_mask, first.latent_mask) and kept.settings["steering"] == {"dilate": 1}
    other = R.resume(first, steering=Steering(invert=True))
    assert torch.equal(other.latent_mask, 1 - first.found.mask.float())


def test_any_method_can_be_resumed(sd, picture):
    for method, options, changes, rows in (
        ("masactrl", FEW, {"target": "a cow"}, (0, 40)), ("masactrl", FEW, {"steps": 5}, (5, 20)),
        ("replay", FEW, {"strength": 0.5}, (0, 10)), ("sdedit", FEW, {"eta": 1.0}, (10,)),
        ("direct+replay", FEW | {"strength": 0.8}, {"inversion": "noise"}, (0, 16)),
        ("null-text-inversion", FEW | {"source": "a", "inner_steps": 1, "steps": 3}, {"target": "a cow"}, (0, 12)),
    ):  # fmt: skip
        first = R.edit(sd, picture, method, **options)
        again = R.resume(first, **changes)
        assert tuple(again.evaluations.values()) == rows, (method, changes)
        name = "noise+replay" if "inversion" in changes else R.blank_plan(method).method
        assert again.method == name and same(again, R.edit(sd, picture, name, **options | changes))


# ---------------------------------------------------------------- the mask alone; from noise


def test_the_mask_alone_is_the_edits(sd, picture):
    alone = R.picture_mask(sd, picture, target="a zebra", source="a horse", steps=10, maps=2, seed=0)
    done = R.edit(sd, picture, **QUICK)
    assert torch.equal(alone.found.mask, done.found.mask) and alone.mask.tobytes() == done.mask.tobytes()
    assert alone.evaluations == {"mask": 4} and alone.mask.size == picture.size
    assert alone.image.tobytes() == picture.tobytes() and torch.equal(alone.heat, done.heat)
    steered = R.picture_mask(sd, picture, steering=Steering(invert=True), **QUICK)
    assert torch.equal(steered.latent_mask, 1 - alone.latent_mask)
    with pytest.raises(ValueError, match="masactrl finds no mask"):
        R.picture_mask(sd, picture, "masactrl", target="a")
    with pytest.warns(UserWarning, match="the mask is empty: the prompts do not differ"):
        assert R.picture_mask(sd, picture, **QUICK | {"target": "a horse"}).coverage == 0
    regions = R.picture_mask(sd, picture, "diffedit-regions", edits=[("a horse", "a zebra")], steps=10, maps=2, seed=0)
    assert torch.equal(regions.latent_mask, alone.latent_mask)


def test_a_mask_serves_the_edit_that_follows(sd, picture):
    alone = R.picture_mask(sd, picture, **QUICK)
    assert R.edit(sd, picture, reuse=alone, **QUICK).evaluations == {"mask": 0, "encode": 8, "decode": 16}


def test_generate(sd, monkeypatch):
    one = R.generate(sd, "a horse", steps=4, seed=0)
    assert one.image.size == (64, 64) and one.evaluations == {"generate": 8} and one.method == "text-to-image"
    assert one.source is one.mask is one.x0 is None and len(one.stages["generate"]) == 5
    assert torch.equal(one.latent, R.generate(sd, "a horse", steps=4, seed=0).latent)
    wide = R.generate(sd, "a horse", steps=2, seed=0, width=136, height=64, guidance_scale=1)
    assert wide.image.size == (136, 64) and wide.evaluations == {"generate": 2}
    for options in ({"width": 63}, {"width": 60}, {"width": 0}, {"height": 32768}, {"seed": -1}, {"steps": 0}):
        with pytest.raises(ValueError):
            R.generate(sd, "a horse", **options)
    monkeypatch.setattr(R.images, "MOST_PIXELS", 64 * 64)
    with pytest.raises(ValueError, match="got 72 x 64"):  # the side that was not given counts, too
        R.generate(sd, "a horse", width=72)


def test_negative_prompt_and_prompt_keep_their_sides(sd):
    one = R.generate(sd, "a horse", negative_prompt="a car", steps=4, seed=0)
    text = [sd.text([prompt]) for prompt in ("a horse", "a car")]
    assert torch.equal(one.latent, sample(sd.eps, noises((4, 8, 8), 1, 0), text[0], text[1], steps=4))


# ---------------------------------------------------------------- what is kept and seen


def guided(sd, y, t, texts, scale):
    """The clean latent that a prediction leads to, from the definition, with the test's own noise table."""
    first, *rest = sd.eps(y, t, texts)
    e, a = first + sum(scale * (one - first) for one in rest), float(np.float32(ALPHA_BAR[t]))
    return (y - (1 - a) ** 0.5 * e) / a**0.5


@pytest.mark.parametrize("method", ["diffedit", "replay", "masactrl", "encode-only", "sdedit"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_stages_and_the_clean_latents_they_lead_to(sd, picture, method, scale):
    """stages hold every level, clean the guided prediction's x_0 of each, outside a mask the picture's own."""
    options = FEW | {"guidance_scale": scale} | ({"first_step": 10} if method == "masactrl" else {})
    done = R.edit(sd, picture, method, **options)
    null, target, t = sd.text([""]), sd.text(["a zebra"]), levels(10).t
    down, clean = done.stages["decode"], done.clean["decode"]
    K = len(clean)
    assert len(down) == K + 1 and torch.equal(down[-1], done.latent) and tuple(down) == done.decoded
    assert {"replay": 10, "masactrl": 10, "sdedit": 5}.get(method, 8) == K
    assert done.times["decode"] == list(t[K:0:-1])
    texts = [target] if scale == 1 and method not in ("replay", "masactrl") else [null, target]
    for j, y, x0 in zip(range(K, 0, -1), down, clean):
        M = 1 if done.latent_mask is None else done.latent_mask
        expected = M * guided(sd, y, t[j], texts, scale) + (1 - M) * done.x0
        torch.testing.assert_close(x0, expected, rtol=1e-3, atol=1e-3)
    if method == "sdedit":
        assert done.stages["encode"] == [] and "encode" not in done.clean
        return
    up = done.stages["encode"]
    assert (
        torch.equal(up[0], done.x0)
        and len(up) == K + 1
        and done.times["encode"] == list(t[1 : K + 1])
        and len(done.clean["encode"]) == K
    )
    assert method == "masactrl" or torch.equal(up[-1], down[0])
    for j, x in enumerate(up[:-1]):
        torch.testing.assert_close(done.clean["encode"][j], guided(sd, x, t[j + 1], [null], 1), rtol=1e-3, atol=1e-3)


def test_of_several_calls_at_one_level_the_last_is_kept(sd, picture):
    done = R.edit(sd, picture, refine=3, **QUICK)
    assert len(done.clean["encode"]) == 8 and done.evaluations["encode"] > 8


def test_a_watcher_sees_every_call(sd, picture, monkeypatch):
    asked, eps = [], sd.eps

    def spying(x, t, texts, **hooks):
        asked.append((t, len(x) * len(texts)))
        return eps(x, t, texts, **hooks)

    monkeypatch.setattr(sd, "eps", spying)
    for method, options, stages in (
        ("diffedit", QUICK | {"maps": 4, "chunk": 2}, ["mask"] * 2 + ["encode"] * 8 + ["decode"] * 8),
        ("masactrl", FEW, ["encode"] * 10 + ["decode"] * 10), ("sdedit", FEW | {"repeats": 2}, ["decode"] * 10),
        ("null-text-inversion", FEW | {"source": "a", "steps": 3, "inner_steps": 2}, ["encode"] * 15 + ["decode"] * 3),
    ):  # fmt: skip
        asked.clear()
        seen = []
        done = R.edit(sd, picture, method, watch=seen.append, **options)
        assert [(step.stage, step.t) for step in seen] == [
            (stage, t) for stage, (t, _) in zip(stages, asked, strict=True)
        ]
        paid = np.cumsum([rows for _, rows in asked]).tolist()
        assert [step.rows for step in seen] == paid and paid[-1] == done.rows
        assert all(step.x.shape == step.clean.shape == (1, 4, 8, 10) and not step.x.requires_grad for step in seen)
        last = seen[-1]
        assert torch.equal(last.x, done.decoded[-2]) and torch.equal(last.clean, done.clean["decode"][-1])
    seen = []
    R.generate(sd, "a", steps=3, watch=seen.append)
    assert [(step.stage, step.rows) for step in seen] == [("generate", 2), ("generate", 4), ("generate", 6)]
    seen.clear()
    R.picture_mask(sd, picture, watch=seen.append, **QUICK)
    R.resume(R.edit(sd, picture, **QUICK), watch=seen.append, target="a cow")
    assert [step.stage for step in seen] == ["mask"] * 2 + ["decode"] * 8


def test_the_model_in_a_batch(network):
    """On the model itself: images of a batch equal the images alone to rounding."""
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = [network.text([prompt]) for prompt in ("a horse", "a zebra", "")]

    def through(x, seed):
        found = find_mask(network.eps, x, text[1], text[0], steps=10, maps=2, seed=seed)
        up = encode(network.eps, x, text[2], steps=10)
        return found.maps, up[max(up)], masked_decode(network.eps, up, torch.ones(1, 1, 8, 8), text[1], text[2])

    together = through(x0, 5)
    for i in range(3):
        # Guidance at 7.5 multiplies the rounding of a random net's predictions: 1e-4 for the final latent.
        for one, many, bound in zip(through(x0[i : i + 1], 5 + i), together, (1e-5, 1e-5, 1e-4)):
            assert (one[0] - many[i]).norm() <= bound * many[i].norm()


# ---------------------------------------------------------------- each mistake turns a test red

WHERE = {"Job": "job", "blank_plan": "plans", "changed": "plans", "check_fits": "plans"}  # the rest: in run.py

# name: (where, what stands there, what a mistake would put, the test that must fail)
OF_THE_MASK = '(own.pop("mask", set()) - set[str]().union(COMMON, *own.values()))'
MUTATIONS = {
    "earlier takes what differs": ("Job.earlier", "and without(but, call.given) == without(but, given)", "",
        test_what_each_change_costs_and_gives),
    "earlier of any function": ("Job.earlier", "call.function == place and", "",
        test_an_inversion_is_its_function_and_not_only_its_options),
    "bitwise is not asked": ("Job.earlier", "self.known if exact or not self.bitwise else ()", "self.known",
        test_bitwise_reuses_only_what_changes_no_bit),
    "a call is its options": ("Job.call", "call.function == place and call.given == given", "call.given == given",
        test_an_inversion_is_its_function_and_not_only_its_options),
    "a call is its function": ("Job.call", "call.function == place and call.given == given", "call.function == place",
        test_what_each_change_costs_and_gives),
    "a call without its texts": ("Job.call", "for name, (_, key) in asked.items() if key is not None",
        "for name, (_, key) in asked.items() if None", test_an_encoding_under_a_text_is_that_texts),
    "a call without its options": ("Job.call", "if key is not None} | options", "if key is not None}",
        test_what_each_change_costs_and_gives),
    "a result keeps what it made alone": ("result_of", "*(call for call in job.known if id(call) not in used),", "",
        test_a_chain_of_further_edits_shares_the_first_ones_reference),
    "a given mask is not steered": ("Job.mask", "self.steering and self.verdict",
        'self.steering and self.verdict != "given" and self.verdict',
        test_a_mask_is_steered_on_its_way),
    "no difference is steered": ("Job.mask", 'and self.verdict != "no difference"', "",
        test_where_there_is_no_difference_nothing_is_steered),
    "what is unguided is shown": ("Job.saw", "first + scale * (last - first)", "last",
        test_stages_and_the_clean_latents_they_lead_to),
    "what lies outside a mask is guessed": ("Job.saw", 'self.now == "decode" and', "False and",
        test_stages_and_the_clean_latents_they_lead_to),
    "the source's row is shown": ("Job.saw", "x, first, last = x[-1:]", "x, first, last = x[:1]",
        test_stages_and_the_clean_latents_they_lead_to),
    "each call of a level is kept": ("Job.saw", "times[-1:] == [t]", "False",
        test_of_several_calls_at_one_level_the_last_is_kept),
    "rows since the model was loaded": ("Job.saw", "self.sd.evaluations - self.begun", "self.sd.evaluations",
        test_a_watcher_sees_every_call),
    "the method's own defaults before the row's": ("blank_plan", "| system.options", "", test_a_plan_is_settled),
    "any seed for reuse": ("edit", 'options["seed"] = earlier[0].seed', "pass",
        test_the_seed_is_taken_over_unless_one_is_given),
    "a mask dropped by every change": ("changed", f"changes.keys() & {OF_THE_MASK}", "changes.keys()",
        test_a_given_mask_stays_until_another_comes),
    "a mask kept through its own options": ("changed", f"and not changes.keys() & {OF_THE_MASK}", "",
        test_a_given_mask_stays_until_another_comes),
    "a mask dropped for a seed": ("changed", "COMMON, *own.values()", "*own.values()",
        test_a_given_mask_stays_until_another_comes),
    "nothing is finite": ("Job.encode", 'finite(self.sd.encode(pixels), "the VAE")', "self.sd.encode(pixels)",
        test_nan_is_an_error_not_a_picture),
    "pixels put back unasked": ("result_of", 'and plan.settings["paste"]', "",
        test_outside_the_paste_mask_every_pixel_is_the_inputs),
    "all weights fit": ("check_fits", "plan.system.weights != kind", "False",
        test_weights_of_another_kind_are_refused_before_any_row),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, network, inpainting, picture, monkeypatch):
    function, old, new, test = MUTATIONS[name]
    module = WHERE.get(function.partition(".")[0], "run")
    changed = mutant(f"{module}:{function}", old, new, monkeypatch)
    changed = changed if module == "run" else load("run", source("run"), monkeypatch)
    monkeypatch.setattr(sys.modules[__name__], "R", changed)
    with pytest.raises((AssertionError, KeyError, ValueError, pytest.fail.Exception)):
        run(test, sd=sd, network=network, inpainting=inpainting, picture=picture, monkeypatch=monkeypatch)


def test_steering_holds_where_no_mask_is_given(sd, picture):
    """What is subtracted stays as it is, also of a method that may do without a mask."""
    from minidiffedit import Steering

    kept = torch.zeros(1, 1, 8, 10)
    kept[..., :5] = 1
    done = R.edit(sd, picture, "sdedit", target="a zebra", steps=4, seed=0, steering=Steering(subtract=kept))
    assert torch.equal(done.latent[..., :5], done.x0[..., :5]) and done.settings["mask"] == "everywhere"
    assert not torch.isclose(done.latent[..., 5:], done.x0[..., 5:]).any(dim=1).all()


def test_what_a_run_made_is_its_own(sd, picture):
    """Calls of an earlier run are there for reuse, and never taken for this run's."""
    first = R.edit(sd, picture, target="a zebra", source="a horse", steps=4, maps=1, seed=0)
    with pytest.warns(UserWarning):
        nothing = R.edit(sd, picture, target="a zebra", source="a horse", steps=4, maps=1, strength=0.0, reuse=first)
    given = R.edit(sd, picture, target="a zebra", mask=torch.ones(1, 1, 8, 10), steps=4, reuse=first)
    assert len(first.trajectory) > 1 and first.found is not None
    assert len(nothing.trajectory) == 1 and nothing.found is None and given.found is None
    with pytest.raises(ValueError, match="the method of a saved edit stays"):
        R.resume(first, method="replay")


def test_a_name_and_an_inversion_that_contradict_each_other(sd, picture):
    with pytest.raises(ValueError, match="asks for the inversion 'direct', and besides 'ddim' is given"):
        R.plan("direct+replay", inversion="ddim", target="a zebra")
    assert R.plan("direct+replay", inversion="direct", target="a zebra").method == "direct+replay"
    first = R.edit(sd, picture, "direct+replay", target="a zebra", steps=4, seed=0)
    assert R.resume(first, inversion="ddim").method in ("replay", "ddim+replay")


def test_pairs_as_text():
    text = R.plan("diffedit-regions", edits="a horse=>a zebra; a dog => a cat").given["edits"]
    assert text == [["a horse", "a zebra"], ["a dog", "a cat"]]
    with pytest.raises(ValueError, match="or text A=>B; C=>D"):
        R.plan("diffedit-regions", edits="a=>b=>c")
