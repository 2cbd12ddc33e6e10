"""The usual figures of an edit, each by one call: what the threshold, the strength, the mask and the steps do.

Every figure gives its page and the numbers behind it. Pages are laid out as contact sheets are; curves are drawn by
matplotlib, an extra, which is imported only where there is one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import preview
from ..arms import arm
from ..ddim import level_at, levels, whole
from ..diffedit import Track
from ..editor import Edit, Picture, check_settings, edit, open_picture, predicted_rows
from ..files.images import grey_picture, to_picture
from ..many.metrics import psnr
from .layout import Page, Panel
from .sheet import (
    DEFAULTS,
    MOST_CELLS,
    coverage,
    edit_all,
    masked,
    notes,
    page_height,
    result,
    sheet_rows,
    title,
    total,
    value,
)

if TYPE_CHECKING:
    from ..sd import StableDiffusion

# Name -> what it shows, and the values along it by default.
FIGURES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "threshold": ("coverage, masks and edits over the mask threshold", (0.2, 0.35, 0.5, 0.65, 0.8)),
    "strength": ("edits over the strength, and how far they leave the source", (0.2, 0.4, 0.6, 0.8, 1.0)),
    "mask": ("the edit with and without mask, from random noise and from the encoding", ()),
    "latents": ("encoding and decoding level by level, as latents and as predicted x_0", ()),
    "reconstruction": ("what encoding and decoding under one text lose, over the steps", (10, 20, 50, 100)),
}
CURVES = ("threshold", "strength", "reconstruction")
SHOWN_LEVELS = 8


@dataclass(frozen=True, eq=False)
class Figure:
    """image: the page, PIL RGB; numbers: what it shows, as plain lists by name; edits: in the page's order, row by row;
    evaluations (model rows) and seconds by stage; settings: those that all edits share.
    """

    image: Image.Image
    numbers: dict[str, Any]
    edits: tuple[Edit, ...] = field(repr=False)
    evaluations: dict[str, int]
    seconds: dict[str, float]
    settings: dict[str, Any]


def figure(
    sd: "StableDiffusion",
    image: Picture,
    name: str,
    *,
    target: str = "",
    values: Sequence[Any] | None = None,
    height: int | None = None,
    decode: bool = False,
    track: Track | None = None,
    **options: Any,
) -> Figure:
    """The figure `name`, of FIGURES. values: along it, instead of the usual ones ("latents": levels); options: the
    other arguments of `edit`; height: of a picture on the page, in pixels; decode: latents shown by the autoencoder
    instead of the linear map of `preview`.

    "mask" shows four arms of the paper's ablation (2210.11427, section 4), "reconstruction" has a row for each number
    of calls a step, 1 to `refine` (here 2 by default). Model rows: `figure_rows`. Raises ValueError for arguments it
    cannot use and where matplotlib is missing, ArithmeticError for NaN.
    """
    settings, points = planned_figure(name, {"target": target, **options}, values)
    picture, at = open_picture(sd, image, settings["size"])
    draw = {"threshold": threshold, "strength": strength, "mask": with_and_without, "reconstruction": reconstruction}
    if name == "latents":
        page, numbers, edits = latents(sd, picture, settings, points, decode, track)
    else:
        page, numbers, edits = draw[name](sd, picture, settings, points, track)
    costs, seconds = total(one.evaluations for one in edits), total(one.seconds for one in edits)
    shown = {key: one for key, one in settings.items() if key not in (VARIED.get(name), *UNUSED.get(name, ()))}
    heading = {"title": title(shown), "notes": notes(shown, costs), "height": height or page_height(picture.size)}
    record = {key: one for key, one in settings.items() if key != VARIED.get(name)}
    record |= {"working_size": at, "figure": name, "values": points}
    return Figure(page(**heading).draw(), numbers, tuple(edits), costs, seconds, record)


# What a figure's values are of, and what it does not use.
VARIED = {"threshold": "mask_threshold", "strength": "strength", "reconstruction": "steps"}
UNUSED = {
    "reconstruction": ("refine", "guidance_scale", "maps", "mask_strength", "mask_clip", "mask_threshold", "seed"),
}
Drawn = tuple[Callable[..., Page], dict[str, Any], list[Edit]]


def planned_figure(
    name: str, options: dict[str, Any], values: Sequence[Any] | None
) -> tuple[dict[str, Any], list[Any]]:
    """The checked arguments of `edit` and the values along the figure; errors as `figure`, before a model is needed."""
    if name not in FIGURES:
        raise ValueError(f"a figure must be one of {', '.join(FIGURES)}, got {name!r}")
    if name in CURVES and find_spec("matplotlib") is None:
        raise ValueError(f"the figure {name} needs matplotlib: pip install 'minidiffedit[figures]'")
    if strange := options.keys() - DEFAULTS.keys() - {"target"}:
        raise ValueError(f"{', '.join(sorted(strange))}: no argument of edit")
    if (varied := VARIED.get(name)) in options:
        raise ValueError(f"the figure {name} varies {varied}; give the values along it instead")
    settings = check_settings(DEFAULTS | ({"refine": 2} if name == "reconstruction" else {}) | options)
    points = sorted({*(FIGURES[name][1] if values is None else values)})
    if name == "mask" and points:
        raise ValueError("the figure mask has no values along it")
    if name == "latents":
        K = level_at(settings["strength"], settings["steps"])
        points = points or sorted({round(i * K / (SHOWN_LEVELS - 1)) for i in range(SHOWN_LEVELS)})
        points = [whole("level", point, 0, K) for point in points]
    elif not points and name != "mask":
        raise ValueError(f"the figure {name} needs values along it")
    if len(points) > MOST_CELLS:
        raise ValueError(f"a figure holds at most {MOST_CELLS} values, got {len(points)}")
    if varied:
        for point in points:
            check_settings(settings | {varied: point})
    return settings, points


def figure_rows(name: str, settings: dict[str, Any], points: Sequence[Any]) -> dict[str, int]:
    """The model rows by stage, from what `planned_figure` returned, where every edit finds something to edit."""
    if name in ("threshold", "strength"):
        return sheet_rows([settings | {VARIED[name]: point} for point in points])
    each = predicted_rows(settings)
    if name == "mask":
        full = predicted_rows(settings, given=True)  # without a mask, equal texts edit all the same
        return {"mask": each["mask"], "encode": full["encode"], "decode": 2 * (each["decode"] + full["decode"])}
    if name == "latents":
        return each
    K = [level_at(settings["strength"], steps) for steps in points]
    refine = settings["refine"]
    return {"mask": 0, "encode": sum(K) * refine * (refine + 1) // 2, "decode": sum(K) * refine}


# ---------------------------------------------------------------- the figures


def threshold(sd: Any, picture: Image.Image, settings: dict[str, Any], points: list[Any], track: Any) -> Drawn:
    edits = edit_all(sd, picture, [settings | {"mask_threshold": point} for point in points], track=track)
    heat = edits[0].heat
    grid = [round(i / 100, 2) for i in range(101)]
    shares = [0.0 if heat is None else float((heat > t).float().mean()) for t in grid]
    marked = [one.coverage for one in edits]

    def page(height: int, **heading: Any) -> Page:
        curve = plot(
            height, "mask threshold", "share of the picture", [("", grid, shares)], marks=[(points, marked)], low=0
        )
        head = [Panel(picture, "source"), *heat_panel(edits[0]), Panel(curve, drawn=True)]
        rows = [[Panel(masked(one), coverage(one)) for one in edits], [result(one) for one in edits]]
        top = [("threshold", value(point)) for point in points]
        return Page(**heading, head=head, grid=rows, left=[("", "mask"), ("", "edit")], top=top, height=height)

    return page, {"threshold": grid, "coverage": shares, "edited": {"threshold": points, "coverage": marked}}, edits


def strength(sd: Any, picture: Image.Image, settings: dict[str, Any], points: list[Any], track: Any) -> Drawn:
    edits = edit_all(sd, picture, [settings | {"strength": point} for point in points], track=track)
    chosen = max(edits, key=lambda one: one.coverage)
    inside = np.asarray(chosen.mask) > 0
    kept = {
        "inside the mask": [psnr(one.image, picture, inside) for one in edits],
        "whole picture": [psnr(one.image, picture) for one in edits],
    }

    def page(height: int, **heading: Any) -> Page:
        lines = [(label, points, dbs) for label, dbs in kept.items()]
        curve = plot(height, "strength", "PSNR to the source, dB", lines, dots=True)
        head = [
            Panel(picture, "source"),
            *heat_panel(chosen),
            Panel(masked(chosen), coverage(chosen)),
            Panel(curve, drawn=True),
        ]
        row = [Panel(one.image, decibels(db)) for one, db in zip(edits, kept["inside the mask"])]
        top = [("strength", value(point)) for point in points]
        return Page(**heading, head=head, grid=[row], left=[], top=top, height=height)

    numbers = {"strength": points} | {f"psnr {label}": [finite(db) for db in dbs] for label, dbs in kept.items()}
    return page, numbers, edits


def with_and_without(sd: Any, picture: Image.Image, settings: dict[str, Any], points: list[Any], track: Any) -> Drawn:
    named = {"both": "DiffEdit", "mask": "mask alone", "encode": "encoding alone", "sdedit": "SDEdit"}
    made: dict[str, Edit] = {}
    for name in named:
        made[name] = arm(sd, picture, name, reuse=[*made.values()], track=track, **settings)  # type: ignore[arg-type]
    both = made["both"]
    outside = np.asarray(both.mask) == 0
    kept = {name: psnr(one.image, picture, outside) for name, one in made.items()}

    def page(height: int, **heading: Any) -> Page:
        def panel(name: str) -> Panel:
            return Panel(made[name].image, f"{named[name]}, {decibels(kept[name])}")

        rows = [[panel("sdedit"), panel("mask")], [panel("encode"), panel("both")]]
        head = [Panel(picture, "source"), *heat_panel(both), Panel(masked(both), coverage(both))]
        left, top = [("from", "noise"), ("from", "encoding")], [("", "without mask"), ("", "with mask")]
        heading["notes"] += " dB: PSNR to the source outside the mask."
        return Page(**heading, head=head, grid=rows, left=left, top=top, height=height)

    order = ("sdedit", "mask", "encode", "both")
    numbers = {"arm": [*order], "psnr outside the mask": [finite(kept[name]) for name in order]}
    return page, numbers, [made[name] for name in order]


def latents(
    sd: Any, picture: Image.Image, settings: dict[str, Any], points: list[int], decode: bool, track: Any
) -> Drawn:
    done = edit(sd, picture, track=track, **settings)
    x, a = done.trajectory, levels(settings["steps"]).a
    y = dict(zip(range(max(x), -1, -1), done.decoded))
    points = [j for j in points if j in x] or [0]
    clean_x = {j: preview.predicted_x0(x[j - 1], x[j], a[j - 1], a[j]) if j else x[0] for j in points}
    clean_y = {
        j: preview.decoded_x0(y[j], y[j - 1], x[j - 1], x[0], done.latent_mask, a[j], a[j - 1]) if j else y[0]
        for j in points if j in y
    }  # fmt: skip
    far = {j: (y[j] - x[j]).abs().mean(dim=1, keepdim=True) for j in points if j in y}
    most = max((float(one.max()) for one in far.values()), default=0.0) or 1.0
    known = preview.fit(done.x0, picture)

    def shown(latent: Tensor) -> Panel:
        if decode:
            return Panel(to_picture(sd.decode(latent)))
        small = preview.apply(known, latent)
        return Panel(small.resize((small.width * sd.factor, small.height * sd.factor), Image.Resampling.NEAREST))

    def page(**heading: Any) -> Page:
        head = [Panel(picture, "source"), Panel(masked(done), coverage(done)), Panel(done.image, "edit")]
        rows = [[shown(x[j]) for j in points], [shown(clean_x[j]) for j in points]]
        left = [("encoded", "x_j"), ("its predicted", "x_0")]
        if y:
            rows += [[shown(y[j]) for j in points], [shown(clean_y[j]) for j in points]]
            rows += [[Panel(grey_picture(far[j] / most, at), f"{float(far[j].mean()):.2f}") for j in points]]
            left += [("decoded", "y_j"), ("its predicted", "x_0"), ("difference", "|y_j - x_j|")]
        top = [(f"t = {levels(settings['steps']).t[j]}", f"level {j}") for j in points]
        how = "by the autoencoder" if decode else f"by a linear map that explains {known.explained:.0%} of the source"
        heading["notes"] += f" Encoding runs to the right, decoding back to the left; latents shown {how}."
        return Page(**heading, head=head, grid=rows, left=left, top=top)

    at = (done.x0.shape[3] * sd.factor, done.x0.shape[2] * sd.factor)
    numbers = {"level": points, "mean difference": [float(far[j].mean()) for j in points if j in far]}
    return page, numbers, [done]


def reconstruction(sd: Any, picture: Image.Image, settings: dict[str, Any], points: list[Any], track: Any) -> Drawn:
    """Errors against x_0 and against its decoding, so that the autoencoder's own loss is left out."""
    made: dict[tuple[int, int], Edit] = {}
    passes = [*range(1, settings["refine"] + 1)]
    for refine in passes:
        for steps in points:
            changed = settings | {"steps": steps, "refine": refine}
            made[refine, steps] = arm(sd, picture, "reconstruction", reuse=[*made.values()][:1], track=track, **changed)
    x0 = made[1, points[0]].x0
    with torch.no_grad():
        at_best = to_picture(sd.decode(x0), picture.size)
    errors = {k: float((one.latent - x0).norm() / x0.norm()) for k, one in made.items()}
    dbs = {k: psnr(one.image, at_best) if one.decoded else math.inf for k, one in made.items()}

    def page(height: int, **heading: Any) -> Page:
        calls = {refine: f"{refine} call{'s' * (refine > 1)} a step" for refine in passes}
        lines = [(calls[refine], points, [errors[refine, steps] for steps in points]) for refine in passes]
        curve = plot(height, "steps", "error of the latent", lines, dots=True, log=True)
        best = Panel(at_best, f"autoencoder, {decibels(psnr(at_best, picture))}")
        rows = [[Panel(made[k, n].image, f"{errors[k, n]:.1e}, {decibels(dbs[k, n])}") for n in points] for k in passes]
        heading["title"] = "Reconstruction: encoded and decoded under the same text, no guidance"
        heading["notes"] += " Error: |y_0 - x_0| / |x_0|; dB: PSNR to what the autoencoder makes of the source."
        left, top = [("refine", str(k)) for k in passes], [("steps", str(n)) for n in points]
        head = [Panel(picture, "source"), best, Panel(curve, drawn=True)]
        return Page(**heading, head=head, grid=rows, left=left, top=top, height=height)

    numbers: dict[str, Any] = {"steps": points, "psnr of the autoencoder": finite(psnr(at_best, picture))}
    for k in passes:
        numbers[f"refine {k}"] = {
            "latent error": [errors[k, n] for n in points], "psnr": [finite(dbs[k, n]) for n in points]
        }  # fmt: skip
    return page, numbers, [*made.values()]


# ---------------------------------------------------------------- pieces


def heat_panel(one: Edit) -> list[Panel]:
    return [] if one.heat is None else [Panel(grey_picture(one.heat, one.source.size), "where the texts differ")]


def decibels(db: float) -> str:
    return f"{db:.1f} dB" if math.isfinite(db) else "equal" if db > 0 else "none"


def finite(db: float) -> float | None:
    """For JSON, which has no infinity: None where two pictures are equal."""
    return db if math.isfinite(db) else None


Line = tuple[str, Sequence[float], Sequence[float]]


def plot(
    height: int, x: str, y: str, lines: Sequence[Line], *, marks: Sequence[tuple[Any, Any]] = (), dots: bool = False,
    log: bool = False, low: float | None = None,
) -> Image.Image:  # fmt: skip
    """Curves (label, xs, ys) and marked points on one pair of axes -> PIL RGB, 1.8 times as wide as high; never so
    small that its letters could not be read.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import NullLocator, ScalarFormatter

    scale = max(height, 144) / 192
    font = 8 * max(1, 1 / scale)  # small pages keep legible letters
    drawn = Canvas(figsize=(3.456, 1.92), dpi=100 * scale, layout="constrained")
    axes = drawn.add_subplot()
    log = log and any(0 < b < math.inf for _, _, ys in lines for b in ys)
    for (label, xs, ys), style in zip(lines, ("o-", "s--", "^-.", "d:") * len(lines)):
        kept = [(a, b) for a, b in zip(xs, ys) if math.isfinite(b) and (b > 0 or not log)]
        axes.plot(*zip(*kept) if kept else ([], []), style if dots else "-", label=label, markersize=3, linewidth=1.2)
    for xs, ys in marks:
        axes.plot(xs, ys, "o", markersize=4, color="black")
    if log:
        axes.set(xscale="log", yscale="log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(sorted({n for _, xs, _ in lines for n in xs}))
    axes.set_xlabel(x, fontsize=font)
    axes.set_ylabel(y, fontsize=font)
    if low is not None:
        axes.set_ylim(bottom=low)
    axes.tick_params(which="both", labelsize=font - 1)
    axes.grid(True, linewidth=0.3, color="#cccccc")
    axes.spines[["top", "right"]].set_visible(False)
    if any(label for label, _, _ in lines):
        axes.legend(fontsize=font - 1, frameon=False)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
