"""TI-Guided-Edit against whole maps on diffusers' UNet, and at its limits. `P` is exchanged by the mutants."""

import explicit
import pytest
import tiny
import torch
from explicit import error, maps, once
from mutants import mutant
from proofs import edited
from stubs import latent

from minidiffedit import run as R
from minidiffedit.diffedit import encode
from minidiffedit.methods import ti_guided as P
from minidiffedit.methods.inversions import ddim
from minidiffedit.methods.replay import replay

N = 10
SD = tiny.model()
X0, OTHER = (latent(1, 4, 8, 8, seed=seed, dtype=torch.float32) for seed in (0, 1))
SOURCE, TARGET = "a photo of an animal", "a photo of a zebra"
TEXT = {prompt: SD.text([prompt]) for prompt in ("", SOURCE, TARGET)}
MASK = torch.zeros(1, 1, 8, 8)
MASK[..., 2:6, 1:7] = 1
with torch.no_grad():
    PATH = ddim(SD.eps, X0, TEXT[""], TEXT[SOURCE], steps=N)
    LOOKS = encode(SD.eps, OTHER, TEXT[SOURCE], steps=N, strength=1.0)
NONE = {name: 0.0 for name in ("structure_steps", "feature_steps", "appearance_until", "adain_until", "blend_until")}


def made(over=PATH, reference=OTHER, **options):
    return P.ti_guided_edit(SD.eps, over, reference, SD.coarsest, TEXT[TARGET], TEXT[SOURCE], **options)


class Oracle:
    """Rows (reference, edit without, edit with its text, structure); each map built, products of maps among them."""

    def __init__(self, structure=5, feature=8, appearance=(1, 8), adain=(2, 6), blend=8, mask=None):
        self.structure, self.feature, self.appearance = structure, feature, appearance
        self.adain, self.blend, self.mask = adain, blend, mask
        self.net = explicit.peer(SD, self.hook)
        self.net.up_blocks[1].resnets[1].conv2.register_forward_hook(self.copied)

    def copied(self, module, given, out):
        return torch.cat([out[:2], out[3:], out[3:]]) if self.i < self.feature else out

    def contrast(self, A):
        return torch.clip((A - A.mean(-1, keepdim=True)) * 1.67 + A.mean(-1, keepdim=True), 0, 1)

    def hook(self, name, cross, q, k, v):
        out = maps(q, k) @ v
        if cross or not name.startswith("up_blocks") or name.startswith("up_blocks.1.attentions.0."):
            return out
        near = not name.startswith("up_blocks.1.") and self.appearance[0] <= self.i < self.appearance[1]
        scale = q.shape[-1] ** -0.5
        if self.i < self.structure and near:
            S = self.contrast(maps(q[3:], k[3:])) @ (q[2:3] @ k[:1].transpose(-1, -2) * scale)
            L = q[2:3] @ k[2:3].transpose(-1, -2) * scale
            S = S + torch.log2(L.exp().sum(-1, keepdim=True) / S.exp().sum(-1, keepdim=True))
            A = self.contrast(torch.softmax(torch.cat([S, L], dim=-1), dim=-1))
            out[2] = (A @ torch.cat([v[:1], v[2:3]], dim=2))[0]
        elif self.i < self.structure:
            out[2] = (maps(q[3:], k[3:]) @ v[2:3])[0]
        elif near:
            out[2] = (maps(q[2:3], k[:1]) @ v[:1])[0]
        return out

    @torch.no_grad()
    def run(self):
        steps, y = explicit.scheduler(N), PATH[N]
        text = torch.cat([TEXT[SOURCE], TEXT[""], TEXT[TARGET], TEXT[SOURCE]])
        for self.i, t in enumerate(steps.timesteps):
            j = N - self.i
            e = self.net(torch.cat([LOOKS[j], y, y, PATH[j]]), t, text).sample
            y = steps.step(e[1:2] + 5.0 * (e[2:3] - e[1:2]), t, y, eta=0.0).prev_sample
            if self.adain[0] <= self.i < self.adain[1]:
                like, own = LOOKS[j - 1].flatten(2), y.flatten(2)
                own = (own - own.mean(2, keepdim=True)) / (own.var(2, keepdim=True) + 1e-5).sqrt()
                y = (own * (like.var(2, keepdim=True) + 1e-5).sqrt() + like.mean(2, keepdim=True)).view_as(y)
            if self.mask is not None and self.i < self.blend:
                y = torch.where(self.mask > 0, y, PATH[j - 1])
        return y


CASES = {
    "as it is run": ({}, {}),
    "a mask": ({"mask": MASK}, {"mask": MASK}),
    "structure alone": ({"appearance_until": 0.0, "adain_until": 0.0}, {"appearance": (0, 0), "adain": (0, 0)}),
    "appearance alone": ({"structure_steps": 0.0, "feature_steps": 0.0}, {"structure": 0, "feature": 0}),
    "other shares": (
        {"structure_steps": 1.0, "feature_steps": 0.3, "appearance_after": 0.0, "adain_after": 0.5, "adain_until": 1.0,
         "mask": MASK, "blend_until": 1.0},
        {"structure": 10, "feature": 3, "appearance": (0, 8), "adain": (5, 10), "mask": MASK, "blend": 10}),
}  # fmt: skip


@once
def truth(case):
    return Oracle(**CASES[case][1]).run()


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_attention_with_whole_maps(case, monkeypatch):
    monkeypatch.setattr(P, "AT_ONCE", 1 << 10)  # 8 queries of 64 at a time
    found = made(**CASES[case][0])
    assert error(found, truth(case)) <= 1e-4
    assert error(found, replay(SD.eps, PATH, TEXT[TARGET], guidance_scale=5.0)) > 1e-3


def test_without_any_of_it_it_is_the_plain_run():
    plain = replay(SD.eps, PATH, TEXT[TARGET], guidance_scale=5.0)
    assert error(made(**NONE), plain) <= 1e-5 and error(made(**NONE | {"mask": MASK}), plain) <= 1e-5


def test_outside_the_mask_it_is_the_path():
    held = made(mask=MASK, blend_until=1.0)
    assert torch.equal(held[(MASK == 0).expand_as(held)], PATH[0][(MASK == 0).expand_as(held)])
    assert torch.equal(made(mask=torch.zeros_like(MASK), blend_until=1.0), PATH[0])


def test_pictures_in_a_batch_are_as_alone():
    pair = torch.cat([X0, latent(1, 4, 8, 8, seed=3, dtype=torch.float32)])
    paths = [ddim(SD.eps, one, TEXT[""], TEXT[SOURCE], steps=N) for one in (pair, pair[:1], pair[1:])]
    together, *alone = map(made, paths)
    assert error(together, torch.cat(alone)) <= 1e-4


def test_no_whole_map_is_built(monkeypatch):
    """Of 64 cells and 128 keys, 8 queries at a time; as it is, a 64 x 64 level's maps have 64 queries of 4,096."""
    largest, softmax = [], torch.softmax

    def noted(x, dim):
        largest.append(x.shape[-2] * x.shape[-1])
        return softmax(x, dim)

    monkeypatch.setattr(P, "AT_ONCE", 1 << 10)
    monkeypatch.setattr(torch, "softmax", noted)
    P.both(*(latent(1, 2, 64, 8, seed=i) for i in range(4)), latent(1, 2, 128, 8, seed=9))
    assert largest == [1 << 10] * 8


def test_by_name(picture):
    done = edited(SD, picture, "ti-guided-edit", source=SOURCE, target=TARGET, reference=picture)
    assert done.evaluations == {"encode": 10, "decode": 50} and done.mask is None
    masked = R.edit(SD, picture, "words+ti-guided-edit", source=SOURCE, target=TARGET, reference=picture, maps=2,
                    mask_words="animal", steps=N, seed=0)  # fmt: skip
    assert masked.evaluations == {"mask": 2, "encode": 10, "decode": 50} and masked.mask is not None


MUTATIONS = {
    "no logarithm of two": ("/ math.log(2)", ""),
    "the edit's mass left out": ("torch.cat([S + near, L], dim=-1)", "torch.cat([S, L], dim=-1)"),
    "another mean": ("(P - 0.5 / n) * CONTRAST + 0.5 / n", "(P - 1 / n) * CONTRAST + 1 / n"),
    "values change places": ("torch.cat([va, vo], dim=2)", "torch.cat([vo, va], dim=2)"),
    "the reference for structure": ("(_, qs, _, qo)", "(qs, _, _, qo)"),
    "the edit's queries": ("contrasted(qs, ks, qo, CONTRAST)", "qo"),
    "the unguided row too": ("torch.cat([h[:-b], h[b : 2 * b]])", "torch.cat([h[: 2 * b], *[h[b : 2 * b]] * 2])"),
    "the reference's feature": ("h[b : 2 * b]]", "h[:b]]"),
    "the level just left": ("adain(y, looks[j - 1])", "adain(y, looks[j])"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    monkeypatch.setitem(globals(), "P", mutant("methods.ti_guided", *MUTATIONS[name], monkeypatch))
    with pytest.raises((AssertionError, RuntimeError)):
        test_it_is_the_attention_with_whole_maps("as it is run", monkeypatch)
