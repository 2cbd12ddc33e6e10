"""What methods with gradients cost at full size: seconds of a row, peak memory, and what that makes at the defaults.

    python tests/bench/gradient_costs.py [--only dds sine] [--size 512] [--weights FOLDER]

Random weights of full size in bfloat16 on one thread, each method in a process of its own at the fewest iterations that
its options allow. Seconds are those of the processor; of a row with gradient they hold the call and the way back.
Extrapolated: rows at the defaults, the most there may be, times their seconds; without text encoder and autoencoder.
Peak: of the process, with these (`weights` of it is the model's).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from method_costs import settled

from minidiffedit import StableDiffusion
from minidiffedit.cost import Counter, count_one
from minidiffedit.many.bench import FULL, parameters, peak, write_random
from minidiffedit.many.verify import picture
from minidiffedit.methods.table import SYSTEMS
from minidiffedit.run import execute

NAMES = [name for name, row in SYSTEMS.items() if row.letter == "B" and row.weights == "base"]
FEWEST = {"steps": 2, "inner_steps": 1, "text_steps": 1, "nudges": 1, "iterations": 2, "lora_steps": 1, "batch": 1}


def alone(name: str, size: int, weights: str) -> dict[str, Any]:
    """In this process: rows and seconds without gradient and with it, and the most bytes."""
    torch.set_num_threads(1)
    sd = StableDiffusion.load(weights, device="cpu", dtype="bfloat16")
    eps, grad = sd.eps, torch.autograd.grad
    rows, seconds = [0, 0], [0.0, 0.0]  # without gradient, with it

    def asked(x: Any, t: int, texts: Any, **hooks: Any) -> Any:
        start = time.process_time()
        made = eps(x, t, texts, **hooks)
        rows[made[0].requires_grad] += len(x) * len(texts)
        seconds[made[0].requires_grad] += time.process_time() - start
        return made

    def back(*given: Any, **how: Any) -> Any:
        start = time.process_time()
        made = grad(*given, **how)
        seconds[True] += time.process_time() - start
        return made

    sd.eps, torch.autograd.grad = asked, back
    execute(settled(name, picture(size), FEWEST), sd, picture(size))
    return {"per_row": [s / max(n, 1) for s, n in zip(seconds, rows)], "peak": peak(sd)}


def at_defaults(name: str) -> tuple[int, int]:
    """Rows without gradient and with it."""
    counter = Counter()
    count_one(settled(name, picture(64), {}), counter, [])
    return counter.evaluations - counter.gradients, counter.gradients


def line(name: str, found: dict[str, Any]) -> str:
    plain, learned = rows = at_defaults(name)
    per_row = [f"{one:.1f}" if one else "" for one in found["per_row"]]
    minutes = sum(n * one for n, one in zip(rows, found["per_row"])) / 60
    cells = [f"`{name}`", *per_row, f"{found['peak'] / 2**30:.1f}", f"{plain:,}", f"{learned:,}", f"{minutes:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES, metavar="METHOD")
    parser.add_argument("--size", type=int, default=256, help="a side of the picture (%(default)s)")
    parser.add_argument("--weights", type=Path, help="where the random weights are kept (default: nowhere)")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.alone:
        print(json.dumps(alone(args.only[0], args.size, str(args.weights))))
        return 0
    print(f"{time.strftime('%F')}, torch {torch.__version__}, {args.size} px, ", end="")
    print(f"weights {2 * parameters(FULL) / 2**30:.1f} GiB\n")
    print("| method | s a row | s a row with gradient | peak, GiB | rows | with gradient | extrapolated, min |")
    print("|---|" + 6 * "---|", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        model = args.weights or Path(folder, "model")
        if not model.exists():
            write_random(model, FULL, torch.bfloat16)
        for name in args.only:
            command = [sys.executable, __file__, "--alone", "--only", name, "--size", str(args.size)]
            done = subprocess.run([*command, "--weights", str(model)], stdout=subprocess.PIPE, text=True)
            failed += done.returncode != 0
            print(f"| `{name}` | failed |" if done.returncode else line(name, json.loads(done.stdout)), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
