"""The whole edit against diffusers' pipeline, and its own blend shown to be one level off."""

import gzip
import json
import shutil
import sys
from importlib.resources import files
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from diffusers_edit import compare

from minidiffedit.tokenizer import build_vocab, packaged_merges

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@pytest.mark.filterwarnings("ignore")
def test_the_whole_edit_equals_diffusers_once_its_blend_is_shifted(folder, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    (whole / "model_index.json").write_text(json.dumps(INDEX))
    official = Path(__file__).parent / "data" / "manifests" / "configs" / "v1-5"
    shutil.copytree(official / "tokenizer", whole / "tokenizer")
    (whole / "tokenizer" / "vocab.json").write_text(json.dumps(build_vocab(packaged_merges())))
    merges = files("minidiffedit").joinpath("data/clip_merges.txt.gz").read_bytes()
    (whole / "tokenizer" / "merges.txt").write_bytes(gzip.decompress(merges))

    found = compare(str(whole), steps=20)
    assert 0 < found["mask coverage"] < 1
    assert found["encoding"] < 1e-5
    assert found["edit, blend shifted by one level"] < 1e-4
    assert found["the same, largest pixel difference of 255"] <= 0.6  # half a unit is our rounding
    assert found["outside the mask, ours to the source"] == 0
    assert found["edit, diffusers as it is"] > 1e-3 < found["outside the mask, diffusers to the source"]
