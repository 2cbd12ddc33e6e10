"""eval: methods and settings over a data set."""

import argparse
import os
from pathlib import Path
from typing import Any

from .common import add_command, add_model, clip_value, describe, identity, load, shown, tracker, versions

METHODS = ("diffedit", "sdedit", "encode", "mask", "user-mask", "reconstruction")
PLAIN = ("psnr", "mse", "ssim", "iou")
OPTIONS: dict[str, tuple[Any, Any, str, str]] = {
    "strength": (float, 0.8, "R", "how much noise, 0..1; less keeps more"),
    "guidance_scale": (float, 7.5, "G", "how strictly to follow the text"),
    "steps": (int, 50, "N", "sampling steps, 1..999"),
    "mask_strength": (float, 0.5, "S", "noise at which texts differ, 0..1"),
    "maps": (int, 10, "N", "maps that are averaged"),
    "mask_clip": (clip_value, 3.0, "C", "cut values at C times the mean, or none"),
    "mask_threshold": (float, 0.5, "T", "0..1; less gives larger masks"),
    "encode_text": (str, "null", "TEXT", "null or source"),
    "refine": (int, 1, "K", "calls per encoding step"),
}


def add(commands: Any) -> None:
    command = add_command(commands, "eval", run_eval, say_eval, "edit a data set and measure; goes on where it stopped")
    command.add_argument(
        "dataset", type=Path, metavar="DATASET",
        help="a .csv with the columns image and target, and as far as known source, mask, true_edit, kind, name; or a "
        "folder: PIE-Bench's (mapping_file.json) or scenes (scenes.json, as in weights/mini/scenes)",
    )  # fmt: skip
    command.add_argument(
        "-o", "--output", type=Path, default=Path("evaluation"), metavar="DIR",
        help="folder for edits.jsonl, summary.json and summary.png (%(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["diffedit"], metavar="M",
        help=f"any of {', '.join(METHODS)} (diffedit)",
    )  # fmt: skip
    command.add_argument(
        "--metrics", nargs="+", choices=(*PLAIN, "lpips", "clip", "structure", "fid"), default=PLAIN, metavar="X",
        help="any of %(choices)s (psnr mse ssim iou); the last four need the eval extra and load a network",
    )  # fmt: skip
    command.add_argument("--limit", type=int, metavar="N", help="only the first N edits of the set")
    command.add_argument("--seed", type=int, default=0, metavar="S", help="0 and up (%(default)s)")
    command.add_argument("--size", type=int, metavar="PX", help="shorter side to work at (default: the training size)")
    command.add_argument("--no-paste", dest="paste", action="store_false", help="no source's pixels outside the mask")
    command.add_argument("--save-pictures", action="store_true", help="keep the edits, in OUTPUT/pictures")
    command.add_argument("--no-plots", dest="plots", action="store_false", help="no summary.png")
    group = command.add_argument_group("settings; several values are several runs")
    for name, (kind, default, letter, text) in OPTIONS.items():
        group.add_argument(
            f"--{name.replace('_', '-')}", type=kind, nargs="+", default=[default], metavar=letter,
            help=f"{text} ({default})",
        )  # fmt: skip
    add_model(command)


def run_eval(args: argparse.Namespace) -> dict[str, Any]:
    from ..many.datasets import open_dataset
    from ..many.evaluate import check_runs, evaluate, grid, load_networks, plot, pyplot, realism, summarise, write_json
    from ..files.states import fingerprint

    if "fid" in args.metrics and not args.save_pictures:
        raise ValueError("fid compares saved pictures: add --save-pictures")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit must be 1 or more, got {args.limit}")
    options = {name: getattr(args, name) for name in OPTIONS} | {"paste": [args.paste], "size": [args.size]}
    runs = grid(args.methods, options)
    check_runs(runs, args.seed)
    if os.path.lexists(args.output) and not args.output.is_dir():
        raise ValueError(f"{args.output} is no folder")
    items = open_dataset(args.dataset)[: args.limit]
    if args.plots:
        pyplot()
    sd = load(args)
    networks, model = load_networks(args.metrics, str(sd.device)), identity(sd) | fingerprint(sd)
    rows = evaluate(
        sd, items, runs, args.output, metrics=args.metrics, seed=args.seed, identity=model, networks=networks,
        save_pictures=args.save_pictures, track=tracker(args.quiet),
    )  # fmt: skip
    summary = summarise(rows, runs)
    failed = [row for row in rows if "error" in row]
    report = {
        "dataset": args.dataset.name, "items": len(items), "edits": len(rows), "failed": len(failed), "seed": args.seed,
        "metrics": list(args.metrics), "model": model, "versions": versions(), "runs": summary,
    }  # fmt: skip
    write_json(args.output / "summary.json", report)
    if "fid" in networks:
        for one, run in zip(summary, runs):
            own = [row for row in rows if row["run"] == run]
            one["realism"] = realism(own, items, args.output, networks["fid"])
        write_json(args.output / "summary.json", report)
    if args.plots and len(failed) < len(rows):
        plot(summary, args.output / "summary.png")
    errors = [{"item": row["item"], "method": row["run"]["method"], "error": row["error"]} for row in failed[:10]]
    return report | {"output": str(args.output), "model": describe(sd), "errors": errors, "exit": 1 if failed else 0}


def say_eval(result: dict[str, Any]) -> str:
    lines = []
    for run in result["runs"]:
        figures = run["kinds"]["all"].items()
        means = "  ".join(f"{name} {one['mean']:.4g}" for name, one in figures if one["mean"] is not None)
        lines.append(f"{run['name']}: {run['done']} done, {run['failed']} failed  {means}")
    lines += [shown(f"failed: {one['item']} ({one['method']}): {one['error']}") for one in result["errors"]]
    lines += ["and more, in edits.jsonl"] if result["failed"] > len(result["errors"]) else []
    return "\n".join([*lines, shown(f"{result['output']}: edits.jsonl, summary.json")])
