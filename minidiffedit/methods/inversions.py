"""Inversions: from a picture's latent to a `Path` that an editor walks down again. Any of them feeds any editor.

All use the `shift` convention: eps at the level that a step reaches (Mokady et al., 2211.09794), see `diffedit.encode`.
"""

from typing import Annotated, Any, Literal

from torch import Tensor

from ..ddim import level_at
from ..diffedit import Eps, encode
from ..options import About, Seed, Steps, Strength, Within
from ..path import Path
from .sdedit import draws, noised

EncodeText = Annotated[Literal["null", "source"], About("text of the encoding: none, or the source")]
Refine = Annotated[int, Within(1, 100, "calls per encoding step, 2 is more exact")]


def ddim(
    eps: Eps,
    x0: Tensor,
    null: Any,
    source: Any = "",
    *,
    steps: Steps = 50,
    strength: Strength = 1.0,
    encode_text: EncodeText = "source",
    refine: Refine = 1,
    earlier: Any = None,
) -> Path:
    """DDIM inversion (Song et al., 2010.02502, section 4.3). An editor's source row walks back by itself, and drifts as
    far as the inversion errs. Model rows: at most K b refine; none for a path that is known up to a higher level.
    """
    unread = ["strength"] + ["source"] * (encode_text == "null")
    for known in earlier(*unread) if earlier else ():
        if known.top >= level_at(strength, steps):
            return known.prefix(level_at(strength, steps))
    text = source if encode_text == "source" else null
    return Path([*encode(eps, x0, text, steps=steps, strength=strength, refine=refine).values()], steps, null)


def direct(
    eps: Eps,
    x0: Tensor,
    null: Any,
    source: Any = "",
    *,
    steps: Steps = 50,
    strength: Strength = 1.0,
    encode_text: EncodeText = "source",
    refine: Refine = 1,
) -> Path:
    """PnP inversion (Ju et al., 2310.01506): the same path, an editor's source row held on it. Model rows: K b refine.

    The paper adds to the source row what it misses of the path, x*_{j-1} - move(x), which puts it there: the row is set
    to the path instead, and the pass that records the offsets is not made.
    """
    text = source if encode_text == "source" else null
    levels = encode(eps, x0, text, steps=steps, strength=strength, refine=refine)
    return Path([*levels.values()], steps, null, pinned=True)


def noise(x0: Tensor, null: Any, *, steps: Steps = 50, strength: Strength = 0.8, seed: Seed = 0) -> Path:
    """No inversion: x0 under one noise at every level, as SDEdit starts (2108.01073). No model rows."""
    start = noised(x0, next(draws(x0.shape, seed)), steps=steps, strength=strength)
    return Path([*start.values()], steps, null)
