"""Plug-and-play against hooks on diffusers' UNet, and at its limits. `P` is exchanged by the mutants at the end."""

import math

import explicit
import pytest
import tiny
import torch
from explicit import error, maps, once
from mutants import mutant
from stubs import latent

from minidiffedit import run as R
from minidiffedit.methods import inversions
from minidiffedit.methods import plug_and_play as P
from minidiffedit.methods.replay import replay
from minidiffedit.path import Path

N, X0 = 5, latent(1, 4, 8, 8, dtype=torch.float32)
SOURCE, TARGET = "a horse", "a zebra on grass"
SD = tiny.model()
TEXT = {prompt: SD.text([prompt]) for prompt in (SOURCE, TARGET, "", "blurry")}


@once
def path(inversion="ddim", source="", x0=X0):
    return getattr(inversions, inversion)(SD.eps, x0, TEXT[""], TEXT[source], steps=N)


def edited(over, target=TARGET, source="", negative="", **options):
    texts = TEXT[target], TEXT[source], TEXT[negative], TEXT[""]
    return P.plug_and_play(SD.eps, over, SD.coarsest, *texts, **options)


class Oracle:
    """The authors' three rows, with forward hooks and explicit maps."""

    def __init__(self, features=0.8, attention=0.5, alpha=None):
        self.features, self.attention, self.alpha = features * N, attention * N, alpha
        self.net = explicit.peer(SD, self.hook)
        # output_blocks 3, 4, 5 are up_blocks[1]: the second is output_block 4
        self.net.up_blocks[1].resnets[1].conv2.register_forward_hook(self.copied)

    def copied(self, module, given, out):
        return torch.cat([out[:1]] * 3) if self.i < self.features else out

    def hook(self, name, cross, q, k, v):
        decoder = name.startswith("up_blocks") and not name.startswith("up_blocks.1.attentions.0.")
        A = maps(q, k)
        return (torch.cat([A[:1]] * 3) if decoder and not cross and self.i < self.attention else A) @ v

    @torch.no_grad()
    def run(self, over, target, source="", negative="", scale=7.5):
        steps, x = explicit.scheduler(N), torch.cat([over[N], over[N]])
        for self.i, t in enumerate(steps.timesteps):
            x = torch.cat([over[N - self.i], x[1:]]) if over.pinned else x
            a = self.alpha(self.i) if self.alpha else 1.0
            text = torch.cat([TEXT[source], a * TEXT[""] + (1 - a) * TEXT[negative], TEXT[target]])
            e = self.net(torch.cat([x, x[1:]]), t, text).sample
            e = torch.cat([e[:1], e[1:2] + scale * (e[2:] - e[1:2])])
            x = steps.step(e, t, x, eta=0.0).prev_sample
        return x[1:]


# ---------------------------------------------------------------- against the authors' algorithm, in the open

CASES = {
    "as they run it": ({}, {}, {}),
    "a source text": ({"source": SOURCE}, {}, {}),
    "other shares": ({"feature_steps": 0.4, "attention_steps": 1.0}, {"features": 0.4, "attention": 1.0}, {}),
    "a negative text": ({"negative": "blurry"}, {"alpha": lambda i: 0.0}, {"negative": "blurry"}),
    "some of it": ({"negative": "blurry", "negative_alpha": 0.75}, {"alpha": lambda i: 0.75}, {"negative": "blurry"}),
    "linear": ({"negative": "blurry", "negative_alpha": 1.0, "negative_schedule": "linear"},
               {"alpha": lambda i: [1.0, 0.75, 0.5, 0.25, 0.0][i]}, {"negative": "blurry"}),
    "exponential": ({"negative": "blurry", "negative_alpha": 0.5, "negative_schedule": "exp"},
                    {"alpha": lambda i: 0.5 * math.exp(-1.5 * i)}, {"negative": "blurry"}),
}  # fmt: skip


@once
def truth(case, inversion):
    options, settings, texts = CASES[case]
    source = options.get("source", "")
    return Oracle(**settings).run(path(inversion, source), TARGET, source=source, **texts)


@pytest.mark.parametrize("case, inversion", [
    *((case, "ddim") for case in CASES), ("as they run it", "direct"), ("a source text", "direct"),
])  # fmt: skip
def test_it_is_the_injection_of_features(case, inversion):
    options = CASES[case][0]
    over = path(inversion, options.get("source", ""))
    found = edited(over, **options)
    assert error(found, truth(case, inversion)) <= 1e-4
    assert error(found, replay(SD.eps, over, TEXT[TARGET])) > 1e-2


# ---------------------------------------------------------------- limits


def test_without_injection_it_is_the_plain_run():
    found = edited(path(), feature_steps=0.0, attention_steps=0.0)
    assert error(found, replay(SD.eps, path(), TEXT[TARGET])) <= 1e-5


def test_the_same_text_unguided_is_the_sources_reconstruction():
    found = edited(
        path(source=SOURCE), target=SOURCE, source=SOURCE, guidance_scale=1.0, feature_steps=1.0, attention_steps=1.0
    )
    assert error(found, replay(SD.eps, path(source=SOURCE), TEXT[SOURCE], guidance_scale=1.0)) <= 1e-5


def test_null_texts_of_each_level_are_asked():
    over = path()
    nulls = {j: SD.text([f"null {j}"]) for j in over.down()}
    over = Path([*over.values()], N, TEXT[""], nulls=nulls)
    found = edited(over, feature_steps=0.0, attention_steps=0.0)
    assert error(found, replay(SD.eps, over, TEXT[TARGET])) <= 1e-5


def test_pictures_in_a_batch_are_as_alone():
    pair = torch.cat([X0, latent(1, 4, 8, 8, seed=3, dtype=torch.float32)])
    over = path(x0=pair)
    together = edited(over)
    for i in range(2):
        alone = Path([level[i : i + 1] for level in over.values()], N, TEXT[""])
        assert error(together[i : i + 1], edited(alone)) <= 1e-4


def test_by_name(picture):
    for method, rows in (("plug-and-play", (5, 15)), ("null-text+plug-and-play", None)):
        done = R.edit(SD, picture, method, source="", target=TARGET, steps=N, seed=0)
        assert rows is None or tuple(done.evaluations.values()) == rows
    negative = R.edit(SD, picture, "plug-and-play", target=TARGET, negative_prompt="blurry", steps=N, seed=0)
    assert negative.evaluations["decode"] == 15


# ---------------------------------------------------------------- mutants

MUTATIONS = {
    "values too": ("q, k = (torch.cat([y[:b]] * 3) for y in (q, k))", "q, k, v = (y[[0] * 3] for y in (q, k, v))"),
    "cross-attention too": ('site.kind == "self" and', ""),
    "the encoder too": ('and site.place == "up"', 'and site.place != "mid"'),
    "from output_block 3 on": ("and (site.level < coarsest or site.index > 0)", ""),
    "another block": ('Site("up", coarsest, 1, "conv")', 'Site("up", coarsest, 2, "conv")'),
    "after the residual": ('Site("up", coarsest, 1, "conv")', 'Site("up", coarsest, 1, "block")'),
    "a step longer": ("i < first(attention_steps, K)", "i <= first(attention_steps, K)"),
    "a guided source": ("torch.cat([e_source, guide(", "torch.cat([guide(e_null, e_source), guide("),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    monkeypatch.setitem(globals(), "P", mutant("methods.plug_and_play", *MUTATIONS[name], monkeypatch))
    with pytest.raises((AssertionError, RuntimeError)):
        test_it_is_the_injection_of_features("as they run it", "ddim")
