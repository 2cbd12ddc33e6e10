"""Null-text guidance: what each prediction is asked about, and plain guidance where nothing is disturbed."""

import pytest
import torch
from proofs import edited, turns_red
from stubs import Counting, gaussian, latent

from minidiffedit import levels, noises
from minidiffedit.methods import null_text_guidance as N
from minidiffedit.methods.replay import replay
from minidiffedit.path import Path

OPTIONS = {"steps": 20, "strength": 0.4, "seed": 3}


def start():
    """The picture under one noise at every level, as a path."""
    x0, a = latent(2, 4, 6, 5), levels(20).a
    noise = torch.cat([noises((4, 6, 5), 1, 3 + i) for i in range(2)]).to(x0)
    return Path([x0, *(a[j] ** 0.5 * x0 + (1 - a[j]) ** 0.5 * noise for j in range(1, 21))], 20, 0.0)


def test_without_disturbance_it_is_plain_guidance():
    for g in (1.0, 10.0):
        ours = N.null_text_guidance(gaussian, latent(2, 4, 6, 5), 0.0, 0.8, back=0, guidance_scale=g, **OPTIONS)
        torch.testing.assert_close(ours, replay(gaussian, start().prefix(8), 0.8, guidance_scale=g))


def test_without_guidance_the_disturbance_does_not_matter():
    ours = [N.null_text_guidance(gaussian, latent(2, 4, 6, 5), 0.0, 0.8, guidance_scale=1.0, **OPTIONS, **other)
            for other in ({"disturb": "image"}, {"back": 300}, {"back": 0})]  # fmt: skip
    torch.testing.assert_close(ours[0], ours[2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[1], ours[2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("back, rise", [(0, 0), (50, 1), (200, 4), (1000, 20)])
def test_back_d_looks_at_the_latent_of_some_timesteps_earlier(back, rise):
    eps, up = Counting(), start()
    y = N.null_text_guidance(eps, latent(2, 4, 6, 5), 0.0, 0.8, back=back, **OPTIONS)
    asked = {j: (eps.calls[2 * (8 - j)], eps.calls[2 * (8 - j) + 1]) for j in range(8, 0, -1)}
    for j, (unguided, guided) in asked.items():
        assert unguided[1] == guided[1] == levels(20).t[j] and (unguided[2], guided[2]) == ([0.0], [0.8])
        from_level = min(j + rise, 20)
        before = asked[from_level][1][0] if from_level <= 8 else up[from_level]
        torch.testing.assert_close(unguided[0], before)
    assert eps.rows == 2 * 2 * 8 and y.shape == (2, 4, 6, 5)


@pytest.mark.filterwarnings("error")
def test_less_than_a_level_back_is_none():
    """And says nothing of the strength, which is another."""
    ours = [
        N.null_text_guidance(gaussian, latent(2, 4, 6, 5), 0.0, 0.8, steps=4, strength=0.5, back=n) for n in (0, 100)
    ]
    assert torch.equal(*ours)


def test_image_d_looks_at_the_picture():
    eps = Counting()
    N.null_text_guidance(eps, latent(2, 4, 6, 5), 0.0, 0.8, disturb="image", **OPTIONS)
    assert len(eps.calls) == 16 and all(torch.equal(x, latent(2, 4, 6, 5)) for x, _, _ in eps.calls[::2])
    torch.testing.assert_close(eps.calls[1][0], start()[8])


def test_two_pictures_are_each_alone():
    together = N.null_text_guidance(gaussian, latent(2, 4, 6, 5), 0.0, 0.8, **OPTIONS)
    alone = N.null_text_guidance(gaussian, latent(2, 4, 6, 5)[1:], 0.0, 0.8, **OPTIONS | {"seed": 4})
    assert torch.equal(together[1], alone[0])


def test_on_a_picture(sd, picture):
    text = {"target": "a horse"}
    results = [edited(sd, picture, "null-text-guidance", **text, **other) for other in
               ({}, {"back": 0}, {"disturb": "image"})]  # fmt: skip
    assert all(done.evaluations == {"decode": 8} for done in results)
    assert not results[0].latent.equal(results[1].latent) and not results[0].latent.equal(results[2].latent)


MUTATIONS = {
    "the later latent": ("null_text_guidance:null_text_guidance", "min(j + earlier, steps)", "max(j - earlier, 0)",
        test_back_d_looks_at_the_latent_of_some_timesteps_earlier),
    "the noised picture at all levels": ("null_text_guidance:null_text_guidance", "x = seen[j - 1] = move", "x = move",
        test_back_d_looks_at_the_latent_of_some_timesteps_earlier),
    "halves exchanged": ("null_text_guidance:null_text_guidance", "(e - u)", "(u - e)",
        test_without_disturbance_it_is_plain_guidance),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    turns_red(__name__, "N", *MUTATIONS[name], monkeypatch)
