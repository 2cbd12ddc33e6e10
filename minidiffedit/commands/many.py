"""batch and eval: many edits, shared out or on a cluster; methods and settings measured over a data set."""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..files.states import fingerprint
from ..many.batch import Editor, at_once, collect, sound_lines, table_name
from ..many.datasets import open_dataset
from ..many.evaluate import PLAIN, evaluate, grid, load_networks, plot, pyplot, realism, summarise, write_json
from ..many.manifest import check_folders, columns, grouped, read_manifest
from ..plans import blank_plan, check_takes_picture
from . import common, flag, shown


def add_batch(parser: argparse.ArgumentParser, words: list[str]) -> None:
    settled = common.asked_plan(words)
    about = ".jsonl or .csv with the columns image, method, target, ... and any option of any method, or a folder"
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help=about)
    about = "folder for results and table"
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=about)
    parser.add_argument("--overwrite", action="store_true", help="replace files in OUT that are no results, too")
    about = "the folder that holds all pictures (default: the manifest's)"
    parser.add_argument("--root", type=Path, metavar="DIR", help=about)
    about = "with a folder of pictures: the folder of their masks, by name (default: NAME_mask.png beside each)"
    parser.add_argument("--masks", type=Path, metavar="DIR", help=about)
    either = parser.add_mutually_exclusive_group()
    about = "only the I-th of N parts, 1/N to N/N (default: all, or torchrun's RANK of WORLD_SIZE)"
    either.add_argument("--shard", type=shard, metavar="I/N", help=about)
    either.add_argument("--ray", type=int, metavar="N", help="on N workers of a Ray cluster, or of one started here")
    about = "N pictures in one call of the model, for a GPU; equal to single edits up to rounding (%(default)s)"
    parser.add_argument("--together", type=int, default=1, metavar="N", help=about)
    common.add_no_metadata(parser)
    group = parser.add_argument_group("for rows that do not say it themselves")
    group.add_argument("--method", metavar="NAME", help="how to edit (diffedit); `minidiffedit methods` lists")
    group.add_argument("--inversion", metavar="NAME", help="another way to the noise, for methods that invert")
    common.add_mask_from(group)
    common.add_given(group, settled, needed=False)
    common.add_options(group, settled)
    if settled.steerable:
        common.add_steering(parser)
    common.add_model(parser)


def shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"I/N with I from 1 to N is wanted, got {text!r}")
    return int(index), int(count)


def run_batch(args: argparse.Namespace) -> dict[str, Any]:
    for name, what in (("ray", "workers"), ("together", "pictures")):
        if (asked := getattr(args, name)) is not None and asked < 1:
            raise ValueError(f"--{name} must be 1 or more {what}, got {asked}")
    index, count = part_of(args)
    table = args.output / table_name(index, count)
    if common.same_file(args.manifest, table):
        raise ValueError(f"{table} is the manifest, where the table of results goes; name another folder or file")
    here = {name: Path(os.path.abspath(value)) for name, value in vars(args).items() if isinstance(value, Path)}
    given = vars(args) | here | {"output": None, "manifest": None, "root": None}  # workers may stand elsewhere
    may_lack = ("method", "inversion", "mask_from", "output", *common.steering_names())
    unset = {name for name in may_lack if not given.get(name)}
    defaults = {name: given[name] for name in columns() if name in given and name not in unset}
    rows = read_manifest(args.manifest, defaults, args.masks)
    root = args.root or (args.manifest if args.manifest.is_dir() else args.manifest.parent)
    check_folders(rows, root, args.output)
    groups = grouped(rows, root)[index - 1 :: count]
    for name in ("model", "vae"):
        if (given_path := getattr(args, name)) and os.path.exists(given_path):
            setattr(args, name, os.path.abspath(given_path))
    if args.cache_dir:
        args.cache_dir = here["cache_dir"]
    if table.is_file() and b"\n" in table.read_bytes() and not any(sound_lines(table)) and not args.overwrite:
        raise ValueError(f"{table} is there, and no table of results; --overwrite replaces it all the same")
    editor = Editor(partial(common.load_model, args), root, args.output, not args.no_metadata, args.overwrite)
    editor.check = partial(common.check_weights, args, configs=common.model_configs(args))
    results: Iterable[Any] = (result for group in groups for result in editor(group))
    if args.ray:
        from ..many.ray_batch import ray_results

        results = ray_results(editor, groups, args.ray, args.together)
    elif args.together > 1:
        results = at_once(editor, groups, args.together)
    with contextlib.redirect_stdout(sys.stderr):  # Ray says there what became of its workers
        summary = collect(interruptible(args, results, sum(map(len, groups))), table)
    code = 1 if summary["failed"] else 0
    if code and "TORCHELASTIC_RUN_ID" in os.environ and count > 1:
        warnings.warn("rows failed, but the exit code is 0: torchrun would end the other parts for a 1", stacklevel=2)
        code = 0
    return summary | {"shard": f"{index}/{count}", "versions": common.versions(), "exit": code}


def part_of(args: argparse.Namespace) -> tuple[int, int]:
    """(I, N) of --shard or torchrun's variables; of these also the GPU."""
    if args.shard or args.ray:
        return args.shard or (1, 1)
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        rank, size = -1, 1
    if not 0 <= rank < size:
        given = f"RANK={os.environ.get('RANK')}, WORLD_SIZE={os.environ.get('WORLD_SIZE')}"
        raise ValueError(
            f"the environment has {given}, as of a launcher, but no part follows from it; pass --shard 1/1"
        )
    if size > 1 and args.device == "auto" and (local := os.environ.get("LOCAL_RANK", "")).isdecimal():
        import torch

        if torch.cuda.is_available():
            args.device = f"cuda:{int(local) % torch.cuda.device_count()}"
    return rank + 1, size


def interruptible(args: argparse.Namespace, results: Iterable[Any], total: int) -> Iterator[Any]:
    """Under a progress bar; here an interrupt that an import swallowed takes effect."""
    for result in common.tracker(args.quiet, "row")(results, "batch", total):
        yield result
        if args.interrupted:
            raise KeyboardInterrupt


def say_batch(result: dict[str, Any]) -> str:
    counts = ", ".join(f"{result[name]} {name}" for name in ("made", "already there", "failed"))
    lines = [result["table"], f"{result['rows']} rows: {counts}; UNet rows {result['evaluations']}"]
    lines += [f"row {error['row']} ({error['image']}): {error['error']}" for error in result["errors"]]
    more = result["failed"] - len(result["errors"])
    lines += [f"and {more} more, in the table"] if more > 0 else []
    return "\n".join(map(shown, lines))


# ---------------------------------------------------------------- eval

OURS = ("summary.json", "summary.png")


def add_eval(parser: argparse.ArgumentParser, words: list[str]) -> None:
    known = common.early(words, methods={"nargs": "+", "default": ["diffedit"]})
    settled = common.together([check_takes_picture(blank_plan(name)) for name in known.methods])
    about = "a .csv with the columns image and target, and as far as known source, mask, true_edit, kind, name; or a "
    about += "folder: PIE-Bench's (mapping_file.json) or scenes (scenes.json, as in weights/mini/scenes)"
    parser.add_argument("dataset", type=Path, metavar="DATASET", help=about)
    output, about = Path("evaluation"), "folder for edits.jsonl, summary.json and summary.png (%(default)s)"
    parser.add_argument("-o", "--output", type=Path, default=output, metavar="DIR", help=about)
    about = "any that `minidiffedit methods` lists, or INVERSION+EDITOR (diffedit)"
    parser.add_argument("--methods", nargs="+", default=["diffedit"], metavar="M", help=about)
    about = "any of %(choices)s (psnr mse ssim iou); the last four need the eval extra and load a network"
    choices = (*PLAIN, "lpips", "clip", "structure", "fid")
    parser.add_argument("--metrics", nargs="+", choices=choices, default=PLAIN, metavar="X", help=about)
    parser.add_argument("--overwrite", action="store_true", help="replace files in DIR that are no results, too")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N edits of the set")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="0 and up (%(default)s)")
    parser.add_argument("--save-pictures", action="store_true", help="also write every edit")
    parser.add_argument("--no-plots", dest="plots", action="store_false", help="no summary.png")
    group = parser.add_argument_group("options: every method that has one runs with each of its values")
    for name, one in settled.options.items():
        about = f"{one.about} ({settled.settings[name]})".replace("%", "%%").strip()
        if name == "paste":
            parser.add_argument("--no-paste", dest="paste", action="store_const", const=[False], help=one.about)
        elif name != "seed":
            options: dict[str, Any] = {"nargs": "+", "type": common.parsed(one), "default": argparse.SUPPRESS}
            group.add_argument(flag(name), metavar="V", help=about, **options)
    common.add_model(parser)


def run_eval(args: argparse.Namespace) -> dict[str, Any]:
    if "fid" in args.metrics and not args.save_pictures:
        raise ValueError("fid compares saved pictures: add --save-pictures")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be 1 or more, got {args.limit}")
    known = common.together([blank_plan(name) for name in args.methods]).options.keys() - {"seed"}
    runs = grid(args.methods, {name: value for name, value in vars(args).items() if name in known and value}, args.seed)
    if os.path.lexists(args.output) and not args.output.is_dir():
        raise ValueError(f"{args.output} is no folder")
    others = args.output.is_dir() and [path for path in OURS if Path(args.output, path).exists()]
    if others and not Path(args.output, "edits.jsonl").exists() and not args.overwrite:
        raise ValueError(f"{args.output} holds {others[0]} of another origin; --overwrite replaces it all the same")
    items = open_dataset(args.dataset)[: args.limit]
    if args.plots:
        pyplot()
    sd = common.load(args, [blank_plan(name) for name in args.methods])
    networks, model = load_networks(args.metrics, str(sd.device)), common.identity(sd) | fingerprint(sd)
    options: dict[str, Any] = {"metrics": args.metrics, "seed": args.seed, "identity": model, "networks": networks}
    options |= {"save_pictures": args.save_pictures, "track": common.tracker(args.quiet)}
    rows = evaluate(sd, items, runs, args.output, **options)
    failed = [row for row in rows if "error" in row]
    report = {"dataset": args.dataset.name, "items": len(items), "edits": len(rows), "failed": len(failed)}
    report |= {"seed": args.seed, "metrics": list(args.metrics), "model": model, "versions": common.versions()}
    report["runs"] = summary = summarise(rows, runs)
    write_json(args.output / "summary.json", report)
    if "fid" in networks:
        for one, run in zip(summary, runs):
            one["realism"] = realism([row for row in rows if row["run"] == run], items, args.output, networks["fid"])
        write_json(args.output / "summary.json", report)
    if args.plots and len(failed) < len(rows):
        plot(summary, args.output / "summary.png")
    errors = [{"item": row["item"], "method": row["run"]["method"], "error": row["error"]} for row in failed[:10]]
    report |= {"output": str(args.output), "model": common.describe(sd), "errors": errors}
    return report | {"exit": 1 if failed else 0}


def say_eval(result: dict[str, Any]) -> str:
    lines = []
    for run in result["runs"]:
        figures = run["kinds"]["all"].items()
        means = "  ".join(f"{name} {one['mean']:.4g}" for name, one in figures if one["mean"] is not None)
        lines.append(f"{run['name']}: {run['done']} done, {run['failed']} failed  {means}")
    lines += [shown(f"failed: {one['item']} ({one['method']}): {one['error']}") for one in result["errors"]]
    lines += ["and more, in edits.jsonl"] if result["failed"] > len(result["errors"]) else []
    return "\n".join([*lines, shown(f"{result['output']}: edits.jsonl, summary.json")])
