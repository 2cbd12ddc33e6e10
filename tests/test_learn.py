"""`learn`: the file holds what `lora` learned, by diffusers' names; refusals come before any work."""

from pathlib import Path

import pytest
import torch
from commands import failed, ran
from safetensors.torch import load_file, save_file

from minidiffedit import StableDiffusion
from minidiffedit.files.images import to_tensor
from minidiffedit.files.results import is_ours
from minidiffedit.methods import lora as L

FEW = ["--lora-steps", 2, "--batch", 1, "--rank", 2, "--seed", 3, "--size", 64]


@pytest.fixture
def image(picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    return tmp_path / "in.png"


def test_the_file_holds_what_was_learned(image, picture, folder, capsys):
    said = ran(capsys, "learn", image, "--source", "a horse", *FEW, "--model", folder)
    assert said["output"] == "in-lora.safetensors" and said["rows"] == 2 and len(said["loss"]) == 2
    sd, found = StableDiffusion.load(folder, device="cpu"), load_file("in-lora.safetensors")
    x0 = sd.encode(to_tensor(picture, (80, 64)))
    made = L.lora(sd.eps, x0, sd.projections, sd.text(["a horse"]), lora_steps=2, batch=1, rank=2, seed=3)
    expected = L.state(made)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    changed = [one.abs().max() for name, one in found.items() if "lora_B" in name]
    assert min(changed) > 0  # each layer learned


def test_the_same_command_replaces_what_it_learned_and_nothing_else(image, folder, capsys):
    command = ["learn", image, *FEW, "-o", "a.safetensors", "--model", folder]
    ran(capsys, *command)
    first = Path("a.safetensors").read_bytes()
    ran(capsys, *command)
    assert Path("a.safetensors").read_bytes() == first and is_ours(Path("a.safetensors"))
    save_file({"x": torch.ones(1)}, "a.safetensors")
    other = Path("a.safetensors").read_bytes()
    assert "--overwrite" in failed(capsys, *command) and Path("a.safetensors").read_bytes() == other
    ran(capsys, *command, "--overwrite")
    assert Path("a.safetensors").read_bytes() == first
    assert "overwrite an input" in failed(capsys, *command, "--overwrite", "--lora", "a.safetensors:0.5")


def test_what_cannot_be_learned_is_refused(image, folder, capsys):
    model = ["--model", folder]
    assert "must end in .safetensors" in failed(capsys, "learn", image, "-o", "x.png", *model)
    assert "rank must be a whole number from 1" in failed(capsys, "learn", image, "--rank", 0, *model)
    assert "there is no folder" in failed(capsys, "learn", image, "-o", "no/x.safetensors", *model)
    assert "low_memory" in failed(capsys, "learn", image, *FEW, *model, "--low-memory")
    assert not [*image.parent.glob("*.safetensors")]
