"""The two official layouts of SD v1 weights, and strict loading.

A *folder* (the hub's layout) holds one file per network whose keys are this package's module names; a *single file*
holds all three under CompVis' names. `open_checkpoint` decides from names and headers what is where, and refuses what
does not fit before memory is spent; `load_network` fills a module that was built without memory.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .clip import CLIPConfig, CLIPText
from .configs import FIXED, check_fixed, read_config, read_json
from .refusals import Header, read_header, refuse_folder, refuse_header, refuse_name
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig

NETWORKS = {"unet": (UNet, UNetConfig), "vae": (VAE, VAEConfig), "text_encoder": (CLIPText, CLIPConfig)}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@dataclass(frozen=True)
class Part:
    """One network's weights: the file, its header, and module name -> key in the file."""

    path: Path
    header: Header
    keys: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """What `open_checkpoint` found: configs and parts by network, the tokenizer's folder (None: the packaged one)."""

    path: Path
    layout: str
    configs: dict[str, Any]
    parts: dict[str, Part]
    tokenizer: Path | None


def open_checkpoint(path: Path, *, variant: str | None = None, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """A folder or a single .safetensors file -> what it holds, checked name by name and shape by shape.

    variant: None (of a folder's files the one nearest to dtype), "fp16" or "non_ema". Raises ValueError, saying what
    was found and what to do, for everything that is not a whole SD v1 model.
    """
    if variant not in (None, "fp16", "non_ema"):
        raise ValueError(f"variant must be 'fp16', 'non_ema' or none, got {variant!r}")
    if path.is_dir():
        found = open_folder(path, variant, dtype)
    elif path.exists():
        refuse_name(path)
        header = read_header(path)
        refuse_header(path, header, whole=True)
        configs = {network: config() for network, (_, config) in NETWORKS.items()}
        parts = {network: Part(path, header, single_file_keys(network, header)) for network in NETWORKS}
        refuse_extras(path, header, {key for part in parts.values() for key in part.keys.values()})
        found = Checkpoint(path, "single file", configs, parts, tokenizer=None)
    else:
        raise ValueError(f"{path}: no such file or folder, and not a hub id (owner/name)")
    unet, vae, text = (found.configs[network] for network in NETWORKS)
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise ValueError(
            f"{path}: the UNet has {unet.in_channels} -> {unet.out_channels} channels, "
            f"the VAE's latents {vae.latent_channels}"
        )
    if unet.cross_attention_dim != text.hidden_size:
        raise ValueError(
            f"{path}: the UNet reads texts {unet.cross_attention_dim} wide, the text encoder makes {text.hidden_size}"
        )
    for network, part in found.parts.items():
        check_shapes(part, build(network, found.configs[network]))
    return found


def open_folder(folder: Path, variant: str | None, dtype: torch.dtype) -> Checkpoint:
    refuse_folder(folder)
    configs, parts = {}, {}
    for network, (_, config) in NETWORKS.items():
        file = weights_file(folder, network, variant, dtype)
        header = read_header(file)
        refuse_header(file, header, whole=False)
        configs[network] = read_config(config, folder / network / "config.json", FIXED[network])
        names = build(network, configs[network]).state_dict().keys()
        keys = {name: first_of(aliases(network, name), header) for name in names}
        refuse_extras(file, header, set(keys.values()))
        parts[network] = Part(file, header, keys)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        check_fixed(scheduler, read_json(scheduler), FIXED["scheduler"])
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
    for name in names:
        refuse_name(sub / name)
    pickles = [name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]
    if pickles:
        read_header(sub / pickles[0])  # refuses it as a pickle
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


SINGLE: dict[str, Callable[[str], list[str]]] = {
    "unet": lambda name: [f"model.diffusion_model.{compvis_unet(name)}"],
    "vae": lambda name: [f"first_stage_model.{compvis_vae(name)}"],
    "text_encoder": lambda name: [f"cond_stage_model.transformer.{p}{name}" for p in ("text_model.", "")],
}


def single_file_keys(network: str, header: Header) -> dict[str, str]:
    names = build(network, NETWORKS[network][1]()).state_dict().keys()
    return {name: first_of(SINGLE[network](name), header) for name in names}


def aliases(network: str, name: str) -> list[str]:
    """The keys under which a folder's file may hold a module's tensor."""
    if network == "vae" and ".attentions." in name:
        return [name, swap(name, OLD_VAE)]
    return [f"text_model.{name}", name] if network == "text_encoder" else [name]


def first_of(candidates: list[str], header: Header) -> str:
    return next((key for key in candidates if key in header), candidates[0])


SCHEDULE_BUFFERS = re.compile(
    "betas|alphas_cumprod(_prev)?|(sqrt|sqrt_one_minus|log_one_minus|sqrt_recip|sqrt_recipm1)_alphas_cumprod"
    "|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)"
)


def is_leftover(key: str) -> bool:
    """What training left in official files and nobody needs."""
    ends = ("position_ids", "logit_scale")
    return bool(SCHEDULE_BUFFERS.fullmatch(key)) or key.startswith("model_ema.") or key.endswith(ends)


def refuse_extras(path: Path, header: Header, used: set[str]) -> None:
    missing = sorted(used - header.keys())
    extra = sorted(key for key in header if key not in used and not is_leftover(key))
    if missing or extra:
        lists = [
            f"{len(keys)} {word}: {', '.join(keys[:3])}"
            for word, keys in (("missing", missing), ("unknown", extra))
            if keys
        ]
        raise ValueError(f"{path} does not have the tensors of SD v1 ({'; '.join(lists)}); use an SD v1 model")


# ---------------------------------------------------------------- loading


def build(network: str, config: Any) -> nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return NETWORKS[network][0](config)


def check_shapes(part: Part, module: nn.Module) -> None:
    """Raise ValueError naming the first tensors of other shape or kind; 1x1 convolutions count as matrices."""
    wrong = []
    for name, tensor in module.state_dict().items():
        dtype, shape = part.header[part.keys[name]]
        if shape != tensor.shape and not (tensor.ndim == 2 and shape == (*tensor.shape, 1, 1)):
            wrong.append(f"{part.keys[name]} is {list(shape)}, not {list(tensor.shape)}")
        elif dtype not in ("F16", "BF16", "F32", "F64"):
            wrong.append(f"{part.keys[name]} is {dtype}, not a float type")
    if wrong:
        raise ValueError(f"{part.path} does not fit its configuration ({len(wrong)} tensors: {'; '.join(wrong[:3])})")


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
    module = build(network, config)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    state = {}
    for name, tensor in read_tensors(part):
        state[name] = tensor.to(device, dtype, copy=True).reshape(shapes[name])
        if not all(bound.isfinite() for bound in torch.aminmax(state[name])):
            raise ValueError(f"{part.path}: {part.keys[name]} holds NaN or infinity as {dtype}; the file is damaged")
    module.load_state_dict(state, strict=True, assign=True)
    return module.eval().requires_grad_(False)
