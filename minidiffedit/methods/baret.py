"""BARET (Qiao et al., 2312.05482), known from its abstract alone: our reading. No source text is needed.

Inversion under no text. Then the target's text, not the null text, is what is learned at each level, so that guided
decoding follows the path (null_text.py, "TTIS"). Decoding walks three rows side by side: the picture's, held on the
path and under the learned texts; between, under texts that go from the learned to the target's, linearly over the
steps; and the edit's, under the target, which in the first `self_steps` takes the picture's self-attention maps at the
coarsest level with text, in the first `cross_steps` those of the row between for its cross-attention.

Model rows: K to invert; at each level 1 for the null text, at most inner_steps with gradient, 1 for the step; 5 K. One
picture at a time. Left out: what the paper says of schedules beyond this.
"""

from typing import Annotated, Any

import torch
from torch import Tensor

from ..attention import Attend, Site
from ..ddim import move
from ..options import Scale, Steps, Strength, Within
from ..path import HookedEps
from .guidance import cfg
from .inversions import ddim
from .lora import one_picture
from .null_text import ENOUGH, ENOUGH_MORE, RATE, optimised
from .prompt_to_prompt import Early, first


@torch.no_grad()
def baret(
    eps: HookedEps,
    x0: Tensor,
    null: Any,
    target: Tensor,
    coarsest: int,
    *,
    steps: Steps = 50,
    strength: Strength = 1.0,
    guidance_scale: Scale = 7.5,
    inner_steps: Annotated[int, Within(0, 200, "of Adam on each level's text, at most")] = 10,
    cross_steps: Early = 0.8,
    self_steps: Early = 0.5,
) -> Tensor:
    x0, guide = one_picture(x0, "BARET"), cfg(guidance_scale)
    path = ddim(eps, x0, null, null, steps=steps, strength=strength)
    K, tuned = path.top, tuned_texts(eps, path, target, guidance_scale, inner_steps)

    def exchange(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows: between and edit without text, then picture, between and edit with theirs."""
        if site.kind == "cross" and i < first(cross_steps, K):
            q, k = (torch.cat([y[:4], y[3:4]]) for y in (q, k))
        if site.kind == "self" and site.level >= coarsest and i < first(self_steps, K):
            q, k = (torch.cat([y[:4], y[2:3]]) for y in (q, k))
        return plain(site, q, k, v)

    x = path.rows(2)
    step = path.walk()
    for i, j in enumerate(path.down()):
        u = i / max(K - 1, 1)
        texts = path.texts(null, null, tuned[j], (1 - u) * tuned[j] + u * target.float(), target)
        e = eps(torch.cat([x, path[j], x]), path.t[j], [texts], tap=exchange)[0]
        x = step(x, guide(e[:2], e[3:]), j)
    return x[1:]


def tuned_texts(eps: HookedEps, path: Any, text: Tensor, scale: float, inner_steps: int) -> dict[int, Tensor]:
    """By level the text (1, 77, width), learned from the target's, under which guided decoding follows the path."""
    x, found = path.rows(1), dict[int, Tensor]()
    for i, j in enumerate(path.down()):
        e_null = eps(x, path.t[j], [path.null(j)])[0]

        def stepped(text: Tensor, x: Tensor = x, j: int = j, e_null: Tensor = e_null) -> Tensor:
            e_text = eps(x, path.t[j], [text])[0]
            return move(x, e_null + scale * (e_text - e_null), path.a[j], path.a[j - 1])

        rate = RATE * (1 - i / max(100, 2 * path.steps))
        text = optimised(text, path[j - 1], stepped, inner_steps, rate, ENOUGH + ENOUGH_MORE * i)
        found[j], x = text, stepped(text)
    return found
