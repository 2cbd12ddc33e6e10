"""The commands: edit, resume, mask, sdedit, generate, info, verify, download.

Results go to stdout, progress and warnings to stderr. Exit codes: 0 done, 1 failure, 2 usage, 130 Ctrl-C. Only
argparse is imported before a command runs, so that --help answers at once.
"""

import argparse
import contextlib
import inspect
import json
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import __version__


def main(argv: list[str] | None = None) -> int:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be no text
    try:
        try:
            return run(argv)
        finally:
            sys.stdout.flush()
    except OSError as error:  # stdout's reader is gone or its disk full: let the interpreter not flush into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


def run(argv: list[str] | None) -> int:
    args = build_parser().parse_args(argv)
    try:
        with spoken_warnings(args.quiet), remembered_interrupt() as args.interrupted:
            result = args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    print(json.dumps(result) if args.json else args.say(result))
    return 0


def one_line(error: Exception) -> str:
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "out of memory; try a smaller --size, --chunk 1 or --dtype bfloat16"
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(c if c.isprintable() else "?" for c in text)  # a hostile file's names must not steer the terminal
    expected = isinstance(error, ValueError | OSError | ArithmeticError)
    return text if expected else f"{type(error).__name__}: {text} (--debug shows where)"


@contextlib.contextmanager
def spoken_warnings(quiet: bool) -> Iterator[None]:
    """Each warning once, as a line on stderr, or not at all."""
    said: set[str] = set()

    def speak(message: Any, *_: Any, **__: Any) -> None:
        line = " ".join(str(message).split())
        if not quiet and line not in said:
            said.add(line)
            print(f"warning: {line}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = speak
        yield


# ---------------------------------------------------------------- the options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minidiffedit", description="DiffEdit: text-driven image editing with an automatic mask, on SD v1."
    )
    parser.add_argument("--version", action="version", version=f"minidiffedit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

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
    edit.add_argument("--dry-run", action="store_true", help="only print what it would cost; no model is loaded")
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
    add_steering(resume)
    add_model(resume)

    mask = add_command(commands, "mask", run_mask, say_edit, "find the mask of an edit, without the edit")
    add_picture(mask, "the mask, white = would be edited (default: NAME-mask.png here)")
    mask.add_argument(
        "--steps", type=int, default=50, metavar="N", help="sampling steps that set the levels, 1..999 (%(default)s)"
    )
    group = add_mask_options(mask)
    group.add_argument("--save-heat", type=Path, metavar="FILE", help="also write the map the mask is cut from")
    add_steering(mask)
    add_model(mask)

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

    info = add_command(commands, "info", run_info, say_info, "what a model file or folder is, from its headers alone")
    info.add_argument("model", metavar="MODEL", help="folder, .safetensors file or cached hub id")
    info.add_argument("--variant", choices=("fp16", "non_ema"), help="which of a folder's weights")
    info.add_argument("--revision", help="of a hub id: branch, tag or full commit")
    info.add_argument("--cache-dir", type=Path, metavar="DIR", help="the hub's cache")

    verify = add_command(commands, "verify", run_verify, say_verify, "check a model: sha256, headers, one known edit")
    add_model(verify)

    download = add_command(commands, "download", run_download, lambda r: r["path"], "fetch official weights")
    download.add_argument(
        "id", nargs="?", metavar="ID", help="hub id (default: stable-diffusion-v1-5/stable-diffusion-v1-5)"
    )
    download.add_argument("--variant", choices=("fp16", "non_ema"), help="fp16: half the size, enough for a GPU")
    download.add_argument("--revision", help="branch, tag or full commit")
    download.add_argument("--cache-dir", type=Path, metavar="DIR", help="the hub's cache")
    return parser


def add_command(commands: Any, name: str, run: Any, say: Any, text: str) -> argparse.ArgumentParser:
    """allow_abbrev is off: --mask-t would be --mask-threshold today and two options tomorrow."""
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    parser.set_defaults(run=run, say=say)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress, no warnings")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_input(parser: argparse.ArgumentParser, output: str) -> None:
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("picture", nargs="?", type=Path, metavar="IMAGE", help="PNG, JPEG or WebP, any size")
    either.add_argument("--image", type=Path, metavar="IMAGE", help="the same, as an option")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=output)
    parser.add_argument(
        "--size", type=int, metavar="PX",
        help="shorter side to work at, 64..1024 (default: the training size); the result has the picture's size",
    )  # fmt: skip
    add_seed(parser)


def add_picture(parser: argparse.ArgumentParser, output: str, several: bool = False) -> None:
    add_input(parser, output)
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--target", metavar="TEXT", help="what the result shall show")
    if several:
        either.add_argument(
            "--edit", dest="edits", action="append", type=prompt_pair, metavar="A=>B",
            help="instead of source and target, any number of times: several edits at once, each with its own mask",
        )  # fmt: skip
    parser.add_argument("--source", default="", metavar="TEXT", help="what the picture shows now (may be left out)")
    parser.add_argument("--chunk", type=int, metavar="N", help="maps per model call; fewer need less memory")


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, metavar="S", help="0 and up (default: drawn, and printed)")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="sampling steps, 1..999 (%(default)s)")
    parser.add_argument(
        "--guidance-scale", type=float, default=7.5, metavar="G", help="how strictly to follow the text (%(default)s)"
    )


def add_mask_options(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("mask")
    group.add_argument(
        "--mask-strength", type=float, default=0.5, metavar="S", help="noise at which texts differ, 0..1 (%(default)s)"
    )
    group.add_argument("--maps", type=int, default=10, metavar="N", help="maps that are averaged (%(default)s)")
    group.add_argument(
        "--mask-clip", type=clip_value, default=3.0, metavar="C",
        help="cut values at C times the mean, or none; less gives larger masks (%(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--mask-threshold", type=float, default=0.5, metavar="T", help="0..1; less gives larger masks (%(default)s)"
    )
    return group


def add_changes(parser: argparse.ArgumentParser) -> None:
    """Settings of a saved edit that may change; those not given are not set, so that the state's hold."""
    group = parser.add_argument_group("changes", argument_default=argparse.SUPPRESS)
    for option, what in (("target", "shall show"), ("source", "showed before"), ("negative-prompt", "leads away from")):
        group.add_argument(f"--{option}", metavar="TEXT", help=f"what the edit {what}")
    group.add_argument("--strength", type=float, metavar="R", help="less than before costs no encoding")
    group.add_argument("--guidance-scale", type=float, metavar="G", help="how strictly to follow the text")
    group.add_argument("--mask-threshold", type=float, metavar="T", help="0..1; costs nothing for the mask")
    group.add_argument("--mask-clip", type=clip_value, metavar="C", help="a number or none; costs nothing for the mask")


def add_steering(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("steering of the mask, in this order")
    group.add_argument("--largest", action="store_true", help="only its largest piece")
    group.add_argument("--invert", action="store_true", help="edit all but it")
    group.add_argument("--dilate", type=int, metavar="N", help="grow it by N latent cells of 8 pixels; shrink below 0")
    group.add_argument("--feather", type=int, metavar="N", help="fade it out over N more cells")
    group.add_argument("--union", type=Path, metavar="FILE", help="edit what this mask holds, too")
    group.add_argument("--subtract", type=Path, metavar="FILE", help="never edit what this mask holds")


def add_save_state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--save-state", type=Path, metavar="FILE", help="also write all that was computed (.safetensors), for `resume`"
    )


def prompt_pair(text: str) -> tuple[str, str]:
    source, arrow, target = text.partition("=>")
    if not arrow:
        raise argparse.ArgumentTypeError(f"SOURCE=>TARGET is wanted, got {text!r}")
    return source.strip(), target.strip()


def clip_value(text: str) -> float | None:
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a number or none is wanted, got {text!r}") from None


def pixels(text: str) -> int:
    if not text.isdecimal() or int(text) < 64 or int(text) % 8:
        raise argparse.ArgumentTypeError(f"a multiple of 8 from 64 is wanted, got {text!r}")
    return int(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="MODEL", help="folder, .safetensors file or hub id (default: SD v1.5 from the cache)"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    group.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"),
        help="what the model computes in (%(default)s: float16 on CUDA, else float32)",
    )  # fmt: skip
    group.add_argument("--variant", choices=("fp16", "non_ema"), help="which of a folder's weights")
    group.add_argument("--revision", help="of a hub id: branch, tag or full commit")
    group.add_argument("--cache-dir", type=Path, metavar="DIR", help="the hub's cache")
    group.add_argument("--local-files-only", action="store_true", help="never contact the hub")


# ---------------------------------------------------------------- the commands: all is checked before a model is loaded


def run_edit(args: argparse.Namespace) -> dict[str, Any]:
    from .editor import edit, predicted_rows
    from .images import read_mask

    if args.edits:
        return run_edits(args)
    settings = checked_settings(args, edit)
    picture, output = picture_and_output(args, "edited", args.save_mask, args.save_heat)
    mask, steering = open_mask(args.mask), steering_of(args)
    if args.dry_run:
        nothing = mask is not None and steering is None and not read_mask(mask).any()
        return {"evaluations": predicted_rows(settings, given=mask is not None, nothing=nothing), "settings": settings}
    sd = load(args)
    model = describe(sd)
    done = edit(sd, picture, mask=mask, steering=steering, track=tracker(args.quiet), **settings)
    return write_edit(args, done, output) | {"model": model, "versions": versions()}


def run_edits(args: argparse.Namespace) -> dict[str, Any]:
    from .images import write_picture
    from .regions import check_edits, edit_regions, predicted_rows

    unset = {"source": "", "encode_text": "null", "largest": False, "invert": False}
    unset |= dict.fromkeys(("mask", "save_heat", "save_state", "dilate", "feather", "union", "subtract"))
    for name, value in unset.items():
        if getattr(args, name) != value:
            raise ValueError(f"--{name.replace('_', '-')} goes with --target, not with --edit")
    settings = checked_settings(args, edit_regions)
    pairs = check_edits(settings.pop("edits"))
    picture, output = picture_and_output(args, "edited", args.save_mask)
    if args.dry_run:
        return {"evaluations": predicted_rows(settings, pairs), "settings": settings | {"edits": pairs}}
    sd = load(args)
    model = describe(sd)
    done = edit_regions(sd, picture, pairs, track=tracker(args.quiet), **settings)
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
    from .editor import check_settings
    from .state import ARGUMENTS, load_state, read_record, resume

    header, record = read_record(args.state)
    changes = {name: value for name, value in vars(args).items() if name in ARGUMENTS}
    check_settings({name: record["settings"][name] for name in ARGUMENTS} | changes)
    height, width, _ = header["source"].shape
    output = args.output or Path(f"{args.state.stem}-resumed.png")
    inputs, outputs = [args.state, args.mask, args.union, args.subtract], [output, args.save_mask, args.save_heat]
    check_outputs(inputs, outputs, (width, height), args.save_state)
    mask, steering = open_mask(args.mask), steering_of(args)
    sd = load(args)
    model = describe(sd)
    state = load_state(args.state, sd)
    done = resume(state, mask=mask, steering=steering, track=tracker(args.quiet), **changes)
    return write_edit(args, done, output) | {"model": model, "versions": versions()}


def write_edit(args: argparse.Namespace, done: Any, output: Path) -> dict[str, Any]:
    """Every file that was asked for, and what the result says of the edit."""
    from .images import grey_picture, write_picture
    from .metadata import model_hash
    from .state import save_state

    if args.mask:
        done.settings["mask"] = model_hash(args.mask)
    record = done.settings | identity(done.sd)
    write_picture(done.image, output, text_of(args, record, done.settings["target"]))
    result = {"output": str(output)}
    if args.save_mask:
        write_picture(done.mask, args.save_mask)
        result["mask"] = str(args.save_mask)
    if args.save_heat and done.heat is not None:
        write_picture(grey_picture(done.heat, done.source.size), args.save_heat)
        result["heat"] = str(args.save_heat)
    if args.save_state:
        save_state(done, args.save_state)
        result["state"] = str(args.save_state)
    return result | {
        "seed": done.seed, "coverage": done.coverage, "verdict": done.verdict, "evaluations": done.evaluations,
        "seconds": done.seconds, "settings": record,
    }  # fmt: skip


def run_mask(args: argparse.Namespace) -> dict[str, Any]:
    from .editor import picture_mask
    from .images import write_picture

    settings = checked_settings(args, picture_mask)
    picture, output = picture_and_output(args, "mask", args.save_heat)
    steering = steering_of(args)
    sd = load(args)
    model = describe(sd)
    done = picture_mask(sd, picture, steering=steering, track=tracker(args.quiet), **settings)
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


def run_sdedit(args: argparse.Namespace) -> dict[str, Any]:
    from .arms import check_redraw, sdedit
    from .images import write_picture

    settings = check_redraw(checked_settings(args, sdedit))
    picture, output = picture_and_output(args, "sdedit")
    mask = open_mask(args.mask) if args.mask else None
    sd = load(args)
    model = describe(sd)
    done = sdedit(sd, picture, mask=mask, track=tracker(args.quiet), **settings)
    record = done.settings | identity(sd)
    if args.mask:
        from .metadata import model_hash

        record["mask"] = model_hash(args.mask)
    # An empty source tells metadata that a picture was edited, not made.
    write_picture(done.image, output, text_of(args, record | {"source": ""}, args.target))
    return {
        "output": str(output), "seed": done.seed, "evaluations": done.evaluations, "seconds": done.seconds,
        "settings": record, "model": model, "versions": versions(),
    }  # fmt: skip


def run_generate(args: argparse.Namespace) -> dict[str, Any]:
    from .editor import generate
    from .images import write_picture

    settings = checked_settings(args, generate)
    check_outputs([], [args.output])
    sd = load(args)
    model = describe(sd)
    done = generate(sd, track=tracker(args.quiet), **settings)
    record = done.settings | {"working_size": done.image.size} | identity(sd)
    write_picture(done.image, args.output, text_of(args, record, args.prompt))
    return {
        "output": str(args.output), "seed": done.seed, "evaluations": done.evaluations, "seconds": done.seconds,
        "settings": record, "model": model, "versions": versions(),
    }  # fmt: skip


def run_info(args: argparse.Namespace) -> dict[str, Any]:
    import math

    from .checkpoint import open_checkpoint
    from .hub import find_model

    path = find_model(args.model, args.revision, args.cache_dir, local_files_only=True, variant=args.variant)
    found = open_checkpoint(path, variant=args.variant)
    networks = {}
    for name, part in found.parts.items():
        tensors = [part.header[key] for key in part.keys.values()]
        networks[name] = {
            "file": str(part.path),
            "tensors": len(tensors),
            "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "dtypes": sorted({tensor.dtype for tensor in tensors}),
        }
    side = found.configs["unet"].sample_size * found.configs["vae"].factor
    return {
        "model": args.model, "kind": "Stable Diffusion v1", "layout": found.layout, "training_size": side,
        "tokenizer": str(found.tokenizer or "packaged"), "networks": networks,
    }  # fmt: skip


def run_verify(args: argparse.Namespace) -> dict[str, Any]:
    from .verify import verify

    sd = load(args)
    return verify(sd, tracker(args.quiet)) | {"model": describe(sd), "versions": versions()}


def run_download(args: argparse.Namespace) -> dict[str, Any]:
    from .hub import DEFAULT, download

    path = download(args.id or DEFAULT, variant=args.variant, revision=args.revision, cache_dir=args.cache_dir)
    return {"id": args.id or DEFAULT, "path": str(path)}


def say_edit(result: dict[str, Any]) -> str:
    rows = " + ".join(str(n) for n in result["evaluations"].values())
    if "output" not in result:  # a dry run
        return f"UNet rows {rows} (mask, encode, decode) = {sum(result['evaluations'].values())}"
    lines = [result[key] for key in ("output", "mask", "heat", "state") if key in result]
    lines.append(
        f"mask: {result['verdict']}, {result['coverage']:.0%} of the picture; seed {result['seed']}; "
        f"UNet rows {rows}; {sum(result['seconds'].values()):.1f} s"
    )
    return "\n".join(lines)


def say_generate(result: dict[str, Any]) -> str:
    return f"{result['output']}\nseed {result['seed']}; {sum(result['seconds'].values()):.1f} s"


def say_verify(result: dict[str, Any]) -> str:
    lines = []
    for network, file in result["files"].items():
        official = f"official, {file['official']}" if file["official"] else "none of the official files"
        lines.append(f"{network}: {file['sha256']} ({official}) {file['file']}")
    rows = " + ".join(str(n) for n in result["evaluations"].values())
    where = f"{result['model']['device']}, {result['model']['dtype']}"
    lines.append(f"known edit: {rows} UNet rows as specified, sha256 {result['edit_sha256']} ({where})")
    return "\n".join(lines)


def say_info(result: dict[str, Any]) -> str:
    lines = [f"{result['model']}: {result['kind']}, {result['layout']}, trained at {result['training_size']} px"]
    for name, network in result["networks"].items():
        lines.append(f"  {name}: {network['parameters']:,} parameters in {network['tensors']} tensors, "
                     f"{' '.join(network['dtypes'])}, {network['file']}")  # fmt: skip
    return "\n".join([*lines, f"  tokenizer: {result['tokenizer']}"])


# ---------------------------------------------------------------- shared pieces


def checked_settings(args: argparse.Namespace, function: Any) -> dict[str, Any]:
    """The options that are arguments of `edit`, `picture_mask` or `generate`, by name."""
    from .editor import check_settings

    names = inspect.signature(function).parameters.keys() - {"image", "mask"}
    return check_settings({name: value for name, value in vars(args).items() if name in names})


def picture_and_output(args: argparse.Namespace, word: str, *others: Path | None) -> tuple[Any, Path]:
    """The picture, read, and where the result goes; `others` go beside it."""
    from .images import read_picture, working_size

    path = args.picture or args.image
    output = args.output or Path(f"{path.stem}-{word}.png")
    picture = read_picture(path)
    working_size(picture.size, 512 if args.size is None else args.size)
    inputs = [path, *(getattr(args, name, None) for name in ("mask", "union", "subtract"))]
    check_outputs(inputs, [output, *others], picture.size, getattr(args, "save_state", None))
    return picture, output


def open_mask(path: Path | None) -> Any:
    """The file as a picture, which may keep a mask's cells; refused now if it is no mask."""
    from .images import read_mask, read_picture

    picture = read_picture(path) if path else None
    if picture:
        read_mask(picture)
    return picture


def steering_of(args: argparse.Namespace) -> Any:
    """The steering that was asked for, None if none was."""
    from .steer import Steering

    options = {name: getattr(args, name) for name in ("largest", "invert", "dilate", "feather")}
    options |= {name: open_mask(getattr(args, name)) for name in ("union", "subtract")}
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    return Steering(**given) if given else None


def check_outputs(
    inputs: list[Path | None],
    outputs: list[Path | None],
    size: tuple[int, int] = (1, 1),
    state: Path | None = None,
) -> None:
    """Refuse, before any work, what could not be written at its end or would overwrite an input or another result.

    outputs: pictures of a size; state: a saved edit.
    """
    from .images import picture_format

    if state:
        from .state import check_name

        check_name(state)
    taken = [path for path in inputs if path]
    for path in filter(None, [*outputs, state]):
        if path is not state:
            picture_format(path, size)
        if os.path.isdir(path):
            raise ValueError(f"{path} is a folder; name a file")
        if not os.path.isdir(path.parent):
            raise ValueError(f"{path}: there is no folder {path.parent}")
        try:
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from error
        if any(same_file(path, other) for other in taken):
            raise ValueError(f"{path} would overwrite an input or another result; choose another name")
        taken.append(path)


def same_file(a: Path, b: Path) -> bool:
    return a.resolve() == b.resolve() or (a.exists() and b.exists() and a.samefile(b))


@contextlib.contextmanager
def remembered_interrupt() -> Iterator[list[int]]:
    """Ctrl-C raises as ever and is noted in a list: Python swallows one that falls into an import's callbacks."""
    noted: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        noted.append(number)
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGINT, interrupt)
    except ValueError:  # not the main thread, which alone receives signals
        yield noted
        return
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def load(args: argparse.Namespace) -> Any:
    """The model of the options; here the heavy imports are over, and an interrupt that they swallowed takes effect."""
    sd = load_model(args)
    if args.interrupted:
        raise KeyboardInterrupt
    return sd


def load_model(args: argparse.Namespace) -> Any:
    from .hub import DEFAULT, HubError
    from .sd import StableDiffusion

    options = {"device": args.device, "dtype": args.dtype, "variant": args.variant, "revision": args.revision}
    options |= {"cache_dir": args.cache_dir, "local_files_only": args.local_files_only or args.model is None}
    try:
        return StableDiffusion.load(args.model or DEFAULT, **options)
    except HubError as error:
        if args.model:
            raise
        raise HubError(
            f"no --model given, and {DEFAULT} is not in the cache: fetch it (4.3 GB) with `minidiffedit download`, "
            "or use the miniature of the repository with --model weights/mini"
        ) from error


def tracker(quiet: bool) -> Any:
    """A progress bar per stage, silent where stderr is no terminal."""
    from huggingface_hub.utils import tqdm

    def track(items: Iterable[Any], stage: str) -> Iterable[Any]:
        return tqdm(items, desc=stage, unit="step", disable=True if quiet else None, file=sys.stderr)

    return track


def text_of(args: argparse.Namespace, settings: dict[str, Any], prompt: str) -> dict[str, str]:
    from .metadata import metadata

    return {} if args.no_metadata else metadata(settings, prompt)


def identity(sd: Any) -> dict[str, Any]:
    """What of the model decides the result: its name, the hash of the UNet's file, the dtype."""
    from .metadata import model_hash

    name = Path(sd.name).resolve().name if Path(sd.name).exists() else sd.name  # no path
    return {
        "model": os.fsencode(name).decode(errors="replace"),
        "model_hash": model_hash(sd.checkpoint.parts["unet"].path), "dtype": str(sd.dtype).removeprefix("torch."),
    }  # fmt: skip


def describe(sd: Any) -> dict[str, Any]:
    path = sd.checkpoint.path
    revision = path.name if path.parent.name == "snapshots" else None
    return {"id": sd.name, "path": str(path), "revision": revision, "device": str(sd.device)} | identity(sd)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "safetensors", "tokenizers", "numpy", "pillow", "huggingface_hub")
    return {"minidiffedit": __version__, "python": sys.version.split()[0]} | {name: version(name) for name in names}
