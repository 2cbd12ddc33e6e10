"""The proof of the house: a method nobody has heard of, one file and one row, runs through every surface there is.

The file is written into a temporary folder, the row into the table of this process: no file of the package changes.
"""

import csv
import json

import pytest
import torch
from commands import failed, ran
from PIL import Image
from tiny import box

from minidiffedit import StableDiffusion, cli, contact_sheet, encode, levels, load_state, methods, resume
from minidiffedit.cost import cost
from minidiffedit.methods.table import SYSTEMS, System
from minidiffedit.run import edit, plan
from minidiffedit.views.previews import Previews

TOY = '''
"""A toy (Nobody, 0000.00000): walked down under the target, and every few steps drawn back to the source.

Model rows: 2 K b.
"""

from typing import Annotated, Any

import torch
from torch import Tensor

from ..diffedit import Eps
from ..options import Scale, Within
from ..path import Path


@torch.no_grad()
def toy(
    eps: Eps,
    path: Path,
    target: Any,
    source: Any = "",
    *,
    guidance_scale: Scale = 3.0,
    my_option: Annotated[int, Within(1, 9, "steps between two looks back")] = 2,
) -> Tensor:
    """Half the source each time it looks back; under its own text and guidance 1 that is the reconstruction."""
    x, step = path.rows(1), path.walk()
    for i, j in enumerate(path.down()):
        e_source, e_target = eps(x, path.t[j], [source, target])
        x = step(x, e_source + guidance_scale * (e_target - e_source), j)
        if i % my_option == 0:
            x = (x + path[j - 1]) / 2
    return x
'''
GIVEN = {"target": "a zebra", "source": "a horse", "steps": 5, "seed": 0}
WORDS = ["--method", "toy", "--target", "a zebra", "--source", "a horse", "--steps", "5", "--seed", "0"]
ROWS = {"encode": 5, "decode": 10}


@pytest.fixture(scope="module", autouse=True)
def toy(tmp_path_factory):
    """One file, and one row."""
    folder = tmp_path_factory.mktemp("methods")
    (folder / "toy.py").write_text(TOY.lstrip())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
        patch.setitem(SYSTEMS, "toy", System("0000.00000", "toy:toy", "ddim"))
        yield


@pytest.fixture
def here(tmp_path, monkeypatch, picture):
    monkeypatch.chdir(tmp_path)
    picture.save("photo.png")
    return tmp_path


@pytest.fixture(scope="module")
def loaded(folder):
    return StableDiffusion.load(folder, device="cpu")


def record_of(path):
    with Image.open(path) as file:
        return json.loads(file.info["minidiffedit"])


def pixels(path):
    with Image.open(path) as file:
        return file.convert("RGB").tobytes()


# ---------------------------------------------------------------- Python


def by_hand(sd, x0, my_option=2, scale=3.0):
    source, target, (t, a) = sd.text(["a horse"]), sd.text(["a zebra"]), levels(5)
    up = encode(sd.eps, x0, source, steps=5, strength=1.0)
    x = up[5]
    for i, j in enumerate(range(5, 0, -1)):
        e_source, e_target = sd.eps(x, t[j], [source, target])
        e = e_source + scale * (e_target - e_source)
        x = (a[j - 1] / a[j]) ** 0.5 * (x - (1 - a[j]) ** 0.5 * e) + (1 - a[j - 1]) ** 0.5 * e
        x = (x + up[j - 1]) / 2 if i % my_option == 0 else x
    return x


def test_edit(sd, picture):
    for options in ({}, {"my_option": 3, "guidance_scale": 2.0}):
        settled = plan("toy", **GIVEN, **options)
        done = edit(sd, picture, "toy", **GIVEN, **options)
        assert cost(settled) == done.evaluations == ROWS and done.verdict == "edited" and done.mask is None
        with torch.no_grad():
            expected = by_hand(sd, done.x0, options.get("my_option", 2), options.get("guidance_scale", 3.0))
        torch.testing.assert_close(done.latent, expected, rtol=1e-4, atol=1e-4)
        assert len(done.stages["encode"]) == len(done.stages["decode"]) == 6 and len(done.clean["decode"]) == 5
    for options, why in (({"my_option": 0}, "my_option must be"), ({"my_optoin": 1}, "did you mean 'my_option'")):
        with pytest.raises(ValueError, match=why):
            edit(sd, picture, "toy", **GIVEN, **options)
    with pytest.raises(ValueError, match="toy needs target"):
        plan("toy")


def test_reuse_and_other_inversions(sd, picture):
    first = edit(sd, picture, "toy", **GIVEN)
    assert edit(sd, picture, "toy", reuse=first, my_option=3, **GIVEN).evaluations == {"encode": 0, "decode": 10}
    assert resume(first, target="a cow").evaluations == {"encode": 0, "decode": 10}
    replay = edit(sd, picture, "replay", reuse=first, **GIVEN)
    assert replay.evaluations == {"encode": 0, "decode": 10}
    for inversion in ("direct", "noise"):
        assert edit(sd, picture, f"{inversion}+toy", **GIVEN).method == f"{inversion}+toy"


def test_watching_and_previews(sd, picture, tmp_path):
    seen = []
    edit(sd, picture, "toy", watch=seen.append, **GIVEN)
    assert [step.stage for step in seen] == ["encode"] * 5 + ["decode"] * 5 and seen[-1].rows == 15
    edit(sd, picture, "toy", watch=Previews(sd, picture, tmp_path / "seen", every=2), **GIVEN)
    assert len([*(tmp_path / "seen").iterdir()]) >= 2


def test_sheet(sd, picture):
    sheet = contact_sheet(
        sd, picture, "toy", rows=("my_option", [1, 2]), columns=("guidance_scale", [1.0, 3.0]), **GIVEN
    )
    assert [[one.settings["my_option"] for one in row] for row in sheet.edits] == [[1, 1], [2, 2]]
    assert sheet.evaluations == {"encode": 5, "decode": 40}
    assert torch.equal(sheet.edits[1][1].latent, edit(sd, picture, "toy", **GIVEN).latent)


# ---------------------------------------------------------------- the shell


def test_edit_in_a_shell(here, folder, loaded, picture, capsys):
    said = ran(capsys, "edit", "photo.png", *WORDS, "--my-option", "3", "--model", folder)
    assert said["output"] == "photo-edited.png" and said["method"] == "toy" and said["seed"] == 0
    assert said["evaluations"] == ROWS and said["rows"] == {"predicted": 15, "paid": 15}
    record = record_of("photo-edited.png")
    assert record["method"] == "toy" and record["my_option"] == 3 and record["edited"] is True
    assert pixels("photo-edited.png") == edit(loaded, picture, "toy", my_option=3, **GIVEN).image.tobytes()
    again = {name: record[name] for name in ("method", "target", "source", "steps", "seed", "my_option")}
    assert pixels("photo-edited.png") == edit(loaded, picture, **again).image.tobytes()
    assert cli.main(["edit", "photo.png", *WORDS, "--model", str(folder), "-o", "said.png"]) == 0
    assert "said.png" in capsys.readouterr().out


def test_what_a_shell_refuses(here, capsys):
    no = ["--model", "no-such-model"]
    assert "my_option" in failed(capsys, "edit", "photo.png", *WORDS, "--my-option", "0", *no)
    for words in (["--method", "toyy", "--target", "a"], [*WORDS, "--mask", "photo.png"], [*WORDS, "--my-option", "x"],
                  ["--method", "toy"]):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            cli.main(["edit", "photo.png", *words, *no])
        assert "error" in capsys.readouterr().err
    assert not [*here.glob("*edited*")]


def test_help_and_the_list_of_methods(here, folder, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["edit", "--method", "toy", "--help"])
    told = capsys.readouterr().out
    assert "--my-option" in told and "steps between two looks back" in told and "--mask-threshold" not in told
    rows = {row["name"]: row for row in ran(capsys, "methods")}
    assert rows["toy"]["paper"] == "0000.00000" and rows["toy"]["needs"] == ["target"] and rows["toy"]["rows"] == 150
    one = ran(capsys, "methods", "toy")
    assert one["options"]["my_option"]["default"] == 2 and "drawn back to the source" in one["about"]
    assert cli.main(["methods", "toy"]) == 0 and "--my-option" in capsys.readouterr().out


def test_dry_run(here, capsys):
    said = ran(capsys, "edit", "photo.png", *WORDS, "--my-option", "3", "--dry-run", "--model", "no-such-model")
    assert said["evaluations"] == ROWS and said["rows"] == {"predicted": 15, "paid": 0} and "output" not in said
    assert [*here.glob("*.png")] == [here / "photo.png"]


def test_previews_in_a_shell(here, folder, capsys):
    ran(capsys, "edit", "photo.png", *WORDS, "--preview", "seen", "--preview-every", "2", "--model", folder)
    files = sorted(path.name for path in (here / "seen").iterdir())
    assert len(files) >= 2 and all(name.endswith(".png") for name in files)


def test_state_and_resume(here, folder, loaded, picture, capsys):
    ran(capsys, "edit", "photo.png", *WORDS, "--save-state", "toy.safetensors", "--model", folder)
    state = load_state("toy.safetensors", loaded)
    assert state.method == "toy" and state.settings["my_option"] == 2
    dry = ran(capsys, "resume", "toy.safetensors", "--my-option", "3", "--dry-run", "--model", folder)
    said = ran(capsys, "resume", "toy.safetensors", "--my-option", "3", "--model", folder, "-o", "on.png")
    assert dry["evaluations"] == said["evaluations"] == {"encode": 0, "decode": 10} and said["method"] == "toy"
    assert pixels("on.png") == edit(loaded, picture, "toy", my_option=3, **GIVEN).image.tobytes()
    assert resume(state, target="a cow").evaluations == {"encode": 0, "decode": 10}


def test_reports(here, folder, capsys):
    said = ran(
        capsys,
        "edit",
        "photo.png",
        *WORDS,
        "--save-state",
        "toy.safetensors",
        "--report",
        "toy.html",
        "--model",
        folder,
    )
    page = (here / "toy.html").read_text()
    assert (
        said["report"] == "toy.html"
        and page.startswith("<!")
        and "toy" in page
        and "my option" in page.replace("_", " ")
    )
    later = ran(capsys, "report", "toy.safetensors", "-o", "later.html", "--model", folder)
    assert later["method"] == "toy" and (here / "later.html").stat().st_size > 10_000


def test_batch(here, folder, loaded, picture, capsys):
    with open("rows.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "method", "source", "target", "my_option", "steps", "seed"])
        table.writerow(["photo.png", "toy", "a horse", "a zebra", "2", "5", "0"])
        table.writerow(["photo.png", "toy", "a horse", "a zebra", "3", "5", "0"])
        table.writerow(["photo.png", "replay", "a horse", "a zebra", "", "5", "0"])
    said = ran(capsys, "batch", "rows.csv", "-o", "out", "--model", folder)
    assert said["made"] == 3 and said["failed"] == 0
    assert said["evaluations"] == 15 + 10 + 10  # one encoding for all three
    made = {record["my_option"]: pixels(path) for path in (here / "out").glob("*.png")
            if (record := record_of(path))["method"] == "toy"}  # fmt: skip
    for my_option in (2, 3):
        assert made[my_option] == edit(loaded, picture, "toy", my_option=my_option, **GIVEN).image.tobytes()
    with open("rows.csv", "a") as file:
        file.write("photo.png,replay,a,b,3,5,0\n")  # an option that the row's method has not
    assert cli.main(["batch", "rows.csv", "-o", "out", "--model", str(folder), "--json", "--quiet"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["already there"] == 3 and said["failed"] == 1 and "my_option" in said["errors"][0]["error"]


def test_evaluation(here, folder, capsys):
    box().save("mask.png")
    (here / "set.csv").write_text("image,target,source,mask\nphoto.png,a zebra,a horse,mask.png\n")
    words = [
        "--methods",
        "toy",
        "direct+toy",
        "--my-option",
        "2",
        "3",
        "--steps",
        "5",
        "--metrics",
        "psnr",
        "--no-plots",
    ]
    said = ran(capsys, "eval", "set.csv", "-o", "eval", *words, "--model", folder)
    assert [run["done"] for run in said["runs"]] == [1] * 4 and said["failed"] == 0
    told = [(run["run"]["method"], run["run"]["my_option"]) for run in said["runs"]]
    assert sorted(told) == [(method, value) for method in ("direct+toy", "toy") for value in (2, 3)]
    for run in said["runs"]:
        assert run["model_rows"] <= 15 and any("psnr" in name for name in run["kinds"]["all"])


def test_sheets_in_a_shell(here, folder, capsys):
    words = ["--target", "a zebra", "--source", "a horse", "--steps", "5", "--seed", "0", "--model", folder]
    said = ran(capsys, "sheet", "photo.png", "--method", "toy", "--rows", "my-option=1,2", "--columns",
               "guidance-scale=1,3", *words, "-o", "sheet.png")  # fmt: skip
    assert said["evaluations"] == {"encode": 5, "decode": 40} and said["rows"] == {"predicted": 45, "paid": 45}
    said = ran(capsys, "sheet", "photo.png", "--rows", "method=toy,replay", "--columns", "guidance-scale=1,3", *words,
               "-o", "methods.png")  # fmt: skip
    assert said["rows"]["predicted"] == said["rows"]["paid"] == 5 + 4 * 10
    dry = ran(capsys, "sheet", "photo.png", "--method", "toy", "--rows", "my-option=1,2", *words[:-2], "--dry-run")
    assert dry["rows"]["paid"] == 0
