"""The autoencoder of Stable Diffusion v1: 8 x 8 pixels to one cell of 4 numbers, and back (Rombach et al., 2112.10752).

Every norm has eps 1e-6 here. Module names are the official checkpoint's keys, in the newer spelling (`to_q`).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attend, Site, join_heads, sdpa, split_heads


@dataclass(frozen=True)
class VAEConfig:
    """SD v1's numbers; a folder's config.json may give smaller ones."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along a side."""
        return 2 ** (len(self.block_out_channels) - 1)


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return self.conv_shortcut(x) + h


class Attention(nn.Module):
    """One head over all cells, normed before, residual after; biases everywhere."""

    def __init__(self, c: int, groups: int, site: Site):
        super().__init__()
        self.site = site
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, c) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        h, w = x.shape[-2:]
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (b, h w, c)
        q, k, v = (split_heads(to(tokens), heads=1) for to in (self.to_q, self.to_k, self.to_v))
        tokens = self.to_out[0](join_heads(attend(self.site, q, k, v)))
        return x + tokens.transpose(1, 2).unflatten(2, (h, w))


class MidBlock(nn.Module):
    def __init__(self, c: int, groups: int, site: Site):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c, c, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(c, groups, site)])

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x), attend))


class Downsample(nn.Module):
    """Stride 2 after one column and one row of zeros on the right and bottom only."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.Module):
    """ResBlocks at one resolution, then (all but the last stage) the step to the next."""

    def __init__(self, widths: list[int], groups: int, downsample: bool = False, upsample: bool = False):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(a, b, groups) for a, b in pairwise(widths))
        if downsample:
            self.downsamplers = nn.ModuleList([Downsample(widths[-1])])
        if upsample:
            self.upsamplers = nn.ModuleList([Upsample(widths[-1])])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            for layer in module:  # type: ignore[attr-defined]
                x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, n, groups = config.block_out_channels, config.layers_per_block, config.norm_num_groups
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Stage([c_in] + [c_out] * n, groups, downsample=level < last)
            for level, (c_in, c_out) in enumerate(zip((widths[0], *widths), widths))
        )
        self.mid_block = MidBlock(widths[-1], groups, Site("vae_encoder", last, 0, "self"))
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = self.conv_in(x)
        for stage in self.down_blocks:
            x = stage(x)
        x = self.mid_block(x, attend)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.block_out_channels[::-1]
        n, groups, last = config.layers_per_block + 1, config.norm_num_groups, len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, Site("vae_decoder", last, 0, "self"))
        self.up_blocks = nn.ModuleList(
            Stage([c_in] + [c_out] * n, groups, upsample=i < last)
            for i, (c_in, c_out) in enumerate(zip((widths[0], *widths), widths))
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        x = self.mid_block(self.conv_in(x), attend)
        for stage in self.up_blocks:
            x = stage(x)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


class VAE(nn.Module):
    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)

    def encode(self, image: Tensor, attend: Attend = sdpa) -> tuple[Tensor, Tensor]:
        """image (b, 3, H, W) in [-1, 1], H and W multiples of 8 -> the posterior's mean and log-variance, each
        (b, 4, H/8, W/8), unscaled; log-variance clamped to [-30, 20].
        """
        assert image.shape[-1] % self.config.factor == 0 and image.shape[-2] % self.config.factor == 0, (
            f"sides {tuple(image.shape[-2:])} are no multiples of {self.config.factor}"
        )
        mean, log_variance = self.quant_conv(self.encoder(image, attend)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30.0, 20.0)

    def decode(self, z: Tensor, attend: Attend = sdpa) -> Tensor:
        """z (b, 4, h, w), unscaled -> image (b, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z), attend)
