"""`python tests/faults [--seed N] [--scale S]`: what failed, then the counts."""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from faults import run_all  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0)
    args = parser.parse_args()
    start = time.monotonic()
    counts = run_all(args.scale, args.seed, lambda line: print(line, flush=True))
    columns = ("runs", "cut short", "old", "new", "parts after SIGKILL", "faults")
    print(f"\n{'':<26}" + "".join(f"{name:>{len(name) + 3}}" for name in columns))
    for section, count in counts.items():
        print(f"{section:<26}" + "".join(f"{count[name]:>{len(name) + 3}}" for name in columns))
    together = {name: sum(count[name] for count in counts.values()) for name in columns}
    print(f"{'together':<26}" + "".join(f"{together[name]:>{len(name) + 3}}" for name in columns))
    print(f"seed {args.seed}, {time.monotonic() - start:.0f} s")
    return int(together["faults"] > 0)


if __name__ == "__main__":
    sys.exit(main())
