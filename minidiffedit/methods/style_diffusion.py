"""StyleDiffusion (Li et al., 2303.15649), its direct variant: what cross-attention shows of a word is learned by level.

Section 3.2: keys are made of the source's text c, values of s c + b, with s and b (77, width) for each level. Along the
path down, Adam on |move(x, e_null + w (e_text - e_null)) - x*_{j-1}|^2 + |P - P*|^2, P the maps of the coarsest level
with text, mean over heads and layers, P* those of the path's own latent (section 3.3). By its authors' schedule: rate
1e-2 (1 - i/100), with more than 50 steps 1e-2 (1 - i/2N); ceil(inner_steps exp(-.1 i)) steps; stop as null-text
inversion. The editor, prompt-to-prompt, then has them in its source's row in the first `learned_steps`
(path.Path.sources), beyond which nothing is learned. Model rows: K for the path; in the first levels 2 each for what is
fixed, at most the inner steps with gradient, 1 for the step.

Left out: the network that makes s and b of CLIP's picture tokens, whose image tower no SD v1 file holds; the exchange
of unguided self-attention (P2Plus). One picture at a time.
"""

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Attend, Site, weights
from ..ddim import move
from ..options import Scale, Steps, Strength, Within
from ..path import HookedEps, Path
from .descent import Adam, slopes, wide
from .inversions import Refine, ddim
from .lora import one_picture
from .null_text import ENOUGH, ENOUGH_MORE, RATE
from .prompt_to_prompt import Early, first


@torch.no_grad()
def style_diffusion(
    eps: HookedEps,
    x0: Tensor,
    null: Tensor,
    source: Tensor,
    coarsest: int,
    *,
    steps: Steps = 50,
    strength: Strength = 1.0,
    guidance_scale: Scale = 7.5,
    inner_steps: Annotated[int, Within(0, 200, "of Adam on the first level's text, at most; later fewer")] = 100,
    learned_steps: Early = 0.6,
    refine: Refine = 1,
) -> Path:
    """null, source (1, 77, width). Returns the path, pinned, with a source text of (1, 154, width) for its first
    levels; it holds for this guidance_scale, steps and source text. Raises ValueError for several pictures.
    """
    x0 = one_picture(x0, "StyleDiffusion")
    path = ddim(eps, x0, null, source, steps=steps, strength=strength, refine=refine)
    x, found, both = path.rows(1), dict[int, Any](), [torch.ones_like(source).to(x0), torch.zeros_like(source).to(x0)]
    for i, j in enumerate(path.down()):
        if i >= first(learned_steps, path.top):
            break
        own = Paired(coarsest)
        eps(path[j], path.t[j], [source], tap=own)
        wanted, e_null = own.map(), eps(x, path.t[j], [null])[0]

        def missed(s: Tensor, b: Tensor, x: Any = x, j: int = j, wanted: Any = wanted, e_null: Any = e_null) -> Tensor:
            y, map = stepped(eps, path, x, j, paired(source, s, b), e_null, guidance_scale, coarsest)
            return F.mse_loss(y, path[j - 1]) + F.mse_loss(map, wanted)

        adam = Adam(RATE * (1 - i / max(100, 2 * steps)))
        for _ in range(math.ceil(inner_steps * math.exp(-0.1 * i))):
            loss, gradients = slopes(missed, both)
            both = adam.step(both, gradients)
            if float(loss) < ENOUGH + ENOUGH_MORE * i:
                break
        found[j] = paired(source, *both)
        x = stepped(eps, path, x, j, found[j], e_null, guidance_scale, coarsest)[0]
    return Path([*path.values()], steps, null, sources=found, pinned=True)


def paired(source: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """(1, 154, width): what keys are made of, then what values are."""
    return torch.cat([source.to(s), source.to(s) * s + b], dim=1)


def stepped(
    eps: HookedEps, path: Path, x: Tensor, j: int, text: Tensor, e_null: Tensor, scale: float, coarsest: int
) -> tuple[Tensor, Tensor]:
    """x at the level below under a paired text, guided, and the map on the way."""
    look = Paired(coarsest)
    e_text = eps(x, path.t[j], [text], tap=look)[0]
    return move(x, e_null + scale * (e_text - e_null), path.a[j], path.a[j - 1]), look.map()


class Paired:
    """A tap that makes keys of a text's first 77 positions and values of its last 77, and keeps the maps."""

    def __init__(self, coarsest: int):
        self.coarsest, self.seen = coarsest, list[Tensor]()

    def __call__(self, plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site.kind == "cross":
            k, v = k[:, :, :77], v[:, :, -77:]
            if site.level == self.coarsest:
                self.seen.append(wide(weights(q, k)).mean(1))
        return plain(site, q, k, v)

    def map(self) -> Tensor:
        """(1, n, 77)."""
        return torch.stack(self.seen).mean(0)
