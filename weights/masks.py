"""Masks from words beside DiffEdit's contrast, on new scenes whose true mask is known.

    python -m weights.masks --scenes 42      # a table for README.md

Each scene's edit changes one object (swapped, of pairs trained and held out, or removed). The word is its name. Both
masks are asked of `picture_mask` at the defaults, but for the threshold that a line names; both see ten noises. IoU is
by latent cells, with two truths: cells with any pixel of the edit, and cells more than half the edit's. An interval is
the 95 % of 4,000 resamples of the scenes (percentile bootstrap); differences are paired. Drawing scenes needs the Noto
emoji font.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from minidiffedit import Mask, StableDiffusion, picture_mask, threshold_maps
from minidiffedit.many.metrics import iou
from minidiffedit.run import blank_plan
from weights.bench import Pair, check_size, interval, pair
from weights.shell import count, run_command

KINDS = ("swap", "swap", "swap", "swap", "swap held out", "remove", "remove")  # in turn
# name: (method, threshold); those of one method are cut from the same maps
WAYS: dict[str, tuple[str, float]] = {
    "contrast": ("diffedit", 0.5),
    "contrast, threshold .35": ("diffedit", 0.35),
    "words": ("words+diffedit", 0.4),
    "words, threshold .25": ("words+diffedit", 0.25),
}
REFERENCE = "contrast"


def measured(sd: StableDiffusion, one: Pair) -> dict[str, tuple[float, float]]:
    """IoU of each way, with cells of any pixel and with cells more than half covered."""
    (thing,), source, target = one.before.things, one.before.caption(), one.after.caption()
    found, masks = {}, dict[str, Mask]()
    for name, (method, threshold) in WAYS.items():
        if method not in masks:
            told = {"mask_words": thing.name} if method.startswith("words") else {}
            texts = {"source": source, "target": target, "seed": one.number}
            masks[method] = picture_mask(sd, Image.fromarray(one.source), method, **texts, **told).found
        clip = blank_plan(method).settings["mask_clip"]
        made = threshold_maps(masks[method].maps, masks[method].flat_below, clip=clip, threshold=threshold)
        cells = made.mask[0, 0].numpy()
        found[name] = iou(cells, one.cells), iou(cells, one.half)
    return found


def said(values: np.ndarray) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*interval(values))


def table(kinds: list[str], rows: list[dict[str, tuple[float, float]]]) -> list[str]:
    """Lines of Markdown, a mask a line, for all scenes and each kind of edit."""
    lines = []
    for kind in ("all", *dict.fromkeys(kinds)):
        some = [row for at, row in zip(kinds, rows) if kind in (at, "all")]
        figures = {name: np.array([row[name] for row in some]) for name in WAYS}
        for name, both in figures.items():
            apart = "" if name == REFERENCE else said(both[:, 0] - figures[REFERENCE][:, 0])
            lines.append(f"| {kind} ({len(some)}) | {name} | {said(both[:, 0])} | {said(both[:, 1])} | {apart} |")
    head = f"| scenes | mask | IoU, any pixel | IoU, more than half | any pixel, less {REFERENCE}'s |"
    return [head, "|---|---|---|---|---|", *lines]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.masks", description="Compare two sources of masks.")
    parser.add_argument("--scenes", type=count, default=42, help="how many (%(default)s)")
    parser.add_argument("--model", default=str(Path(__file__).parent / "mini"), help="(%(default)s)")
    run_command(parser, measure)


def measure(args: argparse.Namespace) -> None:
    sd, kinds, rows = StableDiffusion.load(args.model, device="cpu"), [], []
    check_size(sd)
    for number in range(args.scenes):
        kinds.append(KINDS[number % len(KINDS)])
        rows.append(measured(sd, pair(number, kinds[-1])))
    print("\n".join(table(kinds, rows)))


if __name__ == "__main__":
    main()
