"""EDICT: there and back again exactly, and a step as the paper writes it."""

import math
import re

import numpy as np
import pytest
import torch
from proofs import TEXTS, edited, turns_red
from stubs import ALPHA_BAR, Counting, latent

from minidiffedit import levels
from minidiffedit.methods import edict as E
from minidiffedit.run import plan

pytestmark = pytest.mark.filterwarnings("ignore:.*do not divide")


def bent(x, t, texts):
    """A prediction that is not linear in x."""
    return [torch.tanh(1.3 * x + text) * (1 + t / 1000) for text in texts]


def edit(eps=bent, source=0.3, target=0.8, **options):
    return E.edict(eps, latent(2, 4, 6, 5), 0.0, target, source, **{"steps": 10, "strength": 0.8} | options)


@pytest.mark.parametrize("g", [1.0, 3.0])
@pytest.mark.parametrize("mixing", [1.0, 0.93, 0.6])
@pytest.mark.parametrize("strength", [0.1, 0.7, 0.8])
def test_under_equal_texts_the_picture_comes_back(g, mixing, strength):
    options = {"guidance_scale": g, "mixing": mixing, "strength": strength}
    torch.testing.assert_close(edit(target=0.3, **options), latent(2, 4, 6, 5), rtol=1e-9, atol=1e-9)
    assert (edit(**options) - latent(2, 4, 6, 5)).abs().max() > 1e-3


def test_a_step_down_and_a_step_up_are_the_papers():
    """Equations 10 to 15 in numpy, one level up and down: x' = A x + B eps(y), ..."""
    x0, p, (a_0, a_1) = latent(2, 4, 6, 5), 0.8, (float(np.float32(ALPHA_BAR[t])) for t in levels(10).t[:2])
    A = math.sqrt(a_0 / a_1)
    B = math.sqrt(1 - a_0) - math.sqrt(a_0 * (1 - a_1) / a_1)

    def e(x, text):
        return bent(x, levels(10).t[1], [text])[0]

    y = (x0 - (1 - p) * x0) / p
    x = (x0 - (1 - p) * y) / p
    y = (y - B * e(x, 0.3)) / A
    x = (x - B * e(y, 0.3)) / A
    x = A * x + B * e(y, 0.8)
    y = A * y + B * e(x, 0.8)
    expected = p * x + (1 - p) * y
    ours = edit(strength=0.1, guidance_scale=1.0, mixing=p)
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


def test_what_it_asks():
    eps = Counting(bent)
    edit(eps, guidance_scale=2.0)
    assert eps.rows == 8 * 8 * 2 and [t for _, t, _ in eps.calls[:4]] == [1, 1, 101, 101]
    assert [texts for _, _, texts in eps.calls] == [[0.0, 0.3]] * 16 + [[0.0, 0.8]] * 16
    alone = Counting(bent)
    edit(alone, guidance_scale=1.0)
    assert alone.rows == 4 * 8 * 2
    assert torch.equal(E.edict(bent, latent(2, 4, 6, 5)[1:], 0.0, 0.8, 0.3, steps=10), edit()[1:])


@pytest.mark.parametrize("mixing, steps", [(0.93, 400), (0.6, 50), (0.5, 50), (0.97, 999)])
def test_where_rounding_would_outgrow_the_picture_it_is_refused(mixing, steps):
    """Before any work, and told what would do: that comes back."""
    with pytest.raises(ValueError, match=f"mixing {mixing} over {0.8 * steps:g} levels .* give mixing") as refused:
        plan("edict", target="a", mixing=mixing, steps=steps)
    with pytest.raises(ValueError):
        edit(mixing=mixing, steps=steps)
    enough, fewer = re.search(
        r"give mixing ([\d.]+) or more, or steps x strength of at most (\d+)", str(refused.value)
    ).groups()
    assert len(enough) <= 5  # and the least of three digits
    with pytest.raises(ValueError, match="give mixing"):
        plan("edict", target="a", mixing=float(enough) - 0.001, steps=steps)
    for options in ({"mixing": float(enough), "steps": steps}, {"mixing": mixing, "steps": int(int(fewer) / 0.8)}):
        assert steps == 999 or (edit(target=0.3, **options) - latent(2, 4, 6, 5)).abs().max() < 1e-5
        assert plan("edict", target="a", **options).settings["steps"] == options["steps"]
    assert plan("edict", target="a", mixing=1.0, steps=999)


def test_on_a_picture(sd, picture):
    same = edited(sd, picture, "edict", source="a horse", target="a horse")
    assert (same.latent - same.x0).norm() <= 1e-4 * same.x0.norm()
    done = edited(sd, picture, "edict", **TEXTS)
    assert done.evaluations == {"decode": 64} and done.latent.dtype == torch.float32
    assert (done.latent - done.x0).norm() > 0.01 * done.x0.norm()


MUTATIONS = {
    "the order of undoing": ("edict:edict", "x = (x - (1 - p) * y) / p", "x = (x - (1 - p) * pair[1]) / p",
        test_under_equal_texts_the_picture_comes_back),
    "both moved at once": ("edict:edict", "y = move(y, down(x, j), a[j], a[j - 1])",
        "y = move(y, down(pair[0], j), a[j], a[j - 1])", test_a_step_down_and_a_step_up_are_the_papers),
    "nothing is refused": ("edict:check_edict", "> MOST", "> 1e300",
        test_where_rounding_would_outgrow_the_picture_it_is_refused),
    "the way up is guided to the target": ("edict:edict", "predict(source)", "predict(target)", test_what_it_asks),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    turns_red(__name__, "E", *MUTATIONS[name], monkeypatch)
