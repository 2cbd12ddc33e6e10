"""Plug-and-play (Tumanyan et al., 2211.12572): the layout comes from the source's features, the looks from the text.

Section 4, algorithm 1: while the source walks down its own path, the target takes two things of it: in the first
`feature_steps` the convolution branch of one ResBlock of the decoder (output_block 4, before its residual), in the
first `attention_steps` the queries and keys of the self-attentions from that block on (output_blocks 4 to 11). Values
stay the target's. Model rows: 3 K b: the source, unguided, and the target without and with its text.

The authors invert under no text, as here where no source text is given, and in 999 steps (here: `steps`). Their
negative prompting: the unguided text is a null + (1 - a) negative, where a begins as `negative_alpha` and stays
(constant), falls to 0 (linear), or falls as exp(-6 u), u the share of the steps that is done (exp).
"""

import math
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..attention import Attend, Site
from ..options import About, Scale, Within
from ..path import HookedEps, Path
from .guidance import Guidance, Norm, Quantile, guide_of
from .prompt_to_prompt import Early, first

NONE = "negative_prompt", ""  # with which nothing depends on how it comes in
Schedule = Annotated[Literal["constant", "linear", "exp"], About("how null gives way to negative", NONE)]


@torch.no_grad()
def plug_and_play(
    eps: HookedEps,
    path: Path,
    coarsest: int,
    target: Any,
    source: Any = "",
    negative: Any = "",
    null: Any = None,
    *,
    feature_steps: Early = 0.8,
    attention_steps: Early = 0.5,
    negative_alpha: Annotated[float, Within(0, 1, "share of the null text beside it at first", NONE)] = 0.0,
    negative_schedule: Schedule = "constant",
    guidance_scale: Scale = 7.5,
    guidance: Guidance = "cfg",
    quantile: Quantile = 0.4,
    norm: Norm = "l0",
) -> Tensor:
    """Rows of a call: source, target unguided, target. coarsest: the decoder's coarsest level with text (SD v1: 2)."""
    b, K, x = len(path[0]), path.top, path.rows(2)
    guide = guide_of(guidance, guidance_scale, quantile, norm)

    def layout(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site.kind == "self" and site.place == "up" and (site.level < coarsest or site.index > 0):
            q, k = (torch.cat([y[:b]] * 3) for y in (q, k))
        return plain(site, q, k, v)

    def structure(site: Site, h: Tensor) -> Tensor:
        return torch.cat([h[:b]] * 3) if site == Site("up", coarsest, 1, "conv") else h

    step = path.walk()
    for i, j in enumerate(path.down()):
        x, unguided = path.pin(x, j), path.null(j)
        if negative is not null:  # one was given
            a = negative_alpha * share_of_null(negative_schedule, i / max(K - 1, 1))
            unguided = a * unguided + (1 - a) * negative
        tap = layout if i < first(attention_steps, K) else None
        feature = structure if i < first(feature_steps, K) else None
        texts = path.texts(source, unguided, target)
        e = eps(torch.cat([x, x[b:]]), path.t[j], [texts], tap=tap, feature=feature)[0]
        e_source, e_null, e_text = e.split(b)
        x = step(x, torch.cat([e_source, guide(e_null, e_text)]), j)
    return x[b:]


def share_of_null(schedule: str, done: float) -> float:
    """By the share of the steps that is done, 0..1."""
    return {"constant": 1.0, "linear": 1.0 - done, "exp": math.exp(-6 * done)}[schedule]
