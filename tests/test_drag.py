"""DragDiffusion and DragNoise: what is followed and how, the gradient, what stays, predicted = paid."""

import proofs
import pytest
import tiny
import torch
import torch.nn.functional as F
from proofs import edited, turns_red
from stubs import ALPHA_BAR, latent
from tiny import box

from minidiffedit import StableDiffusion, levels
from minidiffedit.methods import drag as D
from minidiffedit.methods import drag_diffusion as E
from minidiffedit.methods.inversions import ddim

PLACES = [((2.5, 2.0), (5.0, 6.0))]
FEW = {"steps": 5, "iterations": 2, "lora_steps": 0}


@pytest.fixture(scope="module")
def double():
    return proofs.double(tiny.UNET)


def by_grid(features, at, radius):
    """The same by torch's grid_sample."""
    h, w = features.shape[2:]
    around = torch.arange(-radius, radius + 1).double()
    rows, columns = torch.meshgrid(at[0] + around, at[1] + around, indexing="ij")
    grid = torch.stack([2 * columns / (w - 1) - 1, 2 * rows / (h - 1) - 1], dim=-1)[None]
    return F.grid_sample(features, grid, mode="bilinear", padding_mode="border", align_corners=True)


@pytest.mark.parametrize("at", [(3.0, 4.0), (2.3, 5.8), (0.0, 0.0), (0.4, 8.0), (6.0, 8.0), (9.0, -3.0)])
def test_squares_are_bilinear(at):
    features = latent(1, 3, 7, 9)
    for radius in (0, 1, 2):
        torch.testing.assert_close(D.sampled(features, at, radius), by_grid(features, at, radius))
    if at == (3.0, 4.0):
        assert torch.equal(D.sampled(features, at, 1), features[:, :, 2:5, 3:6])


def test_a_feature_that_was_shifted_is_found():
    before = latent(1, 5, 20, 20)
    for dr, dc in ((0, 0), (2, -3), (-3, 1)):
        after = before.roll((dr, dc), dims=(2, 3)) + 0.01 * latent(1, 5, 20, 20, seed=1)
        assert D.tracked(after, D.sampled(before, (9.0, 11.0), 0), (9.0, 11.0), 3) == (9 + dr, 11 + dc)
    far = before.roll((5, 0), dims=(2, 3))  # out of reach
    found = D.tracked(far, D.sampled(before, (9.0, 11.0), 0), (9.0, 11.0), 3)
    assert D.distance(found, (9.0, 11.0)) <= 18**0.5
    corner = before.roll((-1, -1), dims=(2, 3))
    assert D.tracked(corner, D.sampled(before, (1.0, 1.0), 0), (1.0, 1.0), 3) == (0, 0)


def test_the_supervision_by_hand():
    features, held = latent(1, 3, 20, 20), latent(1, 3, 20, 20, seed=1)
    loss = D.supervision(features, held, [(5.0, 5.0), (9.0, 9.0)], [(5.0, 9.0), (9.5, 9.0)], 1)
    difference = features[..., 4:7, 5:8] - held[..., 4:7, 4:7]  # one to the right; the other point rests
    torch.testing.assert_close(loss, 9 * difference.abs().mean())
    along = D.supervision(features, held, [(5.0, 5.0)], [(8.0, 9.0)], 0)  # 3, 4, 5
    expected = (by_grid(features, (5.6, 5.8), 0) - held[..., 5:6, 5:6]).abs().mean()
    torch.testing.assert_close(along, expected)


@pytest.mark.parametrize("method", [E.drag_diffusion, E.drag_noise])
def test_the_gradient_is_the_finite_difference(method, double, monkeypatch):
    """What Adam is given, through the network, in float64, at a variable away from the beginning."""
    sd, x0, given = double, latent(1, 4, 8, 8), []
    mask = torch.zeros(1, 1, 8, 8).double()
    mask[..., 2:7, 2:7] = 1

    def step(self, at, gradients):
        given.append((at[0], gradients[0]))
        return [at[0] + 0.02 * latent(*at[0].shape, seed=5)]

    monkeypatch.setattr(D.Adam, "step", step)
    monkeypatch.setattr(D, "tracked", lambda features, wanted, at, reach: at)
    text, before = sd.text(["a horse"]), sd.gradients
    monkeypatch.setattr(E, "dragged", D.dragged)
    method(sd.eps, x0, PLACES, sd.projections, sd.text([""]), text, mask, **FEW)
    assert sd.gradients - before == 2
    with torch.no_grad():
        K, path = 4, ddim(sd.eps, x0, None, text, steps=5, strength=0.7)
        t, (a, to) = levels(5).t[K], (float(ALPHA_BAR[levels(5).t[j]]) for j in (K, K - 1))

        def seen(variable):
            found, x = [], path[K] if method is E.drag_noise else variable

            def feature(site, h):
                if (site.place, site.kind) == ("mid", "block") and method is E.drag_noise:
                    return variable
                if (site.place, site.level, site.kind, site.index) == ("up", 1, "block", 2):
                    found.append(h)
                return h

            (e,) = sd.eps(x, t, [text], feature=feature)
            y = (to / a) ** 0.5 * (x - (1 - a) ** 0.5 * e) + (1 - to) ** 0.5 * e
            return y, F.interpolate(found[0], (32, 32), mode="bilinear")

        (first, _), (at, gradient) = given
        still, (_, held) = seen(first)[0], seen(at)

        def loss(variable):
            y, features = seen(variable)
            d = (10 / 356**0.5, 16 / 356**0.5)
            one, other = by_grid(features, (10 + d[0], 8 + d[1]), 1), by_grid(held, (10.0, 8.0), 1)
            return float(9 * (one - other).abs().mean() + 0.1 * ((y - still) * (1 - mask)).abs().sum())

        for seed in range(3):
            step = 1e-6 * latent(*at.shape, seed=10 + seed)
            slope = (loss(at + step) - loss(at - step)) / 2
            assert float((gradient * step).sum()) == pytest.approx(slope, rel=1e-4)


def test_points_that_are_there_cost_nothing(sd):
    x0, text, before = latent(1, 4, 8, 8, dtype=torch.float32), sd.text(["a horse"]), sd.evaluations
    for method in (E.drag_diffusion, E.drag_noise):
        found = method(sd.eps, x0, [((2.0, 2.0), (2.0, 2.3))], sd.projections, text, text)
        assert torch.equal(found, x0) and sd.evaluations == before


def test_without_moves_the_picture_is_decoded_beside_itself(sd):
    """Both rows are then the same walk down: keys and values of the source are its own."""
    x0, text = latent(1, 4, 8, 8, dtype=torch.float32), sd.text(["a horse"])
    path = ddim(sd.eps, x0, text, text, steps=5, strength=0.7)
    x = path[path.top]
    for j in path.down():
        x = path.step(x, sd.eps(x, path.t[j], [text])[0], j)
    found = E.drag_diffusion(sd.eps, x0, PLACES, sd.projections, text, text, **FEW | {"iterations": 0})
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [E.drag_diffusion, E.drag_noise])
def test_the_loss_falls_and_the_point_moves(method, sd, monkeypatch):
    losses, record, text = [], {}, sd.text(["a horse"])
    plain = D.supervision

    def supervision(*given):
        loss = plain(*given)
        losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr(D, "supervision", supervision)
    monkeypatch.setattr(D, "tracked", lambda features, wanted, at, reach: at)  # the same loss at each move
    options = FEW | {"iterations": 15, "rate": 0.02}
    x0 = latent(1, 4, 8, 8, dtype=torch.float32)
    method(sd.eps, x0, PLACES, sd.projections, text, text, record=record, **options)
    # With its own features of the moment as the goal the loss need not fall each time.
    assert len(losses) == 15 and min(losses[5:]) < losses[0]
    assert record["points"].tolist() == [[2.5, 2.0]]
    monkeypatch.undo()
    method(sd.eps, x0, PLACES, sd.projections, text, text, record=record, **options | {"iterations": 40, "rate": 0.2})
    assert D.distance(record["points"][0].tolist(), PLACES[0][0]) > 0.2


def test_the_miniatures_middle_speaks():
    """DragNoise moves it alone: the first miniature's said next to nothing, and nothing was dragged."""
    sd, x = StableDiffusion.load("mini", device="cpu", dtype="float32"), latent(1, 4, 24, 24, dtype=torch.float32)
    text, put = [sd.text(["a photo of a sheep on a sandy beach"])], lambda site, h: 0 * h if E.is_middle(site) else h
    with torch.no_grad():
        for t in (681, 341):
            plain, without = (sd.eps(x, t, text, **how)[0] for how in ({}, {"feature": put}))
            assert (plain - without).norm() > 0.02 * plain.norm()


@pytest.mark.parametrize("method, one_more", [("drag-diffusion", 0), ("drag-noise", 1)])
def test_on_a_picture(method, one_more, sd, picture):
    options = {"points": "30,30=>60,50", "source": "a horse", "iterations": 2, "lora_steps": 2, "batch": 2, "rank": 2}
    done = edited(sd, picture, method, **options)
    assert done.evaluations == {"decode": 2 * 2 + 7 + 2 + 2 * 7 + one_more} and done.tensors["points"].shape == (1, 2)
    masked = edited(sd, picture, method, mask=box(), **options)
    assert masked.verdict == "given" and not torch.equal(masked.latent, done.latent)


MUTATIONS = {
    "rows for columns": ("drag:supervision", "h[1] + (g[1] - h[1]) / far", "h[1] + (g[0] - h[0]) / far",
        test_the_supervision_by_hand),
    "what stays is that of the moment": ("drag:dragged", "if not k:", "if True:",
        test_the_gradient_is_the_finite_difference),
    "half the way between cells": ("drag:sampled", "(1 - right) * features", "0.5 * features",
        test_squares_are_bilinear),
    "the largest difference": ("drag:tracked", "argmin", "argmax", test_a_feature_that_was_shifted_is_found),
    "the window is not clipped": ("drag:tracked", "max(r - reach, 0), max(c - reach, 0)", "max(r - reach, 0), c",
        test_a_feature_that_was_shifted_is_found),
    "a point that rests is moved": ("drag:supervision", ">= NEAR", ">= 0.1", test_the_supervision_by_hand),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, double, monkeypatch):
    turns_red(__name__, "D", *MUTATIONS[name], monkeypatch, sd=sd, double=double)
