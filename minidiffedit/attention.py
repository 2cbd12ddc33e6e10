"""Attention: the one operation of the three networks that can be exchanged, and the UNet's hooks for methods.

Every attention layer calls `attend(site, q, k, v)`, which is handed to the network's call: torch's scaled-dot-product
attention, our kernel (kernels/), a recorder of attention maps or a method that edits them (prompt-to-prompt, MasaCtrl).
The UNet also shows its features on the way (Plug-and-Play). Nothing is replaced or counted from outside: each layer
knows its own `Site` from construction.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .kernels.once import anew

Place = Literal["down", "mid", "up", "vae_encoder", "vae_decoder", "clip"]


@dataclass(frozen=True)
class Site:
    """Where an attention layer sits, or a feature of the UNet."""

    place: Place
    level: int  # how often the resolution was halved before it (CLIP: 0)
    index: int  # running number of its kind within place and level
    kind: Literal["self", "cross", "causal", "conv", "block"]  # cross: keys from the text; causal: CLIP; see Feature


# q (b, heads, n, d), k and v (b, heads, m, d) -> (b, heads, n, d), scaled by d^-1/2; any strides. Where k texts share
# a latent, all before the first cross-attention sees each latent once, all later k times (see UNet.forward): the very
# first self-attention, and the first "conv" and "self" features.
Attend = Callable[[Site, Tensor, Tensor, Tensor], Tensor]

# tap(plain, site, q, k, v) -> what Attend gives: a method's attention, with the model's own, `plain`, in hand.
Tap = Callable[[Attend, Site, Tensor, Tensor, Tensor], Tensor]

# feature(site, h) -> h, or what to go on with in its place, of the same shape. By site.kind, h is
#   conv         (b, c, h, w)  a ResBlock's branch, before its residual is added
#   self, cross  (b, h w, c)   an attention's output, before its residual is added
#   block        (b, c, h, w)  what a block hands on, before it becomes a skip. The blocks are those of CompVis:
#                              input_blocks 1 to 11 (a ResBlock with its transformer, or a downsampler), middle_block,
#                              output_blocks 0 to 11 (a ResBlock with its transformer, and the upsampler at its end)
Feature = Callable[[Site, Tensor], Tensor]


def sdpa(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v by torch's fused kernels (Vaswani et al., 1706.03762, eq. 1)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=site.kind == "causal")


def auto(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Our kernel where it can run and was measured faster on a GPU, else SDPA: always, until one has been measured."""
    return (kernels.attend if kernels.preferred(site, q, k, v) else sdpa)(site, q, k, v)


def weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) in full, (b, heads, n, m), for q (b, heads, n, d) and k (b, heads, m, d)."""
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)  # scaled first: q k overflows float16


def unchanged(site: Site, h: Tensor) -> Tensor:
    return h


class Hooks(NamedTuple):
    """What one call of the UNet hands down to its layers."""

    attend: Attend = sdpa
    feature: Feature = unchanged
    once: Callable[..., Tensor] = anew  # (layer, given) -> layer(given), of a timestep or a text; may be kept


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
