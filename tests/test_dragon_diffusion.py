"""DragonDiffusion: what is led where, without energy nothing, the gradient, that a step goes down it, rows."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from proofs import double, edited, is_the_slope, turns_red
from stubs import latent
from tiny import box

from minidiffedit.methods import dragon_diffusion as D
from minidiffedit.methods.inversions import ddim

PLACES = [((2.5, 2.5), (5.5, 4.5))]


def path_of(sd, x0=None, steps=4):
    x0 = latent(1, 4, 8, 8, dtype=torch.float32) if x0 is None else x0
    return ddim(sd.eps, x0, sd.text([""]), sd.text(["a horse"]), steps=steps)


def moved(sd, path, places=PLACES, mask=None, **options):
    return D.dragon_diffusion(sd.eps, path, places, sd.text(["a horse"]), mask, **{"square": 1} | options)


def test_without_energy_it_walks_beside_the_source(sd):
    path, text, before = path_of(sd), sd.text(["a horse"]), sd.gradients
    x = path.rows(1)

    def memory(plain, site, q, k, v):
        if site.kind == "self" and site.place == "up":
            k, v = k[:1].expand_as(k), v[:1].expand_as(v)
        return plain(site, q, k, v)

    for j in path.down():
        rows = torch.cat([path[j], x, x])
        _, e_null, e = sd.eps(rows, path.t[j], [torch.cat([text, sd.text([""]), text])], tap=memory)[0].split(1)
        x = path.step(x, e_null + 4 * (e - e_null), j)
    for options in ({"energy": 0.0}, {"energy_steps": 0.0}):
        torch.testing.assert_close(moved(sd, path, **options), x, rtol=1e-4, atol=1e-4)
    assert sd.gradients == before and (moved(sd, path) - x).abs().max() > 1e-3


def test_what_is_alike():
    one = latent(1, 5, 3, 3)
    assert float(D.unlike(one, 2 * one)) == pytest.approx(1 / 5) and float(D.unlike(one, -one)) == pytest.approx(1)
    half = torch.cat([one[..., :1], -one[..., 1:]], dim=3)
    weights = torch.tensor([1.0, 0.0, 0.0]).expand(1, 1, 3, 3)
    assert float(D.unlike(one, half, weights)) == pytest.approx(1 / 5)
    assert float(D.unlike(one, half)) == pytest.approx(1 / (1 + 4 / 3))


def test_the_energy_looks_from_start_to_goal():
    source = latent(1, 5, 8, 8)
    there = torch.randn(1, 5, 8, 8, dtype=torch.float64)
    there[..., 4:7, 3:6] = source[..., 1:4, 1:4]  # around (5.5, 4.5) what was around (2.5, 2.5)
    assert float(D.edited(there, source, PLACES, 1)) == pytest.approx(1 / 5)
    assert float(D.edited(source, source, PLACES, 1)) > 1 / 4
    cells = D.squares(source, [place for pair in PLACES for place in pair], 1)
    assert cells.sum() == 18 and cells[0, 0, 1, 1] == cells[0, 0, 6, 5] == 1


def test_the_gradient_is_the_finite_difference():
    """Read from one step, with and without energy; a step is linear in its prediction."""
    sd, x0 = double(tiny.UNET), latent(1, 4, 8, 8)
    path, text, mask = path_of(sd, x0, steps=1), sd.text(["a horse"]), torch.zeros(1, 1, 8, 8)
    mask[..., 1:7, 1:7] = 1
    one, two = (moved(sd, path, mask=mask, energy_steps=1.0, energy=e, content=2.0) for e in (0.0, 20.0))
    a, to = path.a[1], path.a[0]
    found = (two - one) / ((1 - to) ** 0.5 - (to / a) ** 0.5 * (1 - a) ** 0.5) / 20

    def features(x):
        seen = []

        def look(site, h):
            if (site.place, site.kind) == ("up", "block") and site.level in (1, 2) and site.index == 2:
                seen.append(F.interpolate(h, (8, 8), mode="bilinear"))
            return h

        def memory(plain, site, q, k, v):
            if site.kind == "self" and site.place == "up":
                k, v = k[:1].expand_as(k), v[:1].expand_as(v)
            return plain(site, q, k, v)

        rows = torch.cat([path[1], x, x])
        sd.eps(rows, path.t[1], [torch.cat([text, sd.text([""]), text])], tap=memory, feature=look)
        return [(h[:1], h[2:]) for h in seen]

    def cosines(one, other):
        return (1 + F.cosine_similarity(one, other, dim=1)) / 2

    def edit(x):
        alike = [cosines(h[..., 4:7, 3:6], s[..., 1:4, 1:4]).mean() for s, h in features(x)]
        return sum(1 / (1 + 4 * one) for one in alike) / 2  # levels

    def content(x):
        alike = [(cosines(s, h) * (1 - mask[:, 0])).sum() / (1 - mask).sum() for s, h in features(x)]
        return 2 * sum(1 / (1 + 4 * one) for one in alike) / 2

    for part, where in ((edit, mask), (content, 1 - mask)):
        (gradient,) = torch.autograd.grad(part(y := path[1].clone().requires_grad_()), y)
        is_the_slope([gradient], [path[1]], part, rel=1e-4)
        torch.testing.assert_close(found * where, gradient * where, rtol=1e-4, atol=1e-9)
        assert ((two - one) * where * gradient).sum() < 0  # the step goes down the energy


def test_on_a_picture(sd, picture):
    before = sd.gradients
    options = {"points": "30,30=>60,50", "source": "a horse", "steps": 5}
    done = edited(sd, picture, "dragon-diffusion", **options)
    assert done.evaluations == {"encode": 5, "decode": 15} and sd.gradients - before == 2 * 9
    masked = edited(sd, picture, "dragon-diffusion", mask=box(), **options)
    assert masked.verdict == "given" and not torch.equal(masked.latent, done.latent)


MUTATIONS = {
    "away from the goal": ("dragon_diffusion:dragon_diffusion", "e + energy", "e - energy",
        test_the_gradient_is_the_finite_difference),
    "goal and start change places": ("dragon_diffusion:edited", "for start, goal in places",
        "for goal, start in places", test_the_energy_looks_from_start_to_goal),
    "both gradients everywhere": ("dragon_diffusion:dragon_diffusion", "M * moves + (1 - M) * stays", "moves + stays",
        test_the_gradient_is_the_finite_difference),
    "the source does not look into itself": ("dragon_diffusion:dragon_diffusion", "y[[0, 0, 0]]", "y[[1, 0, 0]]",
        test_without_energy_it_walks_beside_the_source),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, monkeypatch):
    turns_red(__name__, "D", *MUTATIONS[name], monkeypatch, sd=sd)
