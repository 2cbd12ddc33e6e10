"""An edit in one file: the round trip, what going on from it costs, and what is refused."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import failed, ran
from PIL import Image, ImageCms
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stubs import no_address

from minidiffedit import StableDiffusion, Steering, cli, edit, load_state, resume, save_state
from minidiffedit.files.states import checksum

QUICK = {"steps": 10, "maps": 2, "target": "a zebra", "source": "a horse", "seed": 0}
FAST = ["--target", "a zebra", "--source", "a horse", "--steps", "10", "--maps", "2", "--seed", "0"]


@pytest.fixture(scope="module")
def model(folder):
    """The tiny model from its files: a state is told by them."""
    return StableDiffusion.load(folder, device="cpu")


@pytest.fixture(scope="module")
def picture():
    made = Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 93, 3), dtype=np.uint8))
    made.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return made


def box():
    mask = Image.new("L", (93, 75))
    mask.paste(128, (20, 10, 50, 40))
    return mask


@pytest.fixture(scope="module")
def saved(model, picture, tmp_path_factory):
    """An edit and its file."""
    path = tmp_path_factory.mktemp("states") / "run.safetensors"
    done = edit(model, picture, **QUICK)
    save_state(done, path)
    return done, path


def same(one, two):
    """Bit for bit, whatever an Edit holds."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, Image.Image):
        return one.mode == two.mode and one.tobytes() == two.tobytes() and one.info == two.info
    if isinstance(one, tuple | list):
        return len(one) == len(two) and all(map(same, one, two))
    if hasattr(one, "prefix"):
        return one.steps == two.steps and same([*one.values()], [*two.values()])
    if isinstance(one, dict) or not hasattr(one, "__dict__") or isinstance(one, StableDiffusion):
        return one == two
    return vars(one).keys() == vars(two).keys() and all(same(vars(one)[name], vars(two)[name]) for name in vars(one))


# ---------------------------------------------------------------- the round trip


@pytest.mark.parametrize("options", [
    {}, {"mask": box()}, {"paste": False}, {"size": 96, "mask_clip": None}, {"encode_text": "source", "chunk": 1},
    {"strength": 0.0}, {"target": "a horse"}, {"strength": 0.0, "mask": box()},
    {"steering": Steering(largest=True, dilate=1, feather=1, union=box(), subtract=Image.new("L", (93, 75)))},
    {"mask": box(), "steering": Steering(invert=True)},
], ids=no_address)  # fmt: skip
@pytest.mark.filterwarnings("ignore:nothing to edit")
def test_everything_comes_back_bit_for_bit(model, picture, tmp_path, options):
    done = edit(model, picture, **QUICK | options)
    save_state(done, tmp_path / "a.safetensors")
    back = load_state(tmp_path / "a.safetensors", model)
    assert same(done, back)
    save_state(back, tmp_path / "b.safetensors")
    assert Path(tmp_path / "a.safetensors").read_bytes() == Path(tmp_path / "b.safetensors").read_bytes()


def test_half_types_come_back(folder, picture, tmp_path):
    half = StableDiffusion.load(folder, device="cpu", dtype="bfloat16")
    done = edit(half, picture, **QUICK)
    save_state(done, tmp_path / "a.safetensors")
    back = load_state(tmp_path / "a.safetensors", half)
    assert same(done, back) and back.found.reference.dtype == torch.bfloat16


def test_a_loaded_state_does_not_hang_on_its_file(model, saved, tmp_path):
    copy = Path(shutil.copy(saved[1], tmp_path / "a.safetensors"))
    back = load_state(copy, model)
    copy.write_bytes(b"\0" * copy.stat().st_size)
    assert same(back, saved[0])


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("changes, rows", [
    ({"mask_threshold": 0.3}, (0, 0, 16)), ({"mask_clip": 2.0}, (0, 0, 16)), ({"mask_clip": None}, (0, 0, 16)),
    ({"mask": box()}, (0, 0, 16)), ({"steering": Steering(dilate=1)}, (0, 0, 16)), ({"strength": 0.5}, (0, 0, 10)),
    ({"guidance_scale": 1.0}, (0, 0, 8)), ({"negative_prompt": "a car"}, (0, 0, 16)), ({"paste": False}, (0, 0, 16)),
    ({"target": "a cow"}, (2, 0, 16)), ({"target": "a cow", "strength": 0.5, "mask_threshold": 0.4}, (2, 0, 10)),
    ({"source": ""}, (4, 0, 16)), ({"seed": 1}, (4, 0, 16)), ({"strength": 1.0}, (0, 10, 20)),
    ({"steps": 5}, (4, 4, 8)), ({}, (0, 0, 16)),
], ids=no_address)  # fmt: skip
def test_only_what_changes_is_paid_for(model, picture, saved, changes, rows):
    state = load_state(saved[1], model)
    before = model.evaluations
    done = resume(state, **changes)
    assert tuple(done.evaluations.values()) == rows and model.evaluations - before == sum(rows)
    fresh = edit(model, picture, **QUICK | changes)
    assert torch.allclose(done.latent, fresh.latent, rtol=1e-4, atol=1e-5) and done.settings == fresh.settings
    assert torch.equal(done.latent_mask, fresh.latent_mask)
    if rows[0] == 0:  # a target alone rounds otherwise than beside its reference
        assert torch.equal(done.latent, fresh.latent) and done.image.tobytes() == fresh.image.tobytes()


def test_a_given_mask_and_the_steering_stay_until_others_come(model, picture, tmp_path):
    how = Steering(dilate=1)
    save_state(edit(model, picture, mask=box(), steering=how, **QUICK), tmp_path / "a.safetensors")
    state = load_state(tmp_path / "a.safetensors", model)
    kept = resume(state, target="a cow")
    assert torch.equal(kept.latent_mask, state.latent_mask) and kept.evaluations == {
        "mask": 0,
        "encode": 0,
        "decode": 16,
    }
    assert torch.equal(resume(state, steering=Steering()).latent_mask, state.given)
    computed = resume(state, mask_threshold=0.4)
    assert computed.verdict == "found" and computed.evaluations["mask"] == 4 and computed.settings["mask"] == "computed"
    assert torch.equal(computed.latent_mask, Steering(dilate=1)(computed.found.mask))


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
        if "--target" not in changes:
            assert Path("run-resumed.png").read_bytes() == Path("fresh.png").read_bytes(), changes


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


@pytest.mark.parametrize("changes", [
    ["--mask-threshold", "0.3"], ["--mask", "m.png"], ["--target", "a cow", "--strength", "0.5"], ["--source", "a cow"],
    ["--strength", "0.9"], ["--guidance-scale", "1"], ["--strength", "0"], ["--target", "a horse"],
    ["--mask", "black.png"], ["--mask", "black.png", "--invert"],
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


def test_a_state_that_names_no_model_asks_for_one(here, saved, capsys):
    rewritten(saved[1], here / "old.safetensors", lambda t, r: r.pop("model_name"))
    line = failed(capsys, "resume", "old.safetensors")
    assert "names no model" in line and "--model" in line
    rewritten(saved[1], here / "bad.safetensors", lambda t, r: r.update(model_name=3))
    assert "not sound" in failed(capsys, "resume", "bad.safetensors")


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


CHANGES = [
    lambda t, r: t.pop("trajectory"), lambda t, r: t.pop("flat_below"), lambda t, r: t.update(x=torch.zeros(1)),
    lambda t, r: t.update(trajectory=torch.zeros(9999, 4, 8, 10)), lambda t, r: t.update(maps=torch.zeros(1, 9, 8, 10)),
    lambda t, r: t.update(latent_mask=torch.zeros(1, 1, 8, 9)), lambda t, r: t.update(decoded=torch.zeros(0)),
    lambda t, r: t.update(source=torch.zeros(75, 93, 4, dtype=torch.uint8)),
    lambda t, r: t.update(source=torch.ones(9)),
    lambda t, r: t.update(source=torch.zeros(2000, 3, 3, dtype=torch.uint8)),
    lambda t, r: t.update(image=torch.zeros(75, 93, 3)), lambda t, r: t["trajectory"].fill_(math.nan),
    lambda t, r: t["reference"].fill_(math.inf), lambda t, r: t["latent_mask"].fill_(2), lambda t, r: t.pop("source"),
    lambda t, r: r.clear(), lambda t, r: r.update(settings=[]), lambda t, r: r.update(verdict="fine"),
    lambda t, r: r.update(steering={"x": 1}), lambda t, r: r.update(steering={"dilate": 9**9}),
    lambda t, r: r.update(steering={"union": "x"}), lambda t, r: r.update(evaluations={"mask": "x"}),
    lambda t, r: r.update(model="x"), set_to("steps", 0), set_to("steps", 1e999), set_to("strength", 10**400),
    set_to("strength", "x"), set_to("target", None), set_to("paste", "yes"), set_to("working_size", [8, 8]),
    set_to("working_size", [math.inf, 8]), set_to("working_size", None), set_to("seed", -1), set_to("maps", 10**9),
    set_to("size", 128), set_to("size", [1]), set_to("encoded_text", "x"), set_to("mask", 1), set_to("mask_clip", "x"),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=range(len(CHANGES)))
def test_a_tampered_state_is_refused(model, saved, tmp_path, change):
    path = rewritten(saved[1], tmp_path / "a.safetensors", change)
    with pytest.raises(ValueError, match=r"a\.safetensors|latent mask"):
        load_state(path, model)


def test_what_is_no_state_is_refused_before_the_model_is_loaded(here, saved, folder, capsys):
    whole = saved[1].read_bytes()
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", "vae.safetensors")
    save_file({"source": torch.zeros(1)}, "foreign.safetensors", {"minidiffedit": '{"format": 2}'})
    save_file({"source": torch.zeros(1)}, "json.safetensors", {"minidiffedit": "[" * 99999})
    Path("cut.safetensors").write_bytes(whole[:-5])
    Path("empty.safetensors").write_bytes(b"")
    Path("a.pt").write_bytes(b"PK")
    for name, word in (
        ("vae.safetensors", "no saved edit"), ("foreign.safetensors", "format 2"), ("none", "no such file"),
        ("cut.safetensors", "bytes"), ("empty.safetensors", "0 bytes"), ("a.pt", "pickle"),
        ("json.safetensors", "not sound"), ("in.png", "no safetensors file"),
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


def test_what_could_not_be_read_again_is_not_written(model, here, picture):
    from minidiffedit.arms import arm

    options = {"target": "a zebra", "source": "a horse", "steps": 5, "maps": 2, "seed": 0}
    for name in ("encode", "mask", "reconstruction"):
        with pytest.raises(ValueError, match="only what `edit` or `resume` made"):
            save_state(arm(model, picture, name, **options), "arm.safetensors")
    with pytest.raises(ValueError, match="paste must be True or False"):
        edit(model, picture, paste=1, **options)
    assert not Path("arm.safetensors").exists()
