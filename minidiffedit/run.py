"""Any method by name: a plan (plans.py), run on a picture (job.py), gives a result (result.py).

settled = plan("masactrl", target="a zebra", source="a horse", steps=20)     # refuses before any weights are read
done = execute(settled, sd, "horse.png")                                      # or `edit`, which is both
"""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .ddim import level_at, whole
from .diffedit import finite
from .files import images
from .files.masks import HAZE, Steering, largest_piece
from .job import Job, Step, Watch  # noqa: F401
from .kernels.alone import alone
from .plans import Plan, blank_plan, changed, check_fits, check_takes_picture, idle, plan
from .progress import bar
from .result import Call, Result, nothing_to_edit  # noqa: F401

# isort: split
from .plans import COMMON, GIVEN, check_given, function_at, inputs_of, known_system, parts_of, plan_words  # noqa: F401

if TYPE_CHECKING:
    from .sd import StableDiffusion

Picture = str | PathLike[str] | Image.Image | np.ndarray
MOST_CALLS = 32  # that a result keeps for reuse, the latest used
MOST_CROPPED = 0.8  # of the picture's shorter side; a square that takes more shows hardly more than the whole


def edit(
    sd: "StableDiffusion",
    image: Picture,
    method: str = "diffedit",
    *,
    target: str | None = None,
    source: str | None = None,
    mask: Picture | Tensor | None = None,
    negative_prompt: str | None = None,
    inversion: str | None = None,
    mask_from: str | None = None,
    steering: Steering | None = None,
    reuse: Result | Sequence[Result] = (),
    watch: Watch | None = None,
    witness: Any = None,
    bitwise: bool = False,
    progress: bool = False,
    **options: Any,
) -> Result:
    """Edit a picture so that `target` describes it, changing as little as possible, by any method of the table.

    image: path, PIL image or uint8 array; its shorter side is resized to the model's training size (or `size`), and the
    result has the input's size. method: a name that `minidiffedit methods` lists, or INVERSION+EDITOR; inversion:
    another one for the method; mask_from: another source of its mask ("words:horse"). source: what the picture shows
    now. mask: path, PIL image, array or tensor at picture or latent size, white = edited; where none is given, the part
    of the picture that is erased. steering: what to do with the mask, computed or given (see files/masks.py). options:
    the method's own (`minidiffedit methods NAME`), and those of every run (`common`): seed None draws one (with reuse:
    takes its). reuse: earlier results on the same picture by the same model, whatever the method; what still holds of
    them is not computed again (bitwise: only where that changes no bit). watch: called after each call of the model.
    witness: a `Witness`, which looks on at attention, for the page of the result. progress: show a bar on stderr.

    Where nothing is to edit the source comes back, and a warning says so. Raises ValueError for arguments and files it
    cannot use, before any weights are touched as far as it can, ArithmeticError for NaN.
    """
    earlier = [reuse] if isinstance(reuse, Result) else [*(reuse or ())]
    for kind, one in ((Steering, steering or Steering()), *((Result, one) for one in earlier)):
        if not isinstance(one, kind):
            raise ValueError(f"steering and reuse take a Steering and Results, got a {type(one).__name__}")
    if earlier and options.get("seed") is None:
        options["seed"] = earlier[0].seed
    if mask is mask_from is None and images.has_hole(image, "mask" in blank_plan(method, inversion).given):
        mask = image
    given = {"target": target, "source": source, "mask": mask, "negative_prompt": negative_prompt}
    settled = plan(method, inversion=inversion, mask_from=mask_from, **given, **options)
    own = settled.options  # a record of an edit, given again, holds every default: they are no wishes
    meant = [n for n, one in (given | options).items() if one is not None and (n not in own or one != own[n].default)]
    for line in idle(settled, meant):
        warnings.warn(line, stacklevel=2)
    handles: dict[str, Any] = {"steering": steering, "reuse": earlier, "witness": witness, "bitwise": bitwise}
    with bar(settled, watch) if progress else nullcontext(watch) as seen:
        return execute(settled, sd, image, watch=seen, **handles)


def resume(
    state: Result,
    *,
    mask: Picture | Tensor | None = None,
    steering: Steering | None = None,
    watch: Watch | None = None,
    witness: Any = None,
    **changes: Any,
) -> Result:
    """The edit again with some of `edit`'s arguments changed, equal to a fresh one to the model's rounding.

    A given mask stays until another comes or an option of the computed mask does; so does the steering. What the
    changes leave as it was is not paid for again. Raises as `edit` does.
    """
    settled, kept = changed(state.plan, changes, mask)
    mask = state.given_mask if kept else mask
    settled = replace(settled, given=settled.given | {"mask": mask} if settled.masked else settled.given)
    for line in idle(settled, changes):
        warnings.warn(line, stacklevel=2)
    assert state.source  # only what worked on a picture is saved and goes on
    handles: dict[str, Any] = {"steering": steering or state.steering, "watch": watch, "witness": witness}
    done = execute(settled, state.sd, state.source, reuse=[state], **handles)
    if kept and "mask" in state.settings:
        done.settings["mask"] = state.settings["mask"]  # which may name the file
    return done


def picture_mask(sd: "StableDiffusion", image: Picture, method: str = "diffedit", **arguments: Any) -> Result:
    """The mask that `edit` would use, alone, as a Result whose image is the source; arguments and errors as there."""
    handles = {name: arguments.pop(name) for name in ("steering", "watch") if name in arguments}
    return execute_mask(plan(method, **arguments), sd, image, **handles)


def generate(
    sd: "StableDiffusion",
    prompt: str,
    *,
    width: int | None = None,
    height: int | None = None,
    watch: Watch | None = None,
    **options: Any,
) -> Result:
    """Text to picture: plain guided DDIM from noise. width, height: pixels, multiples of 8 (default: training size);
    options: negative_prompt, steps, guidance_scale, seed. Model rows: 2 N, or N at guidance 1. Raises as `edit` does.
    """
    return execute_without_picture(plan("text-to-image", target=prompt, **options), sd, (width, height), watch)


# ---------------------------------------------------------------- a plan run


@alone
def execute(plan: Plan, sd: "StableDiffusion", image: Picture, **options: Any) -> Result:
    """Run a plan on a picture; options as in `begin`. Raises ValueError for unfit files, ArithmeticError for NaN."""
    job = begin(plan, sd, image, **options)
    latent, M, why = None, None, ""
    if "strength" in plan.settings and level_at(plan.settings["strength"], plan.settings.get("steps", 50)) == 0:
        M, _ = job.input("mask") if job.given_mask is not None else (None, None)
        job.verdict = "strength 0"
    else:
        M, _ = job.input("mask") if plan.masked else (None, None)
        if M is not None and M.any() and (box := square_around(job, M)):
            return edited_inside(job, M, box)
        if M is None or M.any():
            latent = finite(job.call("latent").result, "the edit")
            if "points" in plan.given and not job.evaluations[job.stage_of["latent"]]:  # nothing was asked of the model
                latent, why = None, f"no point goes to another cell of {sd.factor} pixels"
    if latent is None:
        why = why or nothing_to_edit(plan, job.verdict)
        warnings.warn(f"nothing to edit: {why}; the source comes back", stacklevel=3)
    return result_of(job, latent, M)


@alone
def execute_mask(settled: Plan, sd: "StableDiffusion", image: Picture, **options: Any) -> Result:
    """Run a plan as far as its mask; options as in `begin`."""
    if "mask" not in settled.functions:
        raise ValueError(f"{settled.method} finds no mask")
    job = begin(settled, sd, image, **options)
    M, _ = job.input("mask")
    if job.verdict == "no difference":
        warnings.warn(f"the mask is empty: {nothing_to_edit(settled, job.verdict)}", stacklevel=2)
    done = result_of(job, None, M)
    return replace(done, evaluations={"mask": done.evaluations["mask"]})


@alone
def execute_path(settled: Plan, sd: "StableDiffusion", image: Picture, **options: Any) -> Result:
    """Run a plan as far as its path; options as in `begin`. The result's image is the source."""
    job = begin(settled, sd, image, **options)
    job.input("path")
    done = result_of(job, None, None)
    return replace(done, evaluations={"encode": done.evaluations["encode"]}, verdict="encoded")


@alone
def execute_without_picture(
    settled: Plan, sd: "StableDiffusion", size: tuple[int | None, int | None], watch: Watch | None = None
) -> Result:
    """Run a plan that starts from noise; size: (width, height) in pixels, None: the training size."""
    check_fits(settled, sd.kind, sd.name)
    check_near(min((side for side in size if side), default=None), sd.side)
    job = Job(settled, sd, None, picture_size(*size, sd.side, sd.factor))
    job.watch = watch
    job.prepare()
    return result_of(job, finite(job.call("latent").result, "the sampling"), None)


# ---------------------------------------------------------------- before it


def begin(
    plan: Plan,
    sd: "StableDiffusion",
    image: Picture,
    *,
    steering: Steering | None = None,
    reuse: Sequence[Result] = (),
    watch: Watch | None = None,
    witness: Any = None,
    bitwise: bool = False,
) -> Job:
    """A job with its picture, texts and given mask in hand; errors as `edit`."""
    check_fits(plan, sd.kind, sd.name)
    check_takes_picture(plan)
    picture, at = open_picture(sd, image, plan.settings["size"])
    check_near(plan.settings["size"], sd.side)
    job = Job(plan, sd, picture, at)
    if (mask := plan.given.get("mask")) is not None:
        job.given_mask = images.latent_mask(mask, picture.size, at, sd.factor).to(sd.device)
    if steering and not plan.steerable:
        raise ValueError(f"{plan.method} has no mask that could be steered")
    job.steering = steering.at(picture.size, at, sd.factor) if steering else None
    for one in reuse:
        check_same(one, sd, picture, at)
    job.known, job.watch, job.bitwise = [call for one in reuse for call in one.calls], watch, bitwise
    job.witness = witness
    job.prepare(reuse[0].x0 if reuse else None)
    return job


def open_picture(sd: "StableDiffusion", image: Picture, size: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """The picture as RGB, and the (width, height) that the model works on."""
    picture = images.to_rgb(images.read_picture(image))
    side, grid = sd.side if size is None else size, getattr(getattr(sd, "unet", None), "grid", sd.factor)
    at = images.working_size(picture.size, side, sd.factor)
    if min(picture.size) >= grid and at != (few := images.working_size(picture.size, side, grid)):
        said = "{} x {} in place of {} x {}: compiled once for all pictures of about that shape".format(*few, *at)
        warnings.warn(f"the model works at {said}; the result has its picture's size", stacklevel=3)
        return picture, few
    return picture, at


def picture_size(width: int | None, height: int | None, side: int, factor: int) -> tuple[int, int]:
    """The size of a picture to be made. Raises ValueError for one that is too large, or no multiple of `factor`."""
    w = side if width is None else whole("width", width, 64, 16384)
    h = side if height is None else whole("height", height, 64, 16384)
    if w % factor or h % factor:
        raise ValueError(f"width and height must be multiples of {factor}, got {w} x {h}")
    if w * h > images.MOST_PIXELS:
        raise ValueError(f"at most 1024 x 1024 pixels are made, got {w} x {h}")
    return w, h


def check_near(size: int | None, side: int) -> None:
    """Warn of a size that the model was not trained at, nor near it."""
    if size is not None and not side / 1.5 <= size <= side * 1.5:
        effect = "things come twice" if size > side else "pictures come apart"
        warnings.warn(f"size {size} is far from the {side} pixels that the model knows: {effect} there", stacklevel=3)


def check_same(reuse: Result, sd: "StableDiffusion", picture: Image.Image, at: tuple[int, int]) -> None:
    if reuse.sd is not sd or reuse.settings["working_size"] != at:
        raise ValueError("reuse= holds a result by another model or at another working size (compiled: its own)")
    if reuse.source is None or reuse.source.size != picture.size or reuse.source.tobytes() != picture.tobytes():
        raise ValueError("reuse= holds a result of another picture")


# ---------------------------------------------------------------- crop, and the result


def square_around(job: Job, M: Tensor) -> tuple[int, int, int, int] | None:
    """The pixels (left, top, right, bottom) around a mask that the model works on alone, where that is asked for and
    shows them larger than the whole picture would: around all of it, else around its largest piece.
    """
    assert job.picture
    if not job.plan.settings.get("crop"):
        return None
    size, side = job.picture.size, 0
    cells = M.ge(min(HAZE, float(M.max()))).float()
    for inside in (cells, largest_piece(cells)):
        spans = [inside[0, 0].any(axis).nonzero() for axis in (0, 1)]
        ends = [(float(at.min()) * n / c, float(at.max() + 1) * n / c) for at, n, c in zip(spans, size, M.shape[:1:-1])]
        side = round(max(high - low for low, high in ends) * (1 + 2 * job.plan.settings["crop_margin"]))
        if (side := max(side, 8 * job.sd.factor)) <= MOST_CROPPED * min(size):
            left, top = (min(max(round((a + b - side) / 2), 0), n - side) for (a, b), n in zip(ends, size))
            if n := int((cells - inside).sum()):
                warnings.warn(f"crop edits the mask's largest piece; {n} other cells may stay", stacklevel=4)
            return left, top, left + side, top + side
    said = f"the mask and its margin take {side} of {min(size)} pixels: crop gains nothing, the whole is worked on"
    warnings.warn(said, stacklevel=4)
    return None


def edited_inside(job: Job, M: Tensor, box: tuple[int, int, int, int]) -> Result:
    """The same plan on the square alone, under the mask as it was found or given, and pasted back."""
    assert job.picture
    whole = result_of(job, None, M)
    places = {made: place for made, place in job.plan.functions.items() if made != "mask"}
    given = job.plan.given | {"mask": images.grey_picture(M, job.picture.size).crop(box)}
    mask = images.pixel_mask(job.plan.given.get("mask"), job.picture.size) if not job.steering else None
    given |= {"mask": mask[box[1] : box[3], box[0] : box[2]]} if mask is not None else {}
    plan = replace(job.plan, functions=places, given=given, settings=job.plan.settings | {"crop": False})
    if job.witness:
        job.witness.texts = {}  # the same run goes on, in the square
    inside = execute(plan, job.sd, job.picture.crop(box), watch=job.watch, witness=job.witness)
    image = job.picture.copy()
    image.paste(inside.image, box)
    pasted = Image.new("L", job.picture.size)
    pasted.paste(inside.paste_mask or 255, box)
    found: dict[str, Any] = {name: getattr(inside, name) for name in ("latent", "stages", "clean", "times")}
    for name in ("evaluations", "seconds"):
        one, two = getattr(whole, name), getattr(inside, name)
        found[name] = {key: one.get(key, 0) + two.get(key, 0) for key in one | two}
    settings = whole.settings | {"crop_box": [*box]}
    return replace(whole, image=image, paste_mask=pasted, settings=settings, inside=inside, **found)


def result_of(job: Job, latent: Tensor | None, M: Tensor | None) -> Result:
    """The pictures of a job and all that is known of it; latent None: nothing was edited."""
    plan, picture, sd = job.plan, job.picture, job.sd
    image, feathered = picture.copy() if picture else Image.new("RGB", job.at), None
    if M is None and plan.masked and (job.given_mask is not None or "mask" in plan.functions):
        M = torch.zeros_like(job.x0[:, :1])
    if latent is not None:
        with job.stage("vae decode"):
            shown = job.tensors.pop("pixels", None)  # of a method that decodes for itself
            shown = finite(sd.decode(latent) if shown is None else shown, "the VAE")
            image = images.to_picture(shown, picture.size if picture else job.at)
        if M is not None and picture and plan.settings["paste"]:
            feathered = images.paste_mask(M, picture.size)
            image = Image.composite(image, picture, feathered)
    if picture:
        image.info = dict(picture.info)
        job.stages["encode"] = [*job.values["path"][0].values()] if "path" in job.values else []
    job.values.clear()  # job.eps is among them: in a circle pictures would stay until Python sweeps
    decoding = job.stage_of["latent"]
    job.stages[decoding] = [*job.stages.get(decoding, []), latent] if latent is not None else []
    sought = "computed" if "mask" in plan.functions else "everywhere"
    kind = "none" if M is None else sought if job.given_mask is None else "given"
    settings = plan.record | {"working_size": job.at} | ({"mask": kind} if picture else {})
    used = {id(call) for call in job.calls}
    calls = [*(call for call in job.known if id(call) not in used), *job.calls][-MOST_CALLS:]
    settings |= {"steering": said} if job.steering and (said := job.steering.settings()) else {}
    kept = ("stages", "clean", "times", "tensors", "verdict", "evaluations", "seconds", "given_mask", "steering")
    return Result(
        method=plan.method,
        settings=settings,
        source=picture,
        image=image,
        mask=None if M is None or picture is None else images.mask_picture(M, picture.size),
        paste_mask=feathered,
        x0=job.x0 if picture else None,
        latent=job.x0 if latent is None else latent,
        latent_mask=M,
        plan=plan,
        calls=tuple(calls),
        sd=sd,
        witness=job.witness,
        **{name: getattr(job, name) for name in kept},
    )
