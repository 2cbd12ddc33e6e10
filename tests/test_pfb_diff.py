"""PFB-Diff against hooks and masked logits on diffusers' UNet, and at its limits. `P` is exchanged by the mutants."""

import explicit
import pytest
import tiny
import torch
import torch.nn.functional as F
from explicit import error, once
from mutants import mutant
from stubs import latent

from minidiffedit import run as R
from minidiffedit.methods import inversions
from minidiffedit.methods import pfb_diff as P
from minidiffedit.methods.replay import replay
from minidiffedit.methods.words import words_of
from minidiffedit.path import Path

N, X0 = 4, latent(1, 4, 8, 16, dtype=torch.float32)
SOURCE, TARGET = "a photo of a horse on grass", "a photo of a zebra on grass"
SD = tiny.model()
TEXT = {prompt: SD.text([prompt]) for prompt in (SOURCE, TARGET, "")}
MASK = torch.zeros(1, 1, 8, 16)
MASK[..., 1:7, 3:11] = 1
PATH = inversions.ddim(SD.eps, X0, TEXT[""], TEXT[SOURCE], steps=N)


def edited(mask=MASK, over=PATH, **options):
    words = [words_of(SD.tokenizer, one) for one in (SOURCE, TARGET)]
    return P.pfb_diff(SD.eps, over, mask, TEXT[SOURCE], TEXT[TARGET], *words, SD.coarsest, **options)


def at_size(size):
    return F.interpolate(MASK, tuple(size), mode="bicubic").clamp(0, 1)


class Oracle:
    """Three rows, forward hooks on what hands on to the blocks, and logits of hidden words at minus infinity."""

    WORDY = ("down_blocks.2.", "mid_block.", "up_blocks.1.", "up_blocks.2.attentions.0.", "up_blocks.2.attentions.1.")

    def __init__(self, inside=(5,), outside=(), blend=0.5):
        self.inside, self.outside, self.blend = list(inside), list(outside), blend * N
        net = self.net = explicit.peer(SD, self.hook)
        down, up = net.down_blocks, net.up_blocks
        for module in (
            down[2].attentions[0], down[2].attentions[1], down[2].downsamplers[0],
            down[3].resnets[0], down[3].resnets[1], up[0].resnets[0],
            up[0].resnets[1], up[0].upsamplers[0], up[1].attentions[0], up[1].attentions[1],
        ):  # fmt: skip
            module.register_forward_hook(self.blended)

    def blended(self, module, given, out):
        h = out[0] if isinstance(out, tuple) else out
        m = at_size(h.shape[2:])
        h = torch.cat([h[:1], m * h[1:] + (1 - m) * h[:1]])
        return (h, *out[1:]) if isinstance(out, tuple) else h

    def hook(self, name, cross, q, k, v):
        logits = torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-1] ** 0.5
        if cross and name.startswith(self.WORDY):
            grid = {128: (8, 16), 32: (4, 8), 8: (2, 4), 2: (1, 2)}[q.shape[2]]
            within = at_size(grid).flatten() > 0.5
            for cells, words in ((~within, self.inside), (within, self.outside)):
                for word in words:
                    logits[2, :, cells, word] = -torch.inf
        return torch.softmax(logits, dim=-1) @ v

    @torch.no_grad()
    def run(self, scale=7.5):
        steps, y = explicit.scheduler(N), PATH[N]
        text = torch.cat([TEXT[SOURCE], TEXT[""], TEXT[TARGET]])
        for i, t in enumerate(steps.timesteps):
            e = self.net(torch.cat([PATH[N - i], y, y]), t, text).sample
            y = steps.step(e[1:2] + scale * (e[2:] - e[1:2]), t, y, eta=0.0).prev_sample
            if i < self.blend:
                y = MASK * y + (1 - MASK) * PATH[N - i - 1]
        return y


@once
def truth(**settings):
    return Oracle(**settings).run()


@pytest.mark.parametrize("options, settings", [
    ({}, {}), ({"inside_words": "zebra", "outside_words": "grass, photo"}, {"outside": [7, 2]}),
    ({"inside_words": "", "blend_steps": 1.0}, {"inside": [], "blend": 1.0}), ({"blend_steps": 0.0}, {"blend": 0.0}),
])  # fmt: skip
def test_it_is_the_blending_of_features(options, settings):
    found = edited(**options)
    assert error(found, truth(**settings)) <= 1e-4
    assert error(found, replay(SD.eps, PATH, TEXT[TARGET])) > 1e-2


def test_everywhere_without_words_it_is_the_plain_run():
    everywhere = torch.ones_like(MASK)
    plain = replay(SD.eps, PATH, TEXT[TARGET])
    assert error(edited(everywhere, inside_words=""), plain) <= 1e-5
    assert error(edited(everywhere), plain) <= 1e-5  # all cells are inside
    assert error(edited(everywhere, outside_words="grass"), plain) > 1e-3


def test_nowhere_with_latents_blended_to_the_end_it_is_the_picture():
    assert torch.equal(edited(torch.zeros_like(MASK), blend_steps=1.0), X0)


def test_pictures_in_a_batch_are_as_alone():
    pair = torch.cat([X0, latent(1, 4, 8, 16, seed=3, dtype=torch.float32)])
    over = inversions.ddim(SD.eps, pair, TEXT[""], TEXT[SOURCE], steps=N)
    masks = torch.cat([MASK, MASK.flip(3)])
    together = edited(masks, over, outside_words="grass")
    for i in range(2):
        alone = Path([level[i : i + 1] for level in over.values()], N, TEXT[""])
        assert error(together[i : i + 1], edited(masks[i : i + 1], alone, outside_words="grass")) <= 1e-4


def test_by_name(picture):
    texts = {"source": SOURCE, "target": TARGET, "steps": 5, "seed": 0}
    done = R.edit(SD, picture, "pfb-diff", mask=tiny.box(), **texts)
    assert done.evaluations == {"encode": 5, "decode": 15} and done.verdict == "given"
    assert R.edit(SD, picture, "words+pfb-diff", maps=2, **texts).evaluations == {"mask": 2, "encode": 5, "decode": 15}
    with pytest.raises(ValueError, match="pfb-diff needs mask"):
        R.plan("pfb-diff", **texts)
    for options, why in (
        ({"inside_words": "horse"}, "the prompt has no 'horse'"),
        ({"outside_words": "x"}, "the prompt has no 'x'"),
        ({"outside_words": "zebra"}, "position 5 of the target is in inside_words and in"),
    ):
        with pytest.raises(ValueError, match=why):
            R.plan("pfb-diff", mask=tiny.box(), **texts, **options)


MUTATIONS = {
    "another block at the end": ("site.index < 2)", "site.index < 3)"),
    "the decoder alone": ('site.place == "down" or site.index < 2', 'site.place == "up" and site.index < 2'),
    "the source's unguided twin": ("path.texts(source,", "path.texts(path.null(j),"),
    "the mask turned round": ("own * one + (1 - own) * h_source", "(1 - own) * one + own * h_source"),
    "words hidden from the unguided row too": ("q[-b:], k[-b:, :, at]", "q[b : 2 * b], k[b : 2 * b, :, at]"),
    "words hidden at fewer places": ("site.level == coarsest - 1 and", "False and"),
    "inside and outside exchanged": ("torch.where(within, inner, outer)", "torch.where(within, outer, inner)"),
    "the level left": ("(1 - m) * path[j - 1]", "(1 - m) * path[j]"),
    "latents blended to the end": ("i < first(blend_steps, path.top)", "True"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    monkeypatch.setitem(globals(), "P", mutant("methods.pfb_diff", *MUTATIONS[name], monkeypatch))
    with pytest.raises((AssertionError, RuntimeError)):
        test_it_is_the_blending_of_features({}, {})
