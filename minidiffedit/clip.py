"""The text transformer of CLIP ViT-L/14 as Stable Diffusion v1 uses it (Radford et al., 2103.00020).

All 77 positions of the last layer, normed, condition the UNet: no padding mask, no pooled vector, no earlier layer.
Module names are the checkpoint's keys without the optional prefix `text_model.`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import Attend, Site, join_heads, sdpa, split_heads


@dataclass(frozen=True)
class CLIPConfig:
    """SD v1's numbers; a folder's config.json may give smaller ones."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 77
    vocab_size: int = 49408


class Embeddings(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        # By from_pretrained: drawing initial values on `meta` would import torch's compiler, a second of every load.
        tables = (torch.randn(n, config.hidden_size) for n in (config.vocab_size, config.max_position_embeddings))
        both = (nn.Embedding.from_pretrained(table, freeze=False) for table in tables)
        self.token_embedding, self.position_embedding = both

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class SelfAttention(nn.Module):
    def __init__(self, config: CLIPConfig, index: int):
        super().__init__()
        c, self.heads, self.site = config.hidden_size, config.num_attention_heads, Site("clip", 0, index, "causal")
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(c, c) for _ in range(4))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(join_heads(attend(self.site, q, k, v)))


class MLP(nn.Module):
    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))  # quick-GELU, which is not GELU


class Layer(nn.Module):
    def __init__(self, config: CLIPConfig, index: int):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size)
        self.self_attn = SelfAttention(config, index)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), attend)
        return x + self.mlp(self.layer_norm2(x))


class CLIPText(nn.Module):
    def __init__(self, config: CLIPConfig = CLIPConfig()):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, ids: Tensor, attend: Attend = sdpa) -> Tensor:
        """ids (n, 77) int64 from the tokenizer -> (n, 77, hidden_size), the modules' dtype."""
        assert ids.shape[1] <= self.config.max_position_embeddings, f"{ids.shape[1]} tokens are too many"
        return self.transform(self.embeddings(ids), attend)

    def transform(self, x: Tensor, attend: Attend = sdpa) -> Tensor:
        """x (n, 77, hidden_size) from `embeddings`, or learned in their place -> as forward."""
        for layer in self.encoder["layers"]:  # type: ignore[attr-defined]
            x = layer(x, attend)
        return self.final_layer_norm(x)
