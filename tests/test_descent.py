"""Slopes and Adam, against torch's own."""

import pytest
import torch
from proofs import turns_red
from stubs import latent

from minidiffedit.methods import descent as D


@pytest.mark.parametrize("rate, decay", [(0.03, 0.0), (0.3, 0.2)])
def test_it_is_torchs_adam(rate, decay):
    starts, goal = [latent(3, seed=1), latent(2, 3, seed=2)], latent(3, seed=3)
    variables = [torch.nn.Parameter(one.clone()) for one in starts]
    theirs, ours, at = torch.optim.AdamW(variables, lr=rate, weight_decay=decay), D.Adam(rate, decay), starts
    for _ in range(7):
        theirs.zero_grad()
        ((variables[0] ** 3 - goal) ** 2 + variables[1].sum(0) ** 2).mean().backward()
        theirs.step()
        value, found = D.slopes(lambda one, two: ((one**3 - goal) ** 2 + two.sum(0) ** 2).mean(), at)
        at = ours.step(at, found)
        torch.testing.assert_close(at, [one.data for one in variables], rtol=1e-6, atol=1e-7)
        assert not value.requires_grad and not any(one.requires_grad for one in at)
    assert torch.equal(starts[0], latent(3, seed=1))


def test_slopes_without_a_gradient_around():
    with torch.no_grad():
        value, (found,) = D.slopes(lambda x: (x**2).sum(), [torch.tensor([1.0, -2.0])])
    assert value == 5 and found.tolist() == [2.0, -4.0]


MUTATIONS = {
    "the other way": ("descent:Adam.step", "kept - self.rate", "kept + self.rate", test_it_is_torchs_adam),
    "no correction of the first steps": ("descent:Adam.step", "(mean / (1 - 0.9**self.k))", "mean",
        test_it_is_torchs_adam),
    "no root": ("descent:Adam.step", ").sqrt() + 1e-8", ") + 1e-8", test_it_is_torchs_adam),
    "no decay": ("descent:Adam.step", "self.rate * self.decay", "0", test_it_is_torchs_adam),
    "no gradient where none is wanted around": ("descent:slopes", "torch.enable_grad()",
        "torch.set_grad_enabled(torch.is_grad_enabled())", test_slopes_without_a_gradient_around),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    try:
        turns_red(__name__, "D", *MUTATIONS[name], monkeypatch)
    except RuntimeError as error:  # torch's, of a loss without a gradient
        assert "does not require grad" in str(error)
