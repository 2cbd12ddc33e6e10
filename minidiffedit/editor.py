"""From picture to picture: joins the page `diffedit.py` to a model, to files and to the clock; text to picture too."""

import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from . import images
from .ddim import Trajectory, level_at, levels, noises
from .diffedit import (
    Mask,
    Track,
    at_least_one,
    check_threshold,
    checked_guidance,
    encode,
    find_mask,
    finite,
    masked_decode,
    sample,
    untracked,
)

if TYPE_CHECKING:
    from .sd import StableDiffusion


def checked_seed(seed: int | None) -> int:
    """A seed as given (0 counts), or one drawn from the system; torch's generators are left alone."""
    if seed is None:
        return secrets.randbelow(2**32)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed must be a whole number from 0 to 2^63 - 1, or none to draw one, got {seed!r}")
    return seed


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse an edit's or a generation's arguments before anything is computed."""
    for name in ("prompt", "target", "source", "negative_prompt"):
        if not isinstance(settings.get(name, ""), str):
            raise ValueError(f"{name} must be a string, got {type(settings[name]).__name__}")
    levels(settings["steps"])
    checked_guidance(settings.get("guidance_scale", 1.0))
    level_at(settings.get("mask_strength", 0.5), settings["steps"], lowest=1)
    check_threshold(settings.get("mask_clip"), settings.get("mask_threshold", 0.5))
    for name in ("maps", "refine", "chunk"):
        if settings.get(name) is not None:
            at_least_one(name, settings[name])
    if settings.get("encode_text", "null") not in ("null", "source"):
        raise ValueError(f"encode_text must be 'null' or 'source', got {settings['encode_text']!r}")


@dataclass(frozen=True)
class Edit:
    """What an edit made, and what it was made of.

    source, image: PIL RGB at the input's size, before and after. mask: PIL L at that size, white = edited; paste_mask:
    PIL L, where it is 0 the image's pixels are the source's (None: nothing was pasted). latent, x0 (1, 4, h, w)
    float32; latent_mask (1, 1, h, w) float32 in [0, 1]; found: the computed mask (None where one was given), heat its
    heat map; trajectory: the encoding; decoded: y_K, ..., y_0. verdict: "found", "no difference", "given" or
    "strength 0"; coverage: share of latent cells in the mask. evaluations (model rows) and seconds by stage.
    settings: every argument that decided the result, seed and working size included.
    """

    source: Image.Image
    image: Image.Image
    mask: Image.Image
    paste_mask: Image.Image | None
    x0: Tensor
    latent: Tensor
    latent_mask: Tensor
    found: Mask | None
    trajectory: Trajectory
    decoded: tuple[Tensor, ...]
    verdict: str
    seed: int
    evaluations: dict[str, int]
    seconds: dict[str, float]
    settings: dict[str, Any]
    sd: "StableDiffusion" = field(repr=False)

    @property
    def heat(self) -> Tensor | None:
        return self.found.heat if self.found else None

    @property
    def coverage(self) -> float:
        return float((self.latent_mask > 0).float().mean())


class Stages:
    """Model rows and seconds, stage by stage: `with stages("mask"): ...`."""

    def __init__(self, sd: "StableDiffusion", *loops: str):
        self.sd, self.seconds, self.evaluations = sd, dict[str, float](), dict.fromkeys(loops, 0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        rows, start = self.sd.evaluations, self.sd.clock()
        yield
        self.seconds[name] = self.sd.clock() - start
        if name in self.evaluations:
            self.evaluations[name] = self.sd.evaluations - rows


@torch.no_grad()
def edit(
    sd: "StableDiffusion",
    image: Any,
    *,
    target: str,
    source: str = "",
    mask: Any = None,
    negative_prompt: str = "",
    steps: int = 50,
    strength: float = 0.8,
    guidance_scale: float = 7.5,
    mask_strength: float = 0.5,
    maps: int = 10,
    mask_clip: float | None = 3.0,
    mask_threshold: float = 0.5,
    encode_text: str = "null",
    refine: int = 1,
    paste: bool = True,
    seed: int | None = None,
    size: int | None = None,
    chunk: int | None = None,
    reuse: Edit | None = None,
    track: Track | None = None,
) -> Edit:
    """Edit a picture so that `target` describes it, changing as little as possible.

    image: path, PIL image or uint8 array; its shorter side is resized to the model's training size (or `size`), and the
    result has the input's size. source: what the picture shows now (may stay empty). mask: path, PIL image, array or
    tensor at picture or latent size, white = edited, instead of the computed one. strength: how far up the noise the
    picture is encoded, 0 to 1; the paper sweeps it, .5 keeps more of the source. encode_text: "null" (the paper) or
    "source". paste: put the input's own pixels back outside the mask, grown by one latent cell and faded over one.
    seed: None draws one. reuse: an earlier Edit of the same picture; what still holds of it is not computed again.

    Model rows at the defaults: 20 (mask) + 40 (encode) + 80 (decode). With strength 0, or nothing to edit, the source
    comes back and a warning says so. Raises ValueError for arguments and files it cannot use, ArithmeticError for NaN.
    """
    arguments = dict(locals())
    for handle in ("sd", "image", "mask", "reuse", "track"):
        del arguments[handle]
    seed = checked_seed(reuse.seed if reuse and seed is None else seed)
    check_settings(arguments)
    K = level_at(strength, steps)
    picture = images.to_rgb(images.read_picture(image))
    at = images.working_size(picture.size, sd.side if size is None else size, sd.factor)
    M = None if mask is None else images.latent_mask(mask, picture.size, at, sd.factor).to(sd.device)
    settings = arguments | {"seed": seed, "working_size": at, "mask": "computed" if M is None else "given"}
    if reuse and (reuse.sd is not sd or reuse.x0.shape[2:] != (at[1] // sd.factor, at[0] // sd.factor)):
        raise ValueError("reuse= holds an edit by another model or at another working size")
    if reuse and reuse.source.tobytes() != picture.tobytes():
        raise ValueError("reuse= holds an edit of another picture")

    def same(*names: str) -> bool:
        return reuse is not None and all(reuse.settings[name] == settings[name] for name in names)

    stages, track = Stages(sd, "mask", "encode", "decode"), track or untracked
    with stages("text"):  # each distinct prompt once: equal prompts are one object, which find_mask recognises
        null = source if encode_text == "source" else ""
        text = {prompt: sd.text([prompt]) for prompt in dict.fromkeys((target, source, null, negative_prompt))}
    with stages("vae encode"):
        x0 = reuse.x0 if reuse else sd.encode(images.to_tensor(picture, at))

    found, verdict = None, "strength 0" if K == 0 else "given"
    if M is None and K > 0:
        known = None
        if reuse and reuse.found and same("source", "seed", "steps", "mask_strength", "maps"):
            known = reuse.found.reference
        with stages("mask"):
            found = find_mask(
                sd.eps, x0, text[target], text[source], steps=steps, strength=mask_strength, maps=maps, clip=mask_clip,
                threshold=mask_threshold, seed=seed, chunk=chunk, known_reference=known, track=track,
            )  # fmt: skip
        M, verdict = found.mask.float(), found.verdict[0]
    M = torch.zeros_like(x0[:, :1]) if M is None else M

    trajectory, latent = Trajectory([x0], steps), x0
    decoded: list[Tensor] = []
    result, feathered = picture.copy(), None
    if K == 0 or not M.any():
        warnings.warn(
            f"nothing to edit ({verdict}, coverage {(M > 0).float().mean():.0%}): the source comes back", stacklevel=2
        )
    else:
        with stages("encode"):
            if reuse and same("steps", "refine", "encode_text", *["source"] * bool(null)) and K in reuse.trajectory:
                trajectory = reuse.trajectory.prefix(K)
            else:
                trajectory = encode(sd.eps, x0, text[null], steps=steps, strength=strength, refine=refine, track=track)
        with stages("decode"):
            latent = masked_decode(
                sd.eps, trajectory, M, text[target], text[negative_prompt], guidance_scale=guidance_scale,
                record=decoded, track=track,
            )  # fmt: skip
        with stages("vae decode"):
            result = images.to_picture(finite(sd.decode(latent), "the VAE"), picture.size)
        if paste:
            feathered = images.paste_mask(M, picture.size)
            result = Image.composite(result, picture, feathered)
        result.info = dict(picture.info)
    return Edit(
        source=picture, image=result, mask=images.grey_picture(M, picture.size), paste_mask=feathered, x0=x0,
        latent=latent, latent_mask=M, found=found, trajectory=trajectory, decoded=tuple(decoded), verdict=verdict,
        seed=seed, evaluations=stages.evaluations, seconds=stages.seconds, settings=settings, sd=sd,
    )  # fmt: skip


@dataclass(frozen=True)
class Generation:
    """image: PIL RGB; latent (1, 4, h, w) float32; the rest as in `Edit`."""

    image: Image.Image
    latent: Tensor
    seed: int
    evaluations: dict[str, int]
    seconds: dict[str, float]
    settings: dict[str, Any]


@torch.no_grad()
def generate(
    sd: "StableDiffusion",
    prompt: str,
    *,
    negative_prompt: str = "",
    steps: int = 50,
    guidance_scale: float = 7.5,
    seed: int | None = None,
    width: int | None = None,
    height: int | None = None,
    track: Track | None = None,
) -> Generation:
    """Text to picture: plain guided DDIM from noise. width, height: pixels, multiples of 8 (default: training size).

    Model rows: 2 N, or N at guidance 1. Raises ValueError for arguments out of range, ArithmeticError for NaN.
    """
    arguments = dict(locals())
    for handle in ("sd", "track"):
        del arguments[handle]
    seed = checked_seed(seed)
    check_settings(arguments)
    size = (width or sd.side, height or sd.side)
    if any(type(n) is not int or n < 64 or n % sd.factor for n in size) or size[0] * size[1] > images.MOST_PIXELS:
        raise ValueError(
            f"width and height must be multiples of {sd.factor} from 64, at most 1024 x 1024 in all, got {size}"
        )
    stages = Stages(sd, "generate")
    with stages("text"):
        text = {one: sd.text([one]) for one in dict.fromkeys((prompt, negative_prompt))}
    x_T = noises((sd.channels, size[1] // sd.factor, size[0] // sd.factor), 1, seed).to(sd.device)
    with stages("generate"):
        latent = sample(
            sd.eps, x_T, text[prompt], text[negative_prompt], steps=steps, guidance_scale=guidance_scale,
            track=track or untracked,
        )  # fmt: skip
    with stages("vae decode"):
        image = images.to_picture(finite(sd.decode(latent), "the VAE"))
    settings = arguments | {"seed": seed, "width": size[0], "height": size[1]}
    return Generation(image, latent, seed, stages.evaluations, stages.seconds, settings)


@dataclass(frozen=True)
class PictureMask:
    """mask (white = would be edited) and heat: PIL L at the input's size; found: the tensors; the rest as in `Edit`."""

    mask: Image.Image
    heat: Image.Image
    found: Mask
    seed: int
    evaluations: dict[str, int]
    seconds: dict[str, float]
    settings: dict[str, Any]


@torch.no_grad()
def picture_mask(
    sd: "StableDiffusion",
    image: Any,
    *,
    target: str,
    source: str = "",
    steps: int = 50,
    mask_strength: float = 0.5,
    maps: int = 10,
    mask_clip: float | None = 3.0,
    mask_threshold: float = 0.5,
    seed: int | None = None,
    size: int | None = None,
    chunk: int | None = None,
    track: Track | None = None,
) -> PictureMask:
    """The mask that `edit` would use, alone; arguments and errors as there. Model rows: 2 maps."""
    arguments = dict(locals())
    for handle in ("sd", "image", "track"):
        del arguments[handle]
    seed = checked_seed(seed)
    check_settings(arguments)
    picture = images.to_rgb(images.read_picture(image))
    at = images.working_size(picture.size, sd.side if size is None else size, sd.factor)
    stages = Stages(sd, "mask")
    with stages("text"):
        text = {prompt: sd.text([prompt]) for prompt in dict.fromkeys((target, source))}
    with stages("vae encode"):
        x0 = sd.encode(images.to_tensor(picture, at))
    with stages("mask"):
        found = find_mask(
            sd.eps, x0, text[target], text[source], steps=steps, strength=mask_strength, maps=maps, clip=mask_clip,
            threshold=mask_threshold, seed=seed, chunk=chunk, track=track or untracked,
        )  # fmt: skip
    if found.verdict == ("no difference",):
        warnings.warn("the prompts do not differ on this picture: the mask is empty", stacklevel=2)
    return PictureMask(
        mask=images.grey_picture(found.mask.float(), picture.size), heat=images.grey_picture(found.heat, picture.size),
        found=found, seed=seed, evaluations=stages.evaluations, seconds=stages.seconds,
        settings=arguments | {"seed": seed, "working_size": at},
    )  # fmt: skip
