"""Text to picture, judged: does the miniature draw what each caption says?

    python -m weights.samples -o .samples

Every object in every place and every place alone, from `--seeds` noises each, at the defaults (50 steps, guidance 7.5).
The judge names objects and place; a sample counts when both are exactly right. Writes samples.json and a contact sheet
(a row per object, a column per place). Captions held out of training are counted apart.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from minidiffedit import StableDiffusion, noises, sample
from minidiffedit.many.evaluate import write_json
from weights.judge import Judge, load_judge
from weights.scenes import HELD_OUT, OBJECTS, PLACES, Scene, Thing
from weights.shell import count, run_command
from weights.train import save_sheet, to_pictures


def captions() -> list[Scene]:
    """Object by object in every place, then the places alone; of each scene only its caption is used."""
    return [Scene(place, 0, (Thing(name, 0.5, 0.5, 0.5),)) for name in OBJECTS for place in PLACES] + [
        Scene(place, 0) for place in PLACES
    ]


@torch.no_grad()
def draw(sd: StableDiffusion, scenes: list[Scene], seed: int, steps: int) -> np.ndarray:
    """One sample for each scene's caption: (n, H, W, 3) uint8. Rows of one batch see different noises."""
    text, null = sd.text([s.caption() for s in scenes]), sd.text([""])
    side = sd.side // sd.factor
    latent = sample(sd.eps, noises((sd.channels, side, side), len(scenes), seed), text, null, steps=steps)
    return to_pictures(sd.decode(latent))


def judged(judge: Judge, scenes: list[Scene], pictures: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for s, picture in zip(scenes, pictures):
        names = {thing.name for thing in s.things}
        seen, place = judge.says(picture)
        held_out = any((name, s.place) in HELD_OUT for name in names)
        rows.append({"caption": s.caption(), "object": "; ".join(names), "place": s.place, "held_out": held_out,
                     "object_right": seen == names, "place_right": place == s.place})  # fmt: skip
    return rows


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def share(chosen: list[dict[str, Any]]) -> dict[str, float]:
        both = [row["object_right"] and row["place_right"] for row in chosen]
        parts = {key: float(np.mean([row[f"{key}_right"] for row in chosen])) for key in ("object", "place")}
        return parts | {"both": float(np.mean(both)), "n": len(chosen)}

    groups = {"trained": [row for row in rows if not row["held_out"]], "held out": [r for r in rows if r["held_out"]]}
    by = {key: {value: share([row for row in groups["trained"] if row[key] == value])["both"]
                for value in dict.fromkeys(row[key] for row in rows)} for key in ("object", "place")}  # fmt: skip
    return {name: share(group) for name, group in groups.items()} | {"by " + key: value for key, value in by.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.samples", description="Judge text-to-picture samples.")
    parser.add_argument("--model", default="weights/mini", help="the miniature, or a retrained one (%(default)s)")
    parser.add_argument("--seeds", type=count, default=2, help="noises for every caption (%(default)s)")
    parser.add_argument("--steps", type=count, default=50, help="(%(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path(".samples"), help="folder (%(default)s)")
    run_command(parser, measure)


def measure(args: argparse.Namespace) -> None:
    sd, judge, scenes = StableDiffusion.load(args.model, dtype="float32"), load_judge(), captions()
    rows, first = [], []
    for seed in tqdm(range(args.seeds), desc="seeds", disable=None):
        for start in range(0, len(scenes), 54):  # nine rows of the sheet at a time
            some = scenes[start : start + 54]
            pictures = draw(sd, some, seed * len(scenes) + start, args.steps)
            rows += judged(judge, some, pictures)
            first += [pictures] if seed == 0 else []
    args.output.mkdir(parents=True, exist_ok=True)
    save_sheet(np.split(np.concatenate(first), len(scenes) // len(PLACES)), args.output / "samples.png")
    summary = {"model": args.model, "steps": args.steps, "seeds": args.seeds} | summarise(rows)
    write_json(args.output / "samples.json", summary | {"samples": rows})
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
