"""The usual figures of DiffEdit, each by one call: what the threshold, the strength, the mask and the steps do.

Every figure gives its page and the numbers behind it. Pages are laid out as contact sheets are; curves are drawn by
matplotlib, an extra, which is imported only where there is one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..ddim import level_at, whole
from ..files.images import grey_picture, to_picture
from ..many.metrics import psnr
from ..run import Picture, Plan, Result, blank_plan, open_picture
from . import previews, sheet
from .layout import Page, Panel
from .sheet import coverage, masked, value

if TYPE_CHECKING:
    from ..sd import StableDiffusion


class Kind(NamedTuple):
    """What a figure shows, the usual values along it, the option that they are values of, whether it has a curve."""

    about: str
    points: tuple[Any, ...] = ()
    varies: str = ""
    curve: bool = False


FIGURES = {
    "threshold": Kind("masks and edits over the mask threshold", (0.2, 0.35, 0.5, 0.65, 0.8), "mask_threshold", True),
    "strength": Kind("edits over the strength, and their distance", (0.2, 0.4, 0.6, 0.8, 1.0), "strength", True),
    "mask": Kind("the edit with and without mask, from random noise and from the encoding"),
    "latents": Kind("encoding and decoding level by level, as latents and as predicted x_0"),
    "reconstruction": Kind("what encoding and decoding under one text lose", (10, 20, 50, 100), "steps", True),
}
ARMS = {"diffedit": "DiffEdit", "mask-only": "mask alone", "encode-only": "encoding alone", "sdedit": "SDEdit"}
SHOWN_LEVELS = 8


class PlannedFigure(NamedTuple):
    """A figure to be made: its name, its edits, the values along it, what all edits share."""

    name: str
    plans: list[Plan]
    points: list[Any]
    settings: dict[str, Any]


class Made(NamedTuple):
    """What is drawn: the edits in order of the points along the figure, of a picture, and how."""

    sd: "StableDiffusion"
    picture: Image.Image
    edits: list[Any]
    points: list[Any]
    height: int
    decode: bool


@dataclass(frozen=True, eq=False)
class Figure:
    """image: the page, PIL RGB; numbers: what it shows, as plain lists by name; edits: in the order of the values;
    evaluations (model rows) and seconds by stage; settings: those that all edits share.
    """

    image: Image.Image
    numbers: dict[str, Any]
    edits: tuple[Result, ...] = field(repr=False)
    evaluations: dict[str, int]
    seconds: dict[str, float]
    settings: dict[str, Any]


def figure(
    sd: "StableDiffusion",
    image: Picture,
    name: str,
    *,
    values: Sequence[Any] | None = None,
    height: int | None = None,
    decode: bool = False,
    watch: Any = None,
    **arguments: Any,
) -> Figure:
    """The figure `name`, of FIGURES. values: along it, instead of the usual ones ("latents": levels); arguments: those
    of `edit`; height: of a picture on the page, in pixels; decode: latents are shown by the autoencoder.

    "mask" shows four arms of the paper's ablation (2210.11427, section 4), "reconstruction" has a row for each number
    of calls a step, 1 to `refine` (here 2 by default). Raises ValueError for arguments it cannot use and where
    matplotlib is missing, ArithmeticError for NaN.
    """
    return draw_figure(planned_figure(name, values, **arguments), sd, image, height, decode, watch)


def planned_figure(name: str, values: Sequence[Any] | None = None, **arguments: Any) -> PlannedFigure:
    """A figure before a model is needed; arguments and errors as of `figure`."""
    if name not in FIGURES:
        raise ValueError(f"a figure must be one of {', '.join(FIGURES)}, got {name!r}")
    kind = FIGURES[name]
    if kind.curve and find_spec("matplotlib") is None:
        raise ValueError(f"the figure {name} needs matplotlib: pip install 'minidiffedit[figures]'")
    if kind.varies in arguments:
        raise ValueError(f"the figure {name} varies {kind.varies}; give the values along it instead")
    points = sorted({*(kind.points if values is None else values)})
    if name == "mask" and points:
        raise ValueError("the figure mask has no values along it")
    if not points and kind.varies:
        raise ValueError(f"the figure {name} needs values along it")
    if len(points) > sheet.MOST_CELLS:
        raise ValueError(f"a figure holds at most {sheet.MOST_CELLS} values, got {len(points)}")
    plans = sheet.plan_all(cells(name, points, arguments))
    if name == "latents":
        K = level_at(plans[0].settings["strength"], plans[0].settings["steps"])
        points = points or sorted({round(i * K / (SHOWN_LEVELS - 1)) for i in range(SHOWN_LEVELS)})
        points = [whole("level", point, 0, K) for point in points]
    return PlannedFigure(name, plans, points, sheet.shared(plans[:1] if name == "mask" else plans, kind.varies))


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
    planned: PlannedFigure,
    sd: "StableDiffusion",
    image: Picture,
    height: int | None = None,
    decode: bool = False,
    watch: Any = None,
) -> Figure:
    """Run what was planned and draw it; arguments as of `figure`."""
    name, plans, points, settings = planned
    picture, at = open_picture(sd, image, settings["size"])
    edits = sheet.run_all(sd, picture, plans, watch=watch)
    made = Made(sd, picture, edits, points, height or sheet.page_height(picture.size), decode)
    draw = {"threshold": threshold, "strength": strength, "mask": with_and_without, "reconstruction": reconstruction}
    parts, numbers = draw.get(name, latents)(made)
    paid, seconds = sheet.paid_for(edits)
    parts = {"title": sheet.title(settings)} | parts | {"height": made.height}
    parts["notes"] = sheet.notes(settings, paid) + parts.get("notes", "")
    settings = settings | {"working_size": at, "figure": name, "values": points}
    return Figure(Page(**parts).draw(), numbers, tuple(edits), paid, seconds, settings)


# ---------------------------------------------------------------- the figures: parts of the page, and the numbers

Parts = dict[str, Any]
Drawn = tuple[Parts, Parts]


def threshold(made: Made) -> Drawn:
    points, edits = made.points, made.edits
    heat = edits[0].heat
    grid = [round(i / 100, 2) for i in range(101)]
    shares = [0.0 if heat is None else float((heat > t).float().mean()) for t in grid]
    marked = [one.coverage or 0.0 for one in edits]
    curve = plot(made.height, "mask threshold", "share of the picture", [("", grid, shares)], marks=(points, marked))
    head = [Panel(made.picture, "source"), *sheet.heat_panel(edits[0]), Panel(curve, drawn=True)]
    rows = [[Panel(masked(one), coverage(one)) for one in edits], [sheet.result(one) for one in edits]]
    left, top = [("", "mask"), ("", "edit")], [("threshold", value(point)) for point in points]
    numbers = {"threshold": grid, "coverage": shares, "edited": {"threshold": points, "coverage": marked}}
    return {"head": head, "grid": rows, "left": left, "top": top}, numbers


def strength(made: Made) -> Drawn:
    points, edits, picture = made.points, made.edits, made.picture
    chosen = max(edits, key=lambda one: one.coverage or 0)
    inside = np.asarray(chosen.mask) > 0
    kept = {"inside the mask": [psnr(one.image, picture, inside) for one in edits]}
    kept |= {"whole picture": [psnr(one.image, picture) for one in edits]}
    lines = [(label, points, dbs) for label, dbs in kept.items()]
    curve = plot(made.height, "strength", "PSNR to the source, dB", lines)
    head = [Panel(picture, "source"), *sheet.heat_panel(chosen), Panel(masked(chosen), coverage(chosen))]
    row = [Panel(one.image, decibels(db)) for one, db in zip(edits, kept["inside the mask"])]
    parts = {
        "head": [*head, Panel(curve, drawn=True)],
        "grid": [row],
        "left": [],
        "notes": " dB: PSNR inside the mask.",
    }
    numbers = {f"psnr {label}": [finite(db) for db in dbs] for label, dbs in kept.items()}
    return parts | {"top": [("strength", value(point)) for point in points]}, {"strength": points} | numbers


def with_and_without(made: Made) -> Drawn:
    arms = dict(zip(ARMS, made.edits))
    both = arms["diffedit"]
    outside = np.asarray(both.mask) == 0
    kept = {name: psnr(one.image, made.picture, outside) for name, one in arms.items()}
    panels = {name: Panel(one.image, f"{ARMS[name]}, {decibels(kept[name])}") for name, one in arms.items()}
    rows = [[panels["sdedit"], panels["mask-only"]], [panels["encode-only"], panels["diffedit"]]]
    parts: Parts = {
        "head": [Panel(made.picture, "source"), *sheet.heat_panel(both), Panel(masked(both), coverage(both))]
    }
    parts |= {"grid": rows, "left": [("from", "noise"), ("from", "encoding")]}
    top, notes = [("", "without mask"), ("", "with mask")], " dB: PSNR to the source outside the mask."
    numbers = {"arm": [*ARMS], "psnr outside the mask": [finite(db) for db in kept.values()]}
    return parts | {"top": top, "notes": notes}, numbers


def latents(made: Made) -> Drawn:
    (done,), sd, walked = made.edits, made.sd, previews.walk(made.edits[0])
    chosen = [one for one in walked if one.j in made.points] or walked[:1]
    known, at = previews.fit(done.x0, made.picture), done.settings["working_size"]

    def shown(latent: Tensor) -> Panel:
        picture = to_picture(sd.decode(latent.float())) if made.decode else previews.apply(known, latent)
        return Panel(picture.resize(at, Image.Resampling.NEAREST))

    labels = {"x": ("encoded", "x_j"), "x_clean": ("its predicted", "x_0")}
    labels |= {"y": ("decoded", "y_j"), "y_clean": ("its predicted", "x_0")}
    labels = {name: label for name, label in labels.items() if name in chosen[0].shown}
    rows, left = [[shown(one.shown[name]) for one in chosen] for name in labels], [*labels.values()]
    far = [one.shown["apart"] for one in chosen if "apart" in one.shown]
    if far:
        most = max(float(one.max()) for one in far) or 1.0
        rows += [[Panel(grey_picture(one / most, at), f"{float(one.mean()):.2f}") for one in far]]
        left += [("difference", "|y_j - x_j|")]
    how = "by the autoencoder" if made.decode else f"by a linear map that explains {known.explained:.0%} of the source"
    head = [Panel(made.picture, "source"), Panel(masked(done), coverage(done)), Panel(done.image, "edit")]
    parts = {"head": head, "grid": rows, "left": left, "top": [(f"t = {one.t}", f"level {one.j}") for one in chosen]}
    notes = f" Encoding runs to the right, decoding back to the left; latents shown {how}."
    numbers = {"level": [one.j for one in chosen], "mean difference": [float(one.mean()) for one in far]}
    return parts | {"notes": notes}, numbers


def reconstruction(made: Made) -> Drawn:
    """Errors against x_0 and against its decoding, so that the autoencoder's own loss is left out."""
    points, edits, x0 = made.points, made.edits, made.edits[0].x0
    rows = [edits[i : i + len(points)] for i in range(0, len(edits), len(points))]
    with torch.no_grad():
        best = to_picture(made.sd.decode(x0), made.picture.size)
    errors = [[float((one.latent - x0).norm() / x0.norm()) for one in row] for row in rows]
    dbs = [[psnr(one.image, best) if one.decoded else math.inf for one in row] for row in rows]
    calls = [f"{refine} call{'s' * (refine > 1)} a step" for refine in range(1, len(rows) + 1)]
    lines = [(call, points, row) for call, row in zip(calls, errors)]
    curve = plot(made.height, "steps", "error of the latent", lines, log=True)
    limit = psnr(best, made.picture)
    head = [Panel(made.picture, "source"), Panel(best, f"autoencoder, {decibels(limit)}"), Panel(curve, drawn=True)]
    said = [[f"{error:.1e}, {decibels(db)}" for error, db in zip(*pair)] for pair in zip(errors, dbs)]
    grid = [[Panel(one.image, words) for one, words in zip(*pair)] for pair in zip(rows, said)]
    parts = {
        "title": "Reconstruction: encoded and decoded under the same text, no guidance",
        "head": head,
        "grid": grid,
    }
    parts |= {"left": [("refine", str(i + 1)) for i in range(len(rows))], "top": [("steps", str(n)) for n in points]}
    parts |= {"notes": " Error: |y_0 - x_0| / |x_0|; dB: PSNR to what the autoencoder makes of the source."}
    numbers: Parts = {"steps": points, "psnr of the autoencoder": finite(limit)}
    for i, (error, db) in enumerate(zip(errors, dbs), 1):
        numbers[f"refine {i}"] = {"latent error": error, "psnr": [finite(one) for one in db]}
    return parts, numbers


# ---------------------------------------------------------------- pieces


def decibels(db: float) -> str:
    return f"{db:.1f} dB" if math.isfinite(db) else "equal" if db > 0 else "none"


def finite(db: float) -> float | None:
    """For JSON, which has no infinity: None where two pictures are equal."""
    return db if math.isfinite(db) else None


Line = tuple[str, Sequence[float], Sequence[float]]


def plot(height: int, x: str, y: str, lines: Sequence[Line], *, marks: Any = None, log: bool = False) -> Image.Image:
    """Curves (label, xs, ys), dotted unless there are marks (xs, ys), on one pair of axes -> PIL RGB, 1.8 times as wide
    as high; never so small that its letters could not be read.
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
        axes.plot(*zip(*kept) if kept else ([], []), "-" if marks else style, label=label, markersize=3, linewidth=1.2)
    if marks:
        axes.plot(*marks, "o", markersize=4, color="black")
        axes.set_ylim(bottom=0)
    if log:
        axes.set(xscale="log", yscale="log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(sorted({n for _, xs, _ in lines for n in xs}))
    axes.set_xlabel(x, fontsize=font)
    axes.set_ylabel(y, fontsize=font)
    axes.tick_params(which="both", labelsize=font - 1)
    axes.grid(True, linewidth=0.3, color="#cccccc")
    axes.spines[["top", "right"]].set_visible(False)
    if any(label for label, _, _ in lines):
        axes.legend(fontsize=font - 1, frameon=False)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
