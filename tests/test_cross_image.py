"""Cross-image attention against whole maps on diffusers' UNet, and at its limits. `P` is exchanged by the mutants."""

import explicit
import numpy as np
import pytest
import tiny
import torch
from explicit import error, maps, once
from mutants import mutant
from stubs import ALPHA_BAR, latent

from minidiffedit import run as R
from minidiffedit.methods import cross_image as P
from minidiffedit.methods.edit_friendly import edit_friendly
from minidiffedit.path import Path

N = 10
SD = tiny.model()
X0, LOOKS = (latent(1, 4, 8, 8, seed=seed, dtype=torch.float32) for seed in (0, 1))
NULL, TEXT = SD.text([""]), SD.text(["a photo of an animal"])
PATH = edit_friendly(SD.eps, X0, NULL, TEXT, steps=N, strength=0.7, seed=2)  # K = 7
PLAIN = edit_friendly(SD.eps, X0, NULL, TEXT, steps=N, strength=0.7, seed=2, source_scale=1.0)


def edited(over=PATH, reference=LOOKS, **options):
    return P.cross_image_attention(SD.eps, over, reference, TEXT, **{"seed": 4} | options)


class Oracle:
    """The authors' rows (result, reference, picture) with and without the exchange, whole maps."""

    def __init__(self, start=1, adain=2, contrast=1.67, scale=3.5):
        self.start, self.adain, self.contrast, self.scale = start, adain, contrast, scale
        self.net = explicit.peer(SD, self.hook)

    def hook(self, name, cross, q, k, v):
        A = maps(q, k)
        if self.swap and not cross and name.startswith(("up_blocks.2.", "up_blocks.3.")):
            at = 2 if self.i % 5 == 0 and self.i < 4 else 1
            k[0], v[0] = k[at], v[at]
            A = maps(q, k)
            A[0] = torch.clip((A[0] - A[0].mean(-1, keepdim=True)) * self.contrast + A[0].mean(-1, keepdim=True), 0, 1)
        return A @ v

    @torch.no_grad()
    def run(self):
        generator = torch.Generator().manual_seed(4)
        looks = {0: LOOKS}
        for j in range(1, 8):
            a = float(ALPHA_BAR[100 * (j - 1) + 1])
            looks[j] = a**0.5 * LOOKS + (1 - a) ** 0.5 * torch.randn(1, 4, 8, 8, generator=generator)
        y, text = PATH[7], torch.cat([TEXT, NULL, NULL])
        for self.i, j in enumerate(range(7, 0, -1)):
            x, e = torch.cat([y, looks[j], PATH[j]]), {}
            for self.swap in (False, True):
                e[self.swap] = self.net(x, PATH.t[j], text).sample[:1]
            strength = np.linspace(self.scale, max(self.scale / 2, 1.0), 7)[self.i] if self.scale > 1 else 1.0
            best = e[False] + strength * (e[True] - e[False]) if self.i >= self.start else e[False]
            a, b = float(PATH.a[j]), float(PATH.a[j - 1])
            sigma = ((1 - b) / (1 - a) * (1 - a / b)) ** 0.5
            x0 = (y - (1 - a) ** 0.5 * best) / a**0.5
            y = b**0.5 * x0 + (1 - b - sigma**2) ** 0.5 * best + sigma * PATH.noises[j]
            if self.i >= self.adain:
                like = looks[j - 1].flatten(2)
                own = y.flatten(2)
                own = (own - own.mean(2, keepdim=True)) / (own.var(2, keepdim=True) + 1e-5).sqrt()
                y = (own * (like.var(2, keepdim=True) + 1e-5).sqrt() + like.mean(2, keepdim=True)).view_as(y)
        return y


@once
def truth(**settings):
    return Oracle(**settings).run()


@pytest.mark.parametrize("options, settings", [
    ({}, {}), ({"exchange_after": 0.0}, {"start": 0}),
    ({"contrast": 3.0, "swap_scale": 1.0}, {"contrast": 3.0, "scale": 1.0}),
    ({"exchange_after": 0.3, "adain_after": 1.0}, {"start": 3, "adain": 10}),
])  # fmt: skip
def test_it_is_the_exchange_with_whole_maps(options, settings, monkeypatch):
    monkeypatch.setattr(P, "AT_ONCE", 1 << 10)  # 16 queries of 64 at a time
    found = edited(**options)
    assert error(found, truth(**settings)) <= 1e-4
    assert error(found, edited(exchange_after=1.0, adain_after=options.get("adain_after", 0.2))) > 1e-3


def test_without_exchange_and_adain_the_picture_comes_back():
    assert error(edited(PLAIN, exchange_after=1.0, adain_after=1.0), X0) <= 1e-5


def test_a_contrast_of_one_is_plain_attention():
    q, k, v = (latent(2, 3, n, 8, seed=seed) for n, seed in ((10, 0), (7, 1), (7, 2)))
    assert error(P.contrasted(q, k, v, 1.0), torch.nn.functional.scaled_dot_product_attention(q, k, v)) <= 1e-12


def test_the_result_has_the_references_mean_and_deviation():
    found = edited()
    assert torch.allclose(found.mean((2, 3)), LOOKS.mean((2, 3)), atol=1e-5)
    assert torch.allclose(found.std((2, 3)), LOOKS.std((2, 3)), rtol=1e-4)


def test_no_whole_map_is_built(monkeypatch):
    built = []

    def weights(q, k, real=P.weights):
        built.append((q.shape[2], k.shape[2]))
        return real(q, k)

    monkeypatch.setattr(P, "AT_ONCE", 1 << 9)
    monkeypatch.setattr(P, "weights", weights)
    edited()
    assert max(q * k for q, k in built) <= 1 << 9 and {k for _, k in built} == {16, 64}
    assert (1 << 19) < 4096 * 4096 / 30  # as it is: at most a thirtieth of a map of 64 x 64


def test_pictures_in_a_batch_are_as_alone():
    pair = torch.cat([X0, latent(1, 4, 8, 8, seed=3, dtype=torch.float32)])
    over = edit_friendly(SD.eps, pair, NULL, TEXT, steps=N, strength=0.5, seed=2)
    together = edited(over)
    for i in range(2):
        noises = {j: z[i : i + 1] for j, z in over.noises.items()}
        alone = Path([level[i : i + 1] for level in over.values()], N, NULL, noises=noises, pinned=True)
        assert error(together[i : i + 1], edited(alone, seed=4 + i)) <= 1e-4


def test_by_name(picture):
    done = R.edit(
        SD, picture, "cross-image-attention", reference=picture.rotate(180), source="an animal", steps=10, seed=0
    )
    assert done.evaluations == {"encode": 2 * 7, "decode": 1 + 6 * 4}
    with pytest.raises(ValueError, match="needs reference"):
        R.plan("cross-image-attention")


MUTATIONS = {
    "three levels": ("site.level > 1", "site.level > 2"),
    "the encoder too": ('or site.place != "up"', ""),
    "always the reference": ("own = i % 5 == 0 and", "own = False and"),
    "keys alone": ("k[at], v[at], contrast)", "k[at], v[-b:], contrast)"),
    "no clip": (".clamp(0, 1)", ""),
    "an even scale": ("falling(swap_scale, i, K)", "swap_scale"),
    "a step late": ("i >= first(adain_after, N)", "i > first(adain_after, N)"),
    "the level left": ("adain(y, looks[j - 1])", "adain(y, looks[j])"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    monkeypatch.setitem(globals(), "P", mutant("methods.cross_image", *MUTATIONS[name], monkeypatch))
    with pytest.raises((AssertionError, RuntimeError)):
        test_it_is_the_exchange_with_whole_maps({"exchange_after": 0.0}, {"start": 0}, monkeypatch)
