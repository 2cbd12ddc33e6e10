"""What a result carries about its making: the `parameters` text that viewers of neighbouring tools read, and JSON.

No clock value, path or library version stands in it: the same command writes the same file.
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

# Setting -> the name under which A1111's viewers know it, or its own.
NAMES = {
    "steps": "Steps", "sampler": "Sampler", "guidance_scale": "CFG scale", "seed": "Seed", "working_size": "Size",
    "model_hash": "Model hash", "model": "Model", "strength": "Denoising strength", "source": "Source prompt",
    "mask_threshold": "DiffEdit mask threshold", "mask_clip": "DiffEdit mask clip", "maps": "DiffEdit maps",
    "mask_strength": "DiffEdit mask strength", "encode_text": "DiffEdit encode text",
}  # fmt: skip


@cache
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


def metadata(settings: dict[str, Any], prompt: str) -> dict[str, str]:
    """Settings and the prompt -> text chunks by name: `parameters` and `minidiffedit`."""
    known = settings | {"sampler": "DDIM", "edited": "source" in settings}
    if known.get("working_size"):
        known["working_size"] = "x".join(str(side) for side in known["working_size"])
    values = ", ".join(f"{NAMES[key]}: {quoted(known[key])}" for key in NAMES if known.get(key) not in (None, ""))
    lines = [prompt, *([f"Negative prompt: {n}"] if (n := settings.get("negative_prompt")) else []), values]
    record = settings | {"edited": known["edited"], "prompt": prompt}
    return {"parameters": "\n".join(lines), "minidiffedit": json.dumps(record, sort_keys=True, ensure_ascii=False)}


def quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',"\n:') else text
