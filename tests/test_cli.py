"""The commands: streams, exit codes, what is refused before a model is loaded, interruptions."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from commands import failed
from PIL import Image

from minidiffedit import __version__, cli
from minidiffedit.commands import common
from minidiffedit.files import images

ROOT = Path(__file__).parents[1]
NO_MODEL = "no-such-model"
FAST = ["--target", "a zebra", "--steps", "4", "--maps", "2", "--seed", "0"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a picture of an odd size and a mask in it."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (70, 91, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("in.png")
    Image.new("L", (91, 70), 255).save("m.png")
    return tmp_path


def misused(capsys, *argv):
    with pytest.raises(SystemExit) as exit:
        cli.main([str(a) for a in argv])
    assert exit.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 2
    return err


def started(*argv, environment=None, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if environment is None else environment
    environment = environment | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "minidiffedit", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **options)


# ---------------------------------------------------------------- results and streams


def test_edit_writes_what_it_names(here, folder, capsys):
    names = ["out.webp", "mask.png", "heat.jpg"]
    options = ["-o", names[0], "--save-mask", names[1], "--save-heat", names[2], "--model", str(folder)]
    assert cli.main(["edit", "in.png", *FAST, *options]) == 0
    out, err = capsys.readouterr()
    assert out.split("\n")[:3] == names and "seed 0" in out and "%" in out and err == ""
    for name, mode in zip(names, ("RGB", "L", "L")):
        with Image.open(name) as file:
            assert file.size == (91, 70) and file.mode == mode
    assert {p.name for p in here.iterdir()} == {"in.png", "m.png", *names}


def test_json_is_one_object_and_nothing_else(here, folder, capsys):
    for command, output in (("edit", "in-edited.png"), ("mask", "in-mask.png")):
        assert cli.main([command, "--image", "in.png", *FAST, "--json", "--model", str(folder)]) == 0
        out, err = capsys.readouterr()
        result = json.loads(out)
        assert out.count("\n") == 1 and err == "" and result["output"] == output and Path(output).exists()
        assert result["seed"] == 0 and 0 < result["coverage"] < 1 and result["verdict"] == "found"
        assert result["evaluations"]["mask"] == 4 and set(result["seconds"]) >= {"text", "vae encode", "mask"}
        assert result["model"]["id"] == str(folder) and result["model"]["device"]
        assert result["versions"]["minidiffedit"] == __version__ and result["versions"]["torch"]
    assert cli.main(["generate", "x", "--steps", "2", "--json", "--model", str(folder)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["output"] == "generated.png" and result["seed"] == result["settings"]["seed"] >= 0
    assert cli.main(["info", str(folder), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["training_size"] == 64 and set(result["networks"]) == {"unet", "vae", "text_encoder"}


def test_mask_and_edit_find_the_same_mask(here, folder):
    assert cli.main(["mask", "in.png", *FAST, "--save-heat", "h1.png", "--model", str(folder)]) == 0
    assert (
        cli.main(["edit", "in.png", *FAST, "--save-mask", "m2.png", "--save-heat", "h2.png", "--model", str(folder)])
        == 0
    )
    assert Path("in-mask.png").read_bytes() == Path("m2.png").read_bytes()
    assert Path("h1.png").read_bytes() == Path("h2.png").read_bytes()


def test_info_says_what_a_model_is(folder, capsys):
    assert cli.main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "Stable Diffusion v1" in out and "64 px" in out and "unet: " in out and "float" not in out
    assert cli.main(["info", str(folder / "unet" / "config.json")]) == 1


def test_warnings_are_one_line_each_said_once_and_quiet_drops_them(here, folder, capsys):
    Image.new("L", (91, 70)).save("black.png")
    command = ["edit", "in.png", "--target", "word " * 200 + "end", "--steps", "7", "--mask", "black.png"]
    command += ["--model", str(folder), "-o", "o.png"]
    assert cli.main(command) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("warning: ") for line in lines) and "--debug" not in str(lines)
    assert any("do not divide 1000" in line for line in lines)
    assert any("75 fit" in line and "end'" in line for line in lines)
    assert any("nothing to edit" in line for line in lines)
    with Image.open("o.png") as a, Image.open("in.png") as b:
        assert a.tobytes() == b.tobytes()
    assert cli.main([*command, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_bar_says_stage_step_samples_and_time_left_and_only_on_a_terminal(here, folder, monkeypatch):
    for stderr, argv, expected in (
        (Terminal(), [], True),
        (Terminal(), ["--quiet"], False),
        (io.StringIO(), [], False),
    ):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert cli.main(["edit", "in.png", *FAST, "--model", str(folder), *argv]) == 0
        said = stderr.getvalue()
        for step in ("mask ", "encode ", "decode ", "100%", "| 13/13 samples, ", " left"):
            assert (step in said) == expected
        if not expected:
            assert stderr.getvalue() == ""


def test_unicode_and_empty_prompts(here, folder, capsys):
    options = ["--steps", "4", "--maps", "1", "--model", str(folder), "--json"]
    assert cli.main(["edit", "in.png", "--target", "", "--source", "馬 🐴", *options]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["settings"]["source"] == "馬 🐴" and out.isascii()  # any terminal's encoding prints it


# ---------------------------------------------------------------- refusals, before a model is loaded


@pytest.mark.parametrize("option, value, word", [
    ("--steps", "0", "steps"), ("--steps", "1000", "steps"), ("--steps", "9" * 30, "steps"), ("--steps", "-1", "steps"),
    ("--strength", "nan", "strength"), ("--strength", "-0.1", "strength"), ("--strength", "1.1", "strength"),
    ("--guidance-scale", "inf", "guidance_scale"), ("--guidance-scale", "nan", "guidance_scale"),
    ("--mask-strength", "2", "strength"), ("--maps", "0", "maps"), ("--maps", "-3", "maps"),
    ("--mask-clip", "0", "mask_clip"), ("--mask-clip", "nan", "mask_clip"), ("--mask-clip", "-1", "mask_clip"),
    ("--mask-threshold", "2", "mask_threshold"), ("--mask-threshold", "nan", "mask_threshold"),
    ("--refine", "0", "refine"), ("--chunk", "0", "chunk"), ("--seed", "-1", "seed"), ("--seed", str(2**63), "seed"),
    ("--size", "0", "size"), ("--size", "63", "size"), ("--size", "100000", "size"),
    ("--target", os.fsdecode(b"z\xff"), "UTF-8"), ("--source", os.fsdecode(b"\xe9"), "UTF-8"),
    ("--mask", "in.txt", "in.txt"), ("--mask", "missing.png", "no such file"), ("-o", "o.gif", "must end in"),
    ("-o", "o", "must end in"), ("-o", "nowhere/o.png", "no folder nowhere"), ("-o", "sub.png", "is a folder"),
    ("-o", "in.png", "overwrite"), ("-o", "./sub.png/../in.png", "overwrite"), ("-o", "link.png", "overwrite"),
    ("-o", "hard.png", "overwrite"), ("-o", "x" * 300 + ".png", "too long"), ("-o", "/proc/o.png", "cannot be written"),
    ("--save-mask", "o.png", "overwrite"), ("--save-heat", "in.png", "overwrite"), ("--save-mask", "a.bmp", "end in"),
    ("--mask=m.png", "--save-heat=h.png", "no map is sought"),
])  # fmt: skip
def test_bad_values_are_refused_in_one_line_before_the_model_is_loaded(here, capsys, option, value, word):
    (here / "sub.png").mkdir()
    (here / "in.txt").write_text("no picture")
    (here / "link.png").symlink_to("in.png")
    os.link("in.png", "hard.png")
    before = Path("in.png").read_bytes()
    command = ["edit", "in.png", "--target", "x", "-o", "o.png", "--model", NO_MODEL, option, value]
    assert word in failed(capsys, *command)
    assert Path("in.png").read_bytes() == before and not Path("o.png").exists() and not list(here.glob(".*"))


def test_the_mask_is_not_overwritten(here, capsys):
    assert "overwrite" in failed(capsys, "edit", "in.png", *FAST, "--mask", "m.png", "-o", "m.png", "--model", NO_MODEL)


@pytest.mark.parametrize("make, word", [
    (lambda p: None, "no such file"), (lambda p: p.mkdir(), "folder"), (lambda p: p.write_bytes(b""), "0 bytes"),
    (lambda p: p.write_bytes(Path("in.png").read_bytes()[:900]), "cut short"),
    (lambda p: Image.new("RGB", (9, 80)).save(p), "8:1"),
], ids=["missing", "folder", "empty", "cut", "too long"])  # fmt: skip
@pytest.mark.parametrize("command", ["edit", "mask"])
def test_bad_pictures_are_refused_before_the_model_is_loaded(here, capsys, command, make, word):
    make(here / "bad.png")
    assert word in failed(capsys, command, "bad.png", *FAST, "--model", NO_MODEL)


def test_a_picture_too_long_for_the_outputs_format(here, capsys):
    Image.new("1", (16400, 2100)).save("long.png")
    assert "16383" in failed(capsys, "edit", "long.png", *FAST, "-o", "o.webp", "--model", NO_MODEL)
    assert NO_MODEL in failed(capsys, "edit", "long.png", *FAST, "-o", "o.png", "--model", NO_MODEL)


@pytest.mark.parametrize("option, value, word", [
    ("--steps", "0", "steps"), ("--seed", "-1", "seed"), ("-o", "a.gif", "end in"),
    ("--guidance-scale", "nan", "scale"), ("--negative-prompt", os.fsdecode(b"\xff"), "UTF-8"),
])  # fmt: skip
def test_generate_refuses_before_the_model_is_loaded(here, capsys, option, value, word):
    assert word in failed(capsys, "generate", "x", "--model", NO_MODEL, option, value)


@pytest.mark.parametrize("argv", [
    [], ["paint"], ["edit"], ["edit", "in.png"], ["edit", "--target", "x"], ["mask", "--target", "x"], ["generate"],
    ["edit", "in.png", "--image", "in.png", "--target", "x"], ["edit", "in.png", "more.png", "--target", "x"],
    ["edit", "in.png", "--target", "x", "--nonsense"], ["edit", "in.png", "--target", "x", "--steps", "four"],
    ["edit", "in.png", "--target", "x", "--mask-clip", "non"], ["edit", "in.png", "--target", "x", "--seed", "1.5"],
    ["edit", "in.png", "--target", "x", "--mask-thresh", "0.5"], ["edit", "in.png", "--target", "x", "--dtype", "int8"],
    ["generate", "x", "--width", "0"], ["generate", "x", "--width", "100"], ["generate", "x", "--height", "-64"],
    ["info"], ["edit", "in.png", "--target"],
], ids=" ".join)  # fmt: skip
def test_misuse_exits_with_2(here, capsys, argv):
    assert "minidiffedit" in misused(capsys, *argv)


def test_no_model_anywhere_names_the_ways_to_one(here, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = failed(capsys, "edit", "in.png", *FAST, "--cache-dir", here / "cache")
    assert "minidiffedit download" in line and "--model" in line


# ---------------------------------------------------------------- failures while running


def raising(error):
    def load(_):
        raise error

    return load


@pytest.mark.parametrize("error, code, line", [
    (ValueError("two\nlines"), 1, "error: two lines"),
    (ArithmeticError("NaN"), 1, "error: NaN"),
    (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
    (MemoryError(), 1, "error: out of memory; try a smaller --size"),
    (RuntimeError("CUDA out of memory. Tried"), 1, "error: out of memory; try a smaller --size"),
    (KeyError("x"), 1, "error: KeyError: 'x' (--debug shows where)"),
    (AssertionError(), 1, "error: AssertionError: AssertionError (--debug"),
    (KeyboardInterrupt(), 130, "interrupted"),
], ids=repr)  # fmt: skip
def test_every_failure_is_one_line(here, capsys, monkeypatch, error, code, line):
    monkeypatch.setattr(common, "load", raising(error))
    for options in (["--quiet"], ["--debug"]):
        assert cli.main(["edit", "in.png", *FAST, *options]) == code
        out, err = capsys.readouterr()
        assert out == "" and err.splitlines()[-1].startswith(line)
        assert ("Traceback" in err) == (options == ["--debug"] and code == 1)


def test_the_callers_warnings_are_left_alone(here, capsys, monkeypatch):
    before = warnings.showwarning
    monkeypatch.setattr(common, "load", raising(ValueError("x")))
    cli.main(["edit", "in.png", *FAST])
    assert warnings.showwarning is before


def test_a_failed_write_leaves_no_file(here, folder, capsys, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space" in failed(capsys, "edit", "in.png", *FAST, "-o", "o.png", "--model", folder)
    assert {p.name for p in here.iterdir()} == {"in.png", "m.png"}


def test_ctrl_c_while_running(here, folder):
    """Sent while the first bar stands on stderr; the watcher makes each step long enough to be hit."""
    code = (
        "import contextlib, signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from minidiffedit import cli\nfrom minidiffedit.commands import common\n"
        "def watch(step): print(step.stage, file=sys.stderr, flush=True); time.sleep(1)\n"
        "common.progress = lambda *_: contextlib.nullcontext(watch)\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "edit", "in.png", *FAST, "-o", "o.png", "--model", str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stderr.readline() == "mask\n"
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and err == "interrupted\n"
    assert time.monotonic() - start < 5
    assert {p.name for p in here.iterdir()} == {"in.png", "m.png"}


# ---------------------------------------------------------------- the program as it is started


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["info", "--help"], ["download", "--help"]])
def test_help_and_version_answer_at_once(tmp_path, argv):
    code = "import sys; from minidiffedit.cli import main\ntry: main(sys.argv[1:])\nfinally: print(sorted(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = os.times()
    done = started(*argv, cwd=tmp_path)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == 0 and used < 0.4  # of the processor: the machine may be busy
    command = [sys.executable, "-c", code, *argv]
    modules = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path).stdout
    assert "'argparse'" in modules
    for heavy in ("torch", "numpy", "PIL", "huggingface_hub", "tokenizers", "safetensors"):
        assert f"'{heavy}'" not in modules


def test_version_is_the_packages():
    assert started("--version").stdout == f"minidiffedit {__version__}\n"


def test_importing_the_package_imports_no_torch(tmp_path):
    code = "import sys, minidiffedit; dir(minidiffedit); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="the full disk is played by /dev/full, which macOS and Windows lack"
)
def test_streams_that_are_gone(here, folder):
    """A closed or full stdout or stderr: no traceback, and the picture is there."""
    edit = f"edit in.png {' '.join(FAST[2:])} --target zebra --model {folder} -o o.png"
    python = f"{sys.executable} -m minidiffedit"
    for command, complaint in (
        (f"{python} {edit} --json | true", ""),
        (f"{python} {edit} >&- 2>&-", ""),
        (f"{python} {edit} > /dev/full", "error: [Errno 28] No space left on device\n"),
        (f"{python} edit --help | true", ""),
    ):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, timeout=120)
        assert done.stderr == complaint, command
        assert Path("o.png").exists() == ("--help" not in command)
        Path("o.png").unlink(missing_ok=True)


def test_a_bare_environment_and_paths_that_are_no_text(here, folder):
    """No HOME, a cache that cannot be made, an ASCII terminal, names that are not UTF-8."""
    name = os.fsdecode(b"\xff.png")
    try:
        os.rename("in.png", name)
    except OSError:  # a file system that takes only UTF-8
        os.rename("in.png", name := "é.png")
    bare = {"OMP_NUM_THREADS": "1", "HF_HOME": "/proc/none", "HOME": "/nonexistent", "PYTHONIOENCODING": "ascii"}
    done = started("edit", name, *FAST, "--model", folder, environment=bare, cwd=here)
    output = f"{Path(name).stem}-edited.png"
    assert done.returncode == 0 and done.stderr == "" and Path(output).exists()
    assert done.stdout.startswith(output.encode("ascii", "backslashreplace").decode())


def test_outputs_are_those_of_the_suffix(here, folder):
    for suffix, kind in images.FORMATS.items():
        assert cli.main(["edit", "in.png", *FAST, "--quiet", "--model", str(folder), "-o", f"o{suffix}"]) == 0
        with Image.open(f"o{suffix}") as file:
            assert file.format == kind and file.size == (91, 70)


def test_ctrl_c_that_an_import_swallows_still_ends_the_command(folder, tmp_path, monkeypatch, capsys):
    """Python drops a KeyboardInterrupt raised in the callbacks of its import lock; the command must not go on."""
    from minidiffedit import StableDiffusion

    load = StableDiffusion.load

    def swallowing(*args, **options):
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        return load(*args, **options)

    monkeypatch.setattr(StableDiffusion, "load", swallowing)
    before = signal.getsignal(signal.SIGINT)
    output = tmp_path / "g.png"
    assert cli.main(["generate", "a horse", "--model", str(folder), "--steps", "2", "-o", str(output)]) == 130
    assert not output.exists() and signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().err == "interrupted\n"
