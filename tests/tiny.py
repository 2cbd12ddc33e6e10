"""A Stable Diffusion v1 small enough for tests, with random weights, in memory and as a folder in the hub's layout.

channels: what the UNet reads of each cell: 4, or 8 and 9 for the weights of InstructPix2Pix and of inpainting.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from minidiffedit import StableDiffusion, Tokenizer
from minidiffedit.clip import CLIPConfig, CLIPText
from minidiffedit.unet import UNet, UNetConfig
from minidiffedit.vae import VAE, VAEConfig

UNET = UNetConfig(
    block_out_channels=(16, 32, 32, 32), layers_per_block=2, cross_attention_dim=24, attention_head_dim=4,
    norm_num_groups=4, sample_size=8,
)  # fmt: skip
# Two levels of one block each: what torch.compile traces in a second or two.
SHALLOW = replace(UNET, block_out_channels=(16, 32), layers_per_block=1)
VAE_ = VAEConfig(block_out_channels=(8, 16, 16, 16), norm_num_groups=4)
CLIP = CLIPConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)

SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None, "clip_sample": False,
}  # fmt: skip
CONFIGS = {
    "unet": {
        "_class_name": "UNet2DConditionModel", "block_out_channels": [16, 32, 32, 32], "layers_per_block": 2,
        "cross_attention_dim": 24, "attention_head_dim": 4, "norm_num_groups": 4, "sample_size": 8, "in_channels": 4,
        "out_channels": 4, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "act_fn": "silu", "norm_eps": 1e-5,
    },
    "vae": {
        "_class_name": "AutoencoderKL", "block_out_channels": [8, 16, 16, 16], "norm_num_groups": 4,
        "latent_channels": 4, "layers_per_block": 2, "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4, "act_fn": "silu", "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "intermediate_size": 48, "hidden_act": "quick_gelu", "vocab_size": 49408,
        "max_position_embeddings": 77, "layer_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
    },
}  # fmt: skip


def networks(channels: int = 4, unet: UNetConfig = UNET) -> tuple[UNet, VAE, CLIPText]:
    """Random, with every norm and bias away from its initial 1 or 0, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(0)
    made = UNet(replace(unet, in_channels=channels)), VAE(VAE_), CLIPText(CLIP)
    for module in made:
        for name, p in module.named_parameters():
            scale = 0.3 if p.ndim == 1 or "embedding.weight" in name else (3 / p[0].numel()) ** 0.5
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            p.data = centre + scale * torch.randn(p.shape, generator=generator)
        module.eval().requires_grad_(False)
    return made


def model(channels: int = 4) -> StableDiffusion:
    """In the layout of a loaded one, so that both give the same bits."""
    unet, vae, clip = networks(channels)
    for module in (unet, vae):
        module.to(memory_format=torch.channels_last)
    return StableDiffusion(unet, vae, clip, Tokenizer())


def picture() -> Image.Image:
    """Random pixels; neither side is a multiple of 8."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 93, 3), dtype=np.uint8))


def box() -> Image.Image:
    """A mask for it."""
    mask = Image.new("L", (93, 75))
    mask.paste(255, (20, 10, 50, 40))
    return mask


def tensors(network: str, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    prefix = "text_model." if network == "text_encoder" else ""
    return {prefix + name: tensor.contiguous() for name, tensor in module.state_dict().items()}


FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def write_folder(folder: Path, dtype: torch.dtype = torch.float32, channels: int = 4, unet: UNetConfig = UNET) -> Path:
    lower = len(unet.block_out_channels) - 1
    shape = {
        "in_channels": channels, "block_out_channels": [*unet.block_out_channels],
        "layers_per_block": unet.layers_per_block,
        "down_block_types": ["CrossAttnDownBlock2D"] * lower + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * lower,
    }  # fmt: skip
    for (network, file), module in zip(FILES.items(), networks(channels, unet)):
        (folder / network).mkdir(parents=True)
        state = {name: tensor.to(dtype) for name, tensor in tensors(network, module).items()}
        save_file(state, folder / network / file)
        config = CONFIGS[network] | (shape if network == "unet" else {})
        (folder / network / "config.json").write_text(json.dumps(config))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder
