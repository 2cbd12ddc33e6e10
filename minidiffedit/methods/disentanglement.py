"""Disentanglement (Wu et al., 2212.08698), with a fixed schedule: the source's text first, the target's later.

Section 3.1: at each step the text is l_t source + (1 - l_t) target. The paper learns the l_t of all steps, by losses of
CLIP's and VGG's networks for pictures, which no SD v1 file holds; the learned ones begin near 1 and fall, and its
authors begin them as here: 1 for the first steps, then `late`. The picture's own noises are added again (section 3.3),
as edit-friendly inversion finds them. Model rows: 2 K b, and the inversion's. Left out: learning l_t.
"""

from typing import Annotated

import torch
from torch import Tensor

from ..diffedit import Eps
from ..options import Scale, Within
from ..path import Path
from .guidance import Guidance, Norm, Quantile, guide_of
from .prompt_to_prompt import Early, first


@torch.no_grad()
def disentanglement(
    eps: Eps,
    path: Path,
    target: Tensor,
    source: Tensor,
    *,
    source_steps: Early = 0.3,
    late: Annotated[float, Within(-10, 10, "share of the source's text in all later steps")] = 0.0,
    guidance_scale: Scale = 7.5,
    guidance: Guidance = "cfg",
    quantile: Quantile = 0.4,
    norm: Norm = "l0",
) -> Tensor:
    """source, target (1 or b, 77, width). late = 0 and source_steps = 0 is the plain walk under the target."""
    x, guide = path.rows(1), guide_of(guidance, guidance_scale, quantile, norm)
    early, mixed = first(source_steps, path.top), target if late == 0 else late * source + (1 - late) * target
    step = path.walk()
    for i, j in enumerate(path.down()):
        e_null, e_text = eps(x, path.t[j], [path.null(j), source if i < early else mixed])
        x = step(x, guide(e_null, e_text), j)
    return x
