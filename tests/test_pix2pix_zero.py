"""pix2pix-zero against the authors' loss on diffusers' UNet, and at its limits. `P` is exchanged by the mutants."""

import explicit
import pytest
import tiny
import torch
from explicit import error, maps, once
from mutants import mutant
from proofs import edited
from stubs import latent

from minidiffedit import run as R
from minidiffedit.methods import pix2pix_zero as P
from minidiffedit.methods.inversions import direct
from minidiffedit.methods.replay import replay
from minidiffedit.path import Path

N, RATE = 4, 2.0  # the maps of random weights are nearly level: a large rate
SD = tiny.model(unet=tiny.QUICK)
X0 = latent(1, 4, 8, 8, dtype=torch.float32)
SOURCE, TARGET = "a photo of a horse", "a photo of a zebra"
TEXT = {prompt: SD.text([prompt]) for prompt in ("", SOURCE, TARGET)}
with torch.no_grad():
    PATH = direct(SD.eps, X0, TEXT[""], TEXT[SOURCE], steps=N)


def made(over=PATH, source=SOURCE, **options):
    return P.pix2pix_zero(SD.eps, over, TEXT[source], TEXT[TARGET], **{"rate": RATE} | options)


@once
def by_the_authors(rate=RATE):
    """Reference maps of one pass, kept; the loss of the next, by module: sum over a head's map, mean over heads."""
    kept, loss = {}, [0.0]

    def hook(name, cross, q, k, v):
        A = maps(q, k)
        if cross and look == "source":
            kept[name] = A.detach().flatten(0, 1)
        elif cross and look == "edit":
            loss[0] = loss[0] + ((A.flatten(0, 1) - kept[name]) ** 2).sum((1, 2)).mean(0)
        return A @ v

    net, ddim, y = explicit.peer(SD, hook), explicit.scheduler(N), PATH[N]
    for i, t in enumerate(ddim.timesteps):
        look = "source"
        net(PATH[N - i], t, TEXT[SOURCE])
        look, loss[0], x = "edit", 0.0, y.clone().requires_grad_()
        net(x, t, TEXT[TARGET])
        loss[0].backward()
        look, y = "", y - rate * x.grad
        e_null, e_text = net(torch.cat([y, y]), t, torch.cat([TEXT[""], TEXT[TARGET]])).sample.chunk(2)
        y = ddim.step(e_null + 7.5 * (e_text - e_null), t, y, eta=0.0).prev_sample
    return y


def test_it_is_the_gradient_of_the_authors_loss():
    found = made()
    assert error(found, by_the_authors()) <= 1e-4
    assert error(found, made(rate=0.0)) > 1e-3


def test_without_a_rate_it_is_the_plain_run():
    assert torch.equal(made(rate=0.0), replay(SD.eps, PATH, TEXT[TARGET]))


def test_a_step_comes_nearer_to_the_sources_attention():
    def apart(y, j):
        kept = []

        def tap(plain, site, q, k, v):
            kept.append(maps(q, k)) if site.kind == "cross" else None
            return plain(site, q, k, v)

        SD.eps(PATH[j], PATH.t[j], [TEXT[SOURCE]], tap=tap)
        SD.eps(y, PATH.t[j], [TEXT[TARGET]], tap=tap)
        half = len(kept) // 2
        return sum(float((a - b).square().sum()) for a, b in zip(kept[:half], kept[half:]))

    seen = []

    def eps(x, t, texts, **hooks):
        seen.append((x.detach(), t))
        return SD.eps(x, t, texts, **hooks)

    P.pix2pix_zero(eps, PATH, TEXT[SOURCE], TEXT[TARGET], rate=0.1)
    for (before, t), (after, _) in zip(seen[::2], seen[1::2]):
        j = PATH.t.index(t)
        assert apart(after, j) < apart(before[1:], j)


def test_pictures_in_a_batch_are_as_alone():
    pair = torch.cat([X0, latent(1, 4, 8, 8, seed=3, dtype=torch.float32)])
    over = direct(SD.eps, pair, TEXT[""], TEXT[SOURCE], steps=N)
    together = made(over)
    for i in range(2):
        alone = Path([level[i : i + 1] for level in over.values()], N, TEXT[""], pinned=True)
        assert error(together[i : i + 1], made(alone)) <= 1e-4


def test_by_name(picture):
    done = edited(SD, picture, "pix2pix-zero", source=SOURCE, target=TARGET)
    assert done.evaluations == {"encode": 10, "decode": 40}
    assert not torch.equal(done.latent, R.edit(SD, picture, "pix2pix-zero", source=SOURCE, target=TARGET, steps=10,
                                               rate=0.0, seed=0).latent)  # fmt: skip


MUTATIONS = {
    "away from the source": ("y - rate * gradient", "y + rate * gradient"),
    "self-attention": ('site.kind == "cross"', 'site.kind == "self"'),
    "all heads": (".mean(1).sum()", ".sum(1).sum()"),
    "the source's text for both": ("path.texts(source, target)", "path.texts(source, source)"),
    "the level below": ("torch.cat([path[j], x])", "torch.cat([path[j - 1], x])"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    monkeypatch.setitem(globals(), "P", mutant("methods.pix2pix_zero", *MUTATIONS[name], monkeypatch))
    with pytest.raises((AssertionError, RuntimeError)):
        test_it_is_the_gradient_of_the_authors_loss()
