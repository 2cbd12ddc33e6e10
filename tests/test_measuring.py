"""The measuring commands of weights/: what they refuse, in a line, what they keep apart, how they end."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_compare import alive

from weights import bench, compare, judge, shell, who_wins
from weights.scenes import SIDE

ROOT = Path(shell.__file__).parents[1]


def failed(capsys, monkeypatch, name, *words):
    """What a command says that ends with 1 or 2: the last line on stderr, and no traceback before it."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"weights.{name}").main()
    err = capsys.readouterr().err
    assert ended.value.code in (1, 2) and "Traceback" not in err and "error: " in err
    return err.splitlines()[-1]


NUMBERS = [
    ("bench", "--edits 0"), ("bench", "--workers 0"), ("evidence", "--scenes 0"), ("evidence", "--scenes -3"),
    ("who_wins", "--scenes abc"), ("who_wins", "--dear x"), ("who_wins", "--workers -1"), ("masks", "--scenes 0"),
    ("samples", "--seeds 0"), ("samples", "--steps 0"), ("photographs", "--count 0"), ("demo", "--seed -1"),
    ("compare", "matrix --steps -1"), ("compare", "samplers --scenes 0"), ("compare", "gallery --wide 0"),
    ("compare", "gallery --numbers x"), ("judge", "--test 0"), ("judge", "--scenes 0"), ("train", "vae --batch 0"),
]  # fmt: skip


@pytest.mark.parametrize("name, words", NUMBERS, ids=[" ".join(one) for one in NUMBERS])
def test_numbers_that_cannot_be_are_refused(name, words, capsys, monkeypatch):
    assert "a whole number from" in failed(capsys, monkeypatch, name, *words.split())


@pytest.mark.parametrize("words", ["--minutes -1", "--minutes nan", "--steps 0", "--rate 0"])
def test_budgets_are_above_0(words, capsys, monkeypatch):
    assert "a number above 0 is wanted" in failed(capsys, monkeypatch, "train", "vae", *words.split())


@pytest.mark.parametrize("name, words", [
    ("who_wins", "--scenes 1"), ("compare", "matrix"), ("bench", "--edits 1"), ("evidence", "--scenes 10 --only maps"),
])  # fmt: skip
def test_a_model_that_is_not_there_is_refused_before_anything_runs(name, words, capsys, monkeypatch, tmp_path):
    said = failed(capsys, monkeypatch, name, *words.split(), "--model", tmp_path / "none", "-o", tmp_path / "o")
    assert "none: no such folder" in said and not [*(tmp_path / "o").glob("*.md")]
    (tmp_path / "file").write_text("")
    assert "File exists" in failed(capsys, monkeypatch, name, *words.split(), "-o", tmp_path / "file")


def test_rows_of_other_weights_are_never_taken(tmp_path):
    """Whatever names them: a folder, one file, another judge."""
    one, other = (tiny.write_folder(tmp_path / name, unet=unet) for name, unet in (("a", tiny.QUICK), ("b", tiny.UNET)))
    found = {shell.fingerprint(path, judge.FOLDER) for path in (one, other)}
    found |= {shell.fingerprint(folder / "unet" / "diffusion_pytorch_model.safetensors", judge.FOLDER)
              for folder in (one, other)}  # fmt: skip
    assert len(found) == 4 and shell.fingerprint(str(one), judge.FOLDER) in found
    with pytest.raises(ValueError, match=r"`python -m weights\.judge` trains"):
        shell.fingerprint(one, tmp_path)


def test_a_model_of_another_size_is_refused():
    with pytest.raises(ValueError, match=f"scenes have {SIDE} x {SIDE} pixels, but .* knows 64"):
        bench.check_size(tiny.model())


@pytest.mark.parametrize("content", [b"", b"garbage", "other"])
def test_a_judge_that_is_none_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "FOLDER", tmp_path)
    file = tiny.write_folder(tmp_path / "m", unet=tiny.QUICK) / "vae" / "diffusion_pytorch_model.safetensors"
    (tmp_path / "judge.safetensors").write_bytes(file.read_bytes() if content == "other" else content)
    with pytest.raises(ValueError, match=r"is no judge \(.*`python -m weights.judge` trains one"):
        judge.load_judge()


def test_options_that_would_do_nothing_are_refused(capsys, monkeypatch, tmp_path):
    own = ["-o", tmp_path]
    assert "--limit goes with --pie" in failed(capsys, monkeypatch, "who_wins", "--limit", "3", *own)
    said = failed(capsys, monkeypatch, "who_wins", "--pie", tmp_path, "--quick", "--seeds", "9", "--readme", *own)
    assert "--quick, --seeds, --readme goes without --pie" in said
    assert "NAME=VALUE is wanted" in failed(capsys, monkeypatch, "compare", "losses", "--set", "foo", *own)
    assert "no method has a letter" in failed(capsys, monkeypatch, "compare", "gallery", "--letters", "Z", *own)
    monkeypatch.setattr(compare, "networks", lambda *given: (None, None, "ours"))
    assert "no method here takes bogus" in failed(capsys, monkeypatch, "compare", "losses", "--set", "bogus=1", *own)
    assert "nosuch has no loss" in failed(capsys, monkeypatch, "compare", "losses", "--only", "nosuch", *own)


def test_a_matrix_in_which_nothing_was_made_is_none(tmp_path, monkeypatch):
    rows = [{"method": "ddim+replay", "error": "no"}] * 3
    monkeypatch.setattr(compare, "run", lambda *given: rows)
    monkeypatch.setattr(sys, "argv", ["compare", "matrix", "-o", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        compare.main()
    assert not (tmp_path / "matrix.md").exists()
    made = {"method": "ddim+diffedit", "background_psnr": None, "success": True, "rows": 1, "seconds": 1.0}
    rows += [made, made | {"background_psnr": 20.0}]
    compare.main()
    text = (tmp_path / "matrix.md").read_text()
    assert "| 34.1 dB, 100 % |" in text and "3 x ddim+replay: no" in text  # (20 + 48.13) / 2


def test_the_command_names_what_is_not_usual(tmp_path, monkeypatch):
    monkeypatch.setattr(who_wins, "fingerprint", lambda *given: "ours")
    monkeypatch.setattr(who_wins, "run", lambda *given: [])
    told = []
    monkeypatch.setattr(who_wins, "page", lambda rows, command: told.append(command) or "")
    monkeypatch.setattr(who_wins, "plot", lambda *given: None)
    for more in ((), ("--model", "theirs"), ("--readme", "--model", "theirs")):
        monkeypatch.setattr(sys, "argv", ["who_wins", "--scenes", "1", "-o", str(tmp_path), *more])
        if "--readme" not in more:
            who_wins.main()
    assert told == ['make compare COMPARE="--scenes 1"', 'make compare COMPARE="--scenes 1 --model theirs"']
    with pytest.raises(SystemExit, match="1"):
        who_wins.main()


@pytest.mark.parametrize("first, then, left", [
    ("--to zebra", "", {"source.png", "mask.png", "captions.json"}),
    ("", "--to zebra", {"source.png", "mask.png", "captions.json", "target.png"}),
])  # fmt: skip
def test_a_scene_drawn_over_another_leaves_nothing_of_it(first, then, left, tmp_path, monkeypatch, capsys):
    scenes, nothing = importlib.import_module("weights.scenes"), np.zeros((SIDE, SIDE, 3))
    monkeypatch.setattr(scenes, "draw_thing", lambda thing: (nothing, nothing[..., 0]))
    for words in (first, then):
        monkeypatch.setattr(sys, "argv", ["scenes", "--object", "horse", *words.split(), "-o", str(tmp_path)])
        assert scenes.main() == 0
    assert {path.name for path in tmp_path.iterdir()} == left
    monkeypatch.setattr(sys, "argv", ["scenes", "--object", "horse", "--to", "horse", "-o", str(tmp_path)])
    assert scenes.main() == 1 and "that is no edit" in capsys.readouterr().err
    (tmp_path / "captions.json").unlink()
    monkeypatch.setattr(sys, "argv", ["scenes", "--object", "horse", "-o", str(tmp_path)])
    assert scenes.main() == 1 and "of another origin" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGINT is sent to one process on POSIX only")
def test_ctrl_c_ends_a_run_with_its_workers(tmp_path):
    """At once, in a line, though tasks are left and one is under way."""
    (tmp_path / "parent.py").write_text(
        "import argparse, os, signal, time\n"
        "from weights import compare, shell\n"
        "def work(task, *given):\n"
        "    open(f'{given[0]}/{os.getpid()}', 'w').close(); time.sleep(90)\n"
        "compare.work = work\n"
        "def measure(args):\n"
        "    compare.fingerprint = lambda *given: 'ours'\n"
        "    tasks = [compare.Task(n, 'swap', 0, ('sdedit',)) for n in range(9)]\n"
        f"    compare.run(tasks, compare.Path({str(tmp_path / 'rows.jsonl')!r}), {str(tmp_path / 'pids')!r}, None, 2)\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored\n"
        "    shell.run_command(argparse.ArgumentParser('parent'), measure)\n"
    )
    (tmp_path / "pids").mkdir()
    run = [sys.executable, tmp_path / "parent.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(run, stderr=subprocess.PIPE, env=environment, start_new_session=True) as parent:
        ended = time.monotonic() + 120
        while len(workers := [int(one.name) for one in (tmp_path / "pids").iterdir()]) < 2:
            assert time.monotonic() < ended and parent.poll() is None
            time.sleep(0.1)
        parent.send_signal(signal.SIGINT)
        assert parent.wait(20) == 130
        assert b"goes on with the same command" in parent.stderr.read().splitlines()[-1]
    ended = time.monotonic() + 20
    while time.monotonic() < ended and any(map(alive, workers)):
        time.sleep(0.1)
    assert not any(map(alive, workers))


def test_a_pie_entry_without_two_words_is_named(tmp_path):
    from test_evaluate import write_pie

    from weights import pie

    write_pie(tmp_path, 2)
    (place,) = tmp_path.rglob("mapping_file.json")
    entries = json.loads(place.read_text())
    name = next(iter(entries))
    for wrong in ({"blended_word": ["dog", "cat"]}, []):
        place.write_text(json.dumps(entries | {name: entries[name] | wrong if wrong else wrong}))
        with pytest.raises(ValueError, match=f"{name} must hold a blended_word of two words"):
            pie.words(tmp_path)
