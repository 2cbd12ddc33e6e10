"""Methods of the table on scenes whose true edit is known: figures one by one, tables, and a page to look at.

    python -m weights.compare matrix --scenes 40     # `make matrix`: every inversion before every editor that takes one
    python -m weights.compare gallery                # every method on three scenes, side by side
    python -m weights.compare samplers               # how many steps DDIM and DPM-Solver++ need for the same
    python -m weights.compare losses                 # what every method with gradients makes of its loss

Each method runs at the defaults of its row but for --steps, without pasting; what costs most on two scenes only. A run
is one JSON line in the folder, written as its task is done, and a second run of the command goes on where the first
stopped. Success is the judge's word (judge.py) on the object and the place, the background's PSNR is outside the true
mask. Drawing scenes needs the Noto emoji font.
"""

import argparse
import datetime
import multiprocessing
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minidiffedit import StableDiffusion, edit, noises
from minidiffedit.cost import cost
from minidiffedit.files.images import to_picture, write_picture, write_whole
from minidiffedit.many.evaluate import append_row, mean, measures, read_rows
from minidiffedit.many.metrics import iou, psnr
from minidiffedit.methods.table import INVERSIONS, SYSTEMS
from minidiffedit.methods.text_to_image import text_to_image
from minidiffedit.run import Plan, Result, blank_plan, plan
from minidiffedit.views.layout import Page, Panel
from weights import judge as judges
from weights.bench import KINDS, Pair, add_options, check_size, pair, right, rms
from weights.scenes import PLACES, SIDE, mask_image
from weights.shell import count, count_or_0, end_workers, fingerprint, run_command

SAMPLERS, STEPS, EXACT = ("ddim", "dpmsolver++"), (5, 10, 15, 20, 50), 200
COSTS = dict[tuple[str, int, str], dict[str, int]]()  # of a process: rows by stage of a method, steps, kind of edit
MOST_DB = 20 * np.log10(255)  # an error of 1 of 255; where nothing at all changed this is what counts
# Their gradients cost thousands of rows an edit: the matrix has them on its first scenes only.
DEAR, FEW = {"dpl", "style-diffusion", "mag-edit"}, 2


@dataclass(frozen=True)
class Task:
    """Methods on one edit of a scene, one after another; what one makes, an inversion say, the next may reuse.

    steps: of each method; 0 for its own default.
    """

    number: int
    kind: str
    seed: int
    methods: tuple[str, ...]
    steps: int = 0

    def runs(self) -> list[tuple[Any, ...]]:
        return [(self.number, self.kind, self.seed, self.steps, method) for method in self.methods]


def given(blank: Plan, one: Pair) -> dict[str, Any]:
    """What a method needs, from the scene: captions, the names of what differs, the true mask, another picture."""
    old = [thing for thing in one.before.things if thing not in one.after.things]
    new = [thing for thing in one.after.things if thing not in one.before.things]
    names = [", ".join(thing.name for thing in each) for each in (old, new)]
    elsewhere = one.after.move_to(next(place for place in PLACES if place != one.after.place))
    if one.before.place != one.after.place:
        names, elsewhere = [one.before.place, one.after.place], replace(one.after, things=())
    thing = one.before.things[0]
    x, y = round(thing.x * SIDE), round(thing.y * SIDE)
    made = {
        "target": one.after.caption(),
        "source": one.before.caption(),
        "edits": [names],
        "mask": Image.fromarray(one.mask.astype(np.uint8) * 255),
        "reference": Image.fromarray(elsewhere.picture()),
        "points": f"{x},{y}=>{x - 24 if x > SIDE / 2 else x + 24},{y}",
    }
    asked = {"target", "source", *blank.needs} & blank.given.keys()
    if new and "reference_mask" in blank.given:
        asked |= {"reference_mask"}
        made["reference_mask"] = mask_image(replace(elsewhere, things=(*new,)).alpha())
    return {name: value for name, value in made.items() if name in asked}


def figures(done: Result, one: Pair, judge: judges.Judge) -> dict[str, Any]:
    """iou: of a mask that the method found, on the latent grid."""
    picture = np.array(done.image)  # a copy that torch may keep
    found: dict[str, Any] = measures(("psnr", "ssim"), picture, one.source, mask=one.mask, true_edit=one.true_edit)
    if done.found is not None:
        found["iou"] = iou((done.found.mask[0, 0] > 0).numpy(), one.cells)
    return found | {"success": right(judge, picture, one.after), "paid": done.rows}


@cache
def networks(model: str, judge: Path) -> tuple[StableDiffusion, judges.Judge, str]:
    """In each process once, on one thread, as in bench.py."""
    torch.set_num_threads(1)
    judges.FOLDER = judge
    sd = StableDiffusion.load(model, device="cpu", dtype="float32")
    check_size(sd)
    return sd, judges.load_judge(), fingerprint(model, judge)


def work(task: Task, model: str, judge: Path) -> list[dict[str, Any]]:
    """The rows of a task. rows: the prediction for the method alone; seconds: of the method alone, where a stage was
    reused by the time that a row of it took in this task. error: why a method refused.
    """
    sd, seen, stamp = networks(model, judge)
    one, rows, rate, made = pair(task.number, task.kind), list[dict[str, Any]](), dict[str, float](), list[Result]()
    source = Image.fromarray(one.source)
    for method in task.methods:
        row = {"number": task.number, "kind": task.kind, "seed": task.seed, "steps": task.steps, "method": method}
        row |= {"model": stamp, "day": str(datetime.date.today())}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                blank = blank_plan(method)
                arguments = given(blank, one) | {"seed": task.seed, "paste": False}
                arguments |= {"steps": task.steps} if task.steps and "steps" in blank.options else {}
                if (about := (method, task.steps, task.kind)) not in COSTS:
                    COSTS[about] = cost(plan(method, **arguments))
                predicted = COSTS[about]
                done = edit(sd, source, method, reuse=made, **arguments)
            except (ValueError, ArithmeticError) as error:
                rows.append(row | {"error": str(error)})
                continue
        made = [done]
        for stage, paid in done.evaluations.items():
            if paid:
                rate[stage] = done.seconds[stage] / paid
        reused = sum(predicted[s] * rate.get(s, 0) for s, paid in done.evaluations.items() if not paid)
        took = {"rows": sum(predicted.values()), "seconds": sum(done.seconds.values()) + reused}
        rows.append(row | figures(done, one, seen) | took)
    return rows


def run(tasks: Sequence[Task], path: Path, model: str, judge: Path, workers: int = 2) -> list[dict[str, Any]]:
    """Every row of the tasks, from the file where it has them, else computed and added to it, a task at a time. What
    ends this early, an error or Ctrl-C, ends the workers, too.
    """
    rows, left = known(tasks, path, fingerprint(model, judge))
    context = multiprocessing.get_context("spawn")
    crew = ProcessPoolExecutor(max(1, min(workers, len(left))), mp_context=context, initializer=end_with_parent)
    with tqdm(total=sum(len(task.methods) for task in left), desc="edits", unit="edit", disable=None) as bar, crew:
        try:
            for future in as_completed([crew.submit(work, task, model, judge) for task in left]):
                for row in future.result():
                    append_row(path, row)
                    rows[key(row)] = row
                    bar.update()
        except BaseException:
            crew.shutdown(wait=False, cancel_futures=True)
            end_workers()
            raise
    return [rows[one] for task in tasks for one in task.runs()]


def end_with_parent() -> None:
    """In a worker: end as soon as the process that reads its rows does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(map(row.get, ("number", "kind", "seed", "steps", "method")))


def known(tasks: Sequence[Task], path: Path, stamp: str) -> tuple[dict[tuple[Any, ...], dict[str, Any]], list[Task]]:
    """The rows of the file by key, and what is left of the tasks. Rows that another model or judge made are left where
    they are and not taken; what was refused is tried again.
    """
    rows = {key(row): row for row in read_rows(path) if row.get("model") == stamp and "error" not in row}
    missing = [replace(t, methods=tuple(one[-1] for one in t.runs() if one not in rows)) for t in tasks]
    return rows, [task for task in missing if task.methods]


# ---------------------------------------------------------------- the matrix


def editors() -> list[str]:
    """One name for each function that walks a path to an edit, of several rows the one that bears the function's."""
    found: dict[str, list[str]] = {}
    for name, system in SYSTEMS.items():
        if system.inversion and system.edit and system.weights == "base":
            found.setdefault(system.edit, []).append(name)
    plain = {place: place.partition(":")[0].replace("_", "-") for place in found}
    names = [plain[place] if plain[place] in some else some[0] for place, some in found.items()]
    return [name for name in names if {"target", "edits", "reference"} & blank_plan(name).given.keys()]  # no drags


def matrix_tasks(scenes: int, steps: int = 0, seed: int = 0) -> list[Task]:
    """A task is a scene and an inversion, so that it is made once for all its editors; the dear ones come last."""
    tasks = list[Task]()
    for number in range(scenes):
        some = [one for one in (*INVERSIONS, *editors()) if number < FEW or one not in DEAR]
        for inversion in [one for one in INVERSIONS if one in some]:
            names = tuple(f"{inversion}+{editor}" for editor in editors() if editor in some)
            tasks.append(Task(number, KINDS[0], seed, names, steps))
    return sorted(tasks, key=lambda task: task.methods[0].partition("+")[0] in DEAR)


def table(rows: Sequence[dict[str, Any]], lines: Sequence[str], columns: Sequence[str], say: Any) -> str:
    """Markdown: say(the rows of f"{column}+{line}") in each cell, with the number of edits where others have more."""
    head = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    cells = {(c, e): [row for row in rows if row["method"] == f"{c}+{e}"] for c in columns for e in lines}
    made = {one: sum("error" not in row for row in some) for one, some in cells.items()}

    def text(one: tuple[str, str]) -> str:
        return say(cells[one]) + (f" (of {made[one]})" if 0 < made[one] < max(made.values()) else "")

    return "\n".join(head + [f"| {e} | {' | '.join(text((c, e)) for c in columns)} |" for e in lines])


def quality(rows: Sequence[dict[str, Any]]) -> str:
    """The background's PSNR and the share of successes."""
    some = [row for row in rows if "error" not in row]
    if not some:
        return "refused" if rows else ""
    kept = [in_db(row["background_psnr"]) for row in some]
    return f"{mean(kept):.1f} dB, {100 * np.mean([row['success'] for row in some]):.0f} %"


def in_db(value: float | None) -> float:
    """A PSNR as it counts in a mean; None: infinite."""
    return MOST_DB if value is None else min(value, MOST_DB)


def price(rows: Sequence[dict[str, Any]]) -> str:
    some = [row for row in rows if "error" not in row]
    return f"{mean([row['rows'] for row in some]):,.0f}, {mean([row['seconds'] for row in some]):.1f} s" if some else ""


def matrix(args: argparse.Namespace) -> None:
    tasks = matrix_tasks(args.scenes, args.steps)
    rows = run(tasks, args.output / "matrix.jsonl", args.model, args.judge, args.workers)
    refused = Counter(f"{row['method']}: {row['error']}" for row in rows if "error" in row)
    if len(refused) and refused.total() == len(rows):
        raise ValueError(f"no edit was made; {next(iter(refused))}")
    said = [table(rows, editors(), [*INVERSIONS], say) for say in (quality, price)]
    text = "\n\n".join([*said, *(f"{times} x {line}" for line, times in sorted(refused.items()))]) + "\n"
    write_whole(args.output / "matrix.md", text.encode())
    print(text, end="")


# ---------------------------------------------------------------- side by side


def gallery(args: argparse.Namespace) -> None:
    """Edits that lie in the folder are shown as they are: remove it to make them anew."""
    rows = {n: s for n, s in SYSTEMS.items() if s.edit and s.weights == "base" and n != "text-to-image"}
    if not (names := [n for n, s in rows.items() if s.letter in args.letters]):
        letters = "".join(sorted({s.letter for s in rows.values()}))
        raise ValueError(f"no method has a letter of {args.letters!r}; there are {letters}")
    sd, _, stamp = networks(args.model, args.judge)
    folder = args.output / f"gallery-{stamp}"
    folder.mkdir(exist_ok=True)
    lines, left = list[list[Panel]](), list[tuple[str, str]]()
    for number in args.numbers:
        one, known = pair(number, KINDS[0]), list[Result]()
        panels = [Panel(Image.fromarray(one.source), "source"), Panel(Image.fromarray(one.true_edit), "true edit")]
        for name in tqdm(names, desc=one.before.caption(), disable=None):
            kept = folder / f"{number}-{name}.png"
            if not kept.exists():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    arguments = given(blank_plan(name), one) | {"seed": 0}
                    known = [edit(sd, Image.fromarray(one.source), name, reuse=known, **arguments)]
                write_picture(known[0].image, kept)
            panels.append(Panel(Image.open(kept), name))
        lines += [panels[i : i + args.wide] for i in range(0, len(panels), args.wide)]
        left += [("", f"{number}") if not i else ("", "") for i in range(0, len(panels), args.wide)]
    pairs = {number: pair(number, KINDS[0]) for number in args.numbers}
    captions = "; ".join(f"{n}: {one.before.caption()} -> {one.after.caption()}" for n, one in pairs.items())
    page = Page("Every method on plain weights, at its defaults", captions, [], lines, left, [], height=SIDE)
    write_picture(page.draw(), args.output / "gallery.png")
    print(f"written: {args.output}/gallery.png")


# ---------------------------------------------------------------- samplers


@torch.no_grad()
def samplers(args: argparse.Namespace) -> None:
    """Pictures from text: the judge's word, and how far the latent is from that of EXACT steps of DDIM."""
    sd, judge, _ = networks(args.model, args.judge)
    wanted = [pair(number, KINDS[0]).before for number in range(args.scenes)]
    x_T = torch.cat([noises((sd.channels, SIDE // 8, SIDE // 8), 1, number) for number in range(args.scenes)])
    text, null = sd.text([scene.caption() for scene in wanted]), sd.text([""])

    def drawn(sampler: str, steps: int) -> Tensor:
        done = [text_to_image(sd.eps, x, t, null, steps=steps, sampler=sampler) for x, t in zip(*parts(x_T, text))]
        return torch.cat(done)

    exact = drawn("ddim", EXACT)
    lines = ["| steps | DDIM: success, distance | DPM-Solver++(2M) |", "|---|---|---|"]
    for steps in STEPS:
        cells = list[str]()
        for sampler in SAMPLERS:
            y = drawn(sampler, steps)
            pictures = [np.asarray(to_picture(image[None])) for image in sd.decode(y)]
            share = np.mean([right(judge, picture, scene) for picture, scene in zip(pictures, wanted)])
            cells.append(f"{100 * share:.0f} %, {rms(y - exact):.3f}")
        lines.append(f"| {steps} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    write_whole(args.output / "samplers.md", ("\n".join(lines) + "\n").encode())


def parts(*tensors: Tensor, size: int = 8) -> Iterable[Sequence[Tensor]]:
    return [tensor.split(size) for tensor in tensors]


# ---------------------------------------------------------------- losses


@contextmanager
def heard(sd: StableDiffusion, still: bool) -> Iterator[dict[str, list[float]]]:
    """By the place in the code that asks for a gradient, the losses that it was asked of: of calls one after another at
    one timestep the last. still: all gradients are 0, so that nothing is learned or led.
    """
    found, steps, now = dict[str, list[float]](), dict[str, int](), [-1]
    grad, eps = torch.autograd.grad, sd.eps

    def asked(x: Tensor, t: int, *given: Any, **hooks: Any) -> Any:
        now[0] = t
        return eps(x, t, *given, **hooks)

    def listening(loss: Any, *given: Any, **how: Any) -> Any:
        frame = sys._getframe(1)
        while frame.f_back and frame.f_globals["__name__"].endswith(".descent"):
            frame = frame.f_back
        place = f"{frame.f_globals['__name__'].rpartition('.')[2]}:{frame.f_lineno}"
        losses = found.setdefault(place, [])
        if losses and steps[place] == now[0]:
            losses.pop()
        losses.append(float(loss.detach()))
        steps[place] = now[0]
        at = [given[0]] if isinstance(given[0], Tensor) else given[0]
        return tuple(map(torch.zeros_like, at)) if still else grad(loss, *given, **how)

    sd.eps, torch.autograd.grad = asked, listening  # type: ignore[method-assign, assignment]
    try:
        yield found
    finally:
        del sd.eps  # the class has the method
        torch.autograd.grad = grad


def losses(args: argparse.Namespace) -> None:
    """Each method twice on a scene, as it is and with gradients of 0, under the same noises: a line for each loss, the
    pictures in the folder. Of what drags, success is that thing and place are still the same, PSNR is outside the thing
    and where it shall be; `moved` is the PSNR inside, to the source and to the thing moved, and how far the point is
    from its goal at first and at the end, in cells, where the method follows it.
    """
    sd, judge, _ = networks(args.model, args.judge)
    names = [name for name, row in SYSTEMS.items() if row.letter == "B" and row.weights == "base"]
    heads = "method | scene | loss | asked | without it | with it | success | PSNR | moved | rows with gradient"
    lines, told = [f"| {heads} |", f"|---|{'---|' * heads.count('|')}"], dict(args.set)
    if unknown := {one for one in args.only if one not in names and "+" not in one}:
        raise ValueError(f"{', '.join(sorted(unknown))} has no loss; there are {', '.join(names)}")
    every = {name for one in args.only or names for name in (*blank_plan(one).given, *blank_plan(one).options)}
    if unknown := {*told} - every:
        raise ValueError(f"no method here takes {', '.join(sorted(unknown))}")
    (args.output / "losses").mkdir(exist_ok=True)
    for number, name in [(number, name) for number in args.numbers for name in args.only or names]:
        one, blank = pair(number, KINDS[0]), blank_plan(name)
        own = {key: value for key, value in told.items() if key in blank.given}
        own |= {key: blank.options[key].parse(value) for key, value in told.items() if key in blank.options}
        arguments, where, way = given(blank, one) | {"seed": 0, "paste": False} | own, one.mask, [torch.zeros(2)] * 2
        arguments |= {"steps": args.steps} if args.steps and "steps" in blank.options else {}
        if "points" in arguments:
            way = [torch.tensor([*map(float, end.split(","))]).flip(0) for end in arguments["points"].split("=>")]
            where = one.before.alpha() > 0
            where = where | np.roll(where, (way[1] - way[0]).int().tolist(), (0, 1))
            arguments["mask"] = mask_image(where)
            thing, (down, along) = one.before.things[0], (way[1] - way[0]).tolist()
            there = replace(thing, x=thing.x + along / SIDE, y=thing.y + down / SIDE)
            ideal = replace(one.before, things=(there,)).picture()
        made, success, outside = list[dict[str, list[float]]](), list[str](), list[str]()
        for still in (True, False):
            before = sd.gradients
            with heard(sd, still) as found, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                done = edit(sd, Image.fromarray(one.source), name, **arguments)
            made.append(found)
            wanted = one.after if "target" in arguments else one.before
            success.append("yes" if right(judge, np.array(done.image), wanted) else "no")
            kept = measures(("psnr",), np.array(done.image), one.source, mask=where)["background_psnr"]
            outside.append(f"{np.inf if kept is None else kept:.1f}")
            write_picture(done.image, args.output / "losses" / f"{number}-{name}{'-without' if still else ''}.png")
        ends, moved = [way[0], 8 * done.tensors["points"][0].cpu()] if "points" in done.tensors else [], ""
        if "points" in arguments:
            near = [psnr(np.array(done.image), picture, where) for picture in (one.source, ideal)]
            said = [f"{near[0]:.1f} / {near[1]:.1f} dB", *(f"{float((end - way[1]).norm()) / 8:.1f}" for end in ends)]
            moved = ", ".join(said)
        end = " | ".join([" / ".join(success), " / ".join(outside), moved, str(sd.gradients - before)])
        without, with_it = made
        said = [
            f"{place} | {len(values)} | {np.mean(without.get(place, np.nan)):.4g} | {np.mean(values):.4g}"
            for place, values in with_it.items()
        ]
        called = " ".join([name, *(f"{key}={value}" for key, value in own.items())])
        for loss in said or ["none | 0 | | "]:
            lines.append(f"| {called} | {number} | {loss} | {end} |")
            print(lines[-1], flush=True)
    write_whole(args.output / "losses.md", ("\n".join(lines) + "\n").encode())


COMMANDS = {"matrix": matrix, "gallery": gallery, "samplers": samplers, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m weights.compare", description="Compare the table's methods.")
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--scenes", type=count, default=40, metavar="N", help="of matrix and samplers (%(default)s)")
    parser.add_argument("--steps", type=count, default=0, metavar="N", help="of each method (its default)")
    about = "scenes of gallery and losses (4,7,9)"
    parser.add_argument("--numbers", type=numbers, default=(4, 7, 9), metavar="N,N,N", help=about)
    parser.add_argument("--letters", default="ABD", help="of the methods in the gallery; B: gradients (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="METHOD", default=(), help="of the methods with a loss (all)")
    parser.add_argument("--set", type=named, nargs="+", default=[], metavar="NAME=VALUE", help="of their options")
    parser.add_argument("--wide", type=count, default=10, metavar="N", help="pictures in its lines (%(default)s)")
    add_options(parser, ".compare")
    run_command(parser, begin)


def begin(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    COMMANDS[args.what](args)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(count_or_0(one) for one in text.split(","))


def named(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"NAME=VALUE is wanted, got {text!r}")
    return name, value


if __name__ == "__main__":
    main()
