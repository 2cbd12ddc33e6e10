"""What a row of the table holds (table.py)."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class System:
    """paper: its arXiv number, or where it is described. edit: "module:function" in this folder, empty where there is
    none yet. inversion, mask: rows of INVERSIONS and MASKS, where the editor takes a path and a mask. options: where
    their defaults differ from the functions' own. status: L1 (works, proven on small weights in `tests/`), todo or
    blocked. letter: A inference on plain SD v1, B with gradients, C a checkpoint of its own, D another network.
    weights: base, inpainting, instruct or example. note: what it is, what is missing, or why it is blocked.
    """

    paper: str
    edit: str = ""
    inversion: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    mask: str = ""
    status: str = "L1"
    letter: str = "A"
    weights: str = "base"
    note: str = ""


def todo(paper: str, letter: str, note: str = "not written yet") -> System:
    return System(paper, status="todo", letter=letter, note=note)


def blocked(paper: str, why: str) -> System:
    return System(paper, status="blocked", letter="D", note=why)
