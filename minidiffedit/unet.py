"""The UNet of Stable Diffusion v1: predicts the noise in a latent, given a timestep and a text.

Down the resolutions, through the middle, up again with skips; at every level but the coarsest, each residual block is
followed by a spatial transformer that reads the text. Module names are the official checkpoint's keys.
Architecture: Rombach et al., 2112.10752; Ronneberger et al., 1505.04597 (skips); Shazeer, 2002.05202 (GEGLU).
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Hooks, Place, Site, anew, join_heads, split_heads
from .kernels.gradients import made_again


@dataclass(frozen=True)
class UNetConfig:
    """SD v1's numbers; a folder's config.json may give smaller ones."""

    in_channels: int = 4  # 9 for inpainting, 8 for InstructPix2Pix: the latent, then what is given
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    attention_head_dim: int = 8  # the official name for what is the number of heads
    norm_num_groups: int = 32
    sample_size: int = 64  # side of the latents it was trained on


def time_features(t: Tensor, width: int) -> Tensor:
    """t (b,) -> (b, width) float32: [cos, sin] of t over geometric wavelengths (Vaswani et al., section 3.5)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def fan_out(x: Tensor, rows: int) -> Tensor:
    """(b, ...) -> (rows, ...), repeated where it is not yet that long."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))  # repeat() loses channels-last


class ResBlock(nn.Module):
    """Two norm-SiLU-conv stages around the time embedding (whose SiLU is taken already), and a residual."""

    def __init__(self, c_in: int, c_out: int, time_width: int, groups: int, site: Site):
        super().__init__()
        self.site = site
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, time: Tensor, hooks: Hooks) -> Tensor:
        h = made_again(self.branch, x, hooks.once(self.time_emb_proj, time))
        return self.conv_shortcut(x) + hooks.feature(self.site, h)

    def branch(self, x: Tensor, shift: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True)) + shift[:, :, None, None]
        return self.conv2(F.silu(self.norm2(h), inplace=True))


class Attention(nn.Module):
    """Multi-head attention: queries from x, keys and values from the context; no bias but in the output."""

    def __init__(self, width: int, context_width: int, heads: int, site: Site):
        super().__init__()
        self.heads, self.site = heads, site
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_width, width, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor, hooks: Hooks) -> Tensor:
        once = hooks.once if self.site.kind == "cross" else anew
        products = self.to_q(x), once(self.to_k, context), once(self.to_v, context)
        q, k, v = (split_heads(product, self.heads) for product in products)
        return hooks.feature(self.site, self.to_out[0](join_heads(hooks.attend(self.site, q, k, v))))


class GEGLU(nn.Module):
    """The first half of the projection is the value, the second the gate: value * gelu(gate), exact GELU."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each pre-normed with a residual."""

    def __init__(self, width: int, text_width: int, heads: int, place: Place, level: int, index: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads, Site(place, level, index, "self"))
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, text_width, heads, Site(place, level, index, "cross"))
        self.norm3 = nn.LayerNorm(width)
        # The official net has a dropout at index 1; the Identity keeps the key numbers.
        net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))
        self.ff = nn.Sequential(OrderedDict(net=net))

    def forward(self, x: Tensor, text: Tensor, hooks: Hooks) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn1(h, h, hooks)
        x = fan_out(x, len(text))  # at the first cross-attention of all, where the rows begin to differ
        x = x + self.attn2(self.norm2(x), text, hooks)
        return x + made_again(lambda y: self.ff(self.norm3(y)), x)


class SpatialTransformer(nn.Module):
    """A transformer block over the h * w cells, between two 1x1 convolutions, with a residual."""

    def __init__(self, c: int, config: UNetConfig, place: Place, level: int, index: int):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, c, eps=1e-6)
        self.proj_in = nn.Conv2d(c, c, 1)
        block = TransformerBlock(c, config.cross_attention_dim, config.attention_head_dim, place, level, index)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor, text: Tensor, hooks: Hooks) -> Tensor:
        h, w = x.shape[-2:]
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (b, h w, c)
        tokens = self.transformer_blocks[0](tokens, text, hooks)
        return fan_out(x, len(text)) + self.proj_out(tokens.transpose(1, 2).unflatten(2, (h, w)))


class Upsample(nn.Module):
    """Nearest-neighbour to the next skip's size (twice the side, or one less), then a convolution."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x, size=tuple(size), mode="nearest"))


class DownBlock(nn.Module):
    """One resolution on the way down; every entry it makes is also a skip."""

    def __init__(self, c_in: int, c_out: int, time_width: int, config: UNetConfig, level: int):
        super().__init__()
        n, last = config.layers_per_block, level == len(config.block_out_channels) - 1
        widths, groups = [c_in] + [c_out] * (n - 1), config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResBlock(c, c_out, time_width, groups, Site("down", level, i, "conv")) for i, c in enumerate(widths)
        )
        self.sites = [Site("down", level, i, "block") for i in range(n + 1)]  # the downsampler's is the last
        if not last:
            self.attentions = nn.ModuleList(SpatialTransformer(c_out, config, "down", level, i) for i in range(n))
            conv = nn.Conv2d(c_out, c_out, 3, stride=2, padding=1)
            self.downsamplers = nn.ModuleList([nn.Sequential(OrderedDict(conv=conv))])
        self.last = last

    def forward(self, x: Tensor, time: Tensor, text: Tensor, hooks: Hooks) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time, hooks)
            if not self.last:
                x = self.attentions[i](x, text, hooks)
            x = hooks.feature(self.sites[i], x)
            skips.append(x)
        if not self.last:
            x = hooks.feature(self.sites[-1], self.downsamplers[0](x))
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    def __init__(self, c: int, time_width: int, config: UNetConfig, level: int):
        super().__init__()
        sites = [Site("mid", level, i, "conv") for i in range(2)]
        self.resnets = nn.ModuleList(ResBlock(c, c, time_width, config.norm_num_groups, site) for site in sites)
        self.attentions = nn.ModuleList([SpatialTransformer(c, config, "mid", level, 0)])
        self.site = Site("mid", level, 0, "block")

    def forward(self, x: Tensor, time: Tensor, text: Tensor, hooks: Hooks) -> Tensor:
        x = self.resnets[0](x, time, hooks)
        x = self.attentions[0](x, text, hooks)
        return hooks.feature(self.site, self.resnets[1](x, time, hooks))


class UpBlock(nn.Module):
    """One resolution on the way up: each ResBlock reads [current, skip], the latest skip first."""

    def __init__(self, c_in: int, c_out: int, skip_widths: list[int], time_width: int, config: UNetConfig, level: int):
        super().__init__()
        n, self.has_text = len(skip_widths), level < len(config.block_out_channels) - 1
        widths = [c + skip for c, skip in zip([c_in] + [c_out] * (n - 1), skip_widths)]
        groups = config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResBlock(c, c_out, time_width, groups, Site("up", level, i, "conv")) for i, c in enumerate(widths)
        )
        self.sites = [Site("up", level, i, "block") for i in range(n)]
        if self.has_text:
            self.attentions = nn.ModuleList(SpatialTransformer(c_out, config, "up", level, i) for i in range(n))
        if level > 0:
            self.upsamplers = nn.ModuleList([Upsample(c_out)])

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, text: Tensor, hooks: Hooks) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, fan_out(skips.pop(), len(x))], dim=1), time, hooks)
            if self.has_text:
                x = self.attentions[i](x, text, hooks)
            if skips and i == len(self.resnets) - 1:
                x = self.upsamplers[0](x, skips[-1].shape[-2:])
            x = hooks.feature(self.sites[i], x)
        return x


class UNet(nn.Module):
    """eps-prediction: unet(x_t, t, text) has the latent's shape and dtype."""

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        widths, n = config.block_out_channels, config.layers_per_block
        time_width = 4 * widths[0]
        embedding = {"linear_1": nn.Linear(widths[0], time_width), "silu": nn.SiLU()}
        self.time_embedding = nn.Sequential(OrderedDict(embedding, linear_2=nn.Linear(time_width, time_width)))
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)

        self.down_blocks = nn.ModuleList()
        skip_widths = [widths[0]]  # conv_in, then per level n blocks and a downsampler
        for level, (c_in, c_out) in enumerate(zip((widths[0], *widths), widths)):
            self.down_blocks.append(DownBlock(c_in, c_out, time_width, config, level))
            skip_widths += [c_out] * (n if level == len(widths) - 1 else n + 1)
        self.mid_block = MidBlock(widths[-1], time_width, config, len(widths) - 1)
        self.up_blocks = nn.ModuleList()
        c_in = widths[-1]
        for level in reversed(range(len(widths))):
            taken = [skip_widths.pop() for _ in range(n + 1)]
            self.up_blocks.append(UpBlock(c_in, widths[level], taken, time_width, config, level))
            c_in = widths[level]

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=1e-5)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor | int, text: Tensor, *hooks: Any) -> Tensor:
        """x (b, 4, h, w) noisy latents of any h, w >= 1, or (b, 8 or 9, h, w) where the UNet takes more; t one timestep
        0..999, or (b,) if k = 1; text (k b, 77, width) from CLIP, in x's dtype. hooks: of `Hooks` (attention.py) the
        first, as far as others than the defaults are wanted; each site is seen once, in the order of computation.
        Returns the predicted noise (k b, 4, h, w), in x's dtype.

        With k > 1 every latent is asked under k texts, in the order of x.repeat(k): what lies before the first
        cross-attention is computed once for all of them (exact, 5 % of a row at 512 x 512).
        """
        expected = self.config.in_channels, 0, self.config.cross_attention_dim
        fits = (x.shape[1], len(text) % len(x), text.shape[2]) == expected
        assert fits, f"latents {tuple(x.shape)} and text {tuple(text.shape)} do not fit one another and {self.config}"
        hooks, x = Hooks(*hooks), self.conv_in(x)
        skips, time = [x], hooks.once(self.time, t)
        for down in self.down_blocks:
            x, made = down(x, time, text, hooks)
            skips += made
        x = self.mid_block(x, time, text, hooks)
        for up in self.up_blocks:
            x = up(x, skips, time, text, hooks)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def time(self, t: Tensor | int) -> Tensor:
        """What all residual blocks read of a timestep, or of (b,): (1 or b, 4 widths[0])."""
        weight = self.conv_in.weight
        t = t.reshape(-1) if isinstance(t, Tensor) else torch.full((1,), t, device=weight.device)  # `tensor` would wait
        return F.silu(self.time_embedding(time_features(t, self.config.block_out_channels[0]).to(weight.dtype)))
