"""Disentanglement by a fixed schedule: its limits are plain walks, texts are mixed as asked."""

import torch
from proofs import edited, turns_red
from stubs import gaussian, latent

from minidiffedit.methods import disentanglement as D
from minidiffedit.methods.inversions import ddim
from minidiffedit.methods.replay import replay

SOURCE, TARGET = torch.tensor(0.3), torch.tensor(-0.4)


def walked(**options):
    path = ddim(gaussian, latent(2, 4, 6, 5), 0.1, SOURCE, steps=10)
    return D.disentanglement(gaussian, path, TARGET, SOURCE, **options), path


def test_its_limits():
    made, path = walked(source_steps=0.0)
    assert torch.equal(made, replay(gaussian, path, TARGET))
    made, path = walked(source_steps=1.0)
    assert torch.equal(made, replay(gaussian, path, SOURCE))
    made, path = walked(source_steps=0.0, late=1.0)
    torch.testing.assert_close(made, replay(gaussian, path, SOURCE))


def test_the_schedule():
    texts = []

    def eps(x, t, asked):
        texts.append(round(float(asked[1]), 5))
        return gaussian(x, t, asked)

    path = ddim(gaussian, latent(1, 4, 6, 5), 0.1, SOURCE, steps=10)
    D.disentanglement(eps, path, TARGET, SOURCE, source_steps=0.3, late=-0.1)
    assert texts == [0.3] * 3 + [round(-0.1 * 0.3 + 1.1 * -0.4, 5)] * 7


def test_on_a_picture(sd, picture):
    done = edited(sd, picture, "disentanglement", source="a horse", target="a zebra", steps=5)
    assert done.evaluations["decode"] == 6  # the path skips the top 36 %


def test_a_mutant(monkeypatch):
    turns_red(__name__, "D", "disentanglement:disentanglement", "late * source + (1 - late) * target",
              "late * target + (1 - late) * source", test_the_schedule, monkeypatch)  # fmt: skip
