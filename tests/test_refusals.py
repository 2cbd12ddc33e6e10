"""What is not SD v1, or broken, is refused from names and headers, with what it is and what to do."""

import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import tiny
import torch
from files import entry, hollow, hollow_folder, manifest, raw, save, single_state
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiffedit import StableDiffusion, edit, load_state, save_state
from minidiffedit.cli import main
from minidiffedit.files.configs import KINDS
from minidiffedit.files.unsupported import BYTES, read_header


@pytest.fixture
def refused(monkeypatch, capsys):
    """Both doors, the library's and `info`, refuse a path with the same words before any weights are read."""
    monkeypatch.setattr("minidiffedit.sd.load_network", lambda *a: pytest.fail("weights were read"))

    def check(path, words, described=False):
        with pytest.raises(ValueError) as caught:
            StableDiffusion.load(path, device="cpu")
        assert re.search(words, str(caught.value)), str(caught.value)
        assert len(str(caught.value)) < 1000
        if described:
            assert main(["info", str(path), "--json"]) == 0
            return json.loads(capsys.readouterr().out)
        assert main(["info", str(path)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        assert re.search(words, err), err

    return check


# ---------------------------------------------------------------- other models, at full size

UNET = "model.diffusion_model."
CONV = "input_blocks.0.0.weight"
TEXT = "cond_stage_model.transformer.text_model."


def only(entries, *prefixes):
    return {key: e for key, e in entries.items() if key.startswith(prefixes)}


def without(entries, *prefixes):
    return {key: e for key, e in entries.items() if not key.startswith(prefixes)}


def proj_in_matrices(entries):
    return {key: (e[0][:2] if key.endswith(("proj_in.weight", "proj_out.weight")) else e[0], e[1])
            for key, e in entries.items()}  # fmt: skip


def width_1024(entries):
    return {key: ([e[0][0], 1024] if "attn2.to_k." in key or "attn2.to_v." in key else e[0], e[1])
            for key, e in entries.items()}  # fmt: skip


def openclip(entries):
    return without(entries, "cond_stage_model.") | {"cond_stage_model.model.token_embedding.weight": ([8, 8], "F32")}


def first_conv(channels, width=320):
    return lambda entries: entries | {UNET + CONV: ([width, channels, 3, 3], "F32")}


def cast(dtype):
    return lambda entries: {key: (e[0], dtype) for key, e in entries.items()}


@pytest.mark.parametrize("shape", [
    [10**30, ""], [10**9, "x" * 99], ["1"], [True, 2], [2.0], [10**300] * 999, [1] * 10**5, "12", {"1": 2}, None,
], ids=lambda shape: f"{shape!s:.9}")  # fmt: skip
def test_a_shape_is_some_whole_numbers(shape, tmp_path):
    """What a text times a number would be, or a product of thousands, is not computed."""
    path = raw(tmp_path / "a.safetensors", {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}, bytes(8))
    with pytest.raises(ValueError, match="its header is not sound"):
        read_header(path)


def named(*keys, shape=(4, 768)):
    return lambda entries: {key: ([*shape], "F32") for key in keys}


V2 = "SD v2 .* use an SD v1 model"
V1 = "Stable Diffusion v1"
TO_K = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
SINGLES = {
    "SD v2, linear proj_in": (proj_in_matrices, V2),
    "SD v2, text width": (width_1024, V2),
    "SD v2, OpenCLIP": (openclip, V2),
    "SDXL": (lambda e: e | {"conditioner.embedders.0.transformer.x": ([1], "F32")}, "SDXL checkpoint; only SD v1"),
    "SDXL's UNet": (lambda e: proj_in_matrices(without(e, UNET + "input_blocks.1.1.", UNET + "input_blocks.2.1.")),
                    "SDXL"),
    "SD3": (named("model.diffusion_model.joint_blocks.0.x.weight", "text_encoders.clip_l.x"), "not a UNet of SD v1"),
    "Flux": (named("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"), "not a UNet of SD v1"),
    "diffusers' transformer": (named("transformer_blocks.0.attn.to_q.weight", "x"), "not a UNet of SD v1"),
    "SD v2, inpainting": (lambda e: first_conv(9)(openclip(width_1024(e))), V2),
    "SDXL, inpainting": (lambda e: first_conv(9)(proj_in_matrices(without(e, UNET + "input_blocks.1.1."))), "SDXL"),
    "six channels": (first_conv(6), r"1 misshaped: \S+0\.0\.weight is \[320, 6, 3, 3\], not \[320, 4, 3, 3\]"),
    "v2 depth": (first_conv(5), "SD v2 depth .* use an SD v1 base model"),
    "x4 upscaler": (first_conv(7, 256), "x4 upscaler .* use an SD v1 base model"),
    "LoRA, SDXL's by its text": (named(f"lora_unet_x_{TO_K}.lora_down.weight", "y", shape=(4, 2048)),
                                 "a LoRA for SDXL, .*no command here uses it"),
    "LoRA, SDXL's by its encoders": (named("lora_te1_x.lora_down.weight", "lora_te2_x.lora_down.weight"),
                                     "a LoRA for SDXL"),
    "LoRA, SD v2's": (named(f"unet.{TO_K}.lora.down.weight", "y", shape=(4, 1024)), "a LoRA for SD v2, .*no command"),
    "LoRA, Flux's": (named("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "y"), "a LoRA for SD3 or Flux"),
    "a word, SD v2's": (named("emb_params", shape=(2, 1024)), "a learned word .*for SD v2, .*no command here"),
    "a word, SDXL's": (named("clip_l", "clip_g", shape=(1, 768)), "a learned word .*for SDXL, .*no command here"),
    "LoHa": (named("lora_unet_x.hada_w1_a", "lora_unet_x.hada_w1_b"), "a LoHa .*no command here uses it"),
    "LoKr": (named("lycoris_x.lokr_w1", "lycoris_x.lokr_w2"), "a LoKr .*no command here uses it"),
    "OFT": (named("oft_unet_x.oft_blocks", "oft_unet_x.alpha"), "an OFT .*no command here uses it"),
    "OFT, peft's": (named("unet.x.oft_R.weight", "y"), "an OFT"),
    "DoRA": (named("lora_unet_x.dora_scale", "lora_unet_x.lora_down.weight"), "a DoRA"),
    "IP-Adapter": (named("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "an IP-Adapter .*no command here"),
    "motion module": (named("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", "x"),
                      "a motion module .AnimateDiff."),
    "motion in a checkpoint": (lambda e: e | {UNET + "input_blocks.1.motion_modules.0.x": ([1], "F32")},
                               "a motion module"),
    "T2I-Adapter": (named("adapter.body.0.resnets.0.block1.weight", "x"), "a T2I-Adapter"),
    "added token rows": (lambda e: e | {TEXT + "embeddings.token_embedding.weight": ([49410, 768], "F32")},
                         "2 added token rows: words that a trainer taught .*--embedding"),
    "LongCLIP": (lambda e: e | {TEXT + "embeddings.position_embedding.weight": ([248, 768], "F32")},
                 "reads 248 positions .LongCLIP.; SD v1's reads 77"),
    "more in the UNet": (lambda e: e | {UNET + "label_emb.0.0.weight": ([1], "F32")}, r"1 unknown: \S+label_emb"),
    "more in the VAE": (lambda e: e | {"first_stage_model.decoder.up.4.x": ([1], "F32")}, r"1 unknown: \S+up\.4\.x"),
    "more text layers": (lambda e: e | {TEXT + "encoder.layers.12.x": ([1], "F32")}, r"1 unknown: \S+layers\.12\.x"),
    "ControlNet": (lambda e: e | {"control_model.zero_convs.0.0.weight": ([1], "F32")}, "a ControlNet"),
    "ControlNet, diffusers": (named("controlnet_cond_embedding.conv_in.weight", "x"), "a ControlNet"),
    "UNet": (lambda e: only(e, UNET), "only the UNet; the whole model is needed"),
    "UNet, bare": (lambda e: {k.removeprefix(UNET): v for k, v in only(e, UNET).items()}, "only the UNet"),
    "UNet, folder's": (lambda e: manifest("unet"), "only the UNet; the whole model is needed"),
    "text encoder": (lambda e: only(e, "cond_stage_model."), "only the text encoder; the whole model is needed"),
    "text encoder, folder's": (lambda e: manifest("text_encoder"), "only the text encoder"),
    "text encoder, flat": (lambda e: manifest("text_encoder, flat"), "only the text encoder"),
    "fp8 e4m3": (cast("F8_E4M3"), "8-bit floats; use the fp16 file"),
    "fp8 e5m2": (cast("F8_E5M2"), "8-bit floats; use the fp16 file"),
    "integers": (cast("I8"), r"1130 misshaped: .* is I8, not a float type"),
    "no VAE": (lambda e: without(e, "first_stage_model."), "without its VAE"),
    "no text": (lambda e: without(e, "cond_stage_model."), "without its text encoder"),
    "nothing": (lambda e: {}, "1130 missing"),
    "all three": (
        lambda e: without(e, UNET + "out.2") | {"x": ([1], "F32"), UNET + "out.0.weight": ([5], "F32")},
        r"\(2 missing: \S+out\.2\.bias, \S+out\.2\.weight; 1 unknown: x; "
        r"1 misshaped: \S+out\.0\.weight is \[5\], not \[320\]\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("channels, method, given, needed", [
    (4, "instruct-pix2pix", ["--instruction", "more"], "instruct"),
    (4, "sd-inpainting", ["--target", "x", "--mask", "box.png"], "inpainting"),
    (8, "diffedit", ["--target", "x"], "base"),
    (9, "sdedit", ["--target", "x"], "base"),
    (9, "paint-by-example", ["--mask", "box.png", "--reference", "in.png"], "example"),
])  # fmt: skip
def test_a_method_refuses_other_weights_unread(channels, method, given, needed, tmp_path, monkeypatch, capsys):
    model = tiny.write_folder(tmp_path / "m", channels=channels)
    monkeypatch.chdir(tmp_path)
    tiny.picture().save("in.png")
    tiny.box().save("box.png")
    monkeypatch.setattr("minidiffedit.sd.load_network", lambda *a: pytest.fail("weights were read"))
    words = f"error: {method} needs {needed} weights .*give another --model"
    commands = [["edit", "in.png", "--method", method, *given], ["sheet", "in.png", "--method", method, *given]]
    commands[1] += ["--rows", "steps=2,4"]
    if needed == "base":
        Path("set.csv").write_text("image,target,source\nin.png,x,y\n")
        commands += [["generate", "x"]] * (method == "diffedit")
        commands += [["mask", "in.png", "--method", method, *given]] * (method == "diffedit")
        commands += [["eval", "set.csv", "--methods", method, "--no-plots"]]
    for command in commands:
        assert main([*command, "--model", str(model)]) == 1
        assert re.search(words.replace(method, "[a-z0-9-]+"), capsys.readouterr().err), command


def test_a_single_file_of_other_weights_is_refused_by_its_header(tmp_path, monkeypatch, capsys, picture):
    monkeypatch.chdir(tmp_path)
    picture.save("in.png")
    hollow(tmp_path / "m.safetensors", first_conv(9)(manifest("single")))
    monkeypatch.setattr("minidiffedit.sd.load_network", lambda *a: pytest.fail("weights were read"))
    assert main(["edit", "in.png", "--target", "x", "--model", "m.safetensors", "--dry-run"]) == 1
    assert "diffedit needs base weights" in capsys.readouterr().err


@pytest.mark.parametrize("kind", SINGLES)
def test_single_files_of_other_models(kind, tmp_path, refused):
    change, words = SINGLES[kind]
    entries = {k: e for k, e in manifest("single").items() if k != TEXT + "embeddings.position_ids"}
    refused(hollow(tmp_path / "model.safetensors", change(entries)), words)


# What is no model, but goes beside one: kind, for which model, what takes it.
BESIDE = {
    "LoRA, kohya": (named("lora_unet_down.alpha", f"lora_unet_{TO_K}.lora_down.weight"), "a LoRA", V1, "--lora"),
    "LoRA, the cases'": (named("unet.down_blocks.0.attentions.0.attn1.to_q.lora.down.weight", "x.lora.up.weight"),
                         "a LoRA", f"{V1} or v2", "--lora"),
    "LoRA, text alone": (named("lora_te_text.lora_down.weight", "x", "y"), "a LoRA", "do not tell", "--lora"),
    "LoRA, its text's": (named("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", "x", "y"),
                         "a LoRA", V1, "--lora"),
    "LoRA, peft": (named("unet.attn2.to_v.lora_A.weight", "unet.a.lora_B.weight"), "a LoRA", V1, "--lora"),
    "LoRA, old diffusers": (named("unet.attn2.processor.to_k_lora.down.weight", "b"), "a LoRA", V1, "--lora"),
    "LoRA, diffusers": (named("unet.attn2.to_k.lora.down.weight", "unet.b.lora.up.weight"), "a LoRA", V1, "--lora"),
    "a word, A1111": (named("emb_params"), "a learned word", V1, "--embedding"),
    "a word, old": (named("string_to_param.*", "x"), "a learned word", V1, "--embedding"),
    "a word, diffusers": (named("<cat>", shape=(768,)), "a learned word", V1, "--embedding"),
    "a word of several": (named("<cat>", shape=(3, 768)), "a learned word", V1, "--embedding"),
    "a word of the miniature": (named("<cat>", shape=(64,)), "a learned word", "texts are 64 wide", "--embedding"),
    "VAE": (lambda e: only(e, "first_stage_model."), "a VAE", V1, "--vae"),
    "VAE, bare": (lambda e: {k.removeprefix("first_stage_model."): v for k, v in only(e, "first_stage_model.").items()},
                  "a VAE", V1, "--vae"),
    "VAE, folder's": (lambda e: manifest("vae"), "a VAE", V1, "--vae"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BESIDE)
def test_what_goes_beside_a_model_is_named_with_what_takes_it(kind, tmp_path, refused):
    change, what, model, option = BESIDE[kind]
    path = hollow(tmp_path / "model.safetensors", change(manifest("single")))
    told = refused(path, f"{option.strip('-')}|give it with {option} beside --model", described=True)
    assert what in told["kind"] and model in told["for"] and told["use"] == option


def test_a_saved_edit_is_none_either(tmp_path, picture, folder, capsys):
    loaded = StableDiffusion.load(folder, device="cpu")
    state = tmp_path / "s.safetensors"
    save_state(edit(loaded, picture, target="a zebra", steps=4, maps=1, seed=0), state)
    with pytest.raises(ValueError, match="a saved edit, not a model; `minidiffedit resume` goes on from it"):
        StableDiffusion.load(state, device="cpu")
    assert main(["info", str(state)]) == 0
    assert "a saved edit by diffedit for" in (out := capsys.readouterr().out) and "taken by minidiffedit resume" in out


def folder_of(kind, folder):
    """A full-size folder of another model, without data."""
    unet = manifest("unet")
    config = folder / "unet" / "config.json"
    if kind == "SDXL":
        (folder / "text_encoder_2").mkdir(parents=True)
    elif kind == "SD3":
        (folder / "transformer").mkdir(parents=True)
    elif kind == "SDXL's UNet":
        return hollow_folder(folder, unet=proj_in_matrices(without(unet, "down_blocks.0.attentions.")))
    elif kind == "SD v2":
        return hollow_folder(folder, unet=width_1024(proj_in_matrices(unet)))
    elif kind == "SD v2 by its config":
        hollow_folder(folder)
        config.write_text(config.read_text().replace("768", "1024"))
        return folder
    elif kind == "SD v2, inpainting":
        hollow_folder(folder, unet=width_1024(unet) | {"conv_in.weight": ([320, 9, 3, 3], "F32")})
    elif kind == "inpainting by its weights alone":
        return hollow_folder(folder, unet=unet | {"conv_in.weight": ([320, 9, 3, 3], "F32")})
    elif kind == "inpainting by its config alone":
        hollow_folder(folder)
        config.write_text(config.read_text().replace('"in_channels": 4', '"in_channels": 9'))
        return folder
    elif kind == "fp8":
        return hollow_folder(folder, text_encoder=cast("F8_E5M2")(manifest("text_encoder")))
    elif kind == "VAE of another size":
        return hollow_folder(folder, vae=manifest("vae") | {"quant_conv.bias": ([9], "F32")})
    elif kind == "a single file":
        hollow(folder / "v1-5.safetensors", manifest("single"))
    elif kind == "empty":
        folder.mkdir()
    return folder


@pytest.mark.parametrize(
    "kind, words",
    [
        ("SDXL", "SDXL checkpoint"),
        ("SD3", "not a UNet of SD v1"),
        ("SDXL's UNet", "SDXL"),
        ("SD v2", V2),
        ("SD v2 by its config", "the UNet reads texts 1024 wide, the text encoder makes 768"),
        ("SD v2, inpainting", V2),
        ("inpainting by its weights alone", r"1 misshaped: conv_in.weight is \[320, 9, 3, 3\], not \[320, 4, 3, 3\]"),
        ("inpainting by its config alone", r"1 misshaped: conv_in.weight is \[320, 4, 3, 3\], not \[320, 9, 3, 3\]"),
        ("fp8", r"text_encoder/model.safetensors is stored in 8-bit floats"),
        ("VAE of another size", r"vae/diffusion.*1 misshaped: quant_conv.bias is \[9\], not \[8\]"),
        ("a single file", "no folder unet/ but v1-5.safetensors: give that file"),
        ("empty", "has no folder unet/"),
    ],
)
def test_folders_of_other_models(kind, words, tmp_path, refused):
    refused(folder_of(kind, tmp_path / "model"), words)


def test_sd_v2_is_told_at_any_size(tmp_path, refused, monkeypatch):
    for network, config in zip(tiny.FILES, (tiny.UNET, tiny.VAE_, tiny.CLIP)):
        monkeypatch.setitem(KINDS, network, lambda config=config: config)
    state = {k: t[:, :, 0, 0] if "proj_in.weight" in k else t for k, t in single_state().items()}
    refused(save(tmp_path / "m.safetensors", state), V2)


# ---------------------------------------------------------------- what is no safetensors file

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4265146304\n"
PICKLE = "pickle: it can run code|a pickle file: it can run code .* use the .safetensors twin"


def zipped(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"state_dict": {}}))
    return path.read_bytes()


CONTENTS = {
    "zipped pickle": (zipped, PICKLE),
    **{f"pickle protocol {n}": (lambda path, n=n: pickle.dumps({"a": [1] * 99}, n), PICKLE) for n in (2, 3, 4, 5)},
    "LFS pointer": (lambda path: POINTER, "Git LFS pointer .* run git lfs pull"),
    "HTML": (lambda path: b"\n  <!DOCTYPE html><html>404</html>", "HTML page, probably a failed download"),
    "HTML with a mark": (lambda path: b"\xef\xbb\xbf<html></html>", "HTML page"),
    "JSON": (lambda path: b'{"error":"Unauthorized"}', "no safetensors file .* download it again"),
    "noise": (lambda path: bytes(range(100, 200)), "no safetensors file"),
    "zeros": (lambda path: bytes(4096), "no safetensors file"),
    "GGUF": (lambda path: b"GGUF" + bytes(400), "a GGUF file"),
    "absurd header length": (lambda path: struct.pack("<Q", 2**63) + b"{}", "no safetensors file"),
    "header longer than safetensors'": (lambda path: struct.pack("<Q", 10**8 + 1) + b"{}", "no safetensors file"),
    "header longer than the file": (lambda path: struct.pack("<Q", 10**7) + b"{}", "cut off: 10 bytes .* 10000008"),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_files_of_other_kinds(content, tmp_path, refused):
    make, words = CONTENTS[content]
    path = tmp_path / "model.safetensors"
    path.write_bytes(make(path))
    refused(path, words)


PICTURES = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "avif": "AVIF"}


@pytest.mark.parametrize("suffix", PICTURES)
def test_a_picture_is_named_and_not_to_be_downloaded_again(suffix, tmp_path, refused, picture, folder, capsys):
    """Under its own name or another, given as a model, a VAE or a saved edit."""
    path = tmp_path / f"photo.{suffix}"
    try:
        picture.save(path)
    except (KeyError, OSError, ValueError):
        pytest.skip(f"this Pillow writes no {suffix}")
    words = rf"is a picture \({PICTURES[suffix]}\), where a .safetensors file is wanted"
    refused(path, words)
    (tmp_path / "model_index.json").write_text("{}" + " " * 20)
    refused(tmp_path / "model_index.json", "a file of settings; give the model's folder")
    named = path.rename(tmp_path / "photo.safetensors")
    refused(named, words)
    with pytest.raises(ValueError, match=words):
        StableDiffusion.load(folder, vae=named, device="cpu")
    with pytest.raises(ValueError, match=words):
        load_state(named, None)
    for door in (["resume", named], ["report", named]):
        assert main([*map(str, door), "--model", str(folder)]) == 1
        err = capsys.readouterr().err
        assert re.search(words, err) and "download" not in err


def test_a_cut_off_state_is_saved_not_downloaded_again(tmp_path):
    path = raw(tmp_path / "s.safetensors", TWO, bytes(32))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"damaged: .* save the edit again"):
        load_state(path, None)


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".CKPT"])
def test_pickles_are_told_by_their_name(suffix, tmp_path, refused):
    (tmp_path / f"model{suffix}").write_bytes(b"anything")
    refused(tmp_path / f"model{suffix}", PICKLE)


@pytest.mark.parametrize(
    "name, words",
    [
        ("diffusion_pytorch_model.bin", PICKLE),
        ("diffusion_pytorch_model.safetensors.index.json", "one shard of several.* merge them"),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", "one shard of several"),
        ("other.txt", "has no diffusion_pytorch_model.safetensors or .*; it has config.json, other.txt"),
    ],
)
def test_what_stands_in_a_folder_instead_of_the_weights(name, words, tmp_path, folder, refused):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "unet" / tiny.FILES["unet"]).rename(tmp_path / "m" / "unet" / name)
    if name.endswith(".bin"):
        (tmp_path / "m" / "unet" / name).write_bytes(pickle.dumps({"a": [1] * 99}))
    refused(tmp_path / "m", words)
    if "other" not in name:
        refused(tmp_path / "m" / "unet" / name, words)


def test_a_text_encoders_pickle_is_told(tmp_path, folder, refused):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "text_encoder" / tiny.FILES["text_encoder"]).unlink()
    (tmp_path / "m" / "text_encoder" / "pytorch_model.bin").write_bytes(pickle.dumps({"a": [1] * 99}))
    refused(tmp_path / "m", PICKLE)


def test_folders_one_level_off(tmp_path, folder, refused):
    whole = shutil.copytree(folder, tmp_path / "models" / "m")
    refused(whole.parent, rf"models has no folder unet/ but m/ has: give {whole}")
    for part in ("unet", "text_encoder", "scheduler"):
        refused(whole / part, rf"has no folder unet/: it is a part of the model {whole}; give that folder")
    refused(whole / "unet" / tiny.FILES["unet"], f"only the UNet; give the folder {whole}")
    refused(whole / "text_encoder" / tiny.FILES["text_encoder"], f"only the text encoder; give the folder {whole}")
    cache = tmp_path / "hub"
    (cache / "models--owner--name" / "snapshots").mkdir(parents=True)
    refused(cache, r"hub has no folder unet/: it is the hub's cache; give one of its ids \(owner/name\)")


def test_an_edit_says_it_too(tmp_path, folder, picture, capsys):
    """Before, a config.json that does not exist was no JSON."""
    picture.save(tmp_path / "a.png")
    whole = shutil.copytree(folder, tmp_path / "models" / "m")
    command = ["edit", str(tmp_path / "a.png"), "--target", "x", "--model"]
    for path, words in ((whole.parent, f"m/ has: give {whole}"), (whole / "vae", f"a part of the model {whole}")):
        assert main([*command, str(path)]) == 1 and words in capsys.readouterr().err
    shutil.rmtree(whole / "vae")
    assert main([*command, str(whole)]) == 1 and "has no folder vae/; give one by --vae" in capsys.readouterr().err
    lacking = {key: one for key, one in manifest("single").items() if not key.startswith("first_stage_model.")}
    single = hollow(tmp_path / "m.safetensors", lacking)
    assert main([*command, str(single), "--dry-run"]) == 1  # before, it had a cost
    assert "a checkpoint without its VAE; give one by --vae" in capsys.readouterr().err


def test_a_name_that_only_resembles_a_shard(tmp_path, refused):
    refused(hollow(tmp_path / "best-of-01.safetensors", manifest("unet")), "only the UNet")


def test_things_that_are_no_files(tmp_path, refused):
    (tmp_path / "dir.safetensors").mkdir()
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "dir.safetensors", "has no folder unet/")
    refused(tmp_path / "dangling.safetensors", "no such file or folder")
    refused(tmp_path / "loop.safetensors", "no such file or folder")
    refused(tmp_path / "pipe.safetensors", "not a regular file")
    refused(tmp_path / ("x" * 300 + ".safetensors"), "no such file or folder")


def test_a_file_without_permission(tmp_path, refused, monkeypatch):
    path = hollow(tmp_path / "model.safetensors", manifest("single"))
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything: let the opening fail as it would for others

        def denied(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.open", denied)
    refused(path, "model.safetensors cannot be read: Permission denied")


# ---------------------------------------------------------------- broken safetensors files

TWO = {"a": entry([4]), "b": entry([2, 2], 16)}
LENGTH = len(json.dumps(TWO))


@pytest.mark.parametrize(
    "size, words",
    [
        (0, r"0 bytes: empty or cut off\); download it again"),
        (1, "1 bytes: empty or cut off"),
        (7, "7 bytes: empty or cut off"),
        (8, "8 bytes: empty or cut off"),
        (9, f"cut off: 9 bytes on disk, over {8 + LENGTH} expected; download it again"),
        (8 + LENGTH // 2, "cut off"),
        (8 + LENGTH - 1, f"cut off: {7 + LENGTH} bytes on disk"),
        (8 + LENGTH, f"damaged: {8 + LENGTH} bytes on disk, {40 + LENGTH} expected; download it again"),
        (8 + LENGTH + 16, "damaged"),
        (8 + LENGTH + 31, f"{39 + LENGTH} bytes on disk, {40 + LENGTH} expected"),
        (8 + LENGTH + 33, f"{41 + LENGTH} bytes on disk, {40 + LENGTH} expected"),
        (8 + LENGTH + 5000, "damaged"),
    ],
)
def test_cut_off_at_every_boundary_and_too_long(size, words, tmp_path, refused):
    path = raw(tmp_path / "model.safetensors", TWO, bytes(32))
    path.write_bytes((path.read_bytes() + bytes(5000))[:size])
    refused(path, words)


HEADERS = {
    "overlap": ({"a": entry([4]), "b": entry([4], 8), "c": entry([2], 24)}, "damaged: .*[oO]ffset"),
    "the same place": ({"a": entry([8]), "b": entry([8])}, "damaged: .*[oO]ffset"),
    "hole": ({"a": entry([2]), "b": entry([4], 16)}, "damaged: .*[oO]ffset"),
    "late start": ({"a": entry([6], 8)}, "damaged: .*[oO]ffset"),
    "duplicate keys": (b'{"a":%s,"a":%s}' % ((json.dumps(entry([8])).encode(),) * 2), "the key 'a' stands twice"),
    "duplicate fields": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[8],"data_offsets":[0,32]}}', "'dtype' stands tw"),
    "size against shape": ({"a": entry([8]) | {"shape": [9]}}, "'a' has 32 bytes for F32"),
    "unknown dtype": ({"a": entry([8]) | {"dtype": "F31"}}, "damaged"),
    "no JSON": (b"{" + b"x" * 40, "header is not sound"),
    "no UTF-8": (b'{"\xff\xfe":{}}', "header is not sound"),
    "half a character": (b'{"\\ud800":%s}' % json.dumps(entry([8])).encode(), "damaged"),
    "too deep": (b'{"a":' + b"[" * 200_000, "header is not sound"),
    "a number of 10,000 digits": (b'{"a":' + b"9" * 10_000 + b"}", "header is not sound"),
    "from endless on": (b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[Infinity,1%s]}}' % (b"0" * 400), "not a few"),
    "not a number": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,32]}}', "header is not sound"),
    **{
        f"{field} = {value!r:.20}": ({"a": entry([8]) | {field: value}}, "damaged")
        for field, values in {
            "shape": [None, 8, "8", [-8], [8.0], [True] * 3, ["8"], {}, [[8]], [2**70]],
            "dtype": [None, 7, [], {}, ""],
            "data_offsets": [None, 32, [0], [0, 32, 32], [0, "32"], [32, 0], [-1, 31], [0, 2**64], [0.0, 32.0]],
        }.items()
        for value in values
    },
    **{f"an entry that is {value!r}": ({"a": value}, "damaged") for value in (None, 1, "x", [], {}, [1, 2])},
    "metadata that is no object": ({"__metadata__": [1], "a": entry([8])}, "damaged"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_are_not_sound(kind, tmp_path, refused):
    header, words = HEADERS[kind]
    refused(raw(tmp_path / "model.safetensors", header, bytes(32)), words)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, LENGTH + 8), cut=st.integers(0, 20), put=st.binary(max_size=6), grown=st.booleans())
def test_no_damage_leads_to_another_error(at, cut, put, grown, tmp_path_factory):
    """Any bytes replaced, removed or added, with the length corrected or not: read as it is, or a ValueError."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    text = json.dumps(TWO).encode()
    if grown:
        raw(path, text[:at] + put + text[at + cut :], bytes(32))
    else:
        whole = raw(path, text, bytes(32)).read_bytes()
        path.write_bytes(whole[:at] + put + whole[at + cut :])
    try:
        header = read_header(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert len(header) == 2 and all(
            torch.Size(shape).numel() * BYTES[dtype] == 16 for dtype, shape in header.values()
        )


# ---------------------------------------------------------------- configurations

WRONG = {
    "unet": {
        "block_out_channels": [[], "320", 320, [320.0], [0], [-16, 32], [16] * 9, [10**9], [[16]], [True], {"a": 1},
                               [16, 32, 32, 30], [6, 32, 32, 32]],
        "layers_per_block": [0, -1, 2.0, "2", True, [2], 10**9, 129],
        "attention_head_dim": [[5, 10, 20, 20], 3, 0], "norm_num_groups": [5, 0, "4"],
        "cross_attention_dim": [48, "24", [24]], "in_channels": [8, 9, 5], "out_channels": [8], "sample_size": [[8, 8]],
        "act_fn": ["gelu", 1, ["silu"]], "norm_eps": [1e-6, "1e-5", float("nan")], "flip_sin_to_cos": [False],
        "use_linear_projection": [True], "class_embed_type": ["timestep"], "resnet_skip_time_act": [True],
        "down_block_types": [["DownBlock2D"] * 4, "x"], "up_block_types": [[]], "dual_cross_attention": [True],
        "addition_embed_type": ["text_time"], "num_attention_heads": [8], "resnet_time_scale_shift": ["scale_shift"],
    },
    "vae": {
        "block_out_channels": [[8, 16, 16], []], "latent_channels": [16], "scaling_factor": ["x", 0, -1, float("inf")],
        "shift_factor": [0.1], "use_quant_conv": [False], "down_block_types": [["AttnDownEncoderBlock2D"] * 4],
    },
    "text_encoder": {
        "hidden_act": ["gelu"], "hidden_size": [32, 0, "24"], "num_attention_heads": [5, 0], "vocab_size": [49409],
        "num_hidden_layers": [129, 3, 1], "max_position_embeddings": [248], "layer_norm_eps": [1e-6],
        "model_type": ["t5"], "intermediate_size": [96],
    },
    "scheduler": {
        "num_train_timesteps": [100], "beta_schedule": ["linear", "squaredcos_cap_v2"], "beta_start": [0.0001],
        "trained_betas": [[0.1]],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def spare(folder, tmp_path_factory):
    """A copy whose configs the tests may write to; each puts them back."""
    return shutil.copytree(folder, tmp_path_factory.mktemp("spare") / "m")


@pytest.fixture
def config(spare):
    kept = {path: path.read_text() for path in spare.rglob("*.json")}
    yield lambda n: spare / n / ("scheduler_config.json" if n == "scheduler" else "config.json")
    for path, text in kept.items():
        path.write_text(text)


@pytest.mark.parametrize("network, field", [(network, field) for network, fields in WRONG.items() for field in fields])
def test_configs_that_contradict(network, field, spare, config, refused):
    path = config(network)
    sound = path.read_text()
    words = f"{field} is |types is |divide into|no multiple of|input channels|'s latents|texts .* wide|as configured"
    for value in WRONG[network][field]:
        path.write_text(json.dumps(json.loads(sound) | {field: value}))
        refused(spare, words)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"sample_size": ' + "9" * 10_000 + "}", "cannot be read as JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("null", "must hold a JSON object"),
        (None, "config.json cannot be read as JSON"),
    ],
)
@pytest.mark.parametrize("network", ["unet", "vae", "text_encoder", "scheduler"])
def test_configs_that_are_none(network, text, words, spare, config, refused):
    path = config(network)
    if text is None:
        path.unlink()
        if network == "scheduler":  # SD v1's is assumed
            assert main(["info", str(spare)]) == 0
            return
    else:
        path.write_text(text)
    refused(spare, words)


def test_sound_configs_may_hold_more(spare, config):
    extra = {"torch_dtype": "float16", "dtype": "float16", "_name_or_path": "x", "unknown": {"a": [1]}, "freq_shift": 0}
    for network in tiny.FILES:
        config(network).write_text(json.dumps(json.loads(config(network).read_text()) | extra))
    nulls = {"prediction_type": "epsilon", "trained_betas": None, "timestep_spacing": "leading", "clip_sample": False}
    config("scheduler").write_text(json.dumps(tiny.SCHEDULER | nulls))
    assert main(["info", str(spare)]) == 0
    assert torch.isfinite(StableDiffusion.load(spare, device="cpu").unet.conv_in.weight).all()
