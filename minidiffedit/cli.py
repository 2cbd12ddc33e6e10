"""The commands: edit, mask, generate, info, download.

Results go to stdout, progress and warnings to stderr. Exit codes: 0 done, 1 failure, 2 usage, 130 Ctrl-C. Only
argparse is imported before a command runs, so that --help answers at once.
"""

import argparse
import contextlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import __version__


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        with spoken_warnings(args.quiet):
            result = args.run(args)
        print(json.dumps(result, ensure_ascii=False) if args.json else args.say(result), flush=True)
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout is gone; keep the interpreter from flushing into it again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1


def one_line(error: Exception) -> str:
    if isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error):
        return "out of memory; try a smaller --size, --chunk 1 or --dtype bfloat16"
    text = " ".join(str(error).split()) or type(error).__name__
    expected = isinstance(error, ValueError | OSError | ArithmeticError)
    return text if expected else f"{type(error).__name__}: {text} (--debug shows where)"


@contextlib.contextmanager
def spoken_warnings(quiet: bool) -> Iterator[None]:
    """Each warning once, as a line on stderr, or not at all."""
    said: set[str] = set()

    def speak(message: Any, *_: Any, **__: Any) -> None:
        if not quiet and str(message) not in said:
            said.add(str(message))
            print(f"warning: {one_line(message)}", file=sys.stderr)

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
    add_picture(edit, "the edited picture (.png, .jpg, .webp; default: NAME-edited.png here)")
    edit.add_argument("--mask", type=Path, metavar="FILE", help="your mask instead of the computed one: white = edited")
    edit.add_argument("--negative-prompt", default="", metavar="TEXT", help="what guidance leads away from")
    edit.add_argument(
        "--strength", type=float, default=0.8, metavar="R", help="how far the picture is encoded, 0..1 (%(default)s)"
    )
    add_sampling(edit)
    add_mask_options(edit)
    edit.add_argument(
        "--encode-text", choices=("null", "source"), default="null", help="text of the encoding (%(default)s)"
    )
    edit.add_argument("--refine", type=int, default=1, metavar="K", help="evaluations per encoding step (%(default)s)")
    edit.add_argument(
        "--no-paste", dest="paste", action="store_false", help="do not put the input's pixels back outside the mask"
    )
    edit.add_argument("--save-mask", type=Path, metavar="FILE", help="also write the mask, at the picture's size")
    edit.add_argument("--save-heat", type=Path, metavar="FILE", help="also write the heat map (not with --mask)")
    edit.add_argument("--no-metadata", action="store_true", help="write no settings into the picture")
    add_model(edit)

    mask = add_command(commands, "mask", run_mask, say_mask, "only find the mask")
    add_picture(mask, "the mask, white = would be edited (default: NAME-mask.png here)")
    mask.add_argument(
        "--steps", type=int, default=50, metavar="N", help="sampling steps that set the levels (%(default)s)"
    )
    add_mask_options(mask)
    mask.add_argument("--save-heat", type=Path, metavar="FILE", help="also write the heat map")
    add_model(mask)

    generate = add_command(commands, "generate", run_generate, say_generate, "text to picture")
    generate.add_argument("prompt", help="what to show")
    generate.add_argument("-o", "--output", type=Path, default=Path("generated.png"), help="(default: generated.png)")
    generate.add_argument("--negative-prompt", default="", metavar="TEXT", help="what guidance leads away from")
    add_sampling(generate)
    generate.add_argument("--seed", type=int, metavar="S", help="0 and up; drawn and printed if not given")
    generate.add_argument("--width", type=int, help="pixels, a multiple of 8 (default: the model's training size)")
    generate.add_argument("--height", type=int, help="the same")
    generate.add_argument("--no-metadata", action="store_true", help="write no settings into the picture")
    add_model(generate)

    info = add_command(commands, "info", run_info, say_info, "what a model file or folder is, from its headers alone")
    info.add_argument("model", metavar="MODEL", help="folder, .safetensors file or cached hub id")
    info.add_argument("--variant", choices=("fp16", "non_ema"))

    download = add_command(commands, "download", run_download, lambda r: r["path"], "fetch official weights")
    download.add_argument(
        "id", nargs="?", metavar="ID", help="hub id (default: stable-diffusion-v1-5/stable-diffusion-v1-5)"
    )
    download.add_argument("--variant", choices=("fp16", "non_ema"), help="fp16: half the size, enough for a GPU")
    download.add_argument("--revision", help="branch, tag or full commit")
    download.add_argument("--cache-dir", type=Path, metavar="DIR")
    return parser


def add_command(commands: Any, name: str, run: Any, say: Any, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run, say=say)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress, no warnings")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_picture(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument("picture", nargs="?", type=Path, metavar="IMAGE", help="PNG, JPEG or WebP, any size")
    parser.add_argument("--image", type=Path, metavar="IMAGE", help="the same, as an option")
    parser.add_argument("--target", required=True, metavar="TEXT", help="what the result shall show")
    parser.add_argument("--source", default="", metavar="TEXT", help="what the picture shows now (may be left out)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=output)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="sampling steps, 1..999 (%(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=7.5, metavar="G", help="(%(default)s)")


def add_mask_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mask-strength", type=float, default=0.5, metavar="S", help="noise of the maps, 0..1 (%(default)s)"
    )
    parser.add_argument("--maps", type=int, default=10, metavar="N", help="maps that are averaged (%(default)s)")
    parser.add_argument(
        "--mask-clip", type=clip_value, default=3.0, metavar="C", help="cut at C x mean, or none (%(default)s)"
    )
    parser.add_argument(
        "--mask-threshold", type=float, default=0.5, metavar="T", help="of the heat map, 0..1 (%(default)s)"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="0 and up; drawn and printed if not given")
    parser.add_argument(
        "--size", type=int, metavar="PX", help="shorter side to work at (default: the model's training size)"
    )
    parser.add_argument("--chunk", type=int, metavar="N", help="maps per model call (default: by size)")


def clip_value(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="MODEL", help="folder, .safetensors file or hub id (default: SD v1.5 from the cache)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"), help="(%(default)s)"
    )
    parser.add_argument("--variant", choices=("fp16", "non_ema"), help="which of a folder's weights")
    parser.add_argument("--revision", help="of a hub id: branch, tag or full commit")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="the hub's cache")
    parser.add_argument("--local-files-only", action="store_true", help="never contact the hub")


# ---------------------------------------------------------------- the commands


def run_edit(args: argparse.Namespace) -> dict[str, Any]:
    picture, output = input_and_output(args, "edited")
    if args.mask and args.save_heat:
        raise ValueError("--save-heat needs a computed mask; leave --mask out")
    files = [output, args.save_mask, args.save_heat]
    check_outputs([picture, args.mask], files)
    from .editor import edit
    from .images import grey_picture, write_picture

    sd = load(args)
    done = edit(
        sd, picture, target=args.target, source=args.source, mask=args.mask, negative_prompt=args.negative_prompt,
        steps=args.steps, strength=args.strength, guidance_scale=args.guidance_scale, mask_strength=args.mask_strength,
        maps=args.maps, mask_clip=args.mask_clip, mask_threshold=args.mask_threshold, encode_text=args.encode_text,
        refine=args.refine, paste=args.paste, seed=args.seed, size=args.size, chunk=args.chunk,
        track=tracker(args.quiet),
    )  # fmt: skip
    settings, model = done.settings | identity(sd), describe(sd)
    if args.mask:
        from .metadata import model_hash

        settings["mask"] = model_hash(args.mask)
    write_picture(done.image, output, text_of(args, settings, args.target))
    result = {"output": str(output)}
    if args.save_mask:
        write_picture(done.mask, args.save_mask)
        result["mask"] = str(args.save_mask)
    if args.save_heat and done.heat is not None:
        write_picture(grey_picture(done.heat, done.source.size), args.save_heat)
        result["heat"] = str(args.save_heat)
    return result | {
        "seed": done.seed, "coverage": done.coverage, "verdict": done.verdict, "evaluations": done.evaluations,
        "seconds": done.seconds, "settings": settings, "model": model, "versions": versions(),
    }  # fmt: skip


def run_mask(args: argparse.Namespace) -> dict[str, Any]:
    picture, output = input_and_output(args, "mask")
    check_outputs([picture], [output, args.save_heat])
    from .editor import picture_mask
    from .images import write_picture

    sd = load(args)
    done = picture_mask(
        sd, picture, target=args.target, source=args.source, steps=args.steps, mask_strength=args.mask_strength,
        maps=args.maps, mask_clip=args.mask_clip, mask_threshold=args.mask_threshold, seed=args.seed, size=args.size,
        chunk=args.chunk, track=tracker(args.quiet),
    )  # fmt: skip
    write_picture(done.mask, output)
    result = {"output": str(output)}
    if args.save_heat:
        write_picture(done.heat, args.save_heat)
        result["heat"] = str(args.save_heat)
    return result | {
        "seed": done.seed, "coverage": done.found.coverage[0], "verdict": done.found.verdict[0],
        "evaluations": done.evaluations, "seconds": done.seconds, "settings": done.settings | identity(sd),
        "model": describe(sd), "versions": versions(),
    }  # fmt: skip


def run_generate(args: argparse.Namespace) -> dict[str, Any]:
    check_outputs([], [args.output])
    from .editor import generate
    from .images import write_picture

    sd = load(args)
    done = generate(
        sd, args.prompt, negative_prompt=args.negative_prompt, steps=args.steps, guidance_scale=args.guidance_scale,
        seed=args.seed, width=args.width, height=args.height, track=tracker(args.quiet),
    )  # fmt: skip
    settings = done.settings | {"working_size": done.image.size} | identity(sd)
    write_picture(done.image, args.output, text_of(args, settings, args.prompt))
    return {
        "output": str(args.output), "seed": done.seed, "evaluations": done.evaluations, "seconds": done.seconds,
        "settings": settings, "model": describe(sd), "versions": versions(),
    }  # fmt: skip


def run_info(args: argparse.Namespace) -> dict[str, Any]:
    import math

    from .checkpoint import open_checkpoint
    from .hub import find_model

    found = open_checkpoint(find_model(args.model, local_files_only=True, variant=args.variant), variant=args.variant)
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


def run_download(args: argparse.Namespace) -> dict[str, Any]:
    from .hub import DEFAULT, download

    path = download(args.id or DEFAULT, variant=args.variant, revision=args.revision, cache_dir=args.cache_dir)
    return {"id": args.id or DEFAULT, "path": str(path)}


def say_edit(result: dict[str, Any]) -> str:
    rows = " + ".join(str(n) for n in result["evaluations"].values())
    lines = [result[key] for key in ("output", "mask", "heat") if key in result]
    lines.append(
        f"mask: {result['verdict']}, {result['coverage']:.0%} of the picture; seed {result['seed']}; "
        f"UNet rows {rows}; {sum(result['seconds'].values()):.1f} s"
    )
    return "\n".join(lines)


say_mask = say_edit


def say_generate(result: dict[str, Any]) -> str:
    return f"{result['output']}\nseed {result['seed']}; {sum(result['seconds'].values()):.1f} s"


def say_info(result: dict[str, Any]) -> str:
    lines = [f"{result['model']}: {result['kind']}, {result['layout']}, trained at {result['training_size']} px"]
    for name, network in result["networks"].items():
        lines.append(f"  {name}: {network['parameters']:,} parameters in {network['tensors']} tensors, "
                     f"{' '.join(network['dtypes'])}, {network['file']}")  # fmt: skip
    return "\n".join([*lines, f"  tokenizer: {result['tokenizer']}"])


# ---------------------------------------------------------------- shared pieces


def input_and_output(args: argparse.Namespace, word: str) -> tuple[Path, Path]:
    if (args.picture is None) == (args.image is None):
        raise ValueError("give one picture: minidiffedit edit IMAGE --target TEXT")
    picture = args.picture or args.image
    return picture, args.output or Path(f"{picture.stem}-{word}.png")


def check_outputs(inputs: list[Path | None], outputs: list[Path | None]) -> None:
    """Refuse, before any work, what could not be written at its end or would overwrite an input or another result."""
    from .images import picture_format

    taken = {path.resolve() for path in inputs if path}
    for path in filter(None, outputs):
        picture_format(path)
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name a file")
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}")
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path}: the folder {path.parent} cannot be written to")
        if path.resolve() in taken:
            raise ValueError(f"{path} would overwrite an input or another result; choose another name")
        taken.add(path.resolve())


def load(args: argparse.Namespace) -> Any:
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

    return {
        "model": Path(sd.name).name if Path(sd.name).exists() else sd.name,
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
