"""`make compare`: every method on plain weights on scenes whose true edit is known; who wins at which kind of edit.

    python -m weights.who_wins          # 100 scenes in 20 steps; --quick: 10 scenes in 10 steps, without DEAR
    python -m weights.who_wins --pie FOLDER --model CompVis/stable-diffusion-v1-4     # PIE-Bench instead, see pie.py

Kinds of edit, in turn: an object swapped, one added beside it, removed, the place changed, and "colour", a swap between
objects of nearly one outline, since the miniature's captions have no word for a colour. Every method runs at the
defaults of its row but for the steps, and nothing is pasted, so that the background is what the method leaves of it.
What draws noise does so with several seeds, whose mean counts; what draws none runs once. DEAR costs most, as it
learns: it has the first --dear scenes and one seed. Rows are kept and a second run goes on (compare.py). A run that is
cut has as many scenes of each kind, and fewer --scenes or --seeds show what there is.

A method's rank is 1 and the number of methods that are surely better: the 95 % of DRAWS resamples of the scenes, on
which both were measured, of the difference of their means lie above 0 (percentile bootstrap, paired, each kind of edit
drawn from by itself; no correction for the many pairs). Of ten scenes four won and none lost are sure, three are not.
"=": others have this rank, too. Below LEAST scenes nothing is sure and no rank is said.
"""

import argparse
import datetime
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minidiffedit.files.hub import find_model
from minidiffedit.files.images import write_whole
from minidiffedit.many.evaluate import mean, pyplot
from minidiffedit.methods.table import SYSTEMS
from minidiffedit.options import options_of
from minidiffedit.run import blank_plan, function_at, inputs_of
from weights import pie
from weights.bench import add_options, interval, save_plot
from weights.compare import Task, in_db, known, run
from weights.judge import FOLDER
from weights.shell import count, count_or_0, fingerprint, run_command

KINDS = ("swap", "add", "remove", "place", "colour")
DEAR = {  # each takes longer than ten of the others
    "dds", "sds", "cds", "dpl", "style-diffusion", "mag-edit", "imagic", "sine", "latent-inversion",
    "null-text-inversion", "baret", "kv-inversion",
}  # fmt: skip
LEAST = 10
# Three of ten scenes won are among those drawn in 97.2 % of all draws; of 4,000 at times in 97.5 % and more.
DRAWS = 40_000
ABOVE = 1e-9  # a bound that is 0 comes out as 1e-17
# What is told of a method: how its mean and interval are written.
FIGURES = {
    "success": "{:.0f} % [{:.0f}, {:.0f}]", "background_psnr": "{:.1f} dB [{:.1f}, {:.1f}]",
    "background_ssim": "{:.3f}", "psnr_true": "{:.1f} dB [{:.1f}, {:.1f}]", "iou": "{:.2f}",
}  # fmt: skip
RANKED = ("success", "background_psnr", "psnr_true")
GIVEN = {"mask": "true mask", "reference": "picture"}  # what some methods need besides texts
PLOT = ".github/assets/who-wins.png"
HERE = Path(__file__).parent
PAGE = HERE.parent / "minidiffedit" / "methods" / "README.md"


# ---------------------------------------------------------------- what is run


@cache
def methods() -> dict[str, str]:
    """Methods on plain weights by name, each of two equal rows once, those of one inversion together; with what they
    are given besides texts. Not text-to-image, which takes no picture, nor drags: no kind of edit here is a move.
    """
    found, seen = dict[str, str](), list[Any]()
    for name, system in sorted(SYSTEMS.items(), key=lambda one: one[1].inversion):
        same = system.edit, system.inversion, system.mask, system.options
        if system.status == "L1" and system.weights == "base" and name != "text-to-image" and same not in seen:
            needs = blank_plan(name).needs
            if "points" not in needs:
                found[name] = " and ".join(said for one, said in GIVEN.items() if one in needs)
                seen.append(same)
    return found


@cache
def draws(method: str) -> bool:
    """Whether the seed decides anything."""
    places = blank_plan(method).functions.values()
    return any("seed" in options_of(function_at(one)) or "x_T" in inputs_of(one) for one in places)


def tasks_of(scenes: int, steps: int, seeds: int, dear: int) -> list[Task]:
    """Seed by seed, scene by scene, kinds in turn; the dear methods of a scene are a task of their own, dear: of how
    many.
    """
    found = list[Task]()
    for seed in range(seeds):
        for number in range(scenes):
            some = [name for name in methods() if name not in DEAR and (not seed or draws(name))]
            late = [name for name in methods() if name in DEAR and not seed and number < dear]
            about = number, KINDS[number % len(KINDS)], seed * 1_000_000 + number
            found += [Task(*about, tuple(names), steps) for names in (some, late) if names]
    return found


def predicted(left: Sequence[Task], rows: Sequence[dict[str, Any]]) -> tuple[int, float]:
    """Rows of the model and seconds of one process that the tasks take, by what each method's edits took so far."""
    each: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "error" not in row:
            each.setdefault(row["method"], []).append((row["paid"], took(row)))
    means = {name: np.mean(pairs, axis=0) for name, pairs in each.items()}
    total = sum((means[name] for task in left for name in task.methods if name in means), np.zeros(2))
    return round(total[0]), float(total[1])


def took(row: dict[str, Any]) -> float:
    """Seconds of an edit, without what it reused."""
    return row["paid"] * row["seconds"] / max(row["rows"], 1)


def clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


# ---------------------------------------------------------------- who is surely better


class Scenes:
    """Figures by method and scene, means over the seeds: at(method, figure) -> (scenes,), NaN where there is none."""

    def __init__(self, rows: Sequence[dict[str, Any]], kind: str = "all"):
        self.rows = [row for row in rows if "error" not in row and kind in (row["kind"], "all")]
        self.methods = list(dict.fromkeys(row["method"] for row in self.rows))
        both = sorted({(row["kind"], row["number"]) for row in self.rows})
        self.numbers, self.kinds = [number for _, number in both], np.array([kind for kind, _ in both])
        cells: dict[tuple[str, int, str], list[float]] = {}
        for row in self.rows:
            for figure in FIGURES:
                value = row.get(figure)
                if "psnr" in figure and figure in row:
                    value = in_db(value)
                if value is not None:
                    value = 100.0 * value if figure == "success" else value
                    cells.setdefault((row["method"], row["number"], figure), []).append(value)
        self.cells = {one: float(np.mean(values)) for one, values in cells.items()}

    def at(self, method: str, figure: str) -> np.ndarray:
        return np.array([self.cells.get((method, number, figure), np.nan) for number in self.numbers])

    def mean(self, method: str, figure: str) -> tuple[float, float, float] | None:
        values = self.at(method, figure)
        return None if np.isnan(values).all() else sure(values, self.kinds)

    def count(self, method: str) -> int:
        return len({row["number"] for row in self.rows if row["method"] == method})

    def ranks(self, figure: str, among: Sequence[str] | None = None) -> dict[str, int]:
        """1 and how many of the others are surely better; methods below LEAST scenes have none."""
        values = {m: self.at(m, figure) for m in (self.methods if among is None else among)}
        values = {m: one for m, one in values.items() if (~np.isnan(one)).sum() >= LEAST}
        better = {m: [surely_above(other, own, self.kinds) for other in values.values()] for m, own in values.items()}
        return {m: 1 + sum(found) for m, found in better.items()}


def sure(values: np.ndarray, kinds: np.ndarray) -> tuple[float, float, float]:
    """The mean over the scenes that have a figure, not NaN, and its interval; kinds: of the scenes, in order."""
    there = ~np.isnan(values)
    return interval(values[there], tuple(map(int, np.unique(kinds[there], return_counts=True)[1])), DRAWS)


def surely_above(a: np.ndarray, b: np.ndarray, kinds: np.ndarray) -> bool:
    """Of two figures over the same scenes, NaN where one was not measured."""
    return (~np.isnan(a - b)).sum() >= LEAST and sure(a - b, kinds)[1] > ABOVE


def twins(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Of methods that made the very edits of another, on LEAST scenes and more, that other's name."""
    found, edits = dict[str, str](), dict[str, dict[Any, Any]]()
    for row in rows:
        if "error" not in row:
            about = row["number"], row.get("seed")
            edits.setdefault(row["method"], {})[about] = [row.get(name) for name in FIGURES]
    for name, own in edits.items():
        same = next(other for other in edits if other not in found and edits[other] == own)
        if same != name and len({number for number, _ in own}) >= LEAST:
            found[name] = same
    return found


def once(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without those of twins."""
    same = twins(rows)
    return [row for row in rows if row["method"] not in same]


def ranked(ranks: dict[str, int], method: str) -> str:
    if method not in ranks:
        return ""
    return f"{ranks[method]}{'=' if [*ranks.values()].count(ranks[method]) > 1 else ''}"


# ---------------------------------------------------------------- tables


def in_order(scenes: Scenes) -> list[str]:
    """By successes, then nearness to the true edit."""

    def figures(method: str) -> tuple[float, ...]:
        return tuple(-(scenes.mean(method, figure) or (0.0,))[0] for figure in ("success", "psnr_true"))

    return sorted(scenes.methods, key=figures)


def overall(scenes: Scenes) -> str:
    head = "method | given | success, rank | background, rank | SSIM | to the true edit, rank | IoU | rows | s | scenes"
    ranks = {figure: scenes.ranks(figure) for figure in RANKED}
    lines = [f"| {head} |", f"|{'---|' * 10}"]
    for method in in_order(scenes):
        cells = [f"`{method}`", methods().get(method, "")]
        for figure, form in FIGURES.items():
            found, rank = scenes.mean(method, figure), ranked(ranks.get(figure, {}), method)
            cells.append(", ".join(filter(None, [form.format(*found), rank])) if found else "")
        own = [row for row in scenes.rows if row["method"] == method]
        cells += [f"{mean([row[name] for row in own]):,.{n}f}" for name, n in (("rows", 0), ("seconds", 1))]
        lines.append(f"| {' | '.join(cells)} | {scenes.count(method)} |")
    return "\n".join(lines)


def by_kind(rows: Sequence[dict[str, Any]]) -> str:
    """Successes with their rank within the kind, how near to the true edit, and the background."""
    groups = {kind: Scenes(rows, kind) for kind in KINDS}
    ranks = {kind: scenes.ranks("success") for kind, scenes in groups.items()}
    lines = [f"| success, rank, to the true edit, background | {' | '.join(KINDS)} |", f"|{'---|' * (len(KINDS) + 1)}"]
    for method in in_order(Scenes(rows)):
        cells = list[str]()
        for kind, scenes in groups.items():
            share, near, kept = (scenes.mean(method, figure) for figure in ("success", "psnr_true", "background_psnr"))
            said = [f"{share[0]:.0f} %", ranked(ranks[kind], method)] if share else []
            said += [f"{found[0]:.1f} dB" for found in (near, kept) if found]
            cells.append(", ".join(filter(None, said)))
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def gains(rows: Sequence[dict[str, Any]]) -> str:
    """What the true mask in place of DiffEdit's own gains, a line a kind of edit; "" where nothing is known."""
    lines = list[str]()
    for kind in ("all", *KINDS):
        scenes, cells = Scenes(rows, kind), list[str]()
        for figure in ("success", "background_psnr"):
            apart = scenes.at("user-mask", figure) - scenes.at("diffedit", figure)
            if (~np.isnan(apart)).sum() >= LEAST:
                cells.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*sure(apart, scenes.kinds)))
        lines += [f"| {kind} | {' | '.join(cells)} |"] if len(cells) == 2 else []
    head = "| `user-mask` less `diffedit` | success, points | background, dB |\n|---|---|---|\n"
    return head + "\n".join(lines) if lines else ""


class Advice(NamedTuple):
    """Of the methods that were measured on every scene. tied: how many none surely beats at success; nearest: of these
    whom none surely beats at nearness to the true edit, the best first; cheapest: of these the one of fewest rows.
    """

    tied: int
    nearest: list[str]
    cheapest: str


def advice(scenes: Scenes, among: Sequence[str]) -> Advice | None:
    def first(figure: str, some: Sequence[str]) -> list[str]:
        return [method for method, rank in scenes.ranks(figure, some).items() if rank == 1]

    whole = [one for one in scenes.methods if one in among and scenes.count(one) == len(scenes.numbers)]
    if not (tied := first("success", whole)):
        return None
    rows = {method: mean([row["rows"] for row in scenes.rows if row["method"] == method]) or 0 for method in tied}
    nearest = sorted(first("psnr_true", tied) or tied, key=lambda one: -np.nanmean(scenes.at(one, "psnr_true")))
    return Advice(len(tied), nearest, min(nearest, key=lambda one: rows[one]))


def which_for_which(rows: Sequence[dict[str, Any]], shown: int = 4) -> str:
    lines = ["| edit | texts alone | given the true mask or a picture, too |", "|---|---|---|"]
    alone = [method for method, given in methods().items() if not given]
    for kind in ("all", *KINDS):
        cells = list[str]()
        for among in (alone, [one for one in methods() if one not in alone]):
            scenes = Scenes(rows, kind)
            if found := advice(scenes, among):
                names = [f"`{one}` {np.nanmean(scenes.at(one, 'success')):.0f} %" for one in found.nearest[:shown]]
                more = len(found.nearest) - len(names)
                names += [f"{more} more"] if more else []
                cells.append(f"{', '.join(names)} (of {found.tied} tied at success); cheapest `{found.cheapest}`")
            else:
                cells.append("too few scenes")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(rows: Sequence[dict[str, Any]], command: str) -> str:
    """All of it in Markdown, with the command and the last edit's day. Raises ValueError where no method made any."""
    edits = [row for row in rows if "error" not in row]
    errors = {name: [row["error"] for row in rows if row["method"] == name and "error" in row] for name in methods()}
    refused = [f"`{name}` refused {len(some)} edits: {some[0]}" for name, some in errors.items() if some]
    if not edits:
        raise ValueError(f"no edit was made; {'; '.join(refused)}")
    scenes, spent = Scenes(once(rows)), sum(map(took, edits))
    paid, steps = sum(row["paid"] for row in edits), ", ".join(map(str, sorted({row["steps"] for row in edits})))
    kinds = ", ".join(f"{len({row['number'] for row in edits if row['kind'] == kind})} {kind}" for kind in KINDS)
    measured = DEAR & {row["method"] for row in rows}
    many = len({row["number"] for row in rows if row["method"] in DEAR})
    said = [f"On {many} scenes, one seed, as they cost most: {', '.join(sorted(measured))}."] if measured else []
    said += [f"Left out, as they cost most: {', '.join(sorted(left))}."] if (left := DEAR - measured) else []
    said += [
        f"`{name}` made the very edits of `{other}`, which stands for both." for name, other in twins(rows).items()
    ]
    if fewer := [one for one in scenes.methods if scenes.count(one) < len(scenes.numbers)]:
        said.append(f"Not in the first table, as some scenes of theirs are not there: {', '.join(fewer)}.")
    day = max(row.get("day", "") for row in edits) or datetime.date.today()
    said.append(
        f"*(`{command}`, {day}: {len(scenes.numbers)} scenes ({kinds}), {steps} steps, "
        f"{len(edits):,} edits, {paid:,} rows of the model, {clock(spent)} of one process.)*"
    )
    tables = which_for_which(once(rows)), overall(scenes), by_kind(once(rows)), gains(rows)
    return "\n\n".join([*filter(None, tables), *refused, *said]) + "\n"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Successes over the background, a panel per kind of edit; named are those that no other exceeds in either mean
    without falling behind in the other.
    """
    plt, rows = pyplot(), once(rows)
    figure, axes = plt.subplots(2, 3, figsize=(15, 9), layout="constrained", sharex=True, sharey=True)
    for axis, kind in zip(axes.flat, ("all", *KINDS)):
        scenes = Scenes(rows, kind)
        found = [(method, *(scenes.mean(method, one) for one in RANKED[:2])) for method in scenes.methods]
        at = {method: (kept, share) for method, share, kept in found if share and kept}
        for method, (x, y) in at.items():
            xerr, yerr = (np.abs([[one[1] - one[0]], [one[2] - one[0]]]) for one in (x, y))
            look: dict[str, Any] = {"color": "C1" if methods().get(method) else "C0", "elinewidth": 0.4, "alpha": 0.7}
            axis.errorbar(x[0], y[0], yerr, xerr, fmt="o", ms=4, **look)
            reached = [(a[0], b[0]) for a, b in at.values() if a[0] >= x[0] and b[0] >= y[0]]
            if y[0] > 0 and {*reached} == {(x[0], y[0])}:
                axis.annotate(method, (x[0], y[0]), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axis.set(title=f"{kind} ({len(scenes.numbers)} scenes)", ylim=(-3, 103))
    figure.supxlabel("background, dB (orange: given the true mask or a picture)")
    figure.supylabel("judged a success, %")
    save_plot(plt, figure, path, 90)


# ---------------------------------------------------------------- the command


def compare(args: argparse.Namespace) -> None:
    pyplot()  # its want is said before the work
    ours, theirs = [HERE / "mini", FOLDER], [find_model(str(args.model)), args.judge]
    if args.readme and [one.resolve() for one in ours] != [one.resolve() for one in theirs]:
        raise ValueError(f"--readme is for the miniature and the judge that ship, not for {args.model}, {args.judge}")
    steps, scenes = args.steps or (10 if args.quick else 20), args.scenes or (10 if args.quick else 100)
    dear = args.dear if args.dear is not None else 0 if args.quick else 10
    tasks = tasks_of(scenes, steps, args.seeds or (1 if args.quick else 3), dear)
    path, stamp = args.output / "who-wins.jsonl", fingerprint(args.model, args.judge)
    several, edits = {name for task in tasks for name in task.methods}, sum(len(task.methods) for task in tasks)
    print(f"{scenes} scenes, {len(several)} methods, {edits:,} edits; first one or two, to know how long they take")
    first = run(tasks[:2], path, args.model, args.judge, args.workers)
    rows, time = predicted(known(tasks, path, stamp)[1], first)
    print(f"left: about {rows:,} rows of the model, {clock(time / args.workers)} by {args.workers} processes")
    done = run(tasks, path, args.model, args.judge, args.workers)
    asked, usual = ["--quick"] * args.quick, (str(HERE / "mini"), FOLDER, None)
    told = {name: getattr(args, name) for name in ("scenes", "steps", "seeds", "dear", "model", "judge")}
    asked += [f"--{name} {value}" for name, value in told.items() if value not in usual]
    text = page(done, f'make compare COMPARE="{" ".join(asked)}"' if asked else "make compare")
    write_whole(args.output / "who-wins.md", text.encode())
    plot(done, args.output / "who-wins.png")
    if args.readme:
        shutil.copyfile(args.output / "who-wins.png", PAGE.parents[2] / PLOT)
        write_into(PAGE, f"{text}\n![successes over the background, by kind of edit](../../{PLOT})\n")
    print(text + f"written: {args.output}/who-wins.md, who-wins.png, who-wins.jsonl")


def write_into(page: Path, text: str) -> None:
    """Put the text between the page's two marks. Raises ValueError for a page without them."""
    whole, mark = page.read_text(encoding="utf-8"), "<!-- who wins -->"
    if whole.count(mark) != 2:
        raise ValueError(f"{page} must hold {mark} twice, before and after the figures")
    before, _, after = whole.split(mark)
    write_whole(page, f"{before}{mark}\n{text}{mark}{after}".encode())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.who_wins", description="Compare all methods.")
    parser.add_argument("--quick", action="store_true", help="10 scenes, 10 steps, one seed, --dear 0")
    parser.add_argument("--scenes", type=count, metavar="N", help="kinds in turn (100)")
    parser.add_argument("--steps", type=count, metavar="N", help="of each method that has steps (20; --pie: its own)")
    parser.add_argument("--seeds", type=count, metavar="N", help="of methods that draw noise (3)")
    parser.add_argument("--dear", type=count_or_0, metavar="N", help="scenes of what costs most; from 10 ranked (10)")
    parser.add_argument("--readme", action="store_true", help="write the tables into minidiffedit/methods/README.md")
    pie.add_options(parser)
    add_options(parser, ".compare")
    parser.set_defaults(workers=None, judge=None)  # so that it is seen whether they were given: `begin`
    run_command(parser, begin)


def begin(args: argparse.Namespace) -> None:
    ours = "quick", "scenes", "seeds", "dear", "readme", "workers", "judge"
    theirs = ours if args.pie else ("limit", "metrics", "only")
    if asked := [f"--{name}" for name in theirs if getattr(args, name) not in (None, False)]:
        raise ValueError(f"{', '.join(asked)} {'goes without' if args.pie else 'goes with'} --pie")
    args.workers, args.judge = args.workers or 2, args.judge or FOLDER
    args.output.mkdir(parents=True, exist_ok=True)
    (pie.measure if args.pie else compare)(args)


if __name__ == "__main__":
    main()
