"""Several edits of one picture in one call: each where its own texts differ, on one encoding, decoded together."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from .files import images
from .ddim import Trajectory, level_at, levels, move, real
from .diffedit import Eps, Mask, Track, checked_mask, encode, finite, untracked, working
from .editor import Picture, Run, check_settings, drop, open_picture

if TYPE_CHECKING:
    from .sd import StableDiffusion


@torch.no_grad()
def regional_decode(
    eps: Eps,
    trajectory: Trajectory,
    masks: Sequence[Tensor],
    targets: Sequence[Any],
    null: Any,
    *,
    guidance_scale: float = 7.5,
    track: Track = untracked,
) -> Tensor:
    """`masked_decode` for k edits: each cell is guided to the target of the mask that holds it.

    masks: k of (b or 1, 1, h, w) in [0, 1] whose sum is nowhere above 1; where soft ones share a cell, so do their
    targets. One mask gives what `masked_decode` gives, bit for bit. Returns y_0 (b, 4, h, w). Model rows: (k + 1) K b,
    or k K b at guidance 1. Errors as there, and ValueError for masks that overlap. Ours: the paper has one mask.
    """
    K = max(trajectory)
    y = working(trajectory[K])
    t, a = levels(trajectory.steps)
    if not masks or len(masks) != len(targets):
        raise ValueError(f"each mask needs its target, got {len(masks)} masks and {len(targets)} targets")
    each = [checked_mask(mask, y) for mask in masks]
    M = torch.stack(torch.broadcast_tensors(*each)).sum(dim=0)
    if bool((M > 1 + 1e-6).any()):
        raise ValueError("the masks overlap; `disjoint` gives each cell to the first")
    M = M.clamp(max=1)  # soft ones may sum to a rounding more
    g = real("guidance_scale", guidance_scale, -1000, 1000)
    if K == 0 or not M.any():
        return working(trajectory[0])
    shares = [torch.where(M > 0, mask / M, 0) for mask in each]
    for j in track(range(K, 0, -1), "decode"):
        if g == 1:
            predictions = [e.to(y) for e in eps(y, t[j], targets)]
            e = sum((share * one for share, one in zip(shares, predictions)), torch.zeros_like(y))
        else:
            e_null, *predictions = (e.to(y) for e in eps(y, t[j], [null, *targets]))
            towards = sum((share * (one - e_null) for share, one in zip(shares, predictions)), torch.zeros_like(y))
            e = e_null + g * towards
        y = M * move(y, e, a[j], a[j - 1]) + (1 - M) * trajectory[j - 1]
    return finite(y, "the decoding")


def disjoint(masks: Sequence[Tensor]) -> list[Tensor]:
    """Masks (1, 1, h, w) in [0, 1] -> each without what the earlier ones hold, so that they sum to at most 1."""
    free, own = torch.ones_like(masks[0].float()), []
    for mask in masks:
        own.append(torch.minimum(mask.float(), free))
        free = free - own[-1]
    return own


@dataclass(frozen=True, eq=False)
class Regions:
    """What several edits made. found: the masks as computed, latent_masks: as used, (1, 1, h, w) float32, one per edit,
    disjoint; mask: PIL L, all of them; evaluations, seconds by stage; settings: every argument that decided the result,
    `edits` among them. The rest as in `Edit`.
    """

    source: Image.Image
    image: Image.Image
    mask: Image.Image
    latent: Tensor = field(repr=False)
    latent_masks: tuple[Tensor, ...] = field(repr=False)
    found: tuple[Mask, ...] = field(repr=False)
    trajectory: Trajectory = field(repr=False)
    seed: int
    evaluations: dict[str, int]
    seconds: dict[str, float]
    settings: dict[str, Any]

    @property
    def coverage(self) -> tuple[float, ...]:
        return tuple(float((mask > 0).float().mean()) for mask in self.latent_masks)


@torch.no_grad()
def edit_regions(
    sd: "StableDiffusion",
    image: Picture,
    edits: Sequence[Sequence[str]],
    *,
    negative_prompt: str = "",
    steps: int = 50,
    strength: float = 0.8,
    guidance_scale: float = 7.5,
    mask_strength: float = 0.5,
    maps: int = 10,
    mask_clip: float | None = 3.0,
    mask_threshold: float = 0.5,
    refine: int = 1,
    paste: bool = True,
    seed: int | None = None,
    size: int | None = None,
    chunk: int | None = None,
    track: Track | None = None,
) -> Regions:
    """Edit a picture several times at once. edits: (source, target) pairs, the other arguments as in `edit`.

    Every pair's mask is its own; a cell that two claim goes to the earlier pair, and a warning says so. Pairs that find
    nothing drop out; if all do, the source comes back. One encoding, under the empty text, serves all. Model rows of k
    edits with s different sources: (k + s) n for the masks, K for the encoding, (k + 1) K for the decoding.
    Raises as `edit` does.
    """
    options = drop(locals(), "sd", "image", "edits", "track")
    pairs, options = check_edits(edits), check_settings(options)
    picture, at = open_picture(sd, image, size)
    run, K = Run(sd, track, "mask", "encode", "decode"), level_at(options["strength"], options["steps"])
    text = run.texts("", negative_prompt, *(prompt for pair in pairs for prompt in pair))
    x0 = run.encode(picture, at)
    trajectory, latent, result, found = Trajectory([x0], options["steps"]), x0, picture.copy(), []
    if K > 0:
        with run.stage("mask"):
            found = find_masks(run, x0, text, pairs, options)
    masks = shared_out(pairs, found) if found else [torch.zeros_like(x0[:, :1]) for _ in pairs]
    M = torch.cat(masks).sum(dim=0, keepdim=True)
    if not M.any():
        why = "no pair of prompts finds a cell" if K else "the strength rounds to level 0"
        warnings.warn(f"nothing to edit: {why}; the source comes back", stacklevel=3)
    else:
        with run.stage("encode"):
            levels_of = {name: options[name] for name in ("steps", "strength", "refine")}
            trajectory = encode(sd.eps, x0, text[""], track=run.track, **levels_of)
        used = [i for i, mask in enumerate(masks) if mask.any()]
        with run.stage("decode"):
            latent = regional_decode(
                sd.eps, trajectory, [masks[i] for i in used], [text[pairs[i][1]] for i in used], text[negative_prompt],
                guidance_scale=options["guidance_scale"], track=run.track,
            )  # fmt: skip
        result, _ = run.finish(latent, picture, M if paste else None)
    return Regions(
        source=picture, image=result, mask=images.mask_picture(M, picture.size), latent=latent,
        latent_masks=tuple(masks), found=tuple(found), trajectory=trajectory, seed=options["seed"],
        evaluations=run.evaluations, seconds=run.seconds, settings=options | {"working_size": at, "edits": pairs},
    )  # fmt: skip


def predicted_rows(settings: dict[str, Any], pairs: list[list[str]]) -> dict[str, int]:
    """The model rows by stage, from checked arguments alone, where every pair of different prompts finds its cells."""
    differ = [pair for pair in pairs if pair[0] != pair[1]]
    K = level_at(settings["strength"], settings["steps"])
    if K == 0 or not differ:
        return {"mask": 0, "encode": 0, "decode": 0}
    texts = len(differ) + (settings["guidance_scale"] != 1)
    mask = settings["maps"] * (len(differ) + len({source for source, _ in differ}))
    return {"mask": mask, "encode": K * settings["refine"], "decode": K * texts}


def find_masks(run: Run, x0: Tensor, text: dict[str, Tensor], pairs: list[list[str]], s: dict[str, Any]) -> list[Mask]:
    """Each pair's mask; those of one source share its predictions."""
    known: dict[str, Mask] = {}
    found = []
    for source, target in pairs:
        found.append(run.find_mask(x0, text, s | {"source": source, "target": target}, known.get(source)))
        if found[-1].reference is not None:
            known[source] = found[-1]
    return found


def shared_out(pairs: list[list[str]], found: list[Mask]) -> list[Tensor]:
    """The masks made disjoint, saying who lost how much."""
    masks = disjoint([one.mask for one in found])
    for (source, target), one, own in zip(pairs, found, masks):
        lost, of = int((one.mask.float() > own).sum()), int(one.mask.sum())
        if lost == of:
            warnings.warn(f"{source!r} to {target!r} has no cell left to edit", stacklevel=4)
        elif lost:
            warnings.warn(f"{source!r} to {target!r} leaves {lost} of its {of} cells to earlier edits", stacklevel=4)
    return masks


def check_edits(edits: Sequence[Sequence[str]]) -> list[list[str]]:
    """(source, target) pairs as lists, as they come back from JSON."""
    pairs: list[Any] = [list(pair) if isinstance(pair, tuple | list) else pair for pair in edits]
    if not pairs or any(not isinstance(pair, list) or len(pair) != 2 for pair in pairs):
        raise ValueError(f"edits must be pairs (source, target), got {edits!r}")
    for prompt in (prompt for pair in pairs for prompt in pair):
        if not isinstance(prompt, str) or prompt != prompt.encode(errors="ignore").decode():
            raise ValueError(f"source and target must be text (UTF-8), got {prompt!r}")
    return pairs
