"""Data sets and their evaluation: three layouts, every field of a summary by hand, what is done again and what not."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidiffedit import StableDiffusion, cli
from minidiffedit.many import evaluate as E
from minidiffedit.many.datasets import PIE_KINDS, Item, open_dataset, pie_mask
from minidiffedit.run import edit

ROOT = Path(__file__).parents[1]
MINI = ROOT / "weights" / "mini"
FAST = ["--steps", "4", "--maps", "2"]
RUN = {"method": "diffedit", "strength": 0.5, "steps": 4, "maps": 2, "paste": True}
SHORT = {"strength": [0.5], "steps": [4]}
ENCODE = {"method": "encode-only", "strength": 0.5, "steps": 4}


# ---------------------------------------------------------------- data sets to evaluate


def rectangle(left, top, right, bottom):
    """PIE-Bench's runs of a rectangle, one per row of pixels, and the same as (512, 512) bool with the border set."""
    runs = [n for y in range(top, bottom) for n in (y * 512 + left, right - left)]
    mask = np.zeros((512, 512), bool)
    mask[top:bottom, left:right] = True
    mask[0] = mask[511] = True
    mask[:, 0] = mask[:, 511] = True
    return runs, mask


def write_pie(folder, kinds=10):
    """Pictures in PIE-Bench's layout, one of each editing type; names -> true masks."""
    places = ("a grass field", "the snow", "a brick road", "a sandy beach", "a wooden table")
    scenes = sorted(path for path in (MINI / "scenes").iterdir() if path.is_dir())
    mapping, masks = {}, {}
    for kind in range(kinds):
        name = f"{kind:012d}"
        path = f"{kind}_type/{name}.jpg"
        (folder / "data" / "annotation_images" / f"{kind}_type").mkdir(parents=True)
        picture = Image.open(scenes[kind] / "source.png").convert("RGB").resize((512, 512))
        picture.save(folder / "data" / "annotation_images" / path, quality=80)
        runs, masks[name] = rectangle(100 + 20 * kind, 60 + 10 * kind, 300 + 20 * kind, 260 + 10 * kind)
        mapping[name] = {
            "image_path": path, "original_prompt": f"a photo of a [dog] on {places[kind % 5]}",
            "editing_prompt": f"a photo of a [cat] on {places[kind % 5]}", "editing_instruction": "Change it",
            "editing_type_id": str(kind), "blended_word": "dog cat", "mask": runs,
        }  # fmt: skip
    (folder / "data" / "mapping_file.json").write_text(json.dumps(mapping))
    return masks


def write_csv(folder, count=2):
    """`count` small pictures with masks and true edits."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        for name in ("picture", "true"):
            Image.fromarray(rng.integers(0, 256, (64, 72, 3), dtype=np.uint8)).save(folder / f"{name}{i}.png")
        mask = np.zeros((64, 72), np.uint8)
        mask[8:40, 16:56] = 255
        Image.fromarray(mask).save(folder / f"mask{i}.png")
        rows.append({"image": f"picture{i}.png", "source": "a horse", "target": "a zebra", "mask": f"mask{i}.png",
                     "true_edit": f"true{i}.png", "kind": "swap", "name": f"edit {i}"})  # fmt: skip
    with (folder / "set.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return folder / "set.csv"


@pytest.fixture
def small(tmp_path):
    return open_dataset(write_csv(tmp_path))


# ---------------------------------------------------------------- reading the layouts


def test_pie_bench_is_read_as_its_authors_read_it(tmp_path):
    masks = write_pie(tmp_path)
    items = open_dataset(tmp_path)
    assert items == open_dataset(tmp_path / "data")
    assert [item.name for item in items] == list(masks)
    assert items[3].source == "a photo of a dog on a sandy beach"  # the brackets are gone
    assert items[3].target == "a photo of a cat on a sandy beach"
    assert [item.kind for item in items] == [f"{i} {kind}" for i, kind in enumerate(PIE_KINDS)]
    for item in items:
        assert np.array_equal(item.truth((512, 512)), masks[item.name])
    with pytest.raises(ValueError, match="512 x 512, the picture 500 x 512"):
        items[0].truth((500, 512))


def test_pie_masks_run_over_rows_and_end_with_the_picture():
    mask = pie_mask((512 * 10 + 500, 20, 512 * 512 - 3, 100))
    assert mask[10, 500:].all() and mask[11, :8].all() and not mask[11, 8:511].any() and not mask[10, 1:500].any()
    assert mask.sum() == 4 * 511 + 11 + 7  # the border, and what of the run lies within it


def test_scenes_and_csv_are_read(tmp_path):
    scenes = open_dataset(MINI / "scenes")
    assert len(scenes) >= 8 and {item.kind for item in scenes} >= {"swap", "remove"}
    assert all(item.truth((192, 192)).any() and item.true_edit.is_file() for item in scenes)
    items = open_dataset(write_csv(tmp_path))
    assert items[1] == Item("edit 1", tmp_path / "picture1.png", "a horse", "a zebra", "swap", tmp_path / "mask1.png",
                            tmp_path / "true1.png")  # fmt: skip
    (tmp_path / "bare.csv").write_text("target,image\na zebra,picture0.png\n")
    assert open_dataset(tmp_path / "bare.csv") == [
        Item("picture0.png: a zebra", tmp_path / "picture0.png", "", "a zebra")
    ]


def test_a_jpegs_noise_may_not_change(tmp_path):
    """Nor are labels of small numbers nothing."""
    for low, high, name in ((3, 250, "m.jpg"), (0, 2, "m.png"), (0, 0, "empty.png")):
        mask = Image.new("L", (64, 64), low)
        mask.paste(high, (16, 16, 48, 48))
        mask.save(tmp_path / name, quality=95)
        assert Item("x", tmp_path / "p.png", "", "", mask=tmp_path / name).truth((64, 64)).sum() == 32 * 32 * (high > 0)


@pytest.mark.parametrize(("content", "complaint"), [
    ("[]", "must hold a JSON object"), ("{", "no JSON text"), ("[" * 100_000, "no JSON text"),
    ({"editing_prompt": "\ud800"}, "no JSON text"), ("{}", "asks for no edit"),
    ({"mask": [5]}, "edit 1: mask must be pairs"), ({"mask": [0, -1]}, "mask must be pairs"),
    ({"mask": "0 1"}, "pairs"), ({"mask": [0, True]}, "pairs"), ({"editing_type_id": "10"}, "'0' to '9', got '10'"),
    ({"editing_prompt": None}, "editing_prompt must be text"), ({"image_path": ...}, "edit 1: it has no 'image_path'"),
])  # fmt: skip
def test_broken_pie_files_are_refused_by_their_place(tmp_path, content, complaint):
    write_pie(tmp_path, 1)
    file = tmp_path / "data" / "mapping_file.json"
    if isinstance(content, dict):
        mapping = json.loads(file.read_text())
        first = next(iter(mapping))
        mapping[first] = {k: v for k, v in (mapping[first] | content).items() if v is not ...}
        content = json.dumps(mapping)
    file.write_text(content)
    with pytest.raises(ValueError, match="mapping_file.json.*" + complaint):
        open_dataset(tmp_path)


@pytest.mark.parametrize(("text", "complaint"), [
    ("image,source\na.png,b\n", "columns image and target"), ("image,target\n", "asks for no edit"),
    ("image,target\n,x\n", "edit 1: image and target must not be empty"),
    ("image,target\na.png,x\na.png,x\n", "two edits are named"),
    ('image,target\na,"x\n', "row 1: .*CSV in UTF-8 is wanted"),
    ("image,target\na.png,a zebra, on a beach\n", "row 1: 2 cells"), ("image,target\na.png\n", "row 1: 2 cells"),
    ("image,target,target\na.png,x,y\n", "a name stands twice"),
])  # fmt: skip
def test_broken_csv_files_are_refused(tmp_path, text, complaint):
    (tmp_path / "set.csv").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        open_dataset(tmp_path / "set.csv")
    (tmp_path / "set.csv").write_bytes(b"image,target\n\xff,b\n")
    with pytest.raises(ValueError, match="UTF-8"):
        open_dataset(tmp_path / "set.csv")


def test_what_is_no_data_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no data set"):
        open_dataset(tmp_path)
    with pytest.raises((ValueError, OSError)):
        open_dataset(tmp_path / "missing.csv")


# ---------------------------------------------------------------- the measures of one edit


def test_measures_by_hand():
    source = np.zeros((40, 40, 3), np.uint8)
    edited, true = source.copy(), source.copy()
    edited[:20] = 100  # the upper half is masked
    edited[30:, :, 0] = 30  # a quarter of the pixels, outside the mask, in one of three channels
    true[:] = 50
    mask = np.zeros((40, 40), bool)
    mask[:20] = True
    found = E.measures(("psnr", "mse"), edited, source, mask=mask, true_edit=true, pie=True)
    everywhere, outside = (100**2 / 2 + 30**2 / 12), 30**2 / 6
    assert found["mse_source"] == pytest.approx(everywhere) and found["background_mse"] == pytest.approx(outside)
    assert found["mse_true"] == pytest.approx(50**2 * 11 / 12 + 20**2 / 12)
    assert found["pie_mse"] == pytest.approx(30**2 / 12 / 255**2)  # black inside the mask, over all pixels
    for name, error in (("psnr_source", everywhere), ("background_psnr", outside), ("pie_psnr", outside / 2)):
        assert found[name] == pytest.approx(10 * np.log10(255**2 / error))
    assert set(found) == {f"{n}_{m}" if m != "background" else f"{m}_{n}" for n in ("psnr", "mse")
                          for m in ("source", "true", "background")} | {"pie_psnr", "pie_mse"}  # fmt: skip


def test_what_is_infinite_or_undefined_is_none():
    picture, full = np.zeros((20, 20, 3), np.uint8), np.ones((20, 20), bool)
    found = E.measures(("psnr", "mse", "ssim"), picture, picture, mask=full)
    assert found == {"psnr_source": None, "mse_source": 0.0, "ssim_source": pytest.approx(1)}


class Eyes:
    """A stand-in for CLIP: a picture is its mean colour, a text the colour it names."""

    def pictures(self, pictures):
        return torch.tensor(np.array([np.asarray(p, np.float64).mean(axis=(0, 1)) for p in pictures]))

    def texts(self, texts):
        return torch.tensor([[float(name in text) for name in ("red", "green", "blue")] for text in texts])


def test_networks_see_the_right_pictures_and_texts():
    red, green = (np.zeros((20, 20, 3), np.uint8) for _ in range(2))
    red[..., 0], green[..., 1] = 200, 200
    mask = np.zeros((20, 20), bool)
    mask[:, :10] = True
    seen = []

    def distance(x, y):
        seen.append((x, y))
        return float((x - y).abs().mean())

    keys = lambda picture: torch.tensor(np.asarray(picture, float).reshape(-1, 3))  # noqa: E731
    networks = {"clip": Eyes(), "lpips": distance, "structure": keys}
    found = E.measures(("clip", "lpips", "structure"), green, red, mask=mask, true_edit=green, texts=("red", "green"),
                       networks=networks)  # fmt: skip
    assert found["clip_source"] == found["clip_target"] == found["clip_edited"] == pytest.approx(100)
    assert found["clip_direction"] == pytest.approx(1)
    assert found["lpips_source"] == pytest.approx(2 * found["background_lpips"], rel=1e-5) and found["lpips_true"] == 0
    assert found["structure"] == pytest.approx(0)  # one colour each: all pixels alike in both
    assert "background_lpips" in found and len(seen) == 3


# ---------------------------------------------------------------- runs


def test_means_are_over_what_is_finite():
    found = E.means([{"a": 1.0, "b": None}, {"a": None}, {"a": 4.0}])
    assert found == {"a": {"mean": 2.5, "n": 2}, "b": {"mean": None, "n": 0}}


def test_grid_has_every_combination_once_and_leaves_out_what_a_method_lacks():
    options = {"strength": [0.5, 0.8], "mask_threshold": [0.3, 0.5], "guidance_scale": [7.5]}
    runs = E.grid(["diffedit", "sdedit", "reconstruction", "masactrl"], options)
    assert len(runs) == 4 + 2 + 2 + 2 and {"method": "reconstruction", "strength": 0.5} in runs
    assert runs[0] == {"method": "diffedit", "strength": 0.5, "mask_threshold": 0.3, "guidance_scale": 7.5}
    assert {"method": "sdedit", "strength": 0.8, "guidance_scale": 7.5} in runs
    names = ["encode-only", "ddim+encode-only", "direct+encode-only"]  # the first two are one
    assert E.grid(names, {"strength": [0.5, 0.5]}) == [
        {"method": "encode-only", "strength": 0.5}, {"method": "direct+encode-only", "strength": 0.5},
    ]  # fmt: skip
    assert E.name_of(runs[0], runs) == "diffedit strength 0.5 mask_threshold 0.3"
    assert E.name_of(runs[-1], runs[-1:]) == "masactrl"


@pytest.mark.parametrize(("methods", "options", "complaint"), [
    (["difedit"], {}, "did you mean 'diffedit'"), (["direct+sdedit"], {}, "takes no path"), (["x+replay"], {}, "'x'"),
    (["sdedit", "replay"], {"maps": [3]}, "none of sdedit, replay has an option 'maps'"),
    (["sdedit"], {"eta": [0.5, 2]}, "eta must be a number from 0"),
    (["sde-drag"], {}, "drag needs points, which a data set does not have"),
])  # fmt: skip
def test_what_no_edit_would_take_is_refused(methods, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        E.grid(methods, options)


def test_lines_are_the_edits_own_and_share_what_they_can(sd, small, tmp_path):
    inversion = {"method": "direct+replay", "strength": 0.5, "steps": 4}
    runs = [RUN, RUN | {"strength": 1.0}, *E.grid(["sdedit", "user-mask"], SHORT), inversion]
    runs += [{"method": "diffedit-regions", "strength": 0.5, "steps": 4, "maps": 2}]
    rows = E.evaluate(sd, small, runs, tmp_path / "out", metrics=E.PLAIN, save_pictures=True)
    assert len(rows) == 12 and [row["item"] for row in rows] == ["edit 0"] * 6 + ["edit 1"] * 6
    assert len({row["seed"] for row in rows}) == 2 and len({row["key"] for row in rows}) == 12
    for row in rows:
        item, method = small[int(row["item"][-1])], row["run"]["method"]
        given = {"target": item.target, "source": item.source}
        given = {"sdedit": {"target": item.target}, "diffedit-regions": {"edits": [("a horse", "a zebra")]}}.get(
            method, given
        )
        given |= {"mask": item.mask} if method == "user-mask" else {}
        done = edit(sd, item.picture, seed=row["seed"], **row["run"], **given)
        kept = Image.open(tmp_path / "out" / "pictures" / f"{row['key']}.png").convert("RGB")
        assert kept.tobytes() == done.image.tobytes() and row["coverage"] == done.coverage, method
        assert row["metrics"]["mse_true"] == E.mse(kept, Image.open(item.true_edit).convert("RGB"))
        assert ("iou" in row["metrics"]) == (method == "diffedit")
    # mask 4 + encode 2 + decode 4; encode 4 + decode 8, the mask is there; decode 4; decode 4, the encoding is there;
    # encode 2 + decode 4, another function's path; masks 4, decode 4
    assert [row["model_rows"] for row in rows[:6]] == [10, 12, 4, 4, 6, 8]


def test_realism_compares_the_edits_that_were_kept_with_the_sets_pictures(sd, tmp_path):
    items = open_dataset(write_csv(tmp_path, 3))
    items[2].picture.write_bytes(b"")
    rows = E.evaluate(sd, items, [RUN], tmp_path, save_pictures=True)

    def colours(pictures):
        return pictures.double().mean(dim=(2, 3))

    found = E.realism(rows, items[:2], tmp_path, colours)
    made, real = (
        np.array([np.asarray(Image.open(path).convert("RGB")).mean(axis=(0, 1)) for path in paths])
        for paths in ([tmp_path / "pictures" / f"{row['key']}.png" for row in rows[:2]], [i.picture for i in items[:2]])
    )
    apart = ((made.mean(axis=0) - real.mean(axis=0)) ** 2).sum()
    a, b = (np.subtract(*two) / 2**0.5 for two in (made, real))  # of two pictures the covariance has rank 1
    spread = a @ a + b @ b - 2 * abs(a @ b)
    assert found["n"] == 2 and found["fid"] == pytest.approx(apart + spread) and np.isfinite(found["kid"])
    for few, of in ((rows[:1], items), (rows, items[:1]), (rows[2:], items)):  # the last failed
        done = sum("error" not in row for row in few)
        assert E.realism(few, of, tmp_path, colours) == {"fid": None, "kid": None, "n": done}


def test_finished_edits_are_not_made_again(sd, small, tmp_path):
    first = E.evaluate(sd, small, [RUN], tmp_path / "out")
    before = sd.evaluations
    assert E.evaluate(sd, small, [RUN], tmp_path / "out") == first and sd.evaluations == before
    spelled = [RUN | {"guidance_scale": 7.5}]  # a default is the same edit, named or not
    assert [row["run"] for row in E.evaluate(sd, small, spelled, tmp_path / "out")] == spelled * 2
    assert sd.evaluations == before
    wider = [RUN, ENCODE]
    second = E.evaluate(sd, small, wider, tmp_path / "out")
    assert [row for row in second if row["run"] == RUN] == first and sd.evaluations == before + 2 * 6
    for change in ({"seed": 1}, {"metrics": ("psnr",)}, {"identity": {"model_hash": "0"}}):
        made = sd.evaluations
        E.evaluate(sd, small[:1], [RUN], tmp_path / "out", **change)
        assert sd.evaluations > made
    picture = Image.open(small[0].picture)
    picture.putpixel((0, 0), (1, 2, 3))
    picture.save(small[0].picture)
    made = sd.evaluations
    again = E.evaluate(sd, small, [RUN], tmp_path / "out")
    assert sd.evaluations == made + 10 and again[0]["key"] != first[0]["key"] and again[1] == first[1]
    renamed = [replace(item, name=f"new {i}", kind="other") for i, item in enumerate(small)]
    made, named = sd.evaluations, E.evaluate(sd, renamed, [RUN], tmp_path / "out")
    assert sd.evaluations == made and [(row["item"], row["kind"]) for row in named] == [
        ("new 0", "other"),
        ("new 1", "other"),
    ]


def test_a_torn_last_line_is_mended_and_no_other(sd, small, tmp_path):
    file = tmp_path / "edits.jsonl"
    rows = E.evaluate(sd, small, [RUN], tmp_path)
    whole = file.read_bytes()
    for cut in (1, 30, len(whole.splitlines()[1])):
        file.write_bytes(whole[:-cut])
        again = E.evaluate(sd, small, [RUN], tmp_path)
        assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in rows]
        assert len(E.read_rows(file)) == 2
    file.write_bytes(b"torn\n" + whole)
    with pytest.raises(ValueError, match=r"edits.jsonl, line 1"):
        E.evaluate(sd, small, [RUN], tmp_path)
    assert file.read_bytes() == b"torn\n" + whole
    for foreign in (b"my notes\n", b'{"a": 1}\n', b"[" * 100_000 + b"\n"):
        file.write_bytes(foreign)
        with pytest.raises(ValueError, match=r"edits.jsonl"):
            E.evaluate(sd, small, [RUN], tmp_path)
        assert file.read_bytes() == foreign


def test_one_failure_is_written_down_and_tried_again(sd, small, tmp_path):
    good = small[0].picture.read_bytes()
    small[0].picture.write_bytes(good[:100])
    rows = E.evaluate(sd, small, [RUN, ENCODE], tmp_path)
    assert ["error" in row for row in rows] == [True, True, False, False] and "picture0.png" in rows[0]["error"]
    summary = E.summarise(rows, [RUN, ENCODE])
    assert [(one["done"], one["failed"]) for one in summary] == [(1, 1), (1, 1)]
    assert summary[0]["kinds"]["all"]["mse_source"] == {"mean": rows[2]["metrics"]["mse_source"], "n": 1}
    small[0].picture.write_bytes(good)
    assert not any("error" in row for row in E.evaluate(sd, small, [RUN], tmp_path))


def test_a_failure_that_passes_is_made_good(sd, small, tmp_path, monkeypatch):
    """The same content, so the same key: what failed must not count as finished."""

    def fails(*_, **__):
        raise RuntimeError("out of memory\nfor now")

    with monkeypatch.context() as patched:
        patched.setattr(E, "execute", fails)
        rows = E.evaluate(sd, small, [RUN], tmp_path)
    assert [row["error"] for row in rows] == ["RuntimeError: out of memory for now"] * 2
    again = E.evaluate(sd, small, [RUN], tmp_path)
    assert [row["key"] for row in again] == [row["key"] for row in rows] and all("metrics" in row for row in again)
    assert E.evaluate(sd, small, [RUN], tmp_path) == again


def test_masks_of_another_size_and_missing_ones_fail_their_own_edit(sd, tmp_path):
    write_csv(tmp_path)
    Image.new("L", (10, 10)).save(tmp_path / "mask0.png")
    (tmp_path / "bare.csv").write_text("image,target,mask\npicture0.png,a zebra,mask0.png\npicture1.png,a zebra,\n")
    rows = E.evaluate(sd, open_dataset(tmp_path / "bare.csv"), E.grid(["user-mask"], SHORT), tmp_path)
    assert "the mask is 10 x 10, the picture 72 x 64" in rows[0]["error"]
    assert "user-mask needs an item with a mask" in rows[1]["error"]


# ---------------------------------------------------------------- the command


def run_cli(capsys, *argv):
    code = cli.main(["eval", *map(str, argv), "--quiet", "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else err


def by_hand(rows, masks, folder):
    """PIE-Bench's figures of saved pictures, one edit after another, from definitions; no code of the package."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    figures = []
    for row in rows:
        mask = masks[row["item"]]
        (path,) = (folder / "data" / "annotation_images").glob(f"*/{row['item']}.jpg")
        source = np.asarray(Image.open(path).convert("RGB")).astype(np.float64)
        kept = folder / "out" / "pictures" / f"{row['key']}.png"
        edited = np.asarray(Image.open(kept).convert("RGB")).astype(np.float64)
        squares, (black, dark) = (edited - source) ** 2, (np.where(mask[..., None], 0, p) for p in (edited, source))
        _, similarity = structural_similarity(edited, source, channel_axis=2, full=True, **window)
        _, veiled = structural_similarity(black, dark, channel_axis=2, full=True, **window)
        outside = squares[~mask].mean()
        one = {
            "psnr_source": peak_signal_noise_ratio(source, edited, data_range=255), "mse_source": squares.mean(),
            "ssim_source": similarity[5:-5, 5:-5].mean(), "background_mse": outside,
            "background_psnr": 10 * np.log10(255**2 / outside) if outside else None,
            "background_ssim": similarity[~mask].mean(), "pie_mse": squares[~mask].sum() / squares.size / 255**2,
            "pie_psnr": 10 * np.log10(255**2 * squares.size / squares[~mask].sum()) if outside else None,
            "pie_ssim": veiled[5:-5, 5:-5].mean(), "coverage": row["coverage"],
        }  # fmt: skip
        if row["run"]["method"] == "diffedit":
            small = mask.reshape(128, 4, 128, 4).mean(axis=(1, 3)) > 0.5  # the forced border is thinner than that
            truth = small.reshape(16, 8, 16, 8).any(axis=(1, 3))
            one["iou"] = row["metrics"]["iou"]
            found = cells_of(row, folder)
            assert one["iou"] == pytest.approx((found & truth).sum() / (found | truth).sum())
        figures.append(one)
    return figures


def cells_of(row, folder):
    """The mask that an edit of the miniature found, from the library's own edit of the saved source."""
    item = next(item for item in open_dataset(folder) if item.name == row["item"])
    options = {name: value for name, value in row["run"].items() if name != "method"}
    done = edit(by_hand.sd, item.picture, source=item.source, target=item.target, seed=row["seed"], **options)
    return (done.latent_mask[0, 0] > 0).numpy()


@pytest.mark.slow
def test_every_field_of_a_pie_summary_by_hand(tmp_path, capsys):
    masks = write_pie(tmp_path, 2)
    by_hand.sd = StableDiffusion.load(MINI, device="cpu", dtype="float32")
    options = ["--model", MINI, "--methods", "diffedit", "sdedit", *FAST, "--strength", "0.5", "--save-pictures"]
    options += ["--size", "128"]  # a quarter of the picture's, so that the mask shrinks by whole pixels
    code, printed = run_cli(capsys, tmp_path, "-o", tmp_path / "out", *options, "--device", "cpu")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "edits.jsonl").read_text().splitlines()]
    assert code == 0 and printed["runs"] == summary["runs"] and printed["output"] == str(tmp_path / "out")
    assert set(summary) == {"dataset", "items", "edits", "failed", "seed", "metrics", "model", "versions", "runs"}
    assert (summary["dataset"], summary["items"], summary["edits"]) == (tmp_path.name, 2, 4)
    assert (summary["failed"], summary["seed"], summary["metrics"]) == (0, 0, ["psnr", "mse", "ssim", "iou"])
    assert summary["model"]["model"] == "mini" and len(summary["model"]["model_hash"]) == 10
    assert summary["model"]["dtype"] == "float32" and summary["versions"]["torch"] == torch.__version__
    assert [run["name"] for run in summary["runs"]] == ["diffedit", "sdedit"]
    for run, per_edit in zip(summary["runs"], (4 + 2 + 4, 4)):
        own = [row for row in rows if row["run"] == run["run"]]
        assert len(own) == 2 and run["run"]["steps"] == 4 and run["run"]["strength"] == 0.5
        assert (run["done"], run["failed"], run["model_rows"]) == (2, 0, per_edit)
        assert run["seconds"] == pytest.approx(np.mean([row["seconds"] for row in own]))
        assert set(run) == {"name", "run", "done", "failed", "model_rows", "seconds", "kinds"}
        figures = by_hand(own, masks, tmp_path)
        assert set(run["kinds"]) == {"all", *(f"{i} {kind}" for i, kind in enumerate(PIE_KINDS[:2]))}
        for kind, found in run["kinds"].items():
            group = [one for one, row in zip(figures, own) if kind in ("all", row["kind"])]
            assert len(group) == (2 if kind == "all" else 1) and set(found) == set(group[0])
            for name, figure in found.items():
                values = [one[name] for one in group if one[name] is not None]
                assert figure["n"] == len(values), (kind, name)
                assert figure["mean"] == (pytest.approx(np.mean(values), rel=1e-9) if values else None), (kind, name)
    assert Image.open(tmp_path / "out" / "summary.png").size[0] > 400
    assert run_cli(capsys, tmp_path, "-o", tmp_path / "out", *options, "--device", "cpu") == (0, printed)


def test_the_command_says_what_failed_and_exits_1(tmp_path, capsys, folder):
    table = write_csv(tmp_path)
    (tmp_path / "picture1.png").unlink()
    options = [table, "-o", tmp_path / "out", "--model", folder, *FAST, "--strength", "0.5", "1", "--no-plots"]
    code, result = run_cli(capsys, *options)
    assert code == 1 and result["failed"] == 2 and "picture1.png: no such file" in result["errors"][0]["error"]
    assert cli.main(["eval", *map(str, options)]) == 1
    out, _ = capsys.readouterr()
    assert "1 done, 1 failed" in out and "failed: edit 1 (diffedit)" in out


def test_plots_are_drawn_and_traced_by_strength(tmp_path, capsys, folder):
    options = [write_csv(tmp_path), "-o", tmp_path / "out", "--model", folder, *FAST, "--strength", "0.5", "1"]
    code, result = run_cli(capsys, *options, "--methods", "diffedit", "encode-only")
    assert code == 0 and Image.open(tmp_path / "out" / "summary.png").size[0] > 400
    gain, curves = E.trade(result["runs"])
    assert set(curves) == {"diffedit", "encode-only"} and [point[2] for point in curves["encode-only"]] == [0.5, 1.0]
    assert gain == "psnr_true" and curves["encode-only"][0][1] == result["runs"][2]["kinds"]["all"][gain]["mean"]


@pytest.mark.parametrize(("options", "complaint"), [
    (["--metrics", "fid"], "--save-pictures"), (["--limit", "0"], "--limit"), (["--strength", "1.5"], "strength"),
    (["--seed", "-1"], "seed"), (["--mask-threshold", "0.5", "2"], "mask_threshold"),
    (["--encode-text", "x"], "encode_text"), (["-o", "set.csv"], "is no folder"),
])  # fmt: skip
def test_bad_options_are_refused_before_a_model_is_loaded(tmp_path, capsys, monkeypatch, options, complaint):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path)
    assert cli.main(["eval", "set.csv", "--model", "no-such-model", *options]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and complaint in err
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(tmp_path, capsys, folder):
    table = write_csv(tmp_path, 6)
    options = ["--model", str(folder), "--steps", "20", "--maps", "2", "--no-plots", "--quiet"]
    command = [sys.executable, "-m", "minidiffedit", "eval", str(table), "-o", str(tmp_path / "out"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    lines = tmp_path / "out" / "edits.jsonl"
    running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while not lines.exists() or lines.read_bytes().count(b"\n") < 2:
        time.sleep(0.01)
        assert running.poll() is None
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = E.read_rows(lines)
    assert 2 <= len(kept) < 6
    code, result = run_cli(capsys, table, "-o", tmp_path / "out", *options)
    assert code == 0 and E.read_rows(lines)[: len(kept)] == kept and len(E.read_rows(lines)) == 6
    shutil.rmtree(tmp_path / "out")
    _, whole = run_cli(capsys, table, "-o", tmp_path / "out", *options)
    assert whole["runs"][0]["kinds"] == result["runs"][0]["kinds"]
