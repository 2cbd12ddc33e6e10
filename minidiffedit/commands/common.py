"""What the commands share: options first, made from a method's signature, then what runs before and after a model."""

import argparse
import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..cost import costs
from ..files import images
from ..files.configs import configs_of, kind_of
from ..files.hub import DEFAULT, HubError, find_model, find_vae, no_model
from ..files.masks import Steering
from ..files.metadata import identity, metadata, model_hash, prompt_of, versions
from ..files.results import free, is_ours
from ..files.states import check_name
from ..methods.table import SYSTEMS
from ..options import Option
from ..plans import GIVEN, Plan, blank_plan, check_fits, check_takes_picture, idle, plan
from ..progress import progress as progress
from ..result import Result
from ..sd import StableDiffusion
from ..unet import UNetConfig
from ..views.report import check_report
from . import OWN, flag
from .estimates import estimated, rates_file, remember

MASKS = ("mask", "union", "subtract")
LIKENESS = ("model_hash", "vae_hash", "lora", "embeddings")  # which make a model another one


# ---------------------------------------------------------------- options from signatures


def early(words: list[str], **options: dict[str, Any]) -> argparse.Namespace:
    """What the words say of a few options, on which it depends what others there are: by name, as `add_argument`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, how in options.items():
        parser.add_argument(flag(name), **how)
    return parser.parse_known_args(words)[0]


def asked_plan(words: list[str]) -> Plan:
    """The method that the words name, with its defaults; without --method the first that takes what is given."""
    known = early(words, method={}, inversion={}, mask_from={})
    if known.method:
        return check_takes_picture(blank_plan(known.method, known.inversion, known.mask_from))
    found = blank_plan("diffedit", known.inversion, known.mask_from)
    flags = {word.partition("=")[0] for word in words}
    for name in GIVEN:
        if flag(name) in flags and name not in found.given:
            plans = (blank_plan(system) for system, row in SYSTEMS.items() if row.edit)
            found = next((one for one in plans if name in one.needs), found)
    return found


def add_method(parser: argparse.ArgumentParser, settled: Plan, needed: bool = True) -> None:
    """--method and --inversion, and all that the method can be given and told."""
    parser.add_argument("--method", metavar="NAME", help=f"how to edit ({settled.method}), see `minidiffedit methods`")
    parser.add_argument("--inversion", metavar="NAME", help="another way to the noise, for methods that invert")
    parser.set_defaults(method=settled.method, inversion=None)
    add_given(parser, settled, needed)
    add_options(parser.add_argument_group(OWN, f"{settled.method}:"), settled)


def add_mask_from(parser: Any) -> None:
    about = "another source of the mask, for methods that take one: contrast, or words:horse"
    parser.add_argument("--mask-from", metavar="SOURCE", help=about)


def add_given(parser: Any, settled: Plan, needed: bool = True) -> None:
    for name in settled.given:
        kind, about = GIVEN[name]
        options: dict[str, Any] = {"help": about, "default": argparse.SUPPRESS}
        options["required"] = needed and name in settled.needs and kind != "mask"  # a picture may have a hole
        if kind == "pairs":
            options |= {"action": "append", "type": prompt_pair, "metavar": "A=>B"}
        else:
            written = {"text": "TEXT", "points": "X,Y=>X,Y"}
            options |= {"type": str, "metavar": written[kind]} if kind in written else {"type": Path, "metavar": "FILE"}
        parser.add_argument(flag(name), dest=name, **options)


def add_options(group: Any, settled: Plan, *without: str) -> None:
    """A flag for each option; those not given are not set, so that the method's defaults hold."""
    for name, one in settled.options.items():
        if name in without:
            continue
        value = settled.settings[name]
        about = f"{one.about} ({'none' if value is None else value})".replace("%", "%%").strip()
        if one.type is bool:
            action = {"action": argparse.BooleanOptionalAction}
            group.add_argument(flag(name), default=argparse.SUPPRESS, help=one.about, **action)
        else:
            kind = {"choices": one.choices} if one.choices else {"metavar": LETTERS.get(one.type, "TEXT")}
            group.add_argument(flag(name), type=parsed(one), default=argparse.SUPPRESS, help=about, **kind)


LETTERS = {int: "N", float: "X"}


def parsed(one: Option) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return one.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def arguments(args: argparse.Namespace, settled: Plan) -> dict[str, Any]:
    """What was given and told, by name, masks and pictures opened."""
    opened: dict[str, Any] = {"mask": open_mask, "picture": images.read_picture}
    named = vars(args).items()
    found = {name: one for name, one in named if name in settled.options or (name in settled.given and one is not None)}
    kinds = {name: GIVEN[name].kind for name in found.keys() & GIVEN.keys()}
    return found | {name: opened[kind](found[name]) for name, kind in kinds.items() if kind in opened}


def together(plans: Sequence[Plan]) -> Plan:
    """The options and inputs of several methods as if of one; what one can do without is not needed."""
    options = {name: one for plan in reversed(plans) for name, one in plan.options.items()}
    settings = {name: value for plan in reversed(plans) for name, value in plan.settings.items()}
    given = {name: value for plan in reversed(plans) for name, value in plan.given.items()}
    needs = tuple(name for name in given if all(name in plan.needs for plan in plans))
    method = " and ".join(plan.method for plan in plans)
    return replace(plans[0], method=method, options=options, settings=settings, given=given, needs=needs)


def settled_plan(args: argparse.Namespace) -> Plan:
    names = {"inversion": args.inversion, "mask_from": getattr(args, "mask_from", None)}
    return plan(args.method, **names, **arguments(args, blank_plan(args.method, **names)))


# ---------------------------------------------------------------- options that are no method's


def add_image(parser: argparse.ArgumentParser, output: str, stdout: str = ".png") -> None:
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("picture", nargs="?", type=Path, metavar="IMAGE", help="a picture, any size; - for stdin")
    either.add_argument("--image", type=Path, metavar="IMAGE", help="the same, as an option")
    add_output(parser, output, stdout)


def add_output(parser: argparse.ArgumentParser, about: str, stdout: str = ".png") -> None:
    """stdout: what kind of file goes there where the output is `-`."""
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=f"{about}; - for stdout")
    about = "replace a file of any origin; without it only a result of minidiffedit is replaced, and only under -o"
    parser.add_argument("--overwrite", action="store_true", help=about)
    parser.set_defaults(stdout=stdout)


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


def add_no_metadata(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-metadata", action="store_true", help="write no settings into the picture")


def prompt_pair(text: str) -> tuple[str, str]:
    source, arrow, target = text.partition("=>")
    if not arrow:
        raise argparse.ArgumentTypeError(f"SOURCE=>TARGET is wanted, got {text!r}")
    return source.strip(), target.strip()


def named(text: str) -> str:
    if not text.strip():  # of a shell's variable that is not set
        raise argparse.ArgumentTypeError(f"a file, a folder or a hub id is wanted, got {text!r}")
    return text


def compiler(text: str) -> str:
    if text not in ("torch", "openvino"):
        raise argparse.ArgumentTypeError(f"torch or openvino is wanted, got {text!r}; a picture goes before --compile")
    return text


def add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    about = "mini, folder, .safetensors file or hub id (default: SD v1.5 from the cache)"
    group.add_argument("--model", type=named, metavar="MODEL", help=about)
    group.add_argument("--vae", type=named, metavar="VAE", help="another VAE for it: file, folder or hub id")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (%(default)s)")
    about = "to compute in (%(default)s: float16 on CUDA, bfloat16 at full size on CPUs that multiply it, else float32)"
    group.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"), help=about)
    about = "which kernel (%(default)s: the faster one; sdpa is torch's, triton our own, for CUDA)"
    group.add_argument("--attention", default="auto", choices=("auto", "sdpa", "triton"), help=about)
    either, about = group.add_mutually_exclusive_group(), "compile UNet and VAE by torch or openvino (on CPUs; keeps "
    about += "gigabytes for later runs): minutes at first, then faster (torch)"
    how: dict[str, Any] = {"nargs": "?", "default": False, "const": "torch", "type": compiler}
    either.add_argument("--compile", metavar="torch|openvino", help=about, **how)
    about = "one network in memory at a time; each is read again when needed"
    either.add_argument("--low-memory", action="store_true", help=about)
    group.add_argument("--variant", choices=("fp16", "non_ema"), help="which of a folder's weights")
    group.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="laid over it; repeatable")
    group.add_argument("--embedding", action="append", default=[], metavar="FILE", help="a learned word; repeatable")
    group.add_argument("--revision", help="of a hub id: branch, tag or full commit")
    group.add_argument("--cache-dir", type=Path, metavar="DIR", help="the hub's cache")
    group.add_argument("--local-files-only", action="store_true", help="never contact the hub")


# ---------------------------------------------------------------- before and after the model


def picture_and_output(args: argparse.Namespace, word: str, *others: Path | None) -> tuple[Any, Path]:
    """The picture, read, and where the result goes; `others` go beside it."""
    path = args.picture or args.image
    output = args.output or free(Path(f"{path.stem}-{word}.png"))
    picture = images.read_picture(path)
    size = getattr(args, "size", None)
    images.working_size(picture.size, 512 if size is None else size)
    inputs = [path, *(getattr(args, name, None) for name in (*MASKS, "reference", "reference_mask", "like"))]
    state, report = (getattr(args, name, None) for name in ("save_state", "report"))
    check_outputs(args, inputs, [output, *others], picture.size, state, report)
    check_masks(args, picture.size)
    return picture, output


def take_hole(args: argparse.Namespace, settled: Plan) -> None:
    """Where no mask is asked for, and a part of the picture is erased, that is the mask, if the method has one."""
    path, asked = args.picture or args.image, getattr(args, "mask", None) or getattr(args, "mask_from", None)
    if not asked and images.has_hole(path, "mask" in settled.given):
        args.mask = path


def check_masks(args: argparse.Namespace, size: tuple[int, int], at: tuple[int, int] | None = None) -> None:
    """Refuse a mask that does not fit a picture of this size, before the model's weights are read.

    at: the working size, where it is known. Where the model is not here yet, nothing is refused.
    """
    masks = [open_mask(path) for name in MASKS if (path := getattr(args, name, None))]
    configs = model_configs(args) if any(mask.size != size for mask in masks) else None
    if configs:
        factor = configs["vae"].factor
        side = getattr(args, "size", None) or configs["unet"].sample_size * factor
        for mask in masks:
            images.latent_mask(mask, size, at or images.working_size(size, side, factor), factor)


def model_configs(args: argparse.Namespace) -> dict[str, Any] | None:
    """The networks' configs, from the model's small files; None where only loading can tell."""
    where = args.revision, args.cache_dir
    try:
        options: dict[str, Any] = {"local_files_only": True, "variant": args.variant, "with_vae": not args.vae}
        path = find_model(args.model or DEFAULT, *where, **options)
        vae = find_vae(args.vae, args.cache_dir, True, half=False) if args.vae else None
        return configs_of(path, vae) if os.path.exists(path) else None
    except HubError:
        return None


def check_weights(args: argparse.Namespace, plans: Iterable[Plan], configs: dict[str, Any] | None) -> None:
    """Refuse, before any weights are read, a method that needs another kind of them; configs: of `model_configs`."""
    for one in plans if configs else ():
        assert configs
        check_fits(one, kind_of(configs), args.model)


def predicted(args: argparse.Namespace, *plans: Plan, old: Plan | None = None) -> list[dict[str, int]]:
    """Model rows by stage of plans on one picture, each reusing the ones before it; no weights are read. old: that of a
    saved edit, which they reuse too.
    """
    if getattr(args, "invert", False) or getattr(args, "union", None):  # an empty mask will be filled
        filled = {"mask": Image.new("L", (8, 8), 255)}
        plans = tuple(replace(p, given=p.given | filled) if p.given.get("mask") is not None else p for p in plans)
    configs, before = model_configs(args), [old] if old else []
    check_weights(args, plans, configs)
    return costs([*before, *plans], configs["unet"] if configs else UNetConfig())[len(before) :]


def open_mask(path: Path | None) -> Any:
    """The file as a picture, which may keep a mask's cells; refused now if it is no mask."""
    picture = images.read_picture(path) if path else None
    if picture:
        images.read_mask(picture)
    return picture


def steering_names() -> list[str]:
    return [one.name for one in fields(Steering)]


def steering_of(args: argparse.Namespace) -> Any:
    """The steering that was asked for, None if none was."""
    asked = {name: getattr(args, name, None) for name in steering_names()}
    given = {name: value for name, value in asked.items() if value is not None and value is not False}  # 0 is asked for
    opened = {name: open_mask(value) for name, value in given.items() if isinstance(value, Path)}
    return Steering(**given | opened) if given else None


def check_outputs(
    args: argparse.Namespace,
    inputs: list[Path | None],
    outputs: list[Path | None],
    size: tuple[int, int] = (1, 1),
    state: Path | None = None,
    report: Path | None = None,
) -> None:
    """Refuse, before any work, what could not be written at its end or would overwrite an input, another result, or a
    file that is none of ours.

    outputs: pictures of a size; state: a saved edit; report: a page.
    """
    if state:
        check_name(state)
    if report:
        check_report(report)
    weights = [args.model, args.vae, *args.embedding, *args.lora, *(one.rpartition(":")[0] for one in args.lora)]
    taken = [*filter(None, inputs), *map(Path, filter(None, weights))]
    for path in filter(None, [*outputs, state, report]):
        if path is not state and path is not report:
            images.picture_format(path, size)
        if os.path.isdir(path):
            raise ValueError(f"{path} is a folder; name a file")
        if not os.path.isdir(path.parent):
            raise ValueError(f"{path}: there is no folder {path.parent}")
        try:
            tempfile.TemporaryFile(dir=path.parent).close()
            with contextlib.suppress(FileNotFoundError):  # a name that is too long raises another
                path.lstat()
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from error
        if any(same_file(path, other) for other in taken):
            raise ValueError(f"{path} would overwrite an input or another result; choose another name")
        if os.path.exists(path) and not args.overwrite and not is_ours(path):
            raise ValueError(f"{path} is there, and no result of minidiffedit; --overwrite replaces it all the same")
        taken.append(path)


def same_file(a: Path, b: Path) -> bool:
    return os.path.realpath(a) == os.path.realpath(b) or (a.exists() and b.exists() and a.samefile(b))


def load(args: argparse.Namespace, plans: Sequence[Plan] = ()) -> Any:
    """The model of the options; here the heavy imports are over, and an interrupt that they swallowed takes effect.

    plans: what it is for, checked before its weights are read where `predicted` has not.
    """
    if plans:
        check_weights(args, plans, model_configs(args))
    sd = load_model(args)
    if args.interrupted:
        raise KeyboardInterrupt
    if made := getattr(args, "liked", {}):
        here = identity(sd)
        if other := [f"{one} {made.get(one, 'none')}" for one in LIKENESS if made.get(one) != here.get(one)]:
            warnings.warn(f"{args.like} was made with another model ({', '.join(other)})", stacklevel=2)
    return sd


def load_model(args: argparse.Namespace) -> Any:
    names = ("vae", "device", "dtype", "variant", "revision", "cache_dir", "attention", "compile", "low_memory", "lora")
    options = {name: getattr(args, name) for name in names} | {"embeddings": args.embedding}
    options["local_files_only"] = args.local_files_only or args.model is None
    with contextlib.suppress(RuntimeError):  # for a user without a home: torch's own folder
        if args.compile:
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(rates_file().with_name("compiled")))
    try:
        sd = StableDiffusion.load(args.model or DEFAULT, **options)
        if args.compile and not args.quiet:
            sd.unet.note = say_note  # type: ignore[assignment]
        return sd
    except HubError as error:
        if args.model:
            raise
        raise HubError(no_model(args.cache_dir)) from error


def say_note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def tracker(quiet: bool, unit: str = "step") -> Any:
    """A progress bar over items, silent where stderr is no terminal."""
    from huggingface_hub.utils import tqdm

    def track(items: Iterable[Any], stage: str, total: int | None = None) -> Iterable[Any]:
        return tqdm(items, desc=stage, total=total, unit=unit, disable=True if quiet else None, file=sys.stderr)

    return track


def dry_run(args: argparse.Namespace, plans: list[Plan], rows: dict[str, int], size: Any) -> dict[str, Any]:
    """The result of a run of plans that is not made; size: of the picture, (width, height)."""
    first, paid = plans[0], {"predicted": sum(rows.values()), "paid": 0}
    said = {"method": first.method, "rows": paid, "seed": first.settings["seed"], "evaluations": rows}
    return said | estimated(args, plans, rows, size, model_configs(args)) | {"settings": first.record}


def say_dry(result: dict[str, Any]) -> str:
    """What a dry run says."""
    seconds, memory = result.get("seconds"), result.get("memory")
    said = [say_cost(result["evaluations"])]
    said += [f"seconds besides loading: {'' if seconds is None else f'about {seconds:.1f}, '}{result['rate']}"]
    said += [f"memory besides Python's and torch's own: {f'about {memory / 2**30:.2f} GiB' if memory else 'unknown'}"]
    return "\n".join(said)


def say_idle(args: argparse.Namespace, *plans: Plan) -> None:
    """What was given and changes nothing in any of the plans; not what --like took."""
    known, found = [{*one.settings, *one.given} for one in plans], set[str]()
    for name in vars(args).keys() - getattr(args, "taken", {}).keys():
        told = [bool(idle(one, [name])) for one, has in zip(plans, known) if name in has]
        found |= {name} if told and all(told) else set()
    for line in idle(plans[max(range(len(plans)), key=lambda i: len(known[i] & found))], found, flag):
        warnings.warn(line, stacklevel=2)


def say_cost(rows: dict[str, int]) -> str:
    return f"UNet rows {' + '.join(map(str, rows.values()))} ({', '.join(rows)}) = {sum(rows.values())}"


def text_chunks(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, str]:
    """The metadata of a picture with these settings, none where it is not wanted."""
    return {} if args.no_metadata else metadata(settings, prompt_of(settings))


def record_of(args: argparse.Namespace, done: Result) -> dict[str, Any]:
    """The settings of a result with its model, its mask and pictures by the hash of their files."""
    files = {name: path for name in done.plan.given if isinstance(path := getattr(args, name, None), Path)}
    done.settings.update({name: model_hash(path) for name, path in files.items()})
    return done.settings | identity(done.sd)


def outcome(args: argparse.Namespace, done: Result, rows: dict[str, int], record: dict[str, Any]) -> dict[str, Any]:
    """What every command says of a run, whose rate is remembered for a dry run's estimate."""
    remember(args, done)
    said: dict[str, Any] = {name: getattr(done, name) for name in ("method", "seed", "verdict", "coverage")}
    said |= {"rows": {"predicted": sum(rows.values()), "paid": done.rows}, "evaluations": done.evaluations}
    said |= {"seconds": done.seconds, "settings": record}
    return said | {"model": describe(done.sd), "versions": versions()}


def describe(sd: Any) -> dict[str, Any]:
    path = sd.checkpoint.path
    revision = path.name if path.parent.name == "snapshots" else None
    return {"id": sd.name, "path": str(path), "revision": revision, "device": str(sd.device)} | identity(sd)
