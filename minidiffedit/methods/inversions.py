"""Inversions: from a picture's latent to a `Path` that an editor walks down again. Any of them feeds any editor.

All but `ddim_paper` ask for eps at the level that a step reaches (Mokady et al., 2211.09794), see `diffedit.encode`.
"""

from typing import Annotated, Any, Literal

from torch import Tensor

from ..ddim import level_at, levels, move
from ..diffedit import Eps, encode, working
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


def negative_prompt(
    eps: Eps, x0: Tensor, source: Any, *, steps: Steps = 50, strength: Strength = 1.0, refine: Refine = 1
) -> Path:
    """Negative-prompt inversion (Miyake et al., 2305.16807): the source text takes the null text's place at all levels,
    and guidance leads away from it. Under the source text guidance then changes nothing, at any scale. Model rows: at
    most K b refine. Left out: null texts between the source's and none.
    """
    return Path([*encode(eps, x0, source, steps=steps, strength=strength, refine=refine).values()], steps, source)


def ddim_paper(
    eps: Eps,
    x0: Tensor,
    null: Any,
    source: Any = "",
    *,
    steps: Steps = 50,
    strength: Strength = 1.0,
    encode_text: EncodeText = "source",
) -> Path:
    """`ddim` with eps at the level that a step leaves, as the papers write it (2010.02502, section 4.3):
    x_{j+1} = move(x_j, eps(x_j, t_j), a_j, a_{j+1}), x_0 at t = 0. Errs more at the same cost. Model rows: K b.
    """
    (t, a), text, x = levels(steps), source if encode_text == "source" else null, [working(x0)]
    for j in range(level_at(strength, steps)):
        x.append(move(x[j], eps(x[j], t[j], [text])[0], a[j], a[j + 1]))
    return Path(x, steps, null)


def aidi(
    eps: Eps,
    x0: Tensor,
    null: Any,
    source: Any = "",
    *,
    steps: Steps = 50,
    strength: Strength = 1.0,
    encode_text: EncodeText = "source",
    iterations: Annotated[int, Within(1, 100, "calls for each level, 1: as DDIM")] = 5,
) -> Path:
    """AIDI (Pan et al., 2309.04907), our reading of its abstract: each level is the fixed point of its DDIM step, found
    by Anderson's acceleration over two values, where `refine` of `ddim` only goes on. Model rows: K b iterations. Left
    out: its guidance blended from two scales.
    """
    (t, a), text, x = levels(steps), source if encode_text == "source" else null, [working(x0)]
    for j in range(level_at(strength, steps)):
        found, before = x[j], list[tuple[Tensor, Tensor]]()
        for _ in range(iterations):
            reached = move(x[j], eps(found, t[j + 1], [text])[0], a[j], a[j + 1])
            missed, found_before = reached - found, [*before]
            before, found = [(reached, missed)], reached
            for reached_before, missed_before in found_before:
                change = missed - missed_before
                size = change.square().sum((1, 2, 3), keepdim=True).clamp(min=1e-30)
                share = (missed * change).sum((1, 2, 3), keepdim=True) / size
                found = reached - share * (reached - reached_before)
        x.append(found)
    return Path(x, steps, null)


def noise(x0: Tensor, null: Any, *, steps: Steps = 50, strength: Strength = 0.8, seed: Seed = 0) -> Path:
    """No inversion: x0 under one noise at every level, as SDEdit starts (2108.01073). No model rows."""
    start = noised(x0, next(draws(x0.shape, seed)), steps=steps, strength=strength)
    return Path([*start.values()], steps, null)
