"""info, verify, download and bench: what a model is, and what this machine makes of it."""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files.results import settings_in
from . import shown

# What a UNet is made for.
TRAINED = {"base": "", "inpainting": ", inpainting", "instruct": ", InstructPix2Pix", "example": ", Paint by Example"}


def add_info(parser: argparse.ArgumentParser, words: list[str]) -> None:
    about = "model, VAE, LoRA, learned word, saved edit or result: a folder, a file or a cached hub id"
    parser.add_argument("model", metavar="MODEL", help=about)
    parser.add_argument("--variant", choices=("fp16", "non_ema"), help="which of a folder's weights")
    add_hub(parser)


def add_hub(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="of a hub id: branch, tag or full commit")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="the hub's cache")


def add_verify(parser: argparse.ArgumentParser, words: list[str]) -> None:
    from .common import add_model

    add_model(parser)


def add_download(parser: argparse.ArgumentParser, words: list[str]) -> None:
    about = "hub id (default: stable-diffusion-v1-5/stable-diffusion-v1-5)"
    parser.add_argument("id", nargs="?", metavar="ID", help=about)
    parser.add_argument("--variant", choices=("fp16", "non_ema"), help="fp16: half the size, enough for a GPU")
    add_hub(parser)


def add_bench(parser: argparse.ArgumentParser, words: list[str]) -> None:
    from .common import add_model

    parser.add_argument("--size", type=int, metavar="PX", help="side of the pictures, 64..1024 (default: the model's)")
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="sampling steps of the edit (%(default)s)")
    parser.add_argument("--maps", type=int, default=2, metavar="N", help="maps of its mask (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="timed calls per stage (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="random weights of a tiny model, to try the command itself")
    add_model(parser)
    parser.epilog = "Without --model: random weights of SD v1's shapes, 2 or 4 GB in a temporary folder."


def run_info(args: argparse.Namespace) -> dict[str, Any]:
    import math

    from ..checkpoint import open_checkpoint
    from ..files.hub import HubError, find_model, find_vae
    from ..files.images import FORMATS

    if settings := settings_in(Path(args.model)):
        args.say = say_settings
        return settings
    kind = FORMATS.get(Path(args.model).suffix.lower())
    if kind and os.path.isfile(args.model):
        wanted = "where a .safetensors file is wanted, or one that holds settings of minidiffedit"
        raise ValueError(f"{args.model} is a picture ({kind}), {wanted}: these were left out, or another tool wrote it")
    try:
        path = find_model(args.model, args.revision, args.cache_dir, local_files_only=True, variant=args.variant)
    except HubError as error:
        try:
            path = find_vae(args.model, args.cache_dir, True, half=False)
        except HubError:
            raise error from None
    if other := part_of_a_model(path):
        return {"model": args.model} | other
    found = open_checkpoint(path, variant=args.variant)
    networks = {}
    for name, part in found.parts.items():
        tensors = [part.header[key] for key in part.keys.values()]
        networks[name] = {"file": str(part.path), "tensors": len(tensors)} | {
            "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "dtypes": sorted({tensor.dtype for tensor in tensors}),
        }
    return {
        "model": args.model,
        "kind": f"Stable Diffusion v1{TRAINED[found.kind]}{', v-prediction' if found.prediction == 'v' else ''}",
        "use": "--model",
        "layout": found.layout,
        "training_size": found.configs["unet"].sample_size * found.configs["vae"].factor,
        "tokenizer": str(found.tokenizer or "packaged"),
        "networks": networks,
    }


def part_of_a_model(path: Path) -> dict[str, Any] | None:
    """What a file or folder is that goes beside a model: its kind, for which model, what takes it. None for others."""
    from ..files.configs import lone_vae, vae_config
    from ..files.states import read_record
    from ..files.unsupported import Known, add_on, read_header

    header = read_header(path) if os.path.isfile(path) else None
    if header and "minidiffedit" in header.metadata:
        _, record = read_record(path)
        return {"kind": f"a saved edit by {record['settings']['method']}", "for": record["model_name"], "use": "resume"}
    known = add_on(header) if header else None
    if isinstance(known, Known) and known.fits:
        return {"kind": known.what, "for": known.model or "a model that its names do not tell", "use": known.option}
    if vae := lone_vae(path):
        config, scale = vae_config(vae, None), "Stable Diffusion v1"
        if config != type(config)():
            scale = f"a model whose latents are scaled by {config.scaling_factor}"
        return {"kind": "a VAE", "for": scale, "use": "--vae"}
    return None


def run_verify(args: argparse.Namespace) -> dict[str, Any]:
    from ..many.verify import COUNTS, verify
    from .common import describe, load, progress, versions

    sd = load(args)
    with progress(args.quiet, COUNTS) as watch:
        return verify(sd, watch) | {"model": describe(sd), "versions": versions()}


def run_download(args: argparse.Namespace) -> dict[str, Any]:
    from ..files.hub import DEFAULT, download

    path = download(args.id or DEFAULT, variant=args.variant, revision=args.revision, cache_dir=args.cache_dir)
    return {"id": args.id or DEFAULT, "path": str(path)}


def say_download(result: dict[str, Any]) -> str:
    return str(result["path"])


def say_verify(result: dict[str, Any]) -> str:
    lines = []
    for network, file in result["files"].items():
        official = f"official, {file['official']}" if file["official"] else "none of the official files"
        lines.append(f"{network}: {file['sha256']} ({official}) {file['file']}")
    rows = " + ".join(str(n) for n in result["evaluations"].values())
    where = f"{result['model']['device']}, {result['model']['dtype']}"
    lines.append(f"known edit: {rows} UNet rows as specified, sha256 {result['edit_sha256']} ({where})")
    return "\n".join(lines)


def say_settings(found: dict[str, Any]) -> str:
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in found.items()]
    return "\n".join([*map(shown, lines), "`minidiffedit edit PICTURE --like` this file takes them"])


def say_info(result: dict[str, Any]) -> str:
    if "for" in result:
        command = "minidiffedit resume" if result["use"] == "resume" else f"{result['use']} of every command that edits"
        return f"{result['model']}: {result['kind']} for {result['for']}; taken by {command}"
    lines = [f"{result['model']}: {result['kind']}, {result['layout']}, trained at {result['training_size']} px"]
    for name, one in result["networks"].items():
        held = f"{one['parameters']:,} parameters in {one['tensors']} tensors, {' '.join(one['dtypes'])}"
        lines.append(f"  {name}: {held}, {one['file']}")
    return "\n".join([*lines, f"  tokenizer: {result['tokenizer']}"])


# ---------------------------------------------------------------- bench

PLAIN = {"attention": "sdpa", "compile": False, "low_memory": False}


def run_bench(args: argparse.Namespace) -> dict[str, Any]:
    from ..many.bench import bench
    from .common import load, versions

    if args.tiny and args.model:
        raise ValueError("--tiny has random weights; leave out --model")
    with weights(args) as folder:

        def loaded(plain: bool) -> Any:
            options = {name: value for name, value in PLAIN.items() if plain and hasattr(args, name)}
            return load(argparse.Namespace(**vars(args) | {"model": folder} | options))

        def say(line: str) -> None:
            if not args.quiet:
                print(f"measuring: {line}", file=sys.stderr, flush=True)

        found = bench(loaded, **{name: getattr(args, name) for name in ("size", "steps", "maps", "repeats")}, say=say)
    found["model"] = {"id": args.model or f"random, {'tiny' if args.tiny else 'full size'}"} | found["model"]
    options = {name: getattr(args, name) for name in PLAIN if hasattr(args, name)}
    return found | {"options": options, "versions": versions()}


@contextlib.contextmanager
def weights(args: argparse.Namespace) -> Iterator[str]:
    """The model that was asked for, or random weights in a folder that does not stay."""
    if args.model:
        yield args.model
        return
    from ..fast import choose_device, choose_dtype
    from ..many.bench import FULL, TINY, parameters, write_random

    configs = TINY if args.tiny else FULL
    dtype = choose_dtype(args.dtype, choose_device(args.device), parameters(configs))
    with tempfile.TemporaryDirectory(prefix="minidiffedit-bench-") as folder:
        yield str(write_random(Path(folder), configs, dtype))


def say_bench(found: dict[str, Any]) -> str:
    machine, model, ceiling, memory = (found[name] for name in ("machine", "model", "ceiling", "memory"))
    options = ", ".join(f"{name} {value}" for name, value in found["options"].items()) or "the plain path"
    lines = [
        f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}, load {machine['load_average']}",
        f"{model['id']}, {model['dtype']}, {model['size']} x {model['size']} pixels; {options}",
        f"matrix products reach {ceiling['tflop_per_s']:.3f} TFLOP/s ({ceiling['side']} x {ceiling['side']})",
        "",
        f"{'stage':16} {'samples':>7} {'first':>8} {'seconds':>8} {'least':>8} {'most':>8} {'TFLOP':>7} {'TFLOP/s':>8} "
        f"{'of best':>7} {'cores':>5}  error",
    ]
    for name, row in found["stages"].items():
        lines.append(
            f"{name:16} {row['samples']:7} {row['first_seconds']:8.3f} {row['seconds']:8.3f} {row['least']:8.3f} "
            f"{row['most']:8.3f} {row['tflop']:7.3f} {row['tflop_per_s']:8.3f} {row['of_ceiling']:7.0%} "
            f"{row['cpu_over_wall']:5.2f}  {say_error(row)}"
        )
    edit, most = found["edit"], "unknown: this system does not tell it"
    if memory["peak_bytes"]:
        most = f"{memory['peak_bytes'] / 2**30:.2f} GiB, {memory['peak_over_weights']:.2f} x the weights"
    rows, further = (" + ".join(str(n) for n in one["rows"].values()) for one in (edit, edit["further"]))
    each = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in edit["seconds"].items())
    lines += [
        "",
        f"an edit, {edit['steps']} steps, {edit['maps']} maps: {rows} rows, {edit['seconds_in_all']:.2f} s "
        f"({each}), {edit['tflop_per_s']:.3f} TFLOP/s, {edit['of_ceiling']:.0%} of the best",
        f"a further edit of the picture: {further} rows, {edit['further']['over_first']:.2f} of that time",
        f"loaded in {found['load_seconds']:.1f} s; peak memory {most}",
    ]
    return "\n".join(lines)


def say_error(row: dict[str, Any]) -> str:
    if "error" not in row:
        return ""
    return f"{row['error']:.1e}" + ("" if row["error"] <= row["error_bound"] else f" ABOVE {row['error_bound']:.0e}")
