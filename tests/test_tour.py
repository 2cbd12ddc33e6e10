"""The tour: it runs from top to bottom without an error or a warning, and what is committed is such a run."""

import ast
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from commands import ran

sys.path.insert(0, str(Path(__file__).parent / "bench"))

from tour import TOUR, digest, run

from minidiffedit.cli import main

PICTURES = 24  # that a reader sees
LONGEST = 25  # lines of a cell
SCOPES = (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@pytest.fixture(scope="module")
def tour():
    return nbformat.read(TOUR, 4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def links(notebook):
    """Where the text's links lead."""
    return [
        at
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for at in re.findall(r"\]\(([^)]*)\)", cell.source)
    ]


def check(notebook):
    """Each cell ran once, in order, and none warned; the pictures are there."""
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", ()) for output in outputs) >= PICTURES
    assert not [output for output in outputs if "not with these weights" in output.get("text", "")]


def test_the_committed_notebook_is_a_whole_run_and_small(tour):
    check(tour)
    assert tour.metadata.code_that_ran == digest(tour), "the code has changed since: `make tour`"
    assert TOUR.stat().st_size < 2e6


def test_every_chapter_ends_with_an_exercise_and_its_answer(tour):
    chapters = [cell.source.split()[1] for cell in tour.cells if cell.source.startswith("## ")]
    assert chapters == [str(i) for i in range(1, 14)]
    answers = [cell for before, cell in pairwise(tour.cells) if "**Exercise" in before.source]
    assert len(answers) == len(chapters) - 1  # the last one is the limits
    assert all(cell.cell_type == "code" and re.search(r"^(assert |here\()", cell.source, re.M) for cell in answers)


def test_cells_are_short_and_plain(tour):
    assert not [cell.source for cell in tour.cells if len(cell.source.splitlines()) > LONGEST]
    calls = [node for cell in code(tour) for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]
    assert not {"exec", "eval", "compile"} & {getattr(call.func, "id", "") for call in calls}


def made(node):
    """The names that a cell makes for others."""
    if isinstance(node, ast.FunctionDef):
        return {node.name}
    own = {node.id} if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else set()
    return own.union(*map(made, ast.iter_child_nodes(node))) if not isinstance(node, SCOPES) else own


def test_a_cell_run_again_finds_what_it_found_before(tour):
    """A name that several cells make is read by none but those: no cell depends on which of them ran last."""
    trees = [ast.parse(cell.source) for cell in code(tour)]
    count = Counter(name for tree in trees for name in made(tree))
    several = {name for name, cells in count.items() if cells > 1}
    for tree in trees:
        read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        assert not read & several - made(tree), ast.unparse(tree)


def test_links_lead_somewhere(tour):
    inside = {at for at in links(tour) if not at.startswith("https://")}
    assert inside and not [at for at in inside if not (TOUR.parent / at).is_file()]


@pytest.mark.slow
@pytest.mark.long
def test_it_runs(tmp_path):
    check(run(tmp_path))


def test_the_command_copies_it_and_says_how_it_opens(tmp_path, capsys, tour):
    copy = nbformat.read(ran(capsys, "tour", "-o", tmp_path / "here")["output"], 4)
    nbformat.validate(copy)
    assert code(copy) == code(tour) and len(copy.cells) == len(tour.cells)
    assert all(at.startswith("https://") for at in links(copy))  # what stands beside the clone's does not beside this
    assert "(`threshold_maps`)" in "".join(cell.source for cell in copy.cells)
    assert main(["tour", "-o", str(tmp_path / "there")]) == 0
    assert "jupyter lab" in capsys.readouterr().out
