"""The usual figures of DiffEdit, each by one call: what the threshold, the strength, the mask and the steps do.

Every figure gives its page and the numbers behind it. Pages are laid out as contact sheets are; curves are drawn by
matplotlib, an extra, which is imported only where there is one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..ddim import level_at, whole
from ..files.images import grey_picture, to_picture
from ..many.metrics import psnr
from ..plans import Plan, blank_plan
from ..run import Picture, open_picture
from . import previews, sheet
from .layout import Page, Panel
from .sheet import Sheet, coverage, masked, value


class Kind(NamedTuple):
    """The usual values along a figure, and the option that they are values of; those that have one draw a curve."""

    points: tuple[Any, ...] = ()
    varies: str = ""


FIGURES = {
    "threshold": Kind((0.2, 0.35, 0.5, 0.65, 0.8), "mask_threshold"),
    "strength": Kind((0.2, 0.4, 0.6, 0.8, 1.0), "strength"),
    "mask": Kind(),
    "latents": Kind(),
    "reconstruction": Kind((10, 20, 50, 100), "steps"),
}
ARMS = {"diffedit": "DiffEdit", "mask-only": "mask alone", "encode-only": "encoding alone", "sdedit": "SDEdit"}
SHOWN_LEVELS = 8
Parts = dict[str, Any]


class PlannedFigure(NamedTuple):
    """A figure to be made: its name, its edits, the values along it, what all edits share."""

    name: str
    plans: list[Plan]
    points: list[Any]
    settings: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Figure(Sheet):
    """A sheet, its edits in one row in the order of the values; numbers: what it shows, as plain lists by name."""

    numbers: dict[str, Any] = field(repr=False)


def figure(sd: Any, image: Picture, name: str, values: Sequence[Any] | None = None, **arguments: Any) -> Figure:
    """The figure `name`, of FIGURES. values: along it, instead of the usual ones ("latents": levels); arguments: those
    of `edit`, and height: of a picture on the page, in pixels; decode: latents are shown by the autoencoder; watch.

    "mask" shows four arms of the paper's ablation (2210.11427, section 4), "reconstruction" has a row for each number
    of calls a step, 1 to `refine` (here 2 by default). Raises ValueError for arguments it cannot use and where
    matplotlib is missing, ArithmeticError for NaN.
    """
    how = {key: arguments.pop(key) for key in ("height", "decode", "watch") if key in arguments}
    return draw_figure(planned_figure(name, values, **arguments), sd, image, **how)


def planned_figure(name: str, values: Sequence[Any] | None = None, **arguments: Any) -> PlannedFigure:
    """A figure before a model is needed; arguments and errors as of `figure`."""
    if name not in FIGURES:
        raise ValueError(f"a figure must be one of {', '.join(FIGURES)}, got {name!r}")
    usual, varies = FIGURES[name]
    if varies and find_spec("matplotlib") is None:
        raise ValueError(f"the figure {name} needs matplotlib: pip install 'minidiffedit[figures]'")
    if varies in arguments:
        raise ValueError(f"the figure {name} varies {varies}; give the values along it instead")
    points = sorted({*(usual if values is None else values)})
    if name == "mask" and points:
        raise ValueError("the figure mask has no values along it")
    if not points and varies:
        raise ValueError(f"the figure {name} needs values along it")
    if len(points) > sheet.MOST_CELLS:
        raise ValueError(f"a figure holds at most {sheet.MOST_CELLS} values, got {len(points)}")
    plans = sheet.plan_all(cells(name, points, arguments))
    if name == "latents":
        K = level_at(plans[0].settings["strength"], plans[0].settings["steps"])
        points = points or sorted({round(i * K / (SHOWN_LEVELS - 1)) for i in range(SHOWN_LEVELS)})
        points = [whole("level", point, 0, K) for point in points]
    return PlannedFigure(name, plans, points, sheet.shared(plans[:1] if name == "mask" else plans, varies))


def cells(name: str, points: Sequence[Any], arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each edit, its method among them."""
    if name == "mask":
        strength = blank_plan("diffedit").settings["strength"]
        return [{"strength": strength} | arguments | {"method": arm} for arm in ARMS]
    if name == "latents":
        return [arguments | {"method": "diffedit"}]
    if name != "reconstruction":
        return [arguments | {"method": "diffedit", FIGURES[name].varies: point} for point in points]
    diffedit, own = blank_plan("diffedit"), blank_plan(name)
    unused = {*diffedit.given, *diffedit.options}.difference(own.given, own.options)
    told = {key: one for key, one in arguments.items() if key not in unused} | {"method": name}
    passes = range(1, whole("refine", arguments.get("refine", 2), 1, 100) + 1)
    return [told | {"refine": refine, "steps": steps} for refine in passes for steps in points]


def draw_figure(
    found: PlannedFigure, sd: Any, image: Picture, height: int | None = None, decode: bool = False, watch: Any = None
) -> Figure:
    """Run what was planned and draw it; arguments as of `figure`."""
    picture, at = open_picture(sd, image, found.settings["size"])
    edits, height = sheet.run_all(sd, picture, found.plans, watch=watch), height or sheet.page_height(picture.size)
    draw = {"threshold": threshold, "strength": strength, "mask": with_and_without, "reconstruction": reconstruction}
    draw["latents"] = partial(latents, decode=decode)
    parts, numbers = draw[found.name](edits, found.points, height)
    paid, seconds = sheet.paid_for(edits)
    parts = Parts(title=sheet.title(found.settings), left=[]) | parts
    parts["notes"] = sheet.notes(found.settings, paid) + parts.get("notes", "")
    parts["head"] = [Panel(picture, "source"), *parts["head"]]
    settings = found.settings | {"working_size": at, "figure": found.name, "values": found.points}
    return Figure(Page(**parts, height=height).draw(), tuple(edits), paid, seconds, settings, numbers)


# ---------------------------------------------------------------- the figures: parts of the page, and the numbers


def threshold(edits: list[Any], points: list[Any], height: int) -> tuple[Parts, Parts]:
    heat, grid = edits[0].heat, [round(i / 100, 2) for i in range(101)]
    shares = [0.0 if heat is None else float((heat > t).float().mean()) for t in grid]
    marked = [one.coverage or 0.0 for one in edits]
    curve = plot(height, "mask threshold", "share of the picture", [("", grid, shares)], marks=(points, marked))
    parts: Parts = {"head": [*sheet.heat_panel(edits[0]), curve], "left": [("", "mask"), ("", "edit")]}
    parts["grid"] = [[Panel(masked(one), coverage(one)) for one in edits], [sheet.result(one) for one in edits]]
    parts["top"] = [("threshold", value(point)) for point in points]
    return parts, {"threshold": grid, "coverage": shares, "edited": {"threshold": points, "coverage": marked}}


def strength(edits: list[Any], points: list[Any], height: int) -> tuple[Parts, Parts]:
    chosen = max(edits, key=lambda one: one.coverage or 0)
    inside = np.asarray(chosen.mask) > 0
    kept = {"inside the mask": [psnr(one.image, one.source, inside) for one in edits]}
    kept |= {"whole picture": [psnr(one.image, one.source) for one in edits]}
    curve = plot(height, "strength", "PSNR, dB", [(label, points, dbs) for label, dbs in kept.items()])
    parts: Parts = {"head": [*sheet.heat_panel(chosen), Panel(masked(chosen), coverage(chosen)), curve]}
    parts["grid"] = [[Panel(one.image, decibels(db)) for one, db in zip(edits, kept["inside the mask"])]]
    parts |= {"top": [("strength", value(point)) for point in points]}
    parts["notes"] = " dB: PSNR to the source, below the pictures inside the mask."
    return parts, {"strength": points} | {f"psnr {label}": [finite(db) for db in dbs] for label, dbs in kept.items()}


def with_and_without(edits: list[Any], points: list[Any], height: int) -> tuple[Parts, Parts]:
    both, outside = edits[0], np.asarray(edits[0].mask) == 0
    kept = [psnr(one.image, one.source, outside) for one in edits]
    said = [f"{name}, {decibels(db)}" for name, db in zip(ARMS.values(), kept)]
    diffedit, mask, encode, sdedit = (Panel(one.image, caption) for one, caption in zip(edits, said))
    parts: Parts = {"head": [*sheet.heat_panel(both), Panel(masked(both), coverage(both))]}
    parts |= {"grid": [[sdedit, mask], [encode, diffedit]], "left": [("from", "noise"), ("from", "encoding")]}
    parts |= {"top": [("", "without mask"), ("", "with mask")], "notes": " dB: PSNR to the source outside the mask."}
    return parts, {"arm": [*ARMS], "psnr outside the mask": [finite(db) for db in kept]}


def latents(edits: list[Any], points: list[int], height: int, decode: bool) -> tuple[Parts, Parts]:
    (done,), walked = edits, previews.walk(edits[0])
    chosen = [one for one in walked if one.j in points] or walked[:1]
    known, at = previews.fit(done.x0, done.source), done.settings["working_size"]

    def shown(latent: Tensor) -> Panel:
        picture = to_picture(done.sd.decode(latent.float())) if decode else previews.apply(known, latent)
        return Panel(picture.resize(at, Image.Resampling.NEAREST))

    labels = {"x": ("encoded", "x_j"), "x_clean": ("its predicted", "x_0")}
    labels |= {"y": ("decoded", "y_j"), "y_clean": ("its predicted", "x_0")}
    labels = {name: label for name, label in labels.items() if name in chosen[0].shown}
    rows, left = [[shown(one.shown[name]) for one in chosen] for name in labels], [*labels.values()]
    far = [one.shown["apart"].mean(dim=1, keepdim=True) for one in chosen if "apart" in one.shown]
    if far:
        most = max(float(one.max()) for one in far) or 1.0
        rows += [[Panel(grey_picture(one / most, at), f"{float(one.mean()):.2f}") for one in far]]
        left += [("difference", "|y_j - x_j|")]
    parts: Parts = {"head": [Panel(masked(done), coverage(done)), Panel(done.image, "edit")]}
    parts |= {"grid": rows, "left": left}
    parts["top"] = [(f"t = {one.t}", f"level {one.j}") for one in chosen]
    how = "by the autoencoder" if decode else f"by a linear map that explains {known.explained:.0%} of the source"
    parts["notes"] = f" Encoding runs to the right, decoding back to the left; latents shown {how}."
    return parts, {"level": [one.j for one in chosen], "mean difference": [float(one.mean()) for one in far]}


@torch.no_grad()
def reconstruction(edits: list[Any], points: list[int], height: int) -> tuple[Parts, Parts]:
    """Errors against x_0 and against its decoding, so that the autoencoder's own loss is left out."""
    source, x0 = edits[0].source, edits[0].x0
    best = to_picture(edits[0].sd.decode(x0), source.size)
    limit = psnr(best, source)
    head, grid, lines, numbers = [Panel(best, f"autoencoder, {decibels(limit)}")], [], list[Line](), Parts(steps=points)
    for refine, at in enumerate(range(0, len(edits), len(points)), 1):
        row = edits[at : at + len(points)]
        errors = [float((one.latent - x0).norm() / x0.norm()) for one in row]
        dbs = [psnr(one.image, best) if one.decoded else math.inf for one in row]
        lines.append((f"{refine} call{'s' * (refine > 1)} a step", points, errors))
        grid.append([Panel(one.image, f"{e:.1e}, {decibels(db)}") for one, e, db in zip(row, errors, dbs)])
        numbers[f"refine {refine}"] = {"latent error": errors, "psnr": [finite(db) for db in dbs]}
    head.append(plot(height, "steps", "error of the latent", lines, log=True))
    parts: Parts = {"title": "Reconstruction: encoded and decoded under the same text, no guidance", "head": head}
    parts |= {"grid": grid, "left": [("refine", str(i + 1)) for i in range(len(grid))]}
    parts |= {"top": [("steps", str(n)) for n in points]}
    parts["notes"] = " Error: |y_0 - x_0| / |x_0|; dB: PSNR to what the autoencoder makes of the source."
    return parts, numbers | {"psnr of the autoencoder": finite(limit)}


# ---------------------------------------------------------------- pieces


def decibels(db: float) -> str:
    return f"{db:.1f} dB" if math.isfinite(db) else "equal" if db > 0 else "none"


def finite(db: float) -> float | None:
    """For JSON, which has no infinity: None where two pictures are equal."""
    return db if math.isfinite(db) else None


Line = tuple[str, Sequence[float], Sequence[float]]


def plot(height: int, x: str, y: str, lines: Sequence[Line], *, marks: Any = None, log: bool = False) -> Panel:
    """Curves (label, xs, ys), dotted unless there are marks (xs, ys), on one pair of axes, 1.8 times as wide as high;
    never so small that its letters could not be read.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import NullLocator, ScalarFormatter

    scale = max(height, 144) / 192
    font = 8 * max(1, 1 / scale)  # small pages keep legible letters
    style: Any = {"font.size": font - 1, "axes.labelsize": font, "axes.grid": True, "grid.linewidth": 0.3}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.2}
    log = log and any(0 < b < math.inf for _, _, ys in lines for b in ys)
    with rc_context(style | {"grid.color": "#cccccc", "lines.markersize": 3}):
        drawn = Canvas(figsize=(3.456, 1.92), dpi=100 * scale, layout="constrained")
        axes = drawn.add_subplot(xlabel=x, ylabel=y)
        for (label, xs, ys), dots in zip(lines, ("o-", "s--", "^-.", "d:") * len(lines)):
            kept = [(a, b) for a, b in zip(xs, ys) if math.isfinite(b) and (b > 0 or not log)]
            axes.plot(*zip(*kept) if kept else ([], []), "-" if marks else dots, label=label)
        if marks:
            axes.plot(*marks, "o", markersize=4, color="black")
            axes.set_ylim(bottom=0)
        else:
            axes.legend()
        if log:
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(sorted({n for _, xs, _ in lines for n in xs}))
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_locator(NullLocator())
        canvas = FigureCanvasAgg(drawn)
        canvas.draw()
    return Panel(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), drawn=True)
