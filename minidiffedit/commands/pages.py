"""sheet, figure and report: what one looks at."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..ddim import whole
from ..files.images import write_picture
from ..files.metadata import model_hash
from ..files.results import free
from ..files.states import load_state, read_record
from ..plans import Plan, blank_plan, check_takes_picture
from ..views.figures import FIGURES, draw_figure, planned_figure
from ..views.previews import check_folder
from ..views.report import save_report
from ..views.sheet import candidates, costs, draw_candidates, draw_sheet, planned, total, value
from . import OWN, common, flag
from .editing import load_named, name_model


def add_sheet(parser: argparse.ArgumentParser, words: list[str]) -> None:
    settled = sheet_plan(words)
    common.add_image(parser, "the page (.png, .jpg, .webp; default: NAME-sheet.png here)")
    about = "NAME=VALUE,VALUE,...: a numeric option, or method and names"
    parser.add_argument("--rows", type=axis, metavar="AXIS", help=f"{about} (default: strength, where there is one)")
    parser.add_argument("--columns", type=axis, metavar="AXIS", help="the same (default: another)")
    parser.add_argument("--save-edits", type=Path, metavar="DIR", help="also write each edit, into this new folder")
    add_page(parser)
    common.add_method(parser, settled)
    common.add_mask_from(parser)
    if settled.steerable:
        common.add_steering(parser)
    common.add_model(parser)


def sheet_plan(words: list[str]) -> Plan:
    """The method, or of an axis of methods all together."""
    known = common.early(words, rows={"type": axis}, columns={"type": axis})
    names = [name for one in (known.rows, known.columns) if one and one[0] == "method" for name in one[1]]
    plans = [check_takes_picture(blank_plan(name)) for name in names] or [common.asked_plan(words)]
    return replace(common.together(plans), method=plans[0].method)


def add_figure(parser: argparse.ArgumentParser, words: list[str]) -> None:
    parser.add_argument(
        "name",
        metavar="NAME",
        help="threshold: what it does to mask and edit; strength: the same of the strength; mask: with and without it, "
        "from noise and from the encoding; latents: encoding and decoding level by level; reconstruction: what "
        "encoding and decoding lose, by steps",
    )
    common.add_image(parser, "the page (.png, .jpg, .webp; default: IMAGE-figure-NAME.png here)")
    parser.add_argument("--values", metavar="V,V,...", help="thresholds, strengths, levels (latents) or steps")
    parser.add_argument("--decode", action="store_true", help="latents: shown by the autoencoder, sharper and slower")
    add_page(parser)
    settled = blank_plan("diffedit")
    common.add_given(parser, settled, needed=False)
    common.add_options(parser.add_argument_group(OWN), settled)
    common.add_model(parser)


def add_page(parser: argparse.ArgumentParser) -> None:
    about = "of a picture on the page, 64..1024 (default: its own, 192 to 256)"
    parser.add_argument("--height", type=int, metavar="PX", help=about)
    common.add_no_metadata(parser)
    common.add_dry_run(parser)


def add_report(parser: argparse.ArgumentParser, words: list[str]) -> None:
    parser.add_argument("state", type=Path, metavar="STATE", help="what `edit --save-state` wrote")
    common.add_output(parser, "the page (default: NAME.html here)", ".html")
    parser.add_argument("--decode-previews", action="store_true", help="show some through the autoencoder too")
    common.add_model(parser)


def axis(text: str) -> tuple[str, list[str]]:
    name, sign, values = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"NAME=VALUE,VALUE,... is wanted, got {text!r}")
    return name.strip().replace("-", "_"), [one.strip() for one in values.split(",")]


def typed(one: tuple[str, list[str]] | None, settled: Plan) -> tuple[str, list[Any]] | None:
    """An axis with its values as the option has them."""
    if one is None or one[0] not in settled.options:
        return one
    return one[0], [settled.options[one[0]].parse(text) for text in one[1]]


def check_height(args: argparse.Namespace) -> None:
    if args.height is not None:
        whole("height", args.height, 64, 1024)


def run_sheet(args: argparse.Namespace) -> dict[str, Any]:
    names = [name for one in (args.rows, args.columns) if one and one[0] == "method" for name in one[1]]
    settled = common.together([blank_plan(name, args.inversion, args.mask_from) for name in names or [args.method]])
    common.take_hole(args, settled)
    rows, columns = typed(args.rows, settled), typed(args.columns, settled)
    parts = {"inversion": args.inversion, "mask_from": args.mask_from}
    given = common.arguments(args, settled) | {name: one for name, one in parts.items() if one}
    found = planned(args.method, rows, columns, **given)
    common.say_idle(args, *found.plans)
    check_height(args)
    picture, output = common.picture_and_output(args, "sheet")
    if args.save_edits:
        check_folder(args.save_edits)
    steering, cost = common.steering_of(args), costs(found.plans)
    if args.dry_run:
        return common.dry_run(args, found.plans, cost, picture.size) | {"seed": None, "settings": found.settings}
    sd = common.load(args, found.plans)
    with common.progress(args.quiet, cost) as watch:
        done = draw_sheet(found, sd, picture, args.height, steering=steering, watch=watch)
    result = {"output": str(output)}
    if args.save_edits:
        args.save_edits.mkdir(exist_ok=True)
        for r, line in zip(found.rows[1], done.edits):
            for c, one in zip(found.columns[1], line):
                name = f"{found.rows[0]}-{value(r)}-{found.columns[0]}-{value(c)}.png".replace("_", "-")
                write_picture(one.image, args.save_edits / name, common.text_chunks(args, common.record_of(args, one)))
        result["edits"] = str(args.save_edits)
    coverage = [[one.coverage for one in line] for line in done.edits]
    return result | written(args, done, output, sd, cost) | {"coverage": coverage}


def run_candidates(args: argparse.Namespace, settled: Plan) -> dict[str, Any]:
    """`edit --count`: the pictures and their sheet."""
    single = ("save_mask", "save_heat", "save_state", "report", "piped")
    if asked := [n for n, one in vars(args).items() if (n in single or "preview" in n) and one not in (None, False)]:
        said = "-o -" if asked == ["piped"] else flag(asked[0])
        raise ValueError(f"{said} goes with one result, not with --count {args.count}")
    plans = candidates(settled, args.count)
    common.say_idle(args, settled)
    ends = [f"-seed{one.settings['seed']}" for one in plans]
    usual = Path(f"{(args.picture or args.image).stem}-candidates.png")
    args.output = args.output or free(usual, *(f"{end}.png" for end in ends))
    files = [args.output.with_stem(args.output.stem + end) for end in ends]
    picture, output = common.picture_and_output(args, "", *files)
    steering, rows = common.steering_of(args), total(common.predicted(args, *plans))
    if args.dry_run:
        return common.dry_run(args, plans, rows, picture.size)
    sd = common.load(args)
    with common.progress(args.quiet, rows) as watch:
        done = draw_candidates(plans, sd, picture, steering=steering, watch=watch)
    made = []
    for file, one in zip(files, done.edits[0]):
        write_picture(one.image, file, common.text_chunks(args, common.record_of(args, one)))
        made.append({"output": str(file), "seed": one.seed, "verdict": one.verdict, "coverage": one.coverage})
    made_of: dict[str, Any] = {"method": settled.method, "output": str(output), "candidates": made}
    return made_of | written(args, done, output, sd, rows) | {"seed": plans[0].settings["seed"]}


def run_figure(args: argparse.Namespace) -> dict[str, Any]:
    settled = blank_plan("diffedit")
    given = common.arguments(args, settled)
    if args.decode and args.name != "latents":
        raise ValueError("--decode goes with the figure latents")
    if args.name in FIGURES and args.name != "reconstruction" and "target" not in given:
        raise ValueError(f"the figure {args.name} needs --target")
    varied = settled.options.get(FIGURES[args.name].varies if args.name in FIGURES else "")
    parse = varied.parse if varied else settled.options["steps"].parse
    values = None if args.values is None else [parse(one.strip()) for one in args.values.split(",")]
    found = planned_figure(args.name, values, **given)
    check_height(args)
    picture, output = common.picture_and_output(args, f"figure-{args.name}")
    cost = costs(found.plans)
    if args.dry_run:
        return common.dry_run(args, found.plans, cost, picture.size) | {"seed": None, "settings": found.settings}
    sd = common.load(args, found.plans)
    with common.progress(args.quiet, cost) as watch:
        done = draw_figure(found, sd, picture, args.height, args.decode, watch)
    return {"output": str(output)} | written(args, done, output, sd, cost) | {"numbers": done.numbers}


def written(args: argparse.Namespace, done: Any, output: Path, sd: Any, cost: dict[str, int]) -> dict[str, Any]:
    """The page, as a file, and what is said of it."""
    mask = model_hash(args.mask) if getattr(args, "mask", None) else "computed"
    record = {"mask": mask} | done.settings | common.identity(sd)
    write_picture(done.image, output, common.text_chunks(args, record))
    rows = {"predicted": sum(cost.values()), "paid": sum(done.evaluations.values())}
    said = {"rows": rows, "seed": record.get("seed"), "evaluations": done.evaluations, "seconds": done.seconds}
    return said | {"settings": record, "model": common.describe(sd), "versions": common.versions()}


def say_page(result: dict[str, Any]) -> str:
    if "output" not in result:
        return common.say_dry(result)
    files = [result[key] for key in ("output", "edits") if key in result]
    files += [one["output"] for one in result.get("candidates", ())]
    said = [common.say_cost(result["evaluations"]), *([] if result["seed"] is None else [f"seed {result['seed']}"])]
    return "\n".join([*files, "; ".join([*said, f"{sum(result['seconds'].values()):.1f} s"])])


say_sheet = say_figure = say_page


def run_report(args: argparse.Namespace) -> dict[str, Any]:
    _, record = read_record(args.state)
    output = args.output or free(Path(f"{args.state.stem}.html"))
    common.check_outputs(args, [args.state], [], report=output)
    name_model(args, record)
    state = load_state(args.state, load_named(args, record))
    save_report(state, output, state=args.state, decode_previews=args.decode_previews)
    size = output.stat().st_size
    return {"output": str(output), "bytes": size, "method": state.method, "seed": state.seed, "verdict": state.verdict}


def say_report(result: dict[str, Any]) -> str:
    return f"{result['output']}\n{result['bytes']:,} bytes; opens in any browser, from disk"
