"""Contact sheets: one picture edited over two settings, from one encoding, on one page with labelled axes."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from ..diffedit import Track
from ..editor import Edit, Picture, check_settings, edit, open_picture, predicted_rows
from ..files.images import grey_picture
from .layout import Page, Panel
from ..files.states import ARGUMENTS

if TYPE_CHECKING:
    from ..sd import StableDiffusion
    from ..files.masks import Steering

# What can stand on an axis, and the values that stand there by default.
AXES: dict[str, tuple[Any, ...]] = {
    "strength": (0.4, 0.6, 0.8), "mask_threshold": (0.3, 0.5, 0.7), "guidance_scale": (3.0, 7.5, 12.0),
    "seed": (0, 1, 2), "mask_clip": (2.0, 3.0, 4.0),
}  # fmt: skip
OF_THE_MASK = ("mask_threshold", "mask_clip", "seed")  # of these, nothing but the mask depends
MOST_CELLS = 100
DEFAULTS = {name: inspect.signature(edit).parameters[name].default for name in ARGUMENTS if name != "target"}
Axis = tuple[str, Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Sheet:
    """image: the page, PIL RGB; edits[i][j]: row i, column j; rows, columns: (name, values); evaluations (model rows)
    and seconds by stage, of all edits together; settings: those that all share, both axes.
    """

    image: Image.Image
    edits: tuple[tuple[Edit, ...], ...] = field(repr=False)
    rows: Axis
    columns: Axis
    evaluations: dict[str, int]
    seconds: dict[str, float]
    settings: dict[str, Any]


def contact_sheet(
    sd: "StableDiffusion",
    image: Picture,
    *,
    target: str,
    rows: Axis = ("strength", AXES["strength"]),
    columns: Axis = ("mask_threshold", AXES["mask_threshold"]),
    mask: Picture | Tensor | None = None,
    steering: "Steering | None" = None,
    height: int | None = None,
    track: Track | None = None,
    **options: Any,
) -> Sheet:
    """Edit a picture with every value of one setting under every value of another, and lay the results out.

    rows, columns: a name of AXES and its values, at most 100 edits in all; options: the other arguments of `edit`.
    height: of a picture on the page in pixels (default: its longer side, from 192 to 256). Each edit is what `edit`
    makes, to the model's rounding. Model rows: one encoding, to the greatest strength; one set of maps for each seed;
    each edit's decoding. Raises as `edit` does, and ValueError for axes that cannot be.
    """
    cells, shared = planned({"target": target, **options}, rows, columns, given=mask is not None)
    picture, _ = open_picture(sd, image, shared["size"])
    edits = edit_all(sd, picture, cells, mask=mask, steering=steering, track=track)
    width = len(columns[1])
    grid = tuple(tuple(edits[i : i + width]) for i in range(0, len(edits), width))
    costs, seconds = total(one.evaluations for one in edits), total(one.seconds for one in edits)
    drawn = lay_out(grid, rows, columns, shared, costs, height or page_height(picture.size))
    settings = shared | {"sheet": {"rows": [rows[0], [*rows[1]]], "columns": [columns[0], [*columns[1]]]}}
    settings |= {"working_size": edits[0].settings["working_size"]}
    return Sheet(drawn, grid, rows, columns, costs, seconds, settings)


def planned(
    options: Mapping[str, Any], rows: Axis, columns: Axis, *, given: bool = False
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Each edit's checked arguments, row by row, and those that all share; ValueError for axes that cannot be."""
    for name, values in (rows, columns):
        if name not in AXES:
            raise ValueError(f"an axis must be one of {', '.join(AXES)}, got {name!r}")
        if not values or len({*values}) < len(values):
            raise ValueError(f"the axis {name} must have values, none of them twice, got {', '.join(map(str, values))}")
        if name in options and (name, options[name]) != ("seed", None):
            raise ValueError(f"{name} stands on an axis; it cannot have the value {options[name]} besides")
        if given and name in OF_THE_MASK:
            raise ValueError(f"with a given mask nothing depends on {name}: put another setting on that axis")
    if rows[0] == columns[0]:
        raise ValueError(f"rows and columns are both {rows[0]}")
    if len(rows[1]) * len(columns[1]) > MOST_CELLS:
        raise ValueError(f"a sheet holds at most {MOST_CELLS} edits, got {len(rows[1])} x {len(columns[1])}")
    if strange := options.keys() - DEFAULTS.keys() - {"target"}:
        raise ValueError(f"{', '.join(sorted(strange))}: no argument of edit")
    shared = check_settings(DEFAULTS | dict(options))
    cells = [check_settings(shared | {rows[0]: r, columns[0]: c}) for r in rows[1] for c in columns[1]]
    return cells, {name: value for name, value in shared.items() if name not in (rows[0], columns[0])}


def sheet_rows(cells: Sequence[dict[str, Any]], *, given: bool = False) -> dict[str, int]:
    """The model rows by stage of edits that differ in nothing but AXES, where each finds something to edit."""
    each = [predicted_rows(cell, given=given) for cell in cells]
    masks = {cell["seed"]: rows["mask"] for cell, rows in zip(cells, each) if rows["decode"]}
    decode = sum(rows["decode"] for rows in each)
    return {"mask": sum(masks.values()), "encode": max(rows["encode"] for rows in each), "decode": decode}


def edit_all(
    sd: "StableDiffusion", picture: Image.Image, cells: Sequence[dict[str, Any]], *, mask: Any = None,
    steering: "Steering | None" = None, track: Track | None = None,
) -> list[Edit]:  # fmt: skip
    """The edits of one picture that differ in nothing but AXES, in the order given, each from what others computed.

    The strongest comes first: its encoding holds every other.
    """
    made: dict[int, Edit] = {}
    for i in sorted(range(len(cells)), key=lambda i: -cells[i]["strength"]):
        known = reusable([*made.values()], cells[i]["seed"])
        made[i] = edit(sd, picture, mask=mask, steering=steering, reuse=known, track=track, **cells[i])
    return [made[i] for i in range(len(cells))]


def reusable(done: Sequence[Edit], seed: int) -> Edit | None:
    """One Edit that holds what all of them computed: the longest encoding, and the maps of a seed."""
    if not done:
        return None
    deepest = max(done, key=lambda one: len(one.trajectory))
    known = next((one for one in done if one.found and one.seed == seed), deepest)
    return replace(known, trajectory=deepest.trajectory)


# ---------------------------------------------------------------- the page


def lay_out(
    grid: Sequence[Sequence[Edit]], rows: Axis, columns: Axis, shared: dict[str, Any], costs: dict[str, int],
    height: int,
) -> Image.Image:  # fmt: skip
    """Source and, where all edits share them, heat map and mask; masks that one axis changes stand along that axis."""
    first = max((one for row in grid for one in row), key=lambda one: (one.found is not None, one.coverage))
    head, panels = [Panel(first.source, "source")], [[result(one) for one in row] for row in grid]
    left, top = ([(spoken(name), value(v)) for v in values] for name, values in (rows, columns))
    by_row, by_column = rows[0] in OF_THE_MASK, columns[0] in OF_THE_MASK
    if first.heat is not None and "seed" not in (rows[0], columns[0]) and "mask_clip" not in (rows[0], columns[0]):
        head.append(Panel(grey_picture(first.heat, first.source.size), "where the texts differ"))
    if not by_row and not by_column:
        head.append(Panel(first.mask, coverage(first)))
    elif by_column and not by_row:
        panels.insert(0, [Panel(masked(one), coverage(one)) for one in most(zip(*grid))])
        left.insert(0, ("", "mask"))
    elif by_row and not by_column:
        panels = [[Panel(masked(one), coverage(one)), *row] for one, row in zip(most(grid), panels)]
        top.insert(0, ("", "mask"))
    else:
        panels = [[Panel(p.picture, coverage(one)) for p, one in zip(*both)] for both in zip(panels, grid)]
    return Page(title(shared), notes(shared, costs), head, panels, left, top, height).draw()


def most(lines: Iterable[Sequence[Edit]]) -> list[Edit]:
    """Of each line an edit that has its mask: at strength 0 none was sought."""
    return [max(line, key=lambda one: one.coverage) for line in lines]


def result(one: Edit) -> Panel:
    return Panel(one.image, "" if one.decoded else "nothing to edit")


def coverage(one: Edit) -> str:
    return f"mask {one.coverage:.1%}"


def masked(one: Edit) -> Image.Image:
    """The source as it is where it is edited, pale elsewhere."""
    return Image.composite(one.source, pale(one.source), one.mask)


def pale(picture: Image.Image) -> Image.Image:
    return Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "white"), 0.65)


def page_height(size: tuple[int, int]) -> int:
    return min(max(*size, 192), 256)


def spoken(name: str) -> str:
    return name.replace("_", " ")


def value(one: Any) -> str:
    return "none" if one is None else f"{one:.6g}" if isinstance(one, float) else str(one)


def title(settings: dict[str, Any]) -> str:
    source, target = settings["source"], settings["target"]
    return f'"{source}" => "{target}"' if source else f'=> "{target}"'


def notes(settings: dict[str, Any], costs: dict[str, int]) -> str:
    """The settings that all share, as far as a reader must know them, and the cost."""
    names = ("steps", "strength", "guidance_scale", "seed", "maps", "mask_strength", "mask_clip", "mask_threshold")
    said = [f"{spoken(name)} {value(settings[name])}" for name in names if name in settings]
    said += [f"refine {settings['refine']}"] if settings.get("refine", 1) > 1 else []
    said += [f'negative prompt "{settings["negative_prompt"]}"'] if settings["negative_prompt"] else []
    return f"{', '.join(said)}. UNet rows: {', '.join(f'{n} {stage}' for stage, n in costs.items())}."


def total(each: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum by key."""
    found: dict[str, Any] = {}
    for one in each:
        for key, number in one.items():
            found[key] = found.get(key, 0) + number
    return found
