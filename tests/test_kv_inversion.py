"""KV inversion (our reading): its limits, what is learned, its loss falls, rows."""

import pytest
import torch
from proofs import checked_slopes, double, edited, turns_red
from stubs import latent

from minidiffedit.methods import kv_inversion as K
from minidiffedit.methods.inversions import ddim
from minidiffedit.methods.replay import replay

X0 = latent(1, 4, 8, 8, dtype=torch.float32)


def moved(sd, x0=X0, **options):
    texts = [sd.text([prompt]) for prompt in ("", "a zebra", "a horse")]
    return K.kv_inversion(sd.eps, x0, *texts, **{"steps": 3, "inner_steps": 0, "first_step": 0} | options)


def test_without_keys_and_values_it_is_the_plain_walk(sd):
    null, target, source = (sd.text([prompt]) for prompt in ("", "a zebra", "a horse"))
    plain = replay(sd.eps, ddim(sd.eps, X0, null, source, steps=3), target)
    for options in ({"first_step": 999}, {"finest": 0}):
        torch.testing.assert_close(moved(sd, **options), plain, rtol=1e-4, atol=1e-4)
    assert (moved(sd) - plain).abs().max() > 1e-3


def test_not_learned_they_are_those_of_a_row_beside(sd):
    """MasaCtrl's: the source's own walk down beside the edit."""
    null, target, source = (sd.text([prompt]) for prompt in ("", "a zebra", "a horse"))
    path = ddim(sd.eps, X0, null, source, steps=3)

    def mutual(plain, site, q, k, v):
        if site.kind == "self" and site.place == "up" and site.level < 2:
            k, v = k[[0, 0, 0]], v[[0, 0, 0]]
        return plain(site, q, k, v)

    x, y = path.rows(1), path.rows(1)
    for j in path.down():
        e = sd.eps(torch.cat([x, y, y]), path.t[j], [torch.cat([source, null, target])], tap=mutual)[0]
        x, y = path.step(x, e[:1], j), path.step(y, e[1:2] + 7.5 * (e[2:] - e[1:2]), j)
    torch.testing.assert_close(moved(sd), y, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_the_finite_difference(monkeypatch):
    sd = double()
    values = checked_slopes(K, monkeypatch)
    with torch.no_grad():
        moved(sd, latent(1, 4, 4, 4), steps=2, inner_steps=1)
        path = ddim(sd.eps, latent(1, 4, 4, 4), None, sd.text(["a horse"]), steps=2)
        y = path.step(path[2], sd.eps(path[2], path.t[2], [sd.text(["a horse"])])[0], 2)
    assert len(values) == 2 and values[0] == pytest.approx(float(((y - path[1]) ** 2).mean()))


def test_its_loss_falls(sd, monkeypatch):
    values, plain = [], K.slopes

    def slopes(loss, at):
        value, gradients = plain(loss, at)
        values.append(float(value))
        return value, gradients

    monkeypatch.setattr(K, "slopes", slopes)
    moved(sd, inner_steps=20, rate=0.01)
    assert len(values) == 60 and values[:20] == sorted(values[:20], reverse=True) and values[19] < 0.97 * values[0]


def test_on_a_picture(sd, picture):
    done = edited(sd, picture, "kv-inversion", target="a zebra", source="a horse", steps=4, inner_steps=2)
    assert done.evaluations == {"decode": 4 + 4 * (1 + 2 + 1) + 2 * 4}


MUTATIONS = {
    "keys for values": ("kv_inversion:kv_inversion", "(k.clone(), v.clone())", "(v.clone(), k.clone())",
        test_not_learned_they_are_those_of_a_row_beside),
    "the level left as the goal": ("kv_inversion:kv_inversion", "path[j - 1]), flat)", "path[j]), flat)",
        test_the_gradient_is_the_finite_difference),
    "the encoder's too": ("kv_inversion:kv_inversion", 'site.place == "up" and', "",
        test_not_learned_they_are_those_of_a_row_beside),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, monkeypatch):
    turns_red(__name__, "K", *MUTATIONS[name], monkeypatch, sd=sd)
