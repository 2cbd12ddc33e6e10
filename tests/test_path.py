"""What an inversion hands over: levels, rows, texts, null texts, the held source, and the step of both kinds."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mutants import mutant, run
from stubs import ALPHA_BAR, latent

from minidiffedit import path as Q
from minidiffedit.ddim import levels, move

LEVELS = [latent(2, 4, 3, 5, seed=seed) for seed in range(5)]


def test_the_way_down_and_the_rows():
    path = Q.Path(LEVELS, 10, "null")
    assert path.top == 4 and [*path.down()] == [4, 3, 2, 1] and [*Q.Path(LEVELS[:1], 10).down()] == []
    assert (path.t, path.a) == levels(10) and path.steps == 10
    rows = path.rows(3)
    assert rows.shape == (6, 4, 3, 5) and all(torch.equal(rows[i : i + 2], LEVELS[4]) for i in (0, 2, 4))
    one, each = torch.ones(1, 77, 2), torch.stack([torch.full((77, 2), 2.0), torch.full((77, 2), 3.0)])
    assert path.texts(one, each)[:, 0, 0].tolist() == [1, 1, 2, 3] and path.texts(one).shape == (2, 77, 2)
    with pytest.raises(ValueError, match="1 to 4 levels"):
        Q.Path(LEVELS, 3)


def test_each_level_may_have_a_null_text_of_its_own():
    path = Q.Path(LEVELS, 10, "any", nulls={4: "four", 2: "two"})
    assert [path.null(j) for j in path.down()] == ["four", "any", "two", "any"]


def test_the_source_is_held_where_the_path_pins_it():
    x = latent(6, 4, 3, 5, seed=9)
    before = x.clone()
    held = Q.Path(LEVELS, 10, pinned=True).pin(x, 3)
    assert torch.equal(held[:2], LEVELS[3]) and torch.equal(held[2:], x[2:]) and torch.equal(x, before)
    assert Q.Path(LEVELS, 10).pin(x, 3) is x


def test_a_step_is_ddims():
    path, x, e = Q.Path(LEVELS, 10), latent(4, 4, 3, 5, seed=7), latent(4, 4, 3, 5, seed=8)
    for j in path.down():
        torch.testing.assert_close(path.step(x, e, j), move(x, e, path.a[j], path.a[j - 1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_with_noises_it_is_the_step_of_the_paper(eta):
    """2010.02502, eq. 12 with sigma by eq. 16, in numpy; each role takes the noise of its picture."""
    noises = {j: latent(2, 4, 3, 5, seed=20 + j) for j in range(1, 5)}
    path, x, e = Q.Path(LEVELS, 10, noises=noises, eta=eta), latent(4, 4, 3, 5, seed=7), latent(4, 4, 3, 5, seed=8)
    for j in path.down():
        a, to = (float(np.float32(ALPHA_BAR[path.t[k]])) for k in (j, j - 1))
        sigma = eta * np.sqrt((1 - to) / (1 - a)) * np.sqrt(1 - a / to)
        mean = np.sqrt(to) * (x - np.sqrt(1 - a) * e) / np.sqrt(a) + np.sqrt(1 - to - sigma**2) * e
        expected = mean + sigma * torch.cat([noises[j]] * 2)
        torch.testing.assert_close(path.step(x, e, j), expected, rtol=1e-9, atol=1e-9)


def test_editors_walk_a_path():
    """A step alone is of first order, whatever the path's sampler is."""
    from minidiffedit import methods

    files = [*Path(methods.__path__[0]).glob("*.py")]
    assert len(files) > 40 and not [file.name for file in files if "path.step(" in file.read_text()]


def test_a_shallower_path_keeps_what_belongs_to_it():
    noises, nulls = {j: LEVELS[j] for j in range(1, 5)}, {4: "four", 1: "one"}
    path = Q.Path(LEVELS, 10, "any", nulls=nulls, noises=noises, eta=0.3, pinned=True).prefix(2)
    assert isinstance(path, Q.Path) and path.top == 2 and path.steps == 10 and path.null(1) == "one"
    assert path.null(2) == "any" and path.eta == 0.3 and path.pinned and path.noises[2] is LEVELS[2]
    assert all(path[j] is LEVELS[j] for j in range(3))


# name: (where in path.py, what stands there, what a mistake would put, the test that must fail)
MUTATIONS = {
    "the last step is left out": ("Path.down", "self.top, 0, -1", "self.top, 1, -1", test_the_way_down_and_the_rows),
    "a null text of another level": ("Path.null", "self.nulls.get(j", "self.nulls.get(j - 1",
        test_each_level_may_have_a_null_text_of_its_own),
    "all roles are held": ("Path.pin", "x[len(self[j]) :]", "self[j], self[j]",
        test_the_source_is_held_where_the_path_pins_it),
    "every path holds": ("Path.pin", "if self.pinned else x", "", test_the_source_is_held_where_the_path_pins_it),
    "noises without a root": ("mean_and_sigma", "math.sqrt((1 - a_to) / (1 - a) * (1 - a / a_to))",
        "(1 - a_to) / (1 - a) * (1 - a / a_to)", test_with_noises_it_is_the_step_of_the_paper),
    "the noise it replaces is kept": ("mean_and_sigma", "math.sqrt(1 - a_to - sigma**2) * e", "math.sqrt(1 - a_to) * e",
        test_with_noises_it_is_the_step_of_the_paper),
    "noises of the other picture": ("Path.step", ".repeat(len(x) // len(self.noises[j]), 1, 1, 1)",
        ".repeat_interleave(len(x) // len(self.noises[j]), 0)", test_with_noises_it_is_the_step_of_the_paper),
    "a prefix is not pinned": ("Path.of", '"eta", "pinned", "sampler"', '"eta", "sampler"',
        test_a_shallower_path_keeps_what_belongs_to_it),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    function, old, new, test = MUTATIONS[name]
    monkeypatch.setattr(sys.modules[__name__], "Q", mutant(f"path:{function}", old, new, monkeypatch))
    with pytest.raises((AssertionError, RuntimeError)):
        run(test)
