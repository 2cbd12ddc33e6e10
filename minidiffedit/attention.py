"""Attention: the one operation of the three networks that can be exchanged.

Every attention layer calls `attend(site, q, k, v)`. The default is torch's scaled-dot-product attention; a faster
kernel, an attention map recorder or a method that edits attention (prompt-to-prompt, MasaCtrl) is another callable of
the same signature, handed to the network's call. Nothing is replaced or counted from outside: each layer knows its
own `Site` from construction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Site:
    """Where an attention layer sits.

    place: which part of which network. level: how often the resolution was halved before it (CLIP: 0).
    index: running number within place and level. kind: self, cross (keys from the text) or causal (CLIP).
    """

    place: Literal["down", "mid", "up", "vae_encoder", "vae_decoder", "clip"]
    level: int
    index: int
    kind: Literal["self", "cross", "causal"]


# q (b, heads, n, d), k and v (b, heads, m, d) -> (b, heads, n, d), scaled by d^-1/2; any strides. Where k texts share
# a latent, the very first self-attention sees each latent once, all later layers k times (see UNet.forward).
Attend = Callable[[Site, Tensor, Tensor, Tensor], Tensor]


def sdpa(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v by torch's fused kernels (Vaswani et al., 1706.03762, eq. 1)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=site.kind == "causal")


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b, n, heads * d) -> (b, heads, n, d), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(b, heads, n, d) -> (b, n, heads * d)."""
    return x.transpose(1, 2).flatten(2)
