"""learn: weights of one picture, as a LoRA that any method may edit with."""

import argparse
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..files.images import read_picture, to_rgb, to_tensor, working_size, write_whole
from ..files.results import MADE_BY, free
from ..options import options_of
from ..plans import COMMON, check_given, function_at
from . import flag
from .common import add_image, add_model, check_outputs, load, parsed, tracker

LEARNS = "lora:lora"


def add_learn(parser: argparse.ArgumentParser, words: list[str]) -> None:
    add_image(parser, "the weights (.safetensors; default: NAME-lora.safetensors here)", ".safetensors")
    parser.add_argument("--source", metavar="TEXT", default="", help="what the picture shows")
    for name, one in (options_of(function_at(LEARNS)) | {"size": COMMON["size"]}).items():
        default = None if name == "seed" else one.default
        about = f"{one.about} ({'drawn' if name == 'seed' else default})"
        parser.add_argument(flag(name), type=parsed(one), metavar="N", default=default, help=about)
    add_model(parser)


def run_learn(args: argparse.Namespace) -> dict[str, Any]:
    options, source = options_of(function_at(LEARNS)), check_given("source", args.source)
    args.seed = secrets.randbelow(2**32) if args.seed is None else args.seed
    settings = {name: one.check(getattr(args, name)) for name, one in options.items()}
    size, path = COMMON["size"].check(args.size), args.picture or args.image
    output, picture = args.output or free(Path(f"{path.stem}-lora.safetensors")), read_picture(path)
    working_size(picture.size, 512 if size is None else size)
    check_outputs(args, [path], [], state=output)
    sd, losses = load(args), list[float]()
    bar = iter(tracker(args.quiet)(range(settings["lora_steps"]), "learn"))

    def told(step: int, loss: float) -> None:
        losses.append(loss)
        next(bar, None)

    def eps(x: Any, *asked: Any, **hooks: Any) -> list[Any]:
        return [e.to(x) for e in sd.eps(x, *asked, **hooks)]

    with torch.no_grad():
        at = working_size(picture.size, sd.side if size is None else size, sd.factor)
        x0, start = sd.encode(to_tensor(to_rgb(picture), at)), sd.clock()
        made = function_at(LEARNS)(eps, x0, sd.projections, sd.text([source]), **settings, told=told)
    tensors = {name: one.cpu().contiguous() for name, one in function_at("lora:state")(made).items()}
    write_whole(output, save(tensors, MADE_BY))
    share = max(len(losses) // 10, 1)
    means = [sum(part) / share for part in (losses[:share], losses[-share:])] if losses else None
    shown = {"output": str(output), "source": source, **settings, "rows": sd.gradients, "seconds": sd.clock() - start}
    return shown | {"loss": means}


def say_learn(result: dict[str, Any]) -> str:
    said = "" if result["loss"] is None else "; loss {:.4f} at first, {:.4f} at last".format(*result["loss"])
    return f"{result['output']}\nseed {result['seed']}; UNet rows {result['rows']}, {result['seconds']:.1f} s{said}"
