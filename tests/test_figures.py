"""The usual figures: the numbers against what they are said to be, the cost, the page, the doors."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ran
from PIL import Image
from stubs import Model

from minidiffedit import cli, edit, encode, figure, masked_decode
from minidiffedit.views import figures
from minidiffedit.views.figures import FIGURES, planned_figure
from minidiffedit.views.sheet import costs

QUICK = {"steps": 10, "maps": 2, "target": "a zebra", "source": "a horse", "seed": 0}
STEPLESS = {name: value for name, value in QUICK.items() if name != "steps"}
FAST = ["--target", "a zebra", "--source", "a horse", "--steps", "10", "--maps", "2", "--seed", "0"]


@pytest.fixture(scope="module")
def sd():
    return Model()


def psnr(a, b, where=None):
    squares = (np.asarray(a, float) - np.asarray(b, float)) ** 2
    return 10 * np.log10(255**2 / (squares if where is None else squares[where]).mean())


def checked(sd, before, made, cost):
    """The counts as told by hand, and a page of one piece."""
    assert tuple(made.evaluations.values()) == cost and sd.evaluations - before == sum(cost)
    pixels = np.asarray(made.image.convert("L"))
    assert made.image.mode == "RGB" and all(
        (e == 255).all() for e in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    )
    json.dumps(made.numbers, allow_nan=False)
    return made


def test_threshold(sd, picture):
    before = sd.evaluations
    made = checked(sd, before, figure(sd, picture, "threshold", values=[0.6, 0.2], **QUICK), (4, 8, 32))
    heat = edit(sd, picture, **QUICK).heat.numpy()
    shares = [float((heat > t).mean()) for t in np.linspace(0, 1, 101).round(2)]
    assert made.numbers["coverage"] == pytest.approx(shares) and made.numbers["coverage"][-1] == 0
    assert made.numbers["edited"]["threshold"] == [0.2, 0.6]
    assert made.numbers["edited"]["coverage"] == [one.coverage for one in made.edits]
    alone = edit(sd, picture, **QUICK | {"mask_threshold": 0.6})
    assert torch.equal(made.edits[1].latent, alone.latent)


def test_strength(sd, picture):
    before = sd.evaluations
    made = checked(sd, before, figure(sd, picture, "strength", values=[0.3, 0.8, 0.6], **QUICK), (4, 8, 2 * 17))
    assert made.numbers["strength"] == [0.3, 0.6, 0.8]
    inside = np.asarray(made.edits[0].mask) > 0
    for one, within, overall in zip(
        made.edits, made.numbers["psnr inside the mask"], made.numbers["psnr whole picture"]
    ):
        assert within == pytest.approx(psnr(one.image, picture, inside)) and overall == pytest.approx(
            psnr(one.image, picture)
        )


@pytest.mark.filterwarnings("ignore:nothing to edit")
def test_a_strength_of_0_is_the_source_and_no_infinity(sd, picture):
    made = figure(sd, picture, "strength", values=[0.0, 0.3], **QUICK)
    assert made.numbers["psnr whole picture"][0] is None and made.numbers["psnr whole picture"][1] > 0


def test_with_and_without_mask(sd, picture):
    """Each arm is the method of that name, SDEdit as far up the noise as the rest."""
    before = sd.evaluations
    made = checked(sd, before, figure(sd, picture, "mask", **QUICK), (4, 8, 4 * 16))
    assert made.numbers["arm"] == ["diffedit", "mask-only", "encode-only", "sdedit"]
    outside = np.asarray(made.edits[0].mask) == 0
    texts = {name: QUICK[name] for name in ("target", "steps", "seed")}
    own = {"diffedit": QUICK, "mask-only": QUICK, "encode-only": texts, "sdedit": texts | {"strength": 0.8}}
    for name, one, db in zip(made.numbers["arm"], made.edits, made.numbers["psnr outside the mask"]):
        alone = edit(sd, picture, name, **own[name])
        assert torch.equal(one.latent, alone.latent), name
        assert db == pytest.approx(psnr(alone.image, picture, outside))


@pytest.mark.parametrize("decode", [False, True])
def test_latents(sd, picture, decode):
    before = sd.evaluations
    made = checked(sd, before, figure(sd, picture, "latents", decode=decode, **QUICK), (4, 8, 16))
    (done,) = made.edits
    assert made.numbers["level"][0] == 0 and made.numbers["level"][-1] == 8 and len(made.numbers["level"]) == 8
    for j, mean in zip(made.numbers["level"], made.numbers["mean difference"]):
        assert mean == pytest.approx(float((done.decoded[8 - j] - done.trajectory[j]).abs().mean()), abs=1e-6)
    assert made.numbers["mean difference"][-1] == 0 < made.numbers["mean difference"][0]


def test_reconstruction(sd, picture):
    before = sd.evaluations
    made = figure(sd, picture, "reconstruction", values=[10, 5], **STEPLESS)
    checked(sd, before, made, (4 + 8 + 2 * (4 + 8), 2 * (4 + 8)))
    x0, null = made.edits[0].x0, sd.text([""])
    best = None
    for i, (refine, steps) in enumerate([(1, 5), (1, 10), (2, 5), (2, 10)]):
        up = encode(sd.eps, x0, null, steps=steps, strength=0.8, refine=refine)
        y = masked_decode(sd.eps, up, torch.ones_like(x0[:, :1]), null, null, guidance_scale=1.0)
        numbers = made.numbers[f"refine {refine}"]
        error = float(torch.linalg.vector_norm(y - x0) / torch.linalg.vector_norm(x0))
        assert numbers["latent error"][i % 2] == pytest.approx(error, rel=1e-3)
        if best is None:
            pixels = ((sd.decode(x0)[0] / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            best = Image.fromarray(pixels).resize(picture.size, Image.Resampling.LANCZOS)
        assert numbers["psnr"][i % 2] == pytest.approx(psnr(made.edits[i].image, best))
    assert made.numbers["psnr of the autoencoder"] == pytest.approx(psnr(best, picture))


@pytest.mark.filterwarnings("ignore:nothing to edit")
@pytest.mark.parametrize("name", FIGURES)
def test_where_there_is_nothing_to_edit_a_page_is_made_all_the_same(sd, picture, name):
    options = STEPLESS | {"values": [2, 4]} if name == "reconstruction" else QUICK
    equal = figure(sd, picture, name, **options | {"source": "a zebra"})
    assert equal.evaluations.get("mask", 0) == 0 and equal.image.width > 200
    empty = {"strength": 0.0} if name in ("threshold", "reconstruction") else {"mask_threshold": 1.0}
    assert figure(sd, picture, name, **options | empty).image.width > 200


# ---------------------------------------------------------------- the doors


@pytest.mark.parametrize("name, changes, word", [
    ("graph", {}, "must be one of threshold"), ("threshold", {"mask_threshold": 0.4}, "varies mask_threshold"),
    ("strength", {"strength": 0.4}, "varies strength"), ("threshold", {"values": [0.5, 2.0]}, "mask_threshold must"),
    ("threshold", {"values": []}, "needs values"), ("mask", {"values": [1]}, "no values"),
    ("latents", {"values": [9]}, "level must be a whole number from 0 to 8"),
    ("latents", {"values": [0.5]}, "level must"),
    ("reconstruction", {"steps": 10, "values": [5]}, "varies steps"), ("strength", {"stepz": 1}, "no option 'stepz'"),
    ("threshold", {"values": [i / 200 for i in range(150)]}, "at most 100"), ("mask", {"maps": 0}, "maps must"),
])  # fmt: skip
def test_what_no_figure_can_be_made_of(sd, picture, name, changes, word):
    options = (STEPLESS if name == "reconstruction" else QUICK) | changes
    before = sd.evaluations
    with pytest.raises(ValueError, match=word):
        figure(sd, picture, name, **options)
    assert sd.evaluations == before


def test_without_matplotlib_curves_are_refused_and_the_rest_works(sd, picture, monkeypatch):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    for name in ("threshold", "strength", "reconstruction"):
        with pytest.raises(ValueError, match=r"pip install 'minidiffedit\[figures\]'"):
            figure(sd, picture, name, target="a zebra")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import of it fails
    assert figure(sd, picture, "latents", **QUICK | {"steps": 4}).image.width > 200


def test_matplotlib_is_not_imported_before_a_curve_is_drawn():
    code = "import sys, minidiffedit.views.figures, minidiffedit.views.sheet; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(figures.__file__).parents[1]).returncode == 0


# ---------------------------------------------------------------- the command


@pytest.fixture
def here(tmp_path, monkeypatch, picture):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    return tmp_path


@pytest.mark.parametrize("name, options", [
    ("threshold", ["--values", ".3,.5"]), ("strength", ["--values", ".3,.6"]), ("mask", []),
    ("latents", ["--values", "0,4,8"]), ("reconstruction", ["--values", "4,8"]),
])  # fmt: skip
def test_each_figure_is_one_command_whose_cost_is_known_before(here, folder, capsys, name, options):
    fast = [*FAST[:4], *FAST[6:]] if name == "reconstruction" else FAST
    command = ["figure", name, "in.png", *fast, *options, "--quiet"]
    planned = ran(capsys, *command, "--dry-run", "--model", "no-such-model")
    assert {p.name for p in here.iterdir()} == {"in.png"}
    done = ran(capsys, *command, "--model", folder)
    assert (
        done["evaluations"] == planned["evaluations"] and done["output"] == f"in-figure-{name}.png" and done["numbers"]
    )
    with Image.open(done["output"]) as page:
        record = json.loads(page.text["minidiffedit"])
        assert record["figure"] == name and page.width > 200 and (FIGURES[name].varies or "no such") not in record
    said = cli.main([*map(str, command), "--model", str(folder)])
    out, err = capsys.readouterr()
    assert said == 0 and err == "" and out.startswith(f"in-figure-{name}-2.png\nUNet rows ") and "seed 0" in out


def test_the_reconstruction_needs_no_text(here, folder, capsys):
    done = ran(capsys, "figure", "reconstruction", "in.png", "--values", "4", "--quiet", "--model", folder)
    assert done["evaluations"] == {"encode": 3 + 6, "decode": 6}


@pytest.mark.parametrize("options, word", [
    (["threshold", "in.png"], "needs --target"), (["strength", "in.png", *FAST, "--values", "a"], "a number"),
    (["latents", "in.png", *FAST, "--values", ".5"], "a whole number"),
    (["mask", "in.png", *FAST, "--decode"], "latents"), (["strength", "in.png", *FAST, "--strength", ".5"], "varies"),
    (["threshold", "in.png", *FAST, "-o", "in.png"], "overwrite"), (["mask", "none.png", *FAST], "no such file"),
    (["latents", "in.png", *FAST, "--height", "9"], "height"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_the_model_is_loaded(here, capsys, options, word):
    assert cli.main(["figure", *options, "--model", "no-such-model"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and word in err, err
    assert {p.name for p in here.iterdir()} == {"in.png"}


def test_every_figure_has_a_cost_that_is_known_before():
    for name in FIGURES:
        planned = planned_figure(name, target="x", seed=0)
        assert sum(costs(planned.plans).values()) > 0 and planned.name == name
    with pytest.raises(ValueError, match="no option 'stepz'"):
        planned_figure("reconstruction", target="x", maps=2, stepz=1)  # what DiffEdit has is left out, the rest refused


def test_a_figure_that_there_is_not_is_refused(here, capsys):
    assert cli.main(["figure", "graph", "in.png", "--model", "no-such-model"]) == 1
    assert "a figure must be one of threshold, strength, mask" in capsys.readouterr().err
