"""What is not SD v1, or broken, is refused from names and headers, with what it is and what to do."""

import json
import os
import pickle
import re
import shutil
import struct
import zipfile

import pytest
import tiny
import torch
from files import entry, hollow, hollow_folder, manifest, raw, save, single_state
from hypothesis import given, settings
from hypothesis import strategies as st

from minidiffedit import StableDiffusion
from minidiffedit.cli import main
from minidiffedit.files.configs import KINDS
from minidiffedit.files.unsupported import BYTES, read_header


@pytest.fixture
def refused(monkeypatch, capsys):
    """Both doors, the library's and `info`, refuse a path with the same words before any weights are read."""
    monkeypatch.setattr("minidiffedit.sd.load_network", lambda *a: pytest.fail("weights were read"))

    def check(path, words):
        with pytest.raises(ValueError) as caught:
            StableDiffusion.load(path, device="cpu")
        assert re.search(words, str(caught.value)), str(caught.value)
        assert len(str(caught.value)) < 1000
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


def named(*keys, shape=(4, 768)):
    return lambda entries: {key: ([*shape], "F32") for key in keys}


V2 = "SD v2 .* use an SD v1 model"
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
    "LoRA, kohya": (named("lora_unet_down.alpha", "lora_te_text.lora_down.weight"), "a LoRA.* give it with --lora"),
    "LoRA, peft": (named("unet.a.lora_A.weight", "unet.a.lora_B.weight"), "a LoRA.* give it with --lora"),
    "LoRA, old diffusers": (named("unet.a.processor.to_q_lora.down.weight", "b"), "a LoRA.* give it with --lora"),
    "a word, A1111": (named("emb_params"), "a learned word .* not a checkpoint"),
    "a word, old": (named("string_to_param.*", "x"), "a learned word .* not a checkpoint"),
    "a word, diffusers": (named("<cat>", shape=(768,)), "a learned word .* not a checkpoint"),
    "ControlNet": (lambda e: e | {"control_model.zero_convs.0.0.weight": ([1], "F32")}, "a ControlNet"),
    "ControlNet, diffusers": (named("controlnet_cond_embedding.conv_in.weight", "x"), "a ControlNet"),
    "VAE": (lambda e: only(e, "first_stage_model."), "only the VAE; the whole model is needed"),
    "VAE, bare": (lambda e: {k.removeprefix("first_stage_model."): v for k, v in only(e, "first_stage_model.").items()},
                  "only the VAE; the whole model is needed"),
    "VAE, folder's": (lambda e: manifest("vae"), "only the VAE; the whole model is needed"),
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
    "another tensor": (lambda e: e | {f"x{i}": ([1], "F32") for i in range(4)}, r"\(4 unknown: x0, x1, x2\)"),
    "all three": (
        lambda e: without(e, UNET + "out.2") | {"x": ([1], "F32"), UNET + "out.0.weight": ([5], "F32")},
        r"\(2 missing: \S+out\.2\.bias, \S+out\.2\.weight; 1 unknown: x; "
        r"1 misshaped: \S+out\.0\.weight is \[5\], not \[320\]\)",
    ),
    "text encoder twice": (lambda e: e | {"cond_stage_model.transformer.final_layer_norm.bias": ([768], "F32")},
                           "1 unknown: cond_stage_model.transformer.final_layer_norm.bias"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SINGLES)
def test_single_files_of_other_models(kind, tmp_path, refused):
    change, words = SINGLES[kind]
    entries = {k: e for k, e in manifest("single").items() if k != TEXT + "embeddings.position_ids"}
    refused(hollow(tmp_path / "model.safetensors", change(entries)), words)


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
    refused(tmp_path / "m", words)
    if "other" not in name:
        refused(tmp_path / "m" / "unet" / name, words)


def test_a_name_that_only_resembles_a_shard(tmp_path, refused):
    refused(hollow(tmp_path / "best-of-01.safetensors", manifest("vae")), "only the VAE")


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
    "overlap": ({"a": entry([4]), "b": entry([4], 8), "c": entry([2], 24)}, "damaged: .*offset"),
    "the same place": ({"a": entry([8]), "b": entry([8])}, "damaged: .*offset"),
    "hole": ({"a": entry([2]), "b": entry([4], 16)}, "damaged: .*offset"),
    "late start": ({"a": entry([6], 8)}, "damaged: .*offset"),
    "duplicate keys": (b'{"a":%s,"a":%s}' % ((json.dumps(entry([8])).encode(),) * 2), "the key 'a' stands twice"),
    "duplicate fields": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[8],"data_offsets":[0,32]}}', "'dtype' stands tw"),
    "size against shape": ({"a": entry([8]) | {"shape": [9]}}, "'a' has 32 bytes for F32"),
    "unknown dtype": ({"a": entry([8]) | {"dtype": "F31"}}, "damaged"),
    "no JSON": (b"{" + b"x" * 40, "header is not sound"),
    "no UTF-8": (b'{"\xff\xfe":{}}', "header is not sound"),
    "half a character": (b'{"\\ud800":%s}' % json.dumps(entry([8])).encode(), "damaged"),
    "too deep": (b'{"a":' + b"[" * 200_000, "header is not sound"),
    "a number of 10,000 digits": (b'{"a":' + b"9" * 10_000 + b"}", "header is not sound"),
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
        "rescale_betas_zero_snr": [True], "trained_betas": [[0.1]],
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


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_other_predictions(kind, spare, config, refused):
    config("scheduler").write_text(json.dumps(tiny.SCHEDULER | {"prediction_type": kind}))
    refused(spare, f"a {kind} model; only epsilon")


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
    for network, known in tiny.CONFIGS.items():
        config(network).write_text(json.dumps(known | extra))
    nulls = {"prediction_type": "epsilon", "trained_betas": None, "timestep_spacing": "leading", "clip_sample": False}
    config("scheduler").write_text(json.dumps(tiny.SCHEDULER | nulls))
    assert main(["info", str(spare)]) == 0
    assert torch.isfinite(StableDiffusion.load(spare, device="cpu").unet.conv_in.weight).all()
