"""Attention: the one operation of the three networks that can be exchanged.

Every attention layer calls `attend(site, q, k, v)`, which is handed to the network's call: torch's scaled-dot-product
attention, our kernel (kernels/), a recorder of attention maps or a method that edits them (prompt-to-prompt, MasaCtrl).
Nothing is replaced or counted from outside: each layer knows its own `Site` from construction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels


@dataclass(frozen=True)
class Site:
    """Where an attention layer sits."""

    place: Literal["down", "mid", "up", "vae_encoder", "vae_decoder", "clip"]
    level: int  # how often the resolution was halved before it (CLIP: 0)
    index: int  # running number within place and level
    kind: Literal["self", "cross", "causal"]  # cross: keys from the text; causal: CLIP


# q (b, heads, n, d), k and v (b, heads, m, d) -> (b, heads, n, d), scaled by d^-1/2; any strides. Where k texts share
# a latent, the very first self-attention sees each latent once, all later layers k times (see UNet.forward).
Attend = Callable[[Site, Tensor, Tensor, Tensor], Tensor]


def sdpa(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v by torch's fused kernels (Vaswani et al., 1706.03762, eq. 1)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=site.kind == "causal")


def auto(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Our kernel where it can run and was measured faster on a GPU, else SDPA: always, until one has been measured."""
    return (kernels.attend if kernels.preferred(site, q, k, v) else sdpa)(site, q, k, v)


BACKENDS = {"auto": auto, "sdpa": sdpa, "triton": kernels.attend}


def backend(name: str, device: torch.device, dtype: torch.dtype) -> Attend:
    """name: auto, sdpa or triton. ValueError for others, and for triton on a device or in a dtype it does not take."""
    if name not in BACKENDS:
        raise ValueError(f"attention must be one of {', '.join(BACKENDS)}, got {name!r}")
    reason = kernels.unfit(device, dtype)
    if name == "triton" and reason:
        raise ValueError(f"attention 'triton' cannot run: {reason}; use 'auto' or 'sdpa'")
    return sdpa if reason else BACKENDS[name]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b, n, heads * d) -> (b, heads, n, d), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """(b, heads, n, d) -> (b, n, heads * d)."""
    return x.transpose(1, 2).flatten(2)
