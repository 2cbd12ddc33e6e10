"""Contact sheets: one picture edited over two options, or by several methods, on one page with labelled axes."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from .. import cost
from ..ddim import whole
from ..files.images import grey_picture
from ..plans import COMMON, Plan, blank_plan, plan, told_mask, users
from ..result import Result, Shown
from ..run import Picture, execute, open_picture
from .layout import Page, Panel

if TYPE_CHECKING:
    from ..sd import StableDiffusion

Axis = tuple[str, Sequence[Any]]
# What stands on an axis that nobody chose, as far as the method has it; then what else it has.
USUAL: dict[str, tuple[Any, ...]] = {"strength": (0.4, 0.6, 0.8), "mask_threshold": (0.3, 0.5, 0.7)}
USUAL |= {"guidance_scale": (3.0, 7.5, 12.0), "steps": (20, 50, 100)}
MOST_CELLS = 100


class Planned(NamedTuple):
    """A sheet to be made: its edits row by row, equal ones one object; both axes; what all edits share."""

    plans: list[Plan]
    rows: Axis
    columns: Axis
    settings: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Sheet(Shown):
    """image: the page, PIL RGB; edits[i][j]: row i, column j; evaluations (model rows) and seconds by stage, of all
    edits together; settings: those that all share, and under "sheet" both axes.
    """

    image: Image.Image
    edits: tuple[Any, ...] = field(repr=False)
    evaluations: dict[str, int]
    seconds: dict[str, float] = field(repr=False)
    settings: dict[str, Any] = field(repr=False)


def contact_sheet(
    sd: "StableDiffusion", image: Picture, method: str = "diffedit", *, height: int | None = None, **arguments: Any
) -> Sheet:
    """Edit a picture with every value of one option under every value of another, and lay the results out.

    rows, columns: the name of a numeric option and its values, or ("method", names), at most 100 edits in all; left
    out: the first option that is free. The other arguments are those of `edit`; of several methods each takes what it
    knows. height: of a picture on the page in pixels (default: its longer side, from 192 to 256). Each edit is what
    `edit` makes, to the model's rounding; `costs` says what they pay together. Raises as `edit` does, and
    ValueError for axes that cannot be.
    """
    running = {name: arguments.pop(name) for name in ("steering", "watch") if name in arguments}
    return draw_sheet(planned(method, **arguments), sd, image, height, **running)


def planned(
    method: str = "diffedit", rows: Axis | None = None, columns: Axis | None = None, **arguments: Any
) -> Planned:
    """A sheet before a model is needed; arguments and errors as of `contact_sheet`."""
    several = next((axis[1] for axis in (rows, columns) if axis and axis[0] == "method"), ())
    if mask_from := arguments.pop("mask_from", None):
        if several:
            raise ValueError("mask_from goes with one method; on an axis of methods write words+NAME")
        blank = blank_plan(method, arguments.get("inversion"), mask_from)
        method, arguments = blank.method, told_mask(blank, mask_from) | arguments
    blanks = [blank_plan(name, arguments.get("inversion")) for name in several or (method,)]
    rows = rows or usual_axis(blanks[0], arguments, *(columns or ())[:1])
    columns = columns or usual_axis(blanks[0], arguments, rows[0])
    for axis in (rows, columns):
        check_axis(blanks, *axis, arguments)
    if rows[0] == columns[0]:
        raise ValueError(f"rows and columns are both {rows[0]}")
    if len(rows[1]) * len(columns[1]) > MOST_CELLS:
        raise ValueError(f"a sheet holds at most {MOST_CELLS} edits, got {len(rows[1])} x {len(columns[1])}")
    points = [{rows[0]: r, columns[0]: c} for r in rows[1] for c in columns[1]]
    plans = plan_all([{"method": method} | arguments | point for point in points])
    return Planned(plans, rows, columns, shared(plans, rows[0], columns[0]))


def usual_axis(blank: Plan, arguments: Mapping[str, Any], *taken: str) -> Axis:
    """The first numeric option that is free, and three values of it."""
    given = arguments.get("mask") is not None
    for name in (*USUAL, *blank.options):
        one, value = blank.options.get(name), blank.settings.get(name)
        free = name not in {*COMMON, *arguments, *taken} and not (given and users(blank, name) == {"mask"})
        if free and one and one.numeric and value is not None:
            low, high = (value, value) if one.low is None or one.high is None else (one.low, one.high)
            near = (min(max(value * factor, low), high) for factor in (0.5, 1, 1.5))
            return name, USUAL.get(name) or sorted({round(number) if one.type is int else number for number in near})
    raise ValueError(f"{blank.method} has no numeric option left for an axis; name rows and columns")


def check_axis(blanks: Sequence[Plan], name: str, values: Sequence[Any], arguments: Mapping[str, Any]) -> None:
    names = {"method": None} | {option: None for one in blanks for option, kind in one.options.items() if kind.numeric}
    names.pop("size", None)  # what one edit reuses of another has its size
    if name not in names:
        raise ValueError(f"an axis must be one of {', '.join(names)}, got {name!r}")
    if not values or len({*values}) < len(values):
        raise ValueError(f"the axis {name} must have values, none of them twice, got {', '.join(map(str, values))}")
    if name in arguments and (name, arguments[name]) != ("seed", None):
        raise ValueError(f"{name} stands on an axis; it cannot have the value {arguments[name]} besides")
    if arguments.get("mask") is not None and all(users(one, name) == {"mask"} for one in blanks):
        raise ValueError(f"with a given mask nothing depends on {name}: put another option on that axis")


# ---------------------------------------------------------------- edits that reuse one another


def plan_all(cells: Sequence[dict[str, Any]]) -> list[Plan]:
    """Plans of a method and arguments each, of which a method takes those it has, if another has the rest; equal plans
    are one object, and a seed that is drawn is one for all. Raises ValueError as `plan`.
    """
    known = {cell["method"]: blank_plan(cell["method"], cell.get("inversion")) for cell in cells}
    names = {method: {*one.given, *one.options} for method, one in known.items()}
    others, made, seed = set[str]().union(*names.values()), dict[str, Plan](), None
    plans = []
    for cell in cells:
        cell = {name: value for name, value in cell.items() if name in names[cell["method"]] or name not in others}
        one = plan(**cell | ({"seed": seed} if cell.get("seed") is None else {}))
        seed = one.settings["seed"]
        plans.append(made.setdefault(str(one.record), one))
    return plans


def shared(plans: Sequence[Plan], *varied: str) -> dict[str, Any]:
    """What the plans say of themselves, as far as none says otherwise."""
    union = {name: value for one in plans for name, value in one.record.items() if name not in varied}
    return {name: value for name, value in union.items() if all(p.record.get(name, value) == value for p in plans)}


def order(plans: Sequence[Plan]) -> list[Plan]:
    """Each plan once, the strongest first: its encoding holds every other."""
    return sorted({id(one): one for one in plans}.values(), key=lambda one: -one.settings.get("strength", 1))


def costs(plans: Sequence[Plan]) -> dict[str, int]:
    """Model rows by stage of plans on one picture that reuse one another."""
    return total(cost.costs(order(plans)))


def run_all(
    sd: "StableDiffusion", picture: Image.Image, plans: Sequence[Plan], steering: Any = None, watch: Any = None
) -> list[Result]:
    """The results as the plans stand, each reusing what those before it made; those with a mask are steered."""
    made: dict[int, Result] = {}
    any_mask = any(one.steerable for one in plans)
    for one in order(plans):
        steered = steering if one.steerable or not any_mask else None  # without any, execute refuses
        made[id(one)] = execute(one, sd, picture, steering=steered, reuse=[*made.values()][-1:], watch=watch)
    return [made[id(one)] for one in plans]


def paid_for(edits: Sequence[Result]) -> tuple[dict[str, int], dict[str, float]]:
    """Model rows and seconds by stage, of each edit once."""
    once = {id(one): one for one in edits}.values()
    return total(one.evaluations for one in once), total(one.seconds for one in once)


def total(each: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum by key."""
    found: Counter[str] = Counter()
    for one in each:
        found.update(one)
    return dict(found)


# ---------------------------------------------------------------- candidates


def candidates(settled: Plan, count: int) -> list[Plan]:
    """A plan under its own seed and those after it. Raises ValueError where no seed changes the result, and beyond what
    a sheet holds.
    """
    whole("count", count, 1, MOST_CELLS)
    if users(settled, "seed") <= ({"mask"} if settled.given.get("mask") is not None else set()):
        raise ValueError(f"all {count} would be one picture: nothing here depends on the seed ({settled.method})")
    first, check = settled.settings["seed"], settled.options["seed"].check
    return [replace(settled, settings=settled.settings | {"seed": check(first + i)}) for i in range(count)]


def draw_candidates(plans: Sequence[Plan], sd: "StableDiffusion", image: Picture, **options: Any) -> Sheet:
    """Run plans that differ in their seeds and lay the results out; options: `steering`, `watch`."""
    picture, at = open_picture(sd, image, plans[0].settings["size"])
    edits = run_all(sd, picture, plans, **options)
    panels = [Panel(one.image, ", ".join(filter(None, [f"seed {one.seed}", coverage(one)]))) for one in edits]
    across = math.ceil(math.sqrt(len(panels)))
    rows = [panels[i : i + across] for i in range(0, len(panels), across)]
    said, (paid, seconds) = shared(plans, "seed"), paid_for(edits)
    head, height = [Panel(picture, "source")], page_height(picture.size)
    page = Page(title(said), notes(said, paid), head, rows, [], [], height).draw()
    settings = said | {"sheet": {"seeds": [one.seed for one in edits]}, "working_size": at}
    return Sheet(page, (tuple(edits),), paid, seconds, settings)


# ---------------------------------------------------------------- the page


def draw_sheet(
    found: Planned, sd: "StableDiffusion", image: Picture, height: int | None = None, **options: Any
) -> Sheet:
    """Run what was planned and lay it out; options: `steering`, `watch`."""
    picture, at = open_picture(sd, image, found.settings.get("size"))
    edits, width = run_all(sd, picture, found.plans, **options), len(found.columns[1])
    grid = tuple(tuple(edits[i : i + width]) for i in range(0, len(edits), width))
    paid, seconds = paid_for(edits)
    drawn = lay_out(grid, found, notes(found.settings, paid), height or page_height(picture.size))
    axes = {"rows": [found.rows[0], [*found.rows[1]]], "columns": [found.columns[0], [*found.columns[1]]]}
    return Sheet(drawn, grid, paid, seconds, found.settings | {"sheet": axes, "working_size": at})


def lay_out(grid: Sequence[Sequence[Any]], found: Planned, notes: str, height: int) -> Image.Image:
    """Source and, where all edits share them, heat map and mask; masks that one axis changes stand along that axis."""
    edits, axes = [one for row in grid for one in row], (found.rows, found.columns)
    first = max(edits, key=lambda one: (one.found is not None, one.coverage or 0))
    heats = [one for one in edits if one.heat is not None]
    head, panels = [Panel(first.source, "source")], [[result(one) for one in row] for row in grid]
    head += heat_panel(heats[0]) if heats and all(one.heat.equal(heats[0].heat) for one in heats) else []
    left, top = ([(spoken(name), value(v)) for v in values] for name, values in axes)
    found_by = [any("mask" in users(one, name) for one in found.plans) for name, _ in axes]
    by_row, by_column = found_by if first.given_mask is None else (False, False)
    if first.mask is None or (by_row and by_column) or "method" in [name for name, _ in axes]:
        panels = [[Panel(one.image, coverage(one) or result(one).caption) for one in row] for row in grid]
    elif by_column:
        panels.insert(0, [Panel(masked(one), coverage(one)) for one in most(zip(*grid))])
        left.insert(0, ("", "mask"))
    elif by_row:
        panels = [[Panel(masked(one), coverage(one)), *row] for one, row in zip(most(grid), panels)]
        top.insert(0, ("", "mask"))
    else:
        head.append(Panel(first.mask, coverage(first)))
    return Page(title(found.settings), notes, head, panels, left, top, height).draw()


def most(lines: Iterable[Sequence[Result]]) -> list[Result]:
    """Of each line an edit that has its mask: at strength 0 none was sought."""
    return [max(line, key=lambda one: one.coverage or 0) for line in lines]


def heat_panel(one: Any) -> list[Panel]:
    return [] if one.heat is None else [Panel(grey_picture(one.heat, one.source.size), "what the mask is cut from")]


def result(one: Result) -> Panel:
    return Panel(one.image, "" if one.decoded else "nothing to edit")


def coverage(one: Result) -> str:
    return "" if one.coverage is None else f"mask {one.coverage:.1%}"


def masked(one: Any) -> Image.Image:
    """The source as it is where it is edited, pale elsewhere."""
    pale = Image.blend(one.source.convert("L").convert("RGB"), Image.new("RGB", one.source.size, "white"), 0.65)
    return Image.composite(one.source, pale, one.mask)


def page_height(size: tuple[int, int]) -> int:
    return min(max(*size, 192), 256)


def spoken(name: str) -> str:
    return name.replace("_", " ")


def value(one: Any) -> str:
    return "none" if one is None else f"{one:.6g}" if isinstance(one, float) else str(one)


def title(settings: Mapping[str, Any]) -> str:
    said = "; ".join(f'"{source}" => "{target}"' for source, target in settings.get("edits", ()))
    source, target = settings.get("source"), settings.get("target")
    return said or (f'"{source}" => "{target}"' if source else f'=> "{target}"' if target else "")


def notes(settings: Mapping[str, Any], costs: Mapping[str, int]) -> str:
    """The settings that all share, so far as they have a number, and the cost."""
    said = [settings["method"]] if "method" in settings else []
    said += [f"{spoken(key)} {value(one)}" for key, one in settings.items() if type(one) in (int, float)]
    said += [f'negative prompt "{one}"' for one in [settings.get("negative_prompt")] if one]
    return f"{', '.join(said)}. UNet rows: {', '.join(f'{n} {stage}' for stage, n in costs.items())}."
