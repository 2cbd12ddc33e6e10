"""BARET (our reading): its limits, what is learned, its loss falls, rows."""

import pytest
import torch
from proofs import checked_slopes, double, edited, turns_red
from stubs import latent

from minidiffedit.attention import Site
from minidiffedit.methods import baret as B
from minidiffedit.methods import null_text as T
from minidiffedit.methods.inversions import ddim
from minidiffedit.methods.replay import replay

X0 = latent(1, 4, 8, 8, dtype=torch.float32)


def moved(sd, x0=X0, **options):
    options = {"steps": 3, "inner_steps": 0, "cross_steps": 0.0, "self_steps": 0.0} | options
    return B.baret(sd.eps, x0, sd.text([""]), sd.text(["a zebra"]), sd.coarsest, **options)


def test_without_exchange_it_is_the_plain_walk(sd):
    null, target = sd.text([""]), sd.text(["a zebra"])
    plain = replay(sd.eps, ddim(sd.eps, X0, null, null, steps=3), target)
    for options in ({}, {"inner_steps": 2}):
        torch.testing.assert_close(moved(sd, **options), plain, rtol=1e-4, atol=1e-4)
    for options in ({"cross_steps": 1.0, "inner_steps": 2}, {"self_steps": 1.0}):
        assert (moved(sd, **options) - plain).abs().max() > 1e-3


def test_an_edit_that_takes_all_maps_from_an_equal_row_is_that_row(sd):
    """Nothing learned: the row between is under the target's text, as the edit."""
    torch.testing.assert_close(moved(sd, cross_steps=1.0), moved(sd), rtol=1e-4, atol=1e-4)


def test_whose_maps_a_row_has(sd):
    """Rows of a call: between and edit without text; picture, between and edit with theirs. Values stay its own."""
    rows, found, texts = torch.arange(5.0)[:, None, None, None], [], [sd.text([one]) for one in ("", "a zebra")]

    def plain(site, q, k, v):
        return torch.cat([q, k, v], -1)

    def eps(x, t, texts, tap=None):
        if tap:
            sites = [Site("up", level, 0, kind) for kind, level in (("cross", 0), ("self", sd.coarsest), ("self", 0))]
            found.append([tap(plain, site, rows, rows, rows).flatten(1).tolist() for site in sites])
        return sd.eps(x, t, texts)

    B.baret(eps, X0, *texts, sd.coarsest, steps=4, inner_steps=0, cross_steps=0.75, self_steps=0.5)
    own = [[row] * 3 for row in range(5)]
    between, pictures = [*own[:4], [3, 3, 4]], [*own[:4], [2, 2, 4]]
    assert found == [[between, pictures, own]] * 2 + [[between, own, own]] + [[own, own, own]]


def test_the_text_learns_to_follow_the_path(sd):
    null, target = sd.text([""]), sd.text(["a zebra"])
    path = ddim(sd.eps, X0, null, null, steps=3)

    def missed(texts):
        x = path.rows(1)
        for j in path.down():
            e_null, e = sd.eps(x, path.t[j], [null, texts[j]])
            x = path.step(x, e_null + 7.5 * (e - e_null), j)
        return float((x - path[0]).norm())

    with torch.no_grad():
        learned = B.tuned_texts(sd.eps, path, target, 7.5, 10)
    assert missed(learned) < 0.9 * missed(dict.fromkeys((1, 2, 3), target))


def test_the_gradient_is_the_finite_difference(monkeypatch):
    sd = double()
    monkeypatch.setattr(T.Tensor, "float", torch.Tensor.double)
    values = checked_slopes(T, monkeypatch)
    null, target = sd.text([""]), sd.text(["a zebra"])
    path = ddim(sd.eps, latent(1, 4, 4, 4), null, null, steps=2)
    with torch.no_grad():
        B.tuned_texts(sd.eps, path, target, 7.5, 1)
    e_null, e = sd.eps(path[2], path.t[2], [null, target])
    y = path.step(path[2], e_null + 7.5 * (e - e_null), 2)
    assert len(values) == 2 and values[0] == pytest.approx(float(((y - path[1]) ** 2).mean()))


def test_on_a_picture(sd, picture):
    done = edited(sd, picture, "baret", target="a zebra", steps=4, inner_steps=2)
    assert done.evaluations == {"decode": 4 + 4 * (1 + 2 + 1) + 5 * 4}


MUTATIONS = {
    "the null text is learned": ("baret:tuned_texts", "e_null + scale * (e_text - e_null)",
        "e_text + scale * (e_null - e_text)", test_the_gradient_is_the_finite_difference),
    "the picture's cross-attention": ("baret:baret", "torch.cat([y[:4], y[3:4]])", "torch.cat([y[:4], y[2:3]])",
        test_an_edit_that_takes_all_maps_from_an_equal_row_is_that_row),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, monkeypatch):
    turns_red(__name__, "B", *MUTATIONS[name], monkeypatch, sd=sd)
