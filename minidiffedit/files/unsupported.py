"""What a weights file is, told by its first bytes and its header: the door before any memory is spent.

`read_header` takes a safetensors file apart and refuses what is broken; `refuse_header` and `refuse_folder` refuse
what is sound but not Stable Diffusion v1, each with what it is and what to do.
"""

import json
import math
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "U64": 8, "U32": 4, "U16": 2}
LONGEST_HEADER = 100_000_000  # safetensors' own limit
LARGEST = 1 << 34  # bytes; the largest official file has 7.7 GB

PICKLE = "a pickle file: it can run code when opened and is never read here; use the .safetensors twin"
LINEAR_V2 = "an SD v2 checkpoint, which uses another text encoder; use an SD v1 model"
SDXL = "an SDXL checkpoint; only SD v1 is supported"
OTHER = "not a UNet of SD v1 (it looks like SD3, Flux or another transformer); use an SD v1 model"
FIRST_CONV = {
    5: "the UNet of SD v2 depth (5 input channels); use an SD v1 base model",
    7: "the UNet of the x4 upscaler (7 input channels); use an SD v1 base model",
}
PARTS = {"first_stage_model.": "VAE", "cond_stage_model.": "text encoder"}


class TensorInfo(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


Header = dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Name -> dtype and shape of a safetensors file; reads the header only.

    Raises ValueError, naming the path, for anything that is not a whole, sound safetensors file.
    """
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    refuse_name(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
            if start[8:9] != b"{" or length > LONGEST_HEADER:
                raise ValueError(f"{path} is {sniff(start, size)}")
            if size < 8 + length:
                raise ValueError(f"{path} is cut off: {size} bytes on disk, over {8 + length} expected; {AGAIN}")
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    header, end = parse_header(path, raw)
    if size != 8 + length + end:
        raise ValueError(f"{path} is damaged: {size} bytes on disk, {8 + length + end} expected; {AGAIN}")
    if size > LARGEST:
        raise ValueError(f"{path} has {size} bytes; an SD v1 file has at most 8 GB")
    try:
        with safe_open(path, framework="pt"):  # the library's own checks: overlaps, holes, alignment
            return header
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error} ({size} bytes on disk); {AGAIN}") from error
    except RuntimeError as error:  # torch's, where the address space is too small for the file
        raise ValueError(f"{path} cannot be opened: {error}") from error


AGAIN = "download it again"


def sniff(start: bytes, size: int) -> str:
    """What a file that is not safetensors seems to be."""
    if start.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return PICKLE
    if start.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer ({size} bytes), not the weights; run git lfs pull"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        return "an HTML page, probably a failed download; download the file itself"
    if len(start) < 9:
        return f"no safetensors file ({size} bytes: empty or cut off); {AGAIN}"
    return f"no safetensors file ({size} bytes, it starts with {start[:8]!r}); {AGAIN}"


def parse_header(path: Path, raw: bytes) -> tuple[Header, int]:
    """The JSON of a header -> tensors and where their data ends; duplicate keys, refused."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in it")
        return found

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
        entries.pop("__metadata__", None)
        header, end = {}, 0
        for name, entry in entries.items():
            begin, stop = entry["data_offsets"]
            shape = tuple(entry["shape"])
            width = BYTES.get(entry["dtype"])
            if width is not None and stop - begin != width * math.prod(shape):
                raise ValueError(f"tensor {name!r} has {stop - begin} bytes for {entry['dtype']} {list(shape)}")
            header[name] = TensorInfo(str(entry["dtype"]), shape)
            end = max(end, stop)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header is not sound ({error}); {AGAIN}") from error
    return header, end


def refuse_header(path: Path, header: Header, whole: bool) -> None:
    """Raise ValueError if the tensors are not SD v1's, saying what they are. whole: all three networks are expected
    (a single file), else the file is a folder's UNet.
    """
    what = add_on(header) or other_model(header, whole)
    if what:
        raise ValueError(f"{path} is {what}")


def add_on(header: Header) -> str | None:
    """Names what only adds to a checkpoint, or is one in a form not read here."""

    def has(*parts: str) -> bool:
        return any(part in key for key in header for part in parts)

    if any(info.dtype.startswith("F8") for info in header.values()):
        return "stored in 8-bit floats; use the fp16 file"
    if has("lora_unet_", "lora_te", "lora_down.", "lora_up.", "lora_A.", "lora_B.", "_lora.", "lycoris_"):
        return "a LoRA, an add-on to a checkpoint; give it with --lora, beside the --model"
    if has("emb_params", "string_to_param") or (len(header) == 1 and next(iter(header.values())).shape[-1:] == (768,)):
        return "a learned word (textual inversion), not a checkpoint; give it with --embedding, beside the --model"
    if has("control_model.", "controlnet_cond_embedding."):
        return "a ControlNet, not a checkpoint; use an SD v1 model"
    return None


def other_model(header: Header, whole: bool) -> str | None:
    """Names another model family, or a part of one, by keys and shapes."""
    keys = header.keys()

    def starts(*prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in keys)

    if starts("conditioner.embedders."):
        return SDXL
    if any(part in key for key in keys for part in ("joint_blocks.", "double_blocks.")) or starts(
        "text_encoders.", "transformer_blocks.", "single_transformer_blocks."
    ):
        return OTHER
    unet = "model.diffusion_model." if starts("model.diffusion_model.") else ""
    inputs = input_channels(header)
    if inputs in FIRST_CONV:
        return FIRST_CONV[inputs]
    if starts("cond_stage_model.model."):
        return LINEAR_V2
    blocks = [unet + block for block in ("down_blocks.0.", "input_blocks.1.")]
    attended = [unet + block for block in ("down_blocks.0.attentions.", "input_blocks.1.1.")]
    if inputs and starts(*blocks) and not starts(*attended):
        return SDXL
    for key, info in header.items():
        if key.startswith(unet) and (
            (key.endswith(".proj_in.weight") and len(info.shape) == 2)
            or (key.endswith("attn2.to_k.weight") and info.shape[-1:] == (1024,))
        ):
            return LINEAR_V2
    if whole and not unet:
        if starts("encoder.down", "decoder.up", "encoder.conv_in", "decoder.conv_in", "first_stage_model."):
            return "only the VAE; the whole model is needed"
        if "conv_in.weight" in keys or "input_blocks.0.0.weight" in keys:
            return "only the UNet; the whole model is needed"
        if starts("text_model.", "embeddings.", "cond_stage_model."):
            return "only the text encoder; the whole model is needed"
    if whole and unet:
        lacking = [what for prefix, what in PARTS.items() if not starts(prefix)]
        if len(lacking) == 2:
            return "only the UNet; the whole model is needed"
        if lacking:
            return f"a checkpoint without its {lacking[0]}; use one that holds all three networks"
    return None


def input_channels(header: Header) -> int:
    """What the UNet's first convolution takes, under any of its names; 0 where there is none."""
    names = [unet + name for unet in ("model.diffusion_model.", "") for name in ("input_blocks.0.0", "conv_in")]
    shapes = [header[f"{name}.weight"].shape for name in names if f"{name}.weight" in header]
    return shapes[0][1] if shapes and len(shapes[0]) == 4 else 0


def refuse_name(path: Path) -> None:
    """Raise ValueError for a file that its name alone rules out."""
    if path.suffix.lower() in (".ckpt", ".bin", ".pt", ".pth", ".pkl"):
        raise ValueError(f"{path} is {PICKLE}")
    if re.search(r"-\d{5}-of-\d{5}", path.name) or path.name.endswith(".safetensors.index.json"):
        raise ValueError(f"{path} is one shard of several; official v1 files are not sharded; merge them into one")


def refuse_folder(folder: Path) -> None:
    """Raise ValueError for a folder that its sub-folders rule out."""
    if (folder / "text_encoder_2").exists():
        raise ValueError(f"{folder} is {SDXL}")
    if (folder / "transformer").exists():
        raise ValueError(f"{folder} is {OTHER}")
    alone = sorted(folder.glob("*.safetensors"))
    if alone and not (folder / "unet").exists():
        raise ValueError(f"{folder} has no folder unet/ but {alone[0].name}: give that file instead")
