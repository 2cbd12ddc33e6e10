"""A decoder for one picture (Blended latent diffusion, Avrahami et al., 2206.02779, section 4.2).

What lies outside the mask is the picture's own latent, and yet its pixels are only near the picture's: the autoencoder
loses detail. A copy of the decoder's weights is fitted to show both, the pixels of the unfitted decoder inside and the
picture's outside: |M (D(z) - D_0(z))|^2 + 100 |(1 - M) (D(z) - picture)|^2, means over values, by Adam (1412.6980).
The model keeps its weights. Model rows: none, but each step goes through the decoder and back in float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from ..attention import sdpa

RATE, OUTSIDE = 1e-4, 100.0  # the authors'


@torch.no_grad()
def fitted(vae: Any, latent: Tensor, pixels: Tensor, mask: Tensor, steps: int) -> Tensor:
    """latent (b, 4, h, w), pixels (b, 3, 8h, 8w) in [-1, 1], mask (b or 1, 1, h, w), 1 = inside -> pixels after `steps`
    of Adam.
    """
    decoder = vae.decoder
    weights = {name: weight.detach().float().clone() for name, weight in decoder.named_parameters()}
    z = vae.post_quant_conv((latent / vae.config.scaling_factor).to(vae.post_quant_conv.weight)).float()
    M = F.interpolate(mask.to(pixels), pixels.shape[2:], mode="nearest")
    mean, square = ({name: torch.zeros_like(weight) for name, weight in weights.items()} for _ in range(2))
    unfitted = functional_call(decoder, weights, (z, sdpa))
    for k in range(1, steps + 1):
        with torch.enable_grad():
            known = {name: weight.requires_grad_() for name, weight in weights.items()}
            shown = functional_call(decoder, known, (z, sdpa))
            inside, outside = M * (shown - unfitted), (1 - M) * (shown - pixels)
            loss = inside.square().mean() + OUTSIDE * outside.square().mean()
            gradients = torch.autograd.grad(loss, [*known.values()])
        for (name, weight), gradient in zip(known.items(), gradients):
            mean[name] = 0.9 * mean[name] + 0.1 * gradient
            square[name] = 0.999 * square[name] + 0.001 * gradient**2
            step = (mean[name] / (1 - 0.9**k)) / ((square[name] / (1 - 0.999**k)).sqrt() + 1e-8)
            weights[name] = weight.detach() - RATE * step
    return functional_call(decoder, weights, (z, sdpa))
