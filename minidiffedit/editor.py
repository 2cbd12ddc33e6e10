"""From picture to picture: joins the page `diffedit.py` to a model, to files and to the clock; text to picture too."""

import secrets
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .files import images
from .ddim import Trajectory, level_at, levels, noises, real, whole
from .diffedit import (
    Mask,
    Track,
    check_threshold,
    encode,
    find_mask,
    finite,
    masked_decode,
    sample,
    threshold_maps,
    untracked,
)

if TYPE_CHECKING:
    from .sd import StableDiffusion
    from .files.masks import Steering

Picture = str | PathLike[str] | Image.Image | np.ndarray


def check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """An edit's, a mask's or a generation's arguments -> the same as plain Python values, seed drawn if it is None.

    Raises ValueError for what is out of range, before anything is computed. torch's generators are left alone.
    """
    steps = whole("steps", settings["steps"], 1, 999)
    if 1000 % steps:
        warnings.warn(
            f"{steps} steps do not divide 1000: the top level is t = {levels(steps).t[-1]}, below full noise",
            stacklevel=4,
        )
    found = settings | {"steps": steps}
    for name, value in settings.items():
        if name in ("prompt", "target", "source", "negative_prompt"):
            if not isinstance(value, str) or value != value.encode(errors="ignore").decode():
                raise ValueError(f"{name} must be text (UTF-8), got {value!r}")
        elif name in ("strength", "mask_strength"):
            found[name] = real(name, value, 0, 1)
            level_at(value, steps, lowest=int(name == "mask_strength"))
        elif name == "guidance_scale":
            found[name] = real(name, value, -1000, 1000)
        elif name in RANGES and (value is not None or name in ("maps", "refine")):
            low, high = RANGES[name]
            found[name] = whole(name, value, low, high)
    if "mask_threshold" in settings:
        found["mask_clip"], found["mask_threshold"] = check_threshold(settings["mask_clip"], settings["mask_threshold"])
    if settings.get("encode_text", "null") not in ("null", "source"):
        raise ValueError(f"encode_text must be 'null' or 'source', got {settings['encode_text']!r}")
    check_area(settings.get("width") or 1, settings.get("height") or 1)
    if not isinstance(settings.get("paste", True), bool):
        raise ValueError(f"paste must be True or False, got {settings['paste']!r}")
    seed = secrets.randbelow(2**32) if settings["seed"] is None else settings["seed"]
    return found | {"seed": whole("seed", seed, 0, 2**63 - 1)}


def check_area(width: int, height: int) -> None:
    if width * height > images.MOST_PIXELS:
        raise ValueError(f"at most 1024 x 1024 pixels are made, got {width} x {height}")


RANGES = {
    "maps": (1, 1000), "refine": (1, 100), "chunk": (1, 1000), "size": (64, 1024), "width": (64, 16384),
    "height": (64, 16384),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Edit:
    """What an edit made, and what it was made of.

    source, image: PIL RGB at the input's size, before and after. mask: PIL L at that size, white = edited; paste_mask:
    PIL L, where it is 0 the image's pixels are the source's (None: nothing was pasted). latent, x0 (1, 4, h, w)
    float32; latent_mask (1, 1, h, w) float32 in [0, 1]; found: the computed mask (None where one was given), heat its
    heat map; trajectory: the encoding; decoded: y_K, ..., y_0 (where nothing was edited: level 0 alone, and nothing).
    verdict: "found", "no difference", "given" or "strength 0"; coverage: share of latent cells in the mask.
    evaluations (model rows) and seconds by stage. settings: every argument that decided the result, seed, working size
    and the text of the encoding included. given: the mask that was given, (1, 1, h, w) float32, and steering: what was
    done to it or to the computed one, its masks on the latent grid (None where there was none).
    """

    source: Image.Image
    image: Image.Image
    mask: Image.Image
    paste_mask: Image.Image | None
    x0: Tensor = field(repr=False)
    latent: Tensor = field(repr=False)
    latent_mask: Tensor = field(repr=False)
    found: Mask | None
    trajectory: Trajectory = field(repr=False)
    decoded: tuple[Tensor, ...] = field(repr=False)
    verdict: str
    seed: int
    evaluations: dict[str, int]
    seconds: dict[str, float]
    settings: dict[str, Any]
    sd: "StableDiffusion" = field(repr=False)
    given: Tensor | None = field(default=None, repr=False)
    steering: "Steering | None" = field(default=None, repr=False)

    @property
    def heat(self) -> Tensor | None:
        return self.found.heat if self.found else None

    @property
    def coverage(self) -> float:
        return float((self.latent_mask > 0).float().mean())


# What an empty edit is told apart by.
NOTHING = {
    "strength 0": "the strength rounds to level 0",
    "no difference": "the prompts do not differ on this picture",
    "found": "the mask is empty",
    "given": "the mask is empty",
}


def nothing_to_edit(verdict: str, settings: dict[str, Any]) -> str:
    if verdict == "no difference" and settings["target"] == settings["source"]:
        return f"the prompts do not differ: both are {settings['target'][:60]!r}"
    return NOTHING[verdict]


class Run:
    """One call's model, progress, and what its stages cost: `with run.stage("mask"): ...`."""

    def __init__(self, sd: "StableDiffusion", track: Track | None, *loops: str):
        self.sd, self.track = sd, track or untracked
        self.seconds: dict[str, float] = {}
        self.evaluations = dict.fromkeys(loops, 0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        rows, start = self.sd.evaluations, self.sd.clock()
        yield
        self.seconds[name] = self.sd.clock() - start
        if name in self.evaluations:
            self.evaluations[name] = self.sd.evaluations - rows

    def texts(self, *prompts: str) -> dict[str, Tensor]:
        """Each distinct prompt once: equal prompts are one object, which find_mask recognises."""
        with self.stage("text"):
            return {prompt: self.sd.text([prompt]) for prompt in dict.fromkeys(prompts)}

    def encode(self, picture: Image.Image, size: tuple[int, int]) -> Tensor:
        with self.stage("vae encode"):
            return finite(self.sd.encode(images.to_tensor(picture, size)), "the VAE")

    def decode(self, latent: Tensor, size: tuple[int, int]) -> Image.Image:
        with self.stage("vae decode"):
            return images.to_picture(finite(self.sd.decode(latent), "the VAE"), size)

    def finish(self, latent: Tensor, picture: Image.Image, M: Tensor | None) -> tuple[Image.Image, Image.Image | None]:
        """The decoded picture; with a mask, the picture's own pixels put back outside it, and where they are not."""
        result, feathered = self.decode(latent, picture.size), None
        if M is not None:
            feathered = images.paste_mask(M > 0, picture.size)  # soft values have blended in the latents already
            result = Image.composite(result, picture, feathered)
        result.info = dict(picture.info)
        return result, feathered

    def find_mask(self, x0: Tensor, text: dict[str, Tensor], s: dict[str, Any], known: Mask | None = None) -> Mask:
        """known: the mask of a run with the same reference predictions."""
        with self.stage("mask"):
            return find_mask(
                self.sd.eps, x0, text[s["target"]], text[s["source"]], steps=s["steps"], strength=s["mask_strength"],
                maps=s["maps"], clip=s["mask_clip"], threshold=s["mask_threshold"], seed=s["seed"], chunk=s["chunk"],
                known_reference=known.reference if known else None, track=self.track,
            )  # fmt: skip

    def threshold(self, known: Mask, s: dict[str, Any]) -> Mask:
        """The mask of maps that are known, at another threshold or clip: no model row."""
        with self.stage("mask"):
            found = threshold_maps(known.maps, known.flat_below, clip=s["mask_clip"], threshold=s["mask_threshold"])
            return replace(found, reference=known.reference)


def open_picture(sd: "StableDiffusion", image: Picture, size: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """The picture as RGB, and the (width, height) that the model works on."""
    picture = images.to_rgb(images.read_picture(image))
    return picture, images.working_size(picture.size, sd.side if size is None else size, sd.factor)


# Settings on which the maps of the mask, apart from the target, and the encoding depend.
OF_THE_MAPS = ("source", "seed", "steps", "mask_strength", "maps")
OF_THE_ENCODING = ("steps", "refine", "encoded_text")


def drop(arguments: dict[str, Any], *handles: str) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in handles}


@torch.no_grad()
def edit(
    sd: "StableDiffusion",
    image: Picture,
    *,
    target: str,
    source: str = "",
    mask: Picture | Tensor | None = None,
    negative_prompt: str = "",
    steps: int = 50,
    strength: float = 0.8,
    guidance_scale: float = 7.5,
    mask_strength: float = 0.5,
    maps: int = 10,
    mask_clip: float | None = 3.0,
    mask_threshold: float = 0.5,
    encode_text: Literal["null", "source"] = "null",
    refine: int = 1,
    paste: bool = True,
    seed: int | None = None,
    size: int | None = None,
    chunk: int | None = None,
    steering: "Steering | None" = None,
    reuse: Edit | None = None,
    record: dict[str, list[Tensor]] | None = None,
    track: Track | None = None,
) -> Edit:
    """Edit a picture so that `target` describes it, changing as little as possible.

    image: path, PIL image or uint8 array; its shorter side is resized to the model's training size (or `size`), and the
    result has the input's size. source: what the picture shows now (may stay empty). mask: path, PIL image, array or
    tensor at picture or latent size, white = edited, instead of the computed one. strength: how far up the noise the
    picture is encoded, 0 to 1; the paper sweeps it, .5 keeps more of the source. encode_text: "null" (the paper) or
    "source". paste: put the input's own pixels back outside the mask, grown by one latent cell and faded over one.
    steering: what to do with the mask, computed or given (see steer.py); where the prompts do not differ, nothing.
    seed: None draws one (with reuse: takes its). reuse: an earlier Edit of the same picture by the same model; what
    still holds of it (latent, trajectory, all or half of the mask's predictions) is not computed again. record: a dict
    that receives the levels as they are made: x_0, ..., x_K as "encode", y_K, ..., y_0 as "decode"; and [M] as "mask".

    Model rows at the defaults: 20 (mask) + 40 (encode) + 80 (decode). With strength 0, or nothing to edit, the source
    comes back and a warning says so. Raises ValueError for arguments and files it cannot use, ArithmeticError for NaN.
    """
    arguments = drop(locals(), "sd", "image", "mask", "steering", "reuse", "record", "track")
    if reuse is not None and seed is None:
        arguments["seed"] = reuse.seed
    settings = check_settings(arguments)
    picture, at = open_picture(sd, image, size)
    given = M = None if mask is None else images.latent_mask(mask, picture.size, at, sd.factor).to(sd.device)
    steering = steering.at(picture.size, at, sd.factor) if steering else None
    null = source if encode_text == "source" else ""
    settings |= {"working_size": at, "mask": "computed" if M is None else "given", "encoded_text": null}
    settings |= {"steering": said} if steering and (said := steering.settings()) else {}
    if reuse is not None:
        check_same(reuse, sd, picture, at)

    def same(*names: str) -> bool:
        return reuse is not None and all(reuse.settings[name] == settings[name] for name in names)

    run, K = Run(sd, track, "mask", "encode", "decode"), level_at(settings["strength"], settings["steps"])
    text = run.texts(target, source, null, negative_prompt)
    x0 = run.encode(picture, at) if reuse is None else reuse.x0
    found, verdict = None, "strength 0" if K == 0 else "given"
    if M is None and K > 0:
        known = reuse.found if reuse and same(*OF_THE_MAPS) else None
        if known is not None and same("target"):
            found = run.threshold(known, settings)
        else:
            found = run.find_mask(x0, text, settings, known)
        M, verdict = found.mask.float(), found.verdict[0]
    if M is not None and steering and verdict != "no difference":
        M = steering(M)
    M = torch.zeros_like(x0[:, :1]) if M is None else M

    trajectory, latent, result, feathered = Trajectory([x0], settings["steps"]), x0, picture.copy(), None
    encoded, decoded = list[Tensor](), list[Tensor]()
    if record is not None:
        record |= {"mask": [M], "encode": encoded, "decode": decoded}
    if K == 0 or not M.any():
        warnings.warn(f"nothing to edit: {nothing_to_edit(verdict, settings)}; the source comes back", stacklevel=3)
    else:
        with run.stage("encode"):
            if reuse and same(*OF_THE_ENCODING) and K in reuse.trajectory:
                trajectory = reuse.trajectory.prefix(K)
                encoded += trajectory.values()
            else:
                options = {name: settings[name] for name in ("steps", "strength", "refine")}
                trajectory = encode(sd.eps, x0, text[null], record=encoded, track=run.track, **options)
        with run.stage("decode"):
            latent = masked_decode(
                sd.eps, trajectory, M, text[target], text[negative_prompt], guidance_scale=settings["guidance_scale"],
                record=decoded, track=run.track,
            )  # fmt: skip
        result, feathered = run.finish(latent, picture, M if paste else None)
    return Edit(
        source=picture, image=result, mask=images.mask_picture(M, picture.size), paste_mask=feathered, x0=x0,
        latent=latent, latent_mask=M, found=found, trajectory=trajectory, decoded=tuple(decoded), verdict=verdict,
        seed=settings["seed"], evaluations=run.evaluations, seconds=run.seconds, settings=settings, sd=sd,
        given=given, steering=steering,
    )  # fmt: skip


def predicted_rows(settings: dict[str, Any], *, given: bool = False, nothing: bool = False) -> dict[str, int]:
    """The model rows that `edit` will pay by stage, from its checked arguments alone, where it finds something to edit.

    given: a mask is given; nothing: it is known to be empty. `refine` may stop early and cost less.
    """
    K = level_at(settings["strength"], settings["steps"])
    if nothing or K == 0 or (settings["target"] == settings["source"] and not given):
        return {"mask": 0, "encode": 0, "decode": 0}
    texts = 1 if settings["guidance_scale"] == 1 else 2
    return {"mask": 0 if given else 2 * settings["maps"], "encode": K * settings["refine"], "decode": K * texts}


def check_same(reuse: Edit, sd: "StableDiffusion", picture: Image.Image, at: tuple[int, int]) -> None:
    if reuse.sd is not sd or reuse.settings["working_size"] != at:
        raise ValueError("reuse= holds an edit by another model or at another working size")
    if reuse.source.size != picture.size or reuse.source.tobytes() != picture.tobytes():
        raise ValueError("reuse= holds an edit of another picture")


@dataclass(frozen=True, eq=False)
class PictureMask:
    """mask (white = would be edited) and heat: PIL L at the input's size; latent_mask (1, 1, h, w) float32, steered;
    found: the tensors, coverage and verdict before; the rest as in `Edit`.
    """

    mask: Image.Image
    heat: Image.Image
    latent_mask: Tensor = field(repr=False)
    found: Mask
    seed: int
    evaluations: dict[str, int]
    seconds: dict[str, float]
    settings: dict[str, Any]

    @property
    def coverage(self) -> float:
        return float((self.latent_mask > 0).float().mean())


@torch.no_grad()
def picture_mask(
    sd: "StableDiffusion",
    image: Picture,
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
    steering: "Steering | None" = None,
    track: Track | None = None,
) -> PictureMask:
    """The mask that `edit` would use, alone; arguments and errors as there. Model rows: 2 maps."""
    settings = check_settings(drop(locals(), "sd", "image", "steering", "track"))
    picture, at = open_picture(sd, image, size)
    steering = steering.at(picture.size, at, sd.factor) if steering else None
    settings |= {"steering": said} if steering and (said := steering.settings()) else {}
    run = Run(sd, track, "mask")
    found = run.find_mask(run.encode(picture, at), run.texts(target, source), settings)
    M = found.mask.float()
    if steering and found.verdict != ("no difference",):
        M = steering(M)
    elif found.verdict == ("no difference",):
        warnings.warn(f"the mask is empty: {nothing_to_edit('no difference', settings)}", stacklevel=3)
    return PictureMask(
        mask=images.mask_picture(M, picture.size), heat=images.grey_picture(found.heat, picture.size), latent_mask=M,
        found=found, seed=settings["seed"], evaluations=run.evaluations, seconds=run.seconds,
        settings=settings | {"working_size": at},
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Generation:
    """image: PIL RGB; latent (1, 4, h, w) float32; the rest as in `Edit`."""

    image: Image.Image
    latent: Tensor = field(repr=False)
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
    settings = check_settings(drop(locals(), "sd", "track"))
    w, h = (sd.side if side is None else side for side in (settings["width"], settings["height"]))
    if w % sd.factor or h % sd.factor:
        raise ValueError(f"width and height must be multiples of {sd.factor}, got {w} x {h}")
    check_area(w, h)
    run = Run(sd, track, "generate")
    text = run.texts(prompt, negative_prompt)
    x_T = noises((sd.channels, h // sd.factor, w // sd.factor), 1, settings["seed"]).to(sd.device)
    with run.stage("generate"):
        latent = sample(
            sd.eps, x_T, text[prompt], text[negative_prompt], steps=settings["steps"],
            guidance_scale=settings["guidance_scale"], track=run.track,
        )  # fmt: skip
    return Generation(
        run.decode(latent, (w, h)), latent, settings["seed"], run.evaluations, run.seconds,
        settings | {"width": w, "height": h},
    )  # fmt: skip
