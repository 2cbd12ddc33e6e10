"""DiffEdit (Couairon et al., 2210.11427): the picture changes only where two texts disagree about it.

The page `diffedit.py`, cut into what can be exchanged and reused: the mask (step 1) and the decoding (step 3) stand
here; the encoding (step 2) is `inversions.ddim` under the null text. The arms of the paper's ablation (section 4) are
the same functions in other company. Cost at the defaults, in model rows: 20 for the mask, 40 for the encoding, 80 for
the decoding; a further text of the same picture 10 + 0 + 80, another threshold 0 + 0 + 80.
"""

from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ..diffedit import Eps, Mask, find_mask, masked_decode, threshold_maps
from ..options import About, Grey, Sampler, Scale, Seed, Steps, Within
from ..path import Path
from .sde_diffedit import decode as by_steps

MapLevel = Annotated[float, Within(0, 1, "noise at which texts differ, 0..1")]
Maps = Annotated[int, Within(1, 1000, "maps that are averaged")]
Clip = Annotated[float | None, Within(1, 1e9, "cut values at this times the mean, or none; less gives larger masks")]
Threshold = Annotated[float, Within(0, 1, "0..1; less gives larger masks")]
Fences = Annotated[float, Within(0, 1e9, "cut values beyond the third quartile by this many interquartile ranges")]
Chunk = Annotated[int | None, Within(1, 1000, "maps per model call; fewer need less memory")]
OfTheMask = ("mask_clip", "mask_threshold")  # they cut the maps, and change no map


def contrast(
    raw_eps: Eps,
    x0: Tensor,
    target: Any,
    source: Any = "",
    *,
    steps: Steps = 50,
    mask_strength: MapLevel = 0.5,
    maps: Maps = 10,
    mask_clip: Clip = 3.0,
    mask_threshold: Threshold = 0.5,
    seed: Seed = 0,
    chunk: Chunk = None,
    earlier: Any = None,
) -> Mask:
    """Where the predictions under target and source differ: `diffedit.find_mask`. Model rows: 2 n b.

    raw_eps: predictions in the model's own dtype, whose rounding decides what counts as no difference. Known maps are
    cut again for 0 rows; under another target half the predictions are known, which costs n b and rounds otherwise.
    """
    cut: dict[str, Any] = {"clip": mask_clip, "threshold": mask_threshold}
    for known in earlier(*OfTheMask) if earlier else ():
        found = threshold_maps(known.maps, known.flat_below, **cut)
        return Mask(**vars(found) | {"reference": known.reference})
    levels_and_noise: dict[str, Any] = {"steps": steps, "strength": mask_strength, "maps": maps, "seed": seed}
    reference = None
    for known in earlier(*OfTheMask, "target", "chunk", exact=False) if earlier else ():
        reference = known.reference if reference is None else reference
    return find_mask(raw_eps, x0, target, source, chunk=chunk, known_reference=reference, **levels_and_noise, **cut)


def quartiles(
    raw_eps: Eps,
    x0: Tensor,
    target: Any,
    source: Any = "",
    *,
    steps: Steps = 50,
    mask_strength: MapLevel = 0.5,
    maps: Maps = 10,
    mask_fence: Fences = 1.5,
    mask_threshold: Threshold = 0.5,
    seed: Seed = 0,
    chunk: Chunk = None,
    earlier: Any = None,
) -> Mask:
    """`contrast` whose extremes are cut by the rule of Watch Your Steps (2308.08947), see `fenced`. With maps = 1 and
    mask_strength = .8 it is their relevance map on plain weights. Model rows: 2 n b, none for another threshold.
    """
    for known in earlier("mask_threshold") if earlier else ():
        return threshold_maps(known.maps, known.flat_below, clip=None, threshold=mask_threshold)
    levels_and_noise: dict[str, Any] = {"steps": steps, "strength": mask_strength, "maps": maps, "seed": seed}
    found = find_mask(raw_eps, x0, target, source, chunk=chunk, **levels_and_noise)
    return fenced(found.maps, found.flat_below, mask_fence, mask_threshold)


def fenced(maps: Tensor, flat_below: Tensor, fence: float, threshold: float) -> Mask:
    """maps (b, n, h, w) -> the mask of their mean, cut at its third quartile + fence interquartile ranges, each picture
    by its own; `maps` of it is that mean.
    """
    mean = maps.float().mean(dim=1, keepdim=True)
    low, high = torch.quantile(mean.flatten(1), torch.tensor([0.25, 0.75]).to(mean), dim=1)[..., None, None, None]
    clipped = torch.minimum(mean, high + fence * (high - low))
    return threshold_maps(clipped, flat_below, clip=None, threshold=threshold)


def decode(
    eps: Eps,
    mask: Tensor,
    path: Path,
    null: Any,
    target: Any,
    negative: Any = "",
    *,
    guidance_scale: Scale = 7.5,
    grey: Grey = "level",
    sampler: Sampler = "ddim",
) -> Tensor:
    """Guided decoding, what lies outside the mask held on the path: `diffedit.masked_decode`. Model rows: 2 K b.

    A path with noises or null texts of its own is walked by them (`sde_diffedit.decode`), and so is one by another
    sampler. negative: in the null text's place, if it is another.
    """
    path = path.by(sampler)
    if negative is not null:
        path = path.of([*path.values()], null=negative, nulls={})
    if path.noises or path.nulls or path.sampler != "ddim":
        return by_steps(eps, mask, path, target, guidance_scale=guidance_scale, grey=grey)
    return masked_decode(eps, path, mask, target, path.any_null, guidance_scale=guidance_scale, grey=grey)


def decode_all(
    eps: Eps,
    path: Path,
    null: Any,
    target: Any,
    negative: Any = "",
    *,
    guidance_scale: Scale = 7.5,
    sampler: Sampler = "ddim",
) -> Tensor:
    """The same without a mask (the ablation's "encode" and, from noise, SDEdit). Model rows: 2 K b."""
    everywhere = torch.ones_like(path[0][:, :1])
    return decode(eps, everywhere, path, null, target, negative, guidance_scale=guidance_scale, sampler=sampler)


def reconstruct(
    eps: Eps,
    path: Path,
    null: Any,
    source: Any = "",
    *,
    encode_text: Annotated[Literal["null", "source"], About("text of encoding and decoding")] = "null",
) -> Tensor:
    """Decoding under the encoding's own text, unguided: what the inversion loses. Model rows: K b."""
    everywhere, text = torch.ones_like(path[0][:, :1]), source if encode_text == "source" else null
    return decode(eps, everywhere, path, null, text, null, guidance_scale=1.0)
