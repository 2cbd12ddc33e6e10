"""sheet and figure: an edit under several settings, on one page."""

import argparse
from pathlib import Path
from typing import Any

from .common import (
    add_command,
    add_dry_run,
    add_model,
    add_picture,
    add_steering,
    clip_value,
    describe,
    identity,
    load,
    open_mask,
    picture_and_output,
    progress,
    say_cost,
    steering_of,
    text_of,
    versions,
)

KINDS: dict[str, Any] = {
    "strength": float, "mask_threshold": float, "guidance_scale": float, "seed": int, "mask_clip": clip_value,
}  # fmt: skip
FIGURES = {"threshold": float, "strength": float, "mask": float, "latents": int, "reconstruction": int}


def add(commands: Any) -> None:
    sheet = add_command(commands, "sheet", run_sheet, say_page, "edit a picture over two settings, on one page")
    add_picture(sheet, "the page (.png, .jpg, .webp; default: NAME-sheet.png here)")
    what = f"NAME=VALUE,VALUE,...; NAME is one of {', '.join(spelled(name) for name in KINDS)}"
    sheet.add_argument("--rows", type=axis, metavar="AXIS", help=f"{what} (default: strength=.4,.6,.8)")
    sheet.add_argument("--columns", type=axis, metavar="AXIS", help="the same (default: mask-threshold=.3,.5,.7)")
    sheet.add_argument("--mask", type=Path, metavar="FILE", help="your mask instead: white = edited, grey = partly")
    sheet.add_argument("--save-edits", type=Path, metavar="DIR", help="also write each edit, into this new folder")
    add_page(sheet)
    add_settings(sheet)
    add_steering(sheet)
    add_model(sheet)

    figure = add_command(commands, "figure", run_figure, say_page, "draw one of the usual figures of an edit")
    figure.add_argument(
        "name", choices=FIGURES, metavar="NAME",
        help="threshold: what it does to mask and edit; strength: the same of the strength; mask: with and without it, "
        "from noise and from the encoding; latents: encoding and decoding level by level; reconstruction: what "
        "encoding and decoding lose, by steps",
    )  # fmt: skip
    add_picture(figure, "the page (.png, .jpg, .webp; default: IMAGE-NAME.png here)", target_needed=False)
    figure.add_argument(
        "--values", metavar="V,V,...", help="along the figure: thresholds, strengths, levels (latents) or steps"
    )
    figure.add_argument("--decode", action="store_true", help="latents: shown by the autoencoder, sharper and slower")
    add_page(figure)
    add_settings(figure)
    add_model(figure)


def add_page(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--height", type=int, metavar="PX", help="of a picture on the page, 64..1024 (default: its own, 192 to 256)"
    )
    parser.add_argument("--no-metadata", action="store_true", help="write no settings into the page")
    add_dry_run(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """An edit's other settings; those not given are not set, so that one that stands on an axis is told."""
    group = parser.add_argument_group("settings of all edits, as in `edit`", argument_default=argparse.SUPPRESS)
    group.add_argument("--negative-prompt", metavar="TEXT")
    for name, kind, letter in (
        ("steps", int, "N"), ("strength", float, "R"), ("guidance-scale", float, "G"), ("mask-strength", float, "S"),
        ("maps", int, "N"), ("mask-clip", clip_value, "C"), ("mask-threshold", float, "T"), ("refine", int, "K"),
    ):  # fmt: skip
        group.add_argument(f"--{name}", type=kind, metavar=letter)
    group.add_argument("--encode-text", choices=("null", "source"))
    group.add_argument("--no-paste", dest="paste", action="store_false")


def spelled(name: str) -> str:
    return name.replace("_", "-")


def axis(text: str) -> tuple[str, tuple[Any, ...]]:
    name, sign, values = text.partition("=")
    kind = KINDS.get(name.strip().replace("-", "_"))
    if not sign or kind is None:
        names = ", ".join(spelled(name) for name in KINDS)
        raise argparse.ArgumentTypeError(f"NAME=VALUE,VALUE,... is wanted, NAME one of {names}; got {text!r}")
    return name.strip().replace("-", "_"), listed(values, kind)


def listed(text: str, kind: Any) -> tuple[Any, ...]:
    try:
        return tuple(kind(one.strip()) for one in text.split(","))
    except ValueError:
        kinds = "whole numbers" if kind is int else "numbers"
        raise argparse.ArgumentTypeError(f"{kinds}, parted by commas, are wanted, got {text!r}") from None


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that are arguments of `edit` and were given."""
    from ..files.states import ARGUMENTS

    unset = {"size": None, "seed": None, "chunk": None}
    given = {name: one for name, one in vars(args).items() if name in ARGUMENTS}
    return {name: one for name, one in given.items() if name not in unset or one is not None}


def check_height(args: argparse.Namespace) -> None:
    from ..ddim import whole

    if args.height is not None:
        whole("height", args.height, 64, 1024)


def run_sheet(args: argparse.Namespace) -> dict[str, Any]:
    from ..files.images import write_picture
    from ..views.sheet import AXES, contact_sheet, planned, sheet_rows, value
    from ..views.watch import check_folder

    rows = args.rows or ("strength", AXES["strength"])
    columns = args.columns or ("mask_threshold", AXES["mask_threshold"])
    options = given_settings(args)
    cells, settings = planned(options, rows, columns, given=args.mask is not None)
    check_height(args)
    picture, output = picture_and_output(args, "sheet")
    if args.save_edits:
        check_folder(args.save_edits)
    mask, steering = open_mask(args.mask), steering_of(args)
    cost = sheet_rows(cells, given=mask is not None)
    if args.dry_run:
        return {"evaluations": cost, "settings": settings}
    options |= {"seed": settings["seed"]} if "seed" in settings else {}
    sd = load(args)
    model = describe(sd)
    with progress(args.quiet, sd, cost) as track:
        done = contact_sheet(
            sd, picture, rows=rows, columns=columns, mask=mask, steering=steering, height=args.height, track=track,
            **options,
        )  # fmt: skip
    result = {"output": str(output)}
    if args.save_edits:
        args.save_edits.mkdir(exist_ok=True)
        for r, line in zip(rows[1], done.edits):
            for c, one in zip(columns[1], line):
                name = f"{spelled(rows[0])}-{value(r)}-{spelled(columns[0])}-{value(c)}.png"
                text = text_of(args, one.settings | identity(sd), args.target)
                write_picture(one.image, args.save_edits / name, text)
        result["edits"] = str(args.save_edits)
    coverage = [[one.coverage for one in line] for line in done.edits]
    return result | written(args, done, output, sd) | {"coverage": coverage, "model": model, "versions": versions()}


def run_figure(args: argparse.Namespace) -> dict[str, Any]:
    from ..views.figures import figure, figure_rows, planned_figure

    values = None
    if args.values is not None:
        try:
            values = listed(args.values, FIGURES[args.name])
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"--values: {error}") from error
    options = given_settings(args)
    if args.name != "reconstruction" and args.target is None:
        raise ValueError(f"the figure {args.name} needs --target")
    if args.decode and args.name != "latents":
        raise ValueError("--decode goes with the figure latents")
    options["target"] = args.target or ""
    settings, points = planned_figure(args.name, options, values)
    check_height(args)
    picture, output = picture_and_output(args, args.name)
    cost = figure_rows(args.name, settings, points)
    if args.dry_run:
        return {"evaluations": cost, "settings": settings}
    options["seed"] = settings["seed"]
    sd = load(args)
    model = describe(sd)
    with progress(args.quiet, sd, cost) as track:
        done = figure(
            sd, picture, args.name, values=values, height=args.height, decode=args.decode, track=track, **options
        )
    return {"output": str(output)} | written(args, done, output, sd) | {
        "numbers": done.numbers, "model": model, "versions": versions()
    }  # fmt: skip


def written(args: argparse.Namespace, done: Any, output: Path, sd: Any) -> dict[str, Any]:
    """The page, as a file, and what is said of it."""
    from ..files.images import write_picture
    from ..files.metadata import model_hash

    record = done.settings | identity(sd)
    if getattr(args, "mask", None):
        record["mask"] = model_hash(args.mask)
    write_picture(done.image, output, text_of(args, record, done.settings["target"]))
    return {"evaluations": done.evaluations, "seconds": done.seconds, "settings": record}


def say_page(result: dict[str, Any]) -> str:
    cost = say_cost(result["evaluations"])
    if "output" not in result:
        return cost
    files = [result[key] for key in ("output", "edits") if key in result]
    seed = result["settings"].get("seed")
    said = [cost, *([] if seed is None else [f"seed {seed}"]), f"{sum(result['seconds'].values()):.1f} s"]
    return "\n".join([*files, "; ".join(said)])
