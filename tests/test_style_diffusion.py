"""StyleDiffusion's direct variant: paired texts, what is learned and from what, and what it is for."""

import pytest
import torch
from proofs import checked_slopes, double, turns_red
from stubs import latent

from minidiffedit import run as R
from minidiffedit.methods import style_diffusion as S
from minidiffedit.methods.inversions import ddim, direct

X0 = latent(1, 4, 8, 8, dtype=torch.float32)


def found(sd, x0=X0, **options):
    null, source = sd.text([""]), sd.text(["a horse"])
    return S.style_diffusion(sd.eps, x0, null, source, sd.coarsest, **{"steps": 4, "inner_steps": 3} | options)


def test_paired_texts_give_keys_and_values(sd):
    """The same text twice is the text; another in its second half changes what is shown alone."""
    text, other, x = sd.text(["a horse"]), sd.text(["a zebra"]), X0
    plain = sd.eps(x, 481, [text])[0]
    same = sd.eps(x, 481, [torch.cat([text, text], dim=1)], tap=S.Paired(sd.coarsest))[0]
    torch.testing.assert_close(same, plain, rtol=1e-5, atol=1e-6)
    mixed, seen = sd.eps(x, 481, [torch.cat([text, other], dim=1)], tap=S.Paired(sd.coarsest))[0], S.Paired(sd.coarsest)
    both = {}

    def keep(plain, site, q, k, v):
        if site.kind == "cross":
            both.setdefault(site, (k[:1], v[1:]))
        return plain(site, q, k, v)

    sd.eps(x, 481, [text, other], tap=keep)
    by_hand = sd.eps(x, 481, [text], tap=lambda plain, site, q, k, v: plain(site, q, *both.get(site, (k, v))))[0]
    torch.testing.assert_close(mixed, by_hand, rtol=1e-5, atol=1e-6)
    assert (mixed - plain).abs().max() > 1e-3
    sd.eps(x, 481, [text], tap=seen)
    torch.testing.assert_close(seen.map().sum(-1), torch.ones(1, 16))  # 8 x 8 cells are 4 x 4 at level 1


def test_nothing_learned_is_the_pinned_path(sd, picture):
    options = {"source": "a horse", "target": "a zebra", "steps": 4, "seed": 0}
    for method in ("style-diffusion+prompt-to-prompt", "style-diffusion"):
        ours = R.edit(sd, picture, method, inner_steps=0, **options | {"cross_steps": 0.6, "self_steps": 0.8})
        plain = R.edit(sd, picture, "direct+prompt-to-prompt", **options | {"cross_steps": 0.6, "self_steps": 0.8}
                       | {"self_levels": ours.settings["self_levels"]})  # fmt: skip
        torch.testing.assert_close(ours.latent, plain.latent, rtol=1e-4, atol=1e-4)
    learned = R.edit(sd, picture, "style-diffusion", inner_steps=8, **options)
    plain = R.edit(sd, picture, "style-diffusion", inner_steps=0, **options)
    assert (learned.latent - plain.latent).abs().max() > 1e-3


def test_its_path_and_texts(sd):
    path, plain = found(sd), direct(sd.eps, X0, sd.text([""]), sd.text(["a horse"]), steps=4)
    assert path.pinned and all(torch.equal(path[j], plain[j]) for j in plain)
    assert sorted(path.sources) == [3, 4]  # .6 of 4 steps
    keys, values = path.sources[4].split(77, dim=1)
    assert torch.equal(keys, sd.text(["a horse"])) and (values - keys).abs().max() > 1e-3
    before = sd.evaluations, sd.gradients
    found(sd)  # two levels: 3 inner steps, then ceil(3 e^-.1) = 3
    assert (sd.evaluations - before[0], sd.gradients - before[1]) == (4 + 2 * (2 + 3 + 1), 6)
    with pytest.raises(ValueError, match="one picture at a time, got 2"):
        found(sd, latent(2, 4, 8, 8))


def test_the_gradient_and_the_loss_by_hand(monkeypatch):
    """The first loss is that of the text itself: how far the guided step is from the path, and no map differs."""
    sd, values = double(), checked_slopes(S, monkeypatch)
    x0, (null, source) = latent(1, 4, 8, 8), (sd.text([prompt]) for prompt in ("", "a horse"))
    S.style_diffusion(sd.eps, x0, null, source, sd.coarsest, steps=4, inner_steps=3, guidance_scale=5.0)
    path = ddim(sd.eps, x0, null, source, steps=4)
    e_null, e = sd.eps(path[4], path.t[4], [null, source])
    y = path.step(path[4], e_null + 5 * (e - e_null), 4)
    assert values[0] == pytest.approx(float(((y - path[3]) ** 2).mean()), rel=1e-6)


def test_each_levels_loss_falls(sd, monkeypatch):
    values, plain = [], S.slopes

    def slopes(loss, at):
        value, gradients = plain(loss, at)
        values.append(float(value))
        return value, gradients

    monkeypatch.setattr(S, "slopes", slopes)
    found(sd, inner_steps=10, learned_steps=0.25)
    assert len(values) == 10 and values[-1] < 0.9 * values[0]


MUTATIONS = {
    "values of the keys' text": ("style_diffusion:Paired.__call__", "v[:, :, -77:]", "v[:, :, :77]",
        test_paired_texts_give_keys_and_values),
    "unguided": ("style_diffusion:stepped", "e_null + scale * (e_text - e_null)", "e_text",
        test_the_gradient_and_the_loss_by_hand),
    "the level left as the goal": ("style_diffusion:style_diffusion", "F.mse_loss(y, path[j - 1])",
        "F.mse_loss(y, path[j])", test_the_gradient_and_the_loss_by_hand),
    "keys that are learned too": ("style_diffusion:paired", "[source.to(s), source.to(s) * s + b]",
        "[source.to(s) * s + b, source.to(s) * s + b]", test_its_path_and_texts),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, picture, monkeypatch):
    turns_red(__name__, "S", *MUTATIONS[name], monkeypatch, sd=sd, picture=picture)
