"""`python tests/fuzz [--seed N] [--scale S] [--only CATEGORY]`: every case; what failed, then the counts by category.
`python tests/fuzz --parsers MINUTES`: instead, the readers of foreign text alone, guided by what they run.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT.parent)]

from fuzz import run_all  # noqa: E402
from fuzz.parsers import run_readers  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the drawn cases")
    parser.add_argument("--only", help="one category")
    parser.add_argument("--parsers", type=float, metavar="MINUTES", help="the readers of foreign text, so long")
    args = parser.parse_args()
    if args.parsers is not None:
        return int(run_readers(60 * args.parsers, args.seed, args.only, say=lambda line: print(line, flush=True)) > 0)
    start = time.monotonic()
    table = run_all(args.seed, args.scale, args.only, say=lambda line: print(line, flush=True))
    print(f"\n{'category':<14}{'cases':>7}{'refused':>9}{'done':>7}{'faults':>8}")
    for name, (refused, done, faults) in table.items():
        print(f"{name:<14}{refused + done:>7}{refused:>9}{done:>7}{faults:>8}")
    refused, done, faults = (sum(row[i] for row in table.values()) for i in range(3))
    print(f"{'together':<14}{refused + done:>7}{refused:>9}{done:>7}{faults:>8}   seed {args.seed}, "
          f"{time.monotonic() - start:.0f} s")  # fmt: skip
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
