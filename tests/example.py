"""Paint by Example small enough for tests: the tiny model of 9 channels with an encoder of pictures for its text's."""

import json
import shutil

import tiny
import torch
from safetensors.torch import save_file

from minidiffedit.clip_image import CLIPImage, CLIPImageConfig, image_names

CONFIG = CLIPImageConfig(
    hidden_size=32, num_hidden_layers=9, num_attention_heads=4, intermediate_size=48, image_size=28, patch_size=7,
    projection_dim=24,
)  # fmt: skip
JSON = {
    "architectures": ["PaintByExampleImageEncoder"], "model_type": "clip_vision_model", "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "num_channels": 3, **vars(CONFIG),
}  # fmt: skip


def at_random(module, seed=0):
    """Every parameter, with norms and biases away from 1 and 0, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        scale = 0.3 if p.ndim == 1 or "embedding.weight" in name else (3 / p[0].numel()) ** 0.5
        p.data = centre + scale * torch.randn(p.shape, generator=generator)
    return module.eval().requires_grad_(False)


def write_folder(folder):
    tiny.write_folder(folder, channels=9)
    (folder / "text_encoder").rename(folder / "image_encoder")
    state = {image_names(0, n)[0]: t.contiguous() for n, t in at_random(CLIPImage(CONFIG)).state_dict().items()}
    save_file(state, folder / "image_encoder" / "model.safetensors")
    (folder / "image_encoder" / "config.json").write_text(json.dumps(JSON))
    return folder


def with_encoder(peer, folder):
    """The same, whose encoder diffusers writes."""
    write_folder(folder)
    shutil.rmtree(folder / "image_encoder")
    peer.save_pretrained(folder / "image_encoder")
    return folder
