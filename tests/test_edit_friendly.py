"""Edit-friendly DDPM inversion: its levels, its noises, and that equal texts give the picture back."""

import pytest
import torch
from proofs import TEXTS, edited, turns_red
from stubs import ALPHA_BAR, Counting, gaussian, latent

from minidiffedit import levels, noises
from minidiffedit.methods import edit_friendly as F
from minidiffedit.methods.replay import replay


def inverted(eps=gaussian, **options):
    return F.edit_friendly(eps, latent(2, 4, 6, 5), 0.0, 0.3, **{"steps": 10, "strength": 0.8} | options)


def test_levels_have_independent_noises():
    up, x0 = inverted(seed=4), latent(2, 4, 6, 5)
    t = levels(10).t
    drawn = torch.stack([noises((4, 6, 5), 8, 4 + i) for i in range(2)], dim=1).to(x0)
    for j in range(1, 9):
        a = float(ALPHA_BAR[t[j]])
        torch.testing.assert_close(up[j], a**0.5 * x0 + (1 - a) ** 0.5 * drawn[j - 1], rtol=1e-5, atol=1e-6)
    assert len(up) == 9 and up.pinned


@pytest.mark.parametrize("g", [1.0, 3.5])
def test_equal_texts_and_guidance_return_the_picture(g):
    up, x0 = inverted(source_scale=g), latent(2, 4, 6, 5)
    torch.testing.assert_close(replay(gaussian, up, 0.3, guidance_scale=g), x0, rtol=1e-10, atol=1e-10)
    assert (replay(gaussian, up, 0.8, guidance_scale=g) - x0).mean() > 0.1


def test_a_step_of_the_paper_by_hand():
    """z_j = (x_{j-1} - mean) / sigma, with DDPM's posterior for the predicted x_0 (2006.11239, eq. 6 and 7)."""
    up, t = inverted(source_scale=3.5), levels(10).t
    for j in (8, 4, 1):
        a, a_to = float(ALPHA_BAR[t[j]]), float(ALPHA_BAR[t[j - 1]])
        e_null, e_text = gaussian(up[j], t[j], [0.0, 0.3])
        x0_hat = (up[j] - (1 - a) ** 0.5 * (e_null + 3.5 * (e_text - e_null))) / a**0.5
        beta = 1 - a / a_to
        mean = (a_to**0.5 * beta * x0_hat + (a / a_to) ** 0.5 * (1 - a_to) * up[j]) / (1 - a)
        sigma = ((1 - a_to) / (1 - a) * beta) ** 0.5
        torch.testing.assert_close(up.noises[j], (up[j - 1] - mean) / sigma, rtol=1e-4, atol=1e-4)


def test_the_last_noise_may_be_zero_and_then_the_picture_is_missed():
    up, x0 = inverted(zero_last=True), latent(2, 4, 6, 5)
    missed = (replay(gaussian, up, 0.3, guidance_scale=3.5) - x0).norm() / x0.norm()
    assert not up.noises[1].any() and up.noises[2].any() and 1e-3 < missed < 0.3


def test_level_0_is_the_picture_bit_for_bit():
    for seed in range(5):
        assert torch.equal(inverted(seed=seed)[0], latent(2, 4, 6, 5))


def test_rows_and_texts():
    for options, rows, texts in (({}, 32, [0.0, 0.3]), ({"source_scale": 1.0}, 16, [0.3])):
        eps = Counting()
        inverted(eps, **options)
        assert eps.rows == rows and all(asked == texts for _, _, asked in eps.calls)
    eps, nothing = Counting(), object()
    F.edit_friendly(lambda x, t, texts: eps(x, t, [0.0 for _ in texts]), latent(1, 4, 6, 5), nothing, nothing, steps=10)
    assert eps.rows == 6


def test_two_pictures_are_each_alone():
    together, x0 = inverted(seed=3), latent(2, 4, 6, 5)
    for i in range(2):
        alone = F.edit_friendly(gaussian, x0[i : i + 1], 0.0, 0.3, steps=10, strength=0.8, seed=3 + i)
        assert torch.equal(alone[8][0], together[8][i]) and torch.equal(alone.noises[5][0], together.noises[5][i])


@pytest.mark.parametrize("editor", ["replay", "masactrl"])
def test_on_a_picture(sd, picture, editor):
    done = edited(sd, picture, f"edit-friendly+{editor}", **TEXTS, strength=0.6)
    assert done.evaluations == {"encode": 12, "decode": 12 if editor == "replay" else 24}
    same = {"source": "a horse", "target": "a horse", "guidance_scale": 3.5}
    kept = edited(sd, picture, "edit-friendly+replay", **same, strength=0.6)
    assert (kept.latent - kept.x0).abs().max() <= 1e-5
    assert edited(sd, picture, "edit-friendly-ddpm", **TEXTS, strength=0.2).settings["guidance_scale"] == 15.0


MUTATIONS = {
    "one noise for all levels": ("edit_friendly:edit_friendly", "vp_noised(x0, next(draw).to(x0), a[j])",
        "vp_noised(x0, noise, a[j])", test_levels_have_independent_noises),
    "noises of the unguided prediction": ("edit_friendly:visited", "alone = source is null or scale == 1",
        "alone = True", test_equal_texts_and_guidance_return_the_picture),
    "what the last step reaches": ("edit_friendly:visited", "Path([x0, *x[1:]]", "Path(x",
        test_level_0_is_the_picture_bit_for_bit),
    "the noise of the level left": ("edit_friendly:visited", "z[j] = (x[j - 1] - mean) / sigma",
        "z[j] = (x[j] - mean) / sigma", test_levels_have_independent_noises),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    place, old, new, test = MUTATIONS[name]
    if "noise, a[j]" in new:
        old, new = f"x = [x0, *({old}", f"noise = next(draw).to(x0)\n    x = [x0, *({new}"
    turns_red(__name__, "F", place, old, new, test, monkeypatch)
