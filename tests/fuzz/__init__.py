"""Bad input of every kind, and what must never come of it: `make fuzz`; a short form stands in tests/test_trust.py."""

import random
from collections.abc import Callable
from importlib import import_module

# Category -> how many cases the short form draws; those of `environments` each start a process.
SHORT = {
    "checkpoints": 12, "pictures": 12, "masks": 12, "prompts": 12, "options": 25, "states": 12, "manifests": 12,
    "environments": 12, "methods": 40,
}  # fmt: skip
CATEGORIES = tuple(SHORT)


def run_all(
    seed: int,
    scale: float,
    only: str | None = None,
    say: Callable[[str], None] = print,
    most: int | None = None,
    named: str = "",
) -> dict[str, tuple[int, int, int]]:
    """Category -> cases that were refused, that were done, and cases with a fault, each of which is said.

    scale: share of the drawn cases; named: only those whose name holds it; most: at most so many of a category, drawn.
    """
    from .harness import World

    world, table = World(), {}
    try:
        for name in CATEGORIES if only is None else (only,):
            rng = random.Random(f"{seed} {name}")
            cases = [c for c in import_module(f".{name}", __name__).cases(world, rng, scale) if named in c.name]
            if most is not None and len(cases) > most:
                cases = rng.sample(cases, most)
            counts = {"refused": 0, "done": 0}
            faulty = 0
            for case in cases:
                verdict = world.run(case)
                counts[verdict.outcome] += 1
                faulty += bool(verdict.faults)
                for fault in verdict.faults:
                    say(f"{name}: {case.name}: {fault}")
            table[name] = counts["refused"], counts["done"], faulty
    finally:
        world.close()
    return table
