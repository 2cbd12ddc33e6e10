"""CycleDiffusion: equal texts give the picture back, levels hang together, and diffusers' pipeline does the same."""

import math

import pytest
import torch
from proofs import TEXTS, edited, pipeline, turns_red
from stubs import ALPHA_BAR, Counting, gaussian, latent

from minidiffedit import StableDiffusion, levels
from minidiffedit.methods import cycle_diffusion as C
from minidiffedit.methods.replay import replay


def inverted(eps=gaussian, **options):
    return C.cycle(eps, latent(2, 4, 6, 5), 0.0, 0.3, **{"steps": 10} | options)


@pytest.mark.parametrize("eta", [0.1, 1.0])
@pytest.mark.parametrize("g", [1.0, 2.0])
def test_equal_texts_and_guidance_return_the_picture(eta, g):
    up, x0 = inverted(eta=eta, source_scale=g), latent(2, 4, 6, 5)
    torch.testing.assert_close(replay(gaussian, up, 0.3, guidance_scale=g), x0, rtol=1e-9, atol=1e-9)
    assert up.pinned and len(up) == 9 and (replay(gaussian, up, 0.8, guidance_scale=g) - x0).mean() > 0.05


@pytest.mark.parametrize("eta", [0.01, 1.0])
def test_each_level_is_the_picture_under_normal_noise_and_hangs_on_the_one_above(eta):
    """q(x_j | x_0) is SD's at every level whatever eta is; with little of it all levels share one noise."""
    x0, t = latent(1, 4, 64, 64), levels(10).t
    up = C.cycle(gaussian, x0, 0.0, 0.3, steps=10, eta=eta, seed=2)
    noise = {j: (up[j] - ALPHA_BAR[t[j]] ** 0.5 * x0) / (1 - ALPHA_BAR[t[j]]) ** 0.5 for j in range(1, 9)}
    for j in range(1, 9):
        assert noise[j].mean() == pytest.approx(0, abs=0.04) and noise[j].std() == pytest.approx(1, abs=0.03)
    shared = float((noise[8] * noise[2]).mean())
    assert shared == pytest.approx(1, abs=0.05) if eta < 0.1 else abs(shared) < 0.5
    for j in range(2, 9):  # DDPM's chain at eta = 1: correlation of neighbours is the ratio of signals to noises
        a, a_to = (float(ALPHA_BAR[t[i]]) for i in (j, j - 1))
        expected = math.sqrt(a / a_to * (1 - a_to) / (1 - a)) if eta == 1 else 1
        assert float((noise[j] * noise[j - 1]).mean()) == pytest.approx(expected, abs=0.05)


def test_rows_and_texts():
    for g, rows, texts in ((1.0, 16, [0.3]), (2.0, 32, [0.0, 0.3])):
        eps = Counting()
        inverted(eps, source_scale=g)
        assert eps.rows == rows and all(asked == texts for _, _, asked in eps.calls)
    assert len(inverted(strength=0.0)) == 1


def test_on_a_picture(sd, picture):
    done = edited(sd, picture, "cycle-diffusion", **TEXTS)
    assert done.evaluations == {"encode": 8, "decode": 16}
    same = {"source": "a horse", "target": "a horse", "guidance_scale": 2.0, "source_scale": 2.0}
    kept = edited(sd, picture, "cycle+replay", **same, eta=1.0)
    assert (kept.latent - kept.x0).abs().max() <= 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("eta, source_scale", [(0.1, 1.0), (1.0, 2.0)])
def test_it_is_what_diffusers_computes(folder, tmp_path, eta, source_scale):
    from diffusers import CycleDiffusionPipeline

    peer, sd = pipeline(CycleDiffusionPipeline, folder, tmp_path), StableDiffusion.load(folder, dtype="float32")
    x0, null = latent(1, 4, 8, 8, dtype=torch.float32), sd.text([""])
    theirs = peer(
        prompt=TEXTS["target"], source_prompt=TEXTS["source"], image=x0, strength=0.8, num_inference_steps=10, eta=eta,
        guidance_scale=2.0, source_guidance_scale=source_scale, generator=torch.Generator().manual_seed(4),
        output_type="latent",
    ).images  # fmt: skip
    horse, zebra = (sd.text([TEXTS[name]]) for name in ("source", "target"))
    up = C.cycle(sd.eps, x0, null, horse, steps=10, strength=0.8, eta=eta, source_scale=source_scale, seed=4)
    ours = replay(sd.eps, up, zebra, guidance_scale=2.0)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm() and (ours - x0).norm() > 1e-2 * x0.norm()


MUTATIONS = {
    "levels of their own": ("cycle_diffusion:cycle", "x[j - 1] = mean + sigma * next(draw).to(x0)",
        "x[j - 1] = vp_noised(x0, next(draw).to(x0), a[j - 1])",
        test_each_level_is_the_picture_under_normal_noise_and_hangs_on_the_one_above),
    "the step is not random": ("cycle_diffusion:cycle", "x[j - 1] = mean + sigma", "x[j - 1] = mean + 0 * sigma",
        test_each_level_is_the_picture_under_normal_noise_and_hangs_on_the_one_above),
    "another eta for the noises": ("cycle_diffusion:cycle", "scale=source_scale, eta=eta", "scale=1.0, eta=eta",
        test_equal_texts_and_guidance_return_the_picture),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, monkeypatch):
    turns_red(__name__, "C", *MUTATIONS[name], monkeypatch)
