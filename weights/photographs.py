"""What `crop` gains on photographs with a small object, judged.

    python -m weights.photographs -o .photographs

Pictures of 1,500 x 1,000 pixels, drawn with the scenes' code: a place, and on it one object of 12, 16 or 20 % of its
shorter side. Each object is edited into another at the defaults, by the mask that DiffEdit finds and
by the true one, with crop and without. The judge sees a square around the object: right, if it names the new object
alone. Sharpness: the mean slope of grey values inside the new object, by that of the true edit, drawn in its place.
Writes photographs.jsonl, a line for each picture (finished ones are kept), and sheet.jpg of the first ones.
"""

import argparse
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minidiffedit import StableDiffusion, edit
from minidiffedit.many.evaluate import append_row, read_rows
from weights import scenes
from weights.judge import FOLDER, Judge, load_judge
from weights.shell import count, fingerprint, run_command

SIZE, SHARES, FIRST = (1500, 1000), (0.12, 0.16, 0.20), 10_200_000
SHOWN, COLUMNS = 6, (0, 1, 2, 4, 5)  # pictures on the sheet, and what of each


def drawn(thing: scenes.Thing, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Colour (n, n, 3) and alpha (n, n) of an object of `side` pixels, in the middle of a square of 1.25 sides."""
    usual, scenes.SIDE = scenes.SIDE, round(side * 1.25)
    try:
        return scenes.draw_thing(replace(thing, x=0.5, y=0.5, size=side / scenes.SIDE))
    finally:
        scenes.SIDE = usual


def photograph(s: scenes.Scene, side: int, at: tuple[int, int], seed: int) -> tuple[Image.Image, np.ndarray]:
    """A scene's place at full size with a little grain, its first thing laid on it, and that thing's alpha (H, W)."""
    w, h = SIZE
    place = Image.fromarray(np.rint(scenes.paint_place(s.place, s.look).clip(0, 255)).astype(np.uint8))
    large = place.resize((w, w), Image.Resampling.BICUBIC).crop((0, (w - h) // 2, w, (w + h) // 2))
    canvas = np.asarray(large, np.float32) + np.random.default_rng(seed).normal(0, 2, (h, w, 3))
    colour, alpha = drawn(s.things[0], side)
    whole, (x, y), n = np.zeros((h, w)), at, len(alpha)
    whole[y : y + n, x : x + n] = alpha
    canvas[y : y + n, x : x + n] += alpha[..., None] * (colour - canvas[y : y + n, x : x + n])
    return Image.fromarray(np.rint(canvas.clip(0, 255)).astype(np.uint8)), whole


def slope(picture: Image.Image, where: np.ndarray) -> float:
    return float(np.hypot(*np.gradient(np.asarray(picture.convert("L"), float)))[where].mean())


def seen_by(judge: Judge, picture: Image.Image, around: tuple[int, ...]) -> set[str]:
    return judge.says(np.asarray(picture.crop(around).resize((scenes.SIDE, scenes.SIDE), Image.Resampling.LANCZOS)))[0]


def measured(sd: StableDiffusion, judge: Judge, index: int) -> tuple[dict[str, Any], list[Image.Image]]:
    """One picture's line, and what is seen: before, true edit, then found and true mask, without and with crop."""
    seed, rng = FIRST + index, np.random.default_rng(FIRST + index)
    side = round(SHARES[index % len(SHARES)] * SIZE[1])
    n = round(side * 1.25)
    before = scenes.scene(seed, count=1)
    others = [name for name in scenes.OBJECTS if name != before.things[0].name]
    after = before.swap(others[int(rng.integers(len(others)))])
    at = int(rng.integers(side, SIZE[0] - 2 * side)), int(rng.integers(SIZE[1] // 3, SIZE[1] - int(1.6 * side)))
    (picture, old), (truth, new) = (photograph(s, side, at, seed) for s in (before, after))
    name, inside = after.things[0].name, new > 0.5
    half = side / 0.55 / 2  # the share of the square that objects have in the judge's own scenes
    around = tuple(round(c + n / 2 + d * half) for d in (-1, 1) for c in at)
    line: dict[str, Any] = {"seed": seed, "side": side, "source": before.caption(), "target": after.caption()}
    line |= {"judge knows it": seen_by(judge, truth, around) == {name}}
    shown, best = [picture, truth], slope(truth, inside)
    for kind in ("found", "true"):
        mask = scenes.mask_image(np.maximum(old, new)) if kind == "true" else None
        for crop in (False, True):
            texts = {"source": before.caption(), "target": after.caption()}
            done = edit(sd, picture, **texts, mask=mask, seed=0, crop=crop)  # type: ignore[arg-type]
            said = {"right": seen_by(judge, done.image, around) == {name}, "sharp": slope(done.image, inside) / best}
            line[f"{kind}, crop" if crop else kind] = said | {"box": done.settings.get("crop_box"), "rows": done.rows}
            shown.append(done.image)
    wide = tuple(round(c + n / 2 + d * half * 1.6) for d in (-1, 1) for c in at)
    return line, [one.crop(wide).resize((224, 224), Image.Resampling.LANCZOS) for one in shown]


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """How many are right, the mean sharpness, and where a square was cut out."""
    said: dict[str, Any] = {"pictures": len(lines), "judge knows": sum(one["judge knows it"] for one in lines)}
    for kind in (kind for kind, value in lines[0].items() if isinstance(value, dict)):
        of = [line[kind] for line in lines]
        said[kind] = {"right": sum(one["right"] for one in of), "squares": sum(bool(one["box"]) for one in of)}
        said[kind]["sharp"] = round(float(np.mean([one["sharp"] for one in of])), 3)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.photographs", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, default=Path(".photographs"), metavar="DIR")
    parser.add_argument("--count", type=count, default=12, help="pictures (%(default)s)")
    run_command(parser, measure)


def measure(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    table, mini = args.output / "photographs.jsonl", Path(__file__).parent / "mini"
    stamp = fingerprint(mini, FOLDER)
    folder = args.output / f"tiles-{stamp}"
    folder.mkdir(exist_ok=True)
    known = {row.get("seed"): row for row in read_rows(table) if row.get("model") == stamp}
    sd, judge, lines = StableDiffusion.load(mini), load_judge(), list[dict[str, Any]]()
    warnings.simplefilter("ignore")  # masks too large to gain, which the table counts
    for index in range(args.count):
        tiles = [folder / f"{index}-{i}.png" for i in (range(6) if index < SHOWN else ())]
        if FIRST + index not in known or not all(tile.exists() for tile in tiles):
            line, shown = measured(sd, judge, index)
            for tile, one in zip(tiles, shown):
                one.save(tile)
            known[FIRST + index] = line | {"model": stamp}
            append_row(table, known[FIRST + index])
        lines.append(known[FIRST + index])
    rows = range(min(SHOWN, args.count))
    sheet = Image.new("RGB", (len(COLUMNS) * 164 - 4, len(rows) * 164 - 4), "white")
    for row in rows:
        for column, i in enumerate(COLUMNS):
            tile = Image.open(folder / f"{row}-{i}.png").resize((160, 160), Image.Resampling.LANCZOS)
            sheet.paste(tile, (164 * column, 164 * row))
    sheet.save(args.output / "sheet.jpg", quality=88)
    print(json.dumps(summary(lines), indent=1))


if __name__ == "__main__":
    main()
