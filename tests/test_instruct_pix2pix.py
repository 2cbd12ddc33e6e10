"""InstructPix2Pix against diffusers' pipeline, Watch Your Steps on it. `P` and `W` are exchanged by the mutants."""

import math

import explicit
import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoencoderKL, StableDiffusionInstructPix2PixPipeline
from explicit import error
from mutants import mutant, run
from PIL import Image
from stubs import ALPHA_BAR, latent
from transformers import CLIPTextModel

from minidiffedit import run as R
from minidiffedit.files.images import to_tensor
from minidiffedit.methods import instruct_pix2pix as P
from minidiffedit.methods import watch_your_steps as W

N = 5
SD = tiny.model(8)
NULL, TEXT = SD.text([""]), SD.text(["make it a zebra"])
PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8))
X0 = SD.encode(to_tensor(PICTURE, (64, 64)))
UNSCALED = X0 / SD.scale


def edited(eps=SD.eps, x0=X0, text=TEXT, **options):
    return P.instruct_pix2pix(eps, x0, x0 / SD.scale, NULL, text, **{"steps": N} | options)


def test_an_instruction_that_says_nothing():
    with pytest.warns(UserWarning, match="nothing to edit: the prompts do not differ on this picture"):
        done = R.edit(SD, PICTURE, "watch-your-steps", instruction="", steps=2, seed=0)
    assert done.verdict == "no difference" and done.image.tobytes() == PICTURE.tobytes()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tiny.write_folder(tmp_path_factory.mktemp("instruct") / "tiny", channels=8)
    steps = explicit.scheduler(N)
    made = StableDiffusionInstructPix2PixPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"), tokenizer=None,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        unet=explicit.peer(SD, lambda name, cross, q, k, v: explicit.maps(q, k) @ v), scheduler=steps,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scales", [{}, {"guidance_scale": 4.0, "picture_scale": 1.2}, {"picture_scale": 2.5}])
def test_it_is_diffusers_pipeline(pipeline, scales):
    noise = next(P.draws(X0.shape, 7))
    theirs = pipeline(
        image=PICTURE, prompt_embeds=TEXT, negative_prompt_embeds=NULL, num_inference_steps=N, latents=noise,
        guidance_scale=scales.get("guidance_scale", 7.5), image_guidance_scale=scales.get("picture_scale", 1.5),
        output_type="latent",
    ).images  # fmt: skip
    assert error(edited(seed=7, **scales), theirs) <= 1e-4


def alone(t, x, picture, text):
    return SD.eps(x, t, [text], given=picture)[0]


def test_scales_of_one_are_the_plain_prediction():
    predict = P.predictor(SD.eps, UNSCALED, NULL, TEXT, 1.0, 1.0)
    assert error(predict(X0, 481), alone(481, X0, UNSCALED, TEXT)) <= 1e-5
    nothing = P.predictor(SD.eps, UNSCALED, NULL, TEXT, 0.0, 0.0)
    assert error(nothing(X0, 481), alone(481, X0, 0 * UNSCALED, NULL)) <= 1e-5
    picture = P.predictor(SD.eps, UNSCALED, NULL, TEXT, 0.0, 1.0)
    assert error(picture(X0, 481), alone(481, X0, UNSCALED, NULL)) <= 1e-5


def test_pictures_in_a_batch_are_as_alone():
    pair = torch.cat([X0, latent(1, 4, 8, 8, seed=3, dtype=torch.float32)])
    together = edited(x0=pair, seed=4)
    for i in range(2):
        assert error(together[i : i + 1], edited(x0=pair[i : i + 1], seed=4 + i)) <= 1e-4


# ---------------------------------------------------------------- Watch Your Steps


def stepped(mask, **options):
    return W.watch_your_steps(SD.eps, X0, UNSCALED, NULL, TEXT, mask, **{"steps": N, "seed": 3} | options)


def test_masks_of_all_and_of_nothing():
    """Everywhere: InstructPix2Pix itself. Nowhere: the picture, bit for bit."""
    everything = torch.ones(1, 1, 8, 8)
    assert error(stepped(everything), edited(seed=3)) <= 1e-6
    assert torch.equal(stepped(0 * everything), X0)
    half = everything.clone()
    half[..., :4] = 0
    assert torch.equal(stepped(half)[..., :4], X0[..., :4]) and error(stepped(half)[..., 4:], X0[..., 4:]) > 0.1


def test_outside_the_mask_each_level_is_the_picture_under_one_noise():
    seen = []

    def eps(x, t, texts, given):
        seen.append((t, x[:1]))
        return SD.eps(x, t, texts, given=given)

    W.watch_your_steps(eps, X0, UNSCALED, NULL, TEXT, torch.zeros(1, 1, 8, 8), steps=N, seed=3)
    draw = P.draws(X0.shape, 3)
    start, noise = next(draw), next(draw)
    assert torch.equal(seen[0][1], start) and [t for t, _ in seen] == [801, 601, 401, 201, 1]
    for t, x in seen[1:]:
        assert error(x, ALPHA_BAR[t] ** 0.5 * X0 + (1 - ALPHA_BAR[t]) ** 0.5 * noise) <= 1e-5


def found(maps=1, **options):
    return W.relevance(SD.eps, X0, UNSCALED, NULL, TEXT, maps=maps, **{"steps": 10, "seed": 5} | options)


@pytest.mark.parametrize("maps, fence", [(1, 1.5), (3, 0.2)])
def test_the_relevance_map_by_hand(maps, fence):
    """In numpy: one noise a map, at level 8 of 10, t = 701, and Tukey's fence."""
    a, total = ALPHA_BAR[701], 0
    generator = torch.Generator().manual_seed(5)
    for _ in range(maps):
        x = math.sqrt(a) * X0 + math.sqrt(1 - a) * torch.randn(1, 4, 8, 8, generator=generator)
        d = alone(701, x, UNSCALED, TEXT) - alone(701, x, UNSCALED, NULL)
        total = total + d.abs().sum(1)[0].numpy() / maps
    low, high = np.percentile(total, [25, 75])
    clipped = np.minimum(total, high + fence * (high - low))
    heat = (clipped - clipped.min()) / (clipped.max() - clipped.min())
    assert (total > clipped).any() == (fence == 0.2)
    done = found(maps, mask_fence=fence)
    assert np.allclose(done.heat[0, 0].numpy(), heat, atol=2e-4) and done.verdict == ("found",)
    sure = np.abs(heat - 0.5) > 1e-3
    assert ((done.mask[0, 0].numpy() == (heat > 0.5)) | ~sure).all()


def test_by_name():
    texts = {"instruction": "make it a zebra", "seed": 0, "steps": N}
    for method, paid in (("instruct-pix2pix", {"decode": 15}), ("magicbrush", {"decode": 15}), ("hive", {"decode": 15}),
                         ("watch-your-steps", {"mask": 2, "decode": 15})):  # fmt: skip
        done = R.edit(SD, PICTURE, method, **texts)
        assert done.evaluations == paid and done.settings["instruction"] == "make it a zebra"
        again = R.resume(done, instruction="make it a horse")
        assert again.settings["instruction"] == "make it a horse" and not torch.equal(again.latent, done.latent)
    cut = R.resume(done, mask_threshold=0.2)
    assert cut.evaluations["mask"] == 0 and cut.coverage > done.coverage
    with pytest.raises(ValueError, match=r"needs instruction \(instruction: what is to be done"):
        R.edit(SD, PICTURE, "hive", seed=0)
    with pytest.raises(ValueError, match="needs instruct weights"):
        R.edit(tiny.model(), PICTURE, "hive", **texts)


# ---------------------------------------------------------------- mutants

PIPELINE, BY_HAND = test_it_is_diffusers_pipeline, test_the_relevance_map_by_hand
OUTSIDE = test_outside_the_mask_each_level_is_the_picture_under_one_noise
MUTATIONS = {
    "scales exchanged": ("instruct_pix2pix", "picture_scale * (e_picture", "guidance_scale * (e_picture", PIPELINE),
    "guidance from nothing": ("instruct_pix2pix", "(e_both - e_picture)", "(e_both - e_none)", PIPELINE),
    "the picture in all rows": ("instruct_pix2pix", "torch.zeros_like(x0_unscaled)", "x0_unscaled", PIPELINE),
    "no row without words": ("instruct_pix2pix", "(null, null, instruction)", "(null, instruction, null)", PIPELINE),
    "the level left": ("watch_your_steps", "a[j - 1]) * x0", "a[j]) * x0", OUTSIDE),
    "noise at the end": ("watch_your_steps", "if j > 1 else x0", "", test_masks_of_all_and_of_nothing),
    "no fence": ("watch_your_steps", "mask_fence, mask_threshold)", "1e9, mask_threshold)", BY_HAND),
    "one noise for all maps": ("watch_your_steps", "noise.split(1)", "[noise[:1]] * maps", BY_HAND),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, pipeline, monkeypatch):
    module, old, new, test = MUTATIONS[name]
    changed = mutant(f"methods.{module}", old, new, monkeypatch)
    monkeypatch.setitem(globals(), "P" if module == "instruct_pix2pix" else "W", changed)
    with pytest.raises((AssertionError, RuntimeError)):
        run(test, pipeline=pipeline)
