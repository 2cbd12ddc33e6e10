"""`make mutants`: small mistakes made in the core and the methods, one at a time; the tests should notice each.

    python tests/bench/mutation.py --minutes 30 --seed 0          # drawn from all files, as many as there is time for
    python tests/bench/mutation.py --only ddim diffedit --every   # all of two files
    python tests/bench/mutation.py --only methods/replay --every

cosmic-ray makes them: numbers changed by one, comparisons by their boundary, plus for minus, true for false, loops that
do not run. A core file is tried by the tests that TESTS names, a method by those of its name or else those that import
it; a mutant is killed if one fails or the time is up. Tests that make mistakes of their own (OWN) are left out: they
fail wherever the text that they exchange has changed. What survives is printed by its line: a test that is missing, or
a mistake that changes nothing.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db

ROOT = Path(__file__).parents[2]
TESTS = {
    "diffedit": "diffedit grey",
    "ddim": "ddim diffedit",
    "sd": "prediction hook parity prompts",
    "unet": "parity hook checkpoint fast",
    "attention": "hook parity",
    "vae": "vae parity checkpoint",
    "clip": "parity prompts checkpoint",
    "tokenizer": "tokenizer",
    "checkpoint": "checkpoint refusals",
}
OWN = "turns_a_test_red or turns_it_red"
OPERATORS = {
    "NumberReplacer", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd", "AddNot",
    "ZeroIterationForLoop", "ReplaceBreakWithContinue", "ReplaceUnaryOperator_USub_UAdd",
    *(f"ReplaceBinaryOperator_{to}" for to in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Div", "Pow_Mul")),
    *(f"ReplaceComparisonOperator_{to}" for to in ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Eq_NotEq", "NotEq_Eq")),
}  # fmt: skip

Mutant = tuple[str, str, int, int]  # file, operator, occurrence, line


def files(only: list[str]) -> list[str]:
    """Core files and methods by their names without .py."""
    methods = sorted(f"methods/{path.stem}" for path in (ROOT / "minidiffedit/methods").glob("[a-z]*.py"))
    known = [*TESTS, *(name for name in methods if name not in ("methods/table", "methods/system") and tests_of(name))]
    if strange := {*only} - {*known}:
        sys.exit(f"no file with tests of its own: {', '.join(sorted(strange))}; there are {', '.join(known)}")
    return only or known


def tests_of(name: str) -> list[str]:
    if name in TESTS:
        return [f"tests/test_{test}.py" for test in TESTS[name].split()]
    module = name.removeprefix("methods/")
    if (ROOT / f"tests/test_{module}.py").exists():
        return [f"tests/test_{module}.py"]
    named = re.compile(rf"methods(\.{module}\b| import [^\n]*\b{module}\b)")
    return [
        f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_*.py")) if named.search(path.read_text())
    ]


def mutants(name: str) -> Iterator[Mutant]:
    with use_db(":memory:", WorkDB.Mode.create) as db:
        init([ROOT / "minidiffedit" / f"{name}.py"], db, {})
        for item in db.work_items:
            (one,) = item.mutations
            if one.operator_name.partition("/")[2] in OPERATORS:
                yield name, one.operator_name, one.occurrence, one.start_pos[0]


def passes(tree: Path, tests: list[str], seconds: float) -> bool:
    """Whether the tests pass in a copy of the project; those that take long are left out."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not slow", "-k", f"not ({OWN})"]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run([*command, *tests], cwd=tree, env=environment, capture_output=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def survives(tree: Path, mutant: Mutant, seconds: float) -> bool:
    name, operator, occurrence, _ = mutant
    path = tree / "minidiffedit" / f"{name}.py"
    whole = path.read_text()
    changed = mutate_code(whole, get_operator(operator)(), occurrence)
    assert changed and changed != whole, mutant
    path.write_text(changed)
    try:
        return passes(tree, tests_of(name), seconds)
    finally:
        path.write_text(whole)


def line_of(mutant: Mutant) -> str:
    name, operator, _, number = mutant
    text = (ROOT / "minidiffedit" / f"{name}.py").read_text().splitlines()[number - 1].strip()
    return f"{name}.py:{number}  {operator.partition('/')[2]}  {text}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="FILE", help="ddim, methods/replay, ...")
    parser.add_argument("--minutes", type=float, default=30, metavar="N", help="then no new one (%(default)s)")
    parser.add_argument("--every", action="store_true", help="all of them, however long it takes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which are drawn (%(default)s)")
    args = parser.parse_args()
    drawn = [mutant for name in files(args.only) for mutant in mutants(name)]
    random.Random(args.seed).shuffle(drawn)
    start, usual, tried, left = time.monotonic(), dict[str, float](), dict[str, int](), list[Mutant]()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "project"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "judge", "*.egg-info"))
        for mutant in drawn:
            if not args.every and time.monotonic() - start > 60 * args.minutes:
                break
            name = mutant[0]
            if name not in usual:
                begun = time.monotonic()
                assert passes(tree, tests_of(name), 600), f"{name}'s tests fail as they are"
                usual[name] = time.monotonic() - begun
            tried[name] = tried.get(name, 0) + 1
            if survives(tree, mutant, 5 * usual[name] + 10):
                left.append(mutant)
                print("survived:", line_of(mutant), flush=True)
    report(drawn, tried, left)
    return 0


def report(drawn: list[Mutant], tried: dict[str, int], left: list[Mutant]) -> None:
    def share(name: str, some: list[str]) -> str:
        number, alive = sum(tried[one] for one in some), sum(mutant[0] in some for mutant in left)
        return f"{name:24} {number - alive:5} of {number:5} killed, {100 * (1 - alive / max(number, 1)):.0f} %"

    for name in sorted(tried):
        print(share(name, [name]))
    for kind, some in (("core", tried.keys() & TESTS.keys()), ("methods", tried.keys() - TESTS.keys())):
        if some:
            print(share(kind, [*some]))
    print(f"{sum(tried.values())} of {len(drawn)} tried")


if __name__ == "__main__":
    sys.exit(main())
