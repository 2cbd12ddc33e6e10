"""`make mutants`: small mistakes made in the core and the methods, one at a time; the tests should notice each.

    python tests/bench/mutation.py --minutes 30 --seed 0          # in turn of all files, as many as there is time for
    python tests/bench/mutation.py --only core                    # or methods, or some: ddim methods/replay
    python tests/bench/mutation.py --only ddim diffedit --every   # all of two files

cosmic-ray makes them: numbers changed by one, comparisons by their boundary, plus for minus, true for false, loops that
do not run. The fast tests of a file run once, watched: which lines each runs, and how long it takes. A mutant is tried
first by the tests that run its statement, then by the quickest others (the value of a table or a default is seen
elsewhere): those first that killed before, then the fastest; it is killed if one fails or all take far longer than they
did. Tests that make mistakes of their own (OWN) are left out: they fail wherever the text that they exchange has
changed. What survives is printed as a line before and after: a test that is missing, or a mistake that changes nothing.
Those found to change nothing stand in equivalent.txt, with the reason, and are not counted. At the end the tests that
killed run on the text as it is, and must pass: else what they killed says nothing.

Each try is a fork of this process, which has imported torch and the peers, but nothing of ours, and computes nothing.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest
from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db

ROOT = Path(__file__).parents[2]
CORE = ["diffedit", "ddim", "sd", "unet", "attention", "vae", "clip", "tokenizer", "checkpoint"]
TESTS = "diffedit grey ddim prediction hook parity prompts checkpoint vae tokenizer refusals fast"  # of the core
OF_ALL = "tests/test_settings.py"  # of all methods: defaults, bounds, constants, the fewest steps
OWN = "turns_a_test_red or turns_it_red"
DIRECT, FURTHER = 120, 30  # seconds of tests that run a mutant's statement, of others; as long as the watched ones take
OPERATORS = {
    "NumberReplacer", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd", "AddNot",
    "ZeroIterationForLoop", "ReplaceBreakWithContinue", "ReplaceUnaryOperator_USub_UAdd",
    *(f"ReplaceBinaryOperator_{to}" for to in ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Div", "Pow_Mul")),
    *(f"ReplaceComparisonOperator_{to}" for to in ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Eq_NotEq", "NotEq_Eq")),
}  # fmt: skip


class Mutant(NamedTuple):
    name: str  # of the file, "ddim" or "methods/replay"
    operator: str
    occurrence: int
    line: int

    def text(self) -> str:
        """The file with the mistake in it; nothing where that is no Python."""
        changed = mutate_code(path_of(self.name).read_text(), get_operator(self.operator)(), self.occurrence)
        with contextlib.suppress(SyntaxError):
            compile(changed, self.name, "exec")
            return changed
        return ""

    def said(self) -> tuple[str, str]:
        """Its line before and after."""
        before, after = (text.splitlines() for text in (path_of(self.name).read_text(), self.text()))
        return before[self.line - 1].strip(), after[self.line - 1].strip()


def path_of(name: str, root: Path = ROOT) -> Path:
    return root / "minidiffedit" / f"{name}.py"


def files(only: list[str]) -> list[str]:
    """Core files and methods by their names without .py."""
    methods = sorted(f"methods/{path.stem}" for path in (ROOT / "minidiffedit/methods").glob("[a-z]*.py"))
    methods = [name for name in methods if name not in ("methods/table", "methods/system") and tests_of(name)]
    groups = {"core": CORE, "methods": methods, **{name: [name] for name in (*CORE, *methods)}}
    if strange := {*only} - groups.keys():
        sys.exit(f"no file with tests of its own: {', '.join(sorted(strange))}; there are {', '.join(groups)}")
    return [name for group in only or ("core", "methods") for name in groups[group]]


def tests_of(name: str) -> tuple[str, ...]:
    """The test files of a method: that of its name, else those that import it, and what all have; of the core TESTS."""
    module = name.removeprefix("methods/")
    if name in CORE:
        return tuple(f"tests/test_{test}.py" for test in TESTS.split())
    if (ROOT / f"tests/test_{module}.py").exists() and module not in CORE:
        return f"tests/test_{module}.py", OF_ALL
    return importers(module)


def importers(module: str) -> tuple[str, ...]:
    """The test files that import a method, and what all have; none where none does."""
    named = re.compile(rf"methods(\.{module}\b| import [^\n]*\b{module}\b)")
    found = [f"tests/{one.name}" for one in sorted(ROOT.glob("tests/test_*.py")) if named.search(one.read_text())]
    return (*found, OF_ALL) if found else ()


def mutants(name: str) -> Iterator[Mutant]:
    with use_db(":memory:", WorkDB.Mode.create) as db:
        init([path_of(name)], db, {})
        for item in db.work_items:
            (one,) = item.mutations
            if one.operator_name.partition("/")[2] in OPERATORS:
                yield Mutant(name, one.operator_name, one.occurrence, one.start_pos[0])


class Watched:
    """A plugin of pytest: the lines of ours that each test runs, its seconds, and which failed."""

    def __init__(self, tree: Path, kept: Path):
        self.kept = kept
        self.ours, self.ran, self.seconds, self.failed = f"{tree}/minidiffedit/", dict[str, set](), {}, set[str]()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        lines, start = self.ran.setdefault(item.nodeid, set()), time.process_time()

        def line(frame, event, _):
            lines.add((frame.f_code.co_filename[len(self.ours) : -3], frame.f_lineno))
            return line

        sys.settrace(lambda frame, *_: line if frame.f_code.co_filename.startswith(self.ours) else None)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.seconds[item.nodeid] = time.process_time() - start

    def pytest_runtest_logreport(self, report):
        if report.outcome != "passed":
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self, exitstatus):
        if exitstatus in (0, 1, 5):  # all passed, some failed, none is fast
            self.kept.write_text(repr((self.ran, self.seconds, self.failed)))


class Ordered:
    """A plugin of pytest: these tests alone, in this order; the one that fails is written into a file."""

    def __init__(self, tests: list[str], failed: Path):
        self.places, self.failed = {test: place for place, test in enumerate(tests)}, failed

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((one for one in items if one.nodeid in self.places), key=lambda one: self.places[one.nodeid])

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.write_text(report.nodeid)


def run(tree: Path, tests: Sequence[str], plugin: object, seconds: float, *options: str) -> int:
    """pytest in a fork that runs in a copy of the project; its exit code, or the signal below 0 that ended it."""
    assert len(os.listdir("/proc/self/task")) == 1, "a fork of a process with threads may wait for ever"
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what its tests had started
        return code
    code = 99
    try:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1,) * 2)  # of its own: the machine may be busy
        resource.setrlimit(resource.RLIMIT_AS, (16 << 30,) * 2)
        signal.alarm(int(20 * seconds))
        with open(tree / "said.txt", "wb") as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        usual = ["-p", "no:cacheprovider", f"--basetemp={tree}/tmp", "-m", "not slow", "-k", f"not ({OWN})"]
        code = int(pytest.main([*usual, *options, *tests], plugins=[plugin]))
    finally:
        os._exit(code)


@cache
def watched(tree: Path, file: str) -> tuple[dict[str, set], dict[str, float]]:
    """Lines and seconds by test of a file, of those that pass while watched; kept until something changes."""
    helpers = [path for path in ROOT.glob("tests/*.py") if not path.name.startswith("test_")]
    sources = [*ROOT.glob("minidiffedit/**/*.py"), *helpers, ROOT / file]
    stamp = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(sources))).hexdigest()[:16]
    kept = ROOT / ".mutants" / f"{Path(file).stem}-{stamp}.txt"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        code = run(tree, [file], Watched(tree, kept), 1800)
        assert kept.exists(), (code, (tree / "said.txt").read_text()[-2000:])
    ran, seconds, failed = eval(kept.read_text(), {"set": set})
    print(f"{file}: {len(ran)} tests watched, {sum(seconds.values()):.0f} s; failed: {len(failed)}", flush=True)
    return {test: lines for test, lines in ran.items() if test not in failed}, seconds


def span(tree: ast.Module, line: int) -> range:
    """The lines of the statement on that line; of a function's head (its defaults) those of the whole function."""
    spans = [range(1, 10**6)]
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            inner = None if isinstance(node, ast.FunctionDef) else getattr(node, "body", None)
            end = node.end_lineno if not inner else max(node.lineno, inner[0].lineno - 1)
            spans.append(range(node.lineno, end + 1))
    return min((one for one in spans if line in one), key=len)


def tried_by(mutant: Mutant, tree: Path, kills: Counter[str]) -> tuple[list[str], bool, float]:
    """The tests in order, whether one runs the statement, and their seconds."""
    ran, seconds, direct = dict[str, set](), dict[str, float](), set[str]()
    numbers, own = span(ast.parse(path_of(mutant.name).read_text()), mutant.line), tests_of(mutant.name)
    for file in dict.fromkeys(
        [*own, *(importers(mutant.name.removeprefix("methods/")) if mutant.name not in CORE else ())]
    ):
        if file not in own and direct:
            break
        lines, took = watched(tree, file)
        ran, seconds = ran | lines, seconds | took
        direct |= {test for test in lines if not lines[test].isdisjoint((mutant.name, number) for number in numbers)}
    chosen, left, whole = list[str](), {True: DIRECT, False: FURTHER}, 0.0
    for test in sorted(ran, key=lambda test: (test not in direct, -kills[test], seconds[test])):
        left[test in direct] -= seconds[test]
        if left[test in direct] > 0:
            chosen.append(test)
            whole += seconds[test]
    return chosen, bool(direct), whole


def survives(tree: Path, mutant: Mutant, kills: Counter[str]) -> str:
    """Nothing where a test notices it, else what is to be printed."""
    tests, direct, seconds = tried_by(mutant, tree, kills)
    path, place, failed = path_of(mutant.name, tree), path_of(mutant.name), tree / "failed.txt"
    path.write_text(mutant.text())
    failed.write_text("")
    try:
        named = [*dict.fromkeys(test.partition("::")[0] for test in tests)]
        if tests and run(tree, named, Ordered(tests, failed), 3 * seconds + 20, "-x") not in (0, 5):
            kills[failed.read_text()] += 1
            return ""
    finally:
        shutil.copy2(place, path)
    before, after = mutant.said()
    return f"{mutant.name}.py:{mutant.line}{'' if direct else ' (no test runs it)'}\n    {before}\n    {after}"


def load() -> None:
    """What tests import, once for all."""
    peers = ("models.unets.unet_2d_condition", "models.autoencoders.autoencoder_kl", "schedulers.scheduling_ddim")
    ours = ("hypothesis", "PIL.Image", "safetensors.torch", "tokenizers", "transformers.models.clip.modeling_clip")
    for name in (*ours, *(f"diffusers.{peer}" for peer in peers)):
        importlib.import_module(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="FILE", help="core, methods, ddim, methods/replay")
    parser.add_argument("--minutes", type=float, default=30, metavar="N", help="then no new one (%(default)s)")
    parser.add_argument("--every", action="store_true", help="all of them, however long it takes")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which are drawn (%(default)s)")
    args = parser.parse_args()
    every = [sorted(mutants(name)) for name in files(args.only)]
    for some in every:
        random.Random(args.seed).shuffle(some)
    drawn = [one for turn in zip_longest(*every) for one in turn if one]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "project"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "judge", "*.egg-info"))
        os.environ.update(PYTHONPATH=str(tree), OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
        load()
        tries(drawn, tree, 1e9 if args.every else 60 * args.minutes)
    return 0


def changes_nothing(said: str) -> bool:
    """Whether equivalent.txt has it: as it stands, or by a pattern for all files."""
    known = (Path(__file__).parent / "equivalent.txt").read_text().splitlines()
    return said in known or any(re.search(one[5:], said) for one in known if one.startswith("any: "))


def tries(drawn: list[Mutant], tree: Path, seconds: float) -> None:
    start, tried, left, equal, kills = time.monotonic(), list[str](), list[str](), 0, Counter[str]()
    for mutant in drawn:
        if time.monotonic() - start > seconds:
            break
        if not mutant.text():
            continue
        if changes_nothing(f"{mutant.name}: {mutant.said()[1]}"):
            equal += 1
            continue
        tried.append(mutant.name)
        if line := survives(tree, mutant, kills):
            left.append(mutant.name)
            print("survived:", line, flush=True)
    check_killers(tree, [test for test in kills if test])
    core = {name for name in tried if name in CORE}
    groups = [(name, {name}) for name in sorted({*tried})] + [("core", core), ("methods", {*tried} - core)]
    for name, some in groups:
        if number := sum(one in some for one in tried):
            killed = number - sum(one in some for one in left)
            print(f"{name:24} {killed:5} of {number:5} killed, {100 * killed / number:.0f} %")
    print(f"{len(tried)} of {len(drawn)} tried in {time.monotonic() - start:.0f} s; {equal} known to change nothing")
    print(f"{kills.total() - kills['']} killed by a failed test, {kills['']} by an import that fails, a crash, no end")


def check_killers(tree: Path, tests: list[str]) -> None:
    files = [*dict.fromkeys(test.partition("::")[0] for test in tests)]
    if tests and (code := run(tree, files, Ordered(tests, tree / "failed.txt"), 1800)):
        sys.exit(f"no rate: without any mistake pytest ends with {code}:\n{(tree / 'said.txt').read_text()[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
