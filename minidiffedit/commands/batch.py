"""batch: the rows of a manifest, one after another, shared out or on a cluster."""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from .common import (
    add_command,
    add_mask_options,
    add_model,
    add_sampling,
    add_steering,
    load_model,
    same_file,
    shown,
    versions,
)


def add(commands: Any) -> None:
    batch = add_command(commands, "batch", run_batch, say_batch, "edit many pictures; goes on where it stopped")
    batch.add_argument(
        "manifest", type=Path, metavar="MANIFEST",
        help=".jsonl or .csv with the columns image, target, and any option below, or a folder of pictures",
    )  # fmt: skip
    batch.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for results and table")
    batch.add_argument(
        "--root", type=Path, metavar="DIR", help="the folder that holds all pictures (default: the manifest's)"
    )
    either = batch.add_mutually_exclusive_group()
    either.add_argument(
        "--shard", type=shard, metavar="I/N",
        help="only the I-th of N parts, 1/N to N/N (default: all, or torchrun's RANK of WORLD_SIZE)",
    )  # fmt: skip
    either.add_argument("--ray", type=int, metavar="N", help="on N workers of a Ray cluster, or of one started here")
    batch.add_argument("--no-metadata", action="store_true", help="write no settings into the pictures")
    group: Any = batch.add_argument_group("for rows that do not say it themselves")
    group.add_argument("--target", metavar="TEXT", help="what the results shall show")
    group.add_argument("--source", default="", metavar="TEXT", help="what the pictures show now (may be left out)")
    group.add_argument("--negative-prompt", default="", metavar="TEXT", help="what the edits lead away from")
    group.add_argument("--strength", type=float, default=0.8, metavar="R", help="0..1; less keeps more (%(default)s)")
    group.add_argument("--seed", type=int, metavar="S", help="0 and up (default: from each picture and its texts)")
    add_sampling(group)
    group.add_argument("--encode-text", choices=("null", "source"), default="null", help="(%(default)s)")
    group.add_argument("--refine", type=int, default=1, metavar="K", help="calls per encoding step (%(default)s)")
    group.add_argument("--size", type=int, metavar="PX", help="shorter side to work at (default: the training size)")
    group.add_argument("--chunk", type=int, metavar="N", help="maps per model call; fewer need less memory")
    group.add_argument("--no-paste", dest="paste", action="store_false", help="no input's pixels outside the mask")
    add_mask_options(batch).add_argument("--mask", type=Path, metavar="FILE", help="your mask instead, for every row")
    add_steering(batch)
    add_model(batch)


def shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"I/N with I from 1 to N is wanted, got {text!r}")
    return int(index), int(count)


def run_batch(args: argparse.Namespace) -> dict[str, Any]:
    from ..many.batch import COLUMNS, Editor, check_folders, collect, grouped, read_manifest, table_name

    if args.ray is not None and args.ray < 1:
        raise ValueError(f"--ray must be 1 or more workers, got {args.ray}")
    index, count = part_of(args)
    table = args.output / table_name(index, count)
    if same_file(args.manifest, table):
        raise ValueError(f"{table} is the manifest, where the table of results goes; name another folder or file")
    for name in ("mask", "union", "subtract", "cache_dir"):  # workers may stand elsewhere
        if value := getattr(args, name):
            setattr(args, name, Path(os.path.abspath(value)))
    defaults = {name: value for name in COLUMNS if (value := getattr(args, name, None)) is not None}
    defaults["mask_clip"] = "none" if args.mask_clip is None else args.mask_clip
    del defaults["output"]  # the folder
    rows = read_manifest(args.manifest, defaults)
    root = args.root or (args.manifest if args.manifest.is_dir() else args.manifest.parent)
    check_folders(rows, root, args.output)
    groups = grouped(rows, root)[index - 1 :: count]
    if args.model and os.path.exists(args.model):
        args.model = os.path.abspath(args.model)
    editor = Editor(partial(load_model, args), root, args.output, not args.no_metadata)
    if args.ray:
        from ..many.ray_batch import ray_results

        results = ray_results(editor, groups, args.ray)
    else:
        results = (result for group in groups for result in editor(group))
    shown = bar(results, sum(map(len, groups)), args)
    with contextlib.redirect_stdout(sys.stderr):  # Ray says there what became of its workers
        summary = collect(shown, table)
    code = 1 if summary["failed"] else 0
    if code and "TORCHELASTIC_RUN_ID" in os.environ and count > 1:
        warnings.warn("rows failed, but the exit code is 0: torchrun would end the other parts for a 1", stacklevel=2)
        code = 0
    return summary | {"shard": f"{index}/{count}", "versions": versions(), "exit": code}


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


def bar(results: Iterable[Any], total: int, args: argparse.Namespace) -> Iterator[Any]:
    """A progress bar, silent where stderr is no terminal; here an interrupt that an import swallowed takes effect."""
    from huggingface_hub.utils import tqdm

    for result in tqdm(results, total=total, unit="row", disable=True if args.quiet else None, file=sys.stderr):
        yield result
        if args.interrupted:
            raise KeyboardInterrupt


def say_batch(result: dict[str, Any]) -> str:
    counts = ", ".join(f"{result[name]} {name}" for name in ("made", "already there", "failed"))
    lines = [result["table"], f"{result['rows']} rows: {counts}; UNet rows {result['evaluations']}"]
    lines += [f"row {error['row']} ({error['image']}): {error['error']}" for error in result["errors"]]
    if result["failed"] > len(result["errors"]):
        lines.append(f"and {result['failed'] - len(result['errors'])} more, in the table")
    return "\n".join(map(shown, lines))
