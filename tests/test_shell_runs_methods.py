"""Every method that works on plain weights, once from the shell on the miniature: its picture and its rows."""

from pathlib import Path

import numpy as np
import pytest
from commands import ran
from PIL import Image

from minidiffedit.methods.table import SYSTEMS
from minidiffedit.run import blank_plan

MINI = Path(__file__).parents[1] / "weights" / "mini"
SCENE = MINI / "scenes" / "horse-zebra"
GIVEN = {
    "source": "a photo of a horse on a grass field", "target": "a photo of a zebra on a grass field",
    "mask": SCENE / "mask.png", "reference": SCENE / "target.png", "edits": "a horse=>a zebra",
    "points": "40,60=>70,60", "reference_mask": SCENE / "mask.png",
}  # fmt: skip
FLAGS = {"edits": "--edit"}
FEW = {
    "steps": 4,
    "strength": 0.5,
    "moves": 1,
    "iterations": 2,
    "inner_steps": 2,
    "lora_steps": 1,
    "text_steps": 2,
    "nudges": 1,
}
NAMES = [name for name, row in SYSTEMS.items() if row.edit and row.weights == "base" and name != "text-to-image"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", NAMES)
def test_it_runs_from_the_shell(method, tmp_path, capsys):
    plan, output = blank_plan(method), tmp_path / "edited.png"
    needed = [word for name in {*plan.needs, "target"} & plan.given.keys()
              for word in (FLAGS.get(name, f"--{name.replace('_', '-')}"), GIVEN[name])]  # fmt: skip
    few = [word for name in FEW if name in plan.options for word in (f"--{name.replace('_', '-')}", FEW[name])]
    shared = ("--model", MINI, "--method", method, "--seed", 0, "-o", output)
    said = ran(capsys, "edit", SCENE / "source.png", *shared, *needed, *few)
    assert said["method"] == method and said["rows"]["paid"] <= said["rows"]["predicted"] and said["rows"]["paid"] > 0
    edited, source = (
        np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in (output, SCENE / "source.png")
    )
    assert edited.shape == source.shape and 0.5 < np.abs(edited - source).mean() < 120
