"""The algorithm pinned by closed forms: no weights, float64 where possible. `D` is exchanged by test_mutations."""

import inspect
import math
import re
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stubs import ALPHA_BAR, Counting, constant, gaussian, latent, zero

from minidiffedit import diffedit as D
from minidiffedit.ddim import Trajectory, level_at, levels, move

pytestmark = pytest.mark.filterwarnings("ignore:.*rounds to level 0")
step_counts, ratios = st.sampled_from([1, 2, 7, 10, 20, 50]), st.sampled_from([0.0, 0.2, 0.5, 0.58, 0.8, 1.0])


def tanh(x_t, t, texts):
    """A predictor whose differences depend on the latent and its noise: no two maps, no two images are alike."""
    return [torch.tanh(x_t * (1 + text)) for text in texts]


def half_mask(h=6, w=5):
    mask = torch.zeros(1, 1, h, w, dtype=torch.bool)
    mask[..., : w // 2] = True
    return mask


def test_options_go_by_name_and_begin_at_the_papers_values():
    """2210.11427, section 4: 10 maps at half the noise, cut at 0.5 of their range, encoded to 0.8; 50 DDIM steps."""
    rule, walk = {"clip": 3.0, "threshold": 0.5}, {"steps": 50}
    expected = {
        D.find_mask: walk | rule | {"strength": 0.5, "maps": 10, "seed": 0},
        D.threshold_maps: rule,
        D.encode: walk | {"strength": 0.8, "refine": 1},
        D.masked_decode: {"guidance_scale": 7.5, "grey": "level"},
        D.sample: walk | {"guidance_scale": 7.5},
    }
    for function, values in expected.items():
        parameters = inspect.signature(function).parameters.values()
        options = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
        assert {name: one for name, one in options.items() if one not in (None, D.untracked)} == values
        assert all(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in parameters
                   if one.name not in options)  # fmt: skip


X0, RAMP = latent(2, 4, 3, 3), torch.linspace(0, 1, 9).reshape(1, 1, 3, 3)
WALK = Trajectory([X0, X0], 1)


@pytest.mark.parametrize("run, name, low, high", [
    (lambda value: D.find_mask(zero, X0, 1.0, 0.0, maps=value), "maps", 1, 1000),
    (lambda value: D.find_mask(zero, X0, 1.0, 0.0, maps=1, chunk=value), "chunk", 1, 1000),
    (lambda value: D.find_mask(zero, X0, 1.0, 0.0, maps=1, seed=value), "seed", 0, 2**63 - 2),
    (lambda value: D.encode(zero, X0, None, steps=1, refine=value), "refine", 1, 100),
    (lambda value: D.masked_decode(zero, WALK, RAMP, None, None, guidance_scale=value), "guidance_scale", -1000, 1000),
    (lambda value: D.sample(zero, X0, None, None, steps=1, guidance_scale=value), "guidance_scale", -1000, 1000),
    (lambda value: D.threshold_maps(RAMP, torch.zeros(1), clip=value), "mask_clip", 1, 1e9),
    (lambda value: D.threshold_maps(RAMP, torch.zeros(1), threshold=value), "mask_threshold", 0, 1),
    (lambda value: levels(value), "steps", 1, 999),
])  # fmt: skip
def test_each_range_holds_its_ends_and_no_more(run, name, low, high):
    for value in (low, high):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(value)
    for value in (low - 1, high * 2):
        with pytest.raises(ValueError, match=f"^{name} must be .* from {re.escape(f'{low} to {high}')}, got"):
            run(value)


def test_a_mask_is_itself_unchanging_and_told_without_its_cells():
    found = D.threshold_maps(RAMP, torch.zeros(1))
    assert found == found and found != D.threshold_maps(RAMP, torch.zeros(1))  # by identity: tensors have no truth
    assert not any(f"{name}=" in repr(found) for name in ("mask", "heat", "maps", "reference"))
    with pytest.raises(AttributeError):
        found.mask = None


def test_warnings_point_at_the_caller():
    one_cell = torch.zeros(1, 1, 3, 3)
    one_cell[..., 1, 1] = 1
    with pytest.warns(UserWarning) as said:
        D.threshold_maps(torch.arange(21.0).reshape(1, 1, 3, 7), torch.zeros(1), threshold=0.05)
        D.threshold_maps(one_cell, torch.zeros(1), clip=None)
        level_at(0.01, 10)
    for one, words in zip(said, ("covers 90%", "single latent cell", "level 0"), strict=True):
        assert words in str(one.message) and one.filename == __file__


# ---------------------------------------------------------------- encoding


@given(step_counts, ratios)
def test_zero_predictor_scales_every_level(steps, strength):
    x0 = latent(1, 4, 3, 5)
    trajectory = D.encode(zero, x0, None, steps=steps, strength=strength)
    assert list(trajectory) == list(range(math.floor(strength * steps + 0.5) + 1))
    for j, x in trajectory.items():
        t = 0 if j == 0 else 1 + 1000 // steps * (j - 1)
        scale = math.sqrt(np.float32(ALPHA_BAR[t]) / np.float32(ALPHA_BAR[0]))
        torch.testing.assert_close(x, scale * x0, rtol=1e-6, atol=0)


@given(step_counts, ratios, st.floats(1, 12))
def test_constant_predictor_round_trip(steps, strength, guidance):
    x0, eps = latent(2, 4, 3, 5), constant(latent(1, 4, 3, 5, seed=1))
    trajectory = D.encode(eps, x0, None, steps=steps, strength=strength)
    everything = torch.ones(1, 1, 3, 5)
    back = D.masked_decode(eps, trajectory, everything, "a", "b", guidance_scale=guidance)
    torch.testing.assert_close(back, x0, rtol=1e-7, atol=1e-7)


def test_encoding_asks_at_the_level_it_moves_to():
    eps = Counting()
    trajectory = D.encode(eps, latent(2, 4, 3, 3), 0.3, steps=10, strength=0.6)
    t, a = levels(10)
    assert [call[1] for call in eps.calls] == list(t[1:7]) and eps.rows == 12
    for j, (x_t, at, texts) in enumerate(eps.calls):
        assert torch.equal(x_t, trajectory[j]) and texts == [0.3]
        assert torch.equal(trajectory[j + 1], move(x_t, gaussian(x_t, at, [0.3])[0], a[j], a[j + 1]))


def test_shallower_encoding_is_a_prefix():
    x0 = latent(1, 4, 3, 3, dtype=torch.float32)
    deep, shallow = (D.encode(gaussian, x0, 0.0, steps=50, strength=r) for r in (0.8, 0.5))
    assert max(deep) == 40 and max(shallow) == 25
    assert all(torch.equal(shallow[j], deep[j]) and torch.equal(deep.prefix(25)[j], deep[j]) for j in shallow)


@pytest.mark.parametrize("shape", [(4, 3, 3), (1, 4, 0, 3), (0, 4, 3, 3)])
def test_what_is_no_latent_is_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"latents must be (b, 4, h, w), got {shape}")):
        D.encode(zero, torch.zeros(shape), None)


def test_strength_zero_makes_no_call():
    eps = Counting()
    x0 = latent(1, 4, 3, 3)
    trajectory = D.encode(eps, x0, 0.0, strength=0.0)
    assert torch.equal(D.masked_decode(eps, trajectory, half_mask(3, 3), 0.0, 0.0), x0)
    assert eps.rows == 0 and list(trajectory) == [0]


def test_what_is_returned_is_never_the_callers():
    x0, record = latent(1, 4, 3, 3, dtype=torch.float32), ["of an earlier run"]
    kept = x0.clone()
    trajectory = D.encode(zero, x0, None, steps=4, strength=0.5, record=record)
    assert len(record) == 3 and all(torch.equal(one, trajectory[j]) for j, one in enumerate(record))
    nothing, none = D.masked_decode(zero, trajectory, torch.zeros(1, 1, 3, 3), 1.0, 0.0, record=(seen := [])), []
    still = D.masked_decode(zero, trajectory.prefix(0), torch.ones(1, 1, 3, 3), 1.0, 0.0, record=none)
    assert seen == none == []  # no step, no record
    for one in (nothing, still, trajectory[0]):
        one.zero_()
    assert torch.equal(x0, kept) and not torch.equal(trajectory[1], torch.zeros_like(x0))


def test_refining_stops_where_nothing_changes_any_more():
    eps = Counting(constant(latent(1, 4, 3, 3, seed=1)))
    D.encode(eps, latent(1, 4, 3, 3), None, steps=10, strength=0.5, refine=9)
    assert eps.rows == 5 * 3  # the second pass gives the first one's value, the third can't be closer


def test_sampling_asks_for_the_null_text_unless_the_guidance_is_one():
    rows = []
    for guidance in (0, 1, 2):
        eps = Counting()
        D.sample(eps, latent(2, 4, 3, 3), 1.0, 0.0, steps=5, guidance_scale=guidance)
        rows.append(eps.rows)
        assert [call[1] for call in eps.calls] == list(levels(5).t[:0:-1])
    assert rows == [20, 10, 20]


def test_refining_solves_the_implicit_step_better():
    x0 = latent(1, 4, 4, 4)

    def miss(refine):
        x = D.encode(gaussian, x0, 0.5, steps=50, strength=0.8, refine=refine)
        back = D.masked_decode(gaussian, x, torch.ones(1, 1, 4, 4), 0.5, 0.5, guidance_scale=1)
        return (back - x0).norm()

    assert miss(2) < 0.2 * miss(1) and miss(3) < miss(2)


def test_refining_stops_where_it_diverges():
    """A predictor so steep that every further pass is farther off: the first pass's value is kept."""

    def steep(x_t, t, texts):
        return [400 * x_t for _ in texts]

    x0 = latent(2, 4, 4, 4)
    eps = Counting(steep)
    once, often = (D.encode(e, x0, None, steps=20, strength=0.2, refine=k) for e, k in ((steep, 1), (eps, 9)))
    assert all(torch.equal(often[j], once[j]) for j in once) and eps.rows == 2 * 4 * 2


# ---------------------------------------------------------------- decoding


def test_empty_mask_returns_the_source_bitwise():
    x0, eps = latent(2, 4, 6, 5, dtype=torch.float32), Counting()
    trajectory = D.encode(gaussian, x0, 0.0)
    assert torch.equal(D.masked_decode(eps, trajectory, torch.zeros(1, 1, 6, 5), 1.0, 0.0), x0) and eps.rows == 0
    one_empty = torch.cat([torch.zeros(1, 1, 6, 5), torch.ones(1, 1, 6, 5)])
    result = D.masked_decode(eps, trajectory, one_empty, 1.0, 0.0)
    assert torch.equal(result[0], x0[0]) and not torch.equal(result[1], x0[1])


@given(step_counts, st.sampled_from([0.2, 0.5, 0.8, 1.0]), st.booleans())
def test_outside_the_mask_every_level_is_the_encoded_one(steps, strength, soft):
    x0, record = latent(1, 4, 6, 5, dtype=torch.float32), []
    trajectory = D.encode(gaussian, x0, 0.0, steps=steps, strength=strength)
    mask = half_mask() * (0.4 if soft else True)
    result = D.masked_decode(gaussian, trajectory, mask, 1.0, 0.0, record=record)
    K = max(trajectory)
    if K == 0:
        return
    assert len(record) == K + 1 and torch.equal(record[-1], result)
    outside = (half_mask() == 0).expand_as(x0)
    for i, y in enumerate(record):
        assert torch.equal(y[outside], trajectory[K - i][outside])
    assert not torch.equal(result[~outside], x0[~outside])


def test_full_mask_from_the_top_is_plain_sampling():
    eps = Counting()
    trajectory = D.encode(gaussian, latent(1, 4, 4, 4, dtype=torch.float32), 0.0, steps=20, strength=1.0)
    ours = D.masked_decode(eps, trajectory, torch.ones(1, 1, 4, 4, dtype=torch.bool), 0.8, -0.2)
    assert [call[1] for call in eps.calls] == list(levels(20).t[:0:-1])
    y, (t, a) = trajectory[20], levels(20)
    for j in range(20, 0, -1):  # plain guided DDIM, written with the one formula
        e_null, e_text = gaussian(y, t[j], [-0.2, 0.8])
        y = move(y, e_null + 7.5 * (e_text - e_null), a[j], a[j - 1])
    assert torch.equal(ours, y)
    assert torch.equal(D.sample(gaussian, trajectory[20], 0.8, -0.2, steps=20), ours)


def test_guidance_leads_to_the_target():
    """With the exact predictor of N(text, s^2), guidance 1 draws from the target's distribution, more overshoots it."""
    x_T = latent(1, 4, 64, 64)
    plain, guided = (D.sample(gaussian, x_T, 1.0, -1.0, steps=100, guidance_scale=g) for g in (1, 3))
    assert plain.mean() == pytest.approx(1.0, abs=0.1) and plain.std() == pytest.approx(0.7, abs=0.05)
    assert guided.mean() > 2


def test_reconstruction_error_falls_with_the_step_count():
    x0, everything = latent(1, 4, 6, 6), torch.ones(1, 1, 6, 6)
    errors = []
    for steps in (25, 50, 100, 200):
        trajectory = D.encode(gaussian, x0, 0.3, steps=steps, strength=1.0)
        back = D.masked_decode(gaussian, trajectory, everything, 0.3, 0.0, guidance_scale=1)
        errors.append(float((back - x0).norm() / x0.norm()))
    assert all(1.6 < one / two < 2.5 for one, two in pairwise(errors)), errors


def test_soft_masks_blend_and_stay_soft():
    x0 = latent(1, 4, 3, 3)
    trajectory = D.encode(gaussian, x0, 0.0, steps=1, strength=1.0)
    ends = [D.masked_decode(gaussian, trajectory, torch.full((1, 1, 3, 3), m), 2.0, 0.0) for m in (0.0, 0.25, 1.0)]
    torch.testing.assert_close(ends[1], 0.75 * ends[0] + 0.25 * ends[2])


def test_guidance_one_saves_the_null_rows():
    trajectory = D.encode(gaussian, latent(1, 4, 6, 5), 0.0, steps=10, strength=0.8)
    one, two = Counting(), Counting()
    D.masked_decode(one, trajectory, half_mask(), 1.0, 0.0, guidance_scale=1)
    D.masked_decode(two, trajectory, half_mask(), 1.0, 0.0, guidance_scale=7.5)
    assert (one.rows, two.rows) == (8, 16) and all(call[2] == [1.0] for call in one.calls)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(1, 1, 5, 6), torch.ones(6, 5), torch.ones(3, 1, 6, 5), torch.ones(1, 4, 6, 5),
     torch.full((1, 1, 6, 5), 1.5), torch.full((1, 1, 6, 5), -0.1), torch.full((1, 1, 6, 5), math.nan)],
)  # fmt: skip
def test_masks_that_do_not_fit(mask):
    trajectory = Trajectory([latent(2, 4, 6, 5)], 10)
    with pytest.raises(ValueError, match="mask"):
        D.masked_decode(zero, trajectory, mask, None, None)


# ---------------------------------------------------------------- the mask


def square(value=2.0, h=8, w=8):
    """Texts as means: they differ in a square of cells only."""
    target = torch.zeros(1, 1, h, w, dtype=torch.float64)
    target[..., 2:5, 3:6] = value
    return target


def test_the_mask_is_where_the_texts_differ():
    target = square()
    found = D.find_mask(gaussian, latent(1, 4, 8, 8), target, torch.zeros_like(target))
    assert found.verdict == ("found",) and found.coverage == (9 / 64,)
    assert torch.equal(found.mask, target > 0)
    assert found.mask.dtype == torch.bool and found.heat.dtype == found.maps.dtype == torch.float32
    assert found.maps.shape == (1, 10, 8, 8) and found.heat.shape == (1, 1, 8, 8)
    assert found.heat.min() == 0 and found.heat.max() == 1


@pytest.mark.parametrize("b, chunk, rows", [(1, 3, [3, 1]), (2, 3, [2] * 4), (1, None, [4])])
def test_maps_see_the_stated_noises_at_the_stated_level(b, chunk, rows):
    eps, x0 = Counting(tanh), latent(b, 4, 3, 5, dtype=torch.float32)
    found = D.find_mask(eps, x0, 1.0, 0.2, maps=4, seed=7, chunk=chunk, steps=50, strength=0.5)
    assert [len(x_t) for x_t, _, _ in eps.calls] == rows and eps.rows == 8 * b
    assert all(t == 481 and texts == [1.0, 0.2] for _, t, texts in eps.calls)  # one x_t for both texts
    seen = torch.cat([x_t.unflatten(0, (b, -1)) for x_t, _, _ in eps.calls], dim=1)
    a = float(np.float32(ALPHA_BAR[481]))
    for i in range(b):
        generator = torch.Generator().manual_seed(7 + i)
        for k in range(4):
            noise = torch.randn(1, 4, 3, 5, generator=generator)[0]
            torch.testing.assert_close(seen[i, k], a**0.5 * x0[i] + (1 - a) ** 0.5 * noise)
            one, two = tanh(seen[i, k], 481, [1.0, 0.2])
            torch.testing.assert_close(found.maps[i, k], (one - two).abs().mean(dim=0))


def test_a_batch_may_have_texts_of_its_own():
    x0, means = latent(3, 4, 6, 6, dtype=torch.float32), torch.tensor([0.3, 1.0, 2.0]).reshape(3, 1, 1, 1)
    together = D.find_mask(tanh, x0, means, 0.0, maps=3, seed=5)
    for i in range(3):
        alone = D.find_mask(tanh, x0[i : i + 1], float(means[i]), 0.0, maps=3, seed=5 + i)
        torch.testing.assert_close(together.maps[i], alone.maps[0])


def test_the_sign_of_a_difference_does_not_matter():
    x0, target = latent(1, 4, 8, 8), square()
    target[..., 3, 3:6] *= -1  # one row differs the other way
    found = D.find_mask(gaussian, x0, target, torch.zeros_like(target))
    assert torch.equal(found.mask, target != 0)


@pytest.mark.parametrize("strength, steps, t", [(0.5, 50, 481), (0.5, 10, 401), (0.0, 50, 1), (1.0, 20, 951)])
def test_level_of_the_mask(strength, steps, t):
    eps = Counting()
    D.find_mask(eps, latent(1, 4, 3, 3), 1.0, 0.0, steps=steps, strength=strength, maps=1)
    assert eps.calls[0][1] == t


def test_same_text_is_answered_without_a_call():
    eps, text = Counting(), torch.zeros(1)
    found = D.find_mask(eps, latent(2, 4, 4, 4), text, text)
    assert eps.rows == 0 and found.verdict == ("no difference",) * 2 and found.coverage == (0.0, 0.0)
    assert not found.mask.any() and not found.heat.any() and found.maps.shape == (2, 10, 4, 4)


@pytest.mark.parametrize("dtype, kappa", [(torch.float32, 1e-4), (torch.float16, 2.5e-3), (torch.bfloat16, 2e-2)])
def test_kappa_is_as_stated(dtype, kappa):
    def eps(x_t, t, texts):
        return [torch.full_like(x_t, text).to(dtype) for text in texts]

    found = D.find_mask(eps, latent(2, 4, 3, 3), 3.0, 1.0)
    torch.testing.assert_close(found.flat_below, torch.full((2,), kappa * 2.0))  # kappa x mean |eps| of both texts
    ramp = torch.linspace(0, 1, 9).reshape(1, 1, 3, 3)
    for limit, verdict in ((0.99, "found"), (1.0, "no difference")):
        assert D.threshold_maps(ramp, torch.tensor([limit])).verdict == (verdict,)


def test_threshold_is_strict_and_coverage_warns_above_nine_tenths():
    steps = torch.arange(21.0).reshape(1, 1, 3, 7)  # heat 0, .05, ..., 1
    assert D.threshold_maps(steps, torch.zeros(1), threshold=0.5).mask.sum() == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert D.threshold_maps(steps, torch.zeros(1), threshold=0.1).coverage[0] == pytest.approx(18 / 21)
        with pytest.raises(UserWarning, match="covers"):
            D.threshold_maps(steps, torch.zeros(1), threshold=0.05)


def test_default_chunk_depends_on_size_only():
    sizes = ((64, 64), (32, 32), (16, 16), (128, 128), (91, 40))
    assert [D.default_chunk(*size) for size in sizes] == [1, 4, 16, 1, 1]


@pytest.mark.parametrize("maps, flat_below", [
    (torch.full((1, 2, 3, 3), math.nan), torch.zeros(1)), (torch.ones(1, 2, 3, 3), torch.full((1,), math.inf)),
    (torch.ones(3, 2, 3, 3), torch.zeros(1)), (torch.ones(2, 3, 3), torch.zeros(2)),
    (torch.ones(0, 2, 3, 3), torch.zeros(0)),
])  # fmt: skip
def test_maps_that_are_none(maps, flat_below):
    with pytest.raises((ValueError, ArithmeticError)):
        D.threshold_maps(maps, flat_below)


@pytest.mark.parametrize("noise, dtype, verdict", [
    (1e-6, torch.float32, "no difference"), (1e-2, torch.float32, "found"), (1e-3, torch.float16, "no difference"),
    (1e-2, torch.float16, "found"),
    (1e-2, torch.bfloat16, "no difference"), (0.5, torch.bfloat16, "found"), (0.0, torch.float32, "no difference"),
])  # fmt: skip
def test_flat_maps_have_a_verdict(noise, dtype, verdict):
    """Texts equal up to rounding at another batch position: never 0 / 0, never a full mask."""
    wobble = noise * latent(1, 4, 6, 6, seed=3)

    def eps(x_t, t, texts):
        return [(x_t + text * wobble).to(dtype) for text in texts]

    found = D.find_mask(eps, latent(1, 4, 6, 6, dtype=torch.float32), 1.0, 0.0)
    assert found.verdict == (verdict,) and torch.isfinite(found.heat).all()
    assert bool(found.mask.any()) == (verdict == "found")


def test_a_predictor_of_nothing_is_flat():
    found = D.find_mask(zero, latent(1, 4, 6, 6), 1.0, 0.0)
    assert found.verdict == ("no difference",) and not found.mask.any()


def test_statistics_against_numpy():
    maps = latent(3, 5, 6, 7, seed=4, dtype=torch.float32).abs() ** 3
    for clip, threshold in [(3.0, 0.5), (None, 0.25), (1.5, 0.75)]:
        found = D.threshold_maps(maps, torch.zeros(3), clip=clip, threshold=threshold)
        for i in range(3):
            m = maps[i].double().numpy().mean(axis=0)
            m = m if clip is None else np.minimum(m, clip * m.mean())
            heat = (m - m.min()) / (m.max() - m.min())
            assert np.allclose(found.heat[i, 0], heat, atol=1e-6)
            assert np.array_equal(found.mask[i, 0].numpy(), found.heat[i, 0].numpy() > threshold)
            assert found.coverage[i] == pytest.approx((heat > threshold).mean())


def test_extreme_cells():
    """A cell ten times the rest would hide it; clipped at 3 x mean it does not. At a thousand times it still does."""
    maps = square().float().repeat(1, 2, 1, 1)
    maps[..., 0, 0] = 10 * maps.max()
    with_cell = square() > 0
    with_cell[..., 0, 0] = True
    only_cell = torch.zeros_like(with_cell)
    only_cell[..., 0, 0] = True
    assert torch.equal(D.threshold_maps(maps, torch.zeros(1)).mask, with_cell)
    for clip, factor in ((None, 1), (3.0, 100)):
        maps[..., 0, 0] *= factor
        with pytest.warns(UserWarning, match="single latent cell"):
            assert torch.equal(D.threshold_maps(maps, torch.zeros(1), clip=clip).mask, only_cell)


@given(st.integers(0, 2**31), st.lists(st.floats(0, 1), min_size=2, max_size=4))
def test_raising_the_threshold_only_removes_cells(seed, thresholds):
    maps = latent(1, 3, 6, 6, seed=seed, dtype=torch.float32).abs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masks = [D.threshold_maps(maps, torch.zeros(1), threshold=t).mask for t in sorted(thresholds)]
    assert all(bool((tighter <= looser).all()) for looser, tighter in pairwise(masks))


@given(st.integers(0, 2**31), st.sampled_from([(3.0, 0.5), (2.0, 0.75), (5.0, 0.4)]))
def test_area_bound(seed, rule):
    """Where some cell reaches the clip, at most 1 / (clip * threshold) of the cells are in."""
    clip, threshold = rule
    maps = latent(1, 1, 8, 8, seed=seed, dtype=torch.float32).abs() ** 6
    found = D.threshold_maps(maps, torch.zeros(1), clip=clip, threshold=threshold)
    if maps.max() >= clip * maps.mean():
        assert found.coverage[0] <= 1 / (clip * threshold) + 1e-6


def test_the_mask_ignores_guidance_scale_and_the_order_of_maps():
    x0, target = latent(1, 4, 8, 8, dtype=torch.float32), square().float()

    def guided(x_t, t, texts):
        null = gaussian(x_t, t, [-0.3])[0]
        return [null + 7.5 * (e - null) for e in gaussian(x_t, t, texts)]

    def scaled(x_t, t, texts):
        return [0.01 * e for e in gaussian(x_t, t, texts)]

    plain = D.find_mask(gaussian, x0, target, 0.1)
    for eps in (guided, scaled):
        other = D.find_mask(eps, x0, target, 0.1)
        torch.testing.assert_close(other.heat, plain.heat, rtol=1e-4, atol=1e-4)
        assert torch.equal(other.mask, plain.mask)
    backwards = D.threshold_maps(plain.maps.flip(1), plain.flat_below)
    torch.testing.assert_close(backwards.heat, plain.heat)


def test_swapping_the_texts_changes_nothing():
    x0, target = latent(1, 4, 8, 8), square()
    one, two = D.find_mask(gaussian, x0, target, 0.1), D.find_mask(gaussian, x0, 0.1, target)
    assert torch.equal(one.heat, two.heat)


def test_a_kept_reference_halves_the_rows():
    x0, target = latent(2, 4, 8, 8), square()
    first = D.find_mask(gaussian, x0, 0.5, 0.0, maps=4, chunk=3)
    eps = Counting()
    again = D.find_mask(eps, x0, target, 0.0, maps=4, chunk=2, known_reference=first.reference)
    fresh = D.find_mask(gaussian, x0, target, 0.0, maps=4)
    assert eps.rows == 8 and torch.equal(again.heat, fresh.heat) and torch.equal(again.flat_below, fresh.flat_below)


def test_warnings_for_doubtful_masks():
    almost = torch.ones(1, 1, 8, 8)
    almost[..., 0, 0] = 0
    with pytest.warns(UserWarning, match="covers 98%"):
        D.threshold_maps(almost, torch.zeros(1))


# ---------------------------------------------------------------- sameness


@given(st.integers(1, 11), st.integers(1, 4))
def test_alone_in_a_batch_and_under_any_chunk(chunk, b):
    x0 = latent(b, 4, 5, 4, dtype=torch.float32)
    together = D.find_mask(tanh, x0, 1.0, 0.0, chunk=chunk, seed=3)
    up = D.encode(gaussian, x0, 0.0, steps=10)
    down = D.masked_decode(gaussian, up, together.mask, 1.0, 0.0)
    for i in range(b):
        alone = D.find_mask(tanh, x0[i : i + 1], 1.0, 0.0, seed=3 + i)
        assert torch.equal(alone.maps[0], together.maps[i]) and torch.equal(alone.heat[0], together.heat[i])
        lone = D.encode(gaussian, x0[i : i + 1], 0.0, steps=10)
        assert all(torch.equal(lone[j][0], up[j][i]) for j in lone)
        assert torch.equal(D.masked_decode(gaussian, lone, alone.mask, 1.0, 0.0)[0], down[i])


def test_seeds_lists_and_the_global_generator():
    x0 = latent(2, 4, 4, 4)
    state = torch.random.get_rng_state()
    listed = D.find_mask(gaussian, x0, square(h=4, w=4), 0.0, seed=[5, 0])
    assert torch.equal(torch.random.get_rng_state(), state)
    again, zeroth = (D.find_mask(gaussian, x0[i : i + 1], square(h=4, w=4), 0.0, seed=s) for i, s in ((0, 5), (1, 0)))
    # The closed form's difference does not depend on the noise; its kept predictions do.
    assert torch.equal(listed.reference, torch.cat([again.reference, zeroth.reference]))
    other = D.find_mask(gaussian, x0, square(h=4, w=4), 0.0, seed=6)
    assert not torch.equal(other.reference, listed.reference)
    with pytest.raises(ValueError, match="1 seeds for 2"):
        D.find_mask(gaussian, x0, 1.0, 0.0, seed=[1])


def test_arguments_are_left_alone_and_half_types_widen():
    x0, mask = latent(1, 4, 6, 5, dtype=torch.float16), half_mask()
    before = x0.clone(), mask.clone()
    trajectory = D.encode(gaussian, x0, 0.0, steps=5)
    result = D.masked_decode(gaussian, trajectory, mask, 1.0, 0.0)
    assert torch.equal(x0, before[0]) and torch.equal(mask, before[1])
    assert result.dtype == trajectory[0].dtype == torch.float32
    assert D.encode(gaussian, latent(1, 4, 2, 2), 0.0, steps=5)[4].dtype == torch.float64


def test_nan_from_the_model_is_an_error():
    def broken(x_t, t, texts):
        return [torch.full_like(x_t, math.nan) for _ in texts]

    x0 = latent(1, 4, 3, 3)
    for call in (
        lambda: D.find_mask(broken, x0, 1.0, 0.0),
        lambda: D.encode(broken, x0, 0.0),
        lambda: D.masked_decode(broken, D.encode(zero, x0, 0.0), torch.ones(1, 1, 3, 3), 1.0, 0.0),
        lambda: D.sample(broken, x0, 1.0, 0.0),
    ):
        with pytest.raises(ArithmeticError, match="NaN"):
            call()


@pytest.mark.parametrize("options", [
    {"maps": 0}, {"maps": 2.5}, {"chunk": -1}, {"chunk": 0}, {"seed": -1}, {"seed": None}, {"seed": True},
    {"seed": [1, 2]}, {"clip": 0.0}, {"clip": 0.5}, {"clip": "3"}, {"clip": math.nan}, {"threshold": 1.5},
    {"threshold": math.nan}, {"strength": -1.0}, {"strength": "0.5"}, {"steps": 0}, {"steps": 1000},
    {"known_reference": torch.zeros(1, 10, 4, 2, 2)},
])  # fmt: skip
def test_mask_arguments_out_of_range(options):
    with pytest.raises(ValueError):
        D.find_mask(gaussian, latent(1, 4, 3, 3), 1.0, 0.0, **options)


def test_tracking_sees_every_step():
    seen = []

    def track(items, stage):
        seen.append((stage, len(items)))
        return items

    x0 = latent(1, 4, 3, 3)
    found = D.find_mask(gaussian, x0, square(h=3, w=3), 0.0, maps=4, chunk=2, track=track)
    trajectory = D.encode(gaussian, x0, 0.0, steps=10, track=track)
    D.masked_decode(gaussian, trajectory, torch.ones_like(found.mask), 1.0, 0.0, track=track)
    D.sample(gaussian, x0, 1.0, 0.0, steps=10, track=track)
    assert seen == [("mask", 2), ("encode", 8), ("decode", 8), ("generate", 10)]
