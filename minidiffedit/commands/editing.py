"""edit, resume and mask. All that can be checked is checked before a model is loaded."""

import argparse
import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .common import (
    add_command,
    add_dry_run,
    add_mask_options,
    add_model,
    add_picture,
    add_sampling,
    add_steering,
    check_masks,
    check_outputs,
    checked_settings,
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


def add(commands: Any) -> None:
    edit = add_command(commands, "edit", run_edit, say_edit, "edit a picture by text")
    add_picture(edit, "the edited picture (.png, .jpg, .webp; default: NAME-edited.png here)", several=True)
    edit.add_argument("--negative-prompt", default="", metavar="TEXT", help="what the edit leads away from")
    edit.add_argument(
        "--strength", type=float, default=0.8, metavar="R",
        help="how far up the noise the picture is encoded, 0..1; less keeps more of it (%(default)s)",
    )  # fmt: skip
    add_sampling(edit)
    edit.add_argument(
        "--encode-text", choices=("null", "source"), default="null",
        help="text of the encoding: none, as in the paper, or the source (%(default)s)",
    )  # fmt: skip
    edit.add_argument(
        "--refine",
        type=int,
        default=1,
        metavar="K",
        help="calls per encoding step, 2 is more exact (%(default)s)",
    )
    edit.add_argument(
        "--no-paste", dest="paste", action="store_false", help="do not put the input's pixels back outside the mask"
    )
    edit.add_argument("--no-metadata", action="store_true", help="write no settings into the picture")
    add_save_state(edit)
    add_running(edit)
    group = add_mask_options(edit)
    group.add_argument("--save-mask", type=Path, metavar="FILE", help="also write the mask, at the picture's size")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--save-heat", type=Path, metavar="FILE", help="also write the map the mask is cut from")
    either.add_argument("--mask", type=Path, metavar="FILE", help="your mask instead: white = edited, grey = partly")
    add_steering(edit)
    add_model(edit)

    resume = add_command(commands, "resume", run_resume, say_edit, "go on from a saved edit; only changes are paid for")
    resume.add_argument("state", type=Path, metavar="STATE", help="what `edit --save-state` wrote")
    resume.add_argument("-o", "--output", type=Path, metavar="FILE", help="(default: NAME-resumed.png here)")
    add_changes(resume)
    resume.add_argument("--no-metadata", action="store_true", help="write no settings into the picture")
    resume.add_argument("--save-mask", type=Path, metavar="FILE", help="also write the mask, at the picture's size")
    either = resume.add_mutually_exclusive_group()
    either.add_argument("--save-heat", type=Path, metavar="FILE", help="also write the map the mask is cut from")
    either.add_argument("--mask", type=Path, metavar="FILE", help="your mask instead: white = edited, grey = partly")
    add_save_state(resume)
    add_running(resume)
    add_steering(resume)
    add_model(resume)

    mask = add_command(commands, "mask", run_mask, say_edit, "find the mask of an edit, without the edit")
    add_picture(mask, "the mask, white = would be edited (default: NAME-mask.png here)")
    mask.add_argument(
        "--steps", type=int, default=50, metavar="N", help="sampling steps that set the levels, 1..999 (%(default)s)"
    )
    group = add_mask_options(mask)
    group.add_argument("--save-heat", type=Path, metavar="FILE", help="also write the map the mask is cut from")
    add_dry_run(mask)
    add_steering(mask)
    add_model(mask)


def add_changes(parser: argparse.ArgumentParser) -> None:
    """Settings of a saved edit that may change; those not given are not set, so that the state's hold."""
    group = parser.add_argument_group("changes", argument_default=argparse.SUPPRESS)
    for option, what in (("target", "shall show"), ("source", "showed before"), ("negative-prompt", "leads away from")):
        group.add_argument(f"--{option}", metavar="TEXT", help=f"what the edit {what}")
    group.add_argument("--strength", type=float, metavar="R", help="less than before costs no encoding")
    group.add_argument("--guidance-scale", type=float, metavar="G", help="how strictly to follow the text")
    group.add_argument("--mask-threshold", type=float, metavar="T", help="0..1; costs nothing for the mask")
    group.add_argument("--mask-clip", type=clip_value, metavar="C", help="a number or none; costs nothing for the mask")


def add_save_state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--save-state", type=Path, metavar="FILE", help="also write all that was computed (.safetensors), for `resume`"
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="also write a page (.html) that shows how the edit came about"
    )
    parser.add_argument(
        "--decode-previews", action="store_true", help="in the page, some predictions through the autoencoder too"
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preview", type=Path, metavar="DIR", help="while it runs, write what it is heading for into this new folder"
    )
    parser.add_argument(
        "--preview-every", type=int, metavar="K", default=5, help="levels from one preview to the next (%(default)s)"
    )
    parser.add_argument(
        "--preview-decode", action="store_true", help="previews by the autoencoder: sharper, and slower"
    )
    add_dry_run(parser)


def run_edit(args: argparse.Namespace) -> dict[str, Any]:
    from ..editor import edit, predicted_rows
    from ..files.images import read_mask

    if args.edits:
        return run_edits(args)
    settings = checked_settings(args, edit)
    picture, output = picture_and_output(args, "edited", args.save_mask, args.save_heat)
    mask, steering = open_mask(args.mask), steering_of(args)
    check_preview(args)
    nothing = mask is not None and steering is None and not read_mask(mask).any()
    rows = predicted_rows(settings, given=mask is not None, nothing=nothing)
    if args.dry_run:
        return {"evaluations": rows, "settings": settings}
    sd = load(args)
    model = describe(sd)
    with watched(args, sd, rows, picture, settings["steps"]) as seen:
        done = edit(sd, picture, mask=mask, steering=steering, **seen, **settings)
    return write_edit(args, done, output) | {"model": model, "versions": versions()}


def run_edits(args: argparse.Namespace) -> dict[str, Any]:
    from ..files.images import write_picture
    from ..regions import check_edits, edit_regions, predicted_rows

    unset = {"source": "", "encode_text": "null", "largest": False, "invert": False}
    unset |= dict.fromkeys(("mask", "save_heat", "save_state", "dilate", "feather", "union", "subtract", "preview"))
    unset |= {"report": None, "decode_previews": False}
    for name, value in unset.items():
        if getattr(args, name) != value:
            raise ValueError(f"--{name.replace('_', '-')} goes with --target, not with --edit")
    settings = checked_settings(args, edit_regions)
    pairs = check_edits(settings.pop("edits"))
    picture, output = picture_and_output(args, "edited", args.save_mask)
    rows = predicted_rows(settings, pairs)
    if args.dry_run:
        return {"evaluations": rows, "settings": settings | {"edits": pairs}}
    sd = load(args)
    model = describe(sd)
    with progress(args.quiet, sd, rows) as track:
        done = edit_regions(sd, picture, pairs, track=track, **settings)
    record = done.settings | identity(sd)
    # An empty source tells metadata that a picture was edited, not made.
    write_picture(done.image, output, text_of(args, record | {"source": ""}, "; ".join(b for _, b in pairs)))
    result = {"output": str(output)}
    if args.save_mask:
        write_picture(done.mask, args.save_mask)
        result["mask"] = str(args.save_mask)
    return result | {
        "seed": done.seed, "coverage": sum(done.coverage), "verdict": f"{sum(c > 0 for c in done.coverage)} found",
        "evaluations": done.evaluations, "seconds": done.seconds, "settings": record, "model": model,
        "versions": versions(),
    }  # fmt: skip


def run_resume(args: argparse.Namespace) -> dict[str, Any]:
    from ..editor import check_settings
    from ..files.images import read_mask
    from ..files.states import ARGUMENTS, load_state, read_record, resume, resumed_rows

    header, record = read_record(args.state)
    name_model(args, record)
    changes = {name: value for name, value in vars(args).items() if name in ARGUMENTS}
    settings = check_settings({name: record["settings"][name] for name in ARGUMENTS} | changes)
    height, width, _ = header["source"].shape
    output = args.output or Path(f"{args.state.stem}-resumed.png")
    inputs, outputs = [args.state, args.mask, args.union, args.subtract], [output, args.save_mask, args.save_heat]
    check_outputs(inputs, outputs, (width, height), args.save_state, args.report)
    check_masks(args, (width, height), record["settings"]["working_size"])
    mask, steering = open_mask(args.mask), steering_of(args)
    check_preview(args)
    nothing = mask is not None and steering is record["steering"] is None and not read_mask(mask).any()
    rows = resumed_rows(header, record, changes, given=mask is not None, nothing=nothing)
    if args.dry_run:
        return {"evaluations": rows, "settings": settings}
    sd = load_named(args, record)
    model = describe(sd)
    state = load_state(args.state, sd)
    with watched(args, sd, rows, state.source, settings["steps"]) as seen:
        done = resume(state, mask=mask, steering=steering, **seen, **changes)
    return write_edit(args, done, output) | {"model": model, "versions": versions()}


def name_model(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Where the options name no model: the hub id that the state names, from the cache, never the hub."""
    from ..files.hub import is_id

    if args.model is None and is_id(record.get("model_name", "")):
        args.model, args.local_files_only = record["model_name"], True


def load_named(args: argparse.Namespace, record: dict[str, Any]) -> Any:
    """A path that a state names is told, not opened: the file may come from anybody."""
    if args.model is None:
        made_with = f"was made with the model {name}" if (name := record.get("model_name")) else "names no model"
        raise ValueError(f"{args.state} {made_with}; give it with --model" + (f" {name}" if name else ""))
    try:
        return load(args)
    except OSError as error:
        if args.model != record.get("model_name"):
            raise
        raise OSError(f"{args.state} was made with the model {args.model}, which cannot be had: {error}") from error


def check_preview(args: argparse.Namespace) -> None:
    from ..ddim import whole
    from ..views.watch import check_folder

    if args.decode_previews and not args.report:
        raise ValueError("--decode-previews goes with --report")
    whole("preview_every", args.preview_every, 1, 999)
    if args.preview:
        check_folder(args.preview)


@contextlib.contextmanager
def watched(args: argparse.Namespace, sd: Any, rows: dict[str, int], picture: Any, steps: int) -> Iterator[Any]:
    """Arguments for `edit` that show how far it is and, where --preview asks for it, what it is heading for."""
    from ..views.watch import Watch

    with progress(args.quiet, sd, rows) as track:
        if args.preview is None:
            yield {"track": track}
        else:
            options: dict[str, Any] = {"every": args.preview_every, "decode": args.preview_decode}
            watch = Watch(sd, picture, args.preview, steps=steps, **options)
            yield {"track": watch.track(track), "record": watch.record}


def write_edit(args: argparse.Namespace, done: Any, output: Path) -> dict[str, Any]:
    """Every file that was asked for, and what the result says of the edit."""
    from ..files.images import grey_picture, write_picture
    from ..files.metadata import model_hash
    from ..files.states import save_state

    if args.mask:
        done.settings["mask"] = model_hash(args.mask)
    record = done.settings | identity(done.sd)
    write_picture(done.image, output, text_of(args, record, done.settings["target"]))
    result = {"output": str(output)}
    if args.save_mask:
        write_picture(done.mask, args.save_mask)
        result["mask"] = str(args.save_mask)
    if args.save_heat and done.heat is None:
        warnings.warn(f"{args.save_heat} is not written: no mask was sought", stacklevel=2)
    elif args.save_heat:
        write_picture(grey_picture(done.heat, done.source.size), args.save_heat)
        result["heat"] = str(args.save_heat)
    if args.save_state:
        save_state(done, args.save_state)
        result["state"] = str(args.save_state)
    if args.report:
        from ..views.report import save_report

        picture = getattr(args, "picture", None) or getattr(args, "image", None)  # of a resumed edit, none
        options: dict[str, Any] = {"state": args.save_state, "decode_previews": args.decode_previews}
        save_report(done, args.report, picture=picture, **options)
        result["report"] = str(args.report)
    return result | {
        "seed": done.seed, "coverage": done.coverage, "verdict": done.verdict, "evaluations": done.evaluations,
        "seconds": done.seconds, "settings": record,
    }  # fmt: skip


def run_mask(args: argparse.Namespace) -> dict[str, Any]:
    from ..editor import picture_mask
    from ..files.images import write_picture

    settings = checked_settings(args, picture_mask)
    picture, output = picture_and_output(args, "mask", args.save_heat)
    steering = steering_of(args)
    rows = {"mask": 0 if settings["target"] == settings["source"] else 2 * settings["maps"]}
    if args.dry_run:
        return {"evaluations": rows, "settings": settings}
    sd = load(args)
    model = describe(sd)
    with progress(args.quiet, sd, rows) as track:
        done = picture_mask(sd, picture, steering=steering, track=track, **settings)
    write_picture(done.mask, output)
    result = {"output": str(output)}
    if args.save_heat:
        write_picture(done.heat, args.save_heat)
        result["heat"] = str(args.save_heat)
    return result | {
        "seed": done.seed, "coverage": done.coverage, "verdict": done.found.verdict[0],
        "evaluations": done.evaluations, "seconds": done.seconds, "settings": done.settings | identity(sd),
        "model": model, "versions": versions(),
    }  # fmt: skip


def say_edit(result: dict[str, Any]) -> str:
    if "output" not in result:
        return say_cost(result["evaluations"])
    rows = " + ".join(str(n) for n in result["evaluations"].values())
    lines = [result[key] for key in ("output", "mask", "heat", "state", "report") if key in result]
    lines.append(
        f"mask: {result['verdict']}, {result['coverage']:.0%} of the picture; seed {result['seed']}; "
        f"UNet rows {rows}; {sum(result['seconds'].values()):.1f} s"
    )
    return "\n".join(lines)
