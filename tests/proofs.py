"""What tests of methods share: is the prediction what was paid, does a mistake turn a test red, a peer's pipeline."""

import gzip
import json
import shutil
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import tiny
import torch
from mutants import mutant, run
from stubs import latent

from minidiffedit import StableDiffusion, Tokenizer
from minidiffedit.cost import cost
from minidiffedit.run import blank_plan, execute, plan
from minidiffedit.tokenizer import build_vocab, packaged_merges

TEXTS = {"source": "a horse", "target": "a zebra"}


def edited(sd, picture, method, **arguments):
    """The result of a method, after it was seen that its rows were predicted and that one seed gives the same bits."""
    few = {"seed": 0} | ({"steps": 10} if "steps" in blank_plan(method).options else {})
    settled = plan(method, **few | arguments)
    before = sd.evaluations
    done = execute(settled, sd, picture)
    assert cost(settled) == done.evaluations and sd.evaluations - before == done.rows > 0
    assert done.latent.equal(execute(settled, sd, picture).latent) and done.image.size == picture.size
    return done


def turns_red(test_module, name, place, old, new, test, monkeypatch, **fixtures):
    """The test fails once a piece of a method's module, which the test's module knows as `name`, is another."""
    monkeypatch.setattr(sys.modules[test_module], name, mutant(f"methods.{place}", old, new, monkeypatch))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run(test, **fixtures, monkeypatch=monkeypatch)


def pipeline(kind, folder, tmp_path, **options):
    """A pipeline of diffusers over the tiny model's files, silent, with SD v1's DDIM."""
    from diffusers import DDIMScheduler

    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    shutil.copytree(Path(__file__).parent / "data/manifests/configs/v1-5/tokenizer", whole / "tokenizer")
    (whole / "tokenizer" / "vocab.json").write_text(json.dumps(build_vocab(packaged_merges())))
    merges = files("minidiffedit").joinpath("data/clip_merges.txt.gz").read_bytes()
    (whole / "tokenizer" / "merges.txt").write_bytes(gzip.decompress(merges))
    places = {"scheduler": "PNDMScheduler", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1"}
    index |= {name: ["diffusers", kind] for name, kind in places.items()}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    (whole / "model_index.json").write_text(json.dumps(index))
    peer = kind.from_pretrained(whole, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    config = dict(peer.scheduler.config) | {"clip_sample": False, "timestep_spacing": "leading"}
    peer.scheduler = options.get("scheduler", DDIMScheduler).from_config(config)
    peer.set_progress_bar_config(disable=True)
    return peer


def is_the_slope(gradients, at, loss, rel=1e-5, size=1e-5):
    """The gradients of a loss in some tensors, float64, are its finite differences along random directions."""
    with torch.no_grad():
        for seed in range(3):
            steps = [size * latent(*one.shape, seed=100 * seed + i) for i, one in enumerate(at)]
            high, low = ([one + sign * step for one, step in zip(at, steps)] for sign in (1, -1))
            slope = float(loss(*high) - loss(*low)) / 2
            assert float(sum((g * s).sum() for g, s in zip(gradients, steps))) == pytest.approx(slope, rel=rel)


def checked_slopes(module, monkeypatch):
    """From now on each gradient that a method's module asks for is compared; a list of the losses' values."""
    plain, values = module.slopes, []

    def slopes(loss, at):
        value, gradients = plain(loss, at)
        is_the_slope(gradients, at, loss)
        values.append(float(value))
        return value, gradients

    monkeypatch.setattr(module, "slopes", slopes)
    return values


def double(unet=tiny.QUICK):
    """The tiny model in float64."""
    return StableDiffusion(*(network.double() for network in tiny.networks(unet=unet)), Tokenizer())
