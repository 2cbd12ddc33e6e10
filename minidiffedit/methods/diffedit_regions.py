"""Several edits of one picture in one call: each where its own texts differ, on one encoding, decoded together.

Ours; DiffEdit (2210.11427) has one mask. Each pair of texts has the mask that `contrast` would find; a cell that two
claim goes to the earlier pair. Every cell is guided to the target of the mask that holds it. Model rows of k edits with
s different sources: (k + s) n b for the masks, K b for the encoding, (k + 1) K b for the decoding.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..ddim import Trajectory, levels, move
from ..diffedit import Eps, Mask, checked_mask, find_mask, finite, threshold_maps, working
from ..options import Scale, Seed, Steps
from ..path import Path
from .diffedit import Chunk, Clip, MapLevel, Maps, OfTheMask, Threshold


@dataclass(frozen=True, eq=False)
class Regions:
    """each: k disjoint masks (1, 1, h, w) float32; mask: their sum; found: the masks as computed; verdict: how many."""

    mask: Tensor = field(repr=False)
    each: tuple[Tensor, ...] = field(repr=False)
    found: tuple[Mask, ...] = field(repr=False)
    verdict: tuple[str]


def contrasts(
    raw_eps: Eps,
    x0: Tensor,
    edits: Sequence[tuple[Any, Any]],
    *,
    steps: Steps = 50,
    mask_strength: MapLevel = 0.5,
    maps: Maps = 10,
    mask_clip: Clip = 3.0,
    mask_threshold: Threshold = 0.5,
    seed: Seed = 0,
    chunk: Chunk = None,
    earlier: Any = None,
) -> Regions:
    """Each pair's mask (source, target), those of one source sharing its predictions; then each cell to the first.
    Known maps are cut again for 0 rows.
    """
    cut: dict[str, Any] = {"clip": mask_clip, "threshold": mask_threshold}
    options: dict[str, Any] = {"steps": steps, "strength": mask_strength, "maps": maps, "seed": seed, "chunk": chunk}
    known: dict[int, Tensor | None] = {}
    before = next(earlier(*OfTheMask), None) if earlier else None
    found = [threshold_maps(one.maps, one.flat_below, **cut) for one in before.found] if before else []
    for source, target in [] if before else edits:
        mask = find_mask(raw_eps, x0, target, source, known_reference=known.get(id(source)), **options, **cut)
        found.append(mask)
        if mask.reference is not None:
            known[id(source)] = mask.reference
    each = disjoint([one.mask for one in found])
    for number, (one, own) in enumerate(zip(found, each), 1):
        lost, of = int((one.mask.float() > own).sum()), int(one.mask.sum())
        if lost == of:
            warnings.warn(f"edit {number} has no cell left to edit", stacklevel=2)
        elif lost:
            warnings.warn(f"edit {number} leaves {lost} of its {of} cells to earlier edits", stacklevel=2)
    count = sum(bool(mask.any()) for mask in each)
    return Regions(torch.stack(each).sum(dim=0), tuple(each), tuple(found), (f"{count} found",))


def disjoint(masks: Sequence[Tensor]) -> list[Tensor]:
    """Masks (1, 1, h, w) in [0, 1] -> each without what the earlier ones hold, so that they sum to at most 1."""
    free, own = torch.ones_like(masks[0].float()), []
    for mask in masks:
        own.append(torch.minimum(mask.float(), free))
        free = free - own[-1]
    return own


def decode_edits(
    eps: Eps,
    mask: Tensor,
    found: Regions,
    path: Path,
    edits: Sequence[tuple[Any, Any]],
    null: Any,
    negative: Any = "",
    *,
    guidance_scale: Scale = 7.5,
) -> Tensor:
    """`regional_decode` of the pairs that have a cell; mask: the sum of theirs, which the runner looks at."""
    masks, targets = zip(*((own, target) for own, (_, target) in zip(found.each, edits) if own.any()))
    own_null = path.any_null if negative is null else negative
    walk: dict[str, Any] = {"step": path.walk(), "nulls": path.nulls if negative is null else {}}
    return regional_decode(eps, path, masks, targets, own_null, guidance_scale=guidance_scale, **walk)


@torch.no_grad()
def regional_decode(
    eps: Eps,
    trajectory: Trajectory,
    masks: Sequence[Tensor],
    targets: Sequence[Any],
    null: Any,
    *,
    guidance_scale: float = 7.5,
    step: Any = None,
    nulls: Mapping[int, Any] | None = None,
) -> Tensor:
    """`masked_decode` for k edits: each cell is guided to the target of the mask that holds it.

    masks: k of (b or 1, 1, h, w) in [0, 1] whose sum is nowhere above 1; where soft ones share a cell, so do their
    targets. One mask gives what `masked_decode` gives, bit for bit. Returns y_0 (b, 4, h, w). Model rows: (k + 1) K b,
    or k K b at guidance 1. step, nulls: a path's own, where it has them. Errors as there, and ValueError for masks that
    overlap.
    """
    K, y = max(trajectory), working(trajectory[max(trajectory)])
    t, a = levels(trajectory.steps)
    if not masks or len(masks) != len(targets):
        raise ValueError(f"each mask needs its target, got {len(masks)} masks and {len(targets)} targets")
    each = [checked_mask(mask, y) for mask in masks]
    M = torch.stack(torch.broadcast_tensors(*each)).sum(dim=0)
    if bool((M > 1 + 1e-6).any()):
        raise ValueError("the masks overlap; `disjoint` gives each cell to the first")
    M = M.clamp(max=1)  # soft ones may sum to a rounding more
    if K == 0 or not M.any():
        return working(trajectory[0])
    shares = [torch.where(M > 0, mask / M, 0) for mask in each]
    for j in range(K, 0, -1):
        if guidance_scale == 1:
            predictions = [e.to(y) for e in eps(y, t[j], targets)]
            e = sum((share * one for share, one in zip(shares, predictions)), torch.zeros_like(y))
        else:
            unguided = (nulls or {}).get(j, null)
            e_null, *predictions = (e.to(y) for e in eps(y, t[j], [unguided, *targets]))
            towards = sum((share * (one - e_null) for share, one in zip(shares, predictions)), torch.zeros_like(y))
            e = e_null + guidance_scale * towards
        down = step(y, e, j) if step else move(y, e, a[j], a[j - 1])
        y = M * down + (1 - M) * trajectory[j - 1]
    return finite(y, "the decoding")
