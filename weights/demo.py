"""`make demo`: real edits of the scenes that ship with the miniature, one sheet to look at, and one page to look into.

    python -m weights.demo --model weights/mini -o demo

Columns: source, heat map, mask, edit, true edit. The scenes' true edits are known because code drew them. A model this
small wants calmer guidance and wider masks than the defaults, which were chosen for the official weights; a place fills
most of the picture, and its mask can only do so where the heat is cut early. `--defaults` shows what they give.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from minidiffedit import StableDiffusion, edit, save_report
from minidiffedit.files.images import grey_picture
from weights.shell import count_or_0, run_command

HERE = Path(__file__).parent
COLUMNS = ("source", "heat map", "mask", "edit", "true edit")
SHOWN = ("lemon-strawberry", "horse-zebra", "dog-cat", "salad-cake", "elephant-pig", "rabbit-removed")
SWAP = {"guidance_scale": 5.0, "mask_threshold": 0.35}
PLACE = {"guidance_scale": 5.0, "mask_threshold": 0.25, "mask_clip": 1.5}
GAP, TITLE, CELL = 8, 22, 160


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.demo", description="Edit the miniature's scenes.")
    parser.add_argument("--model", default=str(HERE / "mini"), help="folder, .safetensors file or hub id (%(default)s)")
    parser.add_argument("--scenes", type=Path, default=HERE / "mini" / "scenes", metavar="DIR", help="(%(default)s)")
    parser.add_argument("--all", action="store_true", help="all scenes of the folder, not only six that come out well")
    parser.add_argument("--defaults", action="store_true", help="edit with the defaults")
    parser.add_argument("--seed", type=count_or_0, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), metavar="DIR", help="(%(default)s)")
    run_command(parser, edit_scenes)


def edit_scenes(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    sd = StableDiffusion.load(args.model)
    known = {scene["folder"]: scene for scene in json.loads((args.scenes / "scenes.json").read_text(encoding="utf-8"))}
    if missing := {*SHOWN} - {*known} if not args.all else set():
        raise ValueError(f"{args.scenes} has no scene {', '.join(sorted(missing))}; --all shows those that it has")
    scenes = [known[name] for name in (known if args.all else SHOWN)]
    rows, titles = [], []
    for scene in scenes:
        settings = {} if args.defaults else PLACE if scene["kind"] == "place" else SWAP
        titles.append(f"{scene['source']} -> {scene['target']}")
        print(titles[-1], *(f"{name} {value}" for name, value in settings.items()), sep=", ", flush=True)
        page = args.output / "report.html" if not rows else None  # of the first
        rows.append(show(sd, scene, args.scenes / scene["folder"], args.output, settings | {"seed": args.seed}, page))
    sheet(rows, titles).save(args.output / "sheet.png")
    print(f"The pictures are in {args.output.resolve()}; look at sheet.png first, then open report.html in a browser.")


def show(
    sd: StableDiffusion, scene: dict[str, Any], folder: Path, output: Path, settings: dict[str, Any], page: Path | None
) -> list[Image.Image]:
    """Edit one scene, write edit, mask, heat map and, if it has a name, the page; return the sheet's row."""
    done = edit(sd, folder / "source.png", source=scene["source"], target=scene["target"], **settings)
    heat = grey_picture(done.heat, done.source.size)
    done.save(output / f"{scene['folder']}-edit.png")
    for name, picture in (("mask", done.mask), ("heat", heat)):
        picture.save(output / f"{scene['folder']}-{name}.png")
    if page:
        save_report(done, page, picture=os.path.relpath(folder / "source.png"), decode_previews=True)
    return [done.source, heat, done.mask, done.image, Image.open(folder / "target.png").convert("RGB")]


def sheet(rows: list[list[Image.Image]], titles: list[str]) -> Image.Image:
    """Rows of pictures under the column names, each row under its title."""
    font = ImageFont.load_default(14)
    width, height = GAP + len(COLUMNS) * (CELL + GAP), TITLE + len(rows) * (TITLE + CELL + GAP)
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for i, name in enumerate(COLUMNS):
        draw.text((GAP + i * (CELL + GAP), 4), name, fill="#666666", font=font)
    for j, (row, title) in enumerate(zip(rows, titles)):
        top = TITLE + j * (TITLE + CELL + GAP)
        draw.text((GAP, top + 2), title, fill="black", font=font)
        for i, picture in enumerate(row):
            cell = picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS)
            page.paste(cell, (GAP + i * (CELL + GAP), top + TITLE))
    return page


if __name__ == "__main__":
    main()
