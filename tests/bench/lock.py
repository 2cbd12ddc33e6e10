"""`make lock`: pip's report of what it would install (JSON on stdin) -> tests/locked.txt, a line for each package."""

import json
import re
import sys
from pathlib import Path

LOCKED = Path(__file__).parents[1] / "locked.txt"


def lines(report: dict) -> list[str]:
    """name==version, by name; a build's own mark (torch's +cpu) left out, since another machine needs another."""
    found = [(one["metadata"]["name"], one["metadata"]["version"]) for one in report["install"]]
    plain = {re.sub(r"[-_.]+", "-", name).lower(): version.partition("+")[0] for name, version in found}
    return [f"{name}=={version}" for name, version in sorted(plain.items()) if name != "minidiffedit"]


if __name__ == "__main__":
    head = [line for line in LOCKED.read_text().splitlines() if line.startswith("#")]
    LOCKED.write_text("\n".join([*head, *lines(json.load(sys.stdin))]) + "\n")
