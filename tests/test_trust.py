"""What may be trusted: bad input and cut runs in short form, and that nothing from a file is run or used as a path."""

import ast
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import faults
import fuzz
import fuzz.harness
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minidiffedit
from minidiffedit import cli, tokenizer
from minidiffedit import commands as shell
from minidiffedit import options as kinds
from minidiffedit.commands import common
from minidiffedit.files import images
from minidiffedit.files import states as state
from minidiffedit.many import batch, manifest
from minidiffedit.run import Job

PACKAGE = Path(minidiffedit.__file__).parent
ROOT = PACKAGE.parent
SLOW = (pytest.mark.slow,)
FAST = ["--target", "a zebra", "--steps", "2", "--maps", "1", "--seed", "0"]


# ---------------------------------------------------------------- the suites, in short


@pytest.mark.parametrize("category", [pytest.param(c, marks=SLOW * (c == "environments")) for c in fuzz.CATEGORIES])
def test_bad_input_in_short(category, monkeypatch, tmp_path):
    """`make fuzz` runs them all. A few cases of each category here, the same ones every time."""
    monkeypatch.chdir(tmp_path)
    said = []
    counts = fuzz.run_all(seed=0, scale=0.02, only=category, say=said.append, most=fuzz.SHORT[category])
    assert not said, "\n".join(said)
    refused, done, faulty = counts[category]
    assert refused > 0 and refused + done >= 10 and faulty == 0


@pytest.mark.slow
def test_cut_runs_in_short(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    said = []
    counts = faults.run_all(scale=0.05, say=said.append)
    assert sum(count["faults"] for count in counts.values()) == 0, "\n".join(said)
    assert counts["random moments"]["runs"] >= 5 and counts["each line of a write"]["runs"] >= 10


def without_checksum(patch):
    """A saved edit's sum is not looked at."""

    class Any(str):
        __slots__ = ()
        __hash__ = str.__hash__

        def __ne__(self, other):
            return False

    patch.setattr(state, "checksum", lambda *_: Any())


def writing_in_place(patch):
    patch.setattr(images, "write_whole", lambda path, content: path.write_bytes(content))


def believing(patch):
    """Weights are taken as they are."""
    patch.setattr(torch, "aminmax", lambda t: (torch.zeros(1), torch.zeros(1)))


def any_words(patch):
    patch.setattr(tokenizer, "read_words", lambda _: mock.ANY)


def paste_everything(patch):
    patch.setattr(images, "paste_mask", lambda _, size: Image.new("L", size, 255))


def any_texts_path(patch):
    """What was computed under one text is taken for what another asks for."""
    patch.setattr(Job, "text", lambda job, text: (job.texts[text], ""))


# What is taken out of the package; the category and the cases that must turn red.
BLIND = {
    "weights may be NaN": ("checkpoints", "unet: NaN", believing),
    "any words for CLIP's": ("checkpoints", "words exchanged", any_words),
    "errors may be endless": ("checkpoints", "5,000", lambda patch: patch.setattr(shell, "LONGEST_LINE", 10**9)),
    "control characters": ("checkpoints", "control", lambda patch: patch.setattr(cli, "shown", str)),
    "no least size": ("pictures", "(7, 7)", lambda patch: patch.setattr(images, "working_size", lambda *_: (64, 64))),
    "no sums in states": ("states", "a bit flipped", without_checksum),
    "outputs anywhere": ("manifests", "output '../b", lambda patch: patch.setattr(batch, "check_output", str)),
    "pictures from anywhere": (
        "manifests", "image '../in", lambda patch: patch.setattr(manifest, "within", lambda root, _, path: root / path)
    ),
    "in place": ("environments", "three results", writing_in_place),
    "an error of another kind": (
        "options", "seed", lambda patch: patch.setattr(kinds, "whole", lambda *_: {}["a bug"])
    ),
    "all is pasted": ("methods", "mask: half", paste_everything),
    "any text's path": ("methods", "-inversion after ", any_texts_path),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("blindness", BLIND)
def test_the_suite_sees_what_is_taken_out(blindness, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    category, named, take_out = BLIND[blindness]
    said = []
    make = fuzz.harness.World

    def blind():  # after the sound reference was made
        world = make()
        take_out(monkeypatch)
        if category == "environments":  # whose cases run in processes of their own
            world.broken = partial(take_out, pytest.MonkeyPatch())
        return world

    monkeypatch.setattr(fuzz.harness, "World", blind)
    fuzz.run_all(seed=0, scale=0.02, only=category, say=said.append, most=20, named=named)
    assert said


# ---------------------------------------------------------------- nothing is run


def called(tree):
    """Dotted names of everything that is called or imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


RUNS_CODE = re.compile(
    r"(torch|np|numpy|joblib|dill|cloudpickle|marshal|shelve|yaml)\.(load|loads|unsafe_load|full_load)|.*\bpickle\b.*"
    r"|eval|exec|compile|__import__|os\.(system|popen|exec\w*|spawn\w*)|runpy\..*|code\..*|torch\.hub\..*"
    r"|.*\bextractall"
)


def test_nothing_in_the_package_opens_pickles_or_runs_text():
    """Comments and messages may name them; no call and no import does. subprocess: only where no file decides what."""
    found = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for name in called(ast.parse(path.read_text(encoding="utf-8")))
        if RUNS_CODE.fullmatch(name)
    ]
    assert found == []


def test_the_search_would_find_them():
    source = (
        "import pickle\ntorch.load(x)\nnp.load(y)\neval('1')\nos.system('x')\nfrom pickle import loads\nimported('a')"
    )
    assert len([name for name in called(ast.parse(source)) if RUNS_CODE.fullmatch(name)]) == 6


class Opened:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt", "m.bin", "m.pt"])
@pytest.mark.parametrize("command", [["info", "M"], ["edit", "in.png", *FAST, "--model", "M"], ["resume", "M"]])
def test_a_pickle_is_not_opened(name, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64)).save("in.png")
    content = pickle.dumps(Opened(tmp_path / "executed"))
    Path(name).write_bytes(content)
    assert cli.main([name if word == "M" else word for word in command]) == 1
    assert "pickle" in capsys.readouterr().err and not Path("executed").exists()
    pickle.loads(content)
    assert Path("executed").exists()  # it would have been


def test_what_a_state_holds_decides_no_path(tmp_path, folder, monkeypatch, capsys):
    """Its texts, set to paths, change where nothing is written: all results are where the command line says."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save("in.png")
    assert cli.main(["edit", "in.png", *FAST, "--model", str(folder), "--save-state", "a.safetensors"]) == 0
    from minidiffedit.files.states import checksum

    with safe_open("a.safetensors", framework="pt") as file:
        record = json.loads(file.metadata()["minidiffedit"])
    for name in ("mask", "target"):
        record["settings"][name] = "../../escaped.png"
    tensors = load_file("a.safetensors")
    del record["sha256"]
    record["sha256"] = checksum(record, tensors)
    save_file(tensors, "b.safetensors", {"minidiffedit": json.dumps(record)})
    before = sorted(path for path in tmp_path.rglob("*"))
    assert cli.main(["resume", "b.safetensors", "--model", str(folder), "-o", "out.png"]) == 0
    assert sorted(path for path in tmp_path.rglob("*")) == sorted([*before, tmp_path / "here" / "out.png"])
    assert not (tmp_path.parent / "escaped.png").exists()


# ---------------------------------------------------------------- what the suites had found


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 91, 3), dtype=np.uint8)).save("in.png")
    Image.new("L", (90, 70), 255).save("m.png")
    monkeypatch.setattr(common, "load", lambda args: pytest.fail("the model was loaded"))
    return tmp_path


@pytest.mark.parametrize("option", ["--mask", "--union", "--subtract"])
def test_a_mask_of_another_size_is_refused_before_the_model_is_loaded(option, here, folder, capsys):
    assert cli.main(["edit", "in.png", *FAST, "--model", str(folder), option, "m.png"]) == 1
    assert (
        "the mask is 90 x 70; it must have the picture's size 91 x 70 or aspect (or 80 x 64" in capsys.readouterr().err
    )


def test_a_model_that_is_not_here_yet_does_not_judge_masks(here, capsys, monkeypatch):
    """Only its configurations tell its grid; the error is the model's own."""
    monkeypatch.setattr(common, "load", lambda args: (_ for _ in ()).throw(ValueError("loaded")))
    assert (
        cli.main(["edit", "in.png", *FAST[:4], "--model", "owner/name", "--mask", "m.png", "--cache-dir", "none"]) == 1
    )
    assert capsys.readouterr().err == "error: loaded\n"


def test_endless_names_and_control_characters_do_not_reach_the_terminal(capsys):
    for name in ("x" * 5000, "\x1b[2J", "a\u202eb"):
        assert cli.main(["info", name]) == 1
        said = capsys.readouterr().err
        assert len(said) < 1000 and said[:-1].isprintable() and said.endswith("not a hub id (owner/name)\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch: it ends a process at once")
def test_sigterm_ends_a_run_like_ctrl_c(tmp_path, folder):
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    code = (
        "import sys, time\nfrom minidiffedit import StableDiffusion, cli\neps = StableDiffusion.eps\n"
        "def slow(*a, **b): print('busy', flush=True); time.sleep(.2); return eps(*a, **b)\n"
        "StableDiffusion.eps = slow\nsys.exit(cli.main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", code, "edit", "in.png", "--target", "a", "--model", str(folder), "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(argv, cwd=tmp_path, env=environment, stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err == "terminated\n" and time.monotonic() - start < 5
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]
