"""The miniature that ships: loads as SD v1 does, agrees with diffusers on it, and edits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidiffedit import StableDiffusion, edit, noises, sample

MINI = Path(__file__).parents[1] / "weights" / "mini"


@pytest.fixture(scope="module")
def mini():
    return StableDiffusion.load(MINI, device="cpu")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_diffusers_loads_the_folder_and_agrees(mini):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    peer = StableDiffusionPipeline.from_pretrained(MINI, safety_checker=None, requires_safety_checker=False)
    peer.scheduler = DDIMScheduler.from_config(peer.scheduler.config, clip_sample=False)
    peer.set_progress_bar_config(disable=True)
    side = mini.side // mini.factor
    x_T = noises((mini.channels, side, side), 1, seed=0)
    prompt = "a photo of a horse on a grass field"
    ours = sample(mini.eps, x_T, mini.text([prompt]), mini.text([""]), steps=10)
    options = {
        "num_inference_steps": 10,
        "guidance_scale": 7.5,
        "latents": x_T,
        "height": mini.side,
        "width": mini.side,
    }
    theirs = peer(prompt, output_type="latent", **options).images
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
    picture = torch.as_tensor(peer(prompt, output_type="np", **options).images).permute(0, 3, 1, 2)
    assert float(((mini.decode(ours) / 2 + 0.5).clamp(0, 1) - picture).abs().max()) < 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_whole_edit_equals_diffusers_here_too():
    from test_against_diffusers import compare

    found = compare(str(MINI), steps=10)
    assert found["edit, blend shifted by one level"] < 1e-3 < found["edit, diffusers as it is"]


@pytest.mark.slow
def test_the_shipped_edits_find_their_object(mini):
    """The first by the defaults; of the others the mask is wanted, which another strength leaves as it is."""
    scenes = [scene for scene in json.loads((MINI / "scenes" / "scenes.json").read_text()) if scene["kind"] == "swap"]
    ious, scenes = {}, scenes[:4]
    for scene in scenes:
        folder, strength, rows = MINI / "scenes" / scene["folder"], *((0.1, 5) if ious else (0.8, 40))
        texts = {"source": scene["source"], "target": scene["target"]}
        done = edit(mini, folder / "source.png", **texts, strength=strength, seed=0)
        truth = np.asarray(Image.open(folder / "mask.png").convert("L")) > 127
        truth = truth.reshape(truth.shape[0] // 8, 8, truth.shape[1] // 8, 8).any(axis=(1, 3))
        found = done.latent_mask[0, 0].numpy() > 0
        ious[scene["folder"]] = (found & truth).sum() / (found | truth).sum()
        assert done.verdict == "found" and done.evaluations == {"mask": 20, "encode": rows, "decode": 2 * rows}
    assert len(ious) >= 4 and np.mean(list(ious.values())) > 0.5, ious


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in MINI.rglob("*") if path.is_file()) < 60e6
