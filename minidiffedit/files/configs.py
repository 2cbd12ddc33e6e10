"""A folder's config.json files: what they may shrink, and what contradicts SD v1 and is refused."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from ..clip import CLIPConfig
from ..unet import UNetConfig
from ..vae import VAEConfig
from .unsupported import FIRST_CONV

LARGEST = 1 << 20  # bytes of a config.json; the official ones have two thousand
KINDS: dict[str, type] = {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": CLIPConfig}
Kind = Literal["base", "inpainting", "instruct"]

# What SD v1 has where a config.json may ask for something else; absent or null means SD v1's.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "unet": {
        "act_fn": ("silu",), "norm_eps": (1e-5,), "flip_sin_to_cos": (True,), "freq_shift": (0,),
        "downsample_padding": (1,), "mid_block_scale_factor": (1,), "center_input_sample": (False,),
        "use_linear_projection": (False,), "dual_cross_attention": (False,), "only_cross_attention": (False,),
        "class_embed_type": (), "addition_embed_type": (), "encoder_hid_dim": (), "num_class_embeds": (),
        "resnet_time_scale_shift": ("default",), "time_embedding_type": ("positional",), "time_cond_proj_dim": (),
        "transformer_layers_per_block": (1,), "conv_in_kernel": (3,), "conv_out_kernel": (3,), "attention_type":
        ("default",), "mid_block_type": ("UNetMidBlock2DCrossAttn",), "num_attention_heads": (),
        "resnet_skip_time_act": (False,), "resnet_out_scale_factor": (1,), "time_embedding_act_fn": (),
        "timestep_post_act": (), "cross_attention_norm": (), "time_embedding_dim": (),
    },
    "vae": {
        "act_fn": ("silu",), "shift_factor": (), "latents_mean": (), "latents_std": (), "use_quant_conv": (True,),
        "use_post_quant_conv": (True,), "mid_block_add_attention": (True,),
    },
    "text_encoder": {
        "hidden_act": ("quick_gelu",), "layer_norm_eps": (1e-5,), "vocab_size": (49408,),
        "max_position_embeddings": (77,), "model_type": ("clip_text_model",),
    },
    "scheduler": {
        "prediction_type": ("epsilon",), "num_train_timesteps": (1000,), "beta_start": (0.00085,), "beta_end": (0.012,),
        "beta_schedule": ("scaled_linear",), "trained_betas": (), "rescale_betas_zero_snr": (False,),
    },
}  # fmt: skip


def kinds(latents: int) -> dict[int, Kind]:
    """Input channels of a UNet for latents of so many channels -> what it was trained for. base: it reads the latent
    alone; inpainting: a mask and the latent of the picture without what it covers, too; instruct (InstructPix2Pix): the
    picture's latent, too.
    """
    return {latents: "base", 2 * latents + 1: "inpainting", 2 * latents: "instruct"}


def read_json(path: Path) -> dict[str, Any]:
    if path.exists() and (not path.is_file() or path.stat().st_size > LARGEST):  # a device, a pipe, a trap
        raise ValueError(f"{path} cannot be read as JSON: it must be a file of at most {LARGEST:,} bytes")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def read_configs(folder: Path) -> dict[str, Any]:
    """A folder's config.json files by network, and a look at its scheduler's: no weights are needed.

    Raises ValueError for what contradicts SD v1 or does not fit together.
    """
    configs = {network: read_config(network, folder / network / "config.json") for network in KINDS}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        check_fixed(scheduler, read_json(scheduler), FIXED["scheduler"])
    unet, vae, text = configs.values()
    if unet.in_channels in FIRST_CONV:
        raise ValueError(f"{folder} is {FIRST_CONV[unet.in_channels]}")
    if unet.in_channels not in kinds(vae.latent_channels) or unet.out_channels != vae.latent_channels:
        raise ValueError(
            f"{folder}: the UNet has {unet.in_channels} -> {unet.out_channels} channels, "
            f"the VAE's latents {vae.latent_channels}"
        )
    if unet.cross_attention_dim != text.hidden_size:
        raise ValueError(
            f"{folder}: the UNet reads texts {unet.cross_attention_dim} wide, the text encoder makes {text.hidden_size}"
        )
    return configs


def check_fixed(path: Path, data: dict[str, Any], fixed: dict[str, tuple[Any, ...]]) -> None:
    for key, accepted in fixed.items():
        value = data.get(key)
        if value is None or value in accepted:
            continue
        if key == "prediction_type":
            raise ValueError(f"{path}: a {value} model; only epsilon prediction (SD v1) is supported")
        raise ValueError(f"{path}: {key} is {value!r}; SD v1 has {accepted[0] if accepted else None!r}")


def read_config(network: str, path: Path) -> Any:
    """A config.json -> the network's dataclass: its fields where given, SD v1's elsewhere; unknown keys are ignored.

    Raises ValueError for what contradicts SD v1's architecture, for wrong types and absurd numbers.
    """
    kind, data = KINDS[network], read_json(path)
    check_fixed(path, data, FIXED[network])
    values = {}
    for field in fields(kind):
        value = data.get(field.name)
        if value is None:
            continue
        sound = {
            tuple: lambda v: isinstance(v, list) and 1 <= len(v) <= 8 and all(whole(n) for n in v),
            int: lambda v: whole(v, 128 if "layers" in field.name else 65536),  # noqa: B023 (called at once)
            float: lambda v: isinstance(v, float | int) and not isinstance(v, bool) and 1e-6 < v < 1e6,
        }[type(field.default)]
        if not sound(value):
            raise ValueError(f"{path}: {field.name} is {value!r}, SD v1 has {field.default!r}")
        values[field.name] = tuple(value) if isinstance(value, list) else value
    config = kind(**values)
    check_blocks(path, data, config)
    return config


def whole(value: Any, most: int = 65536) -> bool:
    return type(value) is int and 1 <= value <= most


def check_blocks(path: Path, data: dict[str, Any], config: Any) -> None:
    """The parts of a config that must fit one another."""
    if isinstance(config, CLIPConfig):
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(f"{path}: {config.hidden_size} is no multiple of {config.num_attention_heads} heads")
        return
    heads = config.attention_head_dim if isinstance(config, UNetConfig) else 1
    for c in config.block_out_channels:
        if c % heads or c % config.norm_num_groups or c % 2:
            raise ValueError(
                f"{path}: {c} channels do not divide into {heads} heads and {config.norm_num_groups} groups"
            )
    n = len(config.block_out_channels)
    if isinstance(config, UNetConfig):
        types = (["CrossAttnDownBlock2D"] * (n - 1) + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (n - 1))
    else:
        types = (["DownEncoderBlock2D"] * n, ["UpDecoderBlock2D"] * n)
    for key, expected in zip(("down_block_types", "up_block_types"), types):
        if data.get(key, expected) != expected:
            raise ValueError(f"{path}: {key} is {data[key]!r}, SD v1's pattern is {expected!r}")
