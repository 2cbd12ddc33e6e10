"""`crop`: the mask sought on the whole picture, a square around it edited at full resolution, and pasted back."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import failed, ran
from PIL import Image
from stubs import Model

from minidiffedit import Steering, edit, resume, save_state
from minidiffedit import run as R
from minidiffedit.cost import cost, costs
from minidiffedit.methods.table import SYSTEMS
from minidiffedit.views.report import report_page
from minidiffedit.views.witness import Witness

FEW = {"target": "a zebra", "source": "a horse", "steps": 10, "seed": 0}
BOX = (300, 120, 360, 170)  # of a picture of 480 x 320


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (320, 480, 3), dtype=np.uint8))


def mask_of(size, box=BOX):
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


MASKED = [name for name, row in SYSTEMS.items() if row.edit and "crop" in R.blank_plan(name).options]


@pytest.mark.parametrize("method", MASKED)
def test_the_square_is_edited_as_a_picture_of_its_own(picture, method):
    """Given a mask, the result is what the method makes of the square alone, and the input's pixels elsewhere; the rows
    are those that were predicted.
    """
    sd, given = Model(SYSTEMS[method].weights), R.blank_plan(method).given
    texts = {"target": "a zebra", "source": "a horse", "instruction": "paint it", "edits": [("a horse", "a zebra")]}
    options = {"seed": 0, "steps": 10} | {name: texts[name] for name in texts.keys() & given.keys()}
    options |= {"maps": 2} if "maps" in R.blank_plan(method).options else {}
    if "reference" in given:
        options["reference"] = tiny.picture()
    settled = R.plan(method, mask=mask_of(picture.size), crop=True, **options)
    done = R.execute(settled, sd, picture)
    left, top, right, bottom = box = tuple(done.settings["crop_box"])
    assert right - left == bottom - top < 200 and left < BOX[0] and BOX[2] < right and top < BOX[1] and BOX[3] < bottom
    assert cost(settled) == done.evaluations and done.rows > 0
    alone = edit(sd, picture.crop(box), method, mask=mask_of(picture.size).crop(box), **options)
    assert torch.equal(done.latent, alone.latent) and done.image.crop(box).tobytes() == alone.image.tobytes()
    before, after, pasted = (np.asarray(one) for one in (picture, done.image, done.paste_mask))
    assert (before == after)[pasted == 0].all() and (before != after)[pasted == 255].any()
    outside = np.ones(pasted.shape, bool)
    outside[top:bottom, left:right] = False
    assert not pasted[outside].any() and done.image.size == done.mask.size == picture.size


def test_the_methods_with_a_mask_of_ones_own_have_it():
    every = {name for name, row in SYSTEMS.items() if row.edit and "mask" in R.blank_plan(name).given}
    assert (
        every - {*MASKED} == {"sde-drag", "drag-diffusion", "drag-noise", "dragon-diffusion"}
        and "crop" not in R.blank_plan("masactrl").options
    )
    with pytest.raises(ValueError, match="no option 'crop'"):
        R.plan("masactrl", target="a zebra", crop=True)
    with pytest.raises(ValueError, match="sdedit finds none: give one"):
        R.plan("sdedit", target="a zebra", crop=True)


def found_small(monkeypatch):
    """DiffEdit's own mask, cut to a few cells: the stand-in's is as large as the picture."""
    whole = R.function_at("diffedit:contrast")

    def contrast(*args, **options):
        found = whole(*args, **options)
        cells = torch.zeros_like(found.mask)
        cells[..., 3:5, 6:8] = True
        return replace(found, mask=cells)

    contrast.__wrapped__, contrast.__kwdefaults__ = whole, whole.__kwdefaults__
    contrast.__annotations__ = whole.__annotations__
    monkeypatch.setattr("minidiffedit.methods.diffedit.contrast", contrast)


def test_the_mask_is_sought_on_the_whole_and_reused(picture, monkeypatch):
    found_small(monkeypatch)
    sd = Model()
    settled = R.plan(crop=True, maps=2, **FEW)
    done = R.execute(settled, sd, picture)
    assert done.evaluations == cost(settled) == {"mask": 4, "encode": 8, "decode": 16}
    assert done.tensors["maps"].shape[2:] == done.x0.shape[2:] == (8, 12) and done.latent.shape[2:] == (8, 8)
    again = R.plan(crop=True, maps=2, guidance_scale=3, **FEW)
    assert costs([settled, again])[1] == R.execute(again, sd, picture, reuse=[done]).evaluations
    assert R.execute(again, sd, picture, reuse=[done]).evaluations == {"mask": 0, "encode": 8, "decode": 16}
    plain = R.plan(maps=2, **FEW)
    assert costs([settled, plain])[1] == R.execute(plain, sd, picture, reuse=[done]).evaluations
    assert R.execute(plain, sd, picture, reuse=[done]).evaluations == {"mask": 0, "encode": 8, "decode": 16}
    assert R.execute(settled, sd, picture, reuse=[R.execute(plain, sd, picture)]).evaluations["mask"] == 0


def test_a_mask_too_large_is_said_and_the_whole_is_worked_on(picture):
    large = mask_of(picture.size, (40, 40, 360, 300))
    with pytest.warns(UserWarning, match="crop gains nothing"):
        done = edit(Model(), picture, mask=large, crop=True, **FEW)
    plain = edit(Model(), picture, mask=large, **FEW)
    assert done.image.tobytes() == plain.image.tobytes() and done.inside is None and "crop_box" not in done.settings
    with pytest.warns(UserWarning, match="nothing to edit"):
        assert edit(Model(), picture, mask=Image.new("L", picture.size), crop=True, **FEW).rows == 0


@pytest.mark.parametrize("box", [(0, 0, 40, 30), (440, 290, 480, 320), (200, 0, 230, 60)])
@pytest.mark.parametrize("margin", [0.0, 0.5, 1.0])
def test_the_square_stays_in_the_picture_and_holds_the_mask(picture, box, margin):
    done = edit(Model(), picture, mask=mask_of(picture.size, box), crop=True, crop_margin=margin, **FEW)
    left, top, right, bottom = done.settings["crop_box"]
    assert 0 <= left <= box[0] and box[2] <= right <= 480 and 0 <= top <= box[1] and box[3] <= bottom <= 320
    assert right - left == bottom - top >= 64


def test_steering_haze_and_no_paste(picture):
    mask = Image.new("L", picture.size, 1)
    mask.paste(255, BOX)
    with pytest.warns(UserWarning, match="nothing is kept"):
        done = edit(Model(), picture, mask=mask, crop=True, **FEW)
    assert done.settings["crop_box"][0] > 200  # haze is no reason to take all
    steered = edit(Model(), picture, mask=mask_of(picture.size), steering=Steering(dilate=1), crop=True, **FEW)
    side, wider = (one.settings["crop_box"][2] - one.settings["crop_box"][0] for one in (done, steered))
    assert wider > side
    bare = edit(Model(), picture, mask=mask_of(picture.size), paste=False, crop=True, **FEW)
    assert bare.image.crop(tuple(bare.settings["crop_box"])).tobytes() == bare.inside.image.tobytes()


def test_a_report_shows_the_square_and_a_state_is_refused(sd, picture, tmp_path):
    done = edit(sd, picture, mask=mask_of(picture.size), crop=True, **FEW | {"steps": 4})
    page, (left, top, right, bottom) = report_page(done), done.settings["crop_box"]
    assert f"{right - left} x {bottom - top} pixels from {left}, {top}" in page and "--crop" in page
    with pytest.raises(ValueError, match="crop cannot be saved"):
        save_state(done, tmp_path / "a.safetensors")


def test_the_page_shows_where_the_method_reached_in(sd, picture):
    """In the square as in the whole picture."""
    options = {"mask": mask_of(picture.size), "source": "a horse", "crop": True, "steps": 4, "seed": 0}
    done = edit(sd, picture, "pfb-diff", target="a zebra", witness=Witness(), **options)
    assert done.settings["crop_box"] and done.witness.touched and done.witness.looks
    assert {"touched", "looked"} <= set(re.search(r'<main class="([^"]*)"', report_page(done))[1].split())


def test_from_the_shell(folder, picture, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    mask_of(picture.size).save("m.png")
    command = ["edit", "in.png", "--target", "a zebra", "--steps", "4", "--maps", "1", "--seed", "0", "--model", folder]
    shown = ["--preview", "previews", "--preview-every", "1", "--report", "out.html"]
    said = ran(capsys, *command, "--mask", "m.png", "--crop", "--crop-margin", "0.3", *shown, "-o", "out.png")
    assert {Image.open(one).size for one in Path("previews").iterdir()} == {(64, 64)} and Path("out.html").is_file()
    assert said["rows"]["predicted"] == said["rows"]["paid"] and len(said["settings"]["crop_box"]) == 4
    with Image.open("out.png") as file:
        assert json.loads(file.text["minidiffedit"])["crop_box"] == said["settings"]["crop_box"]
    assert "then `resume` that state with --crop" in failed(capsys, *command, "--crop", "--save-state", "a.safetensors")
    assert ran(capsys, *command, "--save-state", "a.safetensors")["state"]
    again = ran(capsys, "resume", "a.safetensors", "--mask", "m.png", "--crop", "--model", folder, "-o", "again.png")
    assert again["rows"]["predicted"] == again["rows"]["paid"] > 0 and again["settings"]["crop_box"]


def test_a_row_may_crop(folder, picture, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    mask_of(picture.size).save("m.png")
    rows = [
        {"image": "in.png", "target": "a zebra", "mask": "m.png", "crop": crop, "steps": 4} for crop in (True, "false")
    ]
    Path("m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ran(capsys, "batch", "m.jsonl", "-o", "out", "--model", folder)["made"] == 2
    one, two = (json.loads(line) for line in Path("out/results.jsonl").read_text().splitlines())
    assert one["settings"]["crop_box"] and "crop_box" not in two["settings"] and one["seed"] == two["seed"]
    alone = ["edit", "in.png", "--target", "a zebra", "--mask", "m.png", "--crop", "--steps", "4", "--model", folder]
    ran(capsys, *alone, "--seed", one["seed"], "-o", "alone.png")
    assert Path("alone.png").read_bytes() == Path("out", one["output"]).read_bytes()


def test_a_resumed_edit_may_crop(sd, picture):
    first = edit(sd, picture, mask=mask_of(picture.size), **FEW | {"steps": 4})
    done = resume(first, crop=True)
    assert done.inside is not None and done.evaluations == {"mask": 0, "encode": 3, "decode": 6}
