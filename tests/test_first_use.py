"""What people meet first: names that are taken, several candidates, settings read back, `-`, typos, help, estimates."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import failed, ran
from PIL import Image, PngImagePlugin
from stubs import Model

import minidiffedit
from minidiffedit import cli, contact_sheet, edit
from minidiffedit.commands import estimates
from minidiffedit.cost import Held, memory
from minidiffedit.files.metadata import model_hash
from minidiffedit.files.results import is_ours, settings_in
from minidiffedit.plans import idle, plan

ROOT = Path(__file__).parents[1]
FAST = ["--target", "a zebra", "--steps", "4", "--maps", "2"]
SEED = ["--seed", "0"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.picture().save("in.png")
    tiny.box().save("m.png")
    return tmp_path


def python(code, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    environment = kept | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize("before, environment, expected", [
    ("", {}, ["1000 or 5000", "None"]),
    ("import sys; sys.modules['torch'] = sys; ", {}, ["None", "None"]),  # as if it were loaded: nothing can be done
    ("", {"OMP_WAIT_POLICY": "ACTIVE"}, ["None", "ACTIVE"]), ("", {"GOMP_SPINCOUNT": "7"}, ["7", "None"]),
])  # fmt: skip
def test_threads_sleep_soon_unless_the_user_says_otherwise(before, environment, expected):
    code = f"{before}import os, minidiffedit; print(*map(os.environ.get, ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')))"
    said = python(code, **environment).stdout.split()
    assert all(one in wanted.split(" or ") for one, wanted in zip(said, expected, strict=True)), said


@pytest.mark.parametrize("running, expected", [
    ([1, 1, 1, 1, 1], "5000"), ([2, 2, 3, 2, 2], "1000"), ([2, 2, 1, 2, 2], "5000"), (["?"], "5000"), ([], "5000"),
])  # fmt: skip
def test_threads_sleep_sooner_where_others_want_the_cores_all_the_time(monkeypatch, running, expected):
    left = iter(running)

    def loadavg(path):
        if (now := next(left, None)) is None:
            raise FileNotFoundError(path)
        return io.StringIO(f"0.10 0.20 0.30 {now}/115 4242\n")

    monkeypatch.setattr("builtins.open", loadavg)
    assert minidiffedit._spins() == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "code", ["import minidiffedit; minidiffedit.edit", "from minidiffedit import cli; cli.main(['methods'])"]
)
def test_openmp_itself_says_so(code):
    said = python(code, OMP_DISPLAY_ENV="VERBOSE").stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("this torch has another OpenMP than libgomp")
    assert re.search(r"GOMP_SPINCOUNT = '(1000|5000)'", said)


# ---------------------------------------------------------------- names that are taken


def test_commands_have_names_of_their_own(here, folder, capsys):
    model = ["--model", folder]
    made = [ran(capsys, "mask", "in.png", *FAST, *SEED, *model)["output"],
            ran(capsys, "figure", "mask", "in.png", *FAST, *SEED, *model)["output"],
            ran(capsys, "edit", "in.png", *FAST, *SEED, *model)["output"],
            ran(capsys, "sheet", "in.png", *FAST, *SEED, *model)["output"]]  # fmt: skip
    assert made == ["in-mask.png", "in-figure-mask.png", "in-edited.png", "in-sheet.png"]


def test_a_name_that_nobody_gave_goes_beside_what_is_there(here, folder, capsys):
    Path("in-edited.png").write_bytes(b"not ours")
    made = [ran(capsys, "edit", "in.png", *FAST, *SEED, "--model", folder)["output"] for _ in range(2)]
    assert made == ["in-edited-2.png", "in-edited-3.png"] and Path("in-edited.png").read_bytes() == b"not ours"
    assert Path(made[0]).read_bytes() == Path(made[1]).read_bytes()
    made = [ran(capsys, "generate", "x", "--steps", 1, "--model", folder)["output"] for _ in range(2)]
    assert made == ["generated.png", "generated-2.png"]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_result_under_its_given_name_is_replaced_and_nothing_else(here, folder, capsys, suffix):
    files = {"-o": f"o{suffix}", "--save-mask": f"mask{suffix}", "--save-heat": f"heat{suffix}",
             "--save-state": "s.safetensors", "--report": "r.html"}  # fmt: skip
    command = ["edit", "in.png", *FAST, *SEED, *(word for pair in files.items() for word in pair)]
    for _ in range(2):
        ran(capsys, *command, "--model", folder)
    assert all(is_ours(Path(name)) for name in files.values())
    for name in files.values():  # each in turn becomes a file of another origin
        ours, other = Path(name).read_bytes(), here / "other"
        Image.new("RGB", (9, 9)).save(other, "PNG")
        Path(name).write_bytes(other.read_bytes())
        assert "--overwrite" in failed(capsys, *command, "--model", "no-such-model")
        assert Path(name).read_bytes() == other.read_bytes()
        Path(name).write_bytes(ours)
    Path(files["-o"]).write_bytes(b"")
    ran(capsys, *command, "--overwrite", "--model", folder)
    assert is_ours(Path(files["-o"]))


def test_a_report_a_mask_and_a_sheet_too(here, folder, capsys):
    ran(capsys, "edit", "in.png", *FAST, *SEED, "--save-state", "s.safetensors", "--model", folder)
    for command, name in ((["report", "s.safetensors"], "r.html"), (["resume", "s.safetensors"], "r.png"),
                          (["mask", "in.png", *FAST], "m1.png"), (["sheet", "in.png", *FAST], "s.png"),
                          (["generate", "x"], "g.png"), (["figure", "mask", "in.png", *FAST], "f.png")):  # fmt: skip
        Path(name).write_bytes(b"<html>mine</html>")
        assert f"{name} is there" in failed(capsys, *command, "-o", name, "--model", "no-such-model")
    assert [ran(capsys, "report", "s.safetensors", "--model", folder)["output"] for _ in "12"] == ["s.html", "s-2.html"]


def test_no_input_of_any_kind_is_replaced_whatever_is_asked(here, folder, capsys):
    ran(capsys, "edit", "in.png", *FAST, *SEED, "-o", "a.png", "--model", folder)
    Path("w.safetensors").write_bytes(b"weights")
    command = ["edit", "in.png", *FAST, "--overwrite", "--model"]
    for words in (["w.safetensors", "--save-state", "w.safetensors"],
                  ["x", "--lora", "w.safetensors:0.5", "--save-state", "w.safetensors"],
                  ["x", "--vae", "w.safetensors", "--save-state", "w.safetensors"],
                  ["x", "--embedding", "w.safetensors", "--save-state", "w.safetensors"]):  # fmt: skip
        assert "would overwrite an input" in failed(capsys, *command, *words), words
    words = ["edit", "in.png", "--like", "a.png", "-o", "a.png", "--quiet"]
    assert "would overwrite an input" in failed(capsys, *words, "--model", "no-such-model")


def test_a_name_that_is_too_long_is_refused_before_any_work(here, capsys):
    Path("in.png").rename("n" * 250 + ".png")
    for words in ([], ["-o", "o" * 252 + ".png"], ["--report", "r" * 255 + ".html"]):
        said = failed(capsys, "edit", "n" * 250 + ".png", *FAST, *words, "--model", "no-such-model")
        assert "cannot be written: File name too long" in said


def test_batch_replaces_results_alone(here, folder, capsys):
    Path("list.csv").write_text("image,target,steps,maps,seed,output\nin.png,a zebra,4,2,0,a.png\n")
    Path("out").mkdir()
    Path("out/a.png").write_bytes(b"mine")
    command = ["batch", "list.csv", "-o", "out", "--json", "--model", str(folder)]
    assert cli.main(command) == 1 and "--overwrite" in capsys.readouterr().out
    assert Path("out/a.png").read_bytes() == b"mine"
    assert cli.main([*command, "--overwrite", "--no-metadata"]) == 0
    assert not is_ours(Path("out/a.png"))  # but the table knows it
    Path("list.csv").write_text("image,target,steps,maps,seed,output\nin.png,a cow,4,2,0,a.png\n")
    capsys.readouterr()
    assert ran(capsys, *command[:-3], "--model", folder)["made"] == 1
    Path("out/results.jsonl").write_text("a diary\nof mine\n")
    assert "diary" in Path("out/results.jsonl").read_text() and "--overwrite" in failed(capsys, *command)


# ---------------------------------------------------------------- candidates


def test_candidates_share_one_encoding_and_are_the_single_edits(here, folder, capsys):
    command = ["edit", "in.png", *FAST, "--seed", "5", "--model", folder, "-n", "3"]
    planned = ran(capsys, *command, "--dry-run")
    done = ran(capsys, *command)
    assert planned["rows"]["predicted"] == done["rows"]["predicted"] == done["rows"]["paid"]
    assert done["evaluations"]["encode"] == 3 and done["evaluations"]["mask"] == 3 * 2 * 2  # steps .8 of 4, once
    assert [one["seed"] for one in done["candidates"]] == [5, 6, 7] and done["output"] == "in-candidates.png"
    for one in done["candidates"]:
        assert one["output"] == f"in-candidates-seed{one['seed']}.png"
        ran(capsys, *command[:-4], "--seed", one["seed"], "--model", folder, "-o", "alone.png")
        a, b = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (one["output"], "alone.png"))
        assert abs(a - b).max() <= 1 and settings_in(Path(one["output"]))["seed"] == one["seed"]
    assert Image.open("in-candidates.png").width > 2 * 93
    again = ran(capsys, *command)
    assert again["output"] == "in-candidates-2.png" and again["candidates"][0]["output"] == "in-candidates-2-seed5.png"


def test_candidates_of_a_square_pay_what_is_predicted(here, folder, capsys):
    done = ran(capsys, "edit", "in.png", *FAST, *SEED, "-n", "2", "--crop", "--model", folder)
    assert done["rows"]["predicted"] >= done["rows"]["paid"] > 0 and len(done["candidates"]) == 2


@pytest.mark.parametrize("words, said", [
    (["--count", "0"], "count"), (["--count", "101"], "count"), (["-n", "2", "--mask", "m.png"], "one picture"),
    (["-n", "2", "--save-state", "s.safetensors"], "--save-state"), (["-n", "2", "--report", "r.html"], "--report"),
    (["-n", "2", "--seed", str(2**63 - 1)], "seed"), (["-n", "2", "-o", "-"], "-o -"),
])  # fmt: skip
def test_candidates_that_cannot_be(here, capsys, words, said):
    assert said in failed(capsys, "edit", "in.png", *FAST, *words, "--model", "no-such-model")


# ---------------------------------------------------------------- settings read back


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_result_says_how_it_was_made_and_another_edit_takes_it(here, folder, capsys, suffix):
    first = ["--source", 'a, "horse": x', "--strength", ".6", "--dilate", "1", "--no-paste", "--negative-prompt=-dull"]
    ran(capsys, "edit", "in.png", *FAST, *first, "--seed", "9", "-o", f"a{suffix}", "--model", folder)
    told = ran(capsys, "info", f"a{suffix}")
    assert told["source"] == first[1] and told["seed"] == 9 and told["strength"] == 0.6 and not told["paste"]
    assert cli.main(["info", f"a{suffix}"]) == 0 and "seed: 9" in capsys.readouterr().out
    assert cli.main(["edit", "in.png", "--like", f"a{suffix}", "-o", f"b{suffix}", "--model", str(folder)]) == 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "seed 9" in err and "dilate 1" in err and "strength 0.6" in err
    assert Path(f"a{suffix}").read_bytes() == Path(f"b{suffix}").read_bytes()
    changed = ran(capsys, "edit", "in.png", "--like", f"a{suffix}", "--strength", "1", "--target", "a cow", "--paste",
                  "--dilate", "0", "--model", folder)["settings"]  # fmt: skip
    assert (changed["strength"], changed["target"], changed["seed"], changed["paste"]) == (1, "a cow", 9, True)
    assert "steering" not in changed or "dilate" not in changed["steering"]


def test_like_takes_the_method_and_names_files_that_it_cannot_take(here, folder, capsys):
    ran(capsys, "edit", "in.png", "--method", "direct+user-mask", *FAST[:4], "--mask", "m.png", "--source", "a horse",
        "-o", "a.png", "--model", folder)  # fmt: skip
    command = ["edit", "in.png", "--like", "a.png", "--model", str(folder), "-o", "b.png"]
    assert cli.main([*command, "--mask", "m.png"]) == 0
    assert capsys.readouterr().err.startswith("like a.png: method direct+user-mask, ")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    ran(capsys, "edit", "in.png", *FAST, "--mask", "m.png", "-o", "c.png", "--model", folder)
    assert cli.main([*command[:3], "c.png", *command[4:], "--mask", "m.png"]) == 0
    assert capsys.readouterr().err.count("\n") == 1  # of what was taken, nothing is said to be idle
    assert cli.main([*command[:3], "c.png", *command[4:]]) == 0
    assert "warning: c.png was made with a mask of its own" in capsys.readouterr().err
    told = ran(capsys, *command[:3], "c.png", *command[4:], "--method", "masactrl", "--seed", "5", "--dry-run")
    taken = {name: told["settings"][name] for name in ("target", "steps", "strength", "encode_text", "seed")}
    assert taken == {"target": "a zebra", "steps": 4, "strength": 1.0, "encode_text": "source", "seed": 5}
    told = ran(capsys, *command[:3], "c.png", *command[4:], "--mask-from", "words:a", "--source", "a cow", "--dry-run")
    assert (told["settings"]["maps"], told["settings"]["mask_threshold"]) == (2, 0.4)
    with pytest.raises(SystemExit):  # no source was given, so none is taken where one is needed
        cli.main([*command[:3], "c.png", *command[4:], "--method", "prompt-to-prompt"])
    assert "arguments are required: --source" in capsys.readouterr().err


def test_like_leaves_what_the_words_say_of_the_mask(here, folder, capsys):
    """Another source of it, or an erased part of the picture."""
    ran(capsys, "edit", "in.png", *FAST[:4], "--mask-from", "words:horse", "--source", "a horse", "-o", "a.png",
        "--model", folder)  # fmt: skip
    like = ["edit", "in.png", "--model", str(folder), "--dry-run", "--like"]
    assert ran(capsys, *like, "a.png", "--mask-from", "contrast")["method"] == "diffedit"
    hole = tiny.picture().convert("RGBA")
    hole.paste((0, 0, 0, 0), (20, 20, 40, 40))
    hole.save("hole.png")
    assert cli.main(["edit", "hole.png", *FAST, "-o", "b.png", "--model", str(folder)]) == 0
    assert cli.main(["edit", "hole.png", *like[2:], "b.png"]) == 0
    assert "of its own" not in capsys.readouterr().err


def test_options_without_effect_are_told_wherever_they_are_given(here, folder, capsys):
    under, own = ["--mask", "m.png", "--mask-threshold", "0.3"], ["--model", str(folder), "--dry-run"]
    several = ["edit", "in.png", "--count", "2", "--method", "sde-diffedit"]
    for command in (["edit", "in.png"], several, ["sheet", "in.png", "--rows", "strength=.4,.8"]):
        assert cli.main([*command, *FAST[:4], *under, *own]) == 0
        assert "under your own mask nothing depends on --mask-threshold" in capsys.readouterr().err
    both = ["sheet", "in.png", "--rows", "method=diffedit,sde-diffedit", *FAST[:4], *under, *own]
    for more, said in ((["--preview-decode"], "go with --preview"), (["--preview-every", "3"], "go with --preview"),
                       (["--preview-every", "0", "--preview", "p"], "from 1 to 999"),
                       (["--count", "2", "--decode-previews"], "one result"),
                       (["--count", "2", "--preview-every", "2"], "one result")):  # fmt: skip
        assert said in failed(capsys, "edit", "in.png", *FAST, *own, *more)
    for more in ([], ["--source", "a horse"]):  # of which DiffEdit alone makes nothing
        assert cli.main([*both, *more]) == 0
        assert "under your own mask nothing depends on --mask-threshold" in capsys.readouterr().err


def test_like_takes_a_model_that_can_be_named_and_says_where_it_is_another(here, folder, capsys, monkeypatch):
    def result(**settings):
        info, known = PngImagePlugin.PngInfo(), {"method": "diffedit", "target": "a cow", "steps": 2, "maps": 1}
        info.add_text("minidiffedit", json.dumps(known | settings))
        tiny.picture().save("a.png", pnginfo=info)
        return ["edit", "in.png", "--like", "a.png", "-o", "b.png"]

    asked, load = [], minidiffedit.StableDiffusion.load

    def loaded(model, **options):
        asked.append((model, options["local_files_only"]))
        return load(folder)

    monkeypatch.setattr(minidiffedit.StableDiffusion, "load", loaded)
    hashed = model_hash(folder / "unet" / "diffusion_pytorch_model.safetensors")
    for settings, said in (({"model": "some/body", "model_hash": hashed}, ""), ({"model": 5, "lora": "x"}, "lora x"),
                           ({"model": "/etc", "model_hash": "0123456789"}, "model_hash 0123456789")):  # fmt: skip
        assert cli.main(result(**settings)) == 0
        err = capsys.readouterr().err
        warned = err.partition("warning: a.png was made with another model (")[2]
        assert said in warned and bool(said) == bool(warned) and ("model some/body" in err) == (not said)
    assert asked == [("some/body", True), *[("stable-diffusion-v1-5/stable-diffusion-v1-5", True)] * 2]


@pytest.mark.parametrize("content", [b"", b"no picture", None], ids=["empty", "text", "a photo"])
def test_like_of_what_is_no_result(here, capsys, content):
    path = Path("other.png") if content is not None else Path("in.png")
    if content is not None:
        path.write_bytes(content)
    for word in (path, "missing.png"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["edit", "in.png", "--like", str(word), "--model", "no-such-model"])
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and out == "" and str(word) in err and err.count("\n") == 2
    assert "or one that holds settings of minidiffedit" in failed(capsys, "info", "in.png")


@pytest.mark.parametrize("change", [
    {"method": "-x"}, {"method": "../x"}, {"method": "a+b+c"}, {"method": "text-to-image"}, {"target": 5},
    {"steps": "x"}, {"steps": [1]}, {"steering": {"dilate": "x"}}, {"seed": -1}, {"guidance_scale": {}},
    {"method": "diffedit-regions", "edits": [["a"]]},
], ids=str)  # fmt: skip
def test_settings_that_no_run_can_have_had_are_refused(here, capsys, change):
    info = PngImagePlugin.PngInfo()
    info.add_text("minidiffedit", json.dumps({"method": "diffedit", "target": "a", "run": 1, "parser": 2} | change))
    tiny.picture().save("odd.png", pnginfo=info)
    try:
        code = cli.main(["edit", "in.png", "--like", "odd.png", "--quiet", "--model", "no-such-model"])
    except SystemExit as ended:
        code = ended.code
    err = capsys.readouterr().err
    assert code in (1, 2) and err.startswith("error: ") and "Traceback" not in err and "--debug" not in err, err


# ---------------------------------------------------------------- stdin and stdout


def piped(*argv, stdin=b"", cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "minidiffedit", *map(str, argv)]
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, timeout=120, cwd=cwd)


@pytest.mark.slow
def test_a_picture_comes_on_stdin_and_goes_to_stdout(here, folder, capsys):
    ran(capsys, "edit", "in.png", *FAST, *SEED, "-o", "o.png", "--model", folder)
    photo = Path("in.png").read_bytes()
    done = piped("edit", "-", *FAST, *SEED, "-o", "-", "--model", folder, "--json", stdin=photo, cwd=here)
    assert done.returncode == 0 and done.stdout == Path("o.png").read_bytes()
    assert json.loads(done.stderr)["seed"] == 0 and json.loads(done.stderr)["output"] == "-"
    done = piped(
        "edit", "in.png", *FAST, *SEED, "--mask", "-", "--model", folder, stdin=Path("m.png").read_bytes(), cwd=here
    )
    assert done.returncode == 0 and done.stdout.startswith(b"in-edited.png\n")
    done = piped("edit", "-", *FAST, *SEED, "-o", "-", "--quiet", "--model", folder, stdin=photo[:500], cwd=here)
    assert done.returncode == 1 and done.stdout == b"" and done.stderr.count(b"\n") == 1
    assert "hold" in failed(capsys, "edit", "-", *FAST, "--mask", "-", "--model", folder)


# ---------------------------------------------------------------- typos


@pytest.mark.parametrize("argv, said", [
    ("edit in.png --cfg-scale 3", "--guidance-scale"), ("edit in.png --prompt x", "--target"),
    ("edit in.png --target x --guidance 3", "--guidance-scale"), ("edit --init-image in.png --target x", "--image"),
    ("edit in.png --target x --num-inference-steps 3", "--steps"), ("edit in.png --num_inference_steps=3", "--steps"),
    ("edit in.png --denoising-strength .3", "--strength"), ("edit in.png --targt x", "--target"),
    ("edit in.png --target x -guidance_scale 3", "--guidance-scale"), ("edit in.png --Target x", "--target"),
    ("edit in.png --target x --n-samples 3", "--count"), ("generate --prompt x", "TEXT"),
    ("edit in.png --target x --method masactrl --maps 3", "--maps of masactrl; it comes with --method diffedit, "),
    ("edit in.png --target x --method sdedit --maps 3", "--maps of sdedit; it comes with --mask-from contrast, "),
    ("mask in.png --target x --strength 1", "no option --strength\n"), ("generate x --w 512", "--width"),
    ("generate x --source y", "no option --source of text-to-image\n"),
    ("edit in.png --method words+sdedit --mask-fence 3", "of words+sdedit; it comes with --mask-from quartiles, "),
    ("ledits++ in.png", "edit --method ledits++"), ("eidt in.png", "edit"), ("batsh x", "batch"),
    ("masactrl in.png", "edit --method masactrl"), ("sdedit in.png --target x", "edit --method sdedit"),
    ("direct+masactrl x", "--method direct+masactrl"), ("img2img", "--method sdedit"),
    ("in.png --target x", "minidiffedit edit in.png"),
    ("edit in.png m.png --target x", "batch"), ("edit in.png --target a zebra", "quotes"),
    ("edit in.png --target x --method masactr", "'masactrl'"), ("edit in.png --target x --seed", "--seed"),
    ("edit in.png --target x --method drag-diffusion", "no option --target of drag-diffusion"),
    ("edit in.png --target -red", "--target=-red"), ("mask in.png --source -a --target x", "--source=-a"),
])  # fmt: skip
def test_a_typo_is_answered_in_two_lines(here, capsys, argv, said):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv.split())
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and said in err.splitlines(keepends=True)[0] and err.count("\n") == 2
    assert "required" not in err and "--largest" not in err


def test_an_empty_name_is_no_default(here, capsys):
    """Of a shell's variable that is not set: before, another model was taken."""
    for option in ("--model", "--vae"):
        with pytest.raises(SystemExit):
            cli.main(["edit", "in.png", *FAST, option, ""])
        assert f"{option}: a file, a folder or a hub id is wanted, got ''" in capsys.readouterr().err
    assert "cannot be -" in failed(capsys, "batch", "in.png", "--target", "x", "-o", "-")


def test_what_is_given_and_changes_nothing_is_told(here, folder, capsys):
    command = ["edit", "in.png", "--target", "x", "--steps", "4", "--mask", "m.png", "--model", str(folder)]
    for words, said in ((["--mask-threshold", ".2", "--maps", "2"], ["--mask-threshold", "--maps"]),
                        (["--crop-margin", ".5"], ["--crop-margin"]), (["--source", "a horse"], ["--source"]),
                        (["--source", "a horse", "--encode-text", "source"], []), ([], [])):  # fmt: skip
        assert cli.main([*command, *words, "--dry-run"]) == 0
        err = capsys.readouterr().err
        assert err.count("\n") == bool(said) and all(one in err for one in said)
    assert "leave out one of them" in failed(capsys, *command, "--mask-from", "words:horse", "--source", "a horse")


def test_a_text_that_no_function_reads_is_told(here, folder, capsys):
    """Of several edits the sources stand in their pairs; DiffEdit encodes under no text."""
    command = ["edit", "in.png", "--method", "diffedit-regions", "--edit", "a=>b", "--source", "c", "--dry-run"]
    assert cli.main([*command, "--model", str(folder)]) == 0
    assert "with --encode-text null nothing depends on --source" in capsys.readouterr().err
    assert idle(plan(target="x", source="y", maps=3), ["target", "source", "maps"]) == []
    asked = {"target": "x", "source": "y", "quantile": 0.2, "object_threshold": 0.3}
    assert idle(plan("masactrl", **asked), asked) == [
        "without object_words nothing depends on object_threshold", "with guidance cfg nothing depends on quantile"
    ]  # fmt: skip
    assert idle(plan("masactrl", **asked, guidance="prox", object_words="x, y"), asked) == []
    drag, told = {"points": "0,0=>9,9", "rank": 4, "outside": 0.2}, ["outside", "rank"]
    assert idle(plan("drag-noise", **drag, lora_steps=0), told) == [
        "without mask nothing depends on outside", "without lora_steps nothing depends on rank"
    ]  # fmt: skip
    assert idle(plan("drag-noise", **drag, mask=np.ones((8, 8), np.uint8)), told) == []
    assert idle(plan("user-mask", target="x", source="y", mask="m.png"), ["source", "mask", "target"]) == [
        "with encode_text null nothing depends on source"
    ]


def test_a_seed_of_minus_one_is_explained(here, capsys):
    assert "leave it out for a random one" in failed(capsys, "edit", "in.png", *FAST, "--seed", "-1")
    with pytest.raises(ValueError, match="random"):
        plan(target="x", seed=-1)


def test_every_neighbours_name_leads_to_an_option_that_there_is():
    from minidiffedit.commands.typos import OURS

    known = set()
    for name in ("edit", "generate"):
        words = [name, "x", "--help"]
        parser = cli.build_parser(words)
        own = parser._subparsers._group_actions[0].choices[name]
        known |= {*own._option_string_actions} | {"--target TEXT"}
    assert all(any(one in known for one in ours) for ours in OURS.values())


def test_no_model_names_the_miniature_that_comes_along(here, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = failed(capsys, "edit", "in.png", *FAST, "--cache-dir", here / "cache")
    assert "minidiffedit download" in line and "--model mini" in line


# ---------------------------------------------------------------- help


def helped(capsys, *argv):
    with pytest.raises(SystemExit) as ended:
        cli.main([*argv])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_help_begins_with_examples_that_parse_and_hides_what_is_rare(here, capsys):
    for command in ("edit", "mask", "batch", "sheet", "generate"):
        short, whole = helped(capsys, command, "--help"), helped(capsys, command, "--help-all")
        assert short.count("\n") < 60 and "--help-all" in short and len(short) < len(whole)
        assert f"\n  minidiffedit {command} " in short.partition("positional arguments:")[0]
        assert "--local-files-only" not in short and "--local-files-only" in whole and "--seed" in short
    for line in re.findall(r"^  (minidiffedit edit .*)$", helped(capsys, "edit", "--help"), re.MULTILINE):
        import shlex

        if "--like" not in line:
            cli.build_parser(shlex.split(line)[1:]).parse_args(shlex.split(line)[1:])
    assert "--first-step" in helped(capsys, "edit", "--method", "masactrl", "--help")  # a named method shows its own


# ---------------------------------------------------------------- what a run will take


def test_a_dry_run_knows_seconds_after_a_run_of_its_kind(here, folder, capsys, monkeypatch):
    monkeypatch.setenv("MINIDIFFEDIT_CACHE", str(here / "rates"))
    command = ["edit", "in.png", *FAST, "--model", folder]
    first = ran(capsys, *command, "--dry-run")
    assert first["seconds"] is None and "unknown" in first["rate"] and first["memory"] > 0
    done = ran(capsys, *command)
    second = ran(capsys, *command, "--dry-run")
    assert second["seconds"] == pytest.approx(sum(done["seconds"].values()), rel=1e-6)
    twice = ran(capsys, *command, "--dry-run", "--steps", "8")
    assert second["seconds"] < twice["seconds"] < 2 * second["seconds"]
    for words in (["--size", "128"], ["--crop"]):  # another size, another rate
        assert ran(capsys, *command, "--dry-run", *words)["seconds"] is None
    assert cli.main([str(word) for word in [*command, "--dry-run"]]) == 0
    assert "by the last such run" in (said := capsys.readouterr().out) and "GiB" in said
    nowhere = ran(capsys, *command[:-1], "no-such-model", "--dry-run")
    assert nowhere["seconds"] is None and nowhere["memory"] is None and nowhere["rows"]["predicted"] > 0
    estimates.rates_file().write_text('{"a": ')
    assert ran(capsys, *command, "--dry-run")["seconds"] is None
    estimates.rates_file().unlink()
    (here / "rates").rmdir()
    (here / "rates").write_text("a file where the folder should be")
    ran(capsys, *command)


def test_bytes_held_are_those_of_the_tensors_alive():
    with torch.device("meta"):
        x = torch.empty(10, 10)
        with Held() as held:
            a = x + 1  # 400 bytes
            b = a * 2
            assert held.now == 800
            del a
            c = b.view(100)
            assert held.now == 400
            del b
            assert held.now == 400  # the view keeps it
            del c
    assert held.now == 0 and held.most == 800


def test_memory_is_the_weights_and_what_one_network_holds():
    settled = plan(target="a", source="b")
    configs = {"unet": tiny.UNET, "vae": tiny.VAE_, "text_encoder": tiny.CLIP}
    weights = sum(p.numel() for network in tiny.networks() for p in network.parameters())
    small, large, half = (memory(settled, configs, *how) for how in (((64, 64), torch.float32),
                          ((256, 256), torch.float32), ((64, 64), torch.bfloat16)))  # fmt: skip
    assert 4 * weights < small < large and 2 * weights < half < small
    picture = 4 * 8 * 256 * 256  # the VAE's last layer: 8 channels of full size, in and out
    assert 4 * weights + 2 * picture <= large < 4 * weights + 8 * picture
    rows = [memory(plan(target="a", source="b", mask=mask), configs, (64, 64), torch.float32)
            for mask in (None, torch.ones(1, 1, 8, 8))]  # fmt: skip
    assert rows[1] < rows[0] == small  # under one's own mask two at once, not those of ten maps
    assert 4 * weights < memory(plan(target="a", source="b", strength=0), configs, (64, 64), torch.float32) <= rows[1]
    for method in ("null-text-inversion", "sige"):  # what gradients need, and what is kept of each level
        assert memory(plan(method, target="a", source="b"), configs, (64, 64), torch.float32) is None


def test_a_size_far_from_the_training_size_is_warned_of(sd, picture):
    with pytest.warns(UserWarning, match="far from the 64 pixels"):
        edit(sd, picture, target="a", steps=2, maps=1, size=128)
    with pytest.warns(UserWarning, match="training|things come twice"):
        from minidiffedit import generate

        generate(sd, "x", steps=1, width=128, height=128)


# ---------------------------------------------------------------- in a notebook


def test_a_result_shows_itself(picture, capsys):
    model = Model()
    done = edit(model, picture, target="a <zebra> " * 40, source="a horse", steps=4, maps=2, seed=3)
    assert len(repr(done)) < 200 and "seed 3" in repr(done) and "diffedit" in repr(done)
    with Image.open(io.BytesIO(done._repr_png_())) as shown:
        assert shown.tobytes() == done.image.tobytes()
    page = done._repr_html_()
    assert page.startswith("<img src=") and "&lt;zebra&gt;" in page and "<zebra>" not in page
    sheet = contact_sheet(model, picture, target="a zebra", steps=4, maps=2, seed=0)
    assert len(repr(sheet)) < 200 and sheet._repr_png_()[:4] == b"\x89PNG"


def test_a_bar_on_request(picture, capsys):
    for asked in (False, True):
        edit(Model(), picture, target="a zebra", source="a horse", steps=4, maps=2, seed=3, progress=asked)
        said = capsys.readouterr().err
        assert ("decode" in said and "13/13 samples" in said) == asked, said


def test_the_page_names_a_model_that_is_there(folder, picture, tmp_path, monkeypatch):
    from minidiffedit import StableDiffusion
    from minidiffedit.views.report import commands

    for place in (tmp_path, folder.parent):
        monkeypatch.chdir(place)
        sd = StableDiffusion.load(folder, device="cpu")
        start = commands(edit(sd, picture, target="a", steps=2, maps=1, seed=0), None, None)["start"]
        assert Path(start.split("--model ")[1].split()[0]).resolve() == folder.resolve()
