"""The noise table and the one formula, against numpy, closed forms and diffusers' schedulers."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stubs import ALPHA_BAR, latent

from minidiffedit import ddim

SCHEDULER = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, clip_sample=False,
    set_alpha_to_one=False, steps_offset=1,
)  # fmt: skip
level_alphas = st.integers(0, 999).map(lambda t: float(ALPHA_BAR[t]))


def test_alpha_bar_is_the_float32_product():
    assert np.array_equal(np.array(ddim.alpha_bar(), np.float32), ALPHA_BAR.astype(np.float32))
    assert ddim.alpha_bar()[0] == pytest.approx(0.99914998, abs=1e-8)
    assert ddim.alpha_bar()[999] == pytest.approx(0.0046600951, abs=1e-8)


@pytest.mark.parametrize("steps", [1, 10, 20, 25, 50, 100, 250, 500])
def test_levels_are_the_definition(steps):
    t, a = ddim.levels(steps)
    assert t == (0, *(1 + 1000 // steps * (j - 1) for j in range(1, steps + 1)))
    assert a == tuple(float(np.float32(ALPHA_BAR[i])) for i in t)


@pytest.mark.parametrize("steps", [10, 20, 25, 50, 100])
def test_levels_and_steps_equal_diffusers(steps):
    from diffusers import DDIMInverseScheduler, DDIMScheduler

    down, up = DDIMScheduler(**SCHEDULER), DDIMInverseScheduler(**SCHEDULER)
    down.set_timesteps(steps)
    up.set_timesteps(steps)
    t, a = ddim.levels(steps)
    assert list(t[1:]) == up.timesteps.tolist() == down.timesteps.tolist()[::-1]
    assert np.allclose(a[1:], down.alphas_cumprod[list(t[1:])], rtol=0, atol=5e-7)
    assert a[0] == pytest.approx(float(down.final_alpha_cumprod), abs=5e-7)
    x, e = latent(1, 4, 5, 5, dtype=torch.float32), latent(1, 4, 5, 5, seed=1, dtype=torch.float32)
    for j in range(1, steps + 1):
        lower = down.step(e, t[j], x).prev_sample
        higher = up.step(e, t[j], x).prev_sample
        torch.testing.assert_close(ddim.move(x, e, a[j], a[j - 1]), lower, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(ddim.move(x, e, a[j - 1], a[j]), higher, rtol=2e-5, atol=2e-5)


@given(level_alphas, level_alphas, level_alphas)
def test_move_inverts_composes_and_rests(a, b, c):
    x, e = latent(1, 4, 2, 3), latent(1, 4, 2, 3, seed=1)
    torch.testing.assert_close(ddim.move(ddim.move(x, e, a, b), e, b, a), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ddim.move(x, e, a, a), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ddim.move(ddim.move(x, e, a, b), e, b, c), ddim.move(x, e, a, c), rtol=1e-9, atol=1e-9)


@given(level_alphas, level_alphas)
def test_move_carries_signal_and_noise(a, b):
    """Started from a true x_t = sqrt(a) x0 + sqrt(1-a) e, it lands on the true x at the other level."""
    x0, e = latent(1, 4, 2, 3), latent(1, 4, 2, 3, seed=1)
    expected = math.sqrt(b) * x0 + math.sqrt(1 - b) * e
    torch.testing.assert_close(ddim.move(math.sqrt(a) * x0 + math.sqrt(1 - a) * e, e, a, b), expected)


@pytest.mark.parametrize("steps", [0, -1, 1000, 50.0, True, "50", None])
def test_steps_out_of_range(steps):
    with pytest.raises(ValueError, match="1 to 999"):
        ddim.levels(steps)


@given(st.integers(1, 999), st.data())
def test_level_of_a_strength(steps, data):
    k = data.draw(st.integers(0, steps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ddim.level_at(k / steps, steps) == k  # int() would give 28 for .58 of 50
        assert ddim.level_at(0.0, steps, lowest=1) == 1
        assert ddim.level_at(1.0, steps) == steps


def test_level_warnings_and_errors():
    assert ddim.level_at(0.58, 50) == 29
    assert ddim.level_at(0.5, 25) == 13
    with pytest.warns(UserWarning, match="level 0"):
        assert ddim.level_at(0.01, 10) == 0
    assert ddim.levels(30).t[-1] == 958  # 30 does not divide 1000
    for strength in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="from 0"):
            ddim.level_at(strength, 50)


def test_the_ends_of_a_range_are_in_it():
    assert len(ddim.levels(1).t) == 2 and len(ddim.levels(999).t) == 1000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [ddim.level_at(strength, 10) for strength in (0, 0.05, 1)] == [0, 1, 10]
    for seed in (0, 2**63 - 1):
        ddim.noises((1, 1, 1), 1, seed)
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match="seed must be"):
            ddim.noises((1, 1, 1), 1, seed)
    assert len(ddim.Trajectory([latent(1, 4, 1, 1)] * 4, 3)) == 4
    with pytest.raises(ValueError, match="1 to 4 levels, got 5"):
        ddim.Trajectory([latent(1, 4, 1, 1)] * 5, 3)
    assert ddim.real("x", 1, 1, 1) == 1.0 == ddim.whole("x", 1, 1, 1)


@settings(max_examples=20)
@given(st.integers(0, 2**63 - 1), st.integers(1, 6))
def test_noises_come_one_by_one_from_a_generator_of_their_own(seed, count):
    state = torch.random.get_rng_state()
    made = ddim.noises((4, 3, 5), count, seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    generator = torch.Generator().manual_seed(seed)
    for noise in made:
        assert torch.equal(noise[None], torch.randn(1, 4, 3, 5, generator=generator))
    assert torch.equal(ddim.noises((4, 3, 5), 1, seed), made[:1])


def test_trajectory_is_a_mapping_by_level():
    latents = [latent(1, 4, 2, 2, seed=j) for j in range(4)]
    trajectory = ddim.Trajectory(latents, 10)
    assert list(trajectory) == [0, 1, 2, 3] and max(trajectory) == 3 and trajectory.steps == 10
    assert trajectory[2] is latents[2] and trajectory.prefix(1)[1] is latents[1] and len(trajectory.prefix(0)) == 1
    for level in (-1, 4, "0"):
        with pytest.raises(KeyError):
            trajectory[level]
    for level in (-1, 4):
        with pytest.raises(ValueError, match=r"0\.\.3"):
            trajectory.prefix(level)
    with pytest.raises(ValueError):
        ddim.Trajectory([], 10)
