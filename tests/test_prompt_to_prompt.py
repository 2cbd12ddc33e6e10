"""Prompt-to-prompt against maps that are built, on diffusers' UNet, and at its limits.

`P` is exchanged by the mutants at the end.
"""

import inspect

import explicit
import pytest
import tiny
import torch
from explicit import error, maps, once
from mutants import mutant
from stubs import latent

from minidiffedit import StableDiffusion
from minidiffedit import run as R
from minidiffedit.methods import inversions
from minidiffedit.methods import prompt_to_prompt as P
from minidiffedit.methods.replay import replay
from minidiffedit.methods.words import words_of
from minidiffedit.path import Path

N, X0 = 5, latent(1, 4, 8, 32, dtype=torch.float32)
SOURCE, TARGET = "a photo of a horse on grass", "a photo of a striped zebra on grass"
SAME_LENGTH = "a photo of a zebra on sand"
SD = tiny.model()  # level 2, here of 2 x 8 cells, is the coarsest with text
PATHS = {}


def path(inversion="ddim", x0=X0, steps=N, source=SOURCE):
    key = inversion, id(x0), steps, source
    if key not in PATHS:
        made = getattr(inversions, inversion)(SD.eps, x0, SD.text([""]), SD.text([source]), steps=steps)
        PATHS[key] = made
    return PATHS[key]


def edited(over, source=SOURCE, target=TARGET, **options):
    texts, words = (SD.text([source]), SD.text([target])), [words_of(SD.tokenizer, one) for one in (source, target)]
    return P.prompt_to_prompt(SD.eps, over, *texts, *words, SD.coarsest, **options)


def plain(over, target=TARGET, **options):
    return replay(SD.eps, over, SD.text([target]), **options)


# ---------------------------------------------------------------- against maps that are built

# What corresponds, read off the prompts by hand; position 0 begins, `end` tokens are at 8 and 9.
REFINE = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 7: 6, 8: 7, **{j: j - 1 for j in range(9, 77)}}  # 5, 6: striped zebra
REPLACE = {j: j for j in range(77)}


class Oracle:
    """The authors' algorithm with all maps in hand: four rows, (source, target) without and with text."""

    def __init__(
        self, correspondence, cross=0.8, own=0.4, levels=1, until=(), weights=(), blend=None, threshold=0.3, sd=SD
    ):
        self.sd, self.W = sd, torch.zeros(77, 77, dtype=sd.dtype)
        for j, i in correspondence.items():
            self.W[i, j] = 1
        self.alpha = self.W.sum(0)
        self.cross = torch.full((77,), float(cross * N))
        self.c = torch.ones(77, dtype=sd.dtype)
        for at, share in until:
            self.cross[at] = share * N
        for at, factor in weights:
            self.c[at] = factor
        self.own, self.levels, self.blend, self.threshold = own, levels, blend, threshold
        self.net, self.stored = explicit.peer(sd, self.hook).to(sd.dtype), 0

    def hook(self, name, cross, q, k, v):
        A, n = maps(q, k), q.shape[2]
        if cross:
            edit = (A[2] @ self.W) * self.alpha + A[3] * (1 - self.alpha)
            early = (self.i < self.cross).to(q)
            A[3] = edit * self.c * early + A[3] * (1 - early)
            if n == 16:
                self.stored = self.stored + A[2:].mean(1)
        elif n <= 4 * 4**self.levels and self.i < self.own * N:
            A[3] = A[2]
        return A @ v

    def mask(self):
        found = []
        for row, at in zip(self.stored, self.blend):
            m = torch.nn.functional.max_pool2d(row[:, at].sum(-1).view(1, 1, 2, 8), 3, 1, padding=1)
            m = torch.nn.functional.interpolate(m, (8, 32))
            found.append(m / m.max() > self.threshold if len(at) else torch.zeros(1, 1, 8, 32) > 1)
        return (found[0] | found[1]).float()

    @torch.no_grad()
    def run(self, over, source, target, scale=7.5):
        steps, x = explicit.scheduler(N), torch.cat([over[N], over[N]])
        text = self.sd.text(["", "", source, target])
        for self.i, t in enumerate(steps.timesteps):
            x = torch.cat([over[N - self.i], x[1:]]) if over.pinned else x
            e = self.net(torch.cat([x, x]), t, text).sample
            x = steps.step(e[:2] + scale * (e[2:] - e[:2]), t, x, eta=0.0).prev_sample
            x = torch.cat([over[N - self.i - 1], x[1:]]) if over.pinned else x
            if self.blend and self.i >= 0.2 * N:
                x = torch.cat([x[:1], x[:1] + self.mask() * (x[1:] - x[:1])])
        return x[1:]


CASES = {
    "refine": (TARGET, REFINE, {}, {}),
    "refine, other schedules": (TARGET, REFINE, {"cross_steps": 0.4, "self_steps": 0.6, "self_levels": 2},
                                {"cross": 0.4, "own": 0.6, "levels": 2}),
    "all self-attention": (TARGET, REFINE, {"self_levels": 3, "self_steps": 1.0}, {"levels": 3, "own": 1.0}),
    "replace": (SAME_LENGTH, REPLACE, {"mode": "replace"}, {}),
    "reweight": (TARGET, REFINE, {"reweight": "striped zebra=3, grass=-2"}, {"weights": [([5, 6], 3.0), (8, -2.0)]}),
    "schedules of words": (TARGET, REFINE, {"word_steps": "photo=0.2,zebra=0.5", "reweight": "zebra=2"},
                           {"until": [(2, 0.2), (6, 0.5)], "weights": [(6, 2.0)]}),
    "blend": (TARGET, REFINE, {"blend": "horse,zebra", "blend_threshold": 0.97, "reweight": "zebra=1.5"},
              {"blend": ([5], [6]), "threshold": 0.97, "weights": [(6, 1.5)]}),
    "blend of words of both": (SAME_LENGTH, REPLACE, {"mode": "replace", "blend": "photo, sand",
                               "blend_threshold": 0.98},
                               {"blend": ([2], [2, 7]), "threshold": 0.98}),
}  # fmt: skip


@once
def truth(case, inversion):
    """The edit of the maps, and the mask of its blend."""
    target, correspondence, _, settings = CASES[case]
    oracle = Oracle(correspondence, **settings)
    return oracle.run(path(inversion), SOURCE, target), oracle.mask() if oracle.blend else None


@pytest.mark.parametrize("case, inversion", [
    *((case, "direct") for case in CASES), ("refine", "ddim"), ("replace", "ddim"), ("blend", "ddim"),
])  # fmt: skip
def test_it_is_the_edit_of_the_maps(case, inversion):
    (target, _, options, _), record = CASES[case], {}
    found, (edit, mask) = edited(path(inversion), target=target, record=record, **options), truth(case, inversion)
    assert error(found, edit) <= 1e-4
    assert error(found, plain(path(inversion), target)) > 1e-2
    if mask is not None:
        assert torch.equal(record["blend"], mask) and 0 < record["blend"].mean() < 1


@pytest.mark.parametrize("case", ["all self-attention", "blend"])
def test_in_float64_the_two_are_one(case):
    """Between two fused attentions and maps that are built; what is left is the peer's noise table in float32."""
    unet, vae, clip = (network.double() for network in tiny.networks())
    sd = StableDiffusion(unet, vae, clip, SD.tokenizer)
    target, correspondence, options, settings = CASES[case]
    texts, words = sd.text(["", SOURCE, target]).split(1), [words_of(SD.tokenizer, one) for one in (SOURCE, target)]
    over = inversions.direct(sd.eps, X0.double(), *texts[:2], steps=N)
    ours = P.prompt_to_prompt(sd.eps, over, *texts[1:], *words, sd.coarsest, **options)
    assert error(ours, Oracle(correspondence, **settings, sd=sd).run(over, SOURCE, target)) <= 1e-5


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("target", [TARGET, SAME_LENGTH])
def test_without_schedules_it_is_the_plain_run(target):
    for mode in ("refine", "replace") if target == SAME_LENGTH else ("refine",):
        found = edited(path(), target=target, cross_steps=0.0, self_steps=0.0, mode=mode, reweight="zebra=5")
        assert error(found, plain(path(), target)) <= 1e-5


@pytest.mark.parametrize("options", [
    {}, {"mode": "replace"}, {"self_levels": 3, "self_steps": 1.0, "cross_steps": 1.0}, {"word_steps": "horse=0.1"},
    {"blend": "horse", "blend_threshold": 0.9},
])  # fmt: skip
def test_the_same_text_changes_nothing_on_a_free_path(options):
    found = edited(path(), target=SOURCE, **options)
    assert error(found, plain(path(), SOURCE)) <= 1e-4 and error(plain(path(), SOURCE), X0) > 0.1


def test_weights_of_one_change_nothing():
    assert torch.equal(edited(path(), reweight="zebra=1,grass=1"), edited(path()))
    assert error(edited(path(), reweight="zebra=2"), edited(path())) > 1e-3


def test_a_blend_of_nothing_is_the_source():
    """Above the largest attention no cell is left; a held source comes back."""
    assert error(edited(path("direct"), blend="horse,zebra", blend_threshold=1.0), X0) <= 1e-6
    everywhere = edited(path("direct"), blend="horse,zebra", blend_threshold=0.0)
    assert error(everywhere, edited(path("direct"))) <= 1e-6


def test_the_source_row_is_a_run_of_its_own():
    """Its predictions do not see the target: the rows before the last are those of an edit to anything else."""
    seen = []

    def eps(x, t, texts, **hooks):
        seen.append(x[2:3])
        return SD.eps(x, t, texts, **hooks)

    words = [words_of(SD.tokenizer, SOURCE)] * 2
    for target in (TARGET, "seahorse"):
        words[1] = words_of(SD.tokenizer, target)
        P.prompt_to_prompt(eps, path(), SD.text([SOURCE]), SD.text([target]), *words, SD.coarsest)
    assert len(seen) == 2 * N and error(torch.cat(seen[:N]), torch.cat(seen[N:])) <= 1e-5


def test_a_held_source_costs_three_rows_and_any_scale_is_its_own():
    for inversion, rows in (("ddim", 4), ("direct", 3)):
        before = SD.evaluations
        over = path(inversion)
        before = SD.evaluations
        edited(over)
        assert SD.evaluations - before == rows * N


@pytest.mark.parametrize("inversion", ["ddim", "direct"])
def test_pictures_in_a_batch_are_as_alone(inversion):
    pair = torch.cat([X0, latent(1, 4, 8, 32, seed=3, dtype=torch.float32)])
    options = {"blend": "horse,zebra", "blend_threshold": 0.97, "self_levels": 3}
    together = edited(path(inversion, pair, 4), **options)
    for i in range(2):
        alone = Path([level[i : i + 1] for level in path(inversion, pair, 4).values()], 4, SD.text([""]),
                     pinned=inversion == "direct")  # fmt: skip
        assert error(together[i : i + 1], edited(alone, **options)) <= 1e-4


def test_null_texts_of_each_level_are_asked():
    over = path()
    nulls = {j: SD.text([f"null {j}"]) for j in over.down()}
    with_nulls = Path([*over.values()], N, SD.text([""]), nulls=nulls)
    found = edited(with_nulls, cross_steps=0.0, self_steps=0.0)
    assert error(found, plain(with_nulls)) <= 1e-5 and error(found, plain(over)) > 1e-3


# ---------------------------------------------------------------- memory: no large map is ever built


def test_maps_are_built_for_the_blend_alone_and_small(monkeypatch):
    built = []

    def weights(q, k, real=P.weights):
        built.append((q.shape[2], k.shape[2]))
        return real(q, k)

    monkeypatch.setattr(P, "weights", weights)
    edited(path("direct"))
    assert built == []
    edited(path("direct"), blend="horse", self_levels=3)
    assert set(built) == {(16, 77)} and len(built) == N * 5 * 2  # 2 + 3 sites at the coarsest level, two rows
    assert "softmax" not in inspect.getsource(P).split('"""', 2)[2]


# ---------------------------------------------------------------- errors and the runner


@pytest.mark.parametrize("options, why", [
    ({"reweight": "cow=2"}, "the prompt has no 'cow'; its words are a, photo, of, a, striped, zebra, on, grass"),
    ({"reweight": "horse=2"}, "the prompt has no 'horse'"), ({"reweight": "zebra"}, "reweight must be WORD=NUMBER"),
    ({"word_steps": "cow=1"}, "the prompt has no 'cow'"), ({"word_steps": "zebra:1"}, "word_steps must be WORD=NUMBER"),
    ({"blend": "cow"}, "no prompt has 'cow'; their words are: a photo of a horse"),
    ({"mode": "replace"}, "got 7 .* and 8 .*use mode refine"), ({"word_steps": "zebra=2"}, r"numbers 0\.\.1"),
])  # fmt: skip
def test_words_that_are_not_there(options, why):
    with pytest.raises(ValueError, match=why):
        R.plan("prompt-to-prompt", source=SOURCE, target=TARGET, **options)
    before = SD.evaluations
    with pytest.raises(ValueError, match=why):
        edited(Path([X0, X0], 1, None), **options)
    assert SD.evaluations == before


def test_by_name(picture):
    texts = {"source": SOURCE, "target": TARGET, "seed": 0, "steps": 5}
    done = R.edit(SD, picture, "prompt-to-prompt", blend="horse,zebra", blend_threshold=0.9, **texts)
    assert done.evaluations == {"encode": 5, "decode": 15} and done.tensors["blend"].shape == done.latent[:, :1].shape
    assert R.edit(SD, picture, "ddim+prompt-to-prompt", **texts).evaluations == {"encode": 5, "decode": 20}
    with pytest.raises(ValueError, match="needs source"):
        R.edit(SD, picture, "prompt-to-prompt", target=TARGET)


# ---------------------------------------------------------------- mutants

MUTATIONS = {
    "own maps for all words": ("alone = active * c * (W.sum(0) == 0)", "alone = active * c", "refine"),
    "weights on the source's part alone": ("alone = active * c *", "alone = active *", "reweight"),
    "weights before the correspondence": ("(active * c)[:, None]", "(active * c)[:, :, None]", "reweight"),
    "weights for all steps": ("+ (1 - active)", "+ (1 - active) * c", "schedules of words"),
    "the source's values": ("plain(site, qs, ks, vt)])", "plain(site, qs, ks, v[-2 * b : -b])])", "refine"),
    "self maps of fine levels": ("site.level <= coarsest - self_levels", "site.level >= coarsest", "refine"),
    "a step longer": ("math.floor(share * steps + 0.5)", "math.floor(share * steps + 1.5)", "refine"),
    "the source unguided": ("torch.cat([x[-u:], x])", "torch.cat([x[:u], x])", "refine"),
    "the target's map before its edit": ("(P @ shared[i] + own * alone[i])", "own", "blend of words of both"),
    "words of the source alone": ("@ looks[1]", "@ looks[0]", "blend"),
    "both must look": (".any(0)", ".all(0)", "blend"),
    "no neighbours": ("3, stride=1, padding=1", "1, stride=1, padding=0", "blend"),
    "the middle block blends too": ("site.level == coarsest", "site.level >= coarsest", "blend"),
    "blend from the first step": ("i >= first(BLEND_STEPS, K)", "True", "blend"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    old, new, case = MUTATIONS[name]
    monkeypatch.setitem(globals(), "P", mutant("methods.prompt_to_prompt", old, new, monkeypatch))
    with pytest.raises((AssertionError, RuntimeError)):
        for inversion in ("direct", "ddim"):
            test_it_is_the_edit_of_the_maps(case, inversion)
