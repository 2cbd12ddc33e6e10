"""info, verify and download."""

import argparse
from pathlib import Path
from typing import Any

from .common import add_command, add_model, describe, load, tracker, versions


def add(commands: Any) -> None:
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


TRAINED = {"base": "", "inpainting": ", inpainting", "instruct": ", InstructPix2Pix"}


def run_info(args: argparse.Namespace) -> dict[str, Any]:
    import math

    from ..checkpoint import open_checkpoint
    from ..files.hub import find_model

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
    return {
        "model": args.model,
        "kind": f"Stable Diffusion v1{TRAINED[found.kind]}",
        "layout": found.layout,
        "training_size": found.configs["unet"].sample_size * found.configs["vae"].factor,
        "tokenizer": str(found.tokenizer or "packaged"),
        "networks": networks,
    }


def run_verify(args: argparse.Namespace) -> dict[str, Any]:
    from ..many.verify import verify

    sd = load(args)
    return verify(sd, tracker(args.quiet)) | {"model": describe(sd), "versions": versions()}


def run_download(args: argparse.Namespace) -> dict[str, Any]:
    from ..files.hub import DEFAULT, download

    path = download(args.id or DEFAULT, variant=args.variant, revision=args.revision, cache_dir=args.cache_dir)
    return {"id": args.id or DEFAULT, "path": str(path)}


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
