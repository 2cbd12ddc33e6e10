"""Edits of new scenes whose true mask and true result are known: run in groups, measured one by one.

    python -m weights.bench --edits 210 -o .bench-mini     # `make bench-mini`: the defaults, by kind of edit

A group of scenes goes through the library's own find_mask, encode and masked_decode together, and its settings share
what they have in common: one encoding serves every strength, one set of maps every threshold, clip and smaller number
of maps. One JSON line per edit is written as it is done, and a second run goes on where the first stopped. Drawing
scenes needs the Noto emoji font. Nothing is pasted: the background is what DiffEdit and the autoencoder leave of it.
`evidence.py` asks other questions of the same machinery.
"""

import argparse
import io
import multiprocessing
import queue
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minidiffedit import (
    Mask,
    StableDiffusion,
    Trajectory,
    edit,
    encode,
    find_mask,
    level_at,
    levels,
    masked_decode,
    threshold_maps,
)
from minidiffedit.files.images import to_picture, to_tensor, write_whole
from minidiffedit.many.evaluate import append_row, mean, measures, pyplot, read_rows, write_json
from minidiffedit.many.metrics import iou, psnr
from minidiffedit.methods.sdedit import draws, noised
from weights import judge as judges
from weights.scenes import EVAL_SEEDS, HELD_OUT, OBJECTS, PLACES, SIDE, Scene, Thing, scene, true_mask
from weights.shell import count, fingerprint, run_command

KINDS = ("swap", "swap", "swap", "swap held out", "remove", "add", "place")  # in turn
TOGETHER = 8  # scenes in a group
MAPS = 10
METRICS = ("psnr", "mse", "ssim")
# Of the arms of the paper's ablation, those that start from noise, and those that compute a mask.
RANDOM_START, COMPUTED_MASK = ("sdedit", "mask"), ("mask", "both")
THRESHOLDS = (0.25, 0.35, 0.5, 0.65, 0.75)
CLIPS = (2.0, 3.0, 4.0, None)
STRENGTHS = (0.4, 0.6, 0.8)
# Pairs of nearly one outline (common area .80 to .89 of both together): an edit is of colour and surface.
ALIKE = {"a tiger": "a panda", "an apple": "an orange", "a horse": "a zebra", "a car": "a bus"}
RESAMPLES = 4000


@dataclass(frozen=True)
class Pair:
    """Two scenes from evaluation seeds that differ in one thing; the number decides all, the noises too."""

    number: int
    kind: str
    before: Scene
    after: Scene

    @cached_property
    def source(self) -> np.ndarray:
        return self.before.picture()

    @cached_property
    def true_edit(self) -> np.ndarray:
        return self.after.picture()

    @cached_property
    def mask(self) -> np.ndarray:
        """Where the edit may act, (192, 192) bool."""
        return true_mask(self.before, self.after) > 0

    @cached_property
    def cells(self) -> np.ndarray:
        """(24, 24) bool: cells in which some pixel belongs more to the edit than not."""
        return by_cell(true_mask(self.before, self.after)).max(axis=(1, 3)) > 0.5

    @cached_property
    def half(self) -> np.ndarray:
        """(24, 24) bool: cells of which more than half belongs to the edit."""
        return by_cell(true_mask(self.before, self.after)).mean(axis=(1, 3)) > 0.5

    @cached_property
    def parts(self) -> dict[str, np.ndarray]:
        """These cells in three: more than half the old thing's, else more than half the new one's, else a rim's."""
        common = tuple(thing for thing in self.before.things if thing in self.after.things)
        old, new = (
            by_cell(true_mask(one, replace(one, things=common))).mean(axis=(1, 3)) > 0.5
            for one in (self.before, self.after)
        )
        return {"old": old, "new": new & ~old, "rim": self.cells & ~old & ~new}

    @cached_property
    def far(self) -> np.ndarray:
        """(192, 192) bool: where no cell of the edit is, nor one beside it."""
        grown = np.pad(self.cells, 1)
        near = np.max([grown[i : i + SIDE // 8, j : j + SIDE // 8] for i in range(3) for j in range(3)], axis=0)
        return ~near.repeat(8, axis=0).repeat(8, axis=1)


def by_cell(pixels: np.ndarray) -> np.ndarray:
    """(192, 192) -> (24, 8, 24, 8): rows of cells, rows in a cell, columns of cells, columns in a cell."""
    return pixels.reshape(SIDE // 8, 8, SIDE // 8, 8)


def pair(number: int, kind: str) -> Pair:
    seed = EVAL_SEEDS.start + number
    rng = np.random.default_rng(seed)
    before = scene(seed, count=1)
    (thing,) = before.things
    other = str(rng.choice([name for name in OBJECTS if name != thing.name]))
    if kind == "swap held out":
        name, place = sorted(HELD_OUT)[int(rng.integers(len(HELD_OUT)))]
        before = replace(before, place=place, things=(replace(thing, name=name),))
        return Pair(number, kind, before, before.swap(other if other != name else thing.name))
    if kind == "colour":
        both = ALIKE | {b: a for a, b in ALIKE.items()}
        name = str(rng.choice(sorted(both)))
        before = replace(before, things=(replace(thing, name=name),))
        return Pair(number, kind, before, before.swap(both[name]))
    if kind == "swap":
        return Pair(number, kind, before, before.swap(other))
    if kind == "remove":
        return Pair(number, kind, before, before.remove())
    if kind == "place":
        elsewhere = str(rng.choice([place for place in PLACES if place != before.place]))
        return Pair(number, kind, before, before.move_to(elsewhere))
    left = replace(thing, size=0.42, x=0.27)
    two = (left, Thing(other, 0.73, left.y, 0.42))
    return Pair(number, kind, replace(before, things=(left,)), replace(before, things=two))


@dataclass(frozen=True)
class Setting:
    """One way to edit; the defaults are DiffEdit's.

    arm: of the paper's ablation (2210.11427, section 4), by the names in stored rows: "sdedit", "encode" (the method
    encode-only), "mask" (mask-only), "both" (diffedit), "reconstruction"; or "round trip": the autoencoder alone, or
    "true latents": the true edit's in the true mask, the source's outside, or "mask alone": no edit, but two masks,
    from two draws of the noises, or "constants": see `Group.constants`.
    reference: the mask's, "" or the source caption. blend: outside the mask, the level just reached, or, as some
    implementations have it, the one just left. picture: whether the latent is decoded and looked at.
    """

    arm: str = "both"
    strength: float = 0.8
    guidance_scale: float = 7.5
    mask_strength: float = 0.5
    maps: int = MAPS
    mask_threshold: float = 0.5
    mask_clip: float | None = 3.0
    reference: str = "source"
    encode_text: str = "null"
    refine: int = 1
    blend: str = "reached"
    picture: bool = True

    def __str__(self) -> str:
        changed = [f for f in fields(self)[1:] if getattr(self, f.name) != f.default]
        return ", ".join([self.arm, *(f"{f.name} {getattr(self, f.name)!r}" for f in changed)])


class Group:
    """Some pairs that are edited together. What settings share is computed when it is first asked for, once."""

    def __init__(self, sd: StableDiffusion, pairs: list[Pair]):
        self.sd, self.pairs = sd, pairs
        self.seeds = [one.number for one in pairs]
        captions = {"source": [one.before.caption() for one in pairs], "target": [one.after.caption() for one in pairs]}
        self.text = {name: sd.text(prompts) for name, prompts in captions.items()} | {"": sd.text([""])}
        self.x0 = self.encoded_pictures("source")
        self.found: dict[tuple[Any, ...], Mask] = {}
        self.encoded: dict[tuple[Any, ...], Trajectory] = {}

    def encoded_pictures(self, name: str) -> Tensor:
        """Of every pair "source" or "true_edit": (b, 4, 24, 24)."""
        pictures = [Image.fromarray(getattr(one, name)) for one in self.pairs]
        return self.sd.encode(torch.cat([to_tensor(picture, (SIDE, SIDE)) for picture in pictures]))

    def mask(self, s: Setting, draw: int = 0) -> Mask:
        """Fewer maps are the first of MAPS: those that a run with fewer would draw. draw: 1 for noises of their own."""
        key = s.mask_strength, s.reference, draw
        if key not in self.found:
            self.found[key] = find_mask(
                self.sd.eps, self.x0, self.text["target"], self.text[s.reference], strength=s.mask_strength, maps=MAPS,
                seed=[seed + draw * len(EVAL_SEEDS) for seed in self.seeds],
            )  # fmt: skip
        found = self.found[key]
        return threshold_maps(found.maps[:, : s.maps], found.flat_below, clip=s.mask_clip, threshold=s.mask_threshold)

    def start(self, s: Setting) -> Trajectory:
        """What the decoding starts from and is held on."""
        if s.arm in RANDOM_START:
            return noised(self.x0, next(draws(self.x0.shape, self.seeds)), steps=50, strength=s.strength)
        key, K = (s.encode_text, s.refine), level_at(s.strength, 50)
        if key not in self.encoded or K not in self.encoded[key]:
            text = self.text["source" if s.encode_text == "source" else ""]
            self.encoded[key] = encode(self.sd.eps, self.x0, text, steps=50, strength=s.strength, refine=s.refine)
        return self.encoded[key].prefix(K)

    def latents(self, s: Setting) -> Tensor:
        """The edited latents (b, 4, 24, 24)."""
        if s.arm == "round trip":
            return self.x0
        if s.arm == "true latents":
            cells = torch.from_numpy(np.stack([one.cells for one in self.pairs]))[:, None]
            return torch.where(cells, self.encoded_pictures("true_edit"), self.x0)
        trajectory = self.start(s)
        if s.blend == "left":
            trajectory = level_left(trajectory)
        M = self.mask(s).mask if s.arm in COMPUTED_MASK else torch.ones_like(self.x0[:, :1])
        undo = s.arm == "reconstruction"
        target = self.text[("source" if s.encode_text == "source" else "") if undo else "target"]
        g = 1.0 if undo else s.guidance_scale
        return masked_decode(self.sd.eps, trajectory, M, target, self.text[""], guidance_scale=g)

    @torch.no_grad()
    def rows(self, s: Setting, judge: judges.Judge, metrics: Sequence[str] = METRICS) -> Iterator[dict[str, Any]]:
        """One row per pair: what can be known of its edit."""
        about = [{"number": one.number, "kind": one.kind, "setting": str(s)} for one in self.pairs]
        if s.arm == "constants":
            measured = self.constants(s)
            yield from (row | {name: values[i] for name, values in measured.items()} for i, row in enumerate(about))
            return
        found = self.mask(s) if s.arm in (*COMPUTED_MASK, "mask alone") else None
        if found:
            for row, cells, share, one in zip(about, found.mask[:, 0].numpy(), found.coverage, self.pairs):
                row |= {"coverage": share, "true_coverage": float(one.cells.mean()), "iou": iou(cells, one.cells)}
                row["iou_half"] = iou(cells, one.half)
                row |= {f"found_{part}": share_of(cells, where) for part, where in one.parts.items()}
        if s.arm == "mask alone":
            again = self.mask(s, draw=1).mask[:, 0].numpy()
            yield from (
                row | {"iou_between_seeds": iou(a, b)} for row, a, b in zip(about, found.mask[:, 0].numpy(), again)
            )
            return
        y = self.latents(s)
        images = self.sd.decode(y) if s.picture else None
        for i, (row, one) in enumerate(zip(about, self.pairs)):
            row["drift"] = rms(y[i] - self.x0[i])
            if found:
                row["outside_drift"] = rms((y[i] - self.x0[i])[:, ~found.mask[i, 0]])
            if images is not None:
                picture = np.asarray(to_picture(images[i : i + 1]))
                row |= measures(metrics, picture, one.source, mask=one.mask, true_edit=one.true_edit)
                row["far_psnr"] = psnr(picture, one.source, one.far) if one.far.any() else None
                row["success"] = right(judge, picture, one.after)
            yield row

    def constants(self, s: Setting) -> dict[str, list[list[float]]]:
        """What Proposition 1 takes for granted, level by level from K down, along an unguided edit from the encoding.

        With y the edit's latents and x the encoding's, both (4, 24, 24) at a level, and norms root mean squares:
        C = |eps(y, target)|; K1 = |eps(y, "") - eps(x, "")| / |y - x|; K2 = |eps(y, target) - eps(y, "")|.
        """
        trajectory, path = self.start(s), list[Tensor]()
        masked_decode(
            self.sd.eps, trajectory, torch.ones_like(self.x0[:, :1]), self.text["target"], self.text[""],
            guidance_scale=1, record=path,
        )  # fmt: skip
        found: dict[str, list[list[float]]] = {name: [[] for _ in self.pairs] for name in ("C", "K1", "K2")}
        for j, y in zip(range(max(trajectory), 0, -1), path):
            x, t = trajectory[j], levels(50).t[j]
            null, text = self.sd.eps(y, t, [self.text[""].expand_as(self.text["target"]), self.text["target"]])
            (at_x,) = self.sd.eps(x, t, [self.text[""]])
            for i in range(len(y)):
                found["C"][i].append(rms(text[i]))
                found["K2"][i].append(rms(text[i] - null[i]))
                apart = rms(y[i] - x[i])
                found["K1"][i].append(rms(null[i] - at_x[i]) / apart if apart > 1e-3 else 0.0)
        return found


def level_left(trajectory: Trajectory) -> Trajectory:
    """What makes masked_decode blend with the level just left: every level holds the one above it."""
    K = max(trajectory)
    return Trajectory([trajectory[min(j + 1, K)] for j in range(K + 1)], trajectory.steps)


def share_of(cells: np.ndarray, where: np.ndarray) -> float | None:
    return float(cells[where].mean()) if where.any() else None


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def right(judge: judges.Judge, picture: np.ndarray, wanted: Scene) -> bool:
    return judge.says(picture) == ({thing.name for thing in wanted.things}, wanted.place)


# ---------------------------------------------------------------- means over scenes, and how sure they are


@cache
def resamples(sizes: tuple[int, ...], draws: int = RESAMPLES) -> np.ndarray:
    """(1 + draws, scenes) float64: weights of a mean over the scenes as they are, then over as many of them drawn with
    replacement, the same draws for all figures. sizes: of groups, one after the other, each drawn from by itself.
    """
    rng, counts = np.random.default_rng(0), list[np.ndarray]()
    for scenes in sizes:
        drawn = rng.integers(scenes, size=(draws, scenes))
        counts.append(np.stack([np.bincount(one, minlength=scenes) for one in drawn]))
    return np.vstack([np.ones(sum(sizes)), np.hstack(counts)]) / sum(sizes)


def interval(
    values: np.ndarray, sizes: tuple[int, ...] | None = None, draws: int = RESAMPLES
) -> tuple[float, float, float]:
    """The mean of values (scenes,), and where 95 % of the resampled means lie (percentile bootstrap)."""
    means = resamples(sizes or (len(values),), draws) @ values
    low, high = np.percentile(means[1:], [2.5, 97.5])
    return float(means[0]), float(low), float(high)


# ---------------------------------------------------------------- two processes, one file


Job = tuple[list[tuple[int, str]], list[Setting]]  # the (number, kind) of a group's pairs, and what to do with them


def jobs(numbers: Iterable[tuple[int, str]], settings: list[Setting]) -> list[Job]:
    """Groups of TOGETHER. The deepest encoding comes first: the others are its prefixes."""
    numbers, settings = list(numbers), sorted(settings, key=lambda s: -s.strength)
    return [(numbers[start : start + TOGETHER], settings) for start in range(0, len(numbers), TOGETHER)]


def run(
    wanted: list[Job], path: Path, model: str, judge: Path, workers: int = 2, metrics: Sequence[str] = METRICS
) -> list[dict[str, Any]]:
    """Every row of the jobs, from the file where it has them, else computed and added to it.

    Rows that another model or judge made are left where they are and not taken. Raises ChildProcessError when a worker
    ends, and what a worker raised.
    """
    stamp = fingerprint(model, judge)
    ours = [row for row in read_rows(path) if row.get("model") == stamp]
    rows = {tuple(map(row.get, ("number", "kind", "setting"))): row for row in ours}
    left = [
        (numbers, missing)
        for numbers, settings in wanted
        if (missing := [s for s in settings if any((*number, str(s)) not in rows for number in numbers)])
    ]
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    tasks.cancel_join_thread()  # what is left of them when this ends early is nobody's
    for job in left:
        tasks.put(job)
    crew = [
        context.Process(target=work, args=(tasks, results, model, judge, metrics), daemon=True) for _ in range(workers)
    ]
    for _ in crew:
        tasks.put(None)
    count = sum(len(numbers) * len(settings) for numbers, settings in left)
    with tqdm(total=count, desc="edits", unit="edit", disable=None, smoothing=0.05) as bar:
        for worker in crew if left else ():
            worker.start()
        while count:
            try:
                row = results.get(timeout=5)
            except queue.Empty:
                if any(worker.exitcode for worker in crew) or not any(worker.is_alive() for worker in crew):
                    raise ChildProcessError("a worker is gone; the same command goes on where it stopped") from None
                continue
            if isinstance(row, Exception):
                raise row
            row["model"] = stamp
            rows[row["number"], row["kind"], row["setting"]] = row
            append_row(path, row)
            count -= 1
            bar.update()
    return [rows[(*number, str(s))] for numbers, settings in wanted for number in numbers for s in settings]


def work(tasks: Any, results: Any, model: str, judge: Path, metrics: Sequence[str]) -> None:
    """One process: a group at a time, on one thread, which is as fast here as threads are and quieter."""
    parent: Any = multiprocessing.parent_process()
    try:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        judges.FOLDER = judge
        sd, seen = StableDiffusion.load(model, device="cpu", dtype="float32"), judges.load_judge()
        check_size(sd)
        while (job := tasks.get()) is not None:
            numbers, settings = job
            group = Group(sd, [pair(*number) for number in numbers])
            for s in settings:
                for row in group.rows(s, seen, metrics):
                    results.put(row)
                if not parent.is_alive():  # killed, so that nobody reads the rows
                    return
    except (ValueError, OSError, ArithmeticError) as error:
        results.put(ValueError(str(error)))
    except Exception:
        results.put(RuntimeError(traceback.format_exc()))


def check_size(sd: StableDiffusion) -> None:
    if sd.side != SIDE:
        raise ValueError(f"scenes have {SIDE} x {SIDE} pixels, but {sd.name} knows {sd.side}; take weights/mini")


# ---------------------------------------------------------------- the defaults, by kind of edit


SETTINGS = [
    Setting(),
    *(Setting(strength=strength) for strength in STRENGTHS if strength != Setting.strength),
    Setting("round trip"),
    Setting("true latents"),
    *(Setting("mask alone", mask_threshold=threshold) for threshold in THRESHOLDS),
    *(Setting("mask alone", mask_clip=clip) for clip in CLIPS if clip != Setting.mask_clip),
]


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """{kind of edit, or "all": {"n": edits, setting: {number in its rows: its mean}}}"""
    summary: dict[str, Any] = {}
    for kind in (*dict.fromkeys(KINDS), "all"):
        if not (group := [row for row in rows if kind in (row["kind"], "all")]):
            continue
        summary[kind] = {"n": len({row["number"] for row in group})}
        for name in dict.fromkeys(row["setting"] for row in group):
            some = [row for row in group if row["setting"] == name]
            figures = [key for key in some[0] if key not in ("number", "kind", "setting", "model")]
            summary[kind][name] = {key: mean([row[key] for row in some if row[key] is not None]) for key in figures}
    return summary


def plot(summary: dict[str, Any], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    kinds = [kind for kind in summary if kind != "all"]
    default, vae = str(Setting()), str(Setting("round trip"))
    bars = {
        axes[0, 0]: (("IoU with the true mask", default, "iou"), ("judged a success", default, "success")),
        axes[1, 0]: (("background, dB", default, "background_psnr"), ("autoencoder alone", vae, "background_psnr")),
    }
    for axis, sides in bars.items():
        for (label, setting, name), side in zip(sides, (-0.35, 0.35)):
            axis.bar(kinds, [summary[kind][setting][name] for kind in kinds], label=label, width=side, align="edge")
        axis.tick_params(axis="x", rotation=20)
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    lines = (
        (axes[0, 1], "mask_threshold", THRESHOLDS, "mask alone", "iou", "IoU with the true mask"),
        (axes[0, 2], "mask_clip", CLIPS, "mask alone", "iou", "IoU with the true mask"),
        (axes[1, 1], "strength", STRENGTHS, "both", "success", "judged a success"),
        (axes[1, 2], "strength", STRENGTHS, "both", "background_psnr", "background, dB"),
    )
    for axis, option, values, name, figure_name, label in lines:
        settings = [str(Setting(name, **{option: value})) for value in values]
        for kind in kinds:
            ys = [summary[kind][setting][figure_name] for setting in settings]
            axis.plot([str(value) for value in values], ys, "o-", label=kind)
        axis.set(xlabel=option.replace("_", " "), ylabel=label)
    axes[0, 2].legend()
    save_plot(plt, figure, path, 110)


def save_plot(plt: Any, figure: Any, path: Path, dpi: int) -> None:
    """Whole or not at all."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png")
    write_whole(path, drawn.getbuffer())
    plt.close(figure)


def alone(model: str) -> dict[str, Any]:
    """What one edit costs by itself at the defaults: model rows and seconds by stage, in this process."""
    one = pair(0, "swap")
    sd = StableDiffusion.load(model, device="cpu")
    done = edit(sd, one.source, source=one.before.caption(), target=one.after.caption(), seed=0)
    return {"evaluations": done.evaluations, "seconds": done.seconds}


def said(kind: str, means: dict[str, Any]) -> list[str]:
    """A kind's figures as lines."""
    done, vae, true, mask = (means[str(Setting(arm))] for arm in ("both", "round trip", "true latents", "mask alone"))
    lines = [
        f"{kind:14} n {means['n']:3}  IoU {done['iou']:.3f} (between seeds {mask['iou_between_seeds']:.3f})  "
        f"success {done['success']:.1%}  background {done['background_psnr']:.1f} dB, SSIM "
        f"{done['background_ssim']:.3f} (VAE {vae['background_psnr']:.1f}, {vae['background_ssim']:.3f}; true latents "
        f"in the true mask {true['background_psnr']:.1f})",
    ]
    if kind.startswith("swap"):
        found = ", ".join(f"{done[f'found_{part}']:.0%} of {part}" for part in ("old", "new", "rim"))
        masks = {t: means[str(Setting("mask alone", mask_threshold=t))] for t in THRESHOLDS}
        both = ", ".join(f"{t} {one['iou']:.3f} {one['iou_half']:.3f}" for t, one in masks.items())
        lines += [
            f"{'':14} cells found: {found}; IoU with cells more than half covered {done['iou_half']:.3f}",
            f"{'':14} the two IoUs by threshold: {both}",
            f"{'':14} background more than a cell away: {done['far_psnr']:.1f} dB (VAE {vae['far_psnr']:.1f}, "
            f"true latents {true['far_psnr']:.1f})",
        ]
    return lines


def certain(rows: list[dict[str, Any]]) -> list[str]:
    """How sure the figures are, as lines: by kind and over all swaps, then the thresholds on all swaps, less the
    default's, paired by scene.
    """

    def values(kind: str, setting: Setting, figure: str) -> np.ndarray:
        """(scenes,) float64, NaN for None; kind: or "all swaps"."""
        some = {row["number"]: row.get(figure) for row in rows if row["setting"] == str(setting)
                and (row["kind"] == kind or (kind == "all swaps" and row["kind"].startswith("swap")))}  # fmt: skip
        return np.array([some[number] for number in sorted(some)], float)

    def spread(found: np.ndarray, form: str) -> str:
        found = found[~np.isnan(found)]
        return "{} [{}, {}]".format(*(format(one, form) for one in interval(found))) if len(found) else "none"

    figures = (("IoU", "iou", ".3f"), ("success", "success", ".1%"), ("background", "background_psnr", ".1f"))
    lines = ["95 % of resamples of the scenes:"]
    for kind in (*dict.fromkeys(row["kind"] for row in rows), "all swaps"):
        told = (f"{name} {spread(values(kind, Setting(), figure), form)}" for name, figure, form in figures)
        lines.append(f"{kind:14} {'  '.join(told)}")
    found = ", ".join(f"{np.nanmean(values('all swaps', Setting(), f'found_{part}')):.0%} of {part}"
                      for part in ("old", "new", "rim"))  # fmt: skip
    far = (np.nanmean(values("all swaps", Setting(arm), "far_psnr")) for arm in ("both", "true latents", "round trip"))
    lines.append(f"{'':14} cells found: {found}; more than a cell away (edit, true latents, VAE): "
                 + ", ".join(f"{one:.1f} dB" for one in far))  # fmt: skip
    for threshold in THRESHOLDS:
        setting, usual, ious = (
            Setting("mask alone", mask_threshold=threshold),
            Setting("mask alone"),
            ("iou", "iou_half"),
        )
        means = " and ".join(f"{values('all swaps', setting, iou).mean():.3f}" for iou in ious)
        apart = (values("all swaps", setting, iou) - values("all swaps", usual, iou) for iou in ious)
        less = f", less the default's {', '.join(spread(one, '+.3f') for one in apart)}" if setting != usual else ""
        lines.append(f"{'':14} threshold {threshold}: the two IoUs {means}{less}")
    return lines


def add_options(parser: argparse.ArgumentParser, output: str) -> None:
    here = Path(__file__).parent
    parser.add_argument("--model", default=str(here / "mini"), help="(%(default)s)")
    parser.add_argument("--judge", type=Path, default=judges.FOLDER, metavar="DIR", help=f"({judges.FOLDER})")
    parser.add_argument("--workers", type=count, default=2, metavar="N", help="processes of one thread (2)")
    parser.add_argument("-o", "--output", type=Path, default=Path(output), metavar="DIR", help="(%(default)s)")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.bench", description="Measure the miniature's edits.")
    parser.add_argument("--edits", type=count, default=210, help="how many (%(default)s)")
    add_options(parser, ".bench-mini")
    run_command(parser, measure)


def measure(args: argparse.Namespace) -> None:
    pyplot()  # its want is said before the work
    args.output.mkdir(parents=True, exist_ok=True)
    numbers = [(number, KINDS[number % len(KINDS)]) for number in range(args.edits)]
    rows = run(jobs(numbers, SETTINGS), args.output / "edits.jsonl", args.model, args.judge, args.workers)
    summary = summarise(rows)
    cost = alone(args.model)
    write_json(args.output / "summary.json", summary | {"one edit alone": cost})
    plot(summary, args.output / "bench.png")
    print("\n".join(line for kind, means in summary.items() for line in said(kind, means)))
    print("\n".join(certain(rows)))
    counted = " + ".join(str(n) for n in cost["evaluations"].values())
    print(f"one edit alone: {counted} rows, {sum(cost['seconds'].values()):.1f} s")
    print(f"written: {args.output}/summary.json, edits.jsonl, bench.png")


if __name__ == "__main__":
    main()
