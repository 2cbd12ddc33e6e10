"""DiffEdit on one page: find the mask, encode the picture, decode under the mask.

Couairon et al., "DiffEdit", arXiv 2210.11427. Every tensor operation of the algorithm stands here in plain loops. The
model is one callable, `eps(x_t, t, texts)`: the noise it predicts in x_t under each of several texts. DiffEdit's
primitive is that contrast, the same noisy latent under different texts. The loops never look into a text.

Notation: N = steps; level j = 0..N has timestep t[j] and a[j] = alpha_bar[t[j]]; level 0 is the clean latent.
Latents and coefficients are float32 (or float64, if x0 is) whatever the model computes in.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .ddim import Trajectory, level_at, levels, move, noises, real, whole

# eps(x_t (b, 4, h, w), t, [text, ...]) -> one prediction (b, 4, h, w) per text, in whatever dtype it computes.
Eps = Callable[[Tensor, int, Sequence[Any]], Sequence[Tensor]]
# track(iterable, stage) -> the same items; a progress bar hooks in here.
Track = Callable[[Iterable[Any], str], Iterable[Any]]

# A map whose spread is below this share of mean |eps| is rounding noise, not a difference between the texts.
KAPPA = {torch.float16: 2.5e-3, torch.bfloat16: 2e-2}  # float16 rounds to 3 bits more
KAPPA_FULL = 1e-4


def untracked(items: Iterable[Any], stage: str) -> Iterable[Any]:
    return items


def working(x0: Tensor) -> Tensor:
    """The caller's latent in the loops' dtype, a copy: float64 stays, everything else becomes float32."""
    if x0.ndim != 4 or 0 in x0.shape:
        raise ValueError(f"latents must be (b, 4, h, w), got {tuple(x0.shape)}")
    return x0.to(torch.float64 if x0.dtype == torch.float64 else torch.float32, copy=True)


# ---------------------------------------------------------------- 1. the mask


@dataclass(frozen=True, eq=False)
class Mask:
    """Where two texts disagree about b pictures.

    mask (b, 1, h, w) bool; heat (b, 1, h, w) float32 in [0, 1], after clip and rescale; maps (b, n, h, w) float32, the
    raw |differences|; coverage (share of cells in the mask) and verdict ("found", "no difference") per image;
    flat_below (b,) float32, the spread under which the verdict was "no difference"; reference (b, n, 4, h, w), the
    predictions under the reference text, so that another target costs half (None where nothing was predicted).
    """

    mask: Tensor = field(repr=False)
    heat: Tensor = field(repr=False)
    maps: Tensor = field(repr=False)
    coverage: tuple[float, ...]
    verdict: tuple[str, ...]
    flat_below: Tensor
    reference: Tensor | None = field(default=None, repr=False)


@torch.no_grad()
def find_mask(
    eps: Eps,
    x0: Tensor,
    target: Any,
    reference: Any,
    *,
    steps: int = 50,
    strength: float = 0.5,
    maps: int = 10,
    clip: float | None = 3.0,
    threshold: float = 0.5,
    seed: int | Sequence[int] = 0,
    chunk: int | None = None,
    known_reference: Tensor | None = None,
    track: Track = untracked,
) -> Mask:
    """Where the predictions under `target` and `reference` differ (2210.11427, section 3.2, step 1).

    x0 (b, 4, h, w); target, reference: texts. Map i of an image is mean over channels |eps(x_t, t, target) -
    eps(x_t, t, reference)| at the level nearest `strength`, with x_t the same for both texts and a noise of its own. No
    guidance: it would multiply the maps by a constant, which the rescaling removes. The maps are averaged and
    thresholded by `threshold_maps`.

    Image i draws its noises from seed + i, or from seed[i]. chunk: maps per model call for a single image (default: by
    latent size); several images go map by map. Neither changes the result beyond the model's own rounding. The same
    object as target and reference is answered "no difference" without a call. known_reference: `Mask.reference` of a
    run with the same x0, seed, steps, strength, maps and reference text: only the target is evaluated.
    Model rows: 2 n b, or n b with known_reference. Raises ValueError for values out of range, ArithmeticError when the
    model returns NaN or infinity.
    """
    x0 = working(x0)
    b, c, h, w = x0.shape
    maps = whole("maps", maps, 1, 1000)
    chunk = default_chunk(h, w) if chunk is None else whole("chunk", chunk, 1, 1000)
    seeds = list(seed) if isinstance(seed, Sequence) else [whole("seed", seed, 0, 2**63 - b) + i for i in range(b)]
    if len(seeds) != b:
        raise ValueError(f"{len(seeds)} seeds for {b} images")
    if known_reference is not None and known_reference.shape != (b, maps, c, h, w):
        raise ValueError(f"known_reference must be {(b, maps, c, h, w)}, got {tuple(known_reference.shape)}")
    t, a = levels(steps)
    j = level_at(strength, steps, lowest=1)
    if target is reference:
        nothing = torch.zeros(b, maps, h, w, device=x0.device)
        return threshold_maps(nothing, torch.zeros(b, device=x0.device), clip=clip, threshold=threshold)

    noise = torch.stack([noises((c, h, w), maps, one) for one in seeds]).to(x0)  # (b, n, c, h, w)
    stride, kappa = chunk if b == 1 else 1, KAPPA_FULL
    differences, magnitudes, kept = [], [], []
    for start in track(range(0, maps, stride), "mask"):
        some = slice(start, start + stride)
        x_t = (math.sqrt(a[j]) * x0[:, None] + math.sqrt(1 - a[j]) * noise[:, some]).flatten(0, 1)
        if known_reference is None:
            e_target, e_reference = eps(x_t, t[j], [target, reference])  # one x_t for both texts
        else:
            e_target, e_reference = eps(x_t, t[j], [target])[0], known_reference[:, some].flatten(0, 1)
        kappa = KAPPA.get(e_target.dtype, KAPPA_FULL)
        kept.append(e_reference.unflatten(0, (b, -1)))
        e_target, e_reference = e_target.to(x0), e_reference.to(x0)
        differences.append((e_target - e_reference).abs().mean(dim=1).unflatten(0, (b, -1)))
        sizes = [(one.abs().mean() + two.abs().mean()) / 2 for one, two in zip(e_target, e_reference)]
        magnitudes.append(torch.stack(sizes).unflatten(0, (b, -1)))

    raw = finite(torch.cat(differences, dim=1).float(), "the mask's maps")
    flat_below = kappa * torch.cat(magnitudes, dim=1).float().mean(dim=1)
    found = threshold_maps(raw, flat_below, clip=clip, threshold=threshold)
    return replace(found, reference=torch.cat(kept, dim=1))


def threshold_maps(maps: Tensor, flat_below: Tensor, *, clip: float | None = 3.0, threshold: float = 0.5) -> Mask:
    """Raw maps (b, n, h, w) float32 -> Mask, each image by its own statistics alone; no model call.

    m = mean of the maps, clipped at clip * mean(m) (the paper's "removing extreme values"; clip=None: off), rescaled to
    [0, 1] by its min and max; mask = m > threshold. Where some cell reaches the clip, the mask holds at most
    1 / (clip * threshold) of the cells: 2/3 at the defaults. A spread of m, after the clip, not above flat_below (b,)
    means "no difference": heat and mask are zero.
    """
    clip, threshold = check_threshold(clip, threshold)
    maps, flat_below = finite(maps.float(), "the raw maps"), finite(flat_below.float(), "flat_below")
    if maps.ndim != 4 or 0 in maps.shape or flat_below.shape != maps.shape[:1]:
        raise ValueError(f"maps must be (b, n, h, w), flat_below (b,), got {(*maps.shape,)} and {(*flat_below.shape,)}")
    heats, verdicts = [], []
    for image_maps, least in zip(maps, flat_below):  # one by one: no image's statistics touch another's
        m = image_maps.mean(dim=0)
        if clip is not None:
            m = m.clamp(max=clip * m.mean())
        low, high = m.min(), m.max()
        flat = bool(high - low <= least)
        heats.append(torch.zeros_like(m) if flat else (m - low) / (high - low))
        verdicts.append("no difference" if flat else "found")
    heat = torch.stack(heats)[:, None]
    mask = heat > threshold
    coverage = tuple(mask.float().mean(dim=(1, 2, 3)).tolist())
    for i, (share, verdict) in enumerate(zip(coverage, verdicts)):
        if verdict == "found" and share > 0.9:
            warnings.warn(f"the mask of image {i} covers {share:.0%} of it", stacklevel=2)
        if mask[i].sum() == 1:
            warnings.warn(f"the mask of image {i} is a single latent cell", stacklevel=2)
    return Mask(mask, heat, maps, coverage, tuple(verdicts), flat_below)


def default_chunk(h: int, w: int) -> int:
    """Maps per model call: of 64 x 64 cells one, the shape of a guided step; by size only, never by free memory."""
    return max(1, 64 * 64 // (h * w))


# ---------------------------------------------------------------- 2. the encoding


@torch.no_grad()
def encode(
    eps: Eps,
    x0: Tensor,
    text: Any,
    *,
    steps: int = 50,
    strength: float = 0.8,
    refine: int = 1,
    record: list[Tensor] | None = None,
    track: Track = untracked,
) -> Trajectory:
    """DDIM inversion of x0 (b, 4, h, w) up to level K = round(strength * N) (2210.11427, step 2; 2010.02502, 4.3).

    x_{j+1} = move(x_j, eps(x_j, t_{j+1}, text), a_j, a_{j+1}): the model is asked at the timestep it moves *to* (the
    prompt-to-prompt convention), which brings decoding closer to its inverse than t_j at the same cost.
    refine = k evaluates eps up to k times a step, after the first at the new x_{j+1}, as long as that contracts.
    Returns the levels 0..K; record: a list, emptied, that receives them as they come. Model rows: at most K b refine.
    Raises ValueError for values out of range, ArithmeticError when the model returns NaN or infinity.
    """
    x = working(x0)
    t, a = levels(steps)
    refine = whole("refine", refine, 1, 100)
    (latents := [] if record is None else record).clear()
    for j in track(range(level_at(strength, steps)), "encode"):
        latents.append(x)
        x_next, residual = x, torch.full_like(x[:, :1, :1, :1], math.inf)
        for left in reversed(range(refine)):
            e = eps(x_next, t[j + 1], [text])[0].to(x)
            predicted_x0 = (x - math.sqrt(1 - a[j]) * e) / math.sqrt(a[j])
            candidate = math.sqrt(a[j + 1]) * predicted_x0 + math.sqrt(1 - a[j + 1]) * e
            change = (candidate - x_next).abs().amax(dim=(1, 2, 3), keepdim=True)
            closer = ~(change >= residual)  # per image: where passes diverge the last good one stays; NaN goes on
            x_next, residual = torch.where(closer, candidate, x_next), torch.where(closer, change, residual)
            if left and not closer.any():  # asked only where it decides: the answer waits for the device
                break
        x = x_next
    latents.append(finite(x, "the encoding"))
    return Trajectory(latents, steps)


# ---------------------------------------------------------------- 3. the decoding under the mask


def mask_at(M: Tensor, j: int, K: int, grey: str = "level") -> Tensor:
    """M_j, what the blend y_j <- M_j y_j + (1 - M_j) x_j takes for M where the decoding starts from level K.

    "level" (differential diffusion, 2306.00950): a cell of value v joins where noise is v of level K's, below level
    1 + v (K - 1), as t_j = 1 + s (j - 1); between two levels it takes part of a step, M_j = clamp(min(1, v K) +
    v (K - 1) - j, 0, 1), the minimum so that haze does little. "blend": M_j = v at every level, so that grey does less
    the more steps there are. 0 and 1 stay 0 and 1. Raises ValueError for another word.
    """
    if grey not in ("level", "blend"):
        raise ValueError(f"grey must be level or blend, got {grey!r}")
    return M if grey == "blend" else ((M * K).clamp(max=1) + M * (K - 1) - j).clamp(0, 1)


@torch.no_grad()
def masked_decode(
    eps: Eps,
    trajectory: Trajectory,
    mask: Tensor,
    target: Any,
    null: Any,
    *,
    guidance_scale: float = 7.5,
    grey: str = "level",
    record: list[Tensor] | None = None,
    track: Track = untracked,
) -> Tensor:
    """Guided DDIM from the trajectory's top level, the outside held on the trajectory (2210.11427, step 3).

    mask (b or 1, 1, h, w), bool or float in [0, 1], 1 = edited; what lies between is never binarised (`mask_at`). After
    each step y_{j-1} is blended with x_{j-1}, the encoded latent of the level just reached; at the end with x_0 itself.
    guidance_scale = 1 needs no null prediction (2207.12598); an empty mask or K = 0 needs none at all.
    Returns y_0 (b, 4, h, w). Model rows: 2 K b, or K b at guidance 1. record: a list that receives y_K, ..., y_0, or
    nothing where no step was made. Raises ValueError for a mask that does not fit, ArithmeticError for NaN or infinity.
    """
    K = max(trajectory)
    y = working(trajectory[K])
    t, a = levels(trajectory.steps)
    M = checked_mask(mask, y)
    g = real("guidance_scale", guidance_scale, -1000, 1000)
    if K == 0 or not M.any():
        return working(trajectory[0])
    if record is not None:
        record.append(y)
    for j in track(range(K, 0, -1), "decode"):
        if g == 1:
            e = eps(y, t[j], [target])[0].to(y)
        else:
            e_null, e_text = (e.to(y) for e in eps(y, t[j], [null, target]))
            e = e_null + g * (e_text - e_null)
        predicted_x0 = (y - math.sqrt(1 - a[j]) * e) / math.sqrt(a[j])
        y = math.sqrt(a[j - 1]) * predicted_x0 + math.sqrt(1 - a[j - 1]) * e
        m = mask_at(M, j - 1, K, grey)
        y = m * y + (1 - m) * trajectory[j - 1]
        if record is not None:
            record.append(y)
    return finite(y, "the decoding")


@torch.no_grad()
def sample(
    eps: Eps,
    x_T: Tensor,
    target: Any,
    null: Any,
    *,
    steps: int = 50,
    guidance_scale: float = 7.5,
    track: Track = untracked,
) -> Tensor:
    """Plain guided DDIM (eta = 0) from x_T (b, 4, h, w) at the top level N to the clean latent; rows as above."""
    y, g = working(x_T), real("guidance_scale", guidance_scale, -1000, 1000)
    t, a = levels(steps)
    for j in track(range(steps, 0, -1), "generate"):
        if g == 1:
            e = eps(y, t[j], [target])[0].to(y)
        else:
            e_null, e_text = (e.to(y) for e in eps(y, t[j], [null, target]))
            e = e_null + g * (e_text - e_null)
        y = move(y, e, a[j], a[j - 1])
    return finite(y, "the sampling")


# ---------------------------------------------------------------- the doors


def check_threshold(clip: float | None, threshold: float) -> tuple[float | None, float]:
    return None if clip is None else real("mask_clip", clip, 1, 1e9), real("mask_threshold", threshold, 0, 1)


def checked_mask(mask: Tensor, x: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise ValueError(f"the mask must be a tensor (of a Mask, its .mask), got {type(mask).__name__}")
    if mask.ndim != 4 or mask.shape[0] not in (1, len(x)) or mask.shape[1] != 1 or mask.shape[2:] != x.shape[2:]:
        raise ValueError(f"the mask must be (b or 1, 1, h, w) for latents {tuple(x.shape)}, got {tuple(mask.shape)}")
    M = mask.to(x)
    if not bool(((M >= 0) & (M <= 1)).all()):
        raise ValueError("the mask's values must lie in [0, 1]")
    return M


def finite(x: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(x).all()):
        raise ArithmeticError(f"{what}: the model returned NaN or infinity; try dtype float32")
    return x
