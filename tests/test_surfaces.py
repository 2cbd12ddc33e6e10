"""Each family through every surface: attention (MasaCtrl), gradients (null-text inversion), 9 channels (inpainting),
and of latents alone: noises of their own, a guide, concepts in pairs, a blend, points, a second picture, two latents.
"""

import json

import numpy as np
import pytest
import tiny
from commands import failed, ran
from PIL import Image

STEPS = ["--steps", "2", "--seed", "3"]
TEXTS, TARGET = {"target": "a zebra", "source": "a horse"}, {"target": "a zebra"}
GIVEN = {
    "masactrl": TEXTS, "null-text-inversion": TEXTS | {"inner_steps": "1"},
    "sd-inpainting": TARGET | {"mask": "mask.png"}, "edit-friendly-ddpm": TEXTS, "proxedit": TEXTS,
    "ledits++": {"edits": "a horse=>a zebra; =>snow"}, "blended-latent-diffusion": TARGET | {"mask": "mask.png"},
    "sde-drag": {"points": "9,9=>40,30", "moves": "1"},
    "noise-diffusion": TARGET | {"reference": "mask.png"}, "edict": TEXTS, "sde-diffedit": TEXTS | {"maps": "2"},
}  # fmt: skip
AXIS = {"masactrl": "first-step=0,1", "sd-inpainting": "steps=1,2", "ledits++": "concept-scale=2,5"}
NOT_IN_SETS = {"sde-drag": "points", "noise-diffusion": "reference"}  # which a data set does not have


@pytest.fixture(params=GIVEN)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        n: tiny.write_folder(tmp_path_factory.mktemp("weights") / f"tiny{n}", channels=n, unet=tiny.QUICK)
        for n in (4, 9)
    }


@pytest.fixture
def words(method, folders, tmp_path, monkeypatch):
    """The options that the method needs; a picture and a mask lie in the current folder."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save("in.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 8:40] = 255
    Image.fromarray(mask).save("mask.png")
    said = {name: [value] for name, value in GIVEN[method].items()}
    said |= {"edit": said.pop("edits")[0].split("; ")} if "edits" in said else {}
    named = ((f"--{name.replace('_', '-')}", one) for name, values in said.items() for one in values)
    return ["--method", method, *(word for pair in named for word in pair)]


@pytest.fixture
def model(method, folders):
    return ["--model", folders[9 if method == "sd-inpainting" else 4]]


def test_edit_and_what_lies_beside_it(method, words, model, capsys, tmp_path):
    extra = [
        "-o",
        "o.png",
        "--save-state",
        "s.safetensors",
        "--report",
        "r.html",
        "--preview",
        "p",
        "--preview-every",
        1,
    ]
    said = ran(capsys, "edit", "in.png", *words, *STEPS, *extra, *model)
    assert said["method"] == method and said["rows"]["predicted"] == said["rows"]["paid"] > 0 and said["seed"] == 3
    assert ran(capsys, "edit", "in.png", *words, *STEPS, "--dry-run")["rows"] == {
        "predicted": said["rows"]["paid"],
        "paid": 0,
    }
    assert method in (tmp_path / "r.html").read_text() and [*(tmp_path / "p").glob("*decode*.png")]
    with Image.open("o.png") as picture:
        record = json.loads(picture.text["minidiffedit"])
        edited = np.asarray(picture)
    assert record["method"] == method and record["seed"] == 3 and record["steps"] == 2
    again = ran(capsys, "resume", "s.safetensors", "-o", "again.png", *model)
    assert again["evaluations"].get("encode", 0) == 0 and np.array_equal(np.asarray(Image.open("again.png")), edited)


def test_batch_sheet_and_eval(method, words, model, capsys, tmp_path):
    cells = GIVEN[method] | {"method": method, "image": "in.png", "steps": "2", "seed": "3"}
    values = (f'"{value}"' for value in cells.values())
    (tmp_path / "m.csv").write_text(f"{','.join(cells)}\n{','.join(values)}\n")
    made = ran(capsys, "batch", "m.csv", "-o", "out", *model)
    assert made["made"] == 1 and made["failed"] == 0
    ran(capsys, "edit", "in.png", *words, *STEPS, "-o", "alone.png", *model)
    (batched,) = (tmp_path / "out").glob("*.png")
    assert np.array_equal(np.asarray(Image.open(batched)), np.asarray(Image.open("alone.png")))
    seed = ["--seed", "3"] + ([] if method == "sd-inpainting" else ["--steps", "2"])
    columns = ["--columns", "seed=1,2"] if method == "sd-inpainting" else ["--columns", "strength=.5,1"]
    seed = [] if method == "sd-inpainting" else seed
    axis = AXIS.get(method, "guidance-scale=2,3")
    sheet = ran(capsys, "sheet", "in.png", *words, *seed, "--rows", axis, *columns, *model)
    assert sheet["rows"]["paid"] == sheet["rows"]["predicted"] and Image.open("in-sheet.png").width > 200
    (tmp_path / "set.csv").write_text("image,target,source,mask\nin.png,a zebra,a horse,mask.png\n")
    few = [word for name in ("--inner-steps", "--maps") if name in words for word in (name, 1)]
    evaluated = ["eval", "set.csv", "--methods", method, "--steps", 2, *few, "--no-plots", *model]
    if method in NOT_IN_SETS:
        assert f"needs {NOT_IN_SETS[method]}, which a data set does not have" in failed(capsys, *evaluated)
        return
    measured = ran(capsys, *evaluated)
    assert measured["failed"] == 0 and measured["runs"][0]["kinds"]["all"]["psnr_source"]["n"] == 1
