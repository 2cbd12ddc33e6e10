"""Guides: their limits, each row by its own values, and inside the editors that take one."""

import pytest
import torch
from proofs import TEXTS, edited, turns_red
from stubs import latent

from minidiffedit.methods import guidance as G


def pair(rows=3):
    return latent(rows, 4, 6, 5), latent(rows, 4, 6, 5, seed=1) * torch.arange(1, rows + 1)[:, None, None, None]


@pytest.mark.parametrize("norm", ["l0", "l1"])
def test_between_plain_guidance_and_none(norm):
    e_null, e_text = pair()
    assert torch.equal(G.prox(7.5, 0.0, norm)(e_null, e_text), G.cfg(7.5)(e_null, e_text))
    assert torch.equal(G.prox(7.5, 1.0, norm)(e_null, e_text), e_null)
    assert torch.equal(G.prox(7.5, 0.4, norm)(e_null, e_null), e_null)
    torch.testing.assert_close(G.cfg(1.0)(e_null, e_text), e_text)


def test_the_share_is_dropped_and_what_is_kept_is_whole_or_shrunk():
    e_null, e_text = pair()
    d = e_text - e_null
    for quantile in (0.1, 0.4, 0.75):
        hard, soft = (G.prox(1.0, quantile, norm)(e_null, e_text) - e_null for norm in ("l0", "l1"))
        kept = hard.abs() > 1e-9
        assert [int(n) for n in kept.sum(dim=(1, 2, 3))] == [120 - round(120 * quantile)] * 3
        torch.testing.assert_close(hard[kept], d[kept])
        for i in range(3):
            least = torch.sort(d[i].abs().flatten()).values[round(120 * quantile) - 1]
            expected = torch.sign(d[i]) * torch.relu(d[i].abs() - least)
            torch.testing.assert_close(soft[i], expected)


def test_each_row_has_its_own_limit():
    """A row ten times as strong changes nothing about the others."""
    e_null, e_text = pair()
    for norm in ("l0", "l1"):
        together = G.prox(7.5, 0.4, norm)(e_null, e_text)
        for i in range(3):
            assert torch.equal(together[i], G.prox(7.5, 0.4, norm)(e_null[i : i + 1], e_text[i : i + 1])[0])


@pytest.mark.parametrize("method", ["replay", "masactrl"])
def test_editors_take_it(sd, picture, method):
    few = {"steps": 4, **TEXTS}
    plain = edited(sd, picture, method, **few)
    unlimited = edited(sd, picture, method, **few, guidance="prox", quantile=0.0)
    limited = edited(sd, picture, method, **few, guidance="prox")
    shrunk = edited(sd, picture, method, **few, guidance="prox", norm="l1")
    assert torch.equal(plain.latent, unlimited.latent) and plain.rows == limited.rows
    assert not torch.equal(plain.latent, limited.latent) and not torch.equal(limited.latent, shrunk.latent)


MUTATIONS = {
    "one limit for the batch": ("guidance:limit", "d.abs().flatten(1)", "d.abs().reshape(1, -1).expand(len(d), -1)",
        test_each_row_has_its_own_limit),
    "signs are lost": ("guidance:proximal", "d.sign() *", "",
        test_the_share_is_dropped_and_what_is_kept_is_whole_or_shrunk),
    "the largest are dropped": ("guidance:proximal", "size > limit", "size < limit",
        test_between_plain_guidance_and_none),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    turns_red(__name__, "G", *MUTATIONS[name], monkeypatch)
