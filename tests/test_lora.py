"""LoRA by hand: zero at first, its gradient, its draws, its loss falls, its names are diffusers'."""

import math
from functools import partial

import proofs
import pytest
import tiny
import torch
from proofs import turns_red
from stubs import ALPHA_BAR, latent

from minidiffedit.methods import lora as L

FEW = {"lora_steps": 3, "rank": 2, "batch": 2, "seed": 3}


@pytest.fixture(scope="module")
def double():
    return proofs.double()


def fresh():
    return tiny.model(unet=tiny.QUICK)


def learned(sd, x0=None, **options):
    x0 = latent(1, 4, 8, 8, dtype=torch.float32) if x0 is None else x0
    return L.lora(sd.eps, x0, sd.projections, sd.text(["a horse"]), **FEW | options)


def test_nothing_has_changed_at_first(sd):
    made, x, text = learned(sd, lora_steps=0), latent(1, 4, 8, 8, dtype=torch.float32), sd.text(["a horse"])
    assert len(made) == 7 * 8 and all(name in sd.unet.state_dict() for name in made)
    assert {name.split(".")[-2] for name in made} == {"to_q", "to_k", "to_v", "0"}  # to_out.0
    assert torch.equal(L.adapted(sd.eps, made)(x, 481, [text])[0], sd.eps(x, 481, [text])[0])
    A = torch.cat([a.flatten() for a, _ in made.values()])
    assert abs(float(A.std()) * 2 - 1) < 0.05 and L.adapted(sd.eps, {}) == sd.eps


def test_what_is_added_is_the_product(sd):
    """As if the weights had been written into the network."""
    made, x, text = learned(sd), latent(2, 4, 8, 8, dtype=torch.float32), sd.text(["a horse"])
    found = L.adapted(sd.eps, made)(x, 481, [text])[0]
    other = fresh()
    for name, (a, b) in made.items():
        other.unet.get_parameter(name).data += b @ a
    torch.testing.assert_close(found, other.eps(x, 481, [text])[0], rtol=1e-5, atol=1e-6)
    assert (found - sd.eps(x, 481, [text])[0]).abs().max() > 1e-4
    assert torch.equal(fresh().eps(x, 481, [text])[0], sd.eps(x, 481, [text])[0])  # its own weights stay


def test_the_gradient_is_the_finite_difference(double, monkeypatch):
    sd, x0, given = double, latent(1, 4, 8, 8), []

    def step(self, at, gradients):
        given.append((at, gradients))
        return [one + 0.05 * latent(*one.shape, seed=i) for i, one in enumerate(at)]  # away from B = 0

    monkeypatch.setattr(L.Adam, "step", step)
    text, generator, before = sd.text(["a horse"]), torch.Generator().manual_seed(3), sd.gradients
    L.lora(sd.eps, x0, sd.projections, text, **FEW | {"lora_steps": 2})
    assert sd.gradients - before == 4
    [torch.randn((2, n), generator=generator) for _, n in sd.projections.values()]
    draws = [
        (int(torch.randint(0, 1000, (), generator=generator)), torch.randn(1, 4, 8, 8, generator=generator).double())
        for _ in range(4)
    ]

    def loss(weights):
        half = len(weights) // 2
        deltas = {name: b @ a for name, a, b in zip(sd.projections, weights[:half], weights[half:])}
        total = 0
        for t, n in draws[2:]:
            x = math.sqrt(ALPHA_BAR[t]) * x0 + math.sqrt(1 - ALPHA_BAR[t]) * n
            total += ((sd.eps(x, t, [text], deltas=deltas)[0] - n) ** 2).mean() / 2
        return float(total)

    at, gradients = given[1]
    with torch.no_grad():
        for seed in range(3):
            step = [1e-5 * latent(*one.shape, seed=100 * seed + i) for i, one in enumerate(at)]
            slope = (loss([a + s for a, s in zip(at, step)]) - loss([a - s for a, s in zip(at, step)])) / 2
            assert float(sum((g * s).sum() for g, s in zip(gradients, step))) == pytest.approx(slope, rel=1e-4)


def test_its_loss_falls(sd):
    """What is learned at some timesteps and noises holds for others."""
    x0, text, generator = (
        latent(1, 4, 8, 8, dtype=torch.float32),
        sd.text(["a horse"]),
        torch.Generator().manual_seed(9),
    )
    made, told = learned(sd, lora_steps=20, lora_rate=0.02), []
    draws = [L.drawn(x0, generator) for _ in range(16)]
    losses = [
        float(sum(L.denoising(eps, x0, text, *one) for one in draws)) for eps in (sd.eps, L.adapted(sd.eps, made))
    ]
    assert losses[1] < 0.8 * losses[0]
    learned(sd, told=lambda k, loss: told.append((k, loss)))
    assert [k for k, _ in told] == [1, 2, 3] and all(math.isfinite(loss) for _, loss in told)


def test_one_picture_one_seed(sd):
    one, other = learned(sd), learned(sd)
    assert all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name]))
    assert not torch.equal(next(iter(learned(sd, seed=4).values()))[0], next(iter(one.values()))[0])
    with pytest.raises(ValueError, match="one picture at a time, got 2"):
        learned(sd, latent(2, 4, 8, 8, dtype=torch.float32))


def test_names_are_diffusers(sd):
    """Each layer of the file is a layer of diffusers' UNet, A reads its inputs and B makes its outputs."""
    from diffusers import UNet2DConditionModel

    made, peer = L.state(learned(sd)), UNet2DConditionModel.from_config(tiny.unet_config(tiny.QUICK))
    layers = {name: module for name, module in peer.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, tensor in made.items():
        layer, which = name.removeprefix("unet.").rsplit(".lora_", 1)
        assert name.startswith("unet.") and which in ("A.weight", "B.weight")
        expected = (2, layers[layer].in_features) if which == "A.weight" else (layers[layer].out_features, 2)
        assert tuple(tensor.shape) == expected
    assert len(made) == 2 * len([layer for layer in layers if ".attn" in layer])


def test_weights_that_are_not_at_hand(sd):
    other = fresh()
    other.unet = partial(other.unet)  # as those that are compiled, or read again for each call
    with pytest.raises(ValueError, match="without compile and low_memory"):
        other.eps(latent(1, 4, 8, 8), 481, [sd.text([""])], deltas={"x": torch.zeros(1)})


MUTATIONS = {
    "B is not zero": ("lora:lora", "torch.zeros(m, rank)", "torch.ones(m, rank)", test_nothing_has_changed_at_first),
    "A and B change places": ("lora:deltas", "B @ A", "(A.T @ B.T).T.flip(0)", test_what_is_added_is_the_product),
    "one draw of the batch": ("lora:lora", "[one + g / batch for one, g in zip(found, gradients)]", "gradients",
        test_the_gradient_is_the_finite_difference),
    "no noise in the picture": ("lora:denoising", "math.sqrt(1 - a) * n", "0 * n",
        test_the_gradient_is_the_finite_difference),
    "B is never learned": ("lora:lora", "moved[: len(A)], moved[len(A) :]", "moved[: len(A)], B", test_its_loss_falls),
    "several pictures": ("lora:one_picture", "len(x0) != 1", "False", test_one_picture_one_seed),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, sd, double, monkeypatch):
    turns_red(__name__, "L", *MUTATIONS[name], monkeypatch, sd=sd, double=double)
