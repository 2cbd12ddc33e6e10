"""Null-text inversion: gradients against finite differences, the papers' exact limits, and what it is for."""

import math
import sys
import warnings

import pytest
import tiny
import torch
from mutants import mutant, run
from stubs import ALPHA_BAR, Model, gaussian, latent

from minidiffedit import StableDiffusion, Tokenizer, levels
from minidiffedit import run as R
from minidiffedit.methods import null_text as T
from minidiffedit.methods.inversions import ddim
from minidiffedit.methods.replay import replay
from minidiffedit.path import Path

N = 10
X0 = latent(1, 4, 8, 8)


def smooth(x, t, texts, **hooks):
    """`stubs.gaussian` with texts of 77 tokens, whose mean is the mean of the pictures."""
    return gaussian(x, t, [text.mean(dim=(1, 2))[:, None, None, None] for text in texts])


NULL, SOURCE = torch.zeros(1, 77, 8, dtype=torch.float64), torch.full((1, 77, 8), 0.6, dtype=torch.float64)


def found(eps=smooth, x0=X0, **options):
    return T.null_text(eps, x0, NULL, SOURCE, **{"steps": N} | options)


class Losses:
    """What each inner step's loss was, read from outside: at each level, how far the step is from the path."""

    def __init__(self, scale, path):
        self.scale, self.path, self.texts, self.of = scale, path, {}, {}

    def __call__(self, x, t, texts, **hooks):
        predictions = smooth(x, t, texts)
        j = levels(N).t.index(t)
        if texts[0] is SOURCE:
            self.texts[j] = predictions[0].detach()  # on the way down: the last call under the source at this level
        elif texts[0] is not NULL or j in self.texts:
            a, to = (float(ALPHA_BAR[levels(N).t[k]]) for k in (j, j - 1))
            e = predictions[0].detach() + self.scale * (self.texts[j] - predictions[0].detach())
            y = (to / a) ** 0.5 * (x - (1 - a) ** 0.5 * e) + (1 - to) ** 0.5 * e
            self.of.setdefault(j, []).append(float(((y - self.path[j - 1]) ** 2).mean()))
        return predictions


def test_each_levels_loss_falls_and_ends_below_its_start():
    path = ddim(smooth, X0, NULL, SOURCE, steps=N)
    seen = Losses(7.5, path)
    found(seen)
    assert sorted(seen.of) == list(range(1, N + 1))
    for losses in seen.of.values():
        assert losses[-1] <= losses[0] and len(losses) >= 2  # the last is of the step that is taken
    assert sum(losses[-1] for losses in seen.of.values()) < 0.9 * sum(losses[0] for losses in seen.of.values())


def test_at_guidance_one_nothing_is_learned():
    """e_null cancels: the gradient is zero, and every null text stays what it was, bit for bit."""
    path = found(guidance_scale=1.0)
    assert sorted(path.nulls) == list(range(1, N + 1))
    assert all(torch.equal(null, NULL.float()) for null in path.nulls.values())


def test_null_texts_of_nothing_are_plain_guidance():
    """A path whose null texts are all "" replays as the path without any; no inner steps find no others."""
    plain = ddim(smooth, X0, NULL, SOURCE, steps=N)
    listed = Path([*plain.values()], N, "unused", nulls=dict.fromkeys(range(1, N + 1), NULL))
    untouched = found(inner_steps=0)
    target = torch.full((1, 77, 8), -0.3, dtype=torch.float64)
    expected = replay(smooth, plain, target)
    assert torch.equal(replay(smooth, listed, target), expected)
    assert torch.allclose(replay(smooth, untouched, target), expected, rtol=1e-12)
    assert not torch.allclose(replay(smooth, found(), target), expected, rtol=1e-3)


def test_guided_decoding_follows_the_path_closer_than_without():
    path = found()
    plain = Path([*path.values()], N, NULL)
    misses = [float((replay(smooth, one, SOURCE) - X0).norm()) for one in (path, plain)]
    assert misses[0] < 0.2 * misses[1]
    more = [float((replay(smooth, found(inner_steps=n), SOURCE) - X0).norm()) for n in (0, 3, 10, 50)]
    assert more[3] < more[2] < more[1] < more[0]


def test_its_path_is_ddims_and_each_null_starts_from_the_one_before():
    path, plain = found(strength=0.6, refine=2), ddim(smooth, X0, NULL, SOURCE, steps=N, strength=0.6, refine=2)
    assert (
        len(path) == 7 and all(torch.equal(path[j], plain[j]) for j in plain) and sorted(path.nulls) == [*range(1, 7)]
    )
    starts, calls = {}, []

    def eps(x, t, texts, **hooks):
        calls.append((levels(N).t.index(t), texts[0]))
        return smooth(x, t, texts)

    path = found(eps)
    for (j, text), (_, following) in zip(calls[N:], calls[N + 1 :]):  # first the N calls of the inversion
        if text is SOURCE:
            starts[j] = following
    assert torch.equal(starts[N].detach(), NULL.float())
    for j in range(1, N):
        assert torch.equal(starts[j].detach(), path.nulls[j + 1])


def test_the_gradient_is_the_finite_difference():
    """Through the network itself, in float64: what Adam is fed is the slope of the loss."""
    sd = StableDiffusion(*(network.double() for network in tiny.networks()), Tokenizer())
    null, text = sd.text(["", "a horse"]).double().split(1)
    x, t, w, (a, to) = latent(1, 4, 8, 8, seed=3), 401, 7.5, (float(ALPHA_BAR[401]), float(ALPHA_BAR[301]))
    with torch.no_grad():
        e_text, goal = sd.eps(x, t, [text])[0], latent(1, 4, 8, 8, seed=4)

    def loss(null):
        (e_null,) = sd.eps(x, t, [null])
        e = e_null + w * (e_text - e_null)
        y = (to / a) ** 0.5 * (x - (1 - a) ** 0.5 * e) + (1 - to) ** 0.5 * e
        return ((y - goal) ** 2).mean()

    def stepped(variable):  # what null_text hands to `optimised`, with an identity for the float32 in between
        (e_null,) = sd.eps(x, t, [variable])
        return T.move(x, e_null + w * (e_text - e_null), a, to)

    (gradient,) = torch.autograd.grad(T.F.mse_loss(stepped(null.requires_grad_()), goal), null)
    for seed in range(4):
        direction = latent(1, 77, 24, seed=10 + seed)
        with torch.no_grad():
            slope = (loss(null + 1e-5 * direction) - loss(null - 1e-5 * direction)) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-5)
    one = T.optimised(null.detach(), goal, lambda n: stepped(n.double()), 1, 0.01, 0.0)
    torch.testing.assert_close(
        one.double(), null.detach() - 0.01 * gradient.sign(), rtol=0, atol=1e-4
    )  # Adam's first step


def test_the_optimiser_is_torchs_adam():
    goal = latent(1, 5, seed=1, dtype=torch.float32)
    start = latent(1, 5, seed=2, dtype=torch.float32)
    for steps in (1, 2, 7):
        variable = torch.nn.Parameter(start.clone())
        adam = torch.optim.Adam([variable], lr=0.03)
        for _ in range(steps):
            adam.zero_grad()
            ((variable**3 - goal) ** 2).mean().backward()
            adam.step()
        ours = T.optimised(start, goal, lambda n: n**3, steps, 0.03, 0.0)
        torch.testing.assert_close(ours, variable.detach(), rtol=1e-5, atol=1e-6)


def test_it_stops_where_it_is_near_enough():
    calls = []

    def stepped(null):
        calls.append(1)
        return null

    start, goal = torch.ones(1, 3), torch.zeros(1, 3)
    T.optimised(start, goal, stepped, 100, 0.1, 0.5)
    assert 1 < len(calls) < 10  # 1, .9, .8, .7: below .5 after squaring; the step of the last loss is still taken
    calls.clear()
    T.optimised(start, goal, stepped, 100, 0.1, 2.0)
    assert len(calls) == 1


def test_goals_rates_and_limits_are_the_authors(monkeypatch):
    seen = []
    monkeypatch.setattr(T, "optimised", lambda null, goal, stepped, *given: seen.append((goal, *given)) or null)
    path = found(inner_steps=7)
    assert [most for _, most, _, _ in seen] == [7] * N
    for i, (goal, _, rate, enough) in enumerate(seen):
        assert torch.equal(goal, path[N - i - 1])
        assert rate == pytest.approx(1e-2 * (1 - i / 100)) and enough == pytest.approx(1e-5 + 2e-5 * i)


def test_the_schedule_of_more_than_a_hundred_steps_does_not_turn_round(monkeypatch):
    """The authors' rate is for 50 steps and would fall below zero at 100."""
    seen = []
    monkeypatch.setattr(T, "optimised", lambda null, goal, stepped, most, rate, enough: seen.append(rate) or null)
    found(steps=200)
    assert min(seen) >= 0


def test_rows_and_one_picture_at_a_time(picture):
    model = Model()
    options = {"source": "a horse", "target": "a zebra", "steps": 5, "inner_steps": 3, "seed": 0}
    done = R.edit(model, picture, "null-text+replay", **options)
    assert done.evaluations == {"encode": 5 + 5 + 15 + 5, "decode": 10} and model.gradients == 15
    again = R.edit(model, picture, "null-text+replay", reuse=done, **options | {"target": "a cow"})
    assert again.evaluations == {"encode": 0, "decode": 10}
    other = R.edit(model, picture, "null-text+replay", reuse=done, **options | {"guidance_scale": 2.0})
    assert other.evaluations["encode"] == 30  # its null texts hold for one scale
    with pytest.raises(ValueError, match="one picture at a time, got 2"):
        T.null_text(smooth, latent(2, 4, 8, 8), NULL, SOURCE)


def test_on_a_network_the_source_comes_back_closer(sd, picture):
    options = {"steps": 5, "seed": 0, "source": "a horse", "target": "a horse", "guidance_scale": 3.0}
    ours = R.edit(sd, picture, "null-text+replay", inner_steps=5, **options)
    plain = R.edit(sd, picture, "replay", **options)
    misses = [float((done.latent - done.x0).norm()) for done in (ours, plain)]
    assert misses[0] < 0.8 * misses[1] and not any(null.requires_grad for null in ours.trajectory.nulls.values())
    assert not ours.latent.requires_grad and not any(x.requires_grad for x in ours.stages["encode"])
    assert all(math.isfinite(one) for one in misses)


# name: (where in methods/null_text.py, what stands there, what a mistake would put, the test that must fail)
MUTATIONS = {
    "the text for the null text": ("null_text", "e_null + guidance_scale * (e_text - e_null)",
        "e_text + guidance_scale * (e_null - e_text)",
        test_at_guidance_one_nothing_is_learned),
    "the level left as the goal": ("null_text", "path[j - 1], stepped", "path[j], stepped",
        test_goals_rates_and_limits_are_the_authors),
    "the path is walked, not the step": ("null_text", "x = stepped(null)", "x = path[j - 1]",
        test_each_levels_loss_falls_and_ends_below_its_start),
    "each level from the beginning": ("null_text", "null = optimised(null,", "null = optimised(path.any_null,",
        test_its_path_is_ddims_and_each_null_starts_from_the_one_before),
    "one null text for all": ("null_text", "found[j] = null", "found = dict.fromkeys(path.down(), null)",
        test_guided_decoding_follows_the_path_closer_than_without),
    "inverted under the null text": ("null_text", "ddim(eps, x0, null, source,", "ddim(eps, x0, null, null,",
        test_its_path_is_ddims_and_each_null_starts_from_the_one_before),
    "never near enough": ("optimised", "float(loss) < enough", "False", test_it_stops_where_it_is_near_enough),
    "several pictures": ("null_text", "len(x0) != 1", "False", test_rows_and_one_picture_at_a_time),
    "the next level's rate": ("null_text", "enumerate(path.down())", "enumerate(path.down(), 1)",
        test_goals_rates_and_limits_are_the_authors),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, picture, monkeypatch):
    function, old, new, test = MUTATIONS[name]
    changed = mutant(f"methods.null_text:{function}", old, new, monkeypatch)
    monkeypatch.setattr(sys.modules[__name__], "T", changed)
    with pytest.raises((AssertionError, pytest.fail.Exception)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(test, sd=sd, picture=picture, monkeypatch=monkeypatch)
