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
    """It looks into both from the second of ten steps on."""
    path, text, before = path_of(sd, steps=10), sd.text(["a horse"]), sd.gradients
    x = path.rows(1)

    def memory(plain, site, q, k, v):
        if site.kind == "self" and site.place == "up" and j < 10:
            one, two = (torch.cat([y[:1].expand_as(y), y], dim=2) for y in (k, v))
            return torch.cat([plain(site, q[:1], k[:1], v[:1]), plain(site, q, one, two)[1:]])
        return plain(site, q, k, v)

    for j in path.down():
        rows = torch.cat([path[j], x, x])
        _, e_null, e = sd.eps(rows, path.t[j], [torch.cat([text, sd.text([""]), text])], tap=memory)[0].split(1)
        x = path.step(x, e_null + 4 * (e - e_null), j)
    torch.testing.assert_close(moved(sd, path, energy=0.0), x, rtol=1e-4, atol=1e-4)
    assert sd.gradients == before and (moved(sd, path) - x).abs().max() > 1e-3


def test_the_start_is_copied_onto_the_goal():
    x = latent(1, 4, 8, 8)
    expected = x.clone()
    expected[..., 4:7, 3:6] = x[..., 1:4, 1:4]
    assert torch.equal(D.copied(x, PLACES, 1), expected)
    edge = x.clone()
    edge[..., 7, 6:] = x[..., 1, 2:4]  # (6.9, 7.2) beyond which nothing is; nothing comes in from the other side
    edge[..., 6, 6:] = x[..., 0, 2:4]
    assert torch.equal(D.copied(x, [((0.5, 3.0), (6.9, 7.2))], 1), edge)
    assert torch.equal(D.copied(x, [((2.0, 2.0), (2.0, 2.0))], 1), x)


def test_the_start_shall_change_where_it_is_not_the_goal():
    one, other = latent(1, 5, 8, 8), latent(1, 5, 8, 8, seed=1)
    alike = (1 + F.cosine_similarity(one, other, dim=1)) / 2
    apart, near = [((2.5, 2.5), (5.5, 4.5))], [((2.5, 2.5), (2.5, 3.5))]
    assert float(D.left(one, other, apart, 1)) == pytest.approx(float(alike[0, 1:4, 1:4].mean()))
    assert float(D.left(one, other, near, 1)) == pytest.approx(float(alike[0, 1:4, 1].mean()))
    assert float(D.left(one, other, [((2.5, 2.5), (2.5, 2.5))], 1)) == 0


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
    """Read from one step under two energies: it moves the clean latent alone, and so by what it is times sqrt(to / a)
    sqrt(1 - a).
    """
    sd, x0 = double(tiny.UNET), latent(1, 4, 8, 8)
    path, text, mask = path_of(sd, x0, steps=1), sd.text(["a horse"]), torch.zeros(1, 1, 8, 8)
    mask[..., 1:7, 1:7] = 1
    options = {"mask": mask, "energy_steps": 1.0, "content": 2.0, "empty": 0.3}
    one, two = (moved(sd, path, energy=e, **options) for e in (10.0, 30.0))
    a, to = path.a[1], path.a[0]
    found, at = (one - two) / ((to / a) ** 0.5 * (1 - a) ** 0.5) / 20, path[1].clone()
    at[..., 4:7, 3:6] = path[1][..., 1:4, 1:4]

    def features(x):
        seen = []

        def look(site, h):
            if (site.place, site.kind) == ("up", "block") and site.level in (1, 2) and site.index == 2:
                seen.append(F.interpolate(h, (8, 8), mode="bilinear"))
            return h

        sd.eps(x, path.t[1], [text], feature=look)
        return seen

    theirs = features(path[1])

    def cosines(one, other):
        return (1 + F.cosine_similarity(one, other, dim=1)) / 2

    def edit(x):
        both = [*zip(features(x), theirs)]
        alike = [cosines(h[..., 4:7, 3:6], s[..., 1:4, 1:4]).mean() for h, s in both]
        stayed = [cosines(h[..., 1:4, 1:4], s[..., 1:4, 1:4]).mean() for h, s in both]
        return sum(1 / (1 + 4 * one) for one in alike) / 2 + 0.3 * sum(stayed) / 2  # levels

    def content(x):
        alike = [(cosines(s, h) * (1 - mask[:, 0])).sum() / (1 - mask).sum() for h, s in zip(features(x), theirs)]
        return 2 * sum(1 / (1 + 4 * one) for one in alike) / 2

    for part, where in ((edit, mask), (content, 1 - mask)):
        (gradient,) = torch.autograd.grad(part(y := at.clone().requires_grad_()), y)
        is_the_slope([gradient], [at], part, rel=1e-4)
        torch.testing.assert_close(found * where, gradient * where, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("energy", [0.5, 50.0])
def test_the_energy_is_lower_than_without(sd, energy, monkeypatch):
    """What each step asks for, once the latent has been copied; the last of the led ones."""
    values, path, plain = [], path_of(sd, steps=10), D.edited
    monkeypatch.setattr(D, "edited", lambda *given: values.append(plain(*given)) or values[-1])
    for e in (1e-9, energy):
        moved(sd, path, energy=e, content=0.0, empty=0.0)
    half = len(values) // 2
    assert half == 2 * 6 and sum(values[half:]) < sum(values[:half])


def test_on_a_picture(sd, picture):
    before = sd.gradients
    options = {"points": "30,30=>60,50", "source": "a horse", "steps": 5}
    done = edited(sd, picture, "dragon-diffusion", **options)
    assert done.evaluations == {"encode": 5, "decode": 15 + 3} and sd.gradients - before == 2 * 3
    masked = edited(sd, picture, "dragon-diffusion", mask=box(), **options)
    assert masked.verdict == "given" and not torch.equal(masked.latent, done.latent)


MUTATIONS = {
    "away from the goal": ("dragon_diffusion:dragon_diffusion", "x - math.sqrt", "x + math.sqrt",
        test_the_gradient_is_the_finite_difference),
    "in the direction back into noise, too": ("dragon_diffusion:dragon_diffusion", "math.sqrt(1 - path.a[j])",
        "(math.sqrt(1 - path.a[j]) - math.sqrt(path.a[j] / path.a[j - 1] * (1 - path.a[j - 1])))",
        test_the_gradient_is_the_finite_difference),
    "goal and start change places": ("dragon_diffusion:edited", "for start, goal in places",
        "for goal, start in places", test_the_energy_looks_from_start_to_goal),
    "both gradients everywhere": ("dragon_diffusion:dragon_diffusion", "M * moves + (1 - M) * stays", "moves + stays",
        test_the_gradient_is_the_finite_difference),
    "into the picture alone": ("dragon_diffusion:dragon_diffusion", "torch.cat([y[1:], y[[0, 0]]], dim=2)",
        "y[[0, 0]]", test_without_energy_it_walks_beside_the_source),
    "from the first step on": ("dragon_diffusion:dragon_diffusion", "i < first(ALONE, path.top)", "False",
        test_without_energy_it_walks_beside_the_source),
    "all of the start": ("dragon_diffusion:left", "rows[:, None] | columns", "rows[:, None] | ~columns",
        test_the_start_shall_change_where_it_is_not_the_goal),
    "what comes in from the other side": ("dragon_diffusion:copied",
        "squares(x, [goal], radius) * squares(x, [start], radius).roll(way, (2, 3))", "squares(x, [goal], radius)",
        test_the_start_is_copied_onto_the_goal),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, monkeypatch):
    turns_red(__name__, "D", *MUTATIONS[name], monkeypatch, sd=sd)
