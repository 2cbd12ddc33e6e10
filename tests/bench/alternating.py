"""Two ways of doing a thing, timed in turn in one process: A B A B ..., so that other load hits both."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any


def clocked(call: Callable[[], Any]) -> tuple[float, float]:
    """(seconds, cores kept busy)."""
    start, worked = time.perf_counter(), time.process_time()
    call()
    seconds = time.perf_counter() - start
    return seconds, (time.process_time() - worked) / seconds


def alternate(a: Callable[[], Any], b: Callable[[], Any], pairs: int, warm: bool = True) -> dict[str, Any]:
    """Median of the pairs' ratios a / b with its range, the medians of both, cores kept busy. Both are called once
    before, where `warm`. Every other pair starts with b. cpu_ratio: the same of CPU seconds, which hold still on a
    machine that is busy otherwise (threads must wait asleep: OMP_WAIT_POLICY=PASSIVE)."""
    if warm:
        a(), b()
    timed: dict[int, list[tuple[float, float]]] = {0: [], 1: []}
    for number in range(pairs):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            timed[side].append(clocked((a, b)[side]))
    ratios = [one[0] / two[0] for one, two in zip(timed[0], timed[1])]
    worked = [one[0] * one[1] / (two[0] * two[1] or 1) for one, two in zip(timed[0], timed[1])]
    return {
        "ratio": median(ratios), "least": min(ratios), "most": max(ratios), "pairs": pairs,
        "cpu_ratio": median(worked),
        "seconds": [median(s for s, _ in timed[side]) for side in (0, 1)],
        "cores": [median(c for _, c in timed[side]) for side in (0, 1)],
    }  # fmt: skip


def row(name: str, what: str, found: dict[str, Any], limit: float | None = None) -> str:
    """One line of a table."""
    a, b = found["seconds"]
    cores = "/".join(f"{c:.2f}" for c in found["cores"])
    verdict = "" if limit is None else f"  {'met' if found['ratio'] <= limit else 'MISSED'} ({limit})"
    return (
        f"{name:3} {what:44} {found['ratio']:.3f} ({found['least']:.3f}..{found['most']:.3f}) of {found['pairs']}, CPU "
        f"{found['cpu_ratio']:.3f}; {a:.2f} / {b:.2f} s, cores {cores}{verdict}"
    )
