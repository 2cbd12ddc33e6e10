"""A result in one file: the round trip for every method, what going on from it costs, and what is refused."""

import json
import math
import os
import shutil
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import example
import pytest
import tiny
import torch
from commands import failed, ran
from PIL import Image, ImageCms
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stubs import Model, no_address

from minidiffedit import StableDiffusion, Steering, cli, edit, generate, load_state, picture_mask, resume, save_state
from minidiffedit import methods as rooms
from minidiffedit.cost import costs
from minidiffedit.files.states import checksum, plan_of, read_record
from minidiffedit.methods.table import INVERSIONS, MASKS, SYSTEMS, System
from minidiffedit.run import Call, Plan, blank_plan, changed, execute, inputs_of, plan

QUICK = {"steps": 10, "maps": 2, "target": "a zebra", "source": "a horse", "seed": 0}
FAST = ["--target", "a zebra", "--source", "a horse", "--steps", "10", "--maps", "2", "--seed", "0"]


@pytest.fixture(scope="module")
def models(folder, tmp_path_factory):
    """The tiny models by kind, from their files: a state is known by them."""
    root, folders = tmp_path_factory.mktemp("models"), {"base": folder}
    for kind, channels in (("inpainting", 9), ("instruct", 8)):
        folders[kind] = tiny.write_folder(root / kind, channels=channels, unet=tiny.QUICK)
    folders["example"] = example.write_folder(root / "example")
    return {kind: StableDiffusion.load(path, device="cpu") for kind, path in folders.items()}


@pytest.fixture(scope="module")
def model(models):
    return models["base"]


@pytest.fixture(scope="module")
def stand_ins(models):
    """The same files by name, a few lines of arithmetic to run."""
    made = {kind: Model(kind) for kind in models}
    for kind, one in made.items():
        one.checkpoint, one.prediction, one.vae_name = models[kind].checkpoint, "epsilon", ""
        one.unet = SimpleNamespace(config=SimpleNamespace(cross_attention_dim=8))
    return made


@pytest.fixture(scope="module")
def picture():
    made = tiny.picture()
    made.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return made


def box():
    """A grey one."""
    return tiny.box().point(lambda value: value // 2)


@pytest.fixture(scope="module")
def saved(model, picture, tmp_path_factory):
    """An edit and its file."""
    path = tmp_path_factory.mktemp("states") / "run.safetensors"
    done = edit(model, picture, **QUICK)
    save_state(done, path)
    return done, path


def same(one, two):
    """Bit for bit, whatever a Result holds; of a mask that was given to the plan there are only the latent cells."""
    if isinstance(one, torch.Tensor):  # the order in memory too: it decides how sums round
        order = [[step for step, n in zip(x.stride(), x.shape) if n > 1] for x in (one, two)]
        return one.dtype == two.dtype and torch.equal(one, two) and order[0] == order[1]
    if isinstance(one, Image.Image):
        return one.mode == two.mode and one.tobytes() == two.tobytes() and one.info == two.info
    if isinstance(one, Plan):
        one, two = (replace(p, given={n: v for n, v in p.given.items() if n != "mask"}) for p in (one, two))
    if isinstance(one, tuple | list):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, dict):
        return [*one] == [*two] and all(same(one[name], two[name]) for name in one)
    if not hasattr(one, "__dict__") or isinstance(one, StableDiffusion | type):
        return one == two
    return type(one) is type(two) and same(vars(one), vars(two))


def predicted(path, changes):
    """The rows that a resumed edit will pay, from the file alone."""
    header, record = read_record(path)
    old, mask = plan_of(record, header), changes.get("mask")
    options = {name: value for name, value in changes.items() if name not in ("mask", "steering")}
    return costs([old, changed(old, options, mask)[0]])[1]


def test_a_text_that_nobody_gave_is_not_there_for_an_inversion_that_needs_it():
    old = plan("diffedit", target="a zebra")
    assert changed(old, {"steps": 5})[0].given["source"] == ""
    with pytest.raises(ValueError, match=r"null-text\+diffedit needs source"):
        changed(old, {"inversion": "null-text"})
    told, _ = changed(old, {"inversion": "null-text", "source": ""})  # but who says "" may have it
    assert changed(told, {"steps": 5})[0].given["source"] == ""


# ---------------------------------------------------------------- the round trip


@pytest.mark.parametrize("options", [
    {}, {"mask": box()}, {"paste": False}, {"size": 96, "mask_clip": None}, {"encode_text": "source", "chunk": 1},
    {"strength": 0.0}, {"target": "a horse"}, {"strength": 0.0, "mask": box()}, {"negative_prompt": "a “car”\n"},
    {"steering": Steering(largest=True, dilate=1, feather=1, union=box(), subtract=Image.new("L", (93, 75)))},
    {"mask": box(), "steering": Steering(invert=True)}, {"inversion": "direct"}, {"inversion": "noise"},
], ids=no_address)  # fmt: skip
@pytest.mark.filterwarnings("ignore:nothing to edit")
def test_everything_comes_back_bit_for_bit(model, picture, tmp_path, options):
    done = edit(model, picture, **QUICK | options)
    save_state(done, tmp_path / "a.safetensors")
    back = load_state(tmp_path / "a.safetensors", model)
    assert same(done, back)
    save_state(back, tmp_path / "b.safetensors")
    assert Path(tmp_path / "a.safetensors").read_bytes() == Path(tmp_path / "b.safetensors").read_bytes()


def planned(method):
    """With what the method needs, on few steps."""
    blank = blank_plan(method)
    given = {"target": "a zebra", "source": "a horse", "edits": [("a horse", "a zebra"), ("grass", "sand")]}
    given |= {"mask": box(), "reference": tiny.picture().rotate(90), "instruction": "paint it", "points": "9,9=>40,30"}
    small = {"steps": 5, "maps": 2, "inner_steps": 2, "iterations": 2, "seed": 0, "first_step": 2}
    small |= {"lora_steps": 2, "text_steps": 2, "nudges": 2}
    small = {name: value for name, value in small.items() if name in blank.options}
    return plan(method, **{name: given[name] for name in blank.needs}, **small)


ROWS = [name for name, system in SYSTEMS.items() if system.edit and "x_T" not in inputs_of(system.edit)]


ON_A_NETWORK = ["direct+diffedit", "null-text+masactrl", "noise+replay", "instruct-pix2pix"]


@pytest.mark.parametrize("method", [*ROWS, *ON_A_NETWORK])
@pytest.mark.filterwarnings("ignore:edit . (leaves|has)")
def test_every_method_is_saved_loaded_and_gone_on_from(models, stand_ins, picture, tmp_path, method):
    path, settled = tmp_path / "a.safetensors", planned(method)
    sd = (models if method in ON_A_NETWORK else stand_ins)[settled.system.weights]
    done = execute(settled, sd, picture)
    save_state(done, path)
    back = load_state(path, sd)
    assert same(done, back) and back.method == method
    before = sd.evaluations
    again = resume(back)
    assert same(again.image, done.image) and torch.equal(again.latent, done.latent)
    rows = {stage: n * (stage == "decode") for stage, n in done.evaluations.items()}  # no mask, no path
    assert again.evaluations == rows == predicted(path, {}) and sd.evaluations - before == sum(rows.values())
    change = {"guidance_scale": 3.0} if "guidance_scale" in settled.options else {"seed": 1}
    other, fresh = resume(back, **change), execute(changed(settled, change, settled.given.get("mask"))[0], sd, picture)
    assert torch.equal(other.latent, fresh.latent) and other.settings == fresh.settings
    most = predicted(path, change)  # DPL's nouns may be found before their last step
    assert other.evaluations == most or (method == "dpl" and other.rows <= sum(most.values()))


def test_half_types_come_back(folder, picture, tmp_path):
    half = StableDiffusion.load(folder, device="cpu", dtype="bfloat16")
    for method in ("diffedit", "null-text-inversion"):
        done = execute(planned(method), half, picture)
        save_state(done, tmp_path / "a.safetensors")
        back = load_state(tmp_path / "a.safetensors", half)
        assert same(done, back)
        null = back.trajectory.null(1)
        assert null.dtype == (torch.bfloat16 if method == "diffedit" else torch.float32)
        assert torch.equal(resume(back).latent, done.latent)


def test_a_loaded_state_does_not_hang_on_its_file(model, saved, tmp_path):
    copy = Path(shutil.copy(saved[1], tmp_path / "a.safetensors"))
    back = load_state(copy, model)
    copy.write_bytes(b"\0" * copy.stat().st_size)
    assert same(back, saved[0])


def test_no_tensor_is_written_twice(saved):
    """The mask's maps and the path's levels stand in several places of a Result."""
    found = load_file(saved[1])
    assert {"tensors.maps", "stages.encode.8", "latent"} < found.keys()
    assert not {"calls.0.maps", "calls.1.latents.8", "stages.decode.8"} & found.keys()
    assert torch.equal(found["tensors.reference"], saved[0].found.reference)


# ---------------------------------------------------------------- a stranger's method

METHOD = """
    from dataclasses import dataclass
    from typing import Annotated, Literal
    import torch
    from torch import Tensor
    from ..options import About, Steps
    from ..path import Path

    @dataclass(frozen=True)
    class Words:
        mask: Tensor
        verdict: tuple[str]
        by_word: dict[str, tuple[Tensor, float]]
        order: list[int]
        nothing: "Words | None" = None

    def find(raw_eps, x0, target, *, words: Annotated[int, About("how many")] = 2) -> Words:
        e = raw_eps(x0, 500, [target])[0]
        mask = (e.mean(1, keepdim=True) > 0).float()
        maps = {f"word {i}.": (torch.full((1, 3, 4), i), i / 3) for i in range(words)}
        return Words(mask, ("found",), maps, [*range(words)], Words(mask, ("found",), {}, []))

    def invert(eps, x0, null, *, steps: Steps = 4) -> Path:
        latents = [x0 + j * eps(x0, 9 * j + 9, [null])[0] for j in range(steps + 1)]
        noises = {j: torch.full_like(x0, j / 10) for j in range(1, steps + 1)}
        return Path(latents, steps, null, nulls={2: null.float()}, noises=noises, eta=1, pinned=True)

    def walk(eps, mask, path, target, reference):
        x = path.rows(2)
        for j in path.down():
            e = eps(x, path.t[j], [path.null(j), path.texts(target, target)])
            x = path.pin(path.step(x, e[1], j), j - 1)
        return mask * x[1:] + (1 - mask) * reference
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A method in one file, and its rows in the table: nothing else of the package changes."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "stranger.py").write_text(textwrap.dedent(METHOD))
    monkeypatch.setattr(rooms, "__path__", [*rooms.__path__, str(tmp_path / "methods")])
    monkeypatch.setitem(INVERSIONS, "stranger", "stranger:invert")
    monkeypatch.setitem(MASKS, "words", "stranger:find")
    monkeypatch.setitem(SYSTEMS, "stranger", System("here", "stranger:walk", "stranger", mask="words"))
    yield
    monkeypatch.delitem(sys.modules, "minidiffedit.methods.stranger")
    del rooms.stranger


def test_a_strangers_method_is_saved_and_gone_on_from(model, picture, tmp_path, stranger):
    path = tmp_path / "a.safetensors"
    done = execute(plan("stranger", target="a zebra", seed=0, reference=box()), model, picture)
    save_state(done, path)
    assert done.evaluations == {"mask": 1, "encode": 5, "decode": 16}
    back = load_state(path, model)
    assert same(done.calls, back.calls) and same(done.image, back.image) and same(done.stages, back.stages)
    assert list(back.found.by_word) == ["word 0.", "word 1."] and back.trajectory.noises.keys() == {1, 2, 3, 4}
    again = resume(back)
    assert torch.equal(again.latent, done.latent) and same(again.image, done.image)
    assert again.evaluations == predicted(path, {}) == {"mask": 0, "encode": 0, "decode": 16}
    again = resume(back, words=3)
    assert again.evaluations == predicted(path, {"words": 3}) == {"mask": 1, "encode": 0, "decode": 16}
    fresh = execute(plan("stranger", target="a zebra", words=3, seed=0, reference=box()), model, picture)
    assert torch.equal(again.latent, fresh.latent) and len(again.found.by_word) == 3


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("changes, rows", [
    ({"mask_threshold": 0.3}, (0, 0, 16)), ({"mask_clip": 2.0}, (0, 0, 16)), ({"mask_clip": None}, (0, 0, 16)),
    ({"mask": box()}, (0, 0, 16)), ({"steering": Steering(dilate=1)}, (0, 0, 16)), ({"strength": 0.5}, (0, 0, 10)),
    ({"guidance_scale": 1.0}, (0, 0, 8)), ({"negative_prompt": "a car"}, (0, 0, 16)), ({"paste": False}, (0, 0, 16)),
    ({"target": "a cow"}, (2, 0, 16)), ({"target": "a cow", "strength": 0.5, "mask_threshold": 0.4}, (2, 0, 10)),
    ({"source": ""}, (4, 0, 16)), ({"seed": 1}, (4, 0, 16)), ({"strength": 1.0}, (0, 10, 20)),
    ({"steps": 5}, (4, 4, 8)), ({}, (0, 0, 16)), ({"inversion": "direct"}, (0, 8, 16)), ({"refine": 2}, (0, 16, 16)),
    ({"encode_text": "source"}, (0, 8, 16)), ({"strength": 0.0}, (0, 0, 0)),
], ids=no_address)  # fmt: skip
@pytest.mark.filterwarnings("ignore:nothing to edit")
def test_only_what_changes_is_paid_for(model, picture, saved, changes, rows):
    state = load_state(saved[1], model)
    before = model.evaluations
    done = resume(state, **changes)
    assert tuple(done.evaluations.values()) == rows and model.evaluations - before == sum(rows)
    assert predicted(saved[1], changes) == done.evaluations
    fresh = edit(model, picture, **QUICK | changes)
    assert torch.allclose(done.latent, fresh.latent, rtol=1e-4, atol=1e-5) and done.settings == fresh.settings
    assert torch.equal(done.latent_mask, fresh.latent_mask)
    if rows[0] == 0:  # a target alone rounds otherwise than beside its reference
        assert torch.equal(done.latent, fresh.latent) and done.image.tobytes() == fresh.image.tobytes()


def test_a_given_mask_and_the_steering_stay_until_others_come(model, picture, tmp_path):
    how, path = Steering(dilate=1), tmp_path / "a.safetensors"
    save_state(edit(model, picture, mask=box(), steering=how, **QUICK), path)
    state = load_state(path, model)
    assert state.plan.given["mask"] is state.given_mask
    kept = resume(state, target="a cow")
    assert torch.equal(kept.latent_mask, state.latent_mask)
    assert kept.evaluations == predicted(path, {"target": "a cow"}) == {"mask": 0, "encode": 0, "decode": 16}
    assert torch.equal(resume(state, steering=Steering()).latent_mask, state.given_mask)
    computed = resume(state, mask_threshold=0.4)
    assert computed.evaluations == predicted(path, {"mask_threshold": 0.4}) == {"mask": 4, "encode": 0, "decode": 16}
    assert computed.verdict == "found" and computed.settings["mask"] == "computed"
    assert torch.equal(computed.latent_mask, Steering(dilate=1)(computed.found.mask))


@pytest.mark.filterwarnings("ignore:nothing to edit")
def test_an_empty_mask_is_known_to_be_empty_before_it_is_gone_on_from(model, picture, tmp_path):
    for name, steering, rows in (("a", None, 0), ("b", Steering(invert=True), 16), ("c", Steering(dilate=1), 0)):
        path = tmp_path / f"{name}.safetensors"
        save_state(edit(model, picture, mask=Image.new("L", (93, 75)), steering=steering, **QUICK), path)
        assert sum(predicted(path, {"target": "a cow"}).values()) == rows
        assert resume(load_state(path, model), target="a cow").rows == rows


def test_what_was_gone_on_from_is_a_state_again(model, picture, saved, tmp_path):
    """The maps of both targets and the longer path are in the second file."""
    second = resume(load_state(saved[1], model), target="a cow", strength=0.5)
    save_state(second, tmp_path / "b.safetensors")
    back = load_state(tmp_path / "b.safetensors", model)
    assert same(second, back) and len(back.calls) == 4
    assert resume(back, mask_threshold=0.2).evaluations == {"mask": 0, "encode": 0, "decode": 10}
    assert resume(back, target="a zebra", strength=0.8).evaluations == {"mask": 0, "encode": 0, "decode": 16}


def test_a_mask_alone_is_gone_on_from_with_an_edit(model, picture, tmp_path):
    save_state(picture_mask(model, picture, **QUICK), tmp_path / "a.safetensors")
    done = resume(load_state(tmp_path / "a.safetensors", model), mask_threshold=0.4)
    assert done.evaluations == {"mask": 0, "encode": 8, "decode": 16}


def test_calls_of_other_methods_are_left_out(model, picture, tmp_path):
    first = edit(model, picture, **QUICK)
    second = edit(model, picture, "masactrl", reuse=first, steps=5, target="a cow", seed=0)
    save_state(second, tmp_path / "a.safetensors")
    assert len(second.calls) == 3
    assert [call.function for call in load_state(tmp_path / "a.safetensors", model).calls] == ["inversions:direct"]


# ---------------------------------------------------------------- the commands


@pytest.fixture
def here(tmp_path, monkeypatch, picture):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png", icc_profile=picture.info["icc_profile"])
    box().save("m.png")
    return tmp_path


def test_resume_writes_what_a_fresh_edit_writes(here, folder, capsys):
    """The very file, metadata included, wherever the model's batches are the same."""
    model = ["--model", folder]
    first = ["edit", "in.png", *FAST, "--size", "96", "--save-state", "run.safetensors", "-o", "first.png", *model]
    assert ran(capsys, *first)["state"] == "run.safetensors"
    for changes, rows in [
        (["--mask-threshold", "0.3", "--mask-clip", "none", "--negative-prompt", "a car"], [0, 0, 16]),
        (["--mask", "m.png", "--strength", "0.5"], [0, 0, 10]),
        (["--dilate", "1", "--subtract", "m.png", "--guidance-scale", "1"], [0, 0, 8]),
        (["--target", "a cow"], [2, 0, 16]),
    ]:
        again = ran(capsys, "resume", "run.safetensors", *changes, *model)
        assert again["output"] == "run-resumed.png" and [*again["evaluations"].values()] == rows, changes
        fresh = ran(capsys, "edit", "in.png", *FAST, "--size", "96", *changes, "-o", "fresh.png", *model)
        assert again["settings"] == fresh["settings"]
        resumed = Path("run-resumed.png").read_bytes()
        Path("run-resumed.png").unlink()
        if "--target" not in changes:
            assert resumed == Path("fresh.png").read_bytes(), changes


def test_resume_does_not_overwrite_the_picture_it_began_with(here, folder, capsys):
    """Told by its pixels: a state names no path."""
    model = ["--model", folder]
    ran(capsys, "edit", "in.png", *FAST, "--save-state", "run.safetensors", "-o", "first.png", *model)
    before = Path("in.png").read_bytes()
    for name in ("-o", "--save-mask"):
        said = failed(capsys, "resume", "run.safetensors", "--dilate", "1", name, "in.png", "--overwrite", *model)
        assert "in.png is the picture that run.safetensors was made of" in said
    assert Path("in.png").read_bytes() == before
    assert ran(capsys, "resume", "run.safetensors", "--dilate", "1", "-o", "first.png", *model)["output"] == "first.png"


def test_a_resumed_edit_carries_what_the_camera_wrote(model, tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    tiny.picture().save(tmp_path / "in.jpg", exif=exif, dpi=(300, 300))
    save_state(edit(model, tmp_path / "in.jpg", **QUICK), tmp_path / "a.safetensors")
    done = resume(load_state(tmp_path / "a.safetensors", model), mask_threshold=0.3)
    assert done.image.getexif()[0x010F] == "Maker" or b"Maker" in done.image.info["exif"]
    assert done.image.info["dpi"] == (300, 300)


def test_resume_can_be_gone_on_from(here, folder, capsys):
    model = ["--model", folder]
    ran(capsys, "edit", "in.png", *FAST, "--mask", "m.png", "--save-state", "a.safetensors", *model)
    options = ["--target", "a cow", "--save-state", "b.safetensors", "--save-mask", "k.png", "-o", "b.png"]
    second = ran(capsys, "resume", "a.safetensors", *options, *model)
    assert second["evaluations"]["mask"] == 0 and len(second["settings"]["mask"]) == 10  # still names the file
    third = ran(capsys, "resume", "b.safetensors", "--strength", "0.5", "-o", "c.png", *model)
    assert third["settings"]["target"] == "a cow" and third["evaluations"] == {"mask": 0, "encode": 0, "decode": 10}
    assert third["settings"]["mask"] == second["settings"]["mask"] and Path("k.png").exists()
    assert cli.main(["resume", "b.safetensors", "--model", str(folder), "-o", "c.png"]) == 0
    assert "seed 0" in capsys.readouterr().out


def test_resume_takes_the_options_of_the_states_method(here, folder, capsys):
    options = ["--method", "masactrl", "--target", "a zebra", "--steps", "5", "--save-state", "a.safetensors"]
    ran(capsys, "edit", "in.png", *options, "--model", folder)
    done = ran(capsys, "resume", "a.safetensors", "--first-step", "1", "--model", folder, "-o", "o.png")
    assert done["method"] == "masactrl" and done["settings"]["first_step"] == 1
    assert done["rows"] == {"predicted": 20, "paid": 20} and done["evaluations"] == {"encode": 0, "decode": 20}
    with pytest.raises(SystemExit):
        cli.main(["resume", "a.safetensors", "--maps", "3"])
    assert "--maps" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [
    ["--mask-threshold", "0.3"], ["--mask", "m.png"], ["--target", "a cow", "--strength", "0.9"],
    ["--target", "a horse"], ["--mask", "black.png"], ["--mask", "black.png", "--invert"],
], ids=" ".join)  # fmt: skip
def test_a_dry_run_says_what_going_on_pays_without_a_model(here, saved, folder, capsys, changes):
    Image.new("L", (93, 75)).save("black.png")
    shutil.copy(saved[1], "run.safetensors")
    command = ["resume", "run.safetensors", *changes, "-o", "o.png", "--quiet"]
    planned = ran(capsys, *command, "--dry-run", "--model", "no-such-model")
    assert not Path("o.png").exists()
    assert ran(capsys, *command, "--model", folder)["evaluations"] == planned["evaluations"]


def test_resume_tells_the_path_that_the_state_names_and_takes_a_hub_id_from_the_cache(here, saved, folder, capsys):
    """A path from a state, which may come from anybody, is never opened; an id not without the cache's consent."""
    line = failed(capsys, "resume", saved[1], "-o", "o.png")
    assert f"give it with --model {folder.resolve()}" in line and not Path("o.png").exists()
    rewritten(saved[1], here / "hub.safetensors", lambda t, r: r.update(model_name="owner/name"))
    line = failed(capsys, "resume", "hub.safetensors", "--cache-dir", here / "none")
    assert "owner/name" in line and "minidiffedit download owner/name" in line
    assert ran(capsys, "resume", saved[1], "--dry-run")["evaluations"]["encode"] == 0  # needs no model


def test_a_state_must_name_a_model(here, saved, capsys):
    rewritten(saved[1], here / "old.safetensors", lambda t, r: r.update(model_name=""))
    line = failed(capsys, "resume", "old.safetensors")
    assert "names no model" in line and "--model" in line
    for change in (lambda t, r: r.update(model_name=3), lambda t, r: r.pop("model_name")):
        rewritten(saved[1], here / "bad.safetensors", change)
        assert "cannot be used" in failed(capsys, "resume", "bad.safetensors")


@pytest.mark.parametrize("options, word", [
    (["--save-state", "a.png"], ".safetensors"), (["--save-state", "nowhere/a.safetensors"], "no folder"),
    (["--save-state", "in.png"], ".safetensors"),
])  # fmt: skip
def test_a_bad_place_for_a_state_is_refused_before_the_model_is_loaded(here, capsys, options, word):
    assert word in failed(capsys, "edit", "in.png", *FAST, "--model", "no-such-model", *options)


@pytest.mark.parametrize("options, word", [
    (["--strength", "2"], "strength"), (["--mask-threshold", "nan"], "mask_threshold"),
    (["--mask", "no.png"], "no such"), (["--save-state", "run.safetensors"], "overwrite"),
    (["-o", "run.gif"], "end in"), (["--dilate", "5000"], "dilate"), (["--mask", "m.png", "-o", "m.png"], "overwrite"),
])  # fmt: skip
def test_bad_changes_are_refused_before_the_model_is_loaded(here, saved, capsys, options, word):
    shutil.copy(saved[1], "run.safetensors")
    assert word in failed(capsys, "resume", "run.safetensors", "--model", "no-such-model", *options)


def test_a_failed_write_leaves_no_state(here, saved, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = {p.name for p in here.iterdir()}
    with pytest.raises(OSError):
        save_state(saved[0], "a.safetensors")
    assert {p.name for p in here.iterdir()} == before


# ---------------------------------------------------------------- what is refused


def rewritten(path, to, change):
    """The file with its tensors and its JSON changed by `change(tensors, record)`."""
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
    tensors, record = load_file(path), json.loads(said["minidiffedit"])
    change(tensors, record)
    record.pop("sha256", None)
    save_file(tensors, to, {"minidiffedit": json.dumps(record | {"sha256": checksum(record, tensors)})})
    return to


def set_to(name, value):
    """In the settings."""
    return lambda t, r: r["settings"].update({name: value})


def content(name, value):
    return lambda t, r: r["content"].update({name: value})


def call(part, value):
    """In the mask's call: its function, what that was given, and its result."""
    return lambda t, r: r["calls"][0].__setitem__(part, value)


def the_path(part, value):
    """In the inversion's result."""
    return lambda t, r: r["calls"][1][2].update({part: value})


def the_mask(part, value):
    return lambda t, r: r["calls"][0][2].update({part: value})


CHANGES = [
    # Tensors
    lambda t, r: t.pop("x0"), lambda t, r: t.pop("calls.1.null"), lambda t, r: t.update(x=torch.zeros(1)),
    lambda t, r: t.pop("source"), lambda t, r: t.pop("source.profile"), lambda t, r: t["x0"].fill_(math.nan),
    lambda t, r: t["tensors.reference"].fill_(math.inf), lambda t, r: t["latent_mask"].fill_(2),
    lambda t, r: t.update(source=torch.zeros(75, 93, 4, dtype=torch.uint8)),
    lambda t, r: t.update(source=torch.zeros(75, 92, 3, dtype=torch.uint8)),
    lambda t, r: t.update(source=torch.ones(9)), lambda t, r: t.update(source=torch.zeros(0, 9, 3).byte()),
    lambda t, r: t.update(source=torch.zeros(2000, 3, 3, dtype=torch.uint8)),
    lambda t, r: t.update(image=torch.zeros(75, 93, 3)), lambda t, r: t.update(image=torch.zeros(7, 9, 3).byte()),
    lambda t, r: t.update(x0=torch.zeros(1, 4, 8, 9)), lambda t, r: t.update(x0=torch.zeros(1, 3, 8, 10)),
    lambda t, r: t.update(latent=torch.zeros(2, 4, 8, 10)), lambda t, r: t.update(x0=t["x0"].int()),
    lambda t, r: t.update({"stages.encode.3": torch.zeros(1, 4, 8, 9)}),
    lambda t, r: t.update({"stages.decode.3": torch.zeros(4, 8, 10)}),
    lambda t, r: t.update({"clean.decode.0": torch.zeros(0)}), lambda t, r: t.update(latent=torch.zeros(0)),
    lambda t, r: t.update({"calls.1.null": torch.zeros(1, 77, 25)}), lambda t, r: t["tensors.heat"].fill_(2),
    lambda t, r: t.update({"calls.0.mask": torch.zeros(1, 1, 8, 9)}),
    lambda t, r: t.update(latent_mask=torch.zeros(1, 1, 8, 9)),
    lambda t, r: t.update({"tensors.heat": torch.zeros(1, 1, 9, 9)}),
    # The record
    lambda t, r: r.clear(), lambda t, r: r.update(settings=[]), lambda t, r: r.update(format=3),
    lambda t, r: r.update(model="x"), lambda t, r: r.update(model_name=None), lambda t, r: r.update(mask_edits=1),
    lambda t, r: r.update(pictures={"reference": {"tensor": "image"}}), lambda t, r: r.update(pictures=[]),
    lambda t, r: r.update(calls={}), lambda t, r: r.pop("calls"), lambda t, r: r.pop("channels_last"),
    lambda t, r: r.update(channels_last=1), lambda t, r: r["content"].pop("verdict"),
    lambda t, r: r["content"].pop("steering"),
    # The settings
    set_to("steps", 0), set_to("steps", 1e999), set_to("strength", 10**400), set_to("strength", "x"),
    set_to("target", None), set_to("target", "\ud800"), set_to("paste", "yes"), set_to("working_size", [8, 8]),
    set_to("working_size", [math.inf, 8]), set_to("working_size", None), set_to("seed", -1), set_to("maps", 10**9),
    set_to("size", 128), set_to("size", [1]), set_to("mask", 1), set_to("mask_clip", "x"), set_to("method", "masactrl"),
    set_to("method", []), set_to("method", "../x"), set_to("unknown", 1), set_to("steering", {"dilate": 1}),
    lambda t, r: r["settings"].pop("refine"), lambda t, r: r["settings"].pop("method"),
    # What was made
    content("verdict", "\x1b[2J"), content("verdict", 1), content("evaluations", {"mask": "x"}),
    content("evaluations", {"mask": 1.5}), content("seconds", {"mask": math.inf}), content("seconds", []),
    content("steering", {"x": 1}), content("steering", {"dilate": 9**9}), content("steering", {"union": "x"}),
    content("x0", None), content("x0", {"tensor": "no such"}), content("x0", {"tensor": ["x0"]}), content("x0", "x0"),
    content("source", None), content("image", {"tensor": "x0"}), content("stages", {"encode": {"tensor": "x0"}}),
    content("stages", {"encode": [None]}), content("latent_mask", {"tensor": "x0"}), content("tensors", {"heat": 3}),
    content("given_mask", {"tensor": "source"}), content("clean", "x"),
    lambda t, r: r["content"]["stages"].update({"\ud800": [{"tensor": "x0"}]}),  # which no file could hold again
    # What functions returned
    call(0, "os:system"), call(0, "inversions:direct"), call(0, "inversions:ddim"), call(1, []),
    call(2, {"tensor": "x0"}), lambda t, r: r["calls"][0].pop(), lambda t, r: r["calls"][0][2].pop("maps"),
    lambda t, r: r["calls"].append(["inversions:ddim", {}, None]), lambda t, r: r["calls"][0][1].update(maps=10**9),
    lambda t, r: r["calls"][0][1].update(unknown=1),
    the_mask("verdict", []), the_mask("verdict", "found"), the_mask("verdict", [1]), the_mask("coverage", [math.nan]),
    the_mask("mask", None), the_mask("maps", [1]), the_mask("more", 1), the_mask("reference", 0),
    the_path("steps", 0), the_path("steps", 2.5), the_path("steps", 5), the_path("latents", []),
    the_path("latents", [{"tensor": "calls.1.null"}]), the_path("null", "x"), the_path("null", {"tensor": "x0"}),
    the_path("nulls", {"1": {"tensor": "x0"}}), the_path("nulls", {"x": {"tensor": "calls.1.null"}}),
    the_path("noises", {"1": {"tensor": "x0"}}), the_path("noises", {"1": {"tensor": "calls.1.null"}}),
    the_path("noises", []), the_path("eta", "x"), the_path("eta", True), the_path("pinned", 1), the_path("more", 1),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_a_tampered_state_is_refused(model, saved, tmp_path, change):
    path = rewritten(saved[1], tmp_path / "a.safetensors", change)
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be used: .*; save the edit again"):
        load_state(path, model)


def test_the_files_that_are_tampered_with_are_sound_otherwise(model, saved, tmp_path):
    assert same(load_state(rewritten(saved[1], tmp_path / "a.safetensors", lambda t, r: None), model), saved[0])


def test_a_bit_that_turned_is_seen(model, saved, tmp_path):
    whole, path = saved[1].read_bytes(), tmp_path / "a.safetensors"
    for at in (-1, -5000, len(whole) // 2):
        turned = bytearray(whole)
        turned[at] ^= 1
        path.write_bytes(turned)
        with pytest.raises(ValueError, match=r"a\.safetensors is damaged: .* sha256"):
            load_state(path, model)


def test_what_is_no_state_is_refused_before_the_model_is_loaded(here, saved, folder, capsys):
    whole = saved[1].read_bytes()
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", "vae.safetensors")
    save_file({"source": torch.zeros(1)}, "foreign.safetensors", {"minidiffedit": '{"format": 3}'})
    save_file({"source": torch.zeros(1)}, "old.safetensors", {"minidiffedit": '{"format": 1}'})
    save_file({"source": torch.zeros(1)}, "json.safetensors", {"minidiffedit": "[" * 99999})
    Path("cut.safetensors").write_bytes(whole[:-5])
    Path("empty.safetensors").write_bytes(b"")
    Path("a.pt").write_bytes(b"PK")
    for name, word in (
        ("vae.safetensors", "no saved edit"), ("foreign.safetensors", "format 3"), ("none", "no such file"),
        ("cut.safetensors", "bytes"), ("empty.safetensors", "0 bytes"), ("a.pt", "pickle"),
        ("json.safetensors", "cannot be used"), ("in.png", "is a picture"),
        ("old.safetensors", "saved by an older version of minidiffedit (format 1, expected 2); save the edit again"),
    ):  # fmt: skip
        assert word in failed(capsys, "resume", name, "--model", "no-such-model"), name


@pytest.mark.parametrize("network", tiny.FILES)
def test_a_state_of_another_model_is_refused(here, saved, folder, capsys, network):
    """Each of the three networks counts; got and expected are said."""
    shutil.copytree(folder, here / "other")
    file = here / "other" / network / tiny.FILES[network]
    tensors = load_file(file)
    tensors[next(iter(tensors))] += 1e-3
    save_file(tensors, file)
    line = failed(capsys, "resume", saved[1], "--model", here / "other", "-o", "o.png")
    digits = json.loads(safe_open(saved[1], "pt").metadata()["minidiffedit"])["model"][network]
    assert f"its {network} is {digits}" in line and not Path("o.png").exists()


def test_another_dtype_is_refused(here, saved, folder, capsys):
    line = failed(capsys, "resume", saved[1], "--model", folder, "--dtype", "bfloat16")
    assert "float32" in line and "bfloat16" in line and "--dtype float32" in line


def test_a_model_built_in_memory_has_no_states(sd, picture, saved, tmp_path):
    done = edit(sd, picture, **QUICK | {"steps": 2})
    with pytest.raises(ValueError, match="in memory"):
        save_state(done, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="in memory"):
        load_state(saved[1], sd)
    with pytest.raises(ValueError, match="must end in"):
        save_state(saved[0], tmp_path / "a.bin")


def test_what_could_not_be_read_again_is_not_written(model, saved, tmp_path):
    made, x = saved[0], torch.zeros(1, 4, 8, 10)
    (mask, path), heat = made.calls, made.heat
    for change, word in (
        ({"tensors": {"odd": {1, 2}}}, "tensors.odd is a set"), ({"tensors": {"odd": x * math.nan}}, "NaN"),
        ({"tensors": {"heat": heat * 2}}, "mask"), ({"settings": made.settings | {"more": 1}}, "contradict"),
        ({"settings": made.settings | {"maps": 3.5}}, "maps"), ({"latent": x[:, :3]}, "expected"),
        ({"verdict": 1}, "int"), ({"calls": (mask, replace(path, result=[x]))}, "no Path"),
        ({"calls": (mask, replace(path, result=model))}, r"calls\.1 is a StableDiffusion"),
        ({"calls": (Call(mask.function, mask.given | {"maps": 0}, mask.result),)}, "maps"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            save_state(replace(made, **change), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="no picture went into this result"):
        save_state(generate(model, "a horse", steps=2), tmp_path / "a.safetensors")
    assert not any(tmp_path.iterdir())


def test_nothing_is_imported_for_a_file(model, saved, tmp_path, monkeypatch):
    """Only the functions of the method's own plan are looked at, whatever a state names."""
    from minidiffedit import plans

    asked = []
    monkeypatch.setattr(plans, "import_module", lambda name: asked.append(name) or sys.modules[name])
    for name in ("..__main__:main", "../x:y", "minidiffedit.cli:main", "masactrl:masactrl"):
        path = rewritten(saved[1], tmp_path / "a.safetensors", lambda t, r: r["calls"][0].__setitem__(0, name))  # noqa: B023
        with pytest.raises(ValueError, match="no function of diffedit"):
            load_state(path, model)
    assert set(asked) == {"minidiffedit.methods.diffedit", "minidiffedit.methods.inversions"}
