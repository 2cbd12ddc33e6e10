"""DDS and SDS: equal texts move nothing, the descent in closed form, what is drawn and shared, rows by name."""

import pytest
import torch
from proofs import turns_red
from stubs import ALPHA_BAR, Counting, gaussian, latent, zero

from minidiffedit import run as R
from minidiffedit.cost import cost
from minidiffedit.methods import dds as D

NULL, SOURCE, TARGET = 0.1, 0.3, -0.4
FEW = {"iterations": 6, "seed": 3}


def moved(eps=gaussian, target=TARGET, source=SOURCE, x0=None, **options):
    return D.dds(eps, latent(1, 4, 6, 5) if x0 is None else x0, NULL, target, source, **FEW | options)


def distilled(eps=gaussian, x0=None, **options):
    return D.sds(eps, latent(1, 4, 6, 5) if x0 is None else x0, NULL, TARGET, **FEW | options)


def test_equal_texts_move_nothing(sd):
    assert torch.equal(moved(target=0.3), latent(1, 4, 6, 5))
    x0, null = latent(1, 4, 8, 8, dtype=torch.float32), sd.text([""])
    one, same, other = sd.text(["a horse"]), sd.text(["a horse"]), sd.text(["a zebra"])
    assert torch.equal(D.dds(sd.eps, x0, null, one, same, **FEW), x0)
    assert not torch.equal(D.dds(sd.eps, x0, null, other, same, **FEW), x0)


@pytest.mark.parametrize("scale, rate", [(7.5, D.RATE), (1.0, 0.5), (0.0, 0.5)])
def test_the_descent_in_closed_form(scale, rate):
    """Of a predictor that is linear in latent and text, picture, null text and shared noise cancel: with
    c = sqrt(a (1 - a)) / variance, z - z0 is a number, and each iteration leads it by rate c towards w (T' - T).
    """
    eps, left = Counting(), 1.0
    found = moved(eps, guidance_scale=scale, rate=rate)
    for _, t, _ in eps.calls[::2]:
        a = float(ALPHA_BAR[t])
        left *= 1 - rate * (a * (1 - a)) ** 0.5 / (a * 0.7**2 + 1 - a)
    expected = latent(1, 4, 6, 5) + scale * (TARGET - SOURCE) * (1 - left)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_both_pictures_share_what_is_drawn():
    eps, z0 = Counting(), latent(1, 4, 6, 5)
    moved(eps)
    assert [texts for _, _, texts in eps.calls] == [[NULL, SOURCE], [NULL, TARGET]] * 6 and eps.rows == 4 * 6
    pairs = [*zip(eps.calls[::2], eps.calls[1::2])]
    assert all(one[1] == other[1] for one, other in pairs) and len({one[1] for one, _ in pairs}) > 1
    assert torch.equal(pairs[0][0][0], pairs[0][1][0])  # at first it is the picture itself
    drawn = torch.stack([(x - ALPHA_BAR[t] ** 0.5 * z0) / (1 - ALPHA_BAR[t]) ** 0.5 for x, t, _ in eps.calls[::2]])
    assert abs(drawn.mean()) < 0.15 and abs(drawn.std() - 1) < 0.15
    assert (torch.corrcoef(drawn.flatten(1)) - torch.eye(6)).abs().max() < 0.4


def test_sds_by_hand():
    """Noises from what the predictor was asked about, which at first is the picture."""
    eps, z = Counting(), latent(1, 4, 6, 5)
    found = distilled(eps)
    for x, t, texts in eps.calls:
        a = float(ALPHA_BAR[t])
        n = (x - a**0.5 * z) / (1 - a) ** 0.5
        e_null, e_text = gaussian(x, t, [NULL, TARGET])
        z = z - D.RATE * (e_null + 7.5 * (e_text - e_null) - n)
        assert texts == [NULL, TARGET] and abs(n.std() - 1) < 0.25
    torch.testing.assert_close(found, z, rtol=1e-4, atol=1e-4)
    assert eps.rows == 2 * 6 and (found - latent(1, 4, 6, 5)).abs().max() > 0.1


def test_sds_stays_where_the_noise_is_known():
    z0 = latent(1, 4, 6, 5)

    def knowing(x, t, texts):
        return [(x - ALPHA_BAR[t] ** 0.5 * z0) / (1 - ALPHA_BAR[t]) ** 0.5 for _ in texts]

    torch.testing.assert_close(distilled(knowing, rate=1.0), z0, rtol=1e-4, atol=1e-4)


def test_timesteps_are_drawn_from_50_to_948():
    eps = Counting(zero)
    distilled(eps, x0=latent(1, 1, 1, 1), iterations=8000)
    times = torch.tensor([t for _, t, _ in eps.calls])
    assert times.min() == 50 and times.max() == 948 and abs(times.double().mean() - 499) < 10


def test_pictures_in_a_batch_are_as_alone():
    state, x0 = torch.random.get_rng_state(), latent(3, 4, 6, 5)
    for one in (moved, distilled):
        together = one(x0=x0)
        for i in range(3):
            assert torch.equal(one(x0=x0[i : i + 1], seed=3 + i), together[i : i + 1])
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(x0, latent(3, 4, 6, 5))


@pytest.mark.parametrize("method, rows", [("dds", 4), ("sds", 2)])
def test_by_name(method, rows, sd, picture):
    given = {"target": "a zebra"} | ({"source": "a horse"} if method == "dds" else {})
    settled, before = R.plan(method, **given, **FEW), sd.evaluations
    done = R.execute(settled, sd, picture)
    assert cost(settled) == done.evaluations == {"decode": rows * 6} and sd.evaluations - before == rows * 6
    assert torch.equal(done.latent, R.edit(sd, picture, method, **given, **FEW).latent) and done.verdict == "edited"
    by_hand = getattr(D, method)(sd.eps, done.x0, sd.text([""]), *(sd.text([text]) for text in given.values()), **FEW)
    assert torch.equal(done.latent, by_hand)
    assert R.blank_plan(method).needs == tuple(given) and not torch.equal(done.latent, done.x0)


MUTATIONS = {
    "a noise of its own for the source": ("dds:descended", "vp_noised(z0, n, a)",
        "vp_noised(z0, torch.randn_like(n), a)", test_the_descent_in_closed_form),
    "the source follows": ("dds:descended", "vp_noised(z0, n, a)", "vp_noised(z, n, a)",
        test_the_descent_in_closed_form),
    "the texts change places": ("dds:dds", "target, [source]", "source, [target]", test_the_descent_in_closed_form),
    "the source's text for SDS's noise": ("dds:sds", "[]", "[target]", test_sds_by_hand),
    "one seed for the batch": ("dds:descended", "seed + i", "seed", test_pictures_in_a_batch_are_as_alone),
    "the last timestep is left out": ("dds:descended", "HIGHEST + 1", "HIGHEST",
        test_timesteps_are_drawn_from_50_to_948),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    turns_red(__name__, "D", *MUTATIONS[name], monkeypatch)
