"""Imagic, SINE and latent inversion: their limits without learning, what is learned and that its loss falls, rows."""

import pytest
import torch
from proofs import checked_slopes, double, edited, turns_red
from stubs import latent

from minidiffedit import levels, move, sample
from minidiffedit.methods import imagic as I
from minidiffedit.methods import latent_inversion as V
from minidiffedit.methods import lora as L
from minidiffedit.methods import sine as S
from minidiffedit.methods.inversions import ddim
from minidiffedit.methods.sdedit import draws

X0 = latent(1, 4, 8, 8, dtype=torch.float32)
NO_LORA, FEW = {"lora_steps": 0, "seed": 3}, {"steps": 3, "seed": 3}


def texts(sd):
    return [sd.text([prompt]) for prompt in ("", "a zebra", "a horse")]


def test_without_learning_they_are_plain_sampling(sd):
    null, target, source = texts(sd)
    plain = sample(sd.eps, next(draws(X0.shape, 3)), target, null, steps=3, guidance_scale=7.5)
    made = I.imagic(sd.eps, X0, sd.projections, null, target, text_steps=0, **NO_LORA | FEW)
    torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-4)
    before = sd.evaluations  # nor is anything learned that would not be asked
    for options in ({"learned": 0.0}, {"until": 1000}):
        made = S.sine(sd.eps, X0, sd.projections, null, target, source, guidance_scale=7.5, **options | FEW)
        torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-4)
    assert sd.evaluations - before == 2 * 2 * 3


def test_imagic_mixes_the_texts(sd):
    null, target, _ = texts(sd)
    learned = I.learned_text(sd.eps, X0, target, 5, 0.01, 3)
    assert (learned - target).abs().max() > 0.02
    options = {"text_steps": 5, "text_rate": 0.01} | NO_LORA | FEW
    for share in (0.0, 0.7, 1.5):
        made = I.imagic(sd.eps, X0, sd.projections, null, target, share=share, **options)
        mixed = share * target + (1 - share) * learned
        plain = sample(sd.eps, next(draws(X0.shape, 3)), mixed, null, steps=3, guidance_scale=7.5)
        torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-4)


def test_imagic_samples_with_what_it_learned(sd):
    null, target, _ = texts(sd)
    made = I.imagic(
        sd.eps, X0, sd.projections, null, target, text_steps=0, lora_steps=3, batch=1, lora_rate=0.01, **FEW
    )
    weights = L.lora(sd.eps, X0, sd.projections, target, lora_steps=3, batch=1, lora_rate=0.01, seed=3)
    plain = sample(L.adapted(sd.eps, weights), next(draws(X0.shape, 3)), target, null, steps=3, guidance_scale=7.5)
    torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-4)


def test_sine_by_hand(sd):
    """Above t = 500 two thirds of the levels of three steps."""
    null, target, source = texts(sd)
    weights = L.lora(sd.eps, X0, sd.projections, source, lora_steps=3, batch=1, lora_rate=0.01, seed=3)
    made = S.sine(sd.eps, X0, sd.projections, null, target, source, lora_steps=3, batch=1, lora_rate=0.01,
                  learned=0.4, guidance_scale=5.0, **FEW)  # fmt: skip
    x, (t, a) = next(draws(X0.shape, 3)), levels(3)
    assert [one > 500 for one in t] == [False, False, False, True]
    for j in (3, 2, 1):
        e_null, e = sd.eps(x, t[j], [null, target])
        if j == 3:
            e = 0.6 * e + 0.4 * L.adapted(sd.eps, weights)(x, t[j], [source])[0]
        x = move(x, e_null + 5 * (e - e_null), a[j], a[j - 1])
    torch.testing.assert_close(made, x, rtol=1e-4, atol=1e-4)


def test_latent_inversion_under_the_source_comes_back_along_the_path(sd):
    null, target, source = texts(sd)
    options = {"text_steps": 2, "text_rate": 0.01} | FEW
    made = V.latent_inversion(sd.eps, X0, null, target, source, source_steps=1.0, **options)
    learned = I.learned_text(sd.eps, X0, source, 2, 0.01, 3)
    path = ddim(sd.eps, X0, null, learned, steps=3)
    x = path.rows(1)
    for j in path.down():
        x = path.step(x, sd.eps(x, path.t[j], [learned])[0], j)
    torch.testing.assert_close(made, x, rtol=1e-4, atol=1e-4)
    other = V.latent_inversion(sd.eps, X0, null, target, source, source_steps=0.0, **options)
    x = path.rows(1)
    for j in path.down():
        e_null, e = sd.eps(x, path.t[j], [null, target])
        x = path.step(x, e_null + 7.5 * (e - e_null), j)
    torch.testing.assert_close(other, x, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_the_finite_difference(monkeypatch):
    sd = double()
    values = checked_slopes(I, monkeypatch)
    I.learned_text(sd.eps, latent(1, 4, 4, 4), sd.text(["a horse"]), 2, 0.01, 3)
    assert len(values) == 2 and sd.gradients == 2


def test_the_texts_loss_falls(sd):
    """For timesteps and noises that it has not seen."""
    target = sd.text(["a zebra"])
    learned, generator = I.learned_text(sd.eps, X0, target, 40, 0.02, 3), torch.Generator().manual_seed(9)
    draws = [L.drawn(X0, generator) for _ in range(16)]
    losses = [float(sum(L.denoising(sd.eps, X0, text, *one) for one in draws)) for text in (target, learned)]
    assert losses[1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    "method, rows", [("imagic", 2 + 4 + 2 * 4), ("sine", 4 + 2 * 4 + 2), ("latent-inversion", 2 + 3 * 4)]
)
def test_on_a_picture(method, rows, sd, picture):
    given = {"target": "a zebra"} | ({"source": "a horse"} if method != "imagic" else {})
    own = {"text_steps": 2} if method != "sine" else {}
    own |= {"lora_steps": 2, "batch": 2, "rank": 2} if method != "latent-inversion" else {}
    done = edited(sd, picture, method, steps=4, **given, **own)
    assert done.evaluations == {"decode": rows}


MUTATIONS = {
    "the shares change places": ("imagic:imagic", "share * target + (1 - share) * text.to(target)",
        "(1 - share) * target + share * text.to(target)", test_imagic_mixes_the_texts),
    "sampled without what was learned": ("imagic:imagic", "adapted(eps, made)", "eps",
        test_imagic_samples_with_what_it_learned),
    "away from the picture": ("imagic:learned_text", "Adam(rate)", "Adam(-rate)", test_the_texts_loss_falls),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, monkeypatch):
    turns_red(__name__, "I", *MUTATIONS[name], monkeypatch, sd=sd)


def test_a_mutant_of_sine(sd, monkeypatch):
    turns_red(__name__, "S", "sine:sine", "t[j] > until", "t[j] < until", test_sine_by_hand, monkeypatch, sd=sd)


def test_a_mutant_of_latent_inversion(sd, monkeypatch):
    turns_red(__name__, "V", "latent_inversion:latent_inversion", "text if i < early else target", "target",
              test_latent_inversion_under_the_source_comes_back_along_the_path, monkeypatch, sd=sd)  # fmt: skip
