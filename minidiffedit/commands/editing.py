"""edit, resume, mask and generate, for any method. All that can be checked is checked before a model is loaded."""

import argparse
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..ddim import whole
from ..files.hub import MINI, is_id
from ..files.images import grey_picture, write_picture
from ..files.results import MARK, free, settings_in
from ..files.states import load_state, plan_of, read_record, save_state, shows_source
from ..options import options_of
from ..plans import COMMON, CROPS, GIVEN, INPUTS, Plan, blank_plan, changed, function_at, inputs_of, parts_of
from ..result import Result
from ..run import execute, execute_mask, execute_without_picture, picture_size, resume
from ..views.previews import Previews, check_folder
from ..views.report import save_report
from ..views.witness import Witness
from . import OWN, common, flag, shown


def add_edit(parser: argparse.ArgumentParser, words: list[str]) -> None:
    like = liked(words)
    settled = common.asked_plan([*like.get("method", []), *words])
    common.add_image(parser, "the edited picture (.png, .jpg, .webp; default: NAME-edited.png here)")
    about = "N candidates of seeds one after another, and a sheet of them (default: NAME-candidates.png and beside it)"
    parser.add_argument("-n", "--count", type=int, default=1, metavar="N", help=about)
    about = "take the settings of this earlier result, and its model if that has a name; what is said besides holds"
    parser.add_argument("--like", type=Path, metavar="RESULT", help=about)
    common.add_method(parser, settled)
    common.add_mask_from(parser)
    add_files(parser, settled)
    add_running(parser)
    common.add_model(parser)
    take(parser, settled, like.get("settings", {}), words)


def liked(words: list[str]) -> dict[str, Any]:
    """Of the result that --like names: "settings", and "method" as words for a parser."""
    known = common.early(words, like={"type": Path}, inversion={}, mask_from={})
    if known.like is None:
        return {}
    settings = settings_in(known.like)
    if not isinstance(method := settings.get("method"), str):
        why = "holds no settings of an edit" if os.path.isfile(known.like) else "no such file"
        raise ValueError(f"{known.like}: {why}; --like takes a picture that `minidiffedit edit` wrote")
    inversion, mask, name = parts_of(method)  # what the words say besides holds
    parts = "" if known.inversion else inversion, "" if known.mask_from else mask, name
    return {"settings": settings, "method": [f"--method={'+'.join(filter(None, parts))}"]}


def take(parser: argparse.ArgumentParser, settled: Plan, settings: dict[str, Any], words: list[str]) -> None:
    """Make settings of an earlier run the parser's defaults, but for what the words say themselves; where it was one of
    another method, what differs from that one's defaults.
    """
    said = {word.partition("=")[0].replace("--no-", "--") for word in words}
    plain = {name for name in settled.given if GIVEN[name].kind in ("text", "pairs", "points")}
    steering = told if isinstance(told := settings.get("steering"), dict) and settled.steerable else {}
    other = settings and settings["method"] != settled.method
    usual = dict.fromkeys(settled.needs, "") | blank_plan(settings["method"]).settings if other else {}
    found = {n: one for n, one in settings.items() if n in plain or n in settled.options}
    found = {n: one for n, one in found.items() if n not in usual or one != usual[n]}
    found |= {name: steering[name] for name in {*common.steering_names()} & steering.keys() - {"union", "subtract"}}
    found = {name: value for name, value in found.items() if flag(name) not in said}
    for action in parser._actions:
        action.required = action.required and action.dest not in found
    taken = {"method": settled.method} | found
    no_file = (None, "none", "computed", "everywhere")
    files = [name for name in settled.given if name not in plain and settings.get(name) not in no_file]
    files += sorted({"union", "subtract"} & steering.keys())
    lacking = [name for name in files if flag(name) not in said]
    parser.set_defaults(**found, liked=settings, taken=taken if settings else {}, lacking=lacking)


def say_taken(args: argparse.Namespace) -> None:
    before = args.model
    name_model(args, {f"{one}_name": name for one in ("model", "vae") if isinstance(name := args.liked.get(one), str)})
    if args.taken and not args.quiet:
        taken = args.taken | ({"model": args.model} if args.model != before else {})
        values = [f"{name} {value}" for name, value in taken.items() if value not in (None, "")]
        common.say_note(shown(f"like {args.like}: {', '.join(values)}"))
    there = vars(args) | {"mask": getattr(args, "mask", None) or args.mask_from}  # a hole may be the mask
    for name in [one for one in args.lacking if not there.get(one)]:
        said = f"{args.like} was made with a {name} of its own, which is not in it: give it with {flag(name)}"
        warnings.warn(said, stacklevel=2)


def add_files(parser: argparse.ArgumentParser, settled: Plan) -> None:
    """What may be written beside the picture, and the steering of a mask that there is."""
    common.add_no_metadata(parser)
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
        common.add_steering(parser)


def add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("while it runs")
    group.add_argument("--preview", type=Path, metavar="DIR", help="write what it is heading for into this new folder")
    group.add_argument("--preview-every", type=int, metavar="K", help="calls between two (5)")
    group.add_argument("--preview-decode", action="store_true", help="by the autoencoder: sharper, and slower")
    common.add_dry_run(parser)


def add_resume(parser: argparse.ArgumentParser, words: list[str]) -> None:
    parser.add_argument("state", type=Path, metavar="STATE", help="what `edit --save-state` wrote")
    common.add_output(parser, "the edited picture (default: NAME-resumed.png here)")
    settled = saved_plan(words) or blank_plan("diffedit")
    common.add_given(parser, settled, needed=False)
    common.add_options(parser.add_argument_group("changes; what they leave as it was costs nothing"), settled, "size")
    add_files(parser, settled)
    add_running(parser)
    common.add_model(parser)


def saved_plan(words: list[str]) -> Plan | None:
    """The plan of the state among the words, to know its options; what is wrong with it is said later."""
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
    settled = common.asked_plan(words)
    if "mask" not in settled.functions:
        raise ValueError(f"{settled.method} finds no mask")
    place = settled.functions["mask"]
    own = options_of(function_at(place)).keys() | COMMON.keys() - {"paste", *CROPS}
    read = {INPUTS[name].given for name in inputs_of(place)}
    settled = replace(settled, given={name: value for name, value in settled.given.items() if name in read})
    common.add_image(parser, "the mask, white = would be edited (default: NAME-mask.png here)")
    parser.add_argument("--method", metavar="NAME", default=settled.method, help="whose mask (%(default)s)")
    common.add_mask_from(parser)
    parser.set_defaults(inversion=None)
    common.add_given(parser, settled)
    common.add_options(parser.add_argument_group(OWN), settled, *(settled.options.keys() - own))
    parser.add_argument("--save-heat", type=Path, metavar="FILE", help="also write the map the mask is cut from")
    common.add_dry_run(parser)
    common.add_steering(parser)
    common.add_model(parser)


def add_generate(parser: argparse.ArgumentParser, words: list[str]) -> None:
    parser.add_argument("target", metavar="TEXT", help="what to show")
    common.add_output(parser, "the picture (default: generated.png here)")
    settled = blank_plan("text-to-image")
    parser.set_defaults(method=settled.method, inversion=None)
    parser.add_argument("--negative-prompt", metavar="TEXT", default="", help="what not to show")
    common.add_options(parser.add_argument_group(OWN), settled, "paste", "size")
    parser.add_argument("--width", type=pixels, metavar="PX", help="a multiple of 8 (default: the training size)")
    parser.add_argument("--height", type=pixels, metavar="PX", help="the same")
    common.add_no_metadata(parser)
    common.add_dry_run(parser)
    common.add_model(parser)


def pixels(text: str) -> int:
    if not text.isdecimal() or int(text) < 64 or int(text) % 8:
        raise argparse.ArgumentTypeError(f"a multiple of 8 from 64 is wanted, got {text!r}")
    return int(text)


# ---------------------------------------------------------------- running them


def run_edit(args: argparse.Namespace) -> dict[str, Any]:
    common.take_hole(args, blank_plan(args.method, args.inversion))
    settled = common.settled_plan(args)
    say_taken(args)
    if args.count != 1:
        from .pages import run_candidates, say_page

        args.say = say_page
        return run_candidates(args, settled)
    picture, output = common.picture_and_output(args, "edited", args.save_mask, args.save_heat)
    steering = common.steering_of(args)
    check_files(args)
    (rows,) = common.predicted(args, settled)
    common.say_idle(args, settled)
    if args.dry_run:
        return common.dry_run(args, [settled], rows, picture.size)
    sd = common.load(args)
    with common.progress(args.quiet, rows, *previews(args, sd, picture)) as watch:
        done = execute(settled, sd, picture, steering=steering, watch=watch, witness=witness(args))
    return written(args, done, output, rows)


def run_resume(args: argparse.Namespace) -> dict[str, Any]:
    header, record = read_record(args.state)
    name_model(args, record)
    old = plan_of(record, header)
    changes = common.arguments(args, old)
    mask = changes.pop("mask", None)
    settled, _ = changed(old, changes, mask)
    height, width, _ = header["source"].shape
    output = args.output or free(Path(f"{args.state.stem}-resumed.png"))
    inputs = [args.state, *(getattr(args, name, None) for name in ("mask", "union", "subtract"))]
    outputs = [output, args.save_mask, args.save_heat]
    common.check_outputs(args, inputs, outputs, (width, height), args.save_state, args.report)
    for path in filter(None, outputs):
        if shows_source(args.state, path):
            raise ValueError(f"{path} is the picture that {args.state} was made of; choose another name")
    common.check_masks(args, (width, height), record["settings"]["working_size"])
    steering = common.steering_of(args)
    check_files(args)
    (rows,) = common.predicted(args, settled, old=old)
    if args.dry_run:
        return common.dry_run(args, [settled], rows, (width, height))
    sd = load_named(args, record)
    state = load_state(args.state, sd)
    with common.progress(args.quiet, rows, *previews(args, sd, state.source)) as watch:
        done = resume(state, mask=mask, steering=steering, watch=watch, witness=witness(args), **changes)
    return written(args, done, output, rows)


def run_mask(args: argparse.Namespace) -> dict[str, Any]:
    settled = common.settled_plan(args)
    picture, output = common.picture_and_output(args, "mask", args.save_heat)
    steering = common.steering_of(args)
    rows = {"mask": common.predicted(args, settled)[0]["mask"]}
    if args.dry_run:
        return common.dry_run(args, [settled], rows, picture.size)
    sd = common.load(args)
    with common.progress(args.quiet, rows) as watch:
        done = execute_mask(settled, sd, picture, steering=steering, watch=watch)
    assert done.mask
    write_picture(done.mask, output, MARK)
    result = {"output": str(output)}
    if args.save_heat and done.heat is not None:
        write_picture(grey_picture(done.heat, picture.size), args.save_heat, MARK)
        result["heat"] = str(args.save_heat)
    return result | common.outcome(args, done, rows, common.record_of(args, done))


def run_generate(args: argparse.Namespace) -> dict[str, Any]:
    settled = common.settled_plan(args)
    picture_size(args.width, args.height, 512, 8)
    output = args.output or free(Path("generated.png"))
    common.check_outputs(args, [], [output])
    (rows,) = common.predicted(args, settled)
    if args.dry_run:
        return common.dry_run(args, [settled], rows, (args.width, args.height))
    sd = common.load(args)
    with common.progress(args.quiet, rows) as watch:
        done = execute_without_picture(settled, sd, (args.width, args.height), watch)
    record = common.record_of(args, done)
    write_picture(done.image, output, common.text_chunks(args, record))
    return {"output": str(output)} | common.outcome(args, done, rows, record)


def name_model(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Where the options name no model: the hub id that the state names, from the cache, never the hub; the VAE too."""
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
        return common.load(args)
    except OSError as error:
        if args.model != record.get("model_name"):
            raise
        raise OSError(f"{args.state} was made with the model {args.model}, which cannot be had: {error}") from error


def check_files(args: argparse.Namespace) -> None:
    """What is wanted beside the picture must be there to be written."""
    if args.save_heat and getattr(args, "mask", None):
        raise ValueError("--save-heat goes without --mask: under your own mask no map is sought")
    if args.save_state and getattr(args, "crop", False):
        raise ValueError("--save-state goes without --crop; save without, then `resume` that state with --crop")
    if args.decode_previews and not args.report:
        raise ValueError("--decode-previews goes with --report")
    if not args.preview and (args.preview_decode or args.preview_every is not None):
        raise ValueError("--preview-every and --preview-decode go with --preview")
    args.preview_every = whole("preview_every", 5 if args.preview_every is None else args.preview_every, 1, 999)
    if args.preview:
        check_folder(args.preview)


def previews(args: argparse.Namespace, sd: Any, picture: Any) -> list[Any]:
    """The watcher that --preview asks for, if it does."""
    options: dict[str, Any] = {"every": args.preview_every, "decode": args.preview_decode}
    return [Previews(sd, picture, args.preview, **options)] if args.preview else []


def witness(args: argparse.Namespace) -> Any:
    """What looks on for the page, if one is wanted; a compiled network shows nothing of itself."""
    return Witness() if args.report and not args.compile else None


def written(args: argparse.Namespace, done: Result, output: Path, rows: dict[str, int]) -> dict[str, Any]:
    """Every file that was asked for, and what is said of the run."""
    record = common.record_of(args, done)
    write_picture(done.image, output, common.text_chunks(args, record))
    result = {"output": str(output)}
    heat = None if done.heat is None else grey_picture(done.heat, done.image.size)
    for name, made, why in (("mask", done.mask, f"{done.method} used no mask"), ("heat", heat, "no mask was sought")):
        if (path := getattr(args, f"save_{name}")) and made:
            write_picture(made, path, MARK)
            result[name] = str(path)
        elif path:
            warnings.warn(f"{path} is not written: {why}", stacklevel=2)
    if args.save_state:
        save_state(done, args.save_state)
        result["state"] = str(args.save_state)
    if args.report:
        picture = getattr(args, "picture", None) or getattr(args, "image", None)  # of a resumed edit, none
        save_report(done, args.report, picture=picture, state=args.save_state, decode_previews=args.decode_previews)
        result["report"] = str(args.report)
    return result | common.outcome(args, done, rows, record)


def say_edit(result: dict[str, Any]) -> str:
    if "output" not in result:
        return common.say_dry(result)
    rows = " + ".join(str(n) for n in result["evaluations"].values())
    lines = [result[key] for key in ("output", "mask", "heat", "state", "report") if key in result]
    mask = "" if result["coverage"] is None else f"mask: {result['verdict']}, {result['coverage']:.0%} of the picture; "
    lines.append(f"{mask}seed {result['seed']}; UNet rows {rows}; {sum(result['seconds'].values()):.1f} s")
    return "\n".join(lines)


say_resume = say_mask = say_generate = say_edit
