"""Many edits: what a manifest may say, that a batch is its single edits, and that it goes on where it stopped."""

import copy
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minidiffedit import StableDiffusion, Steering, cli
from minidiffedit.many import batch
from minidiffedit.many.batch import Editor, settle
from minidiffedit.many.manifest import Row, check_output, columns, grouped, read_manifest, within
from minidiffedit.methods.table import SYSTEMS
from minidiffedit.run import blank_plan, edit

FAST = ["--steps", "5", "--maps", "2"]
ROWS = [
    {"image": "a.png", "source": "a horse", "target": "a zebra"},
    {"image": "b.png", "source": "a horse", "target": "a zebra", "output": "b-out.webp"},
    {"image": "a.png", "source": "a horse", "target": "a zebra", "mask_threshold": 0.3},
    {"image": "a.png", "source": "a horse", "target": "a cow", "strength": 1.0, "negative-prompt": "a car"},
    {"image": "a.png", "target": "a cow", "strength": 0.4, "seed": 7, "size": 96},
    {"image": "a.png", "target": "a cow", "mask": "m.png", "seed": 0, "dilate": 1, "paste": False},
    {"image": "a.png", "source": "a horse", "target": "a cow", "encode_text": "source", "mask_clip": "none"},
    {"image": "a.png", "source": "a horse", "target": "a zebra", "chunk": 1, "guidance_scale": 1, "largest": True},
    {"image": "a.png", "source": "a horse", "target": "a zebra", "refine": 2, "union": "m.png", "feather": 1},
]


def picture(seed, size=(80, 64)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with two pictures, a mask and a manifest, to stand in."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    picture(0).save("a.png")
    picture(1).save("b.png")
    mask = Image.new("L", (80, 64))
    mask.paste(255, (16, 8, 40, 32))
    mask.save("m.png")
    jsonl("m.jsonl", ROWS)
    return tmp_path


def jsonl(name, rows):
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def ran(capsys, folder, *options, manifest="m.jsonl", out="out", code=0):
    argv = ["batch", manifest, "-o", out, *FAST, "--model", folder, "--json", "--quiet", *options]
    assert cli.main([str(a) for a in argv]) == code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def failed(capsys, *options, manifest="m.jsonl", out="out"):
    """Refused as a whole, in one line, before any model is loaded."""
    assert cli.main([str(a) for a in ("batch", manifest, "-o", out, "--model", "no-such-model", *options)]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and said.err.startswith("error: "), said.err
    return said.err


def table(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def files(folder):
    """Every file below by its path, but the tables."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in Path(folder).rglob("*")
        if p.is_file() and p.suffix != ".jsonl"
    }


def timeless(records):
    return [
        {name: value for name, value in record.items() if name not in ("seconds", "evaluations")} for record in records
    ]


# ---------------------------------------------------------------- equal to single edits


def option(name, value):
    name = "--" + name.replace("_", "-")
    if value is False:
        return ["--no-paste"]
    return [name] if value is True else [name, str(value)]


def test_every_row_is_the_single_edit_bit_for_bit(here, folder, capsys):
    """The very file that `edit` writes with the same options and the seed that the table names."""
    done = ran(capsys, folder)
    assert (done["rows"], done["made"], done["failed"], "exit" in done) == (9, 9, 0, False)
    records = table("out/results.jsonl")
    assert [record["row"] for record in records] == [*range(1, 10)]
    paid = 0
    for row, record in zip(ROWS, records):
        options = {name: value for name, value in row.items() if name not in ("image", "output", "seed")}
        argv = [argument for name, value in options.items() for argument in option(name, value)]
        single = f"single{Path(record['output']).suffix}"
        argv = ["edit", row["image"], *argv, *FAST, "--seed", str(record["seed"]), "--model", str(folder), "-o", single]
        assert cli.main([*argv, "--json", "--quiet"]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert Path(single).read_bytes() == Path("out", record["output"]).read_bytes(), row
        assert alone["settings"] == record["settings"] and alone["verdict"] == record["verdict"]
        assert all(record["evaluations"][stage] <= alone["evaluations"][stage] for stage in record["evaluations"])
        paid += sum(alone["evaluations"].values())
    assert done["evaluations"] == sum(sum(r["evaluations"].values()) for r in records) < paid


METHODS = [
    {"method": "sdedit", "target": "a cow", "strength": 0.6, "eta": 0.5, "repeats": 2},
    {"method": "sdedit", "mask": "m.png", "target": "a cow", "form": "ve", "feather": 1},
    {"method": "masactrl", "source": "a horse", "target": "a zebra", "first_step": 2},
    {"method": "masactrl", "inversion": "ddim", "target": "a zebra", "strength": 0.4},
    {"method": "masactrl", "inversion": "ddim", "target": "a zebra", "strength": 0.8},
    {"method": "null-text-inversion", "source": "a horse", "target": "a zebra", "inner_steps": 2},
    {"method": "null-text-inversion", "source": "a horse", "target": "a cow", "inner_steps": 2, "seed": 4},
    {"method": "direct+replay", "source": "a horse", "target": "a zebra"},
    {"source": "a horse", "target": "a zebra", "mask_threshold": 0.3},
    {"source": "a horse", "target": "a zebra", "mask_threshold": 0.7, "strength": 0.4},
    {"source": "a horse", "target": "a cow", "seed": 4},
    {"method": "mask-only", "source": "a horse", "target": "a zebra", "subtract": "m.png"},
    {"method": "user-mask", "mask": "m.png", "target": "a zebra", "invert": True},
    {"method": "diffedit-regions", "edits": [["a horse", "a zebra"], ["", "a cow"]], "mask_threshold": 0.2},
    {"method": "reconstruction", "source": "a horse"},
]


def test_rows_of_any_method_are_the_single_edit_bit_for_bit(here, folder, capsys):
    """By `edit` alone, on a model of its own; what methods share, they share across methods too."""
    jsonl("m.jsonl", [{"image": "a.png", "steps": 5, "paste": False} | row for row in METHODS])
    done = ran(capsys, folder)
    assert (done["made"], done["failed"]) == (len(METHODS), 0)
    sd, steering, paid = StableDiffusion.load(folder, device="cpu"), ("feather", "subtract", "invert"), 0
    for row, record in zip(METHODS, table("out/results.jsonl")):
        given = {"steps": 5, "paste": False, "seed": record["seed"]} | row
        has = blank_plan(given.get("method", "diffedit"), given.get("inversion")).options
        given |= {"maps": 2} if "maps" in has else {}  # of the command's own defaults, see FAST
        over = {name: given.pop(name) for name in steering if name in given}
        alone = edit(sd, "a.png", **given, steering=Steering(**over) if over else None)
        made = Image.open(Path("out", record["output"]))
        assert made.tobytes() == alone.image.tobytes() and record["verdict"] == alone.verdict, row
        assert record["method"] == alone.method and record["coverage"] == alone.coverage
        assert all(n <= alone.evaluations[stage] for stage, n in record["evaluations"].items()), row
        paid += alone.rows
    assert done["evaluations"] < paid
    rows = [record["evaluations"] for record in table("out/results.jsonl")]
    assert rows[3]["encode"] == rows[5]["encode"] == 0 < rows[4]["encode"]  # a part of a path, and the same path


def test_every_column_of_every_method_is_known():
    known = columns()
    assert len({*known}) == len(known) and {"image", "output", "method", "inversion", "union", "largest"} <= {*known}
    for name, system in SYSTEMS.items():
        if system.edit:
            assert {*blank_plan(name).given, *blank_plan(name).options} <= {*known}, name


def test_defaults_go_to_the_rows_whose_method_takes_them(here):
    jsonl("m.jsonl", [
        {"image": "a.png", "target": "t"}, {"image": "a.png", "method": "sdedit"},
        {"image": "a.png", "method": "masactrl", "target": "u", "strength": "0.5", "seed": "none"},
    ])  # fmt: skip
    defaults = {
        "method": "replay",
        "inversion": "direct",
        "eta": 0.5,
        "maps": 3,
        "target": "d",
        "dilate": 2,
        "mask": None,
    }
    one, two, three = (row.options() for row in read_manifest(Path("m.jsonl"), defaults))
    assert one == {"image": "a.png", "method": "direct+replay", "target": "t"}
    assert two == {"image": "a.png", "method": "sdedit", "eta": 0.5, "target": "d", "dilate": 2}
    assert three == {"image": "a.png", "method": "masactrl", "target": "u", "strength": 0.5, "seed": None}


def test_rows_of_a_picture_share_latent_encoding_and_equal_maps(here, folder, capsys, monkeypatch):
    jsonl("m.jsonl", [
        {"image": "a.png", "source": "s", "target": "t", "strength": 0.4},
        {"image": "b.png", "source": "s", "target": "t"},
        {"image": "a.png", "source": "s", "target": "t", "strength": 1.0},
        {"image": "a.png", "source": "s", "target": "u", "strength": 1.0},
        {"image": "a.png", "source": "s", "target": "t", "mask_threshold": 0.3},
        {"image": "a.png", "source": "s", "target": "t", "steps": 4},
        {"image": "a.png", "source": "s", "target": "u", "strength": 0.6},
    ])  # fmt: skip
    encoded = []
    monkeypatch.setattr(StableDiffusion, "encode", count(StableDiffusion.encode, encoded))
    ran(capsys, folder, "--strength", "0.8")
    rows = [tuple(record["evaluations"].values()) for record in table("out/results.jsonl")]
    # Of a.png row 3 or 4 pays for the encoding, whichever comes first; row 6 has other steps.
    assert [row[2] for row in rows] == [4, 8, 10, 10, 8, 6, 6]
    assert sorted([rows[2][1], rows[3][1]]) == [0, 5] and [rows[i][1] for i in (0, 1, 4, 5, 6)] == [0, 4, 0, 3, 0]
    assert [row[0] for row in rows] == [0, 4, 4, 4, 0, 4, 0]
    assert len(encoded) == 2  # pictures


def test_maps_of_another_target_or_chunk_are_not_shared(here, folder, capsys):
    """Half of them could be; alone they would round otherwise than beside the other half."""
    rows = [{"target": "t"}, {"target": "u"}, {"target": "t", "chunk": 1}, {"target": "t", "mask_threshold": 0.3}]
    jsonl("m.jsonl", [{"image": "a.png", "source": "s", "seed": 3} | row for row in rows])
    ran(capsys, folder)
    assert sorted(record["evaluations"]["mask"] for record in table("out/results.jsonl")) == [0, 4, 4, 4]


def count(function, calls):
    def counted(*arguments, **options):
        calls.append(arguments)
        return function(*arguments, **options)

    return counted


def test_a_sweep_of_thresholds_pays_for_one_mask(here, folder, capsys):
    jsonl("m.jsonl", [{"image": "a.png", "target": "t", "mask_threshold": k / 10} for k in range(1, 6)])
    ran(capsys, folder)
    paid = [record["evaluations"] for record in table("out/results.jsonl")]
    assert sum(one["mask"] for one in paid) == 4 and sum(one["encode"] for one in paid) == 4
    assert len({record["seed"] for record in table("out/results.jsonl")}) == 1


def test_what_a_bad_row_leaves_behind_is_not_shared(here, folder, capsys, monkeypatch):
    """A NaN in one row's decoding; the next row of the picture is made from scratch and equals its single edit."""
    jsonl("m.jsonl", [ROWS[0], ROWS[6], ROWS[3]])
    ran(capsys, folder, out="whole")
    real = batch.execute

    def sick(plan, sd, image, **options):
        done = real(plan, sd, image, **options)
        if plan.given["target"] == "a cow" and plan.settings["mask_clip"] is None:
            raise ArithmeticError("the VAE: the model returned NaN")
        return done

    monkeypatch.setattr(batch, "execute", sick)
    done = ran(capsys, folder, code=1)
    assert (done["made"], done["failed"]) == (2, 1) and done["errors"][0]["row"] == 2
    whole = files("whole")
    assert files("out").items() < whole.items() and len(files("out")) == len(whole) - 1


# ---------------------------------------------------------------- seeds


def test_seeds_follow_from_the_content_alone(here):
    def seed(**row):
        own = {"image": "a.png", "target": "t", "source": "s"} | row
        return settle(Row(1, own, {}), Path()).plan.settings["seed"]

    assert seed() == seed(strength=0.5, mask_threshold=0.3, output="x.png", steps=7)
    assert len({seed(), seed(target="u"), seed(source=""), seed(image="b.png"), seed(target="s", source="t")}) == 5
    assert seed(seed=0) == 0 and 0 <= seed() < 2**32 and seed(method="replay", output="y.png") == seed()
    shutil.copy("a.png", "copy.png")
    assert seed(image="copy.png") == seed()
    picture(2).save("a.png")
    assert seed() != seed(image="copy.png")


def test_seeds_follow_from_all_that_is_asked(here):
    """Not from the picture alone where a method reads an instruction, pairs, points or another picture."""

    def seed(method, **row):
        return settle(Row(1, {"image": "a.png", "method": method} | row, {}), Path()).plan.settings["seed"]

    for method, key, values in [
        ("instruct-pix2pix", "instruction", ("make it blue", "make it red")),
        ("diffedit-regions", "edits", ([["s", "t"]], [["s", "u"]])),
        ("sde-drag", "points", ("1,1=>9,9", "1,1=>9,8")),
        ("cross-image-attention", "reference", ("b.png", "m.png")),
    ]:
        one, other = (seed(method, **{key: value}) for value in values)
        assert one != other and one == seed(method, **{key: values[0]}), method


# ---------------------------------------------------------------- going on


def interrupted_after(monkeypatch, rows):
    left = [rows]
    real = batch.execute

    def stopping(*arguments, **options):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*arguments, **options)

    monkeypatch.setattr(batch, "execute", stopping)


@pytest.mark.parametrize("rows", [0, 3])
def test_an_interrupted_run_goes_on(here, folder, capsys, monkeypatch, rows):
    """Twice interrupted, and its table cut short each time, as if the machine had stopped."""
    jsonl("m.jsonl", ROWS[:5])
    whole = ran(capsys, folder, out="whole")
    for more, there in ((rows, rows), (1, rows + 1)):
        with monkeypatch.context() as patch:
            interrupted_after(patch, more)
            assert cli.main(["batch", "m.jsonl", "-o", "out", *FAST, "--model", str(folder), "--quiet"]) == 130
        assert len(files("out")) == there and len({record["key"] for record in table("out/results.jsonl")}) == there
        with Path("out/results.jsonl").open("a") as file:
            file.write('{"row": 5, "status": "done", "ke')
        capsys.readouterr()
    rest = ran(capsys, folder)
    assert (rest["made"], rest["already there"]) == (5 - there, there)
    assert files("out") == files("whole")
    assert timeless(table("out/results.jsonl")) == timeless(table("whole/results.jsonl"))
    again = ran(capsys, folder)
    assert (again["made"], again["already there"], again["evaluations"]) == (0, 5, 0) and whole["made"] == 5


def test_a_row_is_made_again_when_anything_of_it_changed(here, folder, capsys):
    """Told by content: picture, mask, options, model and the result itself; not by names."""

    def made(*options, **kinds):
        return ran(capsys, folder, *options, **kinds)["made"]

    rows = [{"image": "a.png", "target": "t", "mask": "m.png", "output": "x.png"}]
    jsonl("m.jsonl", rows)
    assert made() == 1 and made() == 0
    first = Path("out/x.png").read_bytes()
    Path("out/x.png").write_bytes(first[:-9])  # damaged
    assert made() == 1 and Path("out/x.png").read_bytes() == first
    Path("out/x.png").unlink()
    assert made() == 1
    picture(5).save("a.png")  # another picture under the same name
    assert made() == 1 and made() == 0 and Path("out/x.png").read_bytes() != first
    Image.new("L", (80, 64), 255).save("m.png")
    assert made() == 1
    jsonl("m.jsonl", [rows[0] | {"seed": 1}])
    assert made() == 1 and made("--seed", "2") == 0 and made("--strength", "0.5") == 1
    assert made("--strength", "0.5", "--dtype", "bfloat16") == 1
    jsonl("m.jsonl", [{"image": "b.png", "target": "t"}, rows[0] | {"seed": 1}])  # moved down
    done = ran(capsys, folder, "--strength", "0.5", "--dtype", "bfloat16")
    assert (done["made"], done["already there"]) == (1, 1)
    assert [record["row"] for record in table("out/results.jsonl")] == [1, 2]


def test_a_picture_that_changes_during_the_run_fails(here, folder, capsys, monkeypatch):
    """It would stand in the table under the content it no longer has."""
    jsonl("m.jsonl", [{"image": "a.png", "target": "t"}, {"image": "a.png", "target": "u"}])
    real = batch.execute

    def overwriting(*arguments, **options):
        done = real(*arguments, **options)
        picture(9).save("a.png")
        return done

    monkeypatch.setattr(batch, "execute", overwriting)
    done = ran(capsys, folder, code=1)
    assert (done["made"], done["failed"]) == (1, 1) and "during the run" in done["errors"][0]["error"]


def test_failed_rows_are_tried_again(here, folder, capsys):
    jsonl("m.jsonl", [{"image": "a.png", "target": "t"}, {"image": "late.png", "target": "t"}])
    assert ran(capsys, folder, code=1)["errors"][0]["row"] == 2
    shutil.copy("b.png", "late.png")
    done = ran(capsys, folder)
    assert (done["made"], done["already there"]) == (1, 1)
    assert [record["status"] for record in table("out/results.jsonl")] == ["done", "done"]


def test_a_table_from_elsewhere_does_no_harm(here, folder, capsys):
    """Not trusted: the folder's files count, and only under names that this manifest leads to."""
    jsonl("m.jsonl", [{"image": "a.png", "target": "t"}])
    ran(capsys, folder)
    (record,) = table("out/results.jsonl")
    Path("out/results.jsonl").write_text(
        json.dumps(record | {"output": "../../x.png"}) + "\n[]\n{}\n" + "[" * 99999 + "\n"
        + json.dumps(record | {"sha256": 1}) + "\n" + json.dumps(record | {"row": "x"}) + "\n"
    )  # fmt: skip
    assert ran(capsys, folder)["made"] == 1
    assert timeless(table("out/results.jsonl")) == timeless([record])


def test_equal_rows_are_made_once(here, folder, capsys):
    jsonl("m.jsonl", [ROWS[0], ROWS[1], ROWS[0]])
    done = ran(capsys, folder)
    assert (done["made"], done["already there"]) == (2, 1)
    one, _, three = table("out/results.jsonl")
    assert one | {"row": 3} == three


def test_a_folder_that_cannot_be_written_stops_the_run(here, folder, capsys, monkeypatch):
    """Not every row fails by itself on a full disk: the run ends, and can go on."""
    jsonl("m.jsonl", ROWS[:4])
    real, left = os.fsync, [3]  # the table at the start, and two pictures

    def full(descriptor):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert cli.main(["batch", "m.jsonl", "-o", "out", *FAST, "--model", str(folder), "--quiet"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert len(files("out")) == 2 and not list(Path("out").glob(".*"))
    done = ran(capsys, folder)
    assert (done["made"], done["already there"]) == (2, 2)


# ---------------------------------------------------------------- shards


def test_shards_make_the_same_files_together(here, folder, capsys):
    picture(2).save("c.png")
    rows = [*ROWS[:4], {"image": "c.png", "target": "t"}, {"image": "./a.png", "target": "t"}]
    jsonl("m.jsonl", rows)
    ran(capsys, folder, out="whole")
    parts = [ran(capsys, folder, "--shard", f"{i}/2") for i in (1, 2)]
    assert [part["rows"] for part in parts] == [5, 1] and [part["shard"] for part in parts] == ["1/2", "2/2"]
    assert files("out") == files("whole")
    tables = [table(f"out/results-{i}-of-2.jsonl") for i in (1, 2)]
    assert {r["image"] for r in tables[0]} & {r["image"] for r in tables[1]} == set()
    together = sorted(tables[0] + tables[1], key=lambda record: record["row"])
    assert timeless(together) == timeless(table("whole/results.jsonl"))
    assert ran(capsys, folder)["already there"] == 6  # one process more makes one table of them
    assert timeless(table("out/results.jsonl")) == timeless(together)


# A row of each family: noises of a picture's own, attention, gradients, learned weights and points, copied places; and
# those whose weights are of another kind, by the channels of their UNet.
FAMILIES = {
    4: [
        {"method": "edit-friendly-ddpm", "target": "a zebra", "source": "a horse"},
        {"method": "masactrl", "target": "a zebra"},
        {"method": "null-text-inversion", "target": "a zebra", "source": "a horse", "inner_steps": 1},
        {"method": "drag-diffusion", "points": "9,9=>40,30", "iterations": 1, "lora_steps": 1, "batch": 1},
        {"method": "sde-drag", "points": "9,9=>40,30", "moves": 1},
    ],
    8: [{"method": "instruct-pix2pix", "instruction": "make it snow"}],
    9: [{"method": "sd-inpainting", "mask": "m.png", "target": "a zebra"}],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("channels", FAMILIES)
def test_each_family_in_shards_and_after_a_kill(channels, here, folder, capsys):
    """The same files, bit for bit: in one run here, in two shards, and begun by a process that is killed half-way."""
    folder = folder if channels == 4 else tiny.write_folder(here / "weights", channels=channels, unet=tiny.QUICK)
    rows = [row | {"image": image, "steps": 2, "seed": 3} for image in ("a.png", "b.png") for row in FAMILIES[channels]]
    jsonl("m.jsonl", rows)
    whole = ran(capsys, folder, out="whole")
    assert whole["made"] == len(rows) == len(files("whole"))
    for i in (1, 2):
        ran(capsys, folder, "--shard", f"{i}/2", out="shards")
    assert files("shards") == files("whole")
    command = [sys.executable, "-m", "minidiffedit", "batch", "m.jsonl", "-o", "killed", *FAST, "--model", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not [*Path("killed").glob("*.png")]:
        time.sleep(0.02)
    process.kill()
    process.wait()
    there = len([*Path("killed").glob("*.png")])
    assert there and ran(capsys, folder, out="killed")["made"] <= len(rows) - there + 1
    made = {name: content for name, content in files("killed").items() if not name.endswith(".part")}
    assert made == files("whole")


def test_more_shards_than_pictures(here, folder, capsys):
    done = ran(capsys, folder, "--shard", "3/3")
    assert (done["rows"], done["made"]) == (0, 0) and table("out/results-3-of-3.jsonl") == []


def test_torchrun_s_variables(here, folder, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ran(capsys, folder)["shard"] == "2/2" and Path("out/results-2-of-2.jsonl").exists()
    assert ran(capsys, folder, "--shard", "1/1")["shard"] == "1/1"
    jsonl("m.jsonl", [{"image": "a.png", "target": "t"}, {"image": "none.png", "target": "t"}])
    assert ran(capsys, folder, code=1)["failed"] == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")  # torchrun ends every process when one of them fails
    assert ran(capsys, folder, code=0)["failed"] == 1
    for rank, size in (("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        assert "--shard" in failed(capsys)


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2", "1/2/3", "\u00b2/2"])
def test_bad_shards_are_usage_errors(here, capsys, text):
    with pytest.raises(SystemExit) as left:
        cli.main(["batch", "m.jsonl", "-o", "out", f"--shard={text}"])
    assert left.value.code == 2 and "from 1 to N" in capsys.readouterr().err and not Path("out").exists()


def test_an_editor_travels_without_its_model(here, folder):
    editor = Editor(partial(StableDiffusion.load, folder), Path(), Path("out"))
    Path("out").mkdir()
    rows = grouped(read_manifest(Path("m.jsonl"), {"steps": 5, "maps": 2}), Path())[1]
    ((status, record),) = editor(rows)
    assert status == "made" and editor.sd is not None
    sent = copy.copy(editor)  # by what would be sent
    assert sent.sd is None and sent.known is None and sent.root.is_absolute() and sent.out.is_absolute()
    jsonl("out/results.jsonl", [record])
    assert [*sent(rows)] == [("already there", json.loads(json.dumps(record)))]


def test_ray_is_an_extra(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'minidiffedit[ray]'" in failed(capsys, "--ray", "2")
    assert "1 or more" in failed(capsys, "--ray", "0")


def test_rows_whose_method_needs_other_weights_fail_before_any_are_read(here, folder, capsys, monkeypatch):
    hive = {"image": "a.png", "method": "hive", "instruction": "paint it"}
    jsonl("m.jsonl", [hive, {"image": "a.png", "method": "sd-inpainting", "target": "t", "mask": "m.png"}])
    with monkeypatch.context() as patch:
        patch.setattr("minidiffedit.sd.load_network", lambda *a: pytest.fail("weights were read"))
        done = ran(capsys, folder, code=1)
    assert [done[name] for name in ("made", "failed")] == [0, 2]
    for kind, one in zip(("instruct", "inpainting"), done["errors"]):
        assert f"needs {kind} weights" in one["error"]
    jsonl("m.jsonl", [hive, ROWS[0]])
    done = ran(capsys, folder, code=1)
    assert [done[name] for name in ("made", "failed")] == [1, 1] and done["errors"][0]["row"] == 1


# ---------------------------------------------------------------- manifests


def test_csv_jsonl_and_folders_say_the_same(here):
    rows = [{"image": "a.png", "target": "ü, \"t\"", "steps": 7, "paste": False, "mask_clip": "none", "seed": 0},
            {"image": "b.png", "target": "t", "strength": 0.5, "largest": True, "mask_clip": 2.0}]  # fmt: skip
    jsonl("rows.jsonl", [rows[0] | {"source": None}, {name.replace("_", "-"): v for name, v in rows[1].items()}])
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open("rows.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    found = read_manifest(Path("rows.jsonl"), {"source": "s"})
    same = read_manifest(Path("rows.csv"), {"source": "s"})
    assert [row.options() for row in found] == [row.options() for row in same]
    one, two = (row.options() for row in same)
    assert one["source"] == "s" and one["paste"] is False and one["mask_clip"] is None and two["strength"] == 0.5
    Path("pictures").mkdir()
    for name in ("b.PNG", "a.png", ".hidden.png", "notes.txt"):
        shutil.copy("a.png", Path("pictures", name))
    assert [(row.number, row.image) for row in read_manifest(Path("pictures"), {})] == [(1, "a.png"), (2, "b.PNG")]
    shutil.copy("rows.csv", "pictures/manifest.csv")
    assert read_manifest(Path("pictures"), {"source": "s"}) == same


def test_a_folder_says_what_it_leaves_out_and_finds_masks(here, recwarn):
    """NAME_mask beside NAME is its mask, an odd one a picture; with a folder of masks all are pictures."""
    for name in ("pictures/old", "masks"):
        Path(name).mkdir(parents=True)
    for name in ("a.png", "b.png", "a_mask.png", "face_mask.png"):
        shutil.copy("a.png", Path("pictures", name))
    picture(3).save("pictures/c.bmp")
    Path("pictures/notes.txt").write_text("x")
    shutil.copy("m.png", "masks/b.png")
    shutil.copy("m.png", "masks/c_mask.png")

    def rows(*options):
        return {row.image: row.own.get("mask") for row in read_manifest(Path("pictures"), *options)}

    assert rows({}) == {"a.png": "a_mask.png", "b.png": None, "c.bmp": None, "face_mask.png": None}
    (said,) = (str(one.message) for one in recwarn)
    assert "2 left out" in said and "notes.txt" in said and "old/" in said
    masks = Path("masks").absolute()
    found = rows({}, Path("masks"))
    assert (found["b.png"], found["c.bmp"], found["a.png"]) == (masks / "b.png", masks / "c_mask.png", None)
    assert "a_mask.png" in found and any("3 of 5 pictures have no mask" in str(one.message) for one in recwarn)
    recwarn.clear()
    assert set(rows({"method": "masactrl"}).values()) == {None}
    assert any("3 left out" in str(one.message) and "a_mask.png" in str(one.message) for one in recwarn)
    with pytest.raises(ValueError, match="folder of pictures"):
        read_manifest(Path("m.jsonl"), {}, Path("masks"))


def test_a_picture_has_one_mask(here):
    Path("pictures").mkdir()
    for name in ("a.png", "a_mask.png"):
        shutil.copy("m.png", Path("pictures", name))
    shutil.copy("a.png", "pictures/b.jfif")
    same = [
        (row.image, row.own.get("mask")) for row in read_manifest(Path("pictures"), {}, Path("pictures/../pictures"))
    ]
    assert same == [("a.png", "a_mask.png"), ("b.jfif", None)]
    shutil.copy("m.png", "pictures/a_mask.webp")
    with pytest.raises(ValueError, match=r"a_mask\.png and a_mask\.webp are both masks of the picture a"):
        read_manifest(Path("pictures"), {})


def test_masks_beside_pictures_are_their_masks(here, folder, capsys):
    Path("pictures").mkdir()
    shutil.copy("a.png", "pictures/a.png")
    shutil.copy("m.png", "pictures/a_mask.png")
    assert ran(capsys, folder, "--target", "a zebra", manifest="pictures")["made"] == 1
    (record,) = table("out/results.jsonl")
    assert record["verdict"] == "given" and len(record["settings"]["mask"]) == 10
    Path("masks").mkdir()
    shutil.copy("m.png", "masks/a.png")
    assert ran(capsys, folder, "--target", "a zebra", "--masks", "masks", manifest="pictures", out="two")["made"] == 2


def test_a_text_that_a_method_does_not_take_is_left_out_with_a_word(here, folder, capsys):
    """As eval and sheet do: a column of captions serves the methods that read it. Other columns are refused."""
    jsonl("m.jsonl", [{"image": "a.png", "method": "sdedit", "target": "t", "source": "s"}])
    assert ran(capsys, folder)["made"] == 1
    (record,) = table("out/results.jsonl")
    assert record["warnings"] == ["sdedit takes no source: left out"] and "source" not in record["settings"]
    jsonl("m.jsonl", [{"image": "a.png", "target": "t", "source": "s", "mask": "m.png"}])
    assert ran(capsys, folder, out="two")["made"] == 1
    (record,) = table("two/results.jsonl")
    assert record["warnings"] == ["under your own mask nothing depends on maps, source"]
    assert ran(capsys, folder, "--mask-threshold", "0.3", out="three")["made"] == 1  # a value for all rows, too
    (record,) = table("three/results.jsonl")
    assert record["warnings"] == ["under your own mask nothing depends on maps, mask_threshold, source"]


def test_an_erased_part_is_the_rows_mask(here, folder, capsys):
    erased = picture(0).convert("RGBA")
    erased.paste((0, 0, 0, 0), (16, 8, 40, 32))
    erased.save("a.png")
    jsonl("m.jsonl", [{"image": "a.png", "method": "user-mask", "target": "t"}])
    assert ran(capsys, folder)["made"] == 1
    (record,) = table("out/results.jsonl")
    assert record["verdict"] == "given" and any("erased" in one for one in record["warnings"])


def test_a_folder_of_pictures_and_options_for_all(here, folder, capsys):
    Path("pictures").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(name, "pictures")
    options = ["--target", "a zebra", "--mask", "m.png", "--mask-clip", "none", "--seed", "3"]
    done = ran(capsys, folder, *options, manifest="pictures")
    settings = [record["settings"] for record in table("out/results.jsonl")]
    assert done["made"] == 2 and all(
        s["mask_clip"] is None and s["seed"] == 3 and len(s["mask"]) == 10 for s in settings
    )
    done = ran(capsys, folder, manifest="pictures", out="none", code=1)
    assert done["errors"][0]["error"].startswith("diffedit needs target (target: what the result shall show)")
    assert "an input" in failed(capsys, "--target", "t", manifest="pictures", out="pictures")


@pytest.mark.parametrize("content, word", [
    (b"", "no rows"), (b"\n \n", "no rows"), (b"{", "row 1"), (b'{"image": "a.png", "target": "t"}\n[1]', "row 2"),
    (b'{"image": "a.png", "prompt": "t"}', "there are image, output, method"), (b'{"target": "t"}', "column image"),
    (b'{"image": "a.png", "image": "b.png"}', "twice"), (b'{"image": "a.png", "seed": 1, "seed": 1}', "twice"),
    (b'{"image": "a.png", "mask-clip": 1, "mask_clip": 1}', "twice"), (b"\xff\xfe", "utf-8"),
    (b"[" * 99999, "row 1"), (b'{"image": "' + b"a" * (1 << 20) + b'"}', "longer than"),
    (b'{"image": "a.png", "seed": ' + b"9" * 5000 + b"}", "row 1"),
], ids=range(13))  # fmt: skip
def test_what_is_no_jsonl_manifest_is_refused(here, capsys, content, word):
    Path("m.jsonl").write_bytes(content)
    assert word in failed(capsys) and not Path("out").exists()


@pytest.mark.parametrize("content, word", [
    (b"", "no rows"), (b"image,target\n", "no rows"), (b"image,tarket\na.png,t\n", "did you mean 'target'"),
    (b"image,image\na,b\n", "twice"), (b"image,target\na.png\n", "2 cells"), (b"image,target\na.png,t,u\n", "row 1"),
    (b'image,target\na.png,"t\n', "row 1"), (b"image,target\na.png," + b"t" * 140000, "row 1"),
    (b"image\tt\na\tt\n", "unknown column"), (b"image,target\na\x00.png,t\n", ""),
], ids=range(10))  # fmt: skip
def test_what_is_no_csv_manifest_is_refused(here, capsys, content, word):
    Path("m.csv").write_bytes(content)
    if word:
        assert word in failed(capsys, manifest="m.csv") and not Path("out").exists()
    else:  # newer Pythons read NUL; then the row fails
        assert cli.main(["batch", "m.csv", "-o", "out", "--model", "no-such-model"]) == 1


def test_what_is_no_manifest_is_refused(here, capsys):
    Path("a.txt").write_text("x")
    assert ".jsonl file" in failed(capsys, manifest="a.txt") and "no such" in failed(capsys, manifest="none.jsonl")
    os.mkfifo("pipe.jsonl")
    assert "regular" in failed(capsys, manifest="pipe.jsonl")
    Path("empty").mkdir()
    assert "no pictures" in failed(capsys, "--target", "t", manifest="empty")
    shutil.copy("m.jsonl", "empty/manifest.jsonl")
    shutil.copy("m.jsonl", "empty/manifest.csv")
    assert "name one of them" in failed(capsys, manifest="empty")
    Path("file").write_text("x")
    Path("loop").symlink_to("loop")
    assert "is a file" in failed(capsys, out="file") and "is a file" in failed(capsys, out="loop")
    assert "an input" in failed(capsys, out=".")
    assert "an input" in failed(capsys, out="../" + here.name)


BAD = [
    ({"target": None}, "needs target"), ({"target": 5}, "target must be text"), ({"target": "\ud800"}, "UTF-8"),
    ({"image": "none.png"}, "no such file"), ({"image": "cut.png"}, "cut"), ({"image": "."}, "not a regular file"),
    ({"image": "../out.png"}, "leads out"), ({"image": "/etc/passwd"}, "leads out"), ({"image": 3}, "must be a path"),
    ({"image": "x/../../a.png"}, "leads out"), ({"image": "a\0.png"}, "must be a path"), ({"image": "pipe"}, "regular"),
    ({"mask": "../m.png"}, "leads out"), ({"mask": "b.txt"}, "no such"), ({"mask": "small.png"}, "mask is 9 x 9"),
    ({"union": 5}, "must be a path"), ({"strength": 2}, "strength"), ({"strength": "x"}, "strength"),
    ({"steps": 0}, "steps"), ({"steps": 1.5}, "steps"), ({"steps": True}, "steps"), ({"seed": -1}, "seed"),
    ({"mask_threshold": float("nan")}, "mask_threshold"), ({"mask_clip": "x"}, "mask_clip"), ({"size": 9}, "size"),
    ({"paste": "maybe"}, "paste must be true or false"), ({"largest": 1}, "largest"), ({"dilate": "x"}, "dilate"),
    ({"encode_text": "x"}, "encode_text"), ({"chunk": 0}, "chunk"), ({"guidance_scale": [1]}, "guidance_scale"),
    ({"output": "../x.png"}, "plain file name"), ({"output": "/x.png"}, "plain"), ({"output": "CON.png"}, "reserved"),
    ({"output": "x.gif"}, "end in"), ({"output": "x"}, "end in"), ({"output": 5}, "plain"), ({"output": ""}, "plain"),
    ({"output": "a\\b.png"}, "plain"), ({"output": "c:x.png"}, "plain"), ({"output": ".x.png"}, "plain"),
    ({"output": "x\n.png"}, "plain"), ({"output": "lpt1.a.png"}, "reserved"), ({"output": "x" * 250 + ".png"}, "long"),
    ({"output": "a-0123456789.png"}, "chosen"), ({"output": "FINE.png"}, "row 1's already"), ({"output": []}, "plain"),
    ({"method": "x"}, "no method 'x'"), ({"method": "difedit"}, "did you mean 'diffedit'"),
    ({"method": 5}, "no method '5'"), ({"method": "sdedit", "maps": 3}, "no option 'maps'"),
    ({"inversion": "x"}, "inversion"),
    ({"method": "sdedit", "inversion": "direct"}, "takes no path"), ({"inversion": []}, "inversion must be one of"),
    ({"edits": [["s", "t"]]}, "no option 'edits'"),
    ({"method": "diffedit-regions", "edits": "t", "target": None}, "edits must be pairs"), ({"eta": 0.5}, "no option"),
    ({"method": "masactrl", "dilate": 1}, "no mask that could be steered"), ({"method": "user-mask"}, "needs mask"),
]  # fmt: skip


def test_bad_rows_fail_alone(here, folder, capsys):
    """Each is recorded with its reason, the others are made, nothing is written elsewhere, and the exit code is 1."""
    Path("work").mkdir()
    for name in ("a.png", "m.png"):
        shutil.copy(name, "work")
    os.chdir("work")
    os.mkfifo("pipe")
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:500])
    Image.new("L", (9, 9)).save("small.png")
    good = {"image": "a.png", "target": "t"}
    jsonl("m.jsonl", [good | {"output": "fine.png"}, *(good | bad for bad, _ in BAD), good | {"seed": 9}])
    before = files(here)
    done = ran(capsys, folder, code=1)
    records = table("out/results.jsonl")
    assert (done["rows"], done["made"], done["failed"]) == (len(BAD) + 2, 2, len(BAD))
    for (bad, word), record in zip(BAD, records[1:-1]):
        assert record["status"] == "failed" and word in record["error"] and "Error:" not in record["error"], (
            bad,
            record,
        )
    assert records[0]["output"] == "fine.png" and records[-1]["status"] == "done"
    made = {name for name in files(here) if name not in before}
    assert made == {f"work/out/{record['output']}" for record in (records[0], records[-1])}
    assert cli.main(["batch", "m.jsonl", "-o", "out", *FAST, "--model", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert "0 made, 2 already there" in out and f"and {len(BAD) - 20} more" in out and "Traceback" not in err


def test_what_prevents_every_row_is_an_error_of_the_run(here, capsys):
    assert "no-such-model" in failed(capsys) and table("out/results.jsonl") == []
    jsonl("m.jsonl", [{"image": "none.png", "target": "t"}])
    assert cli.main(["batch", "m.jsonl", "-o", "out", "--model", "no-such-model"]) == 1  # no row, no model wanted
    assert "1 failed" in capsys.readouterr().out


def test_root_opens_the_folder_that_the_user_names(here, folder, capsys):
    Path("lists").mkdir()
    jsonl("lists/m.jsonl", [{"image": "a.png", "target": "t"}, {"image": str(here / "b.png"), "target": "t"}])
    assert ran(capsys, folder, manifest="lists/m.jsonl", code=1)["failed"] == 2
    assert ran(capsys, folder, "--root", ".", manifest="lists/m.jsonl")["made"] == 2


def test_warnings_go_with_their_row(here, folder, capsys):
    jsonl("m.jsonl", [{"image": "a.png", "target": "t", "source": "t"}, {"image": "a.png", "target": "t", "steps": 3}])
    assert cli.main(["batch", "m.jsonl", "-o", "out", *FAST, "--model", str(folder)]) == 0
    one, two = (record["warnings"] for record in table("out/results.jsonl"))
    assert "nothing to edit" in one[0] and "do not divide" in two[0] and "nothing" not in capsys.readouterr().err


# ---------------------------------------------------------------- names, by what Python knows of paths

PIECES = ["..", ".", "/", "\\", "a", "con", "nul", ":", " ", "C:", "x.png", ".png", "\0", "~", "\u202e", "\ud800"]
NAMES = st.text(max_size=12) | st.lists(st.sampled_from(PIECES), max_size=4).map("".join)


@given(NAMES.map("{}.png".format) | NAMES)
def test_an_accepted_output_is_a_plain_name_everywhere(name):
    try:
        check_output(name)
    except ValueError:
        return
    for kind in (PurePosixPath, PureWindowsPath):
        inside = kind("out") / name
        assert inside.parent == kind("out") and inside.name == name and ".." not in inside.parts
    assert not os.path.isreserved(name) if hasattr(os.path, "isreserved") else not PureWindowsPath(name).is_reserved()


@given(st.lists(st.sampled_from(["..", ".", "/", "a", "b.png", "", "root", "rootx", "~"]), max_size=8))
def test_a_manifest_s_path_stays_in_its_folder(parts):
    root = Path("/data/root")
    try:
        found = within(root, "image", "/".join(parts))
    except ValueError:
        return
    assert root in found.parents or found == root


def test_a_picture_too_large_for_its_format_fails_its_row_alone(here, folder, capsys):
    Image.new("RGB", (16400, 2056)).save("wide.png")
    jsonl(
        "m.jsonl",
        [{"image": "wide.png", "target": "a zebra", "output": "w.webp"}, {"image": "a.png", "target": "a cow"}],
    )
    said = ran(capsys, folder, code=1)
    assert (said["made"], said["failed"]) == (1, 1) and "at most 16383 pixels" in said["errors"][0]["error"]


def test_a_loop_of_links_is_no_manifest(here, capsys):
    (here / "loop.jsonl").symlink_to("loop.jsonl")
    said = failed(capsys, manifest="loop.jsonl", out="results")
    assert "loop.jsonl: no such file" in said and not (here / "results").exists()


def test_the_manifest_is_not_overwritten_by_the_table(here, capsys):
    jsonl("m.jsonl", [{"image": "a.png", "target": "a cow"}])
    (here / "pictures").mkdir()
    for path in here.glob("*.png"):
        path.rename(here / "pictures" / path.name)
    (here / "m.jsonl").rename(here / "results.jsonl")
    before = (here / "results.jsonl").read_bytes()
    said = failed(capsys, "--root", "pictures", manifest="results.jsonl", out=".")
    assert "is the manifest" in said and (here / "results.jsonl").read_bytes() == before


def test_settings_are_left_out_when_asked_for_later(here, folder, capsys):
    jsonl("m.jsonl", [{"image": "a.png", "target": "a cow"}])
    assert ran(capsys, folder)["made"] == 1
    assert ran(capsys, folder, "--no-metadata")["made"] == 1
    (made,) = (here / "out").glob("*.png")
    assert not Image.open(made).info
    assert ran(capsys, folder, "--no-metadata")["already there"] == 1


def test_a_clip_of_0_is_no_clip_of_none(here, folder, capsys):
    jsonl("m.jsonl", [{"image": "a.png", "target": "a cow"}])
    assert "mask_clip" in ran(capsys, folder, "--mask-clip", "0", code=1)["errors"][0]["error"]


def test_where_a_manifest_cannot_be_read_is_told(tmp_path):
    line = b'{"image": "a.png", "target": "a cow"}\n'
    for bad in (line.replace(b"cow", b"c\xf6w"), b'{"image": "' + b"a" * (1 << 20) + b'"}\n'):
        (tmp_path / "m.jsonl").write_bytes(line + bad)
        with pytest.raises(ValueError, match=r"m\.jsonl, row [12]: "):
            read_manifest(tmp_path / "m.jsonl", {})
