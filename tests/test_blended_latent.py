"""Blended latent diffusion: the picture outside, at every level and at the end; a plain run where all is inside."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from proofs import edited, turns_red
from stubs import ALPHA_BAR, Counting, gaussian, latent
from tiny import box

from minidiffedit import levels, noises
from minidiffedit.attention import sdpa
from minidiffedit.files.images import to_tensor
from minidiffedit.methods import blended_latent as B
from minidiffedit.methods import decoder_fit as D
from minidiffedit.methods.replay import replay
from minidiffedit.path import Path

OPTIONS = {"steps": 10, "strength": 0.8, "seed": 3}


def painted(eps=gaussian, mask=None, x0=None, **options):
    x0 = latent(2, 4, 6, 5) if x0 is None else x0
    return B.blended_latent(eps, x0, left() if mask is None else mask, 0.8, 0.0, **OPTIONS | options)


def left():
    mask = torch.zeros(1, 1, 6, 5)
    mask[..., :2] = 1
    return mask


def drawn(count=9):
    return torch.stack([noises((4, 6, 5), count, 3 + i) for i in range(2)], dim=1).double()


@pytest.mark.parametrize("start", ["noise", "picture"])
def test_nothing_inside_is_the_picture_and_all_inside_a_plain_run(start):
    x0, a = latent(2, 4, 6, 5), levels(10).a[8]
    assert torch.equal(painted(mask=torch.zeros(1, 1, 6, 5), start=start), x0)
    assert torch.equal(painted(strength=0.0, start=start), x0)
    top = drawn()[0] if start == "noise" else a**0.5 * x0 + (1 - a) ** 0.5 * drawn()[0]
    plain = replay(gaussian, Path([*[x0] * 8, top], 10, 0.0), 0.8)
    torch.testing.assert_close(painted(mask=torch.ones(1, 1, 6, 5), start=start), plain)


def test_outside_every_level_holds_the_picture_under_a_noise_of_its_own():
    eps, x0, t = Counting(), latent(2, 4, 6, 5), levels(10).t
    y = painted(eps)
    for i, (x, at, texts) in enumerate(eps.calls[1:], 1):
        j, a = 8 - i, float(ALPHA_BAR[t[8 - i]])
        around = a**0.5 * x0 + (1 - a) ** 0.5 * drawn()[i]
        assert at == t[j] and texts == [0.0, 0.8]
        torch.testing.assert_close(x[..., 2:], around[..., 2:], rtol=1e-5, atol=1e-6)
        assert not torch.isclose(x[..., :2], around[..., :2]).any()
    assert torch.equal(y[..., 2:], x0[..., 2:]) and eps.rows == 2 * 2 * 8
    assert (y[..., :2].mean() - 0.8) > 0  # guided beyond the text's mean


def test_a_thin_mask_shrinks_to_itself():
    eps, x0, t = Counting(), latent(2, 4, 6, 5), levels(10).t
    mask = torch.zeros(1, 1, 6, 5)
    mask[..., 0] = 1
    y, inside = painted(eps, mask=mask, grow=3), []
    for i, (x, _, _) in enumerate(eps.calls[1:], 1):
        a = float(ALPHA_BAR[t[8 - i]])
        outside = torch.isclose(x, a**0.5 * x0 + (1 - a) ** 0.5 * drawn()[i], rtol=1e-5, atol=1e-6)
        inside.append(int((~outside).any(dim=0).any(dim=0).any(dim=0).sum()))  # columns
    assert inside == sorted(inside, reverse=True) and inside[0] == 4 and inside[-1] == 1
    assert torch.equal(y[..., 1:], x0[..., 1:])


def test_what_was_inside_does_not_matter_unless_it_starts_from_the_picture():
    x0, other = latent(2, 4, 6, 5), latent(2, 4, 6, 5)
    other[..., :2] += 1.0
    assert torch.equal(painted(x0=x0), painted(x0=other))
    from_picture = [painted(x0=one, start="picture")[..., :2] for one in (x0, other)]
    assert (from_picture[1] - from_picture[0]).mean() > 0.01


def test_two_pictures_are_each_alone():
    together = painted()
    alone = painted(x0=latent(2, 4, 6, 5)[1:], seed=4)
    assert torch.equal(together[1], alone[0])


def test_on_a_picture(sd, picture):
    done = edited(sd, picture, "blended-latent-diffusion", target="a zebra", mask=box())
    assert done.evaluations == {"decode": 16} and done.verdict == "given" and done.paste_mask is not None
    outside = (done.latent_mask == 0).expand_as(done.x0)
    assert torch.equal(done.latent[outside], done.x0[outside]) and not torch.equal(done.latent, done.x0)


def test_a_decoder_is_fitted_to_one_picture_as_torch_would(sd, picture):
    """The same loss and Adam on a copy of the decoder, by torch; what was there before is not touched."""
    pixels = to_tensor(picture, (88, 72))
    x0, M = sd.encode(pixels), torch.zeros(1, 1, 9, 11)
    M[..., 3:7, 2:8] = 1
    before = {name: p.clone() for name, p in sd.vae.named_parameters()}
    ours = D.fitted(sd.vae, x0, pixels, M, 4)
    decoder, z = copy.deepcopy(sd.vae.decoder).requires_grad_(), sd.vae.post_quant_conv(x0 / 0.18215)
    first, inside = decoder(z, sdpa).detach(), F.interpolate(M, (72, 88))
    optimiser = torch.optim.Adam(decoder.parameters(), lr=1e-4)
    for _ in range(4):
        shown = decoder(z, sdpa)
        loss = ((shown - first) * inside).square().mean() + 100 * ((shown - pixels) * (1 - inside)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    torch.testing.assert_close(ours, decoder(z, sdpa).detach(), rtol=1e-4, atol=1e-5)
    assert (ours - first).abs().max() > 1e-3
    assert all(torch.equal(p, before[name]) and not p.requires_grad for name, p in sd.vae.named_parameters())
    assert torch.equal(D.fitted(sd.vae, x0, pixels, M, 0), first)


def test_the_fit_brings_the_outside_nearer_and_leaves_no_trace(sd, picture):
    given = {"target": "a zebra", "mask": box(), "paste": False}
    plain = edited(sd, picture, "blended-latent-diffusion", **given)
    done = edited(sd, picture, "blended-latent-diffusion", **given, fit_steps=12)
    again = edited(sd, picture, "blended-latent-diffusion", **given)
    assert torch.equal(done.latent, plain.latent) and again.image.tobytes() == plain.image.tobytes()
    far = np.asarray(picture, dtype=float)[50:], np.asarray(plain.image)[50:], np.asarray(done.image)[50:]
    assert ((far[2] - far[0]) ** 2).mean() < 0.98 * ((far[1] - far[0]) ** 2).mean()
    assert done.rows == plain.rows and "pixels" not in done.tensors


MUTATIONS = {
    "what is inside counts for nothing": ("decoder_fit:fitted", "inside.square().mean() + ", "",
        test_a_decoder_is_fitted_to_one_picture_as_torch_would),
    "the outside counts once": ("decoder_fit:fitted", "OUTSIDE *", "",
        test_a_decoder_is_fitted_to_one_picture_as_torch_would),
    "no correction of the beginning": ("decoder_fit:fitted", "/ (1 - 0.9**k)", "",
        test_a_decoder_is_fitted_to_one_picture_as_torch_would),
    "the last blend under noise": ("blended_latent:blended_latent", "if j > 1 else x0", "",
        test_nothing_inside_is_the_picture_and_all_inside_a_plain_run),
    "the level left": ("blended_latent:blended_latent", "vp_noised(x0, next(draw).to(x0), a[j - 1])",
        "vp_noised(x0, next(draw).to(x0), a[j])", test_outside_every_level_holds_the_picture_under_a_noise_of_its_own),
    "one noise": ("blended_latent:blended_latent", "vp_noised(x0, next(draw).to(x0), a[j - 1])",
        "vp_noised(x0, noise, a[j - 1])", test_outside_every_level_holds_the_picture_under_a_noise_of_its_own),
    "it stays grown": ("blended_latent:blended_latent", "round(grow * (j - 1) / max(K - 1, 1))", "grow",
        test_a_thin_mask_shrinks_to_itself),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, picture, monkeypatch):
    module = "D" if MUTATIONS[name][0].startswith("decoder_fit") else "B"
    turns_red(__name__, module, *MUTATIONS[name], monkeypatch, sd=sd, picture=picture)
