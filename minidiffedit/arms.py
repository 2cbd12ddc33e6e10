"""From picture to picture beside DiffEdit: SDEdit, compositing, and the arms of the paper's ablation on one path.

The ablation (2210.11427, section 4) asks what DiffEdit's two additions to SDEdit, the mask and the encoding, give.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from .files import images
from .ddim import Trajectory, level_at, whole
from .diffedit import Track, encode, masked_decode
from .editor import NOTHING, Edit, Picture, Run, check_same, check_settings, drop, open_picture
from .methods.sdedit import Form, check_process, draws, noised, redraw

if TYPE_CHECKING:
    from .sd import StableDiffusion

Arm = Literal["sdedit", "encode", "mask", "both", "user mask", "reconstruction"]
RANDOM_START = ("sdedit", "mask")
COMPUTED_MASK = ("mask", "both")
# What the computed mask depends on, besides the picture and the model.
OF_THE_MASK = ("target", "source", "seed", "steps", "mask_strength", "maps", "mask_clip", "mask_threshold", "chunk")


@dataclass(frozen=True, eq=False)
class Redrawn:
    """What SDEdit made. source, image: PIL RGB at the input's size; mask, paste_mask: PIL L at that size as in `Edit`
    (None: none given, nothing pasted); x0, latent (1, 4, h, w) and latent_mask (1, 1, h, w) float32; decoded: y_K, ...,
    y_0 of every repeat; the rest as in `Edit`.
    """

    source: Image.Image
    image: Image.Image
    mask: Image.Image | None
    paste_mask: Image.Image | None
    x0: Tensor = field(repr=False)
    latent: Tensor = field(repr=False)
    latent_mask: Tensor = field(repr=False)
    decoded: tuple[Tensor, ...] = field(repr=False)
    seed: int
    evaluations: dict[str, int]
    seconds: dict[str, float]
    settings: dict[str, Any]


def check_redraw(settings: dict[str, Any]) -> dict[str, Any]:
    """`check_settings` for what SDEdit has of its own."""
    eta, repeats, form = check_process(settings["eta"], settings["repeats"], settings.get("form", "vp"))
    return settings | {"eta": eta, "repeats": repeats, "form": form}


def redrawn_rows(settings: dict[str, Any]) -> dict[str, int]:
    """The model rows that `sdedit` will pay, from its checked arguments alone, where there is something to redraw."""
    texts = 1 if settings["guidance_scale"] == 1 or settings["target"] == settings["negative_prompt"] else 2
    return {"decode": texts * settings["repeats"] * level_at(settings["strength"], settings["steps"])}


@torch.no_grad()
def sdedit(
    sd: "StableDiffusion",
    image: Picture,
    *,
    target: str = "",
    mask: Picture | Tensor | None = None,
    negative_prompt: str = "",
    steps: int = 50,
    strength: float = 0.5,
    guidance_scale: float = 7.5,
    eta: float = 0.0,
    repeats: int = 1,
    form: Form = "vp",
    paste: bool = True,
    seed: int | None = None,
    size: int | None = None,
    track: Track | None = None,
) -> Redrawn:
    """Redraw a picture, or strokes, or a composite, under a text by noising and denoising it (2108.01073).

    image, mask, sizes, paste, seed: as in `edit`; without a mask everything is redrawn. target "" with no negative
    prompt asks the model for any likely picture. strength: the paper's t0, .3 to .6 there; eta: 0 deterministic, 1
    ancestral; repeats: the paper's K; form: "vp" or "ve", the same result to rounding.

    Model rows: 2 K a repeat, K = round(strength * steps), or K where guidance cannot act (scale 1, or equal texts).
    With strength 0 or an empty mask the source comes back and a warning says so. Raises ValueError for arguments and
    files it cannot use, ArithmeticError for NaN.
    """
    settings = check_redraw(check_settings(drop(locals(), "sd", "image", "mask", "track")))
    picture, at = open_picture(sd, image, size)
    given = None if mask is None else images.latent_mask(mask, picture.size, at, sd.factor).to(sd.device)
    settings |= {"working_size": at, "mask": "none" if given is None else "given", "method": "sdedit"}
    run, decoded = Run(sd, track, "decode"), list[Tensor]()
    text = run.texts(target, negative_prompt)
    x0 = run.encode(picture, at)
    M = torch.ones_like(x0[:, :1]) if given is None else given
    with run.stage("decode"):
        latent = redraw(
            sd.eps, x0, text[target], text[negative_prompt], mask=M, steps=settings["steps"],
            strength=settings["strength"], eta=settings["eta"], repeats=settings["repeats"], form=form,
            guidance_scale=1.0 if target == negative_prompt else settings["guidance_scale"], seed=settings["seed"],
            record=decoded, track=run.track,
        )  # fmt: skip
    result, feathered = picture.copy(), None
    if decoded:
        result, feathered = run.finish(latent, picture, M if paste and given is not None else None)
    else:
        why = NOTHING["given"] if level_at(settings["strength"], settings["steps"]) else NOTHING["strength 0"]
        warnings.warn(f"nothing to edit: {why}; the source comes back", stacklevel=3)
    return Redrawn(
        source=picture, image=result, mask=None if given is None else images.mask_picture(M, picture.size),
        paste_mask=feathered, x0=x0, latent=latent, latent_mask=M, decoded=tuple(decoded), seed=settings["seed"],
        evaluations=run.evaluations, seconds=run.seconds, settings=settings,
    )  # fmt: skip


def composite(
    image: Picture, patch: Picture, box: tuple[int, int, int, int], mask: Picture | Tensor | None = None
) -> tuple[Image.Image, Image.Image]:
    """A patch pasted in pixels, for `sdedit` to blend in: (composite PIL RGB, region PIL L, white = pasted).

    box: (left, top, right, bottom) in the image's pixels, to which the patch is resized (Lanczos); mask: which of the
    patch's pixels are pasted, at its size, soft values mix. `sdedit(sd, composite, mask=region)` redraws the patch
    alone, without mask= its surroundings too. Raises ValueError for a box that is not inside the image, or a mask of
    another size than the patch.
    """
    picture, piece = (images.to_rgb(images.read_picture(one)) for one in (image, patch))
    left, top, right, bottom = box = tuple(whole("box", side, 0, 2**31 - 1) for side in box)  # type: ignore[assignment]
    if not (left < right <= picture.width and top < bottom <= picture.height):
        raise ValueError(f"box must lie inside the picture of {picture.width} x {picture.height}, got {box}")
    shape = Image.new("L", piece.size, 255)
    if mask is not None:
        values = torch.from_numpy(images.read_mask(mask))[None, None]
        if values.shape[:1:-1] != piece.size:
            raise ValueError(f"the mask must have the patch's size {piece.size}, got {tuple(values.shape[:1:-1])}")
        shape = images.grey_picture(values, (piece.width, piece.height))
    size, region = (right - left, bottom - top), Image.new("L", picture.size)
    region.paste(shape.resize(size, Image.Resampling.BOX), box)
    laid = picture.copy()
    laid.paste(piece.resize(size, Image.Resampling.LANCZOS), box)
    result = Image.composite(laid, picture, region)
    result.info = dict(picture.info)
    return result, region


@torch.no_grad()
def arm(
    sd: "StableDiffusion",
    image: Picture,
    name: Arm,
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
    reuse: Sequence[Edit] = (),
    track: Track | None = None,
) -> Edit:
    """One arm of the ablation; arguments as in `edit`, and a result of the same type.

    name: "sdedit": random start, no mask (`sdedit` at eta 0). "encode": the encoding, no mask. "mask": random start,
    outside the computed mask the source under that one noise. "both": DiffEdit, as `edit`. "user mask": the encoding
    under `mask`. "reconstruction": encoded and decoded under the encoding's own text at guidance 1, no mask: what the
    inversion loses. The random start is the first noise of `seed`, the same in both arms that have one.

    reuse: earlier arms (or edits) of the same picture by the same model; a latent, mask or encoding that one of them
    computed with the same settings is taken from it. `trajectory` is what the decoding started from and was held on;
    after a random start settings["encoded_text"] is None, so that no edit takes it for an encoding.
    Model rows at the defaults: 80 decode (reconstruction 40), + 40 encode, + 20 mask where the arm has them.
    """
    arguments = drop(locals(), "sd", "image", "name", "mask", "reuse", "track")
    if name not in get_args(Arm):
        raise ValueError(f"name must be one of {', '.join(get_args(Arm))}, got {name!r}")
    if (mask is not None) != (name == "user mask"):
        raise ValueError(f"mask= belongs to the arm 'user mask' and to it alone, not to {name!r}")
    if reuse and seed is None:
        arguments["seed"] = reuse[0].seed
    settings = check_settings(arguments)
    null = source if encode_text == "source" else ""
    if name == "reconstruction":
        settings |= {"target": null, "guidance_scale": 1.0}
    picture, at = open_picture(sd, image, size)
    given = M = None if mask is None else images.latent_mask(mask, picture.size, at, sd.factor).to(sd.device)
    kind = "computed" if name in COMPUTED_MASK else "given" if M is not None else "none"
    settings |= {"working_size": at, "mask": kind, "encoded_text": None if name in RANDOM_START else null, "arm": name}
    for one in reuse:
        check_same(one, sd, picture, at)

    def earlier(*names: str) -> list[Edit]:
        return [one for one in reuse if all(one.settings[name] == settings[name] for name in names)]

    run, K = Run(sd, track, "mask", "encode", "decode"), level_at(settings["strength"], settings["steps"])
    text = run.texts(settings["target"], source, null, negative_prompt)
    x0 = reuse[0].x0 if reuse else run.encode(picture, at)
    found, verdict = None, "strength 0" if K == 0 else "given" if M is not None else "no mask"
    if kind == "computed" and K > 0:
        masks = [one.found for one in earlier(*OF_THE_MASK) if one.found]
        found = masks[0] if masks else run.find_mask(x0, text, settings)
        M, verdict = found.mask.float(), found.verdict[0]
    if M is None:
        M = torch.full_like(x0[:, :1], float(kind == "none"))

    trajectory, latent, result, feathered = Trajectory([x0], settings["steps"]), x0, picture.copy(), None
    decoded: list[Tensor] = []
    if K == 0 or not M.any():
        warnings.warn(f"nothing to edit: {NOTHING[verdict]}; the source comes back", stacklevel=3)
    else:
        options = {"steps": settings["steps"], "strength": settings["strength"]}
        with run.stage("encode"):
            encoded = [e.trajectory for e in earlier("steps", "refine", "encoded_text") if K in e.trajectory]
            if name in RANDOM_START:
                trajectory = noised(x0, next(draws(x0.shape, settings["seed"])), **options)
            elif encoded:
                trajectory = encoded[0].prefix(K)
            else:
                trajectory = encode(sd.eps, x0, text[null], refine=settings["refine"], track=run.track, **options)
        with run.stage("decode"):
            latent = masked_decode(
                sd.eps, trajectory, M, text[settings["target"]], text[negative_prompt],
                guidance_scale=settings["guidance_scale"], record=decoded, track=run.track,
            )  # fmt: skip
        result, feathered = run.finish(latent, picture, M if paste and kind != "none" else None)
    return Edit(
        source=picture, image=result, mask=images.mask_picture(M, picture.size), paste_mask=feathered, x0=x0,
        latent=latent, latent_mask=M, found=found, trajectory=trajectory, decoded=tuple(decoded), verdict=verdict,
        seed=settings["seed"], evaluations=run.evaluations, seconds=run.seconds, settings=settings, sd=sd,
        given=given,
    )  # fmt: skip
