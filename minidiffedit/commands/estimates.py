"""What a run will take on this machine: seconds by the rate of the last run of its kind, memory by the shapes.

Rates stand in a file of the user's cache, written after each run. Where none fits, or the model is not here, the answer
is None, not a guess.
"""

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from .. import cost
from ..fast import choose_device, choose_dtype
from ..files.images import working_size, write_whole
from ..many.bench import parameters
from ..plans import Plan
from ..result import Result
from ..run import check_near

MOST = 500  # rates kept, the latest


def rates_file() -> Path:
    """In $MINIDIFFEDIT_CACHE, else where the user's caches are. Raises RuntimeError for a user without a home."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MINIDIFFEDIT_CACHE") or Path(caches, "minidiffedit")) / "rates.json"


def read_rates() -> dict[str, Any]:
    try:
        found = json.loads(rates_file().read_text())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RuntimeError, RecursionError):
        return {}


def kind_of_run(args: argparse.Namespace, method: str, config: Any, at: Any, device: Any, dtype: Any) -> str:
    """What a rate depends on, as one text."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {torch.get_num_threads()}"
    fast = args.attention, args.compile, args.low_memory
    return json.dumps([method, name, str(dtype), config.block_out_channels, config.layers_per_block, [*at], fast])


def remember(args: argparse.Namespace, done: Result) -> None:
    """Keep the seconds of a model row, and those beside the UNet. A cache that cannot be written changes nothing."""
    unet = sum(seconds for stage, seconds in done.seconds.items() if stage in done.evaluations)
    if done.rows and hasattr(done.sd.unet, "config"):
        beside = sum(done.seconds.values()) - unet
        sd, at = done.sd, [*done.settings["working_size"], done.settings.get("crop", False)]
        kind = kind_of_run(args, done.method, sd.unet.config, at, sd.device, sd.dtype)
        rates = {one: rate for one, rate in read_rates().items() if one != kind}
        rates |= {kind: {"row": unet / done.rows, "beside": beside}}
        with contextlib.suppress(OSError, RuntimeError):
            rates_file().parent.mkdir(parents=True, exist_ok=True)
            write_whole(rates_file(), json.dumps(dict([*rates.items()][-MOST:])).encode())


def estimated(
    args: argparse.Namespace, plans: list[Plan], rows: dict[str, int], size: Any, configs: dict[str, Any] | None
) -> dict[str, Any]:
    """seconds (loading apart), rate: where they come from, memory: bytes of weights and what the networks hold at once;
    None where it is unknown. size: of the picture, (width, height), None for the training size.
    """
    if configs is None:
        return {"seconds": None, "rate": "unknown: the model is not here", "memory": None}
    device, side = choose_device(args.device), configs["unet"].sample_size * configs["vae"].factor
    dtype = choose_dtype(args.dtype, device, parameters(configs))
    asked = plans[0].settings.get("size")
    check_near(asked, side)
    if hasattr(args, "width"):  # a picture is made of noise
        at = tuple(one or side for one in size)
    else:
        at = working_size(size, asked or side, 64 if args.compile and min(size) >= 64 else configs["vae"].factor)
    told = [(one.method, configs["unet"], [*at, one.settings.get("crop", False)]) for one in plans]
    kinds = {kind_of_run(args, *each, device, dtype) for each in told}
    found = read_rates().get(kinds.pop()) if len(kinds) == 1 else None
    said = {"memory": None if args.low_memory else cost.memory(plans[0], configs, at, dtype)}
    known = found if isinstance(found, dict) else {}
    if not all(isinstance(known.get(name), float) for name in ("row", "beside")):
        return {"seconds": None, "rate": "unknown until such a run was made on this machine", **said}
    seconds = known["row"] * sum(rows.values()) + known["beside"] * len(plans)
    return {"seconds": seconds, "rate": "by the last such run on this machine", **said}
