"""SDE-DiffEdit: a Markov chain up, the same noises down, the picture outside the mask; with DDIM's path, DiffEdit."""

import pytest
import torch
from proofs import TEXTS, edited, turns_red
from stubs import ALPHA_BAR, Counting, gaussian, latent
from tiny import box

from minidiffedit import encode, levels, masked_decode, noises
from minidiffedit.diffedit import working
from minidiffedit.methods import sde_diffedit as S
from minidiffedit.methods.cycle_diffusion import cycle
from minidiffedit.methods.edit_friendly import edit_friendly
from minidiffedit.methods.inversions import ddim

ALL, NOTHING = torch.ones(1, 1, 6, 5), torch.zeros(1, 1, 6, 5)


def inverted(eps=gaussian, **options):
    return S.cycle_sde(eps, latent(2, 4, 6, 5), 0.0, 0.3, **{"steps": 10, "strength": 0.8} | options)


@pytest.mark.parametrize("g", [1.0, 7.5])
def test_equal_texts_return_the_picture_whatever_the_mask(g):
    up, x0 = inverted(guidance_scale=g), latent(2, 4, 6, 5)
    for mask in (ALL, NOTHING, 0.4 * ALL):
        y = S.decode(gaussian, mask, up, 0.3, guidance_scale=g)
        torch.testing.assert_close(y, x0, rtol=1e-10, atol=1e-10)
    assert (S.decode(gaussian, ALL, up, 0.8, guidance_scale=g) - x0).mean() > 0.1
    torch.testing.assert_close(S.decode(gaussian, NOTHING, up, 0.8, guidance_scale=g), x0)


def test_levels_are_a_markov_chain():
    up, x, t = inverted(seed=4), latent(2, 4, 6, 5), levels(10).t
    drawn = torch.stack([noises((4, 6, 5), 8, 4 + i) for i in range(2)], dim=1).double()
    for j in range(1, 9):
        kept = float(ALPHA_BAR[t[j]] / ALPHA_BAR[t[j - 1]])
        x = kept**0.5 * x + (1 - kept) ** 0.5 * drawn[j - 1]
        torch.testing.assert_close(up[j], x, rtol=1e-5, atol=1e-6)
    assert len(up) == 9 and up.eta == 1 and up.pinned


def test_outside_every_level_is_the_chains():
    eps, up = Counting(), inverted()
    mask = torch.zeros(1, 1, 6, 5)
    mask[..., :2] = 1
    y = S.decode(eps, mask, up, 0.8)
    for (x, t, texts), j in zip(eps.calls, up.down(), strict=True):
        assert torch.equal(x[..., 2:], up[j][..., 2:]) and t == up.t[j] and texts == [0.0, 0.8]
    assert torch.equal(y[..., 2:], up[0][..., 2:]) and (y - up[0])[..., :2].mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("invert", [S.cycle_sde, edit_friendly, cycle])
def test_outside_the_pictures_own_bits_come_back(invert, dtype):
    x0, mask = latent(2, 4, 9, 11, dtype=dtype), torch.zeros(1, 1, 9, 11)
    mask[..., :4] = 1
    for sampler in ("ddim", "dpmsolver++"):
        up = invert(gaussian, x0, 0.0, 0.3, steps=7, sampler=sampler)
        assert torch.equal(S.decode(gaussian, mask, up, 0.8)[..., 4:], working(x0)[..., 4:])
        assert torch.equal(up[0], working(x0)) and up[0].dtype != torch.float16


@pytest.mark.parametrize("g", [1.0, 7.5])
def test_along_a_path_without_noises_it_is_diffedits_decoding(g):
    x0, mask = latent(2, 4, 6, 5), torch.rand(1, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    up = ddim(gaussian, x0, 0.0, 0.3, steps=10, strength=0.8)
    theirs = masked_decode(gaussian, encode(gaussian, x0, 0.3, steps=10), mask, 0.8, 0.0, guidance_scale=g)
    torch.testing.assert_close(S.decode(gaussian, mask, up, 0.8, guidance_scale=g), theirs, rtol=1e-12, atol=1e-12)


def test_rows_and_texts():
    for g, rows, texts in ((1.0, 16, [0.3]), (7.5, 32, [0.0, 0.3])):
        eps, down = Counting(), Counting()
        up = inverted(eps, guidance_scale=g)
        S.decode(down, ALL, up, 0.3, guidance_scale=g)
        assert eps.rows == down.rows == rows and all(asked == texts for _, _, asked in [*eps.calls, *down.calls])


def test_on_a_picture(sd, picture):
    done = edited(sd, picture, "sde-diffedit", **TEXTS)
    assert done.evaluations == {"mask": 20, "encode": 14, "decode": 14} and done.heat is not None
    outside = (done.latent_mask == 0).expand_as(done.x0)
    assert torch.equal(done.latent[outside], done.x0[outside]) and 0 < outside.float().mean() < 1
    kept = edited(sd, picture, "sde-diffedit", source="a horse", target="a horse", mask=box())
    assert (kept.latent - kept.x0).abs().max() <= 1e-5 and kept.rows == 28
    assert edited(sd, picture, "edit-friendly+sde-diffedit", **TEXTS, mask=box()).rows > 0


MUTATIONS = {
    "noises of their own": ("sde_diffedit:cycle_sde", "math.sqrt(kept) * x[-1]", "math.sqrt(kept) * x[0]",
        test_levels_are_a_markov_chain),
    "the level left": ("sde_diffedit:decode", "(1 - m) * path[j - 1]", "(1 - m) * path[j]",
        test_outside_every_level_is_the_chains),
    "another guidance for the noises": ("sde_diffedit:cycle_sde", "scale=guidance_scale", "scale=1.0",
        test_equal_texts_return_the_picture_whatever_the_mask),
    "a step without its noise": ("sde_diffedit:decode", "step(y, e, j)",
        "Path([*path.values()], path.steps).step(y, e, j)", test_equal_texts_return_the_picture_whatever_the_mask),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    turns_red(__name__, "S", *MUTATIONS[name], monkeypatch)
