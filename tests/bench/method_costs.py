"""Whether a method takes longer than its model rows say: `python tests/bench/method_costs.py [--only masactrl ...]`.

A method's loops / the same calls of the model without its taps, features, weights of its own and arithmetic, in turn:
the median of pairs with its range. A call with a gradient is repeated with a backward pass. Texts and autoencoder are
left out of both. 1.15 is what is allowed; above it the exit code is 1. On the miniature what a method does besides
weighs more than on a model of full size: --full takes random weights of full size, --size 512 for minutes a method.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from alternating import alternate
from PIL import Image
from torch import Tensor

from minidiffedit import StableDiffusion
from minidiffedit.many.bench import FULL, write_random
from minidiffedit.many.verify import picture
from minidiffedit.methods.table import SYSTEMS
from minidiffedit.run import GIVEN, begin, blank_plan, execute, plan

MOST = 1.15
FEW = {"inner_steps": 2, "iterations": 10, "updates": 3, "text_steps": 3, "lora_steps": 3, "maps": 4}
ROOT = Path(__file__).parents[2]


class Seen:
    """Keeps what the model is asked, and passes it on."""

    def __init__(self, eps: Callable[..., list[Tensor]]):
        self.eps, self.calls = eps, list[tuple[Tensor, int, list[Tensor], Any, bool]]()

    def __call__(self, x: Tensor, t: int, texts: Any, **hooks: Any) -> list[Tensor]:
        made = self.eps(x, t, texts, **hooks)
        plain = [text.detach() for text in texts]
        self.calls.append((x.detach(), t, plain, hooks.get("given"), made[0].requires_grad))
        return made

    def repeat(self) -> None:
        for x, t, texts, given, gradient in self.calls:
            if not gradient:
                self.eps(x, t, texts, given=given)
                continue
            with torch.enable_grad():
                made = self.eps(x.clone().requires_grad_(), t, texts, given=given)
                torch.stack(made).float().square().sum().backward()


def settled(name: str, photo: Image.Image, few: dict[str, int]) -> Any:
    """The method on made-up inputs for a square picture; few: options, of which it takes those that it has."""
    blank, size = blank_plan(name), photo.width
    mask = torch.zeros(1, 1, size // 8, size // 8)
    mask[..., size // 32 : size // 12, size // 32 : size // 12] = 1
    made = {"mask": mask, "pairs": [["a photo of a horse", "a photo of a zebra"]], "picture": photo}
    made["points"] = f"{size // 4},{size // 4}=>{size // 3},{size // 3}"
    texts = {"source": "a photo of a horse on a grass field", "target": "a photo of a zebra on a grass field"}
    wanted = {*blank.needs, *texts} & blank.given.keys()
    given = {one: made.get(GIVEN[one].kind, texts.get(one, "make it a zebra")) for one in wanted}
    if "mask" in blank.given and "mask" not in blank.functions:
        given["mask"] = mask
    return plan(name, seed=0, size=size, **given, **{one: few[one] for one in few.keys() & blank.options})


def measured(sd: StableDiffusion, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the loops alone: a run's time in the stages that ask the model."""
    photo = picture(args.size)
    asked = settled(name, photo, FEW | {"steps": args.steps})
    seen = Seen(sd.eps)
    sd.eps = seen  # type: ignore[method-assign]
    execute(asked, sd, photo)
    sd.eps = seen.eps  # type: ignore[method-assign]
    job = begin(asked, sd, photo)  # texts and latent, once

    def method() -> None:
        with torch.no_grad():
            job.values.clear()
            job.known, job.calls = (), []
            job.call("latent")

    return alternate(method, seen.repeat, args.pairs) | {"calls": len(seen.calls)}


def main() -> int:
    known = [name for name, one in SYSTEMS.items() if one.edit and one.weights == "base" and name != "text-to-image"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=known, choices=known, metavar="METHOD")
    parser.add_argument("--steps", type=int, default=10, help="(%(default)s)")
    parser.add_argument("--size", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="random weights of full size, in place of the miniature")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{time.strftime('%F %T')}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.size} px")
    above = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_random(Path(folder, "full"), FULL, torch.bfloat16) if args.full else ROOT / "weights" / "mini"
        sd = StableDiffusion.load(model, device=args.device)
        for name in args.only:
            try:
                found = measured(sd, name, args)
                assert found["calls"], "it asks the model nothing at these settings"
            except Exception as error:  # told, and the next one is measured
                above.append(name)
                print(f"{name:28} {type(error).__name__}: {str(error)[:90]}", flush=True)
                continue
            met = found["cpu_ratio" if args.device == "cpu" else "ratio"] <= MOST
            above += [] if met else [name]
            print(
                f"{name:28} {found['ratio']:.3f} ({found['least']:.3f}..{found['most']:.3f}), CPU "
                f"{found['cpu_ratio']:.3f}; {found['seconds'][0]:.2f} / {found['seconds'][1]:.2f} s, "
                f"{found['calls']} calls{'' if met else f'  ABOVE {MOST}'}",
                flush=True,
            )
    print(f"above: {', '.join(above) or 'none'}")
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
