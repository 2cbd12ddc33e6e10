"""The two official layouts of SD v1 weights, and strict loading.

A *folder* (the hub's layout) holds one file per network whose keys are this package's module names; a *single file*
holds all three under CompVis' names. `open_checkpoint` decides from names and headers what is where, and refuses what
does not fit before memory is spent; `load_network` fills a module that was built without memory.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .clip import CLIPText
from .files.configs import KINDS, Kind, kinds, read_configs
from .files.unsupported import Header, input_channels, read_header, refuse_folder, refuse_header, refuse_name
from .unet import UNet
from .vae import VAE

NETWORKS: dict[str, Callable[[Any], nn.Module]] = {"unet": UNet, "vae": VAE, "text_encoder": CLIPText}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@dataclass(frozen=True)
class Part:
    """One network's weights: the file, its header, and by module name the key in the file and the module's shape."""

    path: Path
    header: Header
    keys: dict[str, str]
    shapes: dict[str, torch.Size]
    changes: tuple[Callable[[str, Tensor], Tensor], ...] = ()  # of tensors as they are read: files/addons.py


@dataclass(frozen=True)
class Checkpoint:
    """What `open_checkpoint` found: configs and parts by network, the tokenizer's folder (None: the packaged one). Of
    add-ons: learned words and how many positions each takes; by kind, names and hashes.
    """

    path: Path
    layout: str
    configs: dict[str, Any]
    parts: dict[str, Part]
    tokenizer: Path | None
    words: dict[str, int] = field(default_factory=dict)
    add_ons: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return kinds(self.configs["vae"].latent_channels)[self.configs["unet"].in_channels]


def open_checkpoint(path: Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """A folder or a single .safetensors file -> what it holds, checked name by name and shape by shape.

    variant: None (of a folder's files the one nearest to dtype), "fp16" or "non_ema". Raises ValueError, saying what
    was found and what to do, for everything that is not a whole SD v1 model.
    """
    if variant not in (None, "fp16", "non_ema"):
        raise ValueError(f"variant must be 'fp16', 'non_ema' or none, got {variant!r}")
    if os.path.isdir(path):
        return open_folder(path, variant, dtype)
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file or folder, and not a hub id (owner/name)")
    refuse_name(path)
    header = read_header(path)
    refuse_header(path, header, whole=True)
    configs: dict[str, Any] = {network: kind() for network, kind in KINDS.items()}
    inputs = input_channels(header)  # all that a single file tells of its configs
    if inputs in kinds(configs["vae"].latent_channels):
        configs["unet"] = replace(configs["unet"], in_channels=inputs)
    parts = {network: find_part(network, configs[network], path, header, SINGLE[network]) for network in NETWORKS}
    check_tensors(path, header, list(parts.values()))
    return Checkpoint(path, "single file", configs, parts, tokenizer=None)


def open_folder(folder: Path, variant: str | None, dtype: torch.dtype) -> Checkpoint:
    refuse_folder(folder)
    files = {network: weights_file(folder, network, variant, dtype) for network in NETWORKS}
    headers = {network: read_header(file) for network, file in files.items()}
    for network, file in files.items():
        refuse_header(file, headers[network], whole=False)
    configs, parts = read_configs(folder), {}
    for network, file in files.items():
        parts[network] = find_part(network, configs[network], file, headers[network], FOLDER[network])
        check_tensors(file, headers[network], [parts[network]])
    tokenizer = folder / "tokenizer"
    return Checkpoint(folder, "folder", configs, parts, tokenizer if tokenizer.is_dir() else None)


def weights_file(folder: Path, network: str, variant: str | None, dtype: torch.dtype) -> Path:
    """The file of a network: as asked for, else the one whose numbers are nearest to the run's dtype."""
    sub, stem = folder / network, STEMS[network]
    if not sub.is_dir():
        raise ValueError(f"{folder} has no folder {network}/: not a Stable Diffusion v1 model in the hub's layout")
    plain, half, other = (sub / f"{stem}{v}.safetensors" for v in ("", ".fp16", ".non_ema"))
    wanted = [plain, half] if dtype == torch.float32 else [half, plain]
    if variant == "fp16":
        wanted = [half]
    elif variant == "non_ema" and network == "unet":  # the other networks have no such variant
        wanted = [other]
    for file in wanted:
        if file.exists():
            return file
    names = sorted(p.name for p in sub.iterdir())
    if not {plain.name, half.name, other.name} & {*names}:  # what stands there instead may say why
        for name in names:
            refuse_name(sub / name)
    raise ValueError(f"{sub} has no {' or '.join(f.name for f in wanted)}; it has {', '.join(names) or 'nothing'}")


# ---------------------------------------------------------------- names

OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
INNER_UNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTER_UNET = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2", "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
INNER_VAE = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut", "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
}  # fmt: skip


def swap(name: str, table: dict[str, str]) -> str:
    """Replace whole dotted parts of a name by the table; the longest entries first."""
    for ours in sorted(table, key=len, reverse=True):
        name = re.sub(rf"(?<![^.]){re.escape(ours)}(?![^.])", table[ours], name)
    return name


def compvis_unet(name: str) -> str:
    """Module name -> CompVis' name. Its input_blocks count conv_in, then per level two blocks and a downsampler; its
    output_blocks three per level, the upsampler being the last entry of the third.
    """
    if m := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.+)", name):
        return f"input_blocks.{3 * int(m[1]) + 3}.0.op.{m[2]}"
    if m := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.(.+)", name):
        return f"output_blocks.{3 * int(m[1]) + 2}.{1 if m[1] == '0' else 2}.{m[2]}"  # level 0 has no attention
    if m := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", name):
        index = 3 * int(m[2]) + int(m[4]) + (1 if m[1] == "down" else 0)
        rest = swap(m[5], INNER_UNET) if m[3] == "resnets" else m[5]
        return f"{'input' if m[1] == 'down' else 'output'}_blocks.{index}.{int(m[3] == 'attentions')}.{rest}"
    outer = swap(name, OUTER_UNET)
    return swap(outer, INNER_UNET) if "resnets" in name else outer


def compvis_vae(name: str) -> str:
    """Module name -> CompVis' name; its decoder counts levels from the finest, so in reverse."""
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
    return swap(name, INNER_VAE)


# Module name -> the keys under which a file may hold its tensor, the first being the official one.
Names = Callable[[str], list[str]]
SINGLE: dict[str, Names] = {
    "unet": lambda name: [f"model.diffusion_model.{compvis_unet(name)}"],
    "vae": lambda name: [f"first_stage_model.{compvis_vae(name)}"],
    "text_encoder": lambda name: [f"cond_stage_model.transformer.{p}{name}" for p in ("text_model.", "")],
}
FOLDER: dict[str, Names] = {
    "unet": lambda name: [name],
    "vae": lambda name: [name, swap(name, OLD_VAE)],
    "text_encoder": lambda name: [f"text_model.{name}", name],
}


def find_part(network: str, config: Any, path: Path, header: Header, names: Names) -> Part:
    shapes = {name: tensor.shape for name, tensor in build(network, config).state_dict().items()}
    keys = {name: next((key for key in names(name) if key in header), names(name)[0]) for name in shapes}
    return Part(path, header, keys, shapes)


SCHEDULE_BUFFERS = re.compile(
    "betas|alphas_cumprod(_prev)?|(sqrt|sqrt_one_minus|log_one_minus|sqrt_recip|sqrt_recipm1)_alphas_cumprod"
    "|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)"
)


def is_leftover(key: str) -> bool:
    """What training left in official files and nobody needs."""
    ends = ("position_ids", "logit_scale")
    return bool(SCHEDULE_BUFFERS.fullmatch(key)) or key.startswith("model_ema.") or key.endswith(ends)


def check_tensors(path: Path, header: Header, parts: list[Part]) -> None:
    """Raise ValueError naming the first tensors that the parts lack, do not know, or hold in another shape or type."""
    wanted = {key: part.shapes[name] for part in parts for name, key in part.keys.items()}
    misfits = []
    for key in header.keys() & wanted.keys():
        (dtype, shape), expected = header[key], tuple(wanted[key])
        if shape != expected and not (len(expected) == 2 and shape == (*expected, 1, 1)):  # a 1x1 conv is a matrix
            misfits.append(f"{key} is {list(shape)}, not {list(expected)}")
        elif dtype not in ("F16", "BF16", "F32", "F64"):
            misfits.append(f"{key} is {dtype}, not a float type")
    extra = [key for key in header if key not in wanted and not is_leftover(key)]
    faults = {"missing": wanted.keys() - header.keys(), "unknown": extra, "misshaped": misfits}
    if any(faults.values()):
        said = [f"{len(keys)} {word}: {', '.join(sorted(keys)[:3])}" for word, keys in faults.items() if keys]
        raise ValueError(f"{path} does not have the tensors of SD v1 as configured ({'; '.join(said)}); use another")


# ---------------------------------------------------------------- loading


def build(network: str, config: Any) -> nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return NETWORKS[network](config)


def read_tensors(part: Part, group: int = 64) -> Iterator[tuple[str, Tensor]]:
    """Module name -> tensor. The file is mapped anew for every few tensors: pages already read do not stay resident."""
    names = iter(part.keys)
    while batch := list(islice(names, group)):
        with safe_open(part.path, framework="pt") as file:
            for name in batch:
                yield name, file.get_tensor(part.keys[name])


def load_network(network: str, config: Any, part: Part, device: torch.device, dtype: torch.dtype) -> Any:
    """The network with its weights, in eval mode, without gradients.

    Raises ValueError naming the first tensor that holds NaN or infinity, in the file or after the cast to dtype.
    """
    state = {}
    for name, tensor in read_tensors(part):
        tensor = tensor.reshape(part.shapes[name])
        for change in part.changes:
            tensor = change(name, tensor)
        order = torch.channels_last if device.type == "cpu" and tensor.ndim == 4 else torch.preserve_format  # faster so
        state[name] = tensor.to(device, dtype, copy=True, memory_format=order)
        if not all(bound.isfinite() for bound in torch.aminmax(state[name])):
            what = f"{part.path}: {part.keys[name]} holds"
            if tensor.isfinite().all():
                raise ValueError(f"{what} numbers too large for {dtype}; use bfloat16 or float32")
            raise ValueError(f"{what} NaN or infinity; the file is damaged, download it again")
    module = build(network, config)
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)
