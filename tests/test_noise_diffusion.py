"""NoiseDiffusion between its ends, the same from either side, and by hand."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from proofs import edited, turns_red
from stubs import ALPHA_BAR, Counting, gaussian, latent

from minidiffedit import encode, levels
from minidiffedit.methods import noise_diffusion as N
from minidiffedit.methods.replay import replay
from minidiffedit.path import Path

FREE = {"signal": 1.0, "bound": 1000.0, "guidance_scale": 1.0, "steps": 10}


def between(eps=gaussian, one=0, other=1, **options):
    x0, reference = (0.7 * latent(2, 4, 6, 5, seed=seed) for seed in (one, other))
    return N.noise_diffusion(eps, x0, reference, 0.3, 0.0, **{"steps": 10} | options)


@pytest.mark.parametrize("fraction, seed", [(0.0, 0), (1.0, 1)])
def test_at_either_end_each_picture_is_reconstructed(fraction, seed):
    up = encode(gaussian, 0.7 * latent(2, 4, 6, 5, seed=seed), 0.3, steps=10, strength=0.7)
    plain = replay(gaussian, Path([*up.values()], 10, 0.0), 0.3, guidance_scale=1.0)
    torch.testing.assert_close(between(fraction=fraction, **FREE), plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
def test_it_is_the_same_from_either_side(fraction):
    there, back = between(fraction=fraction), between(one=1, other=0, fraction=1 - fraction)
    torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(there, between(fraction=fraction + 0.1))


@pytest.mark.parametrize("fraction", [0.3, 0.5])
def test_the_mixture_by_hand(fraction):
    eps = Counting()
    between(eps, fraction=fraction)
    z1, z2 = (0.7 * latent(2, 4, 6, 5, seed=seed) for seed in (0, 1))
    (x1, x2), a = ((encode(gaussian, z, 0.3, steps=10, strength=0.7)[7]) for z in (z1, z2)), ALPHA_BAR[levels(10).t[7]]
    alpha, beta = math.cos(fraction * math.pi / 2), math.sin(fraction * math.pi / 2)
    mu = 1.2 * alpha / (alpha + beta)
    x = alpha * x1.clamp(-2, 2) + beta * x2.clamp(-2, 2)
    x += a**0.5 * ((mu - alpha) * z1 + (1.2 - mu - beta) * z2)
    mixed, t, texts = eps.calls[7]
    torch.testing.assert_close(mixed, x.clamp(-2, 2), rtol=1e-5, atol=1e-6)
    assert t == levels(10).t[7] and texts == [0.0, 0.3] and (x.abs() > 2).any()
    assert eps.rows == 7 * 4 + 7 * 4 and [texts for _, _, texts in eps.calls[:7]] == [[0.3]] * 7


def test_two_pairs_are_each_alone():
    x0, reference = latent(2, 4, 6, 5), latent(2, 4, 6, 5, seed=1)
    together = N.noise_diffusion(gaussian, x0, reference, 0.3, 0.0, steps=10)
    alone = N.noise_diffusion(gaussian, x0[1:], reference[1:], 0.3, 0.0, steps=10)
    assert torch.equal(together[1], alone[0])


def test_on_pictures(sd, picture):
    other = Image.fromarray(np.random.default_rng(5).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    done = edited(sd, picture, "noise-diffusion", reference=other, target="a horse")
    assert done.evaluations == {"decode": 28} and not torch.equal(done.latent, done.x0)
    near = edited(sd, picture, "noise-diffusion", reference=other, fraction=0.0)
    assert torch.equal(near.x0, done.x0) and not torch.equal(near.latent, done.latent)


MUTATIONS = {
    "a straight line": ("noise_diffusion:noise_diffusion", "math.sin(fraction * math.pi / 2)", "fraction",
        test_the_mixture_by_hand),
    "pictures exchanged": ("noise_diffusion:noise_diffusion", "(mu - alpha) * z1 + (nu - beta) * z2",
        "(mu - alpha) * z2 + (nu - beta) * z1", test_the_mixture_by_hand),
    "not cut": ("noise_diffusion:noise_diffusion", "path[K].clamp(-bound, bound)", "path[K]", test_the_mixture_by_hand),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    turns_red(__name__, "N", *MUTATIONS[name], monkeypatch)
