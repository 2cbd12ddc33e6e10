"""TF-ICON against whole logits on diffusers' UNet, and at its limits. `P` is exchanged by the mutants at the end."""

import explicit
import numpy as np
import pytest
import tiny
import torch
from commands import failed, ran
from explicit import error, once
from mutants import mutant, run
from PIL import Image
from proofs import edited
from stubs import latent
from test_samplers import scheduler as second_order

from minidiffedit import run as R
from minidiffedit.diffedit import encode
from minidiffedit.files import images
from minidiffedit.methods import tf_icon as P

N = 5
SD = tiny.model()
for layer_name, layer in SD.unet.named_modules():
    if layer_name.endswith("attn1"):
        layer.to_out[0].weight.data.mul_(20)  # so that self-attention weighs as much as the rest
X0, PLACED = (latent(1, 4, 8, 16, seed=seed, dtype=torch.float32) for seed in (0, 1))
NULL, TARGET, ODD = (SD.text([prompt]) for prompt in ("", "a photo of a zebra", "an odd prompt"))
MASK, SHAPE = torch.zeros(2, 1, 1, 8, 16)
MASK[..., 1:7, 4:14] = 1
SHAPE[..., 2:6, 6:12] = 1


def made(x0=X0, placed=PLACED, mask=MASK, shape=SHAPE, **options):
    return P.tf_icon(SD.eps, x0, placed, mask, ODD, NULL, TARGET, shape, **{"steps": N, "seed": 4} | options)


class Oracle:
    """Rows (generation without, generation with its text, background, object); logits are built and written over."""

    def __init__(self, inject=2, hold=4, scale=5.0, steps=explicit.scheduler):
        self.inject, self.hold, self.scale, self.steps = inject, hold, scale, steps(N)
        self.net = explicit.peer(SD, self.hook)
        with torch.no_grad():
            self.back, self.other = (encode(SD.eps, one, ODD, steps=N, strength=1.0) for one in (X0, PLACED))

    def hook(self, name, cross, q, k, v):
        logits = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
        if not cross and self.i < self.inject:
            every = {128: 1, 32: 2, 8: 4, 2: 8}[q.shape[2]]
            object = SHAPE[0, 0, ::every, ::every].flatten() > 0
            between = (MASK[0, 0, ::every, ::every].flatten() > 0) & ~object
            mixed = torch.einsum("hnd,hmd->hnm", q[2], k[3]) / q.shape[-1] ** 0.5
            own = between[:, None] | between[None]
            for row in (0, 1):
                L = torch.where(object[:, None] ^ object[None], mixed, logits[2])
                L = torch.where(object[:, None] & object[None], logits[3], L)
                logits[row] = torch.where(own, logits[row], L)
        return torch.softmax(logits, dim=-1) @ v

    @torch.no_grad()
    def run(self):
        noise = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(4))
        steps = self.steps
        y = SHAPE * self.other[N] + (MASK - SHAPE) * noise + (1 - MASK) * self.back[N]
        text = torch.cat([NULL, TARGET, ODD, ODD])
        for self.i, t in enumerate(steps.timesteps):
            j = N - self.i
            e = self.net(torch.cat([y, y, self.back[j], self.other[j]]), t, text).sample
            y = steps.step(e[:1] + self.scale * (e[1:2] - e[:1]), t, y).prev_sample
            if self.i < self.hold:
                y = MASK * y + (1 - MASK) * self.back[j - 1]
        return y


@once
def truth(**settings):
    return Oracle(**settings).run()


@pytest.mark.parametrize("options, settings", [
    ({"sampler": "ddim"}, {}), ({}, {"steps": second_order}),
    ({"inject_steps": 1.0, "hold_steps": 0.4, "guidance_scale": 2.5, "sampler": "ddim"},
     {"inject": 5, "hold": 2, "scale": 2.5}),
])  # fmt: skip
def test_it_is_the_exchange_of_whole_logits(options, settings):
    assert error(made(**options), truth(**settings)) <= 1e-4
    assert error(made(**options | {"inject_steps": 0.0}), truth(**settings)) > 1e-3


def test_under_an_empty_mask_it_is_the_background():
    assert torch.equal(made(mask=torch.zeros_like(MASK), hold_steps=1.0), X0)
    held = made(hold_steps=1.0)
    assert torch.equal(held[..., :1, :], X0[..., :1, :]) and not torch.equal(held, X0)


def test_without_an_object_the_other_picture_is_not_seen():
    nowhere = made(shape=None)
    assert torch.equal(nowhere, made(shape=torch.zeros_like(SHAPE), placed=PLACED.flip(3)))
    assert error(nowhere, made()) > 1e-2
    assert torch.equal(made(shape=1 - MASK), nowhere)  # nor what lies outside the mask


def test_logits_are_composed_without_being_built():
    qs, ks = ([latent(2, 3, 10, 4, seed=3 * i + j) for j in range(3)] for i in (0, 1))
    v = latent(2, 3, 10, 4, seed=9)
    at = torch.arange(10)[None, None, :, None] % 3
    groups = tuple((at == i).expand(2, -1, -1, -1) for i in range(3))
    L = sum(q @ (k * group).transpose(-1, -2) for q, k, group in zip(qs, ks, groups)) / 4**0.5
    truth = torch.softmax(L, dim=-1) @ v
    site = P.Site("up", 0, 0, "self")
    assert error(P.composed(site, qs, ks, groups, v), truth) <= 1e-12


def test_pictures_in_a_batch_are_as_alone():
    pair = torch.cat([X0, latent(1, 4, 8, 16, seed=3, dtype=torch.float32)])
    together, alone = made(pair), torch.cat([made(pair[:1]), made(pair[1:], seed=5)])
    assert error(together, alone) <= 1e-4


def test_texts_of_several_chunks():
    """Attention sees no difference between a text and the same said twice, nor may the exceptional prompt make one."""
    null, target = (torch.cat([one] * 2, dim=1) for one in (NULL, TARGET))
    twice = P.tf_icon(SD.eps, X0, PLACED, MASK, ODD, null, target, SHAPE, steps=N, seed=4)
    assert error(twice, made()) < 1e-5


def test_the_exceptional_prompt():
    """One token at all positions, none of their embeddings: the peer's layers without them."""
    found, clip = SD.exceptional(), SD.clip
    rows = clip.embeddings.token_embedding.weight[[7788] * 77][None]
    assert torch.equal(found, clip.transform(rows)) and found.shape == (1, 77, 24)
    assert not torch.equal(found, clip(torch.full((1, 77), 7788)))
    assert torch.equal(SD.exceptional(5), clip.transform(clip.embeddings.token_embedding.weight[[5] * 77][None]))


def test_an_object_is_laid_into_the_box():
    picture, patch = Image.new("RGB", (80, 64), "blue"), Image.new("RGB", (20, 40), "red")
    shape = Image.new("L", (20, 40))
    shape.paste(255, (5, 10, 15, 30))  # 10 x 20
    laid, region = images.placed(picture, (16, 8, 48, 40), patch, shape)
    assert region.getbbox() == (24, 8, 40, 40)  # 16 x 32, as high as the box and in its middle
    inside = np.asarray(region) > 0
    assert (np.asarray(laid)[inside] == (255, 0, 0)).all() and (np.asarray(laid)[~inside] == (0, 0, 255)).all()
    assert images.placed(picture, (0, 0, 80, 64), patch)[1].getbbox() == (24, 0, 56, 64)
    for wrong in (Image.new("L", (20, 40)), Image.new("L", (21, 40), 255)):
        with pytest.raises(ValueError, match="reference_mask must be white somewhere and as large as the reference"):
            images.placed(picture, (0, 0, 80, 64), patch, wrong)


def test_by_name(picture, folder, tmp_path, capsys):
    done = edited(SD, picture, "tf-icon", target="a zebra", mask=tiny.box(), reference=picture)
    assert done.evaluations == {"decode": 20 + 4 * 4 + 6 * 2} and done.mask is not None
    shape = Image.new("L", picture.size)
    shape.paste(255, (40, 20, 60, 60))
    other = edited(SD, picture, "tf-icon", target="a zebra", mask=tiny.box(), reference=picture, reference_mask=shape)
    assert other.rows == done.rows and not torch.equal(other.latent, done.latent)
    nothing = R.edit(SD, picture, "tf-icon", target="a", mask=np.zeros((75, 93)), reference=picture, steps=2, seed=0)
    assert nothing.rows == 0 and nothing.image.tobytes() == picture.tobytes()
    for name, one in {"in": picture, "mask": tiny.box(), "shape": shape}.items():
        one.save(tmp_path / f"{name}.png")
    told = ["edit", tmp_path / "in.png", "--model", folder, "--method", "tf-icon", "--target", "a zebra", "--steps", 5]
    told += ["--mask", tmp_path / "mask.png", "--reference", tmp_path / "in.png", "-o", tmp_path / "out.png"]
    assert ran(capsys, *told, "--reference-mask", tmp_path / "shape.png")["rows"] == {"predicted": 24, "paid": 24}
    tiny.box().crop((0, 0, 9, 9)).save(tmp_path / "small.png")
    line = failed(capsys, *told, "--reference-mask", tmp_path / "small.png")
    assert "reference_mask must be white somewhere and as large as the reference" in line


WHOLE = test_it_is_the_exchange_of_whole_logits
MUTATIONS = {
    "the object's queries between the two": ("(qo, qb, qg), (ko, ko, kg)", "(qo, qo, qg), (ko, ko, kg)", WHOLE),
    "the background's keys for the object": ("(qb, qb, qg), (ko, kb, kg)", "(qb, qb, qg), (kb, kb, kg)", WHOLE),
    "noise as background": ("groups = object, ~object & ~between, between", "groups = object, ~object, between", WHOLE),
    "another scale": ("* math.sqrt(len(qs))", "", test_logits_are_composed_without_being_built),
    "the object outside the mask": ("S = S & M", "pass", test_without_an_object_the_other_picture_is_not_seen),
    "a step too long": ("if i < first(hold_steps, steps)", "if i <= first(hold_steps, steps)", WHOLE),
    "the level just left": ("back[j - 1])", "back[j])", WHOLE),
    "noise from the background": ("torch.where(M, noise, back[steps])", "back[steps]", WHOLE),
    "text attention too": ('if site.kind != "self":', 'if site.kind == "conv":', WHOLE),
    "other cells": (":: 2**level, :: 2**level", ": mask.shape[2] // 2**level, : mask.shape[3] // 2**level", WHOLE),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    old, new, test = MUTATIONS[name]
    monkeypatch.setitem(globals(), "P", mutant("methods.tf_icon", old, new, monkeypatch))
    with pytest.raises((AssertionError, RuntimeError)):
        run(test)
