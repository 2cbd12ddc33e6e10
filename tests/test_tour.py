"""The tour: it runs from top to bottom without an error or a warning, and what is committed is such a run."""

import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from commands import ran

sys.path.insert(0, str(Path(__file__).parent / "bench"))

from tour import TOUR, run

from minidiffedit.cli import main

PICTURES = 19  # that a reader sees


def pictures(notebook):
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    return [output for output in shown if "image/png" in output.data]


def check(notebook):
    """Each cell ran once, in order, and none warned; the pictures are there."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert len(pictures(notebook)) >= PICTURES


def test_the_committed_notebook_is_a_whole_run_and_small():
    check(nbformat.read(TOUR, 4))
    assert TOUR.stat().st_size < 2e6


def test_every_chapter_ends_with_an_exercise_and_its_answer():
    cells = nbformat.read(TOUR, 4).cells
    chapters = sum(cell.source.startswith("## ") for cell in cells)
    answers = [cell for before, cell in pairwise(cells) if "**Exercise" in before.source]
    assert len(answers) == chapters - 1  # the last one is the limits
    assert all(cell.cell_type == "code" and "assert" in cell.source for cell in answers)


@pytest.mark.slow
@pytest.mark.long
def test_it_runs(tmp_path):
    check(run(tmp_path))


def test_the_command_copies_it_and_says_how_it_opens(tmp_path, capsys):
    made = ran(capsys, "tour", "-o", tmp_path / "here")
    assert Path(made["output"]).read_bytes() == TOUR.read_bytes()
    assert main(["tour", "-o", str(tmp_path / "there")]) == 0
    assert "jupyter lab" in capsys.readouterr().out
