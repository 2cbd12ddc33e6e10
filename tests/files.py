"""Weights files for the loader's tests: the manifests' without data, byte for byte by hand, the tiny model's."""

import json
import struct
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import save_file

from minidiffedit.checkpoint import SINGLE
from minidiffedit.files.unsupported import BYTES

MANIFESTS = Path(__file__).parent / "data" / "manifests"
CONFIGS = MANIFESTS / "configs"
SHAPES = {
    "unet": "diffusers_unet", "vae": "diffusers_vae_fp16_newnames", "vae, old names": "diffusers_vae_fp32_oldnames",
    "text_encoder": "diffusers_text_encoder", "text_encoder, flat": "diffusers_text_encoder_flat",
    "single": "compvis_v1-5-pruned-emaonly",
}  # fmt: skip

Entries = dict[str, tuple[list[int], str]]


def manifest(name: str) -> Entries:
    """key -> (shape, dtype), as published."""
    entries = json.loads((MANIFESTS / f"{SHAPES[name]}.json").read_text())
    return {key: (shape, dtype) for key, (shape, dtype) in entries.items()}


def raw(path: Path, header: object, data: bytes = b"", pad: int = 0) -> Path:
    """A file as told, sound or not: length, header (JSON of an object, or bytes), spaces, data."""
    text = (header if isinstance(header, bytes) else json.dumps(header).encode()) + b" " * pad
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape: list[int], begin: int = 0, dtype: str = "F32") -> dict[str, object]:
    size = BYTES[dtype] * torch.Size(shape).numel()
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}


def hollow(path: Path, entries: Entries, metadata: dict[str, str] | None = None) -> Path:
    """A sound file whose data are a hole on the disk: full size in the header, no bytes."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for key, (shape, dtype) in entries.items():
        header[key] = entry(shape, end, dtype)
        end = header[key]["data_offsets"][1]
    raw(path, header)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + end)
    return path


def hollow_folder(folder: Path, configs: str = "v1-5", **entries: Entries) -> Path:
    """Official v1 in the hub's layout, without data; entries by network replace the manifest's."""
    for network, file in tiny.FILES.items():
        hollow(folder / network / file, entries.get(network, manifest(network)))
        config = (CONFIGS / configs / network / "config.json").read_text()
        (folder / network / "config.json").write_text(config)
    return folder


def single_state() -> dict[str, torch.Tensor]:
    """The tiny model under CompVis' names, the VAE's attention as 1x1 convolutions."""
    state = {}
    for network, module in zip(tiny.FILES, tiny.networks()):
        for name, tensor in module.state_dict().items():
            conv = network == "vae" and tensor.ndim == 2
            state[SINGLE[network](name)[0]] = (tensor[..., None, None] if conv else tensor).contiguous()
    return state


def save(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"} | (metadata or {})
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
    return path
