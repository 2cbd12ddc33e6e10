"""edit, resume, mask and generate, for any method. All that can be checked is checked before a model is loaded."""

import argparse
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    Command,
    add_dry_run,
    add_given,
    add_image,
    add_method,
    add_model,
    add_no_metadata,
    add_options,
    add_steering,
    arguments,
    asked_plan,
    check_masks,
    check_outputs,
    dry_run,
    load,
    outcome,
    picture_and_output,
    predicted,
    progress,
    record_of,
    say_cost,
    settled_plan,
    steering_of,
    text_chunks,
)

if TYPE_CHECKING:
    from ..run import Plan, Result


def add_edit(parser: argparse.ArgumentParser, words: list[str]) -> None:
    settled = asked_plan(words)
    add_image(parser, "the edited picture (.png, .jpg, .webp; default: NAME-edited.png here)")
    add_method(parser, settled)
    add_files(parser, settled)
    add_running(parser)
    add_model(parser)


def add_files(parser: argparse.ArgumentParser, settled: "Plan") -> None:
    """What may be written beside the picture, and the steering of a mask that there is."""
    add_no_metadata(parser)
    group = parser.add_argument_group("files beside the picture")
    if settled.masked:
        group.add_argument("--save-mask", type=Path, metavar="FILE", help="the mask, at the picture's size")
    if "mask" in settled.functions and settled.steerable:
        group.add_argument("--save-heat", type=Path, metavar="FILE", help="the map that the mask is cut from")
    group.add_argument("--save-state", type=Path, metavar="FILE", help="all that was computed (.safetensors)")
    group.add_argument("--report", type=Path, metavar="FILE", help="a page (.html) that shows how the edit came about")
    group.add_argument("--decode-previews", action="store_true", help="in the page, some through the autoencoder too")
    parser.set_defaults(save_mask=None, save_heat=None)
    if settled.steerable:
        add_steering(parser)


def add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("while it runs")
    group.add_argument("--preview", type=Path, metavar="DIR", help="write what it is heading for into this new folder")
    group.add_argument("--preview-every", type=int, metavar="K", default=5, help="calls between two (%(default)s)")
    group.add_argument("--preview-decode", action="store_true", help="by the autoencoder: sharper, and slower")
    add_dry_run(parser)


def add_resume(parser: argparse.ArgumentParser, words: list[str]) -> None:
    from ..run import blank_plan

    parser.add_argument("state", type=Path, metavar="STATE", help="what `edit --save-state` wrote")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="(default: NAME-resumed.png here)")
    settled = saved_plan(words) or blank_plan("diffedit")
    add_given(parser, settled, needed=False)
    add_options(parser.add_argument_group("changes; what they leave as it was costs nothing"), settled, "size")
    add_files(parser, settled)
    add_running(parser)
    add_model(parser)


def saved_plan(words: list[str]) -> "Plan | None":
    """The plan of the state among the words, to know its options; what is wrong with it is said later."""
    from ..files.states import plan_of, read_record

    before = ["", *words]
    found = [word for last, word in zip(before, words) if word.endswith(".safetensors") and not last.startswith("-")]
    try:
        header, record = read_record(Path(found[0]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return plan_of(record, header)
    except (IndexError, ValueError, OSError):
        return None


def add_mask(parser: argparse.ArgumentParser, words: list[str]) -> None:
    from ..run import COMMON, INPUTS, function_at, inputs_of, options_of

    settled = asked_plan(words)
    if "mask" not in settled.functions:
        raise ValueError(f"{settled.method} finds no mask")
    place = settled.functions["mask"]
    own = options_of(function_at(place)).keys() | COMMON.keys() - {"paste"}
    read = {INPUTS[name].given for name in inputs_of(place)}
    settled = replace(settled, given={name: value for name, value in settled.given.items() if name in read})
    add_image(parser, "the mask, white = would be edited (default: NAME-mask.png here)")
    parser.add_argument("--method", metavar="NAME", default=settled.method, help="whose mask (%(default)s)")
    parser.set_defaults(inversion=None)
    add_given(parser, settled)
    add_options(parser.add_argument_group("options"), settled, *(settled.options.keys() - own))
    parser.add_argument("--save-heat", type=Path, metavar="FILE", help="also write the map the mask is cut from")
    add_dry_run(parser)
    add_steering(parser)
    add_model(parser)


def add_generate(parser: argparse.ArgumentParser, words: list[str]) -> None:
    from ..run import blank_plan

    parser.add_argument("target", metavar="TEXT", help="what to show")
    output = Path("generated.png")
    parser.add_argument("-o", "--output", type=Path, default=output, metavar="FILE", help="(%(default)s)")
    settled = blank_plan("text-to-image")
    parser.set_defaults(method=settled.method, inversion=None)
    parser.add_argument("--negative-prompt", metavar="TEXT", default="", help="what not to show")
    add_options(parser.add_argument_group("options"), settled, "paste", "size")
    parser.add_argument("--width", type=pixels, metavar="PX", help="a multiple of 8 (default: the training size)")
    parser.add_argument("--height", type=pixels, metavar="PX", help="the same")
    add_no_metadata(parser)
    add_dry_run(parser)
    add_model(parser)


def pixels(text: str) -> int:
    if not text.isdecimal() or int(text) < 64 or int(text) % 8:
        raise argparse.ArgumentTypeError(f"a multiple of 8 from 64 is wanted, got {text!r}")
    return int(text)


# ---------------------------------------------------------------- running them


def run_edit(args: argparse.Namespace) -> dict[str, Any]:
    from ..run import execute

    settled = settled_plan(args)
    picture, output = picture_and_output(args, "edited", args.save_mask, args.save_heat)
    steering = steering_of(args)
    check_files(args)
    (rows,) = predicted(args, settled)
    if args.dry_run:
        return dry_run(settled, rows)
    sd = load(args)
    with progress(args.quiet, rows, *previews(args, sd, picture)) as watch:
        done = execute(settled, sd, picture, steering=steering, watch=watch)
    return written(args, done, output, rows)


def run_resume(args: argparse.Namespace) -> dict[str, Any]:
    from ..files.states import load_state, plan_of, read_record
    from ..run import changed, resume

    header, record = read_record(args.state)
    name_model(args, record)
    old = plan_of(record, header)
    changes = arguments(args, old)
    mask = changes.pop("mask", None)
    settled, _ = changed(old, changes, mask)
    height, width, _ = header["source"].shape
    output = args.output or Path(f"{args.state.stem}-resumed.png")
    inputs = [args.state, *(getattr(args, name, None) for name in ("mask", "union", "subtract"))]
    outputs = [output, args.save_mask, args.save_heat]
    check_outputs(inputs, outputs, (width, height), args.save_state, args.report)
    check_masks(args, (width, height), record["settings"]["working_size"])
    steering = steering_of(args)
    check_files(args)
    _, rows = predicted(args, old, settled)
    if args.dry_run:
        return dry_run(settled, rows)
    sd = load_named(args, record)
    state = load_state(args.state, sd)
    with progress(args.quiet, rows, *previews(args, sd, state.source)) as watch:
        done = resume(state, mask=mask, steering=steering, watch=watch, **changes)
    return written(args, done, output, rows)


def run_mask(args: argparse.Namespace) -> dict[str, Any]:
    from ..files.images import grey_picture, write_picture
    from ..run import execute_mask

    settled = settled_plan(args)
    picture, output = picture_and_output(args, "mask", args.save_heat)
    steering = steering_of(args)
    rows = {"mask": predicted(args, settled)[0]["mask"]}
    if args.dry_run:
        return dry_run(settled, rows)
    sd = load(args)
    with progress(args.quiet, rows) as watch:
        done = execute_mask(settled, sd, picture, steering=steering, watch=watch)
    assert done.mask
    write_picture(done.mask, output)
    result = {"output": str(output)}
    if args.save_heat and done.heat is not None:
        write_picture(grey_picture(done.heat, picture.size), args.save_heat)
        result["heat"] = str(args.save_heat)
    return result | outcome(done, rows, record_of(args, done))


def run_generate(args: argparse.Namespace) -> dict[str, Any]:
    from ..files.images import write_picture
    from ..run import execute_without_picture, picture_size

    settled = settled_plan(args)
    picture_size(args.width, args.height, 512, 8)
    check_outputs([], [args.output])
    (rows,) = predicted(args, settled)
    if args.dry_run:
        return dry_run(settled, rows)
    sd = load(args)
    with progress(args.quiet, rows) as watch:
        done = execute_without_picture(settled, sd, (args.width, args.height), watch)
    record = record_of(args, done)
    write_picture(done.image, args.output, text_chunks(args, record))
    return {"output": str(args.output)} | outcome(done, rows, record)


def name_model(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Where the options name no model: the hub id that the state names, from the cache, never the hub; the VAE too."""
    from ..files.hub import MINI, is_id

    name, vae = record.get("model_name", ""), record.get("vae_name", "")
    if args.model is None and (is_id(name) or name == MINI):
        args.model, args.local_files_only = name, True
        args.vae = args.vae or (vae if is_id(vae) or vae == MINI else None)


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


def check_files(args: argparse.Namespace) -> None:
    """What is wanted beside the picture must be there to be written."""
    from ..ddim import whole
    from ..views.previews import check_folder

    if args.save_heat and getattr(args, "mask", None):
        raise ValueError("--save-heat goes without --mask: under your own mask no map is sought")
    if args.decode_previews and not args.report:
        raise ValueError("--decode-previews goes with --report")
    whole("preview_every", args.preview_every, 1, 999)
    if args.preview:
        check_folder(args.preview)


def previews(args: argparse.Namespace, sd: Any, picture: Any) -> list[Any]:
    """The watcher that --preview asks for, if it does."""
    from ..views.previews import Previews

    options: dict[str, Any] = {"every": args.preview_every, "decode": args.preview_decode}
    return [Previews(sd, picture, args.preview, **options)] if args.preview else []


def written(args: argparse.Namespace, done: "Result", output: Path, rows: dict[str, int]) -> dict[str, Any]:
    """Every file that was asked for, and what is said of the run."""
    from ..files.images import grey_picture, write_picture
    from ..files.states import save_state
    from ..views.report import save_report

    record = record_of(args, done)
    write_picture(done.image, output, text_chunks(args, record))
    result = {"output": str(output)}
    if args.save_mask and done.mask:
        write_picture(done.mask, args.save_mask)
        result["mask"] = str(args.save_mask)
    if args.save_heat and done.heat is not None and done.source:
        write_picture(grey_picture(done.heat, done.source.size), args.save_heat)
        result["heat"] = str(args.save_heat)
    if args.save_mask and done.mask is None:
        warnings.warn(f"{args.save_mask} is not written: {done.method} used no mask", stacklevel=2)
    if args.save_heat and done.heat is None:
        warnings.warn(f"{args.save_heat} is not written: no mask was sought", stacklevel=2)
    if args.save_state:
        save_state(done, args.save_state)
        result["state"] = str(args.save_state)
    if args.report:
        picture = getattr(args, "picture", None) or getattr(args, "image", None)  # of a resumed edit, none
        save_report(done, args.report, picture=picture, state=args.save_state, decode_previews=args.decode_previews)
        result["report"] = str(args.report)
    return result | outcome(done, rows, record)


def say_edit(result: dict[str, Any]) -> str:
    if "output" not in result:
        return say_cost(result["evaluations"])
    rows = " + ".join(str(n) for n in result["evaluations"].values())
    lines = [result[key] for key in ("output", "mask", "heat", "state", "report") if key in result]
    mask = "" if result["coverage"] is None else f"mask: {result['verdict']}, {result['coverage']:.0%} of the picture; "
    lines.append(f"{mask}seed {result['seed']}; UNet rows {rows}; {sum(result['seconds'].values()):.1f} s")
    return "\n".join(lines)


COMMANDS = {
    "edit": Command("edit a picture by text, by any method", add_edit, run_edit, say_edit),
    "resume": Command("go on from a saved edit; only changes are paid for", add_resume, run_resume, say_edit),
    "mask": Command("find the mask of an edit, without the edit", add_mask, run_mask, say_edit),
    "generate": Command("make a picture from text alone", add_generate, run_generate, say_edit),
}
