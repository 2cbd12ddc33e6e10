"""Who wins: intervals, ranks and advice against cases by hand, what is run and told, PIE-Bench end to end in small."""

import io
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_compare import small  # noqa: F401 (scenes on noise, a model of arithmetic)
from test_evaluate import Eyes, write_pie

from minidiffedit import level_at
from minidiffedit.many.datasets import Item
from minidiffedit.methods.table import SYSTEMS
from minidiffedit.run import blank_plan, edit
from weights import bench as B
from weights import compare as C
from weights import pie as P
from weights import who_wins as W


def rows_of(method, success, near=20.0, kind="swap", **more):
    """A row a scene, by their figures."""
    near = near if isinstance(near, list) else [near] * len(success)
    about = {"seed": 0, "steps": 20, "rows": 40, "paid": 40, "seconds": 2.0, "model": "ours"} | more
    about |= {"kind": kind, "method": method, "background_psnr": 30.0, "background_ssim": 0.9}
    pairs = enumerate(zip(success, near))
    return [about | {"number": number, "success": bool(one), "psnr_true": db} for number, (one, db) in pairs]


# ---------------------------------------------------------------- intervals and ranks


def test_intervals_are_those_of_drawing_scenes():
    """Of two scenes 0 and 1, a quarter of the draws is 0, a half .5, a quarter 1; of ten, by the binomial law."""
    means = B.resamples((2,)) @ np.array([0.0, 1.0])
    assert means[0] == 0.5 and len(means) == 1 + B.RESAMPLES
    assert [np.mean(means[1:] == x) for x in (0, 0.5, 1)] == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert B.interval(np.full(7, 3.25)) == pytest.approx((3.25, 3.25, 3.25))
    # P(at most 1 of 10) = .011, P(at most 2) = .055: the 2.5 % point of ten scenes, half successes, is 2 of 10.
    assert B.interval(np.repeat([0.0, 1.0], 5)) == pytest.approx((0.5, 0.2, 0.8))


def test_ranks_count_who_is_surely_better_and_ties_share_one():
    best, same, worst = [1] * 10, [1] * 9 + [0], [0] * 9 + [1]
    rows = [*rows_of("a", best), *rows_of("b", same), *rows_of("c", worst), *rows_of("few", [1] * 9)]
    ranks = W.Scenes(rows).ranks("success")
    assert ranks == {"a": 1, "b": 1, "c": 3}  # a's lead over b is one scene of ten, and no scene in a third of draws
    assert [W.ranked(ranks, one) for one in ("a", "b", "c", "few")] == ["1=", "1=", "3", ""]
    assert W.Scenes(rows).ranks("success", ["b", "c"]) == {"b": 1, "c": 2}


def test_differences_are_paired_by_scene():
    """Far apart between scenes, but always .1 better on each: sure only where scenes are paired."""
    values, one = np.linspace(0, 50, 12), np.repeat("swap", 12)
    assert W.surely_above(values + 0.1, values, one) and not W.surely_above(values, values + 0.1, one)
    assert not W.surely_above(np.random.default_rng(0).permutation(values) + 0.1, values, one)
    missing = values.copy()
    missing[:3] = np.nan
    assert not W.surely_above(values + 0.1, missing, one)  # on nine scenes nothing is sure


@pytest.mark.parametrize("seed", range(3))
def test_a_lead_of_three_scenes_of_ten_is_not_sure_wherever_they_are(seed):
    """None of the three is drawn in .7^10 = 2.8 % of all draws, none of four in .6^10 = .6 %."""
    lead, one = np.zeros(10), np.repeat("swap", 10)
    lead[np.random.default_rng(seed).permutation(10)[:3]] = 100
    assert not W.surely_above(lead, 0 * lead, one)
    lead[int(np.flatnonzero(lead == 0)[0])] = 100
    assert W.surely_above(lead, 0 * lead, one)


def test_a_bound_of_0_is_not_above_0():
    """Won once and lost once in each of five kinds: the mean of the difference is 0 in many draws, rounded or not."""
    kinds, apart = np.repeat([*W.KINDS], 10), np.zeros(50)
    apart[::10], apart[1::10] = 100 / 3, -100 / 3
    means = B.resamples((10,) * 5, W.DRAWS) @ apart
    low = np.percentile(means[1:], 2.5)
    assert not W.surely_above(apart - low, 0 * apart, kinds) and W.surely_above(apart - low + 1e-6, 0 * apart, kinds)


def test_kinds_are_drawn_from_each_by_itself():
    """Always the same within a kind, far apart between kinds: the mean over all is certain, with as many of each."""
    rows = [*rows_of("a", [1] * 10, 30.0), *rows_of("a", [0] * 5, 10.0, kind="add")]
    for row in rows[10:]:
        row["number"] += 10
    scenes = W.Scenes(rows)
    assert scenes.kinds.tolist() == 5 * ["add"] + 10 * ["swap"] and scenes.numbers == [*range(10, 15), *range(10)]
    assert scenes.mean("a", "success") == pytest.approx((200 / 3, 200 / 3, 200 / 3))
    low, high = W.interval(scenes.at("a", "success"))[1:]
    assert low < 50 and high > 80
    weights = B.resamples((5, 10), 50)
    assert weights.shape == (51, 15) and np.allclose(weights[:, :5].sum(1), 1 / 3) and (weights[1:] != weights[0]).any()


def test_the_same_edits_by_another_name_are_ranked_once():
    rows = [*rows_of("a", [1, 0] * 5), *rows_of("b", [1, 0] * 5), *rows_of("c", [0, 1] * 5), *rows_of("d", [1, 0] * 4)]
    assert W.twins(rows) == {"b": "a"} and W.twins(rows[10:]) == {}
    few = [row | {"seed": seed} for row in rows[:8] + rows[10:18] for seed in (0, 1)]
    assert W.twins(few) == {}  # eight scenes, sixteen edits
    assert W.twins([row | {"error": "refused"} for row in rows]) == {}
    assert W.twins([row | {"psnr_true": 20.0 + len(row["method"] * (row["method"] == "b"))} for row in rows]) == {}
    learn = [row | {"method": {"a": "dds", "b": "sds"}.get(row["method"], row["method"])} for row in rows]
    told = W.page(learn, "make compare")
    assert "`sds` made the very edits of `dds`" in told
    assert "sds" not in told.split("Left out, as they cost most: ")[1].split(".")[0].split(", ")
    text = W.page(rows, "make compare")
    assert "`b` made the very edits of `a`, which stands for both." in text and "| `b` |" not in text


def test_seeds_are_averaged_and_what_is_infinite_is_counted_as_one_of_255():
    rows = rows_of("a", [1, 0]) + rows_of("a", [0, 0], seed=1_000_000)
    rows[0]["background_psnr"] = None
    scenes = W.Scenes(rows)
    assert scenes.at("a", "success").tolist() == [50, 0] and scenes.count("a") == 2
    assert scenes.at("a", "background_psnr").tolist() == pytest.approx([(30 + 20 * np.log10(255)) / 2, 30])
    assert scenes.mean("a", "iou") is None and scenes.mean("a", "success")[0] == 25
    del rows[1]["background_psnr"]  # a true mask over all of it: there is no background
    assert np.isnan(W.Scenes(rows[:2]).at("a", "background_psnr")).tolist() == [False, True]


# ---------------------------------------------------------------- what is run


def test_every_method_on_plain_weights_runs_once():
    names = W.methods()
    plain = {n for n, s in SYSTEMS.items() if s.edit and s.status == "L1" and s.weights == "base"}
    drags = {"sde-drag", "drag-diffusion", "drag-noise", "dragon-diffusion"}
    assert plain - names.keys() == drags | {"text-to-image", "instructedit", "mfl"}
    assert names["user-mask"] == "true mask" and names["tf-icon"] == "true mask and picture" and names["dds"] == ""
    assert names.keys() >= W.DEAR


def test_tasks_go_scene_by_scene_over_all_kinds_and_cut_runs_are_balanced():
    tasks = W.tasks_of(100, 20, 3, 7)
    main = [t for t in tasks if not W.DEAR & {*t.methods}]
    assert len(main) == 300 and [t.kind for t in main[:10]] == 2 * [*W.KINDS]
    assert len({(t.number, t.kind) for t in main}) == 100 and len({t.seed for t in main}) == 300
    assert all(W.draws(name) for t in main[100:] for name in t.methods) and "replay" in main[99].methods
    dear = [t for t in tasks if t not in main]
    assert [t.number for t in dear] == [*range(7)] and {*dear[0].methods} == W.DEAR
    assert not any(W.DEAR & {*t.methods} for t in W.tasks_of(10, 10, 1, 0))


@pytest.mark.parametrize("method", ["replay", "masactrl", "sdedit", "ledits++"])
def test_what_draws_nothing_has_one_result_for_all_seeds(method):
    model = C.networks()[0]
    asked = {"target": "a zebra", "source": "a horse", "edits": [("a horse", "a zebra")], "steps": 4}
    asked = {name: value for name, value in asked.items() if name in {**blank_plan(method).given, "steps": 0}}
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    one, two = (edit(model, source, method, seed=seed, **asked).latent for seed in (0, 1))
    assert bool((one != two).any()) == W.draws(method)


def test_the_time_is_foretold_by_what_edits_took():
    rows = [*rows_of("a", [1, 1], paid=10, rows=40, seconds=4.0), *rows_of("b", [1], paid=6, rows=6, seconds=3.0)]
    left = [C.Task(5, "swap", 0, ("a", "b"), 20), C.Task(6, "add", 0, ("a", "refused"), 20)]
    assert W.predicted(left, rows) == (10 + 6 + 10, pytest.approx(1 + 3 + 1))
    assert W.clock(59) == "1 min" and W.clock(2 * 3600 + 300) == "2 h 5 min"


# ---------------------------------------------------------------- what is told


def test_the_tables_by_hand():
    rows = [*rows_of("replay", [1] * 10, 22.0), *rows_of("user-mask", [1] * 9 + [0], 18.0, iou=0.5)]
    rows += [*rows_of("sdedit", [0] * 10, 25.0), {"method": "edict", "kind": "swap", "number": 0, "error": "too small"}]
    rows += [row | {"number": 10 + row["number"]} for row in rows_of("dds", [1] * 9, 30.0, kind="add")]
    text = W.page(rows, "make compare")
    lines = text.splitlines()
    assert (
        "| `replay` |  | 100 % [100, 100], 1= | 30.0 dB [30.0, 30.0], 1= | 0.900 | 22.0 dB [22.0, 22.0], 2 |  " in text
    )
    assert "| `user-mask` | true mask | 90 % [70, 100], 1= |" in text and "| 0.50 | 40 | 2.0 | 10 |" in text
    assert "| `sdedit` |  | 0 % [0, 0], 3 |" in text and "| 25.0 dB [25.0, 25.0], 1 |" in text
    assert (
        "| `replay` | 100 %, 1=, 22.0 dB, 30.0 dB |  |  |  |  |" in lines
        and "| `dds` |  | 100 %, 30.0 dB, 30.0 dB |  |  |  |" in lines
    )
    assert "| swap | `replay` 100 % (of 1 tied at success); cheapest `replay` | `user-mask` 90 % (of 1 tied" in text
    assert "| place | too few scenes | too few scenes |" in lines and "`edict` refused 1 edits: too small" in lines
    assert "On 9 scenes, one seed, as they cost most: dds." in lines and "cds" in text
    assert lines[-1].startswith("*(`make compare`, 2") and "10 swap, 9 add, 0 remove" in lines[-1]


def test_advice_is_the_nearest_and_the_cheapest_of_those_tied():
    rows = [*rows_of("a", [1] * 10, [20.0] * 10), *rows_of("b", [1] * 9 + [0], [24.0] * 5 + [25.0] * 5)]
    rows += [*rows_of("c", [1] * 10, 24.5, rows=9), *rows_of("d", [0] * 10, 40.0, rows=1)]
    assert W.advice(W.Scenes(rows), ["a", "b", "c", "d"]) == (3, ["b", "c"], "c")
    assert W.advice(W.Scenes(rows), ["d"]).nearest == ["d"]
    assert W.advice(W.Scenes(rows, "add"), ["a"]) is None is W.advice(W.Scenes(rows), [])
    more = [
        *rows,
        *rows_of("a", [0] * 20, 20.0),
        *rows_of("b", [0] * 20, 20.0),
    ]  # the others have the easy scenes alone
    assert W.advice(W.Scenes(more), ["a", "b", "c", "d"]) == (2, ["b"], "b")


def command(folder, **options):
    plain = {
        "quick": False,
        "scenes": 2,
        "steps": 3,
        "seeds": 1,
        "dear": None,
        "readme": False,
        "model": str(W.HERE / "mini"),
        "judge": W.FOLDER,
    }
    return SimpleNamespace(**plain | {"workers": 1, "output": folder} | options)


def test_the_command_goes_on_after_a_cut_and_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(W, "fingerprint", lambda *given: "ours")
    monkeypatch.setattr(W, "methods", lambda: {"sdedit": "", "replay": "", "user-mask": "true mask"})
    W.compare(command(tmp_path, scenes=1))
    lines = (tmp_path / "who-wins.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "who-wins.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])
    done, work = [], C.work
    monkeypatch.setattr(C, "work", lambda task, *given: done.append(task) or work(task, *given))
    page = tmp_path / "README.md"
    page.write_text("above\n<!-- who wins -->\nold\n<!-- who wins -->\nbelow\n")
    monkeypatch.setattr(W, "PAGE", page)
    monkeypatch.setattr(W.shutil, "copyfile", lambda *places: None)
    capsys.readouterr()
    W.compare(command(tmp_path, readme=True))
    assert [(task.number, task.kind, task.methods) for task in done] == [
        (0, "swap", ("user-mask",)), (1, "add", ("sdedit", "replay", "user-mask"))]  # fmt: skip
    said, text = capsys.readouterr().out, (tmp_path / "who-wins.md").read_text()
    assert "2 scenes, 3 methods, 6 edits" in said and "left: about" in said and text in said
    before, inside, after = page.read_text().split("<!-- who wins -->")
    assert (before, after) == ("above\n", "\nbelow\n") and inside.startswith(f"\n{text}\n![") and W.PLOT in inside
    assert 'COMPARE="--scenes 2 --steps 3 --seeds 1"' in text and str(tmp_path) not in text
    assert Image.open(tmp_path / "who-wins.png").size[0] > 400
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must hold <!-- who wins --> twice"):
        W.write_into(page, text)


# ---------------------------------------------------------------- PIE-Bench


def test_pie_benchs_settings_are_its_harness(tmp_path):
    write_pie(tmp_path, 2)
    own = P.words(tmp_path)
    assert own == P.words(tmp_path / "data") and [*own.values()] == 2 * [["dog", "cat"]]
    item = P.open_dataset(tmp_path)[0]
    run = P.run_of("null-text+prompt-to-prompt", item, own[item.name], None)
    assert run == {"method": "null-text+prompt-to-prompt", "cross_steps": 0.4, "self_steps": 0.6, "self_levels": 2,
                   "paste": False, "blend": "dog, cat", "reweight": "cat=2"}  # fmt: skip
    masactrl = {"method": "ddim+masactrl", "steps": 5, "paste": False}
    assert P.run_of("ddim+masactrl", item, own[item.name], 5) == masactrl
    for name in P.ROWS:
        settings = blank_plan(name).settings | P.run_of(name, item, own[item.name], None)
        assert settings.get("steps") in (40, 50, 100, None) and settings["paste"] is False
        if P.ROWS[name].published[3]:  # of the harness
            assert settings["steps"] == 50 and settings["guidance_scale"] == 7.5, name
    friendly = blank_plan("edit-friendly+prompt-to-prompt").settings | P.ROWS["edit-friendly+prompt-to-prompt"].options
    assert level_at(friendly["strength"], friendly["steps"]) == 50 - 12


@pytest.mark.parametrize(("source", "target", "pair", "blend", "reweight"), [
    ("a dog and a cat on grass", "a dog on grass", "cat cat", "cat", None),  # as where an object is deleted
    ("a cow on grass", "a cat on grass", "dog cat", "cat", "cat=2"),
    ("a cow on grass", "a cat on grass", "cow dog", "cow", None),
    ("a sports car", "a sports truck", "sports car truck", "sports", None),  # the harness knows two words
    ("a dog, a cat", "a fox, a cat", "dog, fox,", "dog, fox", "fox=2"),
    ("a dog", "a cat", "dog", None, None),
    ("a dog", "a cat", "", None, None),
    ("a dog", "a cat", "cow fox", None, None),
])  # fmt: skip
def test_blended_words_are_found_each_in_its_prompt(tmp_path, source, target, pair, blend, reweight):
    (tmp_path / "mapping_file.json").write_text(json.dumps({"a": {"blended_word": pair}}))
    item = Item("a", tmp_path / "a.jpg", source, target, layout="pie")
    run = P.run_of("direct+prompt-to-prompt", item, P.words(tmp_path)["a"], None)
    assert (run.get("blend"), run.get("reweight")) == (blend, reweight)
    assert P.rows_of(run, item) == 50 + 3 * 50  # a plan takes them


def test_the_published_figures_stand_beside_ones_own():
    metrics = {"structure": 0.0125, "pie_psnr": 26.0, "pie_mse": 0.003, "pie_ssim": 0.85, "clip_target": 25.0}
    done = {"metrics": metrics, "cost": 200, "run": {"blend": "dog"}}
    other = {"metrics": metrics | {"pie_psnr": None}, "cost": 200, "run": {}}
    rows = {"direct+prompt-to-prompt": [done, other, {"error": "no"}]}
    assert P.table(rows | {"sdedit": [{"error": "no"}]}).splitlines()[2:] == [
        "| `direct+prompt-to-prompt` | 12.50 (11.65) | 26.00 (27.22) | (54.55) | 30.00 (32.86) | 85.00 (84.76) | "
        "25.00 (25.02) | (22.10) | 200 | 2, 1 blended |", "| `sdedit` |  |  |  |  |  |  |  |  | 0 |"]  # fmt: skip
    ours = {"metrics": {"ssim_source": 0.7, "clip_target": 25.0}}
    told = P.survey({"ddim+masactrl": [ours, ours | {"metrics": {"ssim_source": 0.5}}, {"error": "no"}]})
    assert "| MasaCtrl (`ddim+masactrl`) | (118.02) | 0.60 (0.51) | 25.00 (24.19) | (21.19) |" in told
    assert "| plug-and-play | (99.23) | (0.47) | (26.27) | (21.73) |" in told


def test_an_edit_is_measured_as_the_last_tile_of_a_jpeg_strip():
    """As the harness keeps it: four pictures of 512 in a row, of which the last is cut out."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    file = io.BytesIO()
    Image.fromarray(np.hstack([*blocks])).save(file, "JPEG")
    last = np.asarray(Image.open(file))[:, -512:]
    alone = np.asarray(P.as_jpeg(Image.fromarray(blocks[-1])))
    np.testing.assert_array_equal(alone[:, 1:], last[:, 1:])  # colours mix across the seam
    assert (alone != blocks[-1]).any()


SOME = ("direct+prompt-to-prompt", "ddim+masactrl", "ledits++", "sdedit")
SOME_ROWS = (
    2 + 3 * 2,
    2 + 4 * 2,
    2 * 2 + 3 * 2,
    2,
)  # of two steps; sdedit begins half-way, ledits++ inverts with guidance


@pytest.mark.slow
@pytest.mark.parametrize("names", [SOME, pytest.param((*P.ROWS,), marks=pytest.mark.long)], ids=["some", "all"])
def test_pie_bench_end_to_end(tmp_path, folder, capsys, monkeypatch, names):
    """Ten pictures, one of each type; a second run edits nothing, also where more is measured; then what goes wrong."""
    write_pie(tmp_path / "set")
    mapping = json.loads((place := tmp_path / "set" / "data" / "mapping_file.json").read_text())
    mapping["000000000003"]["mask"] = [0, 512 * 512]  # all of it: no background
    mapping["000000000004"]["blended_word"] = ""
    place.write_text(json.dumps(mapping))
    options = {"pie": tmp_path / "set", "limit": None, "metrics": ["psnr", "mse"], "steps": 2, "model": str(folder)}
    options["only"] = None if names == (*P.ROWS,) else [*names]
    P.measure(command(tmp_path, **options))
    lines = (tmp_path / "pie" / "edits.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 10 * len(names) and not [row["error"] for row in rows if "error" in row]
    table = capsys.readouterr().out
    ends = [line.endswith(("| 10 |", "| 10, 9 blended |")) for line in table.splitlines()]
    assert sum(ends) == len(names) and "(27.22)" in table
    assert "In 2 steps: no figure" in table and "pixels: no figure here is to be compared" in table
    if names == SOME:
        assert table.splitlines()[0].startswith(f"10 pictures by 4 methods: {10 * sum(SOME_ROWS)} rows of the model")
    one, source = next(row for row in rows if row["item"] == "000000000007"), P.open_dataset(tmp_path / "set")[7]
    (figures,) = (line["figures"] for line in lines_of(tmp_path, "figures") if line["key"] == one["key"]
                  and line["metric"] == "psnr")  # fmt: skip
    edited = P.as_jpeg(Image.open(tmp_path / "pie" / "pictures" / f"{one['key']}.png"))
    apart = np.asarray(edited, float) - np.asarray(Image.open(source.picture).convert("RGB"), float)
    apart[source.truth((512, 512))] = 0  # black in both
    assert figures["pie_psnr"] == pytest.approx(10 * np.log10(255**2 / (apart**2).mean()))
    before = lines_of(tmp_path, "figures")
    assert len(before) == 2 * len(rows)
    P.measure(command(tmp_path, **options))
    assert capsys.readouterr().out == table and lines_of(tmp_path, "figures") == before
    eyes = {"clip": Eyes(), "lpips": lambda a, b: (a - b).abs().mean(), "structure": lambda p: torch.eye(4)}
    monkeypatch.setattr(P, "networks_of", lambda metrics: {name: eyes[name] for name in metrics if name in eyes})
    P.measure(command(tmp_path, **options | {"metrics": ["mse", "ssim", "clip", "lpips", "structure"]}))
    more = capsys.readouterr().out
    assert (tmp_path / "pie" / "edits.jsonl").read_text().splitlines() == lines
    assert len(lines_of(tmp_path, "figures")) == 6 * len(rows)  # mse was there
    cells = next(line for line in more.splitlines() if line.startswith("| `direct+prompt-to-prompt` |")).split("|")[2:9]
    assert cells[1] == " (27.22) " and all(
        re.fullmatch(r" \d+\.\d\d \(\d+\.\d\d\) ", cells[i]) for i in (0, 2, 3, 4, 5, 6)
    )
    (tmp_path / "set" / "data" / "annotation_images" / "0_type" / "000000000000.jpg").unlink()
    with pytest.raises(ValueError, match=f"{len(names)} edits failed"):
        P.measure(command(tmp_path, **options))
    assert "\n\n000000000000, " in capsys.readouterr().out


def lines_of(folder, name):
    return [json.loads(line) for line in (folder / "pie" / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_pie_bench_goes_on_where_something_is_gone(tmp_path, folder, capsys):
    """A row named twice is one; a picture that is gone is made again; lines of something else are refused."""
    write_pie(tmp_path / "set", 2)
    options = {"pie": tmp_path / "set", "limit": 1, "metrics": ["mse", "mse"], "steps": 2, "model": str(folder)}
    options["only"] = ["ddim+masactrl", "ddim+masactrl"]
    P.measure(command(tmp_path, **options))
    ((row,), (figures,)) = lines_of(tmp_path, "edits"), lines_of(tmp_path, "figures")
    picture = tmp_path / "pie" / "pictures" / f"{row['key']}.png"
    made = picture.read_bytes()
    picture.unlink()
    P.measure(command(tmp_path, **options | {"metrics": ["ssim"]}))
    assert picture.read_bytes() == made and [line["key"] for line in lines_of(tmp_path, "edits")] == 2 * [row["key"]]
    assert [line["metric"] for line in lines_of(tmp_path, "figures")] == ["mse", "ssim"]
    (tmp_path / "pie" / "figures.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(ValueError, match="holds lines that are no figures"):
        P.measure(command(tmp_path, **options))
    assert "`ddim+masactrl`" in capsys.readouterr().out and figures["key"] == row["key"]


def test_the_structure_distance_sees_what_the_harness_shows(monkeypatch):
    """Shrunk without a filter, 0 to 255 under the norm of 0 to 1: by hand on a picture of which every second cell of
    four pixels counts.
    """
    seen = {}
    monkeypatch.setattr(P, "load_dino", lambda **options: seen.update(options) or "network")
    monkeypatch.setattr(P, "load_networks", lambda names, device: {name: device for name in names})
    assert P.networks_of(["mse", "structure"])["structure"] == "network" and seen["prepare"] is P.for_dino
    pixels = np.random.default_rng(0).integers(0, 256, (448, 896, 3), dtype=np.uint8)
    found = P.for_dino(Image.fromarray(pixels))  # 896 / 448: bilinear between the middle two of each two
    means = pixels.astype(float).reshape(224, 2, 448, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    mean, spread = (np.array(one)[:, None, None] for one in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    np.testing.assert_allclose(found[0], (means - mean) / spread, atol=1e-2)
    assert found.shape == (1, 3, 224, 448)
    fine = np.zeros((896, 896, 3), np.uint8)
    fine[1::4, 1::4] = 255  # a filter would see it everywhere, two pixels of four do not
    assert P.for_dino(Image.fromarray(fine))[0, 0].max() == pytest.approx((255 / 4 - 0.485) / 0.229, rel=1e-4)
    assert P.for_dino(Image.new("RGB", (300, 900))).shape == (1, 3, 480, 160)


def test_what_is_not_pie_bench_is_refused(tmp_path, capsys, monkeypatch):
    shutil.copytree(B.Path(B.__file__).parent / "mini" / "scenes" / "horse-zebra", tmp_path / "s" / "a")
    (tmp_path / "s" / "scenes.json").write_text(json.dumps([{"folder": "a", "source": "x", "target": "y"}]))
    write_pie(tmp_path / "p", 1)
    for name, more, said in (
        ("s", [], "is a data set, but not PIE-Bench"), ("none", [], "is no data set"),
        ("p", ["--workers", "3", "--judge", "j"], "--workers, --judge goes without --pie"),
        ("p", ["--scenes", "3"], "--scenes goes without --pie"),
    ):  # fmt: skip
        monkeypatch.setattr("sys.argv", ["who_wins", "--pie", str(tmp_path / name), "-o", str(tmp_path / "o"), *more])
        with pytest.raises(SystemExit, match="1"):
            W.main()
        err = capsys.readouterr().err
        assert err.startswith("error: ") and said in err and err.count("\n") == 1
