"""What is kept of timesteps and texts between calls of the UNet changes no bit, and is made anew where it must be."""

import copy

import pytest
import tiny
import torch
from mutants import mutant
from stubs import latent

from minidiffedit import edit
from minidiffedit.kernels import once
from minidiffedit.kernels.once import Once

X, Y = (latent(1, 4, 8, 8, seed=seed, dtype=torch.float32) for seed in (0, 1))
TEXTS = [latent(1, 77, 24, seed=seed, dtype=torch.float32) for seed in range(4)]
READ = ["mid_block.resnets.0.time_emb_proj.weight", "time_embedding.linear_2.bias",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]  # fmt: skip


@pytest.fixture
def sd():
    return tiny.model(unet=tiny.SHALLOW)


def plain(sd, x, t, texts):
    """The UNet by itself, which keeps nothing."""
    text = torch.cat([text.expand(len(x), -1, -1) for text in texts]).to(sd.dtype)
    return sd.unet(x.to(sd.dtype), t, text)


def same(sd, x, t, texts):
    return torch.equal(torch.cat(sd.eps(x, t, texts)), plain(sd, x, t, texts))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_changes(sd, dtype):
    sd.unet.to(dtype)
    sd.dtype = dtype
    walk = [*range(1, 900, 300), *range(901, 0, -300)]
    for x in (X, Y, torch.cat([X, Y])):
        for t in walk:
            assert same(sd, x, t, TEXTS[:2]) and same(sd, x, t, TEXTS[:1])
        assert same(sd, x, 481, [TEXTS[2]] * 2) and same(sd, x, 481, TEXTS[1::-1])
    assert same(sd, torch.cat([X, Y]), 481, TEXTS[:1]) and same(sd, X, 481, TEXTS[:1])


@torch.no_grad()
def test_each_product_is_made_once(sd):
    made = []
    for name, layer in sd.unet.named_modules():
        if name.endswith(("time_embedding", "time_emb_proj", "attn2.to_k", "attn2.to_v")):
            layer.register_forward_hook(lambda layer, given, out, name=name: made.append(name))
    for t in (1, 301, 601, 301, 1):
        sd.eps(X, t, TEXTS[:2])
    of_text = [name for name in made if "attn2" in name]
    assert len(of_text) == len({*of_text}) and len(made) - len(of_text) == 3 * len({*made} - {*of_text})
    sd.text(["a horse"])  # another run
    sd.eps(X, 1, TEXTS[:2])
    assert made.count(of_text[0]) == 2


def moved(sd, name):
    """Its memory is another's, with other numbers."""
    sd.unet.get_parameter(name).data = sd.unet.get_parameter(name).data * 2


def cast(sd, name):
    """There and back: its memory may be where it was, its numbers are not what they were."""
    sd.unet.get_submodule(name.rpartition(".")[0]).to(torch.bfloat16).to(torch.float32)


def loaded(sd, name):
    sd.unet.load_state_dict({n: 2 * p if n == name else p for n, p in sd.unet.state_dict().items()})


def exchanged(sd, name):
    sd.unet = copy.deepcopy(sd.unet)
    sd.eps(X, 481, TEXTS[:2])
    sd.unet.get_parameter(name).mul_(2)


CHANGES = {
    "written to": lambda sd, name: sd.unet.get_parameter(name).mul_(2), "moved": moved, "cast": cast,
    "loaded": loaded, "another UNet": exchanged,
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_that_changed_is_noticed(sd, name, change):
    before = sd.eps(X, 481, TEXTS[:2])
    CHANGES[change](sd, name)
    after = sd.eps(X, 481, TEXTS[:2])
    assert torch.equal(torch.cat(after), plain(sd, X, 481, TEXTS[:2])) and not torch.equal(after[0], before[0])


@torch.no_grad()
def test_a_text_that_was_written_to_is_noticed(sd):
    text = TEXTS[0].clone()
    sd.eps(X, 481, [text])
    text += 1
    assert same(sd, X, 481, [text])


@torch.no_grad()
def test_texts_that_are_gone_are_not_taken_for_new_ones(sd):
    """A new tensor may have the address of an old one."""
    for seed in range(20):
        assert same(sd, X, 481, [latent(1, 77, 24, seed=seed, dtype=torch.float32)])


def test_gradients_flow_as_ever(sd):
    with torch.no_grad():
        sd.eps(X, 481, TEXTS[:1])
    text = TEXTS[0].clone().requires_grad_()
    for _ in range(2):
        (given,) = torch.autograd.grad(sd.eps(X, 481, [text])[0].sum(), text)
        (expected,) = torch.autograd.grad(plain(sd, X, 481, [text]).sum(), text)
        assert torch.equal(given, expected) and bool(given.any())


@torch.no_grad()
def test_weights_that_are_learned_come_in(sd):
    before, name = sd.eps(X, 481, TEXTS[:1])[0], READ[2]
    delta = {name: torch.ones_like(sd.unet.get_parameter(name))}
    assert not torch.equal(sd.eps(X, 481, TEXTS[:1], deltas=delta)[0], before)
    assert torch.equal(sd.eps(X, 481, TEXTS[:1])[0], before)


@torch.no_grad()
def test_a_tap_may_do_what_it_likes_with_keys(sd):
    before = sd.eps(X, 481, TEXTS[:1])[0]
    for _ in range(2):
        sd.eps(X, 481, TEXTS[:1], tap=lambda plain, site, q, k, v: plain(site, q, k.mul_(0), v.mul_(0)))
    assert torch.equal(sd.eps(X, 481, TEXTS[:1])[0], before)


def test_inference_mode(sd):
    with torch.inference_mode():
        text = sd.text(["a horse"])
        assert same(sd, X, 481, [text])
        text += 1
        assert same(sd, X, 481, [text])
    with torch.no_grad():
        assert same(sd, X, 481, [text])


@torch.no_grad()
def test_what_is_kept_is_bounded(sd):
    for t in range(150):
        sd.eps(X[..., :1, :1], t, [TEXTS[t % 4]])
    assert len(sd.once.of_times) == once.TIMES and [*sd.once.of_times][-1] == 149
    assert len(sd.once.texts) == 1 and len(sd.once.of_texts) == 2 * 4  # attentions that read a text


def test_an_edit_is_the_same_without(sd, monkeypatch):
    settings = {"target": "a zebra", "source": "a horse", "steps": 5, "maps": 2, "seed": 0}
    done = edit(sd, tiny.picture(), **settings)
    monkeypatch.setattr(Once, "keeper", lambda *_: once.anew)
    assert torch.equal(edit(sd, tiny.picture(), **settings).latent, done.latent)


NOTICED = test_a_weight_that_changed_is_noticed
MISTAKES = {
    "writes are not counted": ("or p._version != n for p", "for p", NOTICED, "written to"),
    "memory is no matter": ("p.data_ptr() != at or", "", NOTICED, "moved"),
    "any UNet": ("unet is not self.unet or", "", NOTICED, "another UNet"),
    "a text is its address": ("one is not held or one._version != n", "id(one) != id(held)",
                              test_a_text_that_was_written_to_is_noticed, None),
    "as many latents": ("and latents == self.latents", "", test_no_bit_changes, None),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_turns_a_test_red(name, sd, monkeypatch):
    old, new, test, change = MISTAKES[name]
    sd.once = mutant("kernels.once", old, new, monkeypatch).Once()
    args = [READ[2], change] if change else [torch.float32] if test is test_no_bit_changes else []
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        test(sd, *args)
