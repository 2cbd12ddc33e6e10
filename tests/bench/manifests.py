"""Make the manifests of the layouts beside SD v1's base model: of diffusers' own classes, built without memory.

python tests/bench/manifests.py          writes tests/data/manifests/added_unets.json, diffusers_image_encoder.json
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"
INPUTS = {"instruct-pix2pix": 8, "inpainting": 9, "paint-by-example": 9}
# As in OpenAI's CLIP ViT-L/14, whose tower Paint by Example's is.
TOWER = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14, "projection_dim": 768, "hidden_act": "quick_gelu",
}  # fmt: skip


def entries(module):
    return {name: [[*tensor.shape], "F32"] for name, tensor in sorted(module.state_dict().items())}


def unet(channels):
    """diffusers' UNet of SD v1.5 with so many input channels."""
    from diffusers import UNet2DConditionModel

    config = json.loads((MANIFESTS / "configs/v1-5/unet/config.json").read_text()) | {"in_channels": channels}
    with torch.device("meta"):
        return entries(UNet2DConditionModel.from_config(config))


def encoder_class():
    """diffusers' encoder of Paint by Example; its folder is another one in old releases."""
    from diffusers import PaintByExamplePipeline

    return import_module(PaintByExamplePipeline.__module__).PaintByExampleImageEncoder


def image_encoder():
    """The same, under the names that its published file has (`vision_model.`)."""
    from transformers import CLIPVisionConfig

    with torch.device("meta"):
        found = entries(encoder_class()(CLIPVisionConfig(**TOWER)))
    flat = not any(".vision_model." in name for name in found)
    prefix = "model.vision_model." if flat else "model."
    return {prefix + n.removeprefix("model.") if n.startswith("model.") else n: one for n, one in found.items()}


def added_unets():
    """By layout, what differs from diffusers_unet.json."""
    base = json.loads((MANIFESTS / "diffusers_unet.json").read_text())
    made = {name: unet(channels) for name, channels in INPUTS.items()}
    assert all(one.keys() == base.keys() for one in made.values())
    return {name: {key: info for key, info in one.items() if info != base[key]} for name, one in made.items()}


def main():
    (MANIFESTS / "added_unets.json").write_text(json.dumps(added_unets(), indent=1) + "\n")
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(info)}" for name, info in image_encoder().items())
    (MANIFESTS / "diffusers_image_encoder.json").write_text(f"{{\n{lines}\n}}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
