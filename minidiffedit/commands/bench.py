"""bench."""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .common import add_command, add_model, load, versions


def add(commands: Any) -> None:
    bench = add_command(commands, "bench", run_bench, say_bench, "measure this machine: seconds, rates, memory, errors")
    bench.add_argument("--size", type=int, metavar="PX", help="side of the pictures, 64..1024 (default: training size)")
    bench.add_argument("--steps", type=int, default=4, metavar="N", help="sampling steps of the edit (%(default)s)")
    bench.add_argument("--maps", type=int, default=2, metavar="N", help="maps of its mask (%(default)s)")
    bench.add_argument("--repeats", type=int, default=3, metavar="R", help="timed calls per stage (%(default)s)")
    bench.add_argument("--tiny", action="store_true", help="random weights of a tiny model, to try the command itself")
    add_model(bench)
    bench.epilog = "Without --model: random weights of SD v1's shapes, 2 or 4 GB in a temporary folder."


PLAIN = {"attention": "sdpa", "compile": False, "low_memory": False}


def run_bench(args: argparse.Namespace) -> dict[str, Any]:
    from ..many.bench import bench

    if args.tiny and args.model:
        raise ValueError("--tiny has random weights; leave out --model")
    with weights(args) as folder:

        def loaded(plain: bool) -> Any:
            options = {name: value for name, value in PLAIN.items() if plain and hasattr(args, name)}
            return load(argparse.Namespace(**vars(args) | {"model": folder} | options))

        found = bench(
            loaded, size=args.size, steps=args.steps, maps=args.maps, repeats=args.repeats,
            say=lambda line: None if args.quiet else print(f"measuring: {line}", file=sys.stderr, flush=True),
        )  # fmt: skip
    found["model"] = {"id": args.model or f"random, {'tiny' if args.tiny else 'full size'}"} | found["model"]
    options = {name: getattr(args, name) for name in PLAIN if hasattr(args, name)}
    return found | {"options": options, "versions": versions()}


@contextlib.contextmanager
def weights(args: argparse.Namespace) -> Iterator[str]:
    """The model that was asked for, or random weights in a folder that does not stay."""
    if args.model:
        yield args.model
        return
    from ..many.bench import FULL, TINY, parameters, write_random
    from ..fast import choose_device, choose_dtype

    configs = TINY if args.tiny else FULL
    dtype = choose_dtype(args.dtype, choose_device(args.device), parameters(configs))
    with tempfile.TemporaryDirectory(prefix="minidiffedit-bench-") as folder:
        yield str(write_random(Path(folder), configs, dtype))


def say_bench(found: dict[str, Any]) -> str:
    machine, model, ceiling, memory = (found[name] for name in ("machine", "model", "ceiling", "memory"))
    options = ", ".join(f"{name} {value}" for name, value in found["options"].items()) or "the plain path"
    lines = [
        f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}, load {machine['load_average']}",
        f"{model['id']}, {model['dtype']}, {model['size']} x {model['size']} pixels; {options}",
        f"matrix products reach {ceiling['tflop_per_s']:.3f} TFLOP/s ({ceiling['side']} x {ceiling['side']})", "",
        f"{'stage':16} {'samples':>7} {'first':>8} {'seconds':>8} {'least':>8} {'most':>8} {'TFLOP':>7} {'TFLOP/s':>8} "
        f"{'of best':>7} {'cores':>5}  error",
    ]  # fmt: skip
    for name, row in found["stages"].items():
        lines.append(
            f"{name:16} {row['samples']:7} {row['first_seconds']:8.3f} {row['seconds']:8.3f} {row['least']:8.3f} "
            f"{row['most']:8.3f} {row['tflop']:7.3f} {row['tflop_per_s']:8.3f} {row['of_ceiling']:7.0%} "
            f"{row['cpu_over_wall']:5.2f}  {say_error(row)}"
        )
    lines += ["", "attention inside the plain UNet, 2 texts"]
    for name, row in found["attention"].items():
        said = (
            f"cannot run: {row['cannot_run']}" if "cannot_run" in row else f"{row['seconds']:.3f} s  {say_error(row)}"
        )
        lines.append(f"{name:16} {said}")
    edit = found["edit"]
    rows, further = (" + ".join(str(n) for n in one["rows"].values()) for one in (edit, edit["further"]))
    each = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in edit["seconds"].items())
    lines += [
        "", f"an edit, {edit['steps']} steps, {edit['maps']} maps: {rows} rows, {edit['seconds_in_all']:.2f} s "
        f"({each}), {edit['tflop_per_s']:.3f} TFLOP/s, {edit['of_ceiling']:.0%} of the best",
        f"a further edit of the picture: {further} rows, {edit['further']['over_first']:.2f} of that time",
        f"loaded in {found['load_seconds']:.1f} s; peak memory "
        + (f"{memory['peak_bytes'] / 2**30:.2f} GiB, {memory['peak_over_weights']:.2f} x the weights"
           if memory["peak_bytes"] else "unknown: this system does not tell it"),
    ]  # fmt: skip
    return "\n".join(lines)


def say_error(row: dict[str, Any]) -> str:
    if "error" not in row:
        return ""
    return f"{row['error']:.1e}" + ("" if row["error"] <= row["error_bound"] else f" ABOVE {row['error_bound']:.0e}")
