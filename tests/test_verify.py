"""`verify` names files by their sha256 and runs one known edit, the same every time."""

import hashlib
import json

import pytest

from minidiffedit import StableDiffusion
from minidiffedit.cli import main
from minidiffedit.many.verify import OFFICIAL, verify


def test_the_same_model_verifies_the_same(folder, capsys):
    prints = []
    for _ in range(2):
        assert main(["verify", "--model", str(folder), "--json", "--quiet"]) == 0
        prints.append(json.loads(capsys.readouterr().out))
    one, two = prints
    assert one["evaluations"] == {"mask": 4, "encode": 3, "decode": 6} and one["edit_sha256"] == two["edit_sha256"]
    for network, file in one["files"].items():
        path = next((folder / network).glob("*.safetensors"))
        assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and file["official"] is None


def test_official_files_are_named(folder, capsys, monkeypatch):
    digest = hashlib.sha256((folder / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setitem(OFFICIAL, digest, "v1-9 vae")
    assert main(["verify", "--model", str(folder), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert f"vae: {digest} (official, v1-9 vae)" in out and out.count("none of the official files") == 2
    assert "4 + 3 + 6 UNet rows" in out


def test_what_cannot_be_verified(sd, folder, monkeypatch):
    with pytest.raises(ValueError, match="not loaded from files"):
        verify(sd)
    loaded = StableDiffusion.load(folder)
    monkeypatch.setattr("minidiffedit.many.verify.COUNTS", {"mask": 20, "encode": 3, "decode": 6})
    with pytest.raises(ArithmeticError, match="are specified"):
        verify(loaded)
