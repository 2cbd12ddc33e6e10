"""TIC-inversion: what it looks at is what the inversion itself had, and its limits. `P` is exchanged by the mutants."""

import pytest
import tiny
import torch
from explicit import error, maps, once, peer, scheduler
from mutants import mutant, run
from proofs import edited
from stubs import latent

from minidiffedit import run as R
from minidiffedit.methods import tic_inversion as P
from minidiffedit.methods.inversions import ddim_paper
from minidiffedit.methods.replay import replay
from minidiffedit.methods.words import words_of

N = 5
SD = tiny.model()
for layer_name, layer in SD.unet.named_modules():
    if layer_name.endswith("attn1"):
        layer.to_out[0].weight.data.mul_(20)  # so that self-attention weighs as much as the rest
X0 = latent(1, 4, 8, 32, dtype=torch.float32)
SOURCE, TARGET = "a horse on grass", "a zebra on sand"
TEXT = {prompt: SD.text([prompt]) for prompt in ("", SOURCE, TARGET)}


class Kept:
    """Keys and values of the decoder's self-attentions in each call of an inversion, by timestep and site."""

    def __init__(self):
        self.seen = {}

    def __call__(self, x, t, texts):
        def tap(plain, site, q, k, v):
            if site.kind == "self" and site.place == "up":
                self.seen[t, site.level, site.index] = k.clone(), v.clone()
            return plain(site, q, k, v)

        return SD.eps(x, t, texts, tap=tap)


KEPT = Kept()
with torch.no_grad():
    PATH = ddim_paper(KEPT, X0, TEXT[""], TEXT[SOURCE], steps=N)


def made(over=PATH, **options):
    words = [words_of(SD.tokenizer, one) for one in (SOURCE, TARGET)]
    return P.tic(SD.eps, over, TEXT[TARGET], TEXT[SOURCE], SD.coarsest, *words, **{"first_step": 1} | options)


@once
@torch.no_grad()
def by_kept(look="source", first_step=1, finest=2):
    """The edit's two rows alone, which look at keys and values that the inversion kept."""
    now = {}

    def hook(name, cross, q, k, v):
        level = 3 - int(name.split(".")[1]) if name.startswith("up") else None
        if not cross and level is not None and level < finest and now["step"] >= first_step:
            ks, vs = (one.expand(2, -1, -1, -1) for one in KEPT.seen[now["t"], level, int(name.split(".")[3])])
            k, v = (ks, vs) if look == "source" else (torch.cat([ks, k], dim=2), torch.cat([vs, v], dim=2))
        return maps(q, k) @ v

    net, ddim_of, y = peer(SD, hook), scheduler(N), PATH[N]
    text = torch.cat([TEXT[""], TEXT[TARGET]])
    for now["step"], now["t"] in enumerate(ddim_of.timesteps.tolist()):
        t = now["t"]
        e_null, e_text = net(torch.cat([y, y]), t, text).sample.chunk(2)
        y = ddim_of.step(e_null + 7.5 * (e_text - e_null), t, y, eta=0.0).prev_sample
    return y


@pytest.mark.parametrize("options", [{}, {"look": "union"}, {"first_step": 3, "finest": 3}])
def test_it_looks_at_what_the_inversion_had(options):
    """From the second step on: an inversion asks at every level but the topmost."""
    ours, theirs = made(**options), by_kept(**options)
    assert error(ours, theirs) <= 1e-4 and error(made(first_step=N), theirs) > 5e-4


def test_where_it_never_looks_it_is_the_plain_run():
    plain = replay(SD.eps, PATH, TEXT[TARGET])
    for never in ({"first_step": N}, {"finest": 0}, {"look": "own", "first_step": 0}):
        assert error(made(**never), plain) <= 1e-5


def test_parts_differ_from_the_whole_and_all_is_the_whole():
    parts = made(object_words="horse, zebra", object_threshold=0.5)
    assert error(parts, made()) > 1e-3
    assert error(made(object_words="horse, zebra", object_threshold=0.0), made()) <= 1e-5


def test_pictures_in_a_batch_are_as_alone():
    pair = torch.cat([X0, latent(1, 4, 8, 32, seed=3, dtype=torch.float32)])
    paths = [ddim_paper(SD.eps, one, TEXT[""], TEXT[SOURCE], steps=N) for one in (pair, pair[:1], pair[1:])]
    for options in ({}, {"object_words": "horse, zebra", "object_threshold": 0.5, "look": "union"}):
        together, *alone = (made(path, **options) for path in paths)
        assert error(together, torch.cat(alone)) <= 1e-4


def test_by_name(picture):
    done = edited(SD, picture, "tic-inversion", source=SOURCE, target=TARGET)
    assert done.evaluations == {"encode": 10, "decode": 30}
    assert edited(SD, picture, "tic-inversion", target=TARGET, look="union").rows == 40
    with pytest.raises(ValueError, match="object_words must name a word of the target, got 'horse'"):
        R.plan("tic-inversion", source=SOURCE, target=TARGET, object_words="horse")


LOOKS, PLAIN = test_it_looks_at_what_the_inversion_had, test_where_it_never_looks_it_is_the_plain_run
MUTATIONS = {
    "the level below": ("[path[j], y, y]", "[path[j - 1], y, y]", LOOKS),
    "the edit's keys": ("[one[:b]] * 3", "[one[-b:]] * 3", LOOKS),
    "keys alone": ("for one in (k, v)))", "for one in (k, k)))", LOOKS),
    "a step too late": ("if i >= first_step", "if i > first_step", LOOKS),
    "the encoder too": ('or site.place != "up"', "", LOOKS),
    "one half alone": ("for i in (1, 2)]", "for i in (2, 2)]", LOOKS),
    "the source is the result": ("return y", "return path[0]", PLAIN),
    "both halves under one text": ("path.null(j), target)", "target, target)", PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    old, new, test = MUTATIONS[name]
    monkeypatch.setitem(globals(), "P", mutant("methods.tic_inversion:tic", old, new, monkeypatch))
    with pytest.raises((AssertionError, RuntimeError)):
        run(test)
