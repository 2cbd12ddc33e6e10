"""CDS: without its loss it is DDS, the loss by hand, its gradient, the structure it keeps, rows by name."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from proofs import double, edited, is_the_slope, turns_red
from stubs import ALPHA_BAR, latent

from minidiffedit.methods import cds as C
from minidiffedit.methods.dds import RATE, dds

FEW = {"iterations": 3, "seed": 3}


def texts(sd):
    return [sd.text([prompt]) for prompt in ("", "a zebra", "a horse")]


def test_without_its_loss_it_is_dds(sd):
    x0 = latent(2, 4, 8, 8, dtype=torch.float32)
    plain, before = dds(sd.eps, x0, *texts(sd), **FEW), sd.gradients
    assert torch.equal(C.cds(sd.eps, x0, *texts(sd), contrast=0.0, **FEW), plain) and sd.gradients == before
    with_it = C.cds(sd.eps, x0, *texts(sd), **FEW)
    assert sd.gradients - before == 3 * 2 * 2 and (with_it - plain).abs().max() > 1e-4


def by_hand(ours, theirs):
    """Over all positions, place by place."""
    total = 0
    for one, other in zip(ours, theirs):
        for pool in (1, 2):
            a, b = (F.avg_pool2d(y, pool, ceil_mode=True)[0].flatten(1) for y in (one, other))
            for i in range(a.shape[1]):
                cosines = torch.stack([F.cosine_similarity(a[:, i], b[:, j], dim=0) for j in range(b.shape[1])])
                total += (torch.logsumexp(cosines / 0.07, 0) - cosines[i] / 0.07) / a.shape[1]
    return total


def test_the_loss_by_hand():
    ours, theirs = ([latent(1, 5, 4, 3, seed=s), latent(1, 6, 2, 2, seed=s + 1)] for s in (1, 5))
    generator = torch.Generator().manual_seed(0)
    torch.testing.assert_close(C.contrasted(ours, theirs, 256, generator), by_hand(ours, theirs))
    few = [float(C.contrasted(ours, theirs, 3, generator)) for _ in range(2)]
    assert few[0] != few[1]  # other places
    same = C.contrasted(theirs, theirs, 256, generator)
    for seed in range(4):  # least where the features are the picture's
        other = [one + 0.3 * latent(*one.shape, seed=20 + seed) for one in theirs]
        assert C.contrasted(other, theirs, 256, generator) > same


@pytest.fixture(scope="module")
def sd64():
    return double(tiny.UNET)


def test_the_gradient_is_the_finite_difference(sd64):
    """Read from one update, against the loss written with the features themselves."""
    sd, x0, z0 = sd64, latent(1, 4, 4, 4), latent(1, 4, 4, 4)
    null, target, source = texts(sd)
    plain, pulled = (C.cds(sd.eps, x0, null, target, source, iterations=1, seed=3, contrast=c) for c in (0.0, 3.0))
    gradient = (plain - pulled) / (RATE * 3 * 4096 / 2000)
    generator = torch.Generator().manual_seed(3)
    t, n = int(torch.randint(50, 949, (), generator=generator)), torch.randn(1, 4, 4, 4, generator=generator).double()

    def features(z, text):
        found = []

        def look(site, h):
            if site.place == "up" and site.kind == "self":
                side = -(-4 // 2**site.level)
                found.append(h[1:].transpose(1, 2).reshape(1, -1, side, side))
            return h

        sd.eps(ALPHA_BAR[t] ** 0.5 * z + (1 - ALPHA_BAR[t]) ** 0.5 * n, t, [null, text], feature=look)
        return found

    wanted = features(z0, source)
    assert len(wanted) == 9
    is_the_slope([gradient], [x0], lambda z: by_hand(features(z, target), wanted), rel=1e-4)


def test_its_loss_is_lower_than_without(sd):
    """At the end, read at one timestep and noise for both."""
    x0, (null, target, source) = latent(1, 4, 8, 8, dtype=torch.float32), texts(sd)
    n, a = latent(1, 4, 8, 8, seed=9, dtype=torch.float32), float(ALPHA_BAR[401])

    def features(z, text):
        seen = C.Outputs((8, 8))
        with torch.no_grad():
            sd.eps(a**0.5 * z + (1 - a) ** 0.5 * n, 401, [null, text], feature=seen)
        return seen.maps

    losses = []
    for contrast in (0.0, 3.0):
        z = C.cds(sd.eps, x0, null, target, source, iterations=25, seed=3, contrast=contrast)
        losses.append(float(by_hand(features(z, target), features(x0, source))))
    assert losses[1] < losses[0]


def test_pictures_in_a_batch_are_as_alone(sd):
    x0 = latent(2, 4, 8, 8, dtype=torch.float32)
    together = C.cds(sd.eps, x0, *texts(sd), **FEW)
    assert torch.equal(C.cds(sd.eps, x0[1:], *texts(sd), **FEW | {"seed": 4}), together[1:])


def test_on_a_picture(sd, picture):
    before = sd.gradients
    done = edited(sd, picture, "cds", target="a zebra", source="a horse", iterations=3)
    assert done.evaluations == {"decode": 12} and sd.gradients - before == 2 * 6


MUTATIONS = {
    "the source's features follow": ("cds:contrasted", "(one, other.detach())", "(one, one.detach())",
        test_the_loss_by_hand),
    "the unguided row's": ("cds:Outputs.__call__", "h[-1:]", "h[:1]", test_the_gradient_is_the_finite_difference),
    "not pooled": ("cds:contrasted", "(1, 2)", "(1, 1)", test_the_loss_by_hand),
    "the other way": ("cds:cds", "difference + contrast", "difference - contrast",
        test_the_gradient_is_the_finite_difference),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, sd64, monkeypatch):
    turns_red(__name__, "C", *MUTATIONS[name], monkeypatch, sd=sd, sd64=sd64)
