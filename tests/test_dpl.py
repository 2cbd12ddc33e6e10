"""DPL: without steps of its own it is null-text inversion; what is learned and from what, its loss by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from proofs import checked_slopes, double, turns_red
from stubs import latent

from minidiffedit import run as R
from minidiffedit.methods import dpl as D
from minidiffedit.methods.null_text import null_text
from minidiffedit.methods.words import words_of

X0 = latent(1, 4, 8, 8, dtype=torch.float32)
PROMPT = "a horse on a field"


def found(sd, x0=X0, prompt=PROMPT, **options):
    null, words = sd.text([""]), words_of(sd.tokenizer, prompt)
    options = {"steps": 3, "text_steps": 2, "inner_steps": 2, "guidance_scale": 3.0} | options
    return D.dpl(sd.eps, x0, null, sd.embed([prompt]), words, sd.transform, sd.coarsest, **options)


def test_without_steps_of_its_own_it_is_null_text_inversion(sd):
    ours = found(sd, text_steps=0)
    plain = null_text(sd.eps, X0, sd.text([""]), sd.text([PROMPT]), steps=3, inner_steps=2, guidance_scale=3.0)
    for j in (1, 2, 3):
        torch.testing.assert_close(ours.null(j), plain.null(j), rtol=1e-4, atol=1e-5)
        assert torch.equal(ours.source(j, None), sd.text([PROMPT])) and torch.equal(ours[j], plain[j])


def test_only_nouns_learn(sd):
    words = words_of(sd.tokenizer, PROMPT)
    at = [p for noun in ("horse", "field") for p in words.positions(noun)]
    assert D.chosen(None, words) == [words.positions("horse"), words.positions("field")]
    assert D.chosen("field", words) == [words.positions("field")]
    learned, one, asked = found(sd), found(sd, nouns="horse"), []
    transform = sd.transform

    def keep(embedded):
        asked.append(embedded)
        return transform(embedded)

    D.dpl(sd.eps, X0, sd.text([""]), sd.embed([PROMPT]), words, keep, sd.coarsest, steps=3, text_steps=2, inner_steps=0)
    changed = (asked[-1] - asked[0]).abs().amax((0, 2)).nonzero().flatten().tolist()
    assert changed == at and sorted(learned.sources) == [1, 2, 3]
    assert not torch.equal(learned.source(1, None), one.source(1, None))
    with pytest.raises(ValueError, match="the prompt has no 'zebra'"):
        R.plan("dpl", source=PROMPT, target="a cow", nouns="zebra")


def test_the_losses_by_hand():
    maps = torch.zeros(77, 2, 3)
    maps[2, 0, 0], maps[5, 1, 2], maps[6, 1, 1] = 0.5, 0.25, 0.5
    unseen, alike = D.apart(maps, [[2], [5, 6]])
    assert float(unseen) == 0.5 and float(alike) == 0
    maps[5, 0, 0] = 0.25
    unseen, alike = D.apart(maps, [[2], [5, 6]])
    assert float(alike) == pytest.approx(0.25 / math.sqrt(0.25**2 + 0.25**2 + 0.5**2))
    assert float(D.apart(maps, [[2]])[1]) == 0 and float(D.apart(maps, [[2], [5]])[0]) == 0.75


def test_maps_are_softmaxed_over_words_and_smoothed(sd):
    look, seen = D.Maps(sd.coarsest, 4), []

    def keep(plain, site, q, k, v):
        if site.kind == "cross" and site.level == sd.coarsest:
            seen.append(torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1).mean((0, 1)))
        return plain(site, q, k, v)

    x, text = latent(1, 4, 16, 24, dtype=torch.float32), sd.text(["a horse"])
    sd.eps(x, 481, [text], tap=look)
    sd.eps(x, 481, [text], tap=keep)
    words = torch.softmax(100 * torch.stack(seen).mean(0)[:, 1:4], -1).T.reshape(3, 1, 8, 12)
    line = torch.exp(torch.tensor([-2.0, 0.0, -2.0]))
    kernel = torch.outer(line, line) / torch.outer(line, line).sum()
    expected = F.conv2d(F.pad(words, (1, 1, 1, 1), "replicate"), kernel[None, None])[:, 0]
    maps = look.maps((16, 24))
    torch.testing.assert_close(maps[1:4], expected, rtol=1e-4, atol=1e-6)
    assert maps.shape == (77, 8, 12) and not maps[4:].any() and not maps[0].any()


def test_the_gradient_is_the_finite_difference(monkeypatch):
    sd = double()
    values = checked_slopes(D, monkeypatch)
    monkeypatch.setattr(D, "optimised", lambda null, *rest: null)
    with torch.no_grad():
        found(sd, latent(1, 4, 8, 8), steps=2, text_steps=1)
    assert len(values) == 2 and sd.gradients == 2


def test_its_loss_falls(sd, monkeypatch):
    values, plain = [], D.slopes

    def slopes(loss, at):
        value, gradients = plain(loss, at)
        values.append(float(value))
        return value, gradients

    monkeypatch.setattr(D, "slopes", slopes)
    found(sd, text_steps=8, inner_steps=0, strength=1 / 3)
    assert len(values) == 8 and values[-1] < values[0]


@pytest.mark.parametrize("unseen, alike, stops", [
    (0.29, 0.89, [True, False]), (0.31, 0.89, [False, False]), (0.29, 0.91, [False, False]), (0.28, 0.86, [True, True]),
])  # fmt: skip
def test_it_stops_below_both_limits(unseen, alike, stops, sd, monkeypatch):
    """.3 exp(-i/25) and .9 exp(-i/25): at the second level .288 and .865."""
    monkeypatch.setattr(D, "apart", lambda maps, at: tuple(one + 0 * maps.sum() for one in (unseen, alike)))
    before = sd.gradients
    found(sd, steps=2, text_steps=4, inner_steps=0)
    assert sd.gradients - before == sum(1 if stop else 4 for stop in stops)


def test_rows(picture):
    from stubs import Model

    from minidiffedit.cost import cost

    model, options = Model(), {"source": PROMPT, "target": "a zebra on a field", "seed": 0, "steps": 4}
    settled = R.plan("dpl", text_steps=2, inner_steps=3, **options)
    done = R.execute(settled, model, picture)
    assert cost(settled) == done.evaluations == {"encode": 4 + 4 * (2 + 1 + 3 + 1), "decode": 16}
    assert model.gradients == 4 * 5
    none = R.edit(model, picture, "dpl", text_steps=0, inner_steps=0, **options)
    plain = R.edit(model, picture, "ddim+prompt-to-prompt", **options, self_levels=2)
    torch.testing.assert_close(none.latent, plain.latent, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="one picture at a time, got 2"):
        found(model, latent(2, 4, 8, 8))


MUTATIONS = {
    "all positions learn": ("dpl:put", "[p for word in at for p in word]", "[p + 1 for word in at for p in word]",
        test_only_nouns_learn),
    "the most seen noun": ("dpl:apart", ".amax(1).min()", ".amax(1).max()", test_the_losses_by_hand),
    "a noun beside itself": ("dpl:apart", "alike.sum() - alike.diagonal().sum()", "alike.sum()",
        test_the_losses_by_hand),
    "softmax with padding": ("dpl:Maps.maps", "[:, 1 : self.end]", "[:, :]",
        test_maps_are_softmaxed_over_words_and_smoothed),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, monkeypatch):
    try:
        turns_red(__name__, "D", *MUTATIONS[name], monkeypatch, sd=sd)
    except RuntimeError as error:  # torch's, of shapes that do not fit
        assert "size" in str(error) or "shape" in str(error)
