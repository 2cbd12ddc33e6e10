"""`make bench-mini`: edits of new scenes whose true mask and true result are known, measured.

    python -m weights.bench --edits 200 -o .bench-mini

Every edit is a pair of scenes from evaluation seeds that differ in one thing. One JSON line per edit is written as it
is done, and a second run goes on where the first stopped; at the end a summary (JSON) and plots. Drawing scenes needs
the Noto emoji font. Paste is off: the background is what DiffEdit and the autoencoder leave of it.
"""

import argparse
import json
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from minidiffedit import Edit, StableDiffusion, edit, threshold_maps
from minidiffedit.editor import picture_mask
from minidiffedit.images import to_picture, to_tensor
from minidiffedit.metrics import iou, psnr, ssim
from weights.judge import Judge, load_judge
from weights.scenes import EVAL_SEEDS, HELD_OUT, OBJECTS, PLACES, Scene, Thing, scene, true_mask

KINDS = ("swap", "swap", "swap", "swap held out", "remove", "add", "place")  # in turn
THRESHOLDS = (0.25, 0.35, 0.5, 0.65, 0.75)
CLIPS = (2.0, 3.0, 4.0, None)
STRENGTHS = (0.5, 0.65, 0.8, 1.0)


def pair(number: int) -> tuple[str, Scene, Scene]:
    """Edit `number` of the benchmark: its kind, the scene before and the scene after; always the same."""
    kind, seed = KINDS[number % len(KINDS)], EVAL_SEEDS.start + number
    rng = np.random.default_rng(seed)
    before = scene(seed, count=1)
    (thing,) = before.things
    other = str(rng.choice([name for name in OBJECTS if name != thing.name]))
    if kind == "swap held out":
        name, place = sorted(HELD_OUT)[int(rng.integers(len(HELD_OUT)))]
        before = replace(before, place=place, things=(replace(thing, name=name),))
        return kind, before, before.swap(other if other != name else thing.name)
    if kind == "swap":
        return kind, before, before.swap(other)
    if kind == "remove":
        return kind, before, before.remove()
    if kind == "place":
        return kind, before, before.move_to(str(rng.choice([place for place in PLACES if place != before.place])))
    left = replace(thing, size=0.42, x=0.27)
    two = (left, Thing(other, 0.73, left.y, 0.42))
    return kind, replace(before, things=(left,)), replace(before, things=two)


def cells(pixels: np.ndarray) -> np.ndarray:
    """(128, 128) alpha -> (16, 16) bool: cells in which some pixel is more in than out."""
    h, w = pixels.shape
    return pixels.reshape(h // 8, 8, w // 8, 8).max(axis=(1, 3)) > 0.5


def right(judge: Judge, picture: Any, wanted: Scene) -> bool:
    return judge.says(np.asarray(picture)) == ({thing.name for thing in wanted.things}, wanted.place)


@torch.no_grad()
def measure(sd: StableDiffusion, judge: Judge, number: int) -> dict[str, Any]:
    """One edit at the defaults, with everything that can be known of it."""
    kind, before, after = pair(number)
    source, wanted, mask = before.picture(), after.picture(), true_mask(before, after)
    texts: dict[str, Any] = {"source": before.caption(), "target": after.caption()}
    done = edit(sd, source, seed=number, paste=False, **texts)
    background = mask == 0
    round_trip = to_picture(sd.decode(sd.encode(to_tensor(done.source, done.source.size))))
    row = {
        "number": number, "kind": kind, **texts, "verdict": done.verdict, "coverage": done.coverage,
        "iou": iou(found_cells(done), cells(mask)), "success": right(judge, done.image, after),
        "true_edit_recognised": right(judge, wanted, after),
        "background_psnr": psnr(done.image, source, background), "vae_psnr": psnr(round_trip, source, background),
        "background_ssim": ssim(done.image, source, background), "vae_ssim": ssim(round_trip, source, background),
        "psnr_to_true_edit": psnr(done.image, wanted), "rows": sum(done.evaluations.values()),
        "seconds": sum(done.seconds.values()),
    }  # fmt: skip
    assert done.found is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, values in (("threshold", THRESHOLDS), ("clip", CLIPS)):
            for value in values:
                other = threshold_maps(done.found.maps, done.found.flat_below, **{name: value})
                row[f"iou at {name} {value}"] = iou(other.mask[0, 0].numpy(), cells(mask))
        again = picture_mask(sd, source, seed=number + 10**6, **texts)
    row["iou between seeds"] = iou(again.found.mask[0, 0].numpy(), found_cells(done))
    if kind == "swap" and number % len(KINDS) == 0:  # a third of the swaps, over the strength
        for strength in STRENGTHS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                one = edit(sd, source, strength=strength, paste=False, reuse=done, seed=number, **texts)
            row[f"success at strength {strength}"] = right(judge, one.image, after)
            row[f"psnr to source at strength {strength}"] = psnr(one.image, source)
    return row


def found_cells(done: Edit) -> np.ndarray:
    return (done.latent_mask[0, 0] > 0).numpy()


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means by kind of edit and over all, of every number that the rows hold; n is the count of edits."""
    groups = {kind: [row for row in rows if row["kind"] == kind] for kind in dict.fromkeys(KINDS)} | {"all": rows}
    summary = {}
    for name, group in groups.items():
        keys = dict.fromkeys(k for row in group for k, v in row.items() if isinstance(v, bool | float | int))
        means = {k: float(np.mean([row[k] for row in group if k in row])) for k in keys if k != "number"}
        summary[name] = {"n": len(group)} | means
    return summary


def plot(summary: dict[str, Any], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    kinds = [kind for kind in summary if kind != "all"]
    for key, label, side in (("iou", "IoU with the true mask", 0.35), ("success", "judged a success", -0.35)):
        axes[0].bar(kinds, [summary[kind][key] for kind in kinds], label=label, width=side, align="edge")
    axes[0].tick_params(axis="x", rotation=20)
    for kind in kinds:
        axes[1].plot(THRESHOLDS, [summary[kind][f"iou at threshold {t}"] for t in THRESHOLDS], "o-", label=kind)
    axes[1].set(xlabel="threshold", ylabel="IoU with the true mask")
    swap = summary["swap"]
    curve = [(swap[f"psnr to source at strength {s}"], swap[f"success at strength {s}"]) for s in STRENGTHS]
    axes[2].plot(*zip(*curve), "o-")
    for s, point in zip(STRENGTHS, curve):
        axes[2].annotate(f"{s}", point)
    axes[2].set(xlabel="PSNR to the source (dB)", ylabel="judged a success", title="swaps, by strength")
    axes[0].legend()
    axes[1].legend()
    figure.savefig(folder / "bench.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.bench", description="Measure the miniature's edits.")
    parser.add_argument("--model", default=str(Path(__file__).parent / "mini"), help="(%(default)s)")
    parser.add_argument("--edits", type=int, default=210, help="how many (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path(".bench-mini"), metavar="DIR", help="(%(default)s)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    sd, judge = StableDiffusion.load(args.model, dtype="float32"), load_judge()
    path = args.output / "edits.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if row["number"] < args.edits]
    done = {row["number"] for row in rows}
    with path.open("a") as file:
        for number in tqdm([n for n in range(args.edits) if n not in done], desc="edits", disable=None):
            rows.append(measure(sd, judge, number))
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
    summary = summarise(rows)
    part = args.output / "summary.json.part"
    part.write_text(json.dumps(summary, indent=1) + "\n")
    os.replace(part, args.output / "summary.json")
    plot(summary, args.output)
    for kind, means in summary.items():
        shares = f"IoU {means['iou']:.3f}  success {means['success']:.1%}"
        background = f"background {means['background_psnr']:.1f} dB (VAE {means['vae_psnr']:.1f})"
        print(f"{kind:14} n {means['n']:3}  {shares}  {background}  {means['seconds']:.1f} s an edit")
    print(f"written: {args.output}/summary.json, edits.jsonl, bench.png")


if __name__ == "__main__":
    main()
