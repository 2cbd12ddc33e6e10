"""How many kernels a call of the UNet launches: on a GPU each costs the host microseconds, whatever it computes."""

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minidiffedit.attention import unchanged
from minidiffedit.fast import fuse
from minidiffedit.kernels.once import Once
from minidiffedit.unet import UNet, UNetConfig


class Launches(TorchDispatchMode):
    """Counts operations that compute: neither views nor memory that is only laid out."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {one.untyped_storage()._cdata for one in args if isinstance(one, torch.Tensor)}
        out = made[0] if isinstance(made, list) else made
        view = isinstance(out, torch.Tensor) and out.untyped_storage()._cdata in given and not func._schema.is_mutable
        self.count += not view and "empty" not in func.__name__
        return made


def launches(config, texts, change=lambda unet: unet):
    """Of the first call, and of another at the same timestep under the same texts, with what the first made of them."""
    counts, once = [], Once()
    with torch.device("meta"), torch.no_grad():
        unet = change(UNet(config).to(memory_format=torch.channels_last))
        x = torch.empty(1, 4, 16, 16).to(memory_format=torch.channels_last)
        text = torch.empty(texts, 77, config.cross_attention_dim)
        for _ in range(2):
            hooks = (lambda site, q, k, v: q * 1), unchanged, once.keeper(unet, 481, [text], 1)
            with Launches() as seen:
                unet(x, 481, text, *hooks)  # of attention one launch, as of a fused one
            counts.append(seen.count)
    return counts


def expected(config, texts, fused, again):
    """By the architecture alone."""
    widths, n, levels = config.block_out_channels, config.layers_per_block, len(config.block_out_channels)
    up = levels * (n + 1)
    resblocks, transformers = levels * n + 2 + up, (levels - 1) * (2 * n + 1) + 1
    shortcuts = sum(a != b for a, b in zip((widths[0], *widths), widths)) + up  # going up, two are joined to one
    resblock = 2 + 2 + 2 + 1 + 2  # norms, SiLUs, convolutions, the time's product, sums
    products = 1 + 2 if fused else 3 + 3  # of self- and of cross-attention
    resizing = (levels - 1) + 2 * (levels - 1)  # a convolution; enlarging and a convolution
    time = 10 + 3 + 1  # its features, its two layers, one SiLU for all residual blocks
    repeated = 3 if texts > 1 else 0  # tokens, residual and first skip, where the rows begin to differ
    if again:
        time, resblock, products = 0, resblock - 1, products - 2 * (not fused)  # all of time, of text keys and values
    transformer = 1 + 2 + 1 + 2 * 4 + products + 6  # its own; around the attentions; feed-forward
    return resblock * resblocks + shortcuts + up + transformer * transformers + resizing + time + 4 + repeated


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="counted on 2.13; older releases take some products apart")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("texts", [1, 2])
@pytest.mark.parametrize("config", [UNetConfig(), tiny.UNET], ids=["SD v1", "tiny"])
def test_a_call_launches_what_the_architecture_needs(config, texts, fused):
    counts = launches(config, texts, *[fuse] * fused)
    assert counts == [expected(config, texts, fused, again) for again in (False, True)]
    if config == UNetConfig() and not fused:
        assert counts == {1: [635, 567], 2: [638, 570]}[texts]
