"""The two official layouts of SD v1 weights, and strict loading.

A *folder* (the hub's layout) holds one file per network whose keys are this package's module names; a *single file*
holds all three under CompVis' names. `open_checkpoint` decides from names and headers what is where, and refuses what
does not fit before memory is spent; `load_network` fills a module that was built without memory.
"""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .clip import CLIPText
from .clip_image import FUSED, CLIPImage, image_names, values_alone
from .files import unsupported
from .files.configs import Kind, Prediction, header_configs, kind_of, prediction_of, read_configs, weights_file
from .files.unsupported import Header, TensorInfo, networks_in, read_header, refuse_folder, refuse_header
from .unet import UNet
from .vae import VAE

NETWORKS: dict[str, Any] = {"unet": UNet, "vae": VAE, "text_encoder": CLIPText, "image_encoder": CLIPImage}


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
    """What `open_checkpoint` found: configs and parts by network, the tokenizer's folder (None: the packaged one), and
    what the UNet predicts. Of add-ons: learned words, how many positions each takes; by kind, names and hashes.
    """

    path: Path
    layout: str
    configs: dict[str, Any]
    parts: dict[str, Part]
    tokenizer: Path | None
    prediction: Prediction = "epsilon"
    words: dict[str, int] = field(default_factory=dict)
    add_ons: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        return kind_of(self.configs)


def open_checkpoint(
    path: Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32, vae: Path | None = None
) -> Checkpoint:
    """A folder or a single .safetensors file -> what it holds, checked name by name and shape by shape.

    variant: None (of a folder's files the one nearest to dtype), "fp16" or "non_ema". vae: a file that holds another
    VAE. Raises ValueError, saying what was found and what to do, for everything that is not a whole SD v1 model.
    """
    if variant not in (None, "fp16", "non_ema"):
        raise ValueError(f"variant must be 'fp16', 'non_ema' or none, got {variant!r}")
    if os.path.isdir(path):
        return open_folder(path, variant, dtype, vae)
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file or folder, and not a hub id (owner/name)")
    header = read_header(path)
    refuse_header(path, header, whole=True, vae=vae is not None)
    configs = header_configs(header, vae)
    networks = [network for network in configs if network != "vae" or not vae]
    parts = {network: find_part(network, configs[network], path, header, SINGLE[network]) for network in networks}
    own = {key: one for key, one in header.items() if not (vae and key.startswith("first_stage_model."))}
    check_tensors(path, own, [*parts.values()], [*SINGLE.values()])
    return Checkpoint(path, "single file", configs, with_vae(parts, configs, vae), None, prediction_of(path, header))


def open_folder(folder: Path, variant: str | None, dtype: torch.dtype, vae: Path | None) -> Checkpoint:
    refuse_folder(folder)
    networks = [network for network in networks_in(folder) if network != "vae" or not vae]
    files = {network: weights_file(folder / network, network, variant, dtype) for network in networks}
    headers = {network: read_header(file) for network, file in files.items()}
    for network, file in files.items():
        refuse_header(file, headers[network], whole=False)
    configs, parts = read_configs(folder, vae), {}
    for network, file in files.items():
        parts[network] = find_part(network, configs[network], file, headers[network], FOLDER[network])
        check_tensors(file, headers[network], [parts[network]])
    found = tokenizer if (tokenizer := folder / "tokenizer").is_dir() else None
    parts, predicted = with_vae(parts, configs, vae), prediction_of(folder, headers["unet"])
    return Checkpoint(folder, "folder", configs, parts, found, predicted)


def with_vae(parts: dict[str, Part], configs: dict[str, Any], vae: Path | None) -> dict[str, Part]:
    """The parts in the networks' order, the VAE's from a file of its own: alone, or with the rest of a model."""
    if vae and (found := read_header(vae)):
        own = {key: one for key, one in found.items() if key.startswith("first_stage_model.")}
        names: Names = SINGLE["vae"] if own else vae_names
        parts["vae"] = find_part("vae", configs["vae"], vae, found, names)
        check_tensors(vae, own or found, [parts["vae"]], [names])
    return {network: parts[network] for network in NETWORKS if network in parts}


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


def vae_names(name: str) -> list[str]:
    """Module name -> its keys in a VAE's own file: CompVis', with the attention's names as others spell them, ours."""
    spelled = [compvis_vae(name)]
    for q, k, v, out in (("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")):
        spelled.append(swap(spelled[0], {"q": q, "k": k, "v": v, "proj_out": out}))
        spelled.append(swap(spelled[-1], {"attn_1.norm": "attn_1.group_norm"}))
    return [*spelled, *FOLDER["vae"](name)]


# Module name -> the keys under which a file may hold its tensor, the first being the official one.
Names = Callable[[str], list[str]]
SINGLE: dict[str, Names] = {
    "unet": lambda name: [f"model.diffusion_model.{compvis_unet(name)}"],
    "vae": lambda name: [f"first_stage_model.{key}" for key in vae_names(name)],
    "text_encoder": lambda name: [f"cond_stage_model.transformer.{p}{name}" for p in ("text_model.", "")],
    "image_encoder": lambda name: image_names(1, name),
}
FOLDER: dict[str, Names] = {
    "unet": lambda name: [name],
    "vae": lambda name: [name, swap(name, OLD_VAE)],
    "text_encoder": lambda name: [f"text_model.{name}", name],
    "image_encoder": lambda name: image_names(0, name),
}


def find_part(network: str, config: Any, path: Path, header: Header, names: Names) -> Part:
    shapes = {name: tensor.shape for name, tensor in build(network, config).state_dict().items()}
    known = {name: names(name) for name in shapes}
    keys = {name: next((key for key in said if key in header), said[0]) for name, said in known.items()}
    fused = {n: torch.Size((3 * s[0], *s[1:])) for n, s in shapes.items() if FUSED in keys[n]}
    return Part(path, header, keys, shapes | fused, (values_alone,) if fused else ())


def check_tensors(path: Path, header: Mapping[str, TensorInfo], parts: list[Part], names: Sequence[Names] = ()) -> None:
    """Raise ValueError naming the first tensors that the parts lack, do not know, or hold in another shape or type.

    names: of a file in which trainers leave what they like; there what is no part of a network, or one under a second
    name, is passed over, with a warning that counts it.
    """
    wanted = {key: part.shapes[name] for part in parts for name, key in part.keys.items()}
    misfits = []
    for key in header.keys() & wanted.keys():
        (dtype, shape), expected = header[key], tuple(wanted[key])
        if shape != expected and not (len(expected) == 2 and shape == (*expected, 1, 1)):  # a 1x1 conv is a matrix
            misfits.append(f"{key} is {list(shape)}, not {list(expected)}")
        elif dtype not in ("F16", "BF16", "F32", "F64"):
            misfits.append(f"{key} is {dtype}, not a float type")
    extra = [key for key in header if key not in wanted and not unsupported.is_leftover(key)]
    missing = wanted.keys() - header.keys()
    again = {key for part in parts for name in part.keys for known in names for key in known(name)} if extra else {}
    strange = [key for key in extra if not names or (unsupported.BUILT_IN.match(key) and key not in again)]
    faults = {"missing": missing, "unknown": extra if missing or misfits else strange, "misshaped": misfits}
    if any(faults.values()):
        said = [f"{len(keys)} {word}: {', '.join(sorted(keys)[:3])}" for word, keys in faults.items() if keys]
        raise ValueError(f"{path} does not have the tensors of SD v1 as configured ({'; '.join(said)}); use another")
    if extra:
        count = f"{len(extra)} tensor{'s' * (len(extra) > 1)}"
        warnings.warn(f"{path}: ignored {count} that SD v1 has not: {', '.join(sorted(extra)[:3])}", stacklevel=2)


# ---------------------------------------------------------------- loading


def build(network: str, config: Any) -> nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return NETWORKS[network](config)  # type: ignore[no-any-return]


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
