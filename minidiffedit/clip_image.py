"""What Paint by Example sees its example with (Yang et al., 2211.13227, section 3.2): CLIP ViT-L/14's other tower.

Of a picture of 224 x 224 pixels, cut into patches of 14, the class token of the last layer goes on, normed, through
five blocks and a linear map: one vector, which the UNet reads in a text's place. A learned vector stands for no
example.
Module names are those of diffusers' folders, those of the blocks in short (INNER).
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Site, sdpa
from .clip import CLIPConfig, Layer
from .tokenizer import EOS

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's pictures, RGB in 0..1

# A part of a block -> its name in a folder's file, in a single file. Of c_qkv the last third makes the values.
INNER = {"norm1": ("norm1", "ln_1"), "to_v": ("attn1.to_v", "attn.c_qkv"), "to_out": ("attn1.to_out.0", "attn.c_proj")}
INNER |= {"norm2": ("norm3", "ln_2"), "fc1": ("ff.net.0.proj", "mlp.c_fc"), "fc2": ("ff.net.2", "mlp.c_proj")}
OUTER = {"model.": "cond_stage_model.transformer.vision_model.", "final_layer_norm": "cond_stage_model.final_ln"}
OUTER |= {"uncond_vector": "learnable_vector"}
FUSED = "attn.c_qkv."


@dataclass(frozen=True)
class CLIPImageConfig:
    """Paint by Example's numbers; a folder's config.json may give smaller ones."""

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int = 768


class Patches(nn.Module):
    def __init__(self, config: CLIPImageConfig):
        super().__init__()
        c, side = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(c))
        self.patch_embedding = nn.Conv2d(3, c, side, stride=side, bias=False)
        places = torch.randn(1 + (config.image_size // side) ** 2, c)
        self.position_embedding = nn.Embedding.from_pretrained(places, freeze=False)  # see clip.py

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embedding(x).flatten(2).transpose(1, 2)
        return torch.cat([self.class_embedding.expand(len(x), 1, -1), patches], 1) + self.position_embedding.weight


class Tower(nn.Module):
    """Pictures -> their class tokens (n, 1, hidden_size)."""

    def __init__(self, config: CLIPImageConfig):
        super().__init__()
        c, n = config.hidden_size, config.num_hidden_layers
        like_text = CLIPConfig(c, n, config.num_attention_heads, config.intermediate_size)
        layers = [Layer(like_text, index) for index in range(n)]
        for index, layer in enumerate(layers):
            layer.self_attn.site = Site("clip", 0, index, "self")  # every patch sees every other
        self.embeddings, self.encoder = Patches(config), nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.pre_layrnorm, self.post_layernorm = nn.LayerNorm(c), nn.LayerNorm(c)  # spelled so in every file

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_layrnorm(self.embeddings(x))
        for layer in self.encoder["layers"]:  # type: ignore[attr-defined]
            x = layer(x, sdpa)
        return self.post_layernorm(x[:, :1])


class Block(nn.Module):
    """A transformer's block for one token. It attends to itself alone, with weight 1, so that its attention is a linear
    map of its value: the queries and keys that files hold change nothing, and are not read.
    """

    def __init__(self, c: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.to_v, self.to_out = nn.Linear(c, c), nn.Linear(c, c)
        self.fc1, self.fc2 = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.to_out(self.to_v(self.norm1(x)))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class CLIPImage(nn.Module):
    """In the place of CLIPText, of which it knows the empty text alone."""

    def __init__(self, config: CLIPImageConfig = CLIPImageConfig()):
        super().__init__()
        self.config, c, width = config, config.hidden_size, config.projection_dim
        self.model = Tower(config)
        self.mapper = nn.Sequential(*(Block(c) for _ in range((config.num_hidden_layers + 1) // 5)))
        self.final_layer_norm, self.proj_out = nn.LayerNorm(c), nn.Linear(c, width)
        self.uncond_vector = nn.Parameter(torch.randn(1, 1, width))

    def see(self, pixels: Tensor) -> Tensor:
        """pixels (n, 3, image_size, image_size) in [-1, 1] -> (n, 1, projection_dim), in the modules' dtype."""
        mean, std = (pixels.new_tensor(each)[:, None, None] for each in (MEAN, STD))
        return self.proj_out(self.final_layer_norm(self.mapper(self.model(((pixels + 1) / 2 - mean) / std))))

    def forward(self, ids: Tensor) -> Tensor:
        """ids (n, 77) of empty texts -> (n, 1, projection_dim), what stands for no example. ValueError for words."""
        if (ids[:, 1] != EOS).any():
            raise ValueError("Paint by Example's weights read an example, no text: give one as reference")
        return self.uncond_vector.expand(len(ids), -1, -1)


# ---------------------------------------------------------------- names in files


def image_names(layout: int, name: str) -> list[str]:
    """Module name -> its keys in a folder's file (layout 0; transformers from 5.6 on leave out `vision_model.`), or in
    a single file (1).
    """
    if m := re.fullmatch(r"mapper\.(\d+)\.(\w+)\.(\w+)", name):
        blocks = ("mapper.blocks", "cond_stage_model.mapper.resblocks")[layout]
        return [f"{blocks}.{m[1]}.{INNER[m[2]][layout]}.{m[3]}"]
    if layout == 0:
        return [re.sub(r"^model\.", "model.vision_model.", name), name]
    return [next((to + name.removeprefix(ours) for ours, to in OUTER.items() if name.startswith(ours)), name)]


def values_alone(name: str, tensor: Tensor) -> Tensor:
    """Of what makes queries, keys and values in one, the values' third."""
    return tensor.chunk(3)[2] if ".to_v." in name else tensor
