"""What is computed again where gradients flow: the same bits, and less that is kept, counted at full size."""

import pytest
import torch
from stubs import latent
from torch.autograd.graph import saved_tensors_hooks

from minidiffedit.kernels import gradients
from minidiffedit.methods.descent import slopes
from minidiffedit.unet import UNet, UNetConfig

NEVER, LARGE = 10**9, gradients.LARGE


class Fused(torch.autograd.Function):
    """An attention that keeps what a fused kernel does: never a map. For the meta device, where nothing is computed."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, slope):
        return tuple(torch.empty_like(one) for one in ctx.saved_tensors[:3])


@pytest.mark.parametrize("learned", ["latent", "text", "weights"])
def test_gradients_are_the_same_bits(learned, sd, monkeypatch):
    x, text, made = latent(2, 4, 8, 8, dtype=torch.float32), sd.text(["a horse"]), []
    deltas = {name: 0.1 * latent(*shape, dtype=torch.float32) for name, shape in sd.projections.items()}

    def loss(*variables):
        given = {"latent": x, "text": text, "weights": deltas}
        given |= {learned: dict(zip(deltas, variables)) if learned == "weights" else variables[0]}
        (e,) = sd.eps(given["latent"], 481, [given["text"]], deltas=given["weights"])
        return e.square().mean()

    at = {"latent": [x], "text": [text], "weights": [*deltas.values()]}[learned]
    plain, calls = gradients.checkpoint, []
    monkeypatch.setattr(gradients, "checkpoint", lambda *args, **how: calls.append(args) or plain(*args, **how))
    for large in (NEVER, 0):
        monkeypatch.setattr(gradients, "LARGE", large)
        made.append(slopes(loss, at))
        assert bool(calls) == (large == 0)
    (one, before), (other, after) = made
    assert torch.equal(one, other) and all(torch.equal(a, b) for a, b in zip(before, after))
    assert all(g.abs().max() > 0 for g in after)


def test_without_a_gradient_nothing_is_computed_twice(sd, monkeypatch):
    monkeypatch.setattr(gradients, "LARGE", 0)
    monkeypatch.setattr(gradients, "checkpoint", None)
    sd.eps(latent(1, 4, 8, 8, dtype=torch.float32), 481, [sd.text([""])])
    with torch.no_grad():
        sd.eps(latent(1, 4, 8, 8, dtype=torch.float32).requires_grad_(), 481, [sd.text([""])])


def kept(large, monkeypatch):
    """Bytes, in float32, that SD v1 keeps of one row at 512 x 512 for the way back, beside its weights."""
    monkeypatch.setattr(gradients, "LARGE", large)
    with torch.device("meta"):
        unet, text = UNet(UNetConfig()).requires_grad_(False), torch.empty(1, 77, 768)
        x = torch.empty(1, 4, 64, 64, requires_grad=True)
    own, sizes = {p.untyped_storage()._cdata for p in unet.parameters()}, {}

    def keep(one):
        storage = one.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return one

    with saved_tensors_hooks(keep, lambda one: one):
        e = unet(x, 500, text, lambda site, q, k, v: Fused.apply(q, k, v))
    total = sum(sizes.values())
    torch.autograd.grad(e.sum(), x)  # the way back can be gone
    return total


@pytest.mark.skipif(torch.__version__ < (2, 4), reason="before 2.4 nothing is computed again on the meta device")
def test_less_is_kept(monkeypatch):
    without, with_it = kept(NEVER, monkeypatch), kept(LARGE, monkeypatch)
    print(f"{with_it / 2**30:.2f} GiB kept, {without / 2**30:.2f} without")
    assert with_it < 0.5 * without and round(without / 2**30, 2) == 1.44
