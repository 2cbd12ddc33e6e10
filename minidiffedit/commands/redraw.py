"""sdedit and generate."""

import argparse
from pathlib import Path
from typing import Any

from .common import (
    add_command,
    add_input,
    add_model,
    add_sampling,
    add_seed,
    check_outputs,
    checked_settings,
    describe,
    identity,
    load,
    open_mask,
    picture_and_output,
    pixels,
    progress,
    text_of,
    versions,
)


def add(commands: Any) -> None:
    sdedit = add_command(
        commands, "sdedit", run_sdedit, say_generate, "redraw a picture, or strokes, under noise and text"
    )
    add_input(sdedit, "the redrawn picture (.png, .jpg, .webp; default: NAME-sdedit.png here)")
    sdedit.add_argument("--target", default="", metavar="TEXT", help="what the result shall show (may be left out)")
    sdedit.add_argument("--negative-prompt", default="", metavar="TEXT", help="what the result leads away from")
    sdedit.add_argument(
        "--strength", type=float, default=0.5, metavar="R", help="how much noise, 0..1; less keeps more (%(default)s)"
    )
    sdedit.add_argument(
        "--eta", type=float, default=0.0, metavar="E", help="0: deterministic steps, 1: ancestral (%(default)s)"
    )
    sdedit.add_argument(
        "--repeats", type=int, default=1, metavar="K", help="times that noise is laid and taken away (%(default)s)"
    )
    add_sampling(sdedit)
    sdedit.add_argument("--mask", type=Path, metavar="FILE", help="redraw where it is white; grey = partly")
    sdedit.add_argument(
        "--no-paste", dest="paste", action="store_false", help="do not put the input's pixels back outside the mask"
    )
    sdedit.add_argument("--no-metadata", action="store_true", help="write no settings into the picture")
    add_model(sdedit)

    generate = add_command(commands, "generate", run_generate, say_generate, "make a picture from text alone")
    generate.add_argument("prompt", metavar="TEXT", help="what to show")
    generate.add_argument(
        "-o", "--output", type=Path, default=Path("generated.png"), metavar="FILE", help="(%(default)s)"
    )
    generate.add_argument("--negative-prompt", default="", metavar="TEXT", help="what not to show")
    add_seed(generate)
    add_sampling(generate)
    generate.add_argument("--width", type=pixels, metavar="PX", help="a multiple of 8 (default: the training size)")
    generate.add_argument("--height", type=pixels, metavar="PX", help="the same")
    generate.add_argument("--no-metadata", action="store_true", help="write no settings into the picture")
    add_model(generate)


def run_sdedit(args: argparse.Namespace) -> dict[str, Any]:
    from ..arms import check_redraw, redrawn_rows, sdedit
    from ..files.images import write_picture

    settings = check_redraw(checked_settings(args, sdedit))
    picture, output = picture_and_output(args, "sdedit")
    mask = open_mask(args.mask) if args.mask else None
    sd = load(args)
    model = describe(sd)
    with progress(args.quiet, sd, redrawn_rows(settings)) as track:
        done = sdedit(sd, picture, mask=mask, track=track, **settings)
    record = done.settings | identity(sd)
    if args.mask:
        from ..files.metadata import model_hash

        record["mask"] = model_hash(args.mask)
    # An empty source tells metadata that a picture was edited, not made.
    write_picture(done.image, output, text_of(args, record | {"source": ""}, args.target))
    return {
        "output": str(output), "seed": done.seed, "evaluations": done.evaluations, "seconds": done.seconds,
        "settings": record, "model": model, "versions": versions(),
    }  # fmt: skip


def run_generate(args: argparse.Namespace) -> dict[str, Any]:
    from ..editor import generate
    from ..files.images import write_picture

    settings = checked_settings(args, generate)
    check_outputs([], [args.output])
    sd = load(args)
    model = describe(sd)
    with progress(args.quiet, sd, {"generate": settings["steps"] * (1 + (settings["guidance_scale"] != 1))}) as track:
        done = generate(sd, track=track, **settings)
    record = done.settings | {"working_size": done.image.size} | identity(sd)
    write_picture(done.image, args.output, text_of(args, record, args.prompt))
    return {
        "output": str(args.output), "seed": done.seed, "evaluations": done.evaluations, "seconds": done.seconds,
        "settings": record, "model": model, "versions": versions(),
    }  # fmt: skip


def say_generate(result: dict[str, Any]) -> str:
    return f"{result['output']}\nseed {result['seed']}; {sum(result['seconds'].values()):.1f} s"
