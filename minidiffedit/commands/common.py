"""What the commands share: options first, then what runs before and after a model."""

import argparse
import contextlib
import inspect
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .. import __version__
from ..files.metadata import identity

LONGEST_LINE = 800  # characters of an error or a warning


def shown(text: str) -> str:
    """On one line, not endless, and nothing in it steers the terminal: names and values may be a hostile file's."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} [...] {line[-LONGEST_LINE // 3 :]}"


# ---------------------------------------------------------------- options


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


def add_picture(
    parser: argparse.ArgumentParser, output: str, several: bool = False, target_needed: bool = True
) -> None:
    add_input(parser, output)
    either = parser.add_mutually_exclusive_group(required=target_needed)
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


def add_steering(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("steering of the mask, in this order")
    group.add_argument("--largest", action="store_true", help="only its largest piece")
    group.add_argument("--invert", action="store_true", help="edit all but it")
    group.add_argument("--dilate", type=int, metavar="N", help="grow it by N latent cells of 8 pixels; shrink below 0")
    group.add_argument("--feather", type=int, metavar="N", help="fade it out over N more cells")
    group.add_argument("--union", type=Path, metavar="FILE", help="edit what this mask holds, too")
    group.add_argument("--subtract", type=Path, metavar="FILE", help="never edit what this mask holds")


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="only print what it would cost; no model is loaded")


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
        help="what the model computes in (%(default)s: float16 on CUDA, bfloat16 for a full-size model on a CPU with "
        "AMX, else float32)",
    )  # fmt: skip
    group.add_argument(
        "--attention", default="auto", choices=("auto", "sdpa", "triton"),
        help="which kernel (%(default)s: the faster one; sdpa is torch's, triton our own, for CUDA)",
    )  # fmt: skip
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--compile", action="store_true", help="compile the UNet: minutes at first, then faster, most of all on a GPU"
    )
    either.add_argument(
        "--low-memory", action="store_true", help="one network in memory at a time; each is read again when needed"
    )
    group.add_argument("--variant", choices=("fp16", "non_ema"), help="which of a folder's weights")
    group.add_argument("--revision", help="of a hub id: branch, tag or full commit")
    group.add_argument("--cache-dir", type=Path, metavar="DIR", help="the hub's cache")
    group.add_argument("--local-files-only", action="store_true", help="never contact the hub")


# ---------------------------------------------------------------- before and after the model


def checked_settings(args: argparse.Namespace, function: Any) -> dict[str, Any]:
    """The options that are arguments of `edit`, `picture_mask` or `generate`, by name."""
    from ..editor import check_settings

    names = inspect.signature(function).parameters.keys() - {"image", "mask"}
    return check_settings({name: value for name, value in vars(args).items() if name in names})


def picture_and_output(args: argparse.Namespace, word: str, *others: Path | None) -> tuple[Any, Path]:
    """The picture, read, and where the result goes; `others` go beside it."""
    from ..files.images import read_picture, working_size

    path = args.picture or args.image
    output = args.output or Path(f"{path.stem}-{word}.png")
    picture = read_picture(path)
    working_size(picture.size, 512 if args.size is None else args.size)
    inputs = [path, *(getattr(args, name, None) for name in ("mask", "union", "subtract"))]
    state, report = (getattr(args, name, None) for name in ("save_state", "report"))
    check_outputs(inputs, [output, *others], picture.size, state, report)
    check_masks(args, picture.size)
    return picture, output


def check_masks(args: argparse.Namespace, size: tuple[int, int], at: tuple[int, int] | None = None) -> None:
    """Refuse a mask that does not fit a picture of this size, before the model's weights are read.

    at: the working size, where it is known. Where the model is not here yet, nothing is refused.
    """
    masks = [open_mask(path) for name in ("mask", "union", "subtract") if (path := getattr(args, name, None))]
    grid = model_grid(args) if any(mask.size != size for mask in masks) else None
    if grid:
        from ..files.images import latent_mask, working_size

        side, factor = grid
        for mask in masks:
            latent_mask(mask, size, at or working_size(size, args.size or side, factor), factor)


def model_grid(args: argparse.Namespace) -> tuple[int, int] | None:
    """Training size and pixels per latent cell, from the model's configs; None where only loading can tell."""
    from ..files.configs import KINDS, read_configs
    from ..files.hub import DEFAULT, HubError, find_model

    where = args.revision, args.cache_dir
    try:
        path = find_model(args.model or DEFAULT, *where, local_files_only=True, variant=args.variant)
        configs = read_configs(path) if path.is_dir() else {network: kind() for network, kind in KINDS.items()}
    except HubError:
        return None
    return configs["unet"].sample_size * configs["vae"].factor, configs["vae"].factor


def open_mask(path: Path | None) -> Any:
    """The file as a picture, which may keep a mask's cells; refused now if it is no mask."""
    from ..files.images import read_mask, read_picture

    picture = read_picture(path) if path else None
    if picture:
        read_mask(picture)
    return picture


def steering_of(args: argparse.Namespace) -> Any:
    """The steering that was asked for, None if none was."""
    from ..files.masks import Steering

    options = {name: getattr(args, name) for name in ("largest", "invert", "dilate", "feather")}
    options |= {name: open_mask(getattr(args, name)) for name in ("union", "subtract")}
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    return Steering(**given) if given else None


def check_outputs(
    inputs: list[Path | None],
    outputs: list[Path | None],
    size: tuple[int, int] = (1, 1),
    state: Path | None = None,
    report: Path | None = None,
) -> None:
    """Refuse, before any work, what could not be written at its end or would overwrite an input or another result.

    outputs: pictures of a size; state: a saved edit; report: a page.
    """
    from ..files.images import picture_format

    if state:
        from ..files.states import check_name

        check_name(state)
    if report:
        from ..views.report import check_report

        check_report(report)
    taken = [path for path in inputs if path]
    for path in filter(None, [*outputs, state, report]):
        if path is not state and path is not report:
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
    return os.path.realpath(a) == os.path.realpath(b) or (a.exists() and b.exists() and a.samefile(b))


def load(args: argparse.Namespace) -> Any:
    """The model of the options; here the heavy imports are over, and an interrupt that they swallowed takes effect."""
    sd = load_model(args)
    if args.interrupted:
        raise KeyboardInterrupt
    return sd


def load_model(args: argparse.Namespace) -> Any:
    from ..files.hub import DEFAULT, HubError
    from ..sd import StableDiffusion

    options = {"device": args.device, "dtype": args.dtype, "variant": args.variant, "revision": args.revision}
    options |= {"cache_dir": args.cache_dir, "local_files_only": args.local_files_only or args.model is None}
    options |= {"attention": args.attention, "compile": args.compile, "low_memory": args.low_memory}
    try:
        sd = StableDiffusion.load(args.model or DEFAULT, **options)
        if args.compile and not args.quiet:
            sd.unet.note = say_note  # type: ignore[assignment]
        return sd
    except HubError as error:
        if args.model:
            raise
        raise HubError(
            f"no --model given, and {DEFAULT} is not in the cache: fetch it (4.3 GB) with `minidiffedit download`, "
            "or use the miniature of the repository with --model weights/mini"
        ) from error


def say_note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def tracker(quiet: bool) -> Any:
    """A progress bar per stage, silent where stderr is no terminal."""
    from huggingface_hub.utils import tqdm

    def track(items: Iterable[Any], stage: str) -> Iterable[Any]:
        return tqdm(items, desc=stage, unit="step", disable=True if quiet else None, file=sys.stderr)

    return track


BAR = "{desc:<17} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} samples, {elapsed} gone, {remaining} left"


@contextlib.contextmanager
def progress(quiet: bool, sd: Any, rows: dict[str, int]) -> Iterator[Any]:
    """One progress bar over all stages, silent where stderr is no terminal: the stage and its step, samples (model
    rows) done of those predicted by stage in `rows`, time left.
    """
    from huggingface_hub.utils import tqdm

    begun, hidden = sd.evaluations, True if quiet else None
    with tqdm(total=sum(rows.values()), bar_format=BAR, disable=hidden, file=sys.stderr) as bar:

        def track(items: Iterable[Any], stage: str) -> Iterable[Any]:
            steps = list(items)
            for done, item in enumerate(steps, 1):
                bar.set_description_str(f"{stage} {done}/{len(steps)}")
                yield item
                bar.update(sd.evaluations - begun - bar.n)

        yield track
        bar.total = bar.n  # less than predicted where nothing was found, or refining stopped early
        bar.refresh()


def say_cost(rows: dict[str, int]) -> str:
    """What a dry run says."""
    each = " + ".join(str(n) for n in rows.values())
    return f"UNet rows {each} ({', '.join(rows)}) = {sum(rows.values())}"


def text_of(args: argparse.Namespace, settings: dict[str, Any], prompt: str) -> dict[str, str]:
    from ..files.metadata import metadata

    return {} if args.no_metadata else metadata(settings, prompt)


def describe(sd: Any) -> dict[str, Any]:
    path = sd.checkpoint.path
    revision = path.name if path.parent.name == "snapshots" else None
    return {"id": sd.name, "path": str(path), "revision": revision, "device": str(sd.device)} | identity(sd)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "safetensors", "tokenizers", "numpy", "pillow", "huggingface_hub")
    return {"minidiffedit": __version__, "python": sys.version.split()[0]} | {name: version(name) for name in names}
