"""MAG-Edit: without its nudges it is prompt-to-prompt, what a nudge follows, and that it is looked at more."""

import math

import pytest
import torch
from proofs import double, edited, is_the_slope, turns_red
from stubs import latent
from tiny import box

from minidiffedit.methods import mag_edit as M
from minidiffedit.methods.inversions import direct
from minidiffedit.methods.prompt_to_prompt import prompt_to_prompt
from minidiffedit.methods.words import words_of

SOURCE, TARGET = "a horse on grass", "a zebra on grass"
MASK = torch.zeros(1, 1, 16, 16)
MASK[..., 4:10, 2:9] = 1


def given(sd, x0=None, steps=4):
    x0 = latent(1, 4, 16, 16, dtype=torch.float32) if x0 is None else x0
    source, target = sd.text([SOURCE]), sd.text([TARGET])
    path = direct(sd.eps, x0, sd.text([""]), source, steps=steps)
    return path, source, target, *(words_of(sd.tokenizer, text) for text in (SOURCE, TARGET)), sd.coarsest


def moved(sd, mask=MASK, x0=None, steps=4, eps=None, **options):
    path, *rest = given(sd, x0, steps)
    return M.mag_edit(eps or sd.eps, path, mask, *rest, **{"nudges": 2, "kept_steps": 0.0} | options)


def test_without_nudges_it_is_prompt_to_prompt(sd):
    path, *rest = given(sd)
    plain = prompt_to_prompt(sd.eps, path, *rest, cross_steps=0.8, self_steps=0.5, self_levels=1)
    before = sd.gradients
    for options in ({"nudges": 0}, {"nudge_steps": 0.0}, {"mask": torch.zeros_like(MASK)}):
        torch.testing.assert_close(moved(sd, **options), plain, rtol=1e-4, atol=1e-4)
    assert sd.gradients == before and (moved(sd) - plain).abs().max() > 1e-3


def test_the_ratios_by_hand():
    A = torch.tensor([[0.1, 0.2, 0.2, 0.5], [0.2, 0.6, 0.2, 0.0], [0.3, 0.3, 0.3, 0.1]])  # cells, tokens
    mask = torch.tensor([1.0, 1.0, 0.0])
    token = float(M.unlooked([A], [1], mask, 3, "token"))
    assert token == pytest.approx((1 - (0.2 / 0.4 + 0.6 / 0.8) / 2) ** 2)
    assert float(M.unlooked([A], [1], mask, 3, "spatial")) == pytest.approx(3 - 4 * 0.8 / 1.1)
    assert float(M.unlooked([A, A], [1], mask, 3, "token")) == pytest.approx(token)


def nudge(sd, x0, ratio):
    """The target's latent before and after one nudge, the first of the walk."""
    asked = []

    def eps(x, t, texts, **hooks):
        asked.append(x.detach()[-1:])
        return sd.eps(x, t, texts, **hooks)

    moved(sd, x0=x0, eps=eps, nudges=1, nudge_steps=0.25, ratio=ratio, nudge_scale=2.5)
    return asked[0], asked[1]


@pytest.mark.parametrize("ratio", ["token", "spatial"])
def test_the_gradient_is_the_finite_difference(ratio, monkeypatch):
    sd, x0 = double(), latent(1, 4, 16, 16)
    before, after = nudge(sd, x0, ratio)
    path, source, target, *_ = given(sd, x0)
    scale = 2.5 * math.sqrt((1 - path.a[4]) / path.a[4])
    low = torch.nn.functional.adaptive_max_pool2d(MASK, 16 >> sd.coarsest).flatten().double()

    def loss(x):
        """With source's maps for the words of both prompts in all cross-attentions, and its self-attention."""
        maps = []

        def tap(plain, site, q, k, v):
            if site.kind == "self" and site.level >= sd.coarsest:
                return torch.cat([plain(site, q[:1], k[:1], v[:1]), plain(site, q[:1], k[:1], v[1:])])
            if site.kind == "cross":
                P = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, -1)
                if site.level == sd.coarsest:
                    maps.append(P[1].mean(0))
                mixed = P[0].clone()
                mixed[..., 2] = P[1][..., 2]  # "zebra"
                return torch.stack([P[0] @ v[0], mixed @ v[1]])
            return plain(site, q, k, v)

        sd.eps(torch.cat([path[4], x]), path.t[4], [torch.cat([source, target])], tap=tap)
        return M.unlooked(maps, [2], low, 5, ratio)

    gradient = torch.autograd.grad(loss(y := before.requires_grad_()), y)[0]
    is_the_slope([gradient], [before.detach()], loss, rel=1e-4)
    torch.testing.assert_close(after, before.detach() - scale * MASK * gradient, rtol=1e-5, atol=1e-7)
    assert (gradient * (1 - MASK)).abs().max() > 0 and torch.equal(after[..., 0], before.detach()[..., 0])


@pytest.mark.parametrize("ratio", ["token", "spatial"])
def test_nudges_lower_the_loss(ratio, sd, monkeypatch):
    values, plain = [], M.unlooked

    def unlooked(*given):
        loss = plain(*given)
        values.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(M, "unlooked", unlooked)
    moved(sd, nudges=15, nudge_steps=0.25, ratio=ratio)
    assert len(values) == 15 and values[-1] < values[0]


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_outside_the_grown_mask_the_source_is_kept(share, sd):
    """In the last step alone, or in the last two."""
    kept, (path, *_) = moved(sd, kept_steps=share), given(sd)
    grown = torch.zeros_like(MASK)
    grown[..., 3:11, 1:10] = 1
    outside = (grown == 0).expand_as(kept)
    torch.testing.assert_close(kept[outside], path[0][outside], rtol=1e-6, atol=1e-6)


def test_on_a_picture(sd, picture):
    before = sd.gradients
    done = edited(sd, picture, "mag-edit", source=SOURCE, target=TARGET, mask=box(), steps=4, nudges=2, inner_steps=1)
    assert done.evaluations["decode"] == 2 * 2 * 2 + 4 * 4 and sd.gradients > before
    held = edited(sd, picture, "direct+mag-edit", source=SOURCE, target=TARGET, mask=box(), steps=4, nudges=2)
    assert held.evaluations["decode"] == 2 * 2 * 2 + 3 * 4
    with pytest.raises(ValueError, match="the source has all words of the target"):
        edited(sd, picture, "mag-edit", source=SOURCE, target="a horse", mask=box())


MUTATIONS = {
    "towards where it is not looked": ("mag_edit:mag_edit", "y.detach() - nudge_scale", "y.detach() + nudge_scale",
        test_nudges_lower_the_loss),
    "everywhere": ("mag_edit:mag_edit", "scale * M * slope", "scale * slope",
        test_the_gradient_is_the_finite_difference),
    "with the end token": ("mag_edit:unlooked", "A[:, 1:end]", "A[:, 1:]", test_the_ratios_by_hand),
    "the source's maps": ("mag_edit:mag_edit", "weights(qt, kt)", "weights(qs, ks)",
        test_the_gradient_is_the_finite_difference),
    "the target's words that the source has": ("mag_edit:mag_edit", "(W.sum(0) == 0).to(x)", "(W.sum(0) > 0).to(x)",
        test_without_nudges_it_is_prompt_to_prompt),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, monkeypatch):
    try:
        turns_red(__name__, "M", *MUTATIONS[name], monkeypatch, sd=sd)
    except RuntimeError as error:
        assert "not to require grad" in str(error) or "not have been used" in str(error)
