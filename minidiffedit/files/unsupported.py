"""What a weights file is, told by its first bytes and its header: the door before any memory is spent.

`read_header` takes a safetensors file apart and refuses what is broken; `refuse_header` and `refuse_folder` refuse
what is sound but not Stable Diffusion v1, each with what it is and what to do; `add_on` names what adds to a model.
"""

import json
import math
import os
import re
import struct
import warnings
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
ONLY_VAE = "only the VAE; the whole model is needed, and --vae takes this one beside it"
FIRST_CONV = {
    5: "the UNet of SD v2 depth (5 input channels); use an SD v1 base model",
    7: "the UNet of the x4 upscaler (7 input channels); use an SD v1 base model",
}
PARTS = {"first_stage_model.": "VAE", "cond_stage_model.": "text encoder"}
PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
TOKENS, POSITIONS = 49408, 77  # rows of SD v1's two tables of texts
WIDTHS = {768: "Stable Diffusion v1", 1024: "SD v2", 2048: "SDXL", 1280: "SDXL"}  # of texts


class TensorInfo(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


class Header(dict[str, TensorInfo]):
    """Name -> dtype and shape of each tensor; metadata: what the file says of itself."""

    def __init__(self, tensors: dict[str, TensorInfo], metadata: dict[str, str]):
        super().__init__(tensors)
        self.metadata = metadata


class Known(NamedTuple):
    """What adds to a model: what it is, the model it was made for ("": it cannot be told), the option that takes it
    ("": none)."""

    what: str
    model: str
    option: str

    @property
    def fits(self) -> bool:
        return bool(self.option) and self.model not in ("SD v2", "SDXL", "SD3 or Flux")

    def __str__(self) -> str:
        advice = f"give it with {self.option} beside --model" if self.fits else "no command here uses it"
        return f"{self.what}{self.model and f' for {self.model}'}, which adds to a checkpoint and is none; {advice}"


def read_header(path: Path, again: str = "download it again") -> Header:
    """Name -> dtype and shape of a safetensors file, whatever its name; reads the header only.

    again: what to do about a damaged one. Raises ValueError, naming the path, for anything that is not a whole, sound
    safetensors file.
    """
    if not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError(f"{path}: {'not a regular file' if os.path.exists(path) else 'no such file'}")
    refuse_name(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(512)
            length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
            if start[8:9] != b"{" or length > LONGEST_HEADER:
                raise ValueError(f"{path} is {sniff(path, start, size, again)}")
            if size < 8 + length:
                raise ValueError(f"{path} is cut off: {size} bytes on disk, over {8 + length} expected; {again}")
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    header, end = parse_header(path, raw, again)
    if size != 8 + length + end:
        raise ValueError(f"{path} is damaged: {size} bytes on disk, {8 + length + end} expected; {again}")
    if size > LARGEST:
        raise ValueError(f"{path} has {size} bytes; an SD v1 file has at most 8 GB")
    try:
        with safe_open(path, framework="pt"):  # the library's own checks: overlaps, holes, alignment
            return header
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error} ({size} bytes on disk); {again}") from error
    except RuntimeError as error:  # torch's, where the address space is too small for the file
        raise ValueError(f"{path} cannot be opened: {error}") from error


def sniff(path: Path, start: bytes, size: int, again: str) -> str:
    """What a file that is not safetensors seems to be."""
    if start.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return PICKLE
    if start.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer ({size} bytes), not the weights; run git lfs pull"
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        return "an HTML page, probably a failed download; download the file itself"
    if start.startswith(b"GGUF"):
        return "a GGUF file, whose weights are rounded; use the .safetensors file"
    if kind := picture_kind(path):
        return f"a picture ({kind}), where a .safetensors file is wanted"
    if path.suffix.lower() in PICKLES:
        return PICKLE
    if path.suffix == ".json" and start.lstrip()[:1] == b"{":
        return "a file of settings; give the model's folder"
    if len(start) < 9:
        return f"no safetensors file ({size} bytes: empty or cut off); {again}"
    return f"no safetensors file ({size} bytes, it starts with {start[:8]!r}); {again}"


def picture_kind(path: Path) -> str | None:
    """PNG, JPEG or another format that is read here; None for what is no picture."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as picture:
                return picture.format
    except Exception:  # what a decoder says of a file that is none
        return None


def parse_header(path: Path, raw: bytes, again: str) -> tuple[Header, int]:
    """The JSON of a header -> tensors and where their data ends; duplicate keys, refused."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice in it")
        return found

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
        header, end = Header({}, entries.pop("__metadata__", None) or {}), 0
        for name, entry in entries.items():
            begin, stop = entry["data_offsets"]
            shape, width = tuple(entry["shape"]), BYTES.get(entry["dtype"])
            if len(shape) > 8 or {*map(type, (begin, stop, *shape))} != {int}:  # no product is made of those
                raise ValueError(f"shape and offsets of tensor {name!r} are not a few whole numbers")
            if width is not None and stop - begin != width * math.prod(shape):
                raise ValueError(f"tensor {name!r} has {stop - begin} bytes for {entry['dtype']} {list(shape)}")
            header[name] = TensorInfo(str(entry["dtype"]), shape)
            end = max(end, stop)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header is not sound ({error}); {again}") from error
    return header, end


def refuse_header(path: Path, header: Header, whole: bool, vae: bool = False) -> None:
    """Raise ValueError if the tensors are not SD v1's, saying what they are. whole: all three networks are expected (a
    single file), else the file is one of a folder's; vae: the VAE comes from elsewhere.
    """
    if "minidiffedit" in header.metadata:
        raise ValueError(f"{path} is a saved edit, not a model; `minidiffedit resume` goes on from it")
    what = add_on(header) or other_model(path, header, whole, vae)
    tables = ("token_embedding.weight", "position_embedding.weight")
    for key, (_, shape) in header.items():
        if not what and shape and key.endswith(tables) and TEXT.match(key):
            tokens, positions = (shape[0], POSITIONS) if "token" in key else (TOKENS, shape[0])
            what = strange_text(tokens, positions)
    if what:
        raise ValueError(f"{path} is {what}")


TEXT = re.compile(r"cond_stage_model\.(?!transformer\.vision_model\.)|text_model\.|emb")  # of an encoder of texts
SCHEDULE_BUFFERS = re.compile(
    "betas|alphas_cumprod(_prev)?|(sqrt|sqrt_one_minus|log_one_minus|sqrt_recip|sqrt_recipm1)_alphas_cumprod"
    "|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)"
)
UNUSED = re.compile(r"mapper\.blocks\.\d+\.attn1\.to_[qk]\.")  # of one token's attention, see clip_image.py


def is_leftover(key: str) -> bool:
    """What training left in official files and nobody needs; the last two are read by `prediction_of`."""
    ends = ("position_ids", "logit_scale")
    known = SCHEDULE_BUFFERS.fullmatch(key) or key.startswith("model_ema.") or key.endswith(ends)
    return bool(known or UNUSED.match(key)) or key in ("v_pred", "ztsnr")


# Where in a file a tensor that is not known changes what the networks compute: another architecture.
BUILT_IN = re.compile(
    r"model\.diffusion_model\.|(first_stage_model\.)?((en|de)coder|(post_)?quant_conv)\."
    r"|cond_stage_model\.(transformer\.(text_model\.|vision_model\.)?encoder|mapper)\."
)


def strange_text(tokens: int, positions: int) -> str | None:
    """Names a text encoder that has other tables than SD v1's."""
    if positions != POSITIONS:
        long = " (LongCLIP)" if positions == 248 else ""
        return f"a model whose text encoder reads {positions} positions{long}; SD v1's reads {POSITIONS}: use that one"
    if tokens > TOKENS:
        return (
            f"a model with {tokens - TOKENS} added token rows: words that a trainer taught its text encoder; use the "
            f"model as it was before ({TOKENS} rows), and the words by --embedding"
        )
    return None if tokens == TOKENS else f"a model whose text encoder knows {tokens} tokens; SD v1's knows {TOKENS}"


# Parts of names -> what adds to a checkpoint, and the option that takes it. The first that holds is it.
ADD_ONS: dict[tuple[str, ...], tuple[str, str]] = {
    ("hada_w1", "hada_w2"): ("a LoHa (LyCORIS)", ""),
    ("lokr_w1", "lokr_w2"): ("a LoKr (LyCORIS)", ""),
    ("oft_blocks", "oft_diag", ".oft_R", "boft_"): ("an OFT (orthogonal finetuning)", ""),
    ("dora_scale", "lora_magnitude_vector"): ("a DoRA", ""),
    ("lora_mid",): ("a LoCon in Tucker's form", ""),
    (".on_input",): ("an IA3", ""),
    ("base_model.model.",): ("an adapter of peft alone (its alpha stands in another file)", ""),
    ("ip_adapter.", "image_proj.", "to_k_ip", "image_proj_model."): ("an IP-Adapter (pictures as prompts)", ""),
    ("motion_modules.",): ("a motion module (AnimateDiff)", ""),
    ("control_model.", "controlnet_cond_embedding.", "lora_controlnet"): ("a ControlNet", ""),
    ("adapter.body.", "body.0.block1."): ("a T2I-Adapter", ""),
    ("lora_unet_", "lora_te", "lora_down.", "lora_up.", "lora_A.", "lora_B.", "_lora.", ".lora.", "lycoris_"): (
        "a LoRA", "--lora"),
    ("emb_params", "string_to_param"): ("a learned word (textual inversion)", "--embedding"),
}  # fmt: skip
# The weights of a LoRA that take a text in: their second side is the text's width.
TAKES_TEXT = re.compile(r"(attn2.*to_[kv]|self_attn.*[qkv]_proj).*(lora[._]down|lora_A|_lora\.down|hada_w[12]_b)")


def add_on(header: Header) -> Known | str | None:
    """Names what only adds to a checkpoint, or is one in a form not read here."""
    keys = [key for key in header if not key.startswith(("embedding_manager.", "safety_checker."))]  # left by trainers
    if any(info.dtype.startswith("F8") for info in header.values()):
        return "stored in 8-bit floats; use the fp16 file"
    for marks, (what, option) in ADD_ONS.items():
        if any(mark in key for key in keys for mark in marks):
            return Known(what, made_for(header), option)
    if {"clip_l", "clip_g"} <= header.keys():
        return Known("a learned word (textual inversion)", "SDXL", "--embedding")
    if len(header) == 1 and len(next(iter(header.values())).shape) in (1, 2):
        return Known("a learned word (textual inversion)", made_for(header), "--embedding")
    return None


def made_for(header: Header) -> str:
    """The model that an add-on was made for, by the width of its texts; "" where nothing tells."""
    blocks = ("double_blocks", "joint_blocks", "single_transformer_blocks")
    if any(key.startswith("transformer.") or any(part in key for part in blocks) for key in header):
        return "SD3 or Flux"
    if any(key.startswith(("lora_te1_", "lora_te2_", "text_encoder_2.")) for key in header):
        return "SDXL"
    widths = [i.shape[1] for key, i in header.items() if TAKES_TEXT.search(key) and len(i.shape) > 1]
    if not widths and any(part in key for key in header for part in ("down_blocks.0.att", "down_blocks_0_att")):
        return "Stable Diffusion v1 or v2"  # SDXL has no attention there
    if not widths and len(header) < 3:  # a word, with its count of steps perhaps
        widths = [info.shape[-1] for info in header.values() if info.shape[-1:] > (1,)]
    return WIDTHS.get(widths[0], f"a model whose texts are {widths[0]} wide") if widths else ""


def other_model(path: Path, header: Header, whole: bool, vae: bool) -> str | None:
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
        above = path.absolute().parent.parent
        advice = f"give the folder {above}" if os.path.isdir(above / "unet") else "the whole model is needed"
        if starts("encoder.down", "decoder.up", "encoder.conv_in", "decoder.conv_in", "first_stage_model."):
            return ONLY_VAE
        if "conv_in.weight" in keys or "input_blocks.0.0.weight" in keys:
            return f"only the UNet; {advice}"
        if starts("text_model.", "embeddings.", "cond_stage_model."):
            return f"only the text encoder; {advice}"
    if whole and unet:
        lacking = [what for prefix, what in PARTS.items() if not starts(prefix) and not (vae and what == "VAE")]
        if len(lacking) == 2:
            return "only the UNet; the whole model is needed"
        if lacking:
            use = "give one by --vae" if lacking == ["VAE"] else "use one that holds all three networks"
            return f"a checkpoint without its {lacking[0]}; {use}"
    return None


def input_channels(header: Header) -> int:
    """What the UNet's first convolution takes, under any of its names; 0 where there is none."""
    names = [unet + name for unet in ("model.diffusion_model.", "") for name in ("input_blocks.0.0", "conv_in")]
    shapes = [header[f"{name}.weight"].shape for name in names if f"{name}.weight" in header]
    return shapes[0][1] if shapes and len(shapes[0]) == 4 else 0


def refuse_name(path: Path) -> None:
    """Raise ValueError for a file that its name alone rules out."""
    if re.search(r"-\d{5}-of-\d{5}", path.name) or path.name.endswith(".safetensors.index.json"):
        raise ValueError(f"{path} is one shard of several; official v1 files are not sharded; merge them into one")


def networks_in(folder: Path) -> list[str]:
    """The three of a folder. Where it holds both encoders, as beside an IP-Adapter, it is the text that is read."""
    example = os.path.isdir(folder / "image_encoder") and not os.path.isdir(folder / "text_encoder")
    return ["unet", "vae", "image_encoder" if example else "text_encoder"]


def refuse_folder(folder: Path) -> None:
    """Raise ValueError for a folder that its sub-folders rule out, naming the one that may have been meant."""
    if (folder / "text_encoder_2").exists():
        raise ValueError(f"{folder} is {SDXL}")
    if (folder / "transformer").exists():
        raise ValueError(f"{folder} is {OTHER}")
    if (folder / "unet").exists():
        return
    inside, above = sorted(folder.iterdir()), folder.resolve().parent
    models = [one for one in inside if os.path.isdir(one / "unet")]
    files = [one.name for one in inside if one.suffix in (".safetensors", ".ckpt")]
    cached = [one.name.removeprefix("models--").replace("--", "/") for one in inside if one.name[:8] == "models--"]
    if models:
        meant = f" but {models[0].name}/ has: give {models[0]}"
    elif os.path.isdir(above / "unet"):
        meant = f": it is a part of the model {above}; give that folder"
    elif files:
        meant = f" but {files[0]}: give that file instead"
    elif cached:
        meant = f": it is the hub's cache; give one of its ids ({', '.join(cached[:5])})"
    else:
        return
    raise ValueError(f"{folder} has no folder unet/{meant}")
