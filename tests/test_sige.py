"""SIGE on DiffEdit: equal where nothing is left out, else the UNet with the source put back at each layer; rows."""

from functools import partial

import pytest
import tiny
import torch
from conftest import MINI
from mutants import mutant, run
from proofs import edited
from stubs import latent
from tiny import box
from torch import nn

from minidiffedit import StableDiffusion, edit
from minidiffedit.attention import sdpa
from minidiffedit.cost import fused
from minidiffedit.diffedit import masked_decode
from minidiffedit.methods import around as A
from minidiffedit.methods import sige as S
from minidiffedit.methods.inversions import ddim_paper
from minidiffedit.unet import UNet, UNetConfig
from minidiffedit.views.witness import Witness

BOX, SIZE = (4, 8, 16, 20), (24, 28)  # of a UNet of three levels
INSIDE = (..., slice(4, 16), slice(8, 20))


def masked(*cells, size=SIZE):
    mask = torch.zeros(1, 1, *size)
    mask[..., cells[0] : cells[2], cells[1] : cells[3]] = 1
    return mask


def both(sd, mask, x0=None, margin=0, **options):
    """SIGE's latent, and the dense one that it stands for."""
    x0 = latent(1, 4, *SIZE, dtype=torch.float32) if x0 is None else x0
    null, target, few = sd.text([""]), sd.text(["a zebra"]), {"steps": 5, "strength": 0.8}
    path = ddim_paper(sd.eps, x0, null, encode_text="null", **few)
    dense = masked_decode(sd.eps, path, mask, target, null, guidance_scale=3.0, **options)
    found = S.sige(
        sd.eps, x0, mask, null, target, sd.coarsest, guidance_scale=3.0, margin=margin, **few | options
    )  # fmt: skip
    return found, dense, x0


def test_under_a_mask_of_all_it_is_the_dense_decoding(sd):
    found, dense, _ = both(sd, torch.ones(1, 1, *SIZE))
    assert torch.equal(found, dense)
    found, dense, _ = both(sd, 0.5 * masked(0, 0, 24, 28), margin=3)  # grey, and a margin beyond the edges
    assert torch.equal(found, dense)


def test_the_rectangle():
    assert S.rectangle(masked(5, 9, 12, 13), 0, 4) == (4, 8, 12, 16)
    assert S.rectangle(masked(5, 9, 12, 13), 2, 4) == (0, 4, 16, 16)
    assert S.rectangle(masked(19, 20, 20, 27, size=(22, 27)), 1, 8) == (16, 16, 22, 27)  # its edges are no multiples
    two = torch.cat([masked(5, 9, 6, 10), masked(20, 1, 21, 2)])
    assert S.rectangle(two, 0, 1) == (5, 1, 21, 10)


class PutBack:
    """The whole UNet, where each norm, convolution and self-attention finds the source's values outside the box."""

    def __init__(self, unet, size, box):
        self.unet, self.seen, self.put = unet, [], False
        self.boxes = {}
        for level in range(3):
            top, left, bottom, right = (-(-one // 2**level) for one in box)
            h, w = (-(-side // 2**level) for side in size)
            self.boxes[h, w] = cells = torch.zeros(h, w, dtype=torch.bool)
            cells[top:bottom, left:right] = True
        self.levels = [*self.boxes.values()]
        for module in unet.modules():
            if isinstance(module, nn.GroupNorm) or (isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)):
                module.register_forward_pre_hook(self.before)

    def same(self, now, inside):
        if not self.put:
            self.seen.append(now)
            return now
        return torch.where(inside, now, self.seen.pop(0).expand_as(now))

    def before(self, module, given):
        return (self.same(given[0], self.boxes[tuple(given[0].shape[2:])]),)

    def attend(self, site, q, k, v):
        if site.kind == "self":
            inside = self.levels[site.level].flatten()[:, None]
            k, v = self.same(k, inside), self.same(v, inside)
        return sdpa(site, q, k, v)

    def __call__(self, x, source, t, null, texts):
        first = self.unet(source, t, null, self.attend)
        self.put = True
        made = self.unet(x, t, texts, self.attend)
        return torch.where(next(iter(self.boxes.values())), made, first.expand_as(made))


def test_it_is_the_unet_with_the_source_put_back_at_each_layer():
    one, other = tiny.model(unet=tiny.QUICK), tiny.model(unet=tiny.QUICK)
    source, null = latent(1, 4, *SIZE, dtype=torch.float32), one.text([""])
    x, texts = source.clone(), one.text(["", "a zebra"])
    x[INSIDE] += latent(1, 4, 12, 12, seed=1, dtype=torch.float32)
    around, kept = A.Around(BOX, SIZE), []
    with around.keeping(kept):
        first = one.eps(source, 481, [null], tap=around.attend)[0]
    assert torch.equal(first, one.eps(source, 481, [null])[0])  # a first call is as any
    with around.reading(kept):
        found = torch.cat(one.eps(x, 481, [*texts.split(1)], tap=around.attend))
    assert next(around.known, None) is None  # all was read
    expected = PutBack(other.unet, SIZE, BOX)(x, source, 481, null, texts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - torch.cat(one.eps(x, 481, [*texts.split(1)]))).abs().max() > 1e-3  # it is no more than near
    with around.reading(kept):  # what is as it was gives what was
        torch.testing.assert_close(one.eps(source, 481, [null], tap=around.attend)[0], first, rtol=1e-4, atol=1e-5)


def test_it_comes_nearer_as_the_rectangle_grows():
    mini = StableDiffusion.load(str(MINI), device="cpu", dtype="float32")
    x0, mask = latent(1, 4, 16, 16, dtype=torch.float32), masked(7, 7, 9, 9, size=(16, 16))
    source, null, target = 0.7 * x0, mini.text([""]), mini.text(["a photo of a zebra on a grass field"])
    x, errors = source + mask * latent(1, 4, 16, 16, seed=1, dtype=torch.float32), []
    dense = mini.eps(x, 481, [target])[0]
    for margin in (0, 3, 4):  # boxes of 8 x 8, 16 x 16
        around, kept = A.Around(S.rectangle(mask, margin, 4), (16, 16)), []
        with around.keeping(kept):
            mini.eps(source, 481, [null], tap=around.attend)
        with around.reading(kept):
            errors.append(float(((mini.eps(x, 481, [target], tap=around.attend)[0] - dense) * mask).abs().sum()))
    assert errors[0] >= errors[1] >= errors[2] == 0 and errors[0] > 0


def test_what_is_kept_at_full_size():
    """Of SD v1 under a small mask and a large one; on the meta device nothing is computed."""
    with torch.device("meta"):
        unet, x, text = UNet(UNetConfig()), torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768)
    totals = []
    for cells, side in (((31, 31, 33, 33), 16), ((8, 8, 56, 56), 48)):
        around, kept = A.Around(S.rectangle(masked(*cells, size=(64, 64)), 0, 8), (64, 64)), []
        with torch.no_grad(), around.keeping(kept):
            unet(x, 500, text, partial(around.attend, fused))
        frames, keys = (sum(one.numel() for entry in kept if isinstance(entry, kind) for one in entry
                            if isinstance(one, torch.Tensor) and one.ndim == 4) for kind in (list, tuple))  # fmt: skip
        outside = [(64 // 2**level) ** 2 - (side // 2**level) ** 2 for level in range(4)]
        layers = zip((5, 5, 5, 1), outside, (320, 640, 1280, 1280))
        assert keys == 2 * sum(count * cells * width for count, cells, width in layers)
        totals.append(frames + keys)
    assert 0 < totals[1] < totals[0] < 24e6  # as the docstring says


def test_on_a_picture(sd, picture):
    done = edited(sd, picture, "sige", target="a zebra", source="a horse")
    assert done.evaluations == {"mask": 20, "decode": 9 + 16} and done.verdict == "found"
    masked = edited(sd, picture, "sige", target="a zebra", mask=box(), paste=False)
    assert masked.verdict == "given" and masked.latent_mask.mean() < 0.3
    assert torch.equal(masked.latent[masked.latent_mask.expand_as(masked.latent) == 0],
                       masked.x0[masked.latent_mask.expand_as(masked.latent) == 0])  # fmt: skip


def test_a_witness_may_look_on(sd, picture):
    seen = Witness()
    edit(sd, picture, "sige", target="a zebra", mask=box(), steps=5, seed=0, witness=seen)
    assert not [looks for looks in seen.looks if looks.stage == "decode" and looks.prompt == "a zebra"]


MUTATIONS = {
    "statistics of the box alone": ("around:Around.norm", "share = n / (n + m)", "share = 0.0"),
    "means are taken for one": ("around:Around.norm", "share * (1 - share) * (mean - here) ** 2", "0.0"),
    "keys of the box alone": ("around:Around.attend", "torch.cat([fan_out(far, len(near)), near], dim=2)", "near"),
    "the frame is on the other side": ("around:Around.convolution", "[left, x, right]", "[right, x, left]"),
    "the frame is empty": ("around:Around.framed", "F.pad(x, (1, 1, 1, 1))", "F.pad(0 * x, (1, 1, 1, 1))"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    monkeypatch.setitem(globals(), "A", mutant(*[f"methods.{MUTATIONS[name][0]}", *MUTATIONS[name][1:]], monkeypatch))
    with pytest.raises(AssertionError):
        run(test_it_is_the_unet_with_the_source_put_back_at_each_layer)
