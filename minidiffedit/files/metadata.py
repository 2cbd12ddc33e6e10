"""What a result carries about its making: the `parameters` text that viewers of neighbouring tools read, and JSON.

No clock value, path or library version stands in it: the same command writes the same file.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__

if TYPE_CHECKING:
    from ..result import Result
    from ..sd import StableDiffusion

# Setting -> the name under which A1111's viewers know it, or its own.
NAMES = {
    "steps": "Steps",
    "sampler": "Sampler",
    "eta": "Eta",
    "guidance_scale": "CFG scale",
    "seed": "Seed",
    "working_size": "Size",
    "model_hash": "Model hash",
    "model": "Model",
    "lora": "Lora hashes",
    "embeddings": "TI hashes",
    "vae_hash": "VAE hash",
    "vae": "VAE",
    "strength": "Denoising strength",
    "source": "Source prompt",
}
SECOND_ORDER = {"DDIM": "DPM++ 2M", "DDPM": "DPM++ 2M SDE"}  # of who steps, where an option asks for it
OURS = ("mask_threshold", "mask_clip", "maps", "mask_strength", "encode_text")
NAMES |= {name: f"DiffEdit {name.replace('_', ' ')}" for name in OURS}


def once(read: Callable[[Path], str]) -> Callable[[Path], str]:
    """Read a file once, and again when another stands under its name or it was written to."""
    known: dict[tuple[int, ...], str] = {}

    @wraps(read)
    def remembered(path: Path) -> str:
        found = path.stat()
        key = found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
        if key not in known:
            known[key] = read(path)
        return known[key]

    return remembered


@once
def sha256(path: Path) -> str:
    """Of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def model_hash(path: Path) -> str:
    """First ten digits of a file's sha256; in the hub's cache the blob's name is taken for it, unread."""
    blob = path.resolve().name
    return (blob if path.is_symlink() and len(blob) == 64 else sha256(path))[:10]


def identity(sd: "StableDiffusion") -> dict[str, str]:
    """The model as a picture's settings name it: its name, the hash of the UNet's file if it has one, the dtype; a VAE
    from elsewhere in the same way; its add-ons; that the UNet predicts v.
    """
    said = {"dtype": str(sd.dtype).removeprefix("torch.")} | ({"prediction": "v"} if sd.prediction == "v" else {})
    if sd.checkpoint is None:
        return {"model": "in memory"} | said
    parts = sd.checkpoint.parts
    if sd.vae_name:
        said |= {"vae": plain_name(sd.vae_name), "vae_hash": model_hash(parts["vae"].path)}
    return {"model": plain_name(sd.name), "model_hash": model_hash(parts["unet"].path)} | sd.checkpoint.add_ons | said


def versions() -> dict[str, str]:
    """Of what runs here: for JSON and pages, never in a picture. A build of torch is told by its full name."""
    import torch

    ours = {"minidiffedit": __version__, "python": sys.version.split()[0], "torch": str(torch.__version__)}
    return ours | {name: version(name) for name in ("safetensors", "tokenizers", "numpy", "pillow", "huggingface_hub")}


def plain_name(name: str) -> str:
    """A model's name without its path, as text; a hub id as it is."""
    here = Path(name)
    return os.fsencode(here.resolve().name if os.path.exists(here) else name).decode(errors="replace")


def describe_result(result: "Result") -> dict[str, str]:
    """The text chunks of a result's picture, by name."""
    return metadata(result.settings | identity(result.sd), prompt_of(result.settings))


def prompt_of(settings: dict[str, Any]) -> str:
    """The target, the instruction, or the targets of several pairs."""
    texts = settings.get("target") or settings.get("instruction")
    return texts or "; ".join(target for _, target in settings.get("edits", ()))


def metadata(settings: dict[str, Any], prompt: str) -> dict[str, str]:
    """Settings and the prompt -> text chunks by name: `parameters` and `minidiffedit`."""
    sampler = sampler_of(settings.get("method", "diffedit"))
    known = settings | {"sampler": SECOND_ORDER[sampler] if settings.get("sampler") == "dpmsolver++" else sampler}
    if known.get("working_size"):
        known["working_size"] = "x".join(str(side) for side in known["working_size"])
    values = ", ".join(f"{NAMES[key]}: {quoted(known[key])}" for key in NAMES if known.get(key) not in (None, ""))
    lines = [prompt, *([f"Negative prompt: {n}"] if (n := settings.get("negative_prompt")) else []), values]
    record = settings | {"edited": "mask" in settings, "prompt": prompt}  # runs on a picture say what their mask is
    return {"parameters": "\n".join(lines), "minidiffedit": json.dumps(record, sort_keys=True, ensure_ascii=False)}


def sampler_of(method: str) -> str:
    """Who steps: the method's inversion, or where it has none its editor, by its module's SAMPLER; DDIM's step else."""
    from ..plans import beside, blank_plan

    places = blank_plan(method).functions
    return beside(places.get("path", places["latent"]), "SAMPLER") or "DDIM"


def quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',"\n:') else text
