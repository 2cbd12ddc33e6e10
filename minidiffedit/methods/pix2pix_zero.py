"""pix2pix-zero (Parmar et al., 2302.03027): the edit's text attention is pulled to the source's, by gradients.

Section 3.2: at each step the cross-attention maps of the edit, under its text, are compared with those that the source
has on its path, L = |M - M_source|^2 summed over layers, cells and positions and averaged over heads; the latent takes
one step against the gradient, x - rate dL/dx, and then the guided step. Maps are 77 columns wide. Model rows: 4 K b, of
which 2 K b in calls with a gradient, and the inversion's. Here the edit's text is the target's: the authors add to
the source's a mean direction between a thousand sentences with the one word and with the other, and regularise the
inversion's noise, both left out; their direction for two given texts is what stands here.
"""

from typing import Annotated, Any

import torch
from torch import Tensor

from ..attention import Attend, Site, weights
from ..options import Scale, Within
from ..path import HookedEps, Path
from .guidance import Guidance, Norm, Quantile, guide_of


@torch.no_grad()
def pix2pix_zero(
    eps: HookedEps,
    path: Path,
    source: Any,
    target: Any,
    *,
    rate: Annotated[float, Within(0, 10, "of the step towards the source's attention; 0: none")] = 0.1,
    guidance_scale: Scale = 7.5,
    guidance: Guidance = "cfg",
    quantile: Quantile = 0.4,
    norm: Norm = "l0",
) -> Tensor:
    """Rows of a call: first the path's latent under the source and the edit under its target, then the edit without and
    with it.
    """
    b, y, guide = len(path[0]), path.rows(1), guide_of(guidance, guidance_scale, quantile, norm)
    losses = list[Tensor]()

    def compared(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site.kind == "cross":
            ours, theirs = weights(q, k).float().split(b)[::-1]
            losses.append((ours - theirs.detach()).square().sum((2, 3)).mean(1).sum())  # a picture's is its own
        return plain(site, q, k, v)

    step = path.walk()
    for j in path.down():
        losses.clear()
        with torch.enable_grad():
            x = y.detach().requires_grad_()
            eps(torch.cat([path[j], x]), path.t[j], [path.texts(source, target)], tap=compared)
            (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), x)
        y = y - rate * gradient
        y = step(y, guide(*eps(y, path.t[j], [path.null(j), target])), j)
    return y
