"""What a model is by its small files and headers: what configs may shrink, what contradicts SD v1 and is refused, what
the UNet predicts, and whether a VAE from elsewhere fits. No weights are read.
"""

import json
import os
import re
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from ..clip import CLIPConfig
from ..clip_image import CLIPImageConfig
from ..unet import UNetConfig
from ..vae import VAEConfig
from .metadata import model_hash
from .unsupported import (
    FIRST_CONV,
    ONLY_VAE,
    TOKENS,
    Header,
    add_on,
    input_channels,
    networks_in,
    other_model,
    read_header,
    refuse_folder,
    refuse_header,
    refuse_name,
    strange_text,
)

LARGEST = 1 << 20  # bytes of a config.json; the official ones have two thousand
KINDS: dict[str, type] = {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": CLIPConfig}
KINDS |= {"image_encoder": CLIPImageConfig}  # in the text encoder's place: Paint by Example
Kind = Literal["base", "inpainting", "instruct", "example"]
Prediction = Literal["epsilon", "v"]

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
        "hidden_act": ("quick_gelu",), "layer_norm_eps": (1e-5,), "vocab_size": (TOKENS,),
        "max_position_embeddings": (77,), "model_type": ("clip_text_model",),
    },
    "image_encoder": {
        "hidden_act": ("quick_gelu",), "layer_norm_eps": (1e-5,), "model_type": ("clip_vision_model",),
        "num_channels": (3,),
    },
    "scheduler": {
        "num_train_timesteps": (1000,), "beta_start": (0.00085,), "beta_end": (0.012,),
        "beta_schedule": ("scaled_linear",), "trained_betas": (),
    },
}  # fmt: skip


def kinds(latents: int, reads: Any) -> dict[int, Kind]:
    """Input channels of a UNet for latents of so many channels -> what it was trained for. base: it reads the latent
    alone; inpainting: a mask and the latent of the picture without what it covers, too; instruct (InstructPix2Pix): the
    picture's latent, too. reads: the config of what encodes a text, or for Paint by Example ("example") a picture.
    """
    if isinstance(reads, CLIPImageConfig):
        return {2 * latents + 1: "example"}
    return {latents: "base", 2 * latents + 1: "inpainting", 2 * latents: "instruct"}


def kind_of(configs: dict[str, Any]) -> Kind:
    """Of a model whose configs, in the networks' order, fit together."""
    unet, vae, encoder = configs.values()
    return kinds(vae.latent_channels, encoder)[unet.in_channels]


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


def configs_of(path: Path, vae: Path | None = None) -> dict[str, Any]:
    """The networks' configs of a folder or a single file; vae: the file of another VAE, which brings its own."""
    if os.path.isdir(path):
        refuse_folder(path)
        return read_configs(path, vae)
    refuse_header(path, header := read_header(path), whole=True, vae=vae is not None)
    return header_configs(header, vae)


def header_configs(header: Header, vae: Path | None) -> dict[str, Any]:
    """SD v1's configs; of them a single file tells but the channels that its UNet reads."""
    encoder = "image_encoder" if "learnable_vector" in header else "text_encoder"
    configs = {network: KINDS[network]() for network in ("unet", "vae", encoder)}
    if vae:
        configs["vae"] = vae_config(vae, configs["vae"])
    inputs = input_channels(header)
    if inputs in kinds(configs["vae"].latent_channels, configs[encoder]):
        configs["unet"] = replace(configs["unet"], in_channels=inputs)
    return configs


def read_configs(folder: Path, vae: Path | None = None) -> dict[str, Any]:
    """A folder's config.json files by network, and a look at its scheduler's: no weights are needed.

    vae: the file of another VAE. Raises ValueError for what contradicts SD v1 or does not fit together.
    """
    own = folder / "vae" / "config.json"
    networks = networks_in(folder)
    there = [network for network in networks if network != "vae" or not vae or own.exists()]
    configs = {network: read_config(network, own_folder(folder, network) / "config.json") for network in there}
    if vae:
        full = configs["unet"].block_out_channels == UNetConfig().block_out_channels
        configs["vae"] = vae_config(vae, configs.get("vae", VAEConfig() if full else None))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        check_fixed(scheduler, read_json(scheduler), FIXED["scheduler"])
    prediction_of(folder)
    unet, vae_, encoder = (configs := {network: configs[network] for network in networks}).values()
    if unet.in_channels in FIRST_CONV:
        raise ValueError(f"{folder} is {FIRST_CONV[unet.in_channels]}")
    if unet.in_channels not in kinds(vae_.latent_channels, encoder) or unet.out_channels != vae_.latent_channels:
        reads = " (Paint by Example's, which reads a picture, takes 9)" if "image_encoder" in networks else ""
        raise ValueError(
            f"{folder}: the UNet has {unet.in_channels} -> {unet.out_channels} channels, "
            f"the VAE's latents {vae_.latent_channels}{reads}"
        )
    made, what = getattr(encoder, "projection_dim", None) or encoder.hidden_size, networks[-1].replace("_", " ")
    if unet.cross_attention_dim != made:
        raise ValueError(f"{folder}: the UNet reads texts {unet.cross_attention_dim} wide, the {what} makes {made}")
    return configs


# ---------------------------------------------------------------- which file of a folder

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
STEMS |= {"text_encoder": "model", "image_encoder": "model"}


def own_folder(folder: Path, network: str) -> Path:
    """A network's folder. Raises ValueError where there is none."""
    if not (folder / network).is_dir():
        advice = "; give one by --vae" if network == "vae" else ": not a Stable Diffusion v1 model in the hub's layout"
        raise ValueError(f"{folder} has no folder {network}/{advice}")
    return folder / network


def weights_file(sub: Path, network: str, variant: str | None, dtype: torch.dtype) -> Path:
    """The file of a network in its folder: as asked for, else the one whose numbers are nearest to the run's dtype."""
    own_folder(sub.parent, network)
    plain, half, other = (sub / f"{STEMS[network]}{v}.safetensors" for v in ("", ".fp16", ".non_ema"))
    wanted = [plain, half] if dtype == torch.float32 else [half, plain]
    if variant == "fp16":
        wanted = [half]
    elif variant == "non_ema" and network == "unet":  # the other networks have no such variant
        wanted = [other]
    twins = [sub / f"{'pytorch_' * (network == 'text_encoder')}{file.stem}.bin" for file in wanted]
    for file in [*wanted, *twins]:  # the content tells what it is
        if file.exists():
            return file
    names = sorted(p.name for p in sub.iterdir())
    if not {plain.name, half.name, other.name} & {*names}:  # what stands there instead may say why
        for name in names:
            refuse_name(sub / name)
    raise ValueError(f"{sub} has no {' or '.join(f.name for f in wanted)}; it has {', '.join(names) or 'nothing'}")


def vae_file(path: Path, half: bool) -> Path:
    """The file of a VAE: itself, that of a VAE's folder, or the VAE of a model's folder."""
    if not os.path.isdir(path):
        return path
    alone = sorted(path.glob("*.safetensors"))
    if len(alone) == 1 and not (path / "vae").exists():
        return alone[0]
    sub, dtype = path / "vae" if (path / "vae").is_dir() else path, torch.float16 if half else torch.float32
    return weights_file(sub, "vae", None, dtype)


# ---------------------------------------------------------------- a VAE from elsewhere

SDXL_SCALE = 0.13025
# sha256, its first digits, of files that are SDXL's though nothing in their header tells: here sdxl_vae.safetensors.
SDXL_VAES = ("235745af8d",)


def lone_vae(path: Path) -> Path | None:
    """The file of a VAE that stands alone, in a folder or not; None for anything else."""
    if os.path.isdir(path):
        if (path / "unet").exists() or not [*path.glob(f"{STEMS['vae']}*.safetensors")]:
            return None
        path = vae_file(path, half=False)
    if not os.path.isfile(path):
        return None
    return path if other_model(path, read_header(path), whole=True, vae=False) == ONLY_VAE else None


def vae_config(path: Path, own: VAEConfig | None) -> VAEConfig:
    """The config of a VAE's file: the config.json beside it, else the model's own or SD v1's, by their last width.

    own: the config of the model's VAE, None where it has none that is known. Raises ValueError, from headers, for what
    is no VAE or makes other latents than the model's UNet reads.
    """
    header, beside = read_header(path), path.parent / "config.json"
    what = add_on(header) or other_model(path, header, whole=True, vae=True)
    first = header.get("first_stage_model.decoder.conv_in.weight") or header.get("decoder.conv_in.weight")
    if not first or (what and what != ONLY_VAE):
        raise ValueError(f"{path} is {what or 'no VAE: it holds no decoder'}; --vae takes the VAE of an SD v1 model")
    channels = own.latent_channels if own else VAEConfig().latent_channels
    if len(first.shape) != 4 or first.shape[1] != channels:
        of = "a VAE of films" if len(first.shape) != 4 else f"a VAE whose latents have {first.shape[1]} channels"
        raise ValueError(f"{path} is {of} (as SD3's and Flux'), this model's have {channels}; use an SD v1 VAE")
    own_config = beside.exists() and "Autoencoder" in str(read_json(beside).get("_class_name", "Autoencoder"))
    if alone := own_config and "decoder.conv_in.weight" in header:
        config = read_config("vae", beside)
    else:
        config = own if own and own.block_out_channels[-1] == first.shape[0] else KINDS["vae"]()
    unnamed = not alone and config == VAEConfig() and model_hash(path) in SDXL_VAES
    if unnamed or config.scaling_factor == SDXL_SCALE or "xl" in header.metadata.get("modelspec.architecture", ""):
        raise ValueError(f"{path} is SDXL's VAE, whose latents an SD v1 UNet does not know; use an SD v1 VAE")
    if own and (config.scaling_factor, config.factor) != (own.scaling_factor, own.factor):
        raise ValueError(
            f"{path} is the VAE of other latents: scaled by {config.scaling_factor}, {config.factor} pixels a cell; "
            f"this model's are scaled by {own.scaling_factor}, {own.factor} pixels a cell"
        )
    return config


# ---------------------------------------------------------------- what the UNet predicts

PREDICTIONS: dict[str, Prediction] = {"epsilon": "epsilon", "eps": "epsilon"}
PREDICTIONS |= {"v": "v", "v_prediction": "v", "v-prediction": "v", "v_pred": "v"}
# What a .yaml of CompVis' kind, beside a single file, says of SD v1.
YAML = {"timesteps": 1000, "linear_start": 0.00085, "linear_end": 0.012, "scale_factor": 0.18215}
ZERO_SNR = ("rescale_betas_zero_snr", "zero_terminal_snr", "zero_snr", "ztsnr", "zsnr")


def prediction_of(path: Path, header: Header | None = None) -> Prediction:
    """What the UNet of a folder or a single file predicts, by all that can tell it: the scheduler's config, a .yaml of
    the file's name, its metadata, marks among its tensors. epsilon where nothing does.

    header: of the single file, or of the folder's UNet. Raises ValueError for other predictions, for signs that
    contradict one another and for zero-terminal-SNR models.
    """
    told = scheduler_says(path) if path.is_dir() else yaml_says(path)
    if header:
        meta = header.metadata
        for key in ("modelspec.prediction_type", "modelspec.predict_key"):
            told |= {f"{key} in the header": meta[key]} if key in meta else {}
        told |= {"ss_v_parameterization": "v"} if meta.get("ss_v_parameterization", "").lower() == "true" else {}
        told |= {"the tensor v_pred": "v"} if "v_pred" in header else {}
        marks = [f"ss_{one}" for one in ZERO_SNR if meta.get(f"ss_{one}", "").lower() == "true"]
        told |= dict.fromkeys([*marks, *(one for one in ZERO_SNR if one in header)], "zero")
        if not path.is_dir() and ends_in_noise(path, header):
            told["alphas_cumprod, which ends in 0"] = "zero"
    for where, word in told.items():
        if word == "zero":
            raise ValueError(
                f"{path} is a zero-terminal-SNR model ({where}): at its last level alpha_bar is 0, where a prediction "
                "of the noise says nothing of the picture, and steps divide by its root; use a model without it"
            )
        if word.lower() not in PREDICTIONS:
            raise ValueError(f"{path}: a {word} model ({where}); only epsilon and v prediction are supported")
    found = {PREDICTIONS[word.lower()]: where for where, word in told.items()}
    if len(found) > 1:
        raise ValueError(f"{path}: {found['v']} says that it predicts v, {found['epsilon']} says epsilon; mend one")
    return next(iter(found), "epsilon")


def scheduler_says(folder: Path) -> dict[str, str]:
    """Where it is told -> what, "zero" for a zero-terminal-SNR."""
    path = folder / "scheduler" / "scheduler_config.json"
    data = read_json(path) if path.exists() else {}
    told = {path.name: str(data["prediction_type"])} if data.get("prediction_type") else {}
    return told | {f"{one} in {path.name}": "zero" for one in ZERO_SNR if data.get(one)}


def yaml_says(path: Path) -> dict[str, str]:
    """The same of a .yaml beside a single file. Raises ValueError for another noise schedule than SD v1's."""
    told = {}
    for yaml in {path.with_suffix(suffix) for suffix in (".yaml", ".yml")} - {path}:
        if not yaml.is_file() or yaml.stat().st_size > LARGEST:
            continue
        for line in yaml.read_text(encoding="utf-8", errors="replace").splitlines():
            for key, value in re.findall(r"""\b(\w+)["']?\s*:\s*["']?([\w.+-]+)""", line.partition("#")[0]):
                if key == "parameterization":
                    told[yaml.name] = value
                elif key in ZERO_SNR and value.lower() in ("true", "yes", "1"):
                    told[f"{key} in {yaml.name}"] = "zero"
                elif key in YAML and not (re.fullmatch(r"\d*\.?\d+(e-?\d+)?", value) and float(value) == YAML[key]):
                    raise ValueError(f"{yaml}: {key} is {value}; SD v1 has {YAML[key]}")
    return told


def ends_in_noise(path: Path, header: Header) -> bool:
    """Is the noise schedule in a single file one that ends at alpha_bar 0? Ends alone are looked at: some hold none."""
    if getattr(header.get("alphas_cumprod"), "shape", ()) != (1000,):
        return False
    with safe_open(path, framework="pt") as file:
        first, *_, last = file.get_tensor("alphas_cumprod").tolist()
    return first > 0.5 and last < 1e-4


# ---------------------------------------------------------------- config.json


def check_fixed(path: Path, data: dict[str, Any], fixed: dict[str, tuple[Any, ...]]) -> None:
    for key, accepted in fixed.items():
        value = data.get(key)
        if value is None or value in accepted:
            continue
        if key in ("vocab_size", "max_position_embeddings") and whole(value):
            what = strange_text(value, 77) if key == "vocab_size" else strange_text(TOKENS, value)
            raise ValueError(f"{path}: {key} is {value}: {what}")
        raise ValueError(f"{path}: {key} is {value!r}; SD v1 has {accepted[0] if accepted else None!r}")


def read_config(network: str, path: Path) -> Any:
    """A config.json -> the network's dataclass: its fields where given, SD v1's elsewhere; unknown keys are ignored.

    Raises ValueError for what contradicts SD v1's architecture, for wrong types and absurd numbers.
    """
    kind, data = KINDS[network], read_json(path)
    check_fixed(path, data, FIXED[network])
    full, side = UNetConfig(), data.get("sample_size")
    if network == "unet" and data.get("block_out_channels") in (None, [*full.block_out_channels]):
        if side not in (None, full.sample_size):
            said = f"{path}: sample_size is {side!r:.40}, but a UNet of these widths is SD v1's: it works at 512 pixels"
            warnings.warn(f"{said} (--size sets another)", stacklevel=2)
        data = data | {"sample_size": full.sample_size}
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
    if isinstance(config, CLIPConfig | CLIPImageConfig):
        if config.hidden_size % config.num_attention_heads:
            raise ValueError(f"{path}: {config.hidden_size} is no multiple of {config.num_attention_heads} heads")
        return
    heads, groups = (config.attention_head_dim if isinstance(config, UNetConfig) else 1), config.norm_num_groups
    for c in config.block_out_channels:
        if c % heads or c % groups or c % 2:
            raise ValueError(f"{path}: {c} channels do not divide into {heads} heads and {groups} groups")
    n = len(config.block_out_channels)
    if isinstance(config, UNetConfig):
        types = (["CrossAttnDownBlock2D"] * (n - 1) + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (n - 1))
    else:
        types = (["DownEncoderBlock2D"] * n, ["UpDecoderBlock2D"] * n)
    for key, expected in zip(("down_block_types", "up_block_types"), types):
        if data.get(key, expected) != expected:
            raise ValueError(f"{path}: {key} is {data[key]!r}, SD v1's pattern is {expected!r}")
