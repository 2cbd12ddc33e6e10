"""The claims' machinery: groups edit as the library does, intervals and verdicts follow their rule, bounds their maths.

Scenes are stand-ins on the miniature's shipped pictures, so that no font is needed.
"""

import json
import queue
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from stubs import gaussian, latent

from minidiffedit import StableDiffusion, Trajectory, find_mask, levels
from minidiffedit.files.images import to_tensor
from minidiffedit.run import edit
from weights import bench as B
from weights import evidence as V
from weights.judge import Judge
from weights.scenes import SIDE, Scene, Thing

MINI = Path(__file__).parents[1] / "weights" / "mini"
ZEBRA = Thing("a zebra", 0.5, 0.5, 0.5)


def pair_of(number, entry):
    """A Pair on shipped pictures."""
    folder = MINI / "scenes" / entry["folder"]
    mask = np.asarray(Image.open(folder / "mask.png").convert("L")) > 127
    n = SIDE // 8
    cells, none = mask.reshape(n, 8, n, 8).any(axis=(1, 3)), np.zeros((n, n), bool)
    return SimpleNamespace(
        number=number, kind=entry["kind"], source=np.asarray(Image.open(folder / "source.png").convert("RGB")),
        true_edit=np.asarray(Image.open(folder / "target.png").convert("RGB")), mask=mask,
        cells=cells, half=cells, parts={"old": cells, "new": none, "rim": none}, far=~mask,
        before=SimpleNamespace(caption=lambda: entry["source"]),
        after=SimpleNamespace(caption=lambda: entry["target"], things=(ZEBRA,), place="the snow"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def pairs():
    entries = json.loads((MINI / "scenes" / "scenes.json").read_text())
    return [pair_of(7 + i, entry) for i, entry in enumerate(entries[:2])]


@pytest.fixture(scope="module")
def group(pairs):
    return B.Group(StableDiffusion.load(MINI, device="cpu", dtype="float32"), pairs)


class Blind:
    """A judge that sees a zebra in the snow in whatever is dark."""

    def says(self, picture):
        return ({"a zebra"}, "the snow") if picture.mean() < 100 else (set(), "the snow")


# ---------------------------------------------------------------- edits


LOW = {"strength": 0.1}  # five steps: enough to tell settings apart
LONG = partial(pytest.param, marks=pytest.mark.long)
METHODS = {"both": "diffedit", "mask": "mask-only", "encode": "encode-only", "user mask": "user-mask"}


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "options"), [
    (B.Setting(strength=0.2), {"strength": 0.2}), LONG(B.Setting(**LOW), {}),
    (B.Setting("mask", **LOW), {"name": "mask"}), (B.Setting("encode", **LOW), {"name": "encode"}),
    (B.Setting("sdedit", **LOW), {"name": "sdedit"}), (B.Setting("reconstruction", refine=2, **LOW),
     {"name": "reconstruction", "refine": 2}),
    LONG(B.Setting(maps=3, mask_threshold=0.25, **LOW), {"maps": 3, "mask_threshold": 0.25}),
    LONG(B.Setting(mask_strength=0.25, mask_clip=2.0, **LOW), {"mask_strength": 0.25, "mask_clip": 2.0}),
    (B.Setting(reference="", encode_text="source", **LOW), {"encode_text": "source", "reference": ""}),
    LONG(B.Setting(guidance_scale=1.0, **LOW), {"guidance_scale": 1.0}),
], ids=str)  # fmt: skip
def test_a_group_edits_as_the_library_does_one_by_one(group, setting, options):
    options = {"strength": 0.1, "name": "both", "reference": None} | options
    name, reference = options.pop("name"), options.pop("reference")
    rows, latents = list(group.rows(setting, Blind())), group.latents(setting)
    for one, row, y in zip(group.pairs, rows, latents):
        mask = {}
        texts = {"target": one.after.caption(), "source": one.before.caption()}
        texts = {"sdedit": {"target": texts["target"]}, "reconstruction": {"source": texts["source"]}}.get(name, texts)
        if reference == "":  # the method knows one source; the mask of the other is handed in
            x0, two = group.sd.encode(to_tensor(Image.fromarray(one.source), (SIDE, SIDE))), (one.after.caption(), "")
            found = find_mask(group.sd.eps, x0, *(group.sd.text([text]) for text in two), seed=one.number)
            name, mask = "user mask", {"mask": found.mask.float()}
        done = edit(group.sd, Image.fromarray(one.source), METHODS.get(name, name), seed=one.number, paste=False,
                    **texts, **options, **mask)  # fmt: skip
        assert float((done.latent - y).abs().max()) < 1e-3
        assert row["psnr_source"] == pytest.approx(decibels(done.image, one.source), abs=0.05)
        assert row["psnr_true"] == pytest.approx(decibels(done.image, one.true_edit), abs=0.05)
        assert row["drift"] == pytest.approx(float((done.latent - done.x0).square().mean().sqrt()), abs=1e-4)
        assert row["success"] == (np.asarray(done.image).mean() < 100) and row["number"] == one.number
        if name in ("both", "mask", "user mask"):
            assert row["coverage"] == pytest.approx(done.coverage) and 0 < row["iou"] == row["iou_half"] <= 1
        if name == "both":
            assert row["found_old"] == pytest.approx(done.found.mask[0, 0].numpy()[one.cells].mean())
            assert row["found_new"] is None and row["far_psnr"] == pytest.approx(row["background_psnr"])


def decibels(a, b):
    return 10 * np.log10(255**2 / ((np.asarray(a, float) - np.asarray(b, float)) ** 2).mean())


@pytest.mark.slow
def test_true_latents_are_the_edits_inside_and_the_sources_outside(group):
    y = group.latents(B.Setting("true latents"))
    for at, one in zip(y, group.pairs):
        cells = torch.from_numpy(one.cells)
        for picture, where in ((one.true_edit, cells), (one.source, ~cells)):
            off = at - group.sd.encode(to_tensor(Image.fromarray(picture), (SIDE, SIDE)))[0]
            assert off[:, where].abs().max() < 1e-4 < off[:, ~where].abs().max()


@pytest.mark.slow
def test_one_level_off_leaves_noise_outside_the_mask(group):
    right, off = (list(group.rows(B.Setting(blend=blend, **LOW), Blind())) for blend in ("reached", "left"))
    for one, other in zip(right, off):
        assert one["outside_drift"] == 0.0 < other["outside_drift"] and one["iou"] == other["iou"]
    x0, x1 = (group.start(B.Setting(**LOW))[j] for j in (0, 1))
    outside = ~group.mask(B.Setting()).mask[0, 0]
    assert off[0]["outside_drift"] == pytest.approx(B.rms((x1 - x0)[0][:, outside]), rel=1e-4)


@pytest.mark.slow
def test_settings_share_encodings_and_maps(group):
    fresh = B.Group(group.sd, group.pairs)
    before = fresh.sd.evaluations

    def cost(setting):
        nonlocal before
        list(fresh.rows(replace(setting, picture=False), Blind()))
        spent, before = fresh.sd.evaluations - before, fresh.sd.evaluations
        return spent / len(fresh.pairs)

    assert cost(B.Setting(strength=0.2)) == 20 + 10 + 20
    assert cost(B.Setting(strength=0.1)) == 10  # a prefix of that encoding, the same mask
    assert cost(B.Setting(strength=0.1, mask_threshold=0.3, maps=3)) == 10
    assert cost(B.Setting("sdedit", strength=0.1)) == 10
    assert cost(B.Setting("mask alone", mask_threshold=0.2)) == 20  # other noises
    assert cost(B.Setting("mask alone", maps=1)) == 0
    assert cost(B.Setting("round trip")) == 0


@pytest.mark.slow
def test_constants_are_what_proposition_1_asks_for(group):
    found = group.constants(B.Setting("constants", strength=0.1))
    assert all(len(values) == 2 and len(values[0]) == 5 for values in found.values())
    x = group.start(B.Setting(strength=0.1))[5]
    text, null = group.text["target"], group.text[""].expand_as(group.text["target"])
    at_null, at_text = group.sd.eps(x, levels(50).t[5], [null, text])
    assert found["C"][1][0] == pytest.approx(B.rms(at_text[1]), rel=1e-4)
    assert found["K2"][1][0] == pytest.approx(B.rms(at_text[1] - at_null[1]), rel=1e-3)
    assert found["K1"][1][0] == 0  # at the top the edit has not left the encoding yet
    assert all(0 < k < 50 for k in found["K1"][1][1:])


def test_what_is_told_of_thresholds_is_paired_by_scene_over_all_swaps():
    """Rows out of order, both kinds of swap, the IoU always .1 better at .35: a certain difference of means apart."""
    rows = list[dict]()
    for number in range(12):
        kind = ("swap", "swap held out", "add")[number % 3]
        about = {"number": number, "kind": kind, "success": number % 2 == 0, "far_psnr": 30.0, "background_psnr": None}
        about |= {f"found_{part}": 0.5 if kind != "add" else None for part in ("old", "new", "rim")}
        for setting in B.SETTINGS:
            better = 0.1 if setting.mask_threshold == 0.35 else 0.0
            rows.append(about | {"setting": str(setting), "iou": number / 20 + better, "iou_half": 0.3})
    told = B.certain(rows[::-1])
    (line,) = (line for line in told if "threshold 0.35" in line)
    swaps = np.mean([number / 20 for number in range(12) if number % 3 < 2])
    assert line.split(": ")[1].startswith(
        f"the two IoUs {swaps + 0.1:.3f} and 0.300, less the default's +0.100 [+0.100, +"
    )
    assert sum("less the default's" in line for line in told) == len(B.THRESHOLDS) - 1
    assert any(line.startswith("all swaps ") and "success 50.0% [" in line and line.endswith("none") for line in told)
    assert any("50% of old" in line and "30.0 dB, 30.0 dB, 30.0 dB" in line for line in told)


def test_the_level_left_is_the_level_above():
    steps = Trajectory([latent(1, 4, 2, 2, seed=i) for i in range(4)], 10)
    shifted = B.level_left(steps)
    assert [next(j for j in range(4) if torch.equal(shifted[i], steps[j])) for i in range(4)] == [1, 2, 3, 3]


def test_settings_are_named_by_what_they_change():
    assert str(B.Setting()) == "both" and str(B.Setting("mask", strength=0.4)) == "mask, strength 0.4"
    every = [setting for claim in V.CLAIMS for setting in claim.settings.values()]
    assert len({str(setting) for setting in every}) == len(set(every))


# ---------------------------------------------------------------- two processes


class Threads:
    """A multiprocessing context whose processes are threads."""

    class Queue(queue.Queue):
        def cancel_join_thread(self):
            pass

    class Process(threading.Thread):
        exitcode = property(lambda self: None if self.is_alive() else 0)


@pytest.fixture
def crew(monkeypatch, group, tmp_path):
    """`run` with threads, a group that counts, and a judge's file; returns the call."""
    done = []

    class Counting(B.Group):
        def __init__(self, sd, pairs):
            self.pairs = pairs

        def rows(self, s, judge, metrics):
            done.append(str(s))
            for one in self.pairs:
                yield {"number": one.number, "kind": one.kind, "setting": str(s), "iou": 0.5}

    monkeypatch.setattr(B.multiprocessing, "get_context", lambda kind: Threads)
    monkeypatch.setattr(B.multiprocessing, "parent_process", threading.main_thread)
    nothing = SimpleNamespace(unet=torch.nn.ReLU(), vae=torch.nn.ReLU(), side=192)
    monkeypatch.setattr(B.StableDiffusion, "load", lambda *_, **__: nothing)
    monkeypatch.setattr(B, "Group", Counting)
    monkeypatch.setattr(B, "pair", lambda number, kind: SimpleNamespace(number=number, kind=kind))
    monkeypatch.setattr(B.judges, "FOLDER", tmp_path)
    save_file({k: v.half().contiguous() for k, v in Judge().state_dict().items()}, tmp_path / "judge.safetensors")
    return lambda wanted: (done.clear(), B.run(wanted, tmp_path / "rows.jsonl", str(MINI), tmp_path), list(done))[1:]


def test_rows_are_kept_and_only_missing_ones_made(crew, tmp_path):
    numbers = [(i, "swap") for i in range(11)]
    two = [B.Setting(), B.Setting(strength=1.0)]
    rows, done = crew(B.jobs(numbers, two[:1]))
    assert len(rows) == 11 and done == ["both", "both"]  # groups of 8 and 3
    rows, done = crew(B.jobs(numbers, two))
    assert len(rows) == 22 and set(done) == {"both, strength 1.0"}
    assert [row["number"] for row in rows[:2]] == [0, 0] and rows[0]["setting"] == "both, strength 1.0"  # deepest first
    lines = (tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "rows.jsonl").write_bytes(lines[:-20])
    assert crew(B.jobs(numbers, two))[1] and len(crew(B.jobs(numbers, two))[0]) == 22
    assert crew(B.jobs(numbers, two))[1] == []
    save_file({"other": torch.zeros(1)}, tmp_path / "judge.safetensors")
    with pytest.raises(ValueError, match="is no judge"):  # of another judge nothing is taken, and this one is none
        crew(B.jobs(numbers, two))


def test_what_claims_share_is_planned_once():
    claims = [claim for claim in V.CLAIMS if claim.name in ("strength", "threshold", "refine")]
    plan = V.plan(claims, {"strength": 16, "threshold": 24, "refine": 16})
    planned = [(number, str(s)) for numbers, settings in plan for number, _ in numbers for s in settings]
    assert len(planned) == len(set(planned)) == 16 * (5 + 2 + 3) + 8 * 3  # the default belongs to two of them
    assert all(len(numbers) <= B.TOGETHER for numbers, _ in plan)
    assert {number for number, _ in planned} == set(range(V.FIRST, V.FIRST + 24))


# ---------------------------------------------------------------- intervals and verdicts


def means(**columns):
    count = len(next(iter(columns.values())))
    return V.Means({label: [{"x": float(values[i])} for i in range(count)] for label, values in columns.items()})


def test_intervals_are_those_of_a_paired_mean():
    rng = np.random.default_rng(0)
    scene, effect = rng.normal(0, 5, 80), rng.normal(1, 0.5, 80)
    found = V.more("x", "b", "a", "", "").judged(means(a=scene, b=scene + effect))
    spread = 1.96 * effect.std() / 80**0.5  # the scenes' own differences, ten times larger, drop out
    assert found["effect"] == pytest.approx(effect.mean())
    assert (found["low"], found["high"]) == pytest.approx((effect.mean() - spread, effect.mean() + spread), abs=0.02)


@pytest.mark.parametrize(("effect", "margin", "verdict"), [
    (1.0, 0.0, "reproduced"), (-1.0, 0.0, "contradicted"), (0.0, 0.0, "not reproduced"),
    (0.15, 0.0, "not reproduced"), (-0.15, 0.0, "not reproduced"),
    (0.0, -1.0, "reproduced"), (-2.0, -1.0, "contradicted"), (-1.0, -1.0, "not reproduced"),
])  # fmt: skip
def test_the_rule_of_a_contrast(effect, margin, verdict):
    noise = np.random.default_rng(1).normal(0, 1, 60)
    noise -= noise.mean()
    found = V.more("x", "b", "a", "", "", margin).judged(means(a=np.zeros(60), b=effect + noise))
    assert found["verdict"] == verdict
    few = V.more("x", "b", "a", "", "", margin).judged(means(a=np.zeros(9), b=effect + noise[:9] / 1e6))
    assert few["verdict"] == "not reproduced"


def test_the_rule_of_a_claim():
    claim = V.Claim("c", "", {"a": B.Setting("encode"), "b": B.Setting("sdedit"), "c": B.Setting("mask")}, (
        V.more("x", "b", "a", "", ""), V.more("x", "c", "b", "", "")), ())  # fmt: skip

    def verdict(a, b, c):
        noise = np.random.default_rng(2).normal(0, 0.1, 40)
        rows = {(V.FIRST + i, str(s)): {"x": value + noise[i]} for s, value in zip(claim.settings.values(), (a, b, c))
                for i in range(40)}  # fmt: skip
        for s in claim.settings.values():  # a noise of their own, so that no interval is a point
            for i in range(40):
                rows[V.FIRST + i, str(s)]["x"] += 0.1 * np.sin(i * (1 + len(str(s))))
        return V.judge(claim, rows, 40)

    assert verdict(0, 1, 2)["verdict"] == "reproduced"
    assert verdict(0, 1, 1)["verdict"] == "not reproduced"
    assert verdict(0, 1, 0)["verdict"] == "contradicted" and verdict(1, 1, 0)["verdict"] == "contradicted"
    found = verdict(0, 1, 2)
    assert found["edits"] == 120 and found["scenes"] == 40
    assert found["figures"]["b"]["x"]["mean"] == pytest.approx(1, abs=0.05)


def test_the_trade_off_is_the_area_under_its_curve():
    """success = distance / 100 for SDEdit; the others reach the same at half, a quarter, a fifth of the distance."""
    far = {"sdedit": 100.0, "encode": 50.0, "mask": 25.0, "both": 20.0}
    table = {
        V.label(name, s): [{"mse_source": (far[name] * s) ** 2, "success": s}] * 3
        for name in V.ARMS
        for s in V.STRENGTHS
    }
    areas = V.reached(V.Means(table))  # over distances 0..20, where SDEdit has come to .2
    assert [round(float(areas[name][0]), 6) for name in V.ARMS] == [0.1, 0.2, 0.4, 0.5]
    table[V.label("both", 1.0)] = [{"mse_source": 16.0**2, "success": 0.1}] * 3  # falls back: what was reached counts
    areas = V.reached(V.Means(table))
    assert float(areas["both"][0]) == pytest.approx((0.5 * 0.8 * 16) / 16)


def test_slopes_are_least_squares():
    table = {V.label("both", s): [{"success": 2 * s + 1}] * 4 for s in V.STRENGTHS}
    assert V.slope("success")(V.Means(table)) == pytest.approx(2)


def test_every_claim_has_enough_edits_in_the_full_form():
    for claim in V.CLAIMS:
        settings = [s for s in claim.settings.values() if s.arm not in ("mask alone", "constants")]
        assert claim.scenes * len(settings) >= 200, claim.name


# ---------------------------------------------------------------- Proposition 1


def test_the_bounds_in_closed_form():
    s = np.sqrt(1 / np.array(levels(50).a[1:]) - 1)
    strength, sdedit, encoding = V.bounds(0.5, 0.0, 0.3)
    assert np.allclose(strength[1:], np.arange(1, 51) / 50) and sdedit[0] == encoding[0] == 0
    assert np.allclose(sdedit[1:], 1.5 * s) and np.allclose(encoding[1:], 0.3 * s)
    u = np.arcsinh(s)  # with K1 = 1: the integral of e^u cosh u du
    assert np.allclose(V.bounds(0.5, 1.0, 0.3)[2][1:], 0.3 * ((np.exp(2 * u) - 1) / 4 + u / 2), rtol=1e-5)


def test_the_bounds_hold_on_an_exact_predictor():
    """Pictures of N(text, .7^2): eps is linear in x, its constants are known, and the edit has a closed form."""
    from minidiffedit import encode, masked_decode, noises
    from minidiffedit.methods.sdedit import noised

    x0 = 0.7 * latent(1, 4, 8, 8)
    for r in (0.2, 0.6, 1.0):
        trajectory = encode(gaussian, x0, 0.0, strength=r)
        K = max(trajectory)
        a = np.array(levels(50).a)[1 : K + 1]
        slope = np.sqrt(1 - a) / (a * 0.49 + 1 - a)  # d eps / d x
        one = masked_decode(gaussian, trajectory, torch.ones(1, 1, 8, 8), 0.4, 0.0, guidance_scale=1)
        other = masked_decode(
            gaussian, noised(x0, noises((4, 8, 8), 1, 0), steps=50, strength=r), torch.ones(1, 1, 8, 8), 0.4, 0.0,
            guidance_scale=1,
        )  # fmt: skip
        k2 = float((slope * np.sqrt(a) * 0.4).max())
        _, sdedit, encoding = V.bounds(1.0 + k2, float(slope.max()), k2)
        assert B.rms(one - x0) < encoding[K] + 0.02 and B.rms(other - x0) < sdedit[K]
        assert B.rms(one - x0) < B.rms(other - x0)


def test_the_crossing_is_where_the_bounds_meet():
    constants = [{"C": [1.0], "K1": [0.0], "K2": [k2]} for k2 in (0.5, 0.5)]
    assert float(V.crossing(V.Means({"constants": constants}))[0]) == 1.0  # always tighter
    assert float(V.crossing(V.Means({"constants": [c | {"K2": [3.0]} for c in constants]}))[0]) == 0.0  # never
    found = float(V.crossing(V.Means({"constants": [c | {"K1": [1.5]} for c in constants]}))[0])
    _, sdedit, encoding = V.bounds(1.0, 1.5, 0.5)
    at = round(found * 50)
    assert 0 < found < 1 and encoding[at] < sdedit[at] and encoding[at + 1] >= sdedit[at + 1]


def test_scenes_of_a_pair_differ_in_one_thing():
    before = Scene("the snow", 1, (Thing("a horse", 0.5, 0.5, 0.5),))
    one = B.Pair(0, "swap", before, before.swap("a zebra"))
    assert one.before.place == one.after.place and one.after.things[0].name == "a zebra"


def test_the_cells_of_an_edit_and_their_parts(monkeypatch):
    """The old thing fills cells 4 to 7 and a quarter of the next; the new one lies three cells to the right."""
    shapes = {"a horse": (slice(32, 66), slice(32, 66)), "a zebra": (slice(32, 66), slice(56, 90))}

    def drawn(before, after):
        mask = np.zeros((SIDE, SIDE), np.float32)
        for thing in {*before.things} ^ {*after.things}:
            mask[shapes[thing.name]] = 1
        return mask

    monkeypatch.setattr(B, "true_mask", drawn)
    before = Scene("the snow", 1, (Thing("a horse", 0.5, 0.5, 0.5),))
    one = B.Pair(0, "swap", before, before.swap("a zebra"))
    cells, half, old, new, near = (np.zeros((SIDE // 8, SIDE // 8), bool) for _ in range(5))
    cells[4:9, 4:12] = half[4:8, 4:11] = old[4:8, 4:8] = new[4:8, 8:11] = near[3:10, 3:13] = True
    assert np.array_equal(one.cells, cells) and np.array_equal(one.half, half)
    assert np.array_equal(one.parts["old"], old) and np.array_equal(one.parts["new"], new)
    assert np.array_equal(one.parts["rim"], cells & ~half)
    assert np.array_equal(one.far, ~near.repeat(8, axis=0).repeat(8, axis=1))
    gone = B.Pair(0, "remove", before, before.remove())
    assert np.array_equal(gone.parts["old"], old) and not gone.parts["new"].any()
