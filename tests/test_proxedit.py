"""ProxEdit between its limits: the picture, negative-prompt inversion, and what is held in between."""

import pytest
import torch
from proofs import TEXTS, edited, turns_red
from stubs import Counting, gaussian, latent

from minidiffedit.methods import proxedit as P
from minidiffedit.methods.inversions import negative_prompt
from minidiffedit.methods.replay import replay

FREE = {"inversion_guidance": 0.0, "reconstruction_guidance": 0.0}


def path(x0=None, steps=10):
    x0 = latent(2, 4, 6, 5) if x0 is None else x0
    return negative_prompt(gaussian, x0, 0.3, steps=steps)


def target():
    """Another mean in each cell, so that differences have an order."""
    return 0.3 + latent(1, 4, 6, 5, seed=2)


def test_nothing_held_and_nothing_dropped_is_plain_guidance():
    up = path()
    assert torch.equal(P.proxedit(gaussian, up, target(), quantile=0.0, **FREE), replay(gaussian, up, target()))
    for norm in ("l0", "l1"):
        ours = P.proxedit(gaussian, up, target(), norm=norm, **FREE)
        assert torch.equal(ours, replay(gaussian, up, target(), guidance="prox", norm=norm))


def test_all_dropped_is_the_reconstruction_and_all_held_the_picture():
    up = path()
    free = P.proxedit(gaussian, up, target(), quantile=1.0, **FREE)
    assert torch.equal(free, replay(gaussian, up, 0.3, guidance_scale=1.0)) and not torch.equal(free, up[0])
    assert torch.equal(P.proxedit(gaussian, up, target(), quantile=1.0), up[0])
    assert torch.equal(P.proxedit(gaussian, up, 0.3), up[0])  # equal texts


def test_what_is_dropped_is_held_and_the_rest_is_not():
    up, y = path(), P.proxedit(gaussian, path(), target())
    same = (y == up[0]).float().mean(dim=(1, 2, 3))
    assert same.tolist() == pytest.approx([0.4, 0.4], abs=0.01)
    few, grown = (P.proxedit(gaussian, up, target(), quantile=0.9, grow=n) == up[0] for n in (0, 1))
    assert (grown <= few).all() and few.float().mean() == pytest.approx(0.9) and 0.2 < grown.float().mean() < 0.7
    late = P.proxedit(gaussian, up, target(), guided_below=0)
    assert torch.equal(late, P.proxedit(gaussian, up, target(), **FREE))


def test_reconstruction_guidance_is_a_step_from_a_nearer_clean_latent():
    """By hand, one level: x0_hat moves towards x_0, the direction of the noise stays."""
    up = path(steps=1)
    a, a_to, x, rate = up.a[1], up.a[0], up[1], 0.3
    (e,) = gaussian(x, up.t[1], [0.3])
    x0_hat = (x - (1 - a) ** 0.5 * e) / a**0.5
    nearer = (1 - rate) * x0_hat + rate * up[0]
    options = {"quantile": 1.0, "inversion_guidance": 0.0, "reconstruction_guidance": rate}
    y = P.proxedit(gaussian, up, target(), **options)
    torch.testing.assert_close(y, a_to**0.5 * nearer + (1 - a_to) ** 0.5 * e)


def test_rows_and_texts():
    eps, up = Counting(), path()
    P.proxedit(eps, up, 0.8)
    assert eps.rows == 2 * 10 * 2 and all(texts == [0.3, 0.8] for _, _, texts in eps.calls)


def test_two_pictures_are_each_alone():
    together = P.proxedit(gaussian, path(), target(), grow=1, reconstruction_guidance=0.2)
    for i in range(2):
        one = path(latent(2, 4, 6, 5)[i : i + 1])
        alone = P.proxedit(gaussian, one, target(), grow=1, reconstruction_guidance=0.2)
        assert torch.equal(alone[0], together[i])


def test_on_a_picture(sd, picture):
    done = edited(sd, picture, "proxedit", **TEXTS)
    assert done.evaluations == {"encode": 10, "decode": 20}
    kept = edited(sd, picture, "proxedit", **TEXTS, quantile=1.0)
    assert torch.equal(kept.latent, kept.x0) and not torch.equal(done.latent, done.x0)


MUTATIONS = {
    "the level left is held": ("proxedit:proxedit", "torch.lerp(x, path[j - 1]", "torch.lerp(x, path[j]",
        test_all_dropped_is_the_reconstruction_and_all_held_the_picture),
    "what is edited is held": ("proxedit:proxedit", "1 - F.max_pool2d", "F.max_pool2d",
        test_what_is_dropped_is_held_and_the_rest_is_not),
    "the clean latent's scale": ("proxedit:proxedit", "math.sqrt(path.a[j - 1]) * reconstruction_guidance",
        "math.sqrt(path.a[j]) * reconstruction_guidance",
        test_reconstruction_guidance_is_a_step_from_a_nearer_clean_latent),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    turns_red(__name__, "P", *MUTATIONS[name], monkeypatch)
