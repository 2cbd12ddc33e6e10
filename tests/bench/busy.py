"""What a busy machine does to an edit: `make bench-busy`.

The same edit of the miniature, as a command and in Python, with nothing else to do and beside one process that keeps a
core busy, in turn, for each way in which OpenMP's threads may wait. Seconds of the edit alone: loading does not depend
on it. "ours" is what minidiffedit sets, "torch's own" what there would be without; VALUES are spin counts to compare.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
MINI = ROOT / "weights" / "mini"
SCENE = MINI / "scenes" / "horse-zebra" / "source.png"
TEXTS = "a photo of a horse on a grass field", "a photo of a zebra on a grass field"
WAYS = {"torch's own": {"GOMP_SPINCOUNT": None}, "ours": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
LIBRARY = f"""
import sys{{first}}, minidiffedit
sd = minidiffedit.StableDiffusion.load({str(MINI)!r}, device="cpu")
done = minidiffedit.edit(sd, {str(SCENE)!r}, source={TEXTS[0]!r}, target={TEXTS[1]!r}, seed=0, steps={{steps}})
print(sum(done.seconds.values()))
"""
LOSS, BUSY = 1.1, 3.0  # what is allowed: quiet against torch's own, beside a busy process against quiet


def seconds(surface: str, way: dict[str, str | None], folder: str, steps: int) -> float:
    """Of one edit in a process of its own."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("OMP_", "GOMP_", "KMP_", "MKL_NUM"))}
    environment |= {"PYTHONPATH": str(ROOT), "MINIDIFFEDIT_CACHE": folder}
    environment |= {name: value for name, value in way.items() if value}
    own = None in way.values()  # torch's own: torch is there before minidiffedit, as far as that can tell
    if surface == "library":
        words = ["-c", LIBRARY.format(first=", torch" if own else "", steps=steps)]
    else:
        start = (
            "import sys, runpy" + (", torch" if own else "") + "; runpy.run_module('minidiffedit', None, '__main__')"
        )
        options = [
            "--source",
            TEXTS[0],
            "--target",
            TEXTS[1],
            "--seed",
            "0",
            "--model",
            str(MINI),
            "--json",
            "--steps",
            str(steps),
        ]
        words = ["-c", start, "edit", str(SCENE), *options, "-o", f"{folder}/o.png"]
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout) if surface == "library" else sum(json.loads(done.stdout)["seconds"].values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", nargs="*", default=[], metavar="VALUE", help="spin counts to compare besides")
    parser.add_argument("--rounds", type=int, default=3, help="each way quiet and busy in each round (%(default)s)")
    parser.add_argument(
        "--steps", type=int, default=50, help="of the edit; fewer only to try this script (%(default)s)"
    )
    args = parser.parse_args()
    ways = WAYS | {f"spin {value}": {"GOMP_SPINCOUNT": value} for value in args.values}
    found: dict[tuple[str, str, bool], list[float]] = {}
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f} before it began")
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for busy in (False, True) if number % 2 == 0 else (True, False):
                other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
                try:
                    for surface in ("command", "library"):
                        for name, way in ways.items():
                            found.setdefault((surface, name, busy), []).append(
                                seconds(surface, way, folder, args.steps)
                            )
                finally:
                    if other:
                        other.kill()
                        other.wait()
    print(f"{'':22} {'quiet':>8} {'busy':>8} {'busy/quiet':>10}   {'quiet / torch`s own':>20}   (of {args.rounds})")
    for surface in ("command", "library"):
        for name in ways:
            quiet, busy = (median(found[surface, name, one]) for one in (False, True))
            loss = quiet / median(found[surface, "torch's own", False])
            met = "" if name != "ours" else "  met" if loss <= LOSS and busy / quiet <= BUSY else "  MISSED"
            print(f"{surface:8}{name:14} {quiet:8.2f} {busy:8.2f} {busy / quiet:10.2f}   {loss:20.2f}{met}")


if __name__ == "__main__":
    main()
