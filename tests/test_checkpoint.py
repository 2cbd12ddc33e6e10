"""Everything of SD v1 that is accepted, and that all of it loads to the same tensors."""

import json
import shutil
from dataclasses import replace

import pytest
import tiny
import torch
from files import CONFIGS, MANIFESTS, SHAPES, hollow, hollow_folder, manifest, raw, save, single_state
from safetensors.torch import load_file

from minidiffedit import StableDiffusion
from minidiffedit.checkpoint import FOLDER, SINGLE, build, check_tensors, find_part, open_checkpoint
from minidiffedit.cli import main
from minidiffedit.clip_image import CLIPImageConfig
from minidiffedit.files.configs import KINDS, read_configs
from minidiffedit.files.unsupported import TensorInfo, is_leftover, read_header

UNET = "model.diffusion_model."
EXAMPLE_PARAMETERS = 303_179_776 + 5 * (10 * 1024**2 + 11 * 1024) + 2 * 1024 + 1025 * 768 + 768  # CLIP's tower, blocks
PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}


# ---------------------------------------------------------------- full size, without data


@pytest.mark.parametrize("network", tiny.FILES)
def test_the_numbers_of_sd_v1_are_the_published_ones(network):
    """Also those that no tensor's shape tells: heads, groups, the latents' scale (which the VAE's file leaves out)."""
    said = {"scaling_factor": 0.18215} | json.loads((CONFIGS / "v1-5" / network / "config.json").read_text())
    own = vars(KINDS[network]())
    assert {name: list(one) if isinstance(one, tuple) else one for name, one in own.items()} == {
        name: said[name] for name in own
    }


@pytest.mark.parametrize("name", SHAPES)
def test_names_and_shapes_equal_the_manifests(name, tmp_path):
    entries = manifest(name)
    header = {key: TensorInfo(dtype, tuple(shape)) for key, (shape, dtype) in entries.items()}
    networks, names = ([name.split(",")[0]], FOLDER) if name != "single" else (list(tiny.FILES), SINGLE)
    parts = [find_part(n, KINDS[n](), tmp_path, header, names[n]) for n in networks]
    check_tensors(tmp_path, header, parts)
    ours = {key: list(part.shapes[name]) for part in parts for name, key in part.keys.items()}
    for key in [key for key in ours if ".mid.attn_1." in key and len(ours[key]) == 2]:
        ours[key] += [1, 1]  # 8 of them, the only difference between the layouts
    assert ours == {key: shape for key, (shape, _) in entries.items() if not is_leftover(key)}


def test_the_rename_table_is_the_official_one():
    expected = json.loads((MANIFESTS / "map_diffusers_to_compvis.json").read_text())
    for network, kind in ((network, KINDS[network]) for network in tiny.FILES):
        ours = {name: SINGLE[network](name)[0] for name in build(network, kind()).state_dict()}
        wanted = {name.removeprefix("text_model."): key for name, key in expected[network].items()}
        wanted.pop("embeddings.position_ids", None)
        assert ours == wanted


ADDED = {"instruct-pix2pix": (8, "InstructPix2Pix"), "inpainting": (9, "inpainting")}
ADDED |= {"paint-by-example": (9, "Paint by Example")}


def added(layout, network):
    """The manifest of a network in one of the layouts beside SD v1's."""
    if network == "image_encoder":
        entries = json.loads((MANIFESTS / "diffusers_image_encoder.json").read_text())
        return {key: (shape, dtype) for key, (shape, dtype) in entries.items()}
    own = json.loads((MANIFESTS / "added_unets.json").read_text())[layout] if network == "unet" else {}
    return manifest(network) | {key: (shape, dtype) for key, (shape, dtype) in own.items()}


def test_the_manifests_of_the_added_layouts_are_the_peers_classes():
    """Built anew without memory: names, shapes, and the first convolution's channels, all in which the UNets differ."""
    from bench import manifests

    assert json.loads((MANIFESTS / "added_unets.json").read_text()) == manifests.added_unets()
    assert json.loads((MANIFESTS / "diffusers_image_encoder.json").read_text()) == manifests.image_encoder()
    first = {layout: {"conv_in.weight": [[320, channels, 3, 3], "F32"]} for layout, (channels, _) in ADDED.items()}
    assert manifests.added_unets() == first


@pytest.mark.parametrize("layout", ADDED)
def test_the_added_layouts_have_the_manifests_names_and_shapes(layout, tmp_path):
    channels, _ = ADDED[layout]
    encoder = "image_encoder" if layout == "paint-by-example" else "text_encoder"
    for network in ("unet", "vae", encoder):
        config = KINDS[network]()
        config = replace(config, in_channels=channels) if network == "unet" else config
        entries = added(layout, network)
        header = {key: TensorInfo(dtype, tuple(shape)) for key, (shape, dtype) in entries.items()}
        part = find_part(network, config, tmp_path, header, FOLDER[network])
        check_tensors(tmp_path, header, [part])
        ours = {key: [*part.shapes[name]] for name, key in part.keys.items()}
        assert ours == {key: shape for key, (shape, _) in entries.items() if not is_leftover(key)}


@pytest.mark.parametrize("layout", ADDED)
@pytest.mark.parametrize("form", ["folder", "single file"])
def test_a_full_size_checkpoint_of_each_opens_and_is_described(layout, form, tmp_path, capsys):
    channels, said = ADDED[layout]
    conv = {f"{UNET}input_blocks.0.0.weight": ([320, channels, 3, 3], "F32")}
    if form == "folder":
        path = hollow_folder(tmp_path / "m", unet=added(layout, "unet"))
        config = path / "unet" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": channels}))
        if layout == "paint-by-example":
            shutil.rmtree(path / "text_encoder")
            hollow(path / "image_encoder" / "model.safetensors", added(layout, "image_encoder"))
            (path / "image_encoder" / "config.json").write_text('{"hidden_act": "quick_gelu", "image_size": 224}')
    else:
        entries = manifest("single") | conv
        if layout == "paint-by-example":
            names = {
                name: SINGLE["image_encoder"](name)[0]
                for name in build("image_encoder", CLIPImageConfig()).state_dict()
            }
            shapes = {
                name: [*tensor.shape] for name, tensor in build("image_encoder", CLIPImageConfig()).state_dict().items()
            }
            entries = {key: one for key, one in entries.items() if not key.startswith("cond_stage_model.")}
            for name, key in names.items():
                shape = shapes[name]
                entries[key] = ([3 * shape[0], *shape[1:]] if ".c_qkv." in key else shape), "F32"
        path = hollow(tmp_path / "m.safetensors", entries)
    assert main(["info", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kind"] == f"Stable Diffusion v1, {said}" and told["layout"] == form
    encoder = {"image_encoder": EXAMPLE_PARAMETERS} if layout == "paint-by-example" else {}
    wanted = {n: count for n, count in PARAMETERS.items() if not encoder or n != "text_encoder"} | encoder
    wanted["unet"] += 320 * 9 * (channels - 4)
    found = {name: network["parameters"] for name, network in told["networks"].items()}
    if layout == "paint-by-example" and form == "single file":  # of its file, queries and keys of the blocks, too
        found["image_encoder"] -= 5 * 2 * (1024 + 1) * 1024
    assert found == wanted


@pytest.mark.parametrize("version", ["v1-4", "v1-5"])
def test_official_configs_are_the_defaults(version):
    assert read_configs(CONFIGS / version) == {network: KINDS[network]() for network in tiny.FILES}


@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_a_full_size_checkpoint_opens_and_is_described(layout, tmp_path, capsys):
    if layout == "folder":
        path = hollow_folder(tmp_path / "v1", vae=manifest("vae, old names"))
    else:
        path = hollow(tmp_path / "v1-5-pruned-emaonly.safetensors", manifest("single"))
    assert main(["info", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["layout"], told["training_size"]) == ("Stable Diffusion v1", layout, 512)
    assert {name: network["parameters"] for name, network in told["networks"].items()} == PARAMETERS
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "859,520,964 parameters in 686 tensors, F32" in out and out.count("\n") == 5


def test_opening_reads_no_weights(tmp_path, monkeypatch):
    """Of 4.3 GB that are not there, only the header may be touched."""
    path = hollow(tmp_path / "v1.safetensors", manifest("single"))
    monkeypatch.setattr(torch.Tensor, "to", lambda *a, **k: pytest.fail("weights were read"))
    assert open_checkpoint(path).parts["unet"].keys["conv_in.bias"] == "model.diffusion_model.input_blocks.0.0.bias"


# ---------------------------------------------------------------- small, with data


def states():
    return {n: dict(tiny.tensors(n, module)) for n, module in zip(tiny.FILES, tiny.networks())}


@pytest.fixture(scope="module")
def folder(deep_folder):
    return deep_folder


@pytest.fixture(scope="module")
def reference():
    return {n: module.state_dict() for n, module in zip(tiny.FILES, tiny.networks())}


def assert_same(sd, reference, cast=lambda t: t):
    for network, module in zip(tiny.FILES, (sd.unet, sd.vae, sd.clip)):
        loaded = module.state_dict()
        assert loaded.keys() == reference[network].keys() and not module.training
        for name, tensor in loaded.items():
            assert torch.equal(tensor, cast(reference[network][name])), name
        assert not any(p.requires_grad for p in module.parameters())


def write(folder, state, file=lambda name: name):
    for network, name in tiny.FILES.items():
        save(folder / network / file(name), state[network])
        (folder / network / "config.json").write_text(json.dumps(tiny.CONFIGS[network]))
    return folder


def rename(state, *pairs):
    def renamed(key):
        for old, new in pairs:
            key = key.replace(old, new)
        return key

    return {renamed(key): tensor for key, tensor in state.items()}


OLD = ((".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.0.", ".proj_attn."))
IDS = "text_model.embeddings.position_ids"


def old_names(state):
    state["vae"] = rename(state["vae"], *OLD)


def convolutions(state):
    state["vae"] = {k: t[..., None, None] if t.ndim == 2 else t for k, t in state["vae"].items()}


def flat(state):
    state["text_encoder"] = rename(state["text_encoder"], ("text_model.", ""))


def leftovers(state):
    state["text_encoder"] |= {IDS: torch.arange(77)[None], "logit_scale": torch.tensor(4.6)}
    state["unet"] |= {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}


def float_ids(state):
    state["text_encoder"][IDS] = torch.rand(1, 77)


def damaged_ids(state):
    state["text_encoder"]["text_model.embeddings.position_ids"] = torch.full((3,), torch.nan)


def renamed_group_norm(state):
    state["vae"] = rename(state["vae"], *OLD[:2])  # some under the old names, some under the new


def doubles(state):
    state["unet"] = {key: tensor.double() for key, tensor in state["unet"].items()}


@pytest.mark.parametrize(
    "change", [old_names, convolutions, flat, leftovers, float_ids, damaged_ids, renamed_group_norm, doubles]
)
def test_folder_variations_load_to_the_same_tensors(change, tmp_path, reference):
    state = states()
    change(state)
    assert_same(StableDiffusion.load(write(tmp_path, state), device="cpu"), reference)


HALF = {
    "fp16": lambda t: t.half(), "bf16": lambda t: t.bfloat16(), "mixed": lambda t: t.half() if t.ndim > 1 else t,
}  # fmt: skip


@pytest.mark.parametrize("run", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", HALF)
def test_stored_types_are_cast_to_the_run_type(stored, run, tmp_path, reference):
    state = {n: {key: HALF[stored](t) for key, t in part.items()} for n, part in states().items()}
    sd = StableDiffusion.load(write(tmp_path, state), device="cpu", dtype=run)
    assert_same(sd, reference, lambda t: HALF[stored](t).to(run))


def schedule(state):
    names = [key for key in manifest("single") if "." not in key]
    assert len(names) == 12
    state |= {name: torch.zeros(1000) for name in names} | {"model_ema.decay": torch.tensor(0.9)}
    state |= {"model_ema.diffusion_modelinput_blocks00weight": torch.zeros(16, 4, 3, 3)}  # of v1-5-pruned
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return state | {"cond_stage_model.logit_scale": torch.tensor(4.6)}


SINGLES = {
    "as official": schedule,
    "bare": lambda state: state,
    "NovelAI's text encoder": lambda state: rename(state, ("transformer.text_model.", "transformer.")),
    "matrices in the VAE": lambda state: {k: t[:, :, 0, 0] if "attn_1" in k and t.ndim > 1 else t
                                          for k, t in state.items()},
    "diffusers' names in the VAE": lambda state: rename(state, *((f"attn_1{old}", f"attn_1{new}") for old, new in (
        (".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".proj_out.", ".to_out.0.")))),
    "those and its norm's": lambda state: rename(state, *((f"attn_1{old}", f"attn_1{new}") for old, new in (
        (".q.", ".query."), (".k.", ".key."), (".v.", ".value."), (".proj_out.", ".proj_attn."), (".norm.",
        ".group_norm.")))),
    "sorted otherwise": lambda state: dict(reversed(state.items())),
}  # fmt: skip


@pytest.mark.parametrize("change", SINGLES)
def test_single_files_load_to_the_same_tensors(change, tmp_path, reference, small_single_files, capsys):
    path = save(tmp_path / "any name", SINGLES[change](single_state()))
    assert_same(StableDiffusion.load(path, device="cpu"), reference)
    assert main(["info", str(path)]) == 0 and "single file, trained at 64 px" in capsys.readouterr().out


LEFT = {
    "a VAE's loss": {"first_stage_model.loss.logvar": 1, "first_stage_model.loss.discriminator.main.0.weight": 4},
    "counters": {"global_step": 1, "ema_num_updates": 1, "state_dict.epoch": 1},
    "a projection": {"cond_stage_model.transformer.text_projection.weight": 24},
    "a second prefix": {"cond_stage_model.transformer.final_layer_norm.bias": 24, "net.time_embed.0.bias": 64},
    "a safety checker": {"safety_checker.vision_model.vision_model.embeddings.position_ids": 4,
                         "safety_checker.concept_embeds": 17, "safety_checker.text_model.x": 1},
    "an embedding manager": {"embedding_manager.string_to_param_dict.*": 24, "embedding_manager.initial.*": 24},
    "one of another type": {"x.y": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT)
def test_what_trainers_left_is_passed_over_with_its_count(kind, tmp_path, reference, small_single_files):
    extra = {key: torch.ones(n, dtype=torch.int64 if n == 1 else torch.float32) for key, n in LEFT[kind].items()}
    path = save(tmp_path / "m.safetensors", schedule(single_state()) | extra)
    counted = sum(not key.endswith("position_ids") for key in extra)
    with pytest.warns(UserWarning) as said:
        assert_same(StableDiffusion.load(path, device="cpu"), reference)
    (line,) = [str(one.message) for one in said]
    assert f": ignored {counted} tensor{'s' if counted > 1 else ''} that SD v1 has not: {min(extra)}" in line


@pytest.mark.parametrize("change, said", [
    (lambda state, key: state.pop(key), "1 missing: {0}; 1 unknown: x.y"),
    (lambda state, key: state.update({key: torch.zeros(3)}), "1 unknown: x.y; 1 misshaped: {0} is [3], not [4]"),
])  # fmt: skip
def test_unknown_tensors_are_named_beside_what_does_not_fit(change, said, tmp_path, small_single_files):
    state, key = single_state() | {"x.y": torch.zeros(1)}, f"{UNET}out.2.bias"
    change(state, key)
    with pytest.raises(ValueError) as refusal:
        open_checkpoint(save(tmp_path / "m.safetensors", state))
    assert said.format(key) in str(refusal.value)


def test_official_leftovers_need_no_word(tmp_path, small_single_files, recwarn):
    open_checkpoint(save(tmp_path / "m.safetensors", schedule(single_state())))
    assert not recwarn.list


@pytest.mark.parametrize("name", ["m.ckpt", "m.pt", "m.bin", "m.CKPT", "m"])
def test_the_content_tells_what_a_file_is_not_its_name(name, tmp_path, reference, small_single_files):
    assert_same(StableDiffusion.load(save(tmp_path / name, single_state()), device="cpu"), reference)


@pytest.mark.parametrize("network, name", [
    ("unet", "diffusion_pytorch_model.bin"), ("vae", "diffusion_pytorch_model.bin"),
    ("text_encoder", "pytorch_model.bin"),
])  # fmt: skip
def test_a_folders_file_named_as_a_pickle(network, name, tmp_path, folder, reference):
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" / network / tiny.FILES[network]
    path.rename(path.with_name(name))
    assert_same(StableDiffusion.load(tmp_path / "m", device="cpu"), reference)


@pytest.mark.parametrize("said", [32, 512, 96, [64, 64], None, 64])
def test_full_widths_decide_where_the_config_disagrees(said, tmp_path, capsys):
    path = hollow_folder(tmp_path / "v1")
    config = path / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": said}))
    assert main(["info", str(path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["training_size"] == 512
    assert err.count("\n") == (said not in (None, 64)) and (not err or f"sample_size is {said}, but" in err)


def test_other_widths_keep_the_size_of_their_config(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m/unet/config.json").write_text(json.dumps(tiny.CONFIGS["unet"] | {"sample_size": 12}))
    assert read_configs(tmp_path / "m")["unet"].sample_size == 12


@pytest.mark.parametrize("first", [0x80, ord("<"), ord("P"), 0x00, ord("{")])
def test_the_first_byte_of_a_sound_file_may_be_any(first, tmp_path, folder, reference):
    """It is the low byte of the header's length, which spaces may pad."""
    shutil.copytree(folder, tmp_path / "m")
    for network, file in tiny.FILES.items():
        path = tmp_path / "m" / network / file
        content = path.read_bytes()
        n = int.from_bytes(content[:8], "little")
        raw(path, content[8 : 8 + n], content[8 + n :], pad=(first - n) % 256)
        assert path.read_bytes()[0] == first
    assert_same(StableDiffusion.load(tmp_path / "m", device="cpu"), reference)


# ---------------------------------------------------------------- which file of a folder


@pytest.mark.parametrize(
    "there, variant, dtype, taken",
    [
        (["", ".fp16"], None, torch.float32, ""),
        (["", ".fp16"], None, torch.float16, ".fp16"),
        (["", ".fp16"], None, torch.bfloat16, ".fp16"),
        (["", ".fp16"], "fp16", torch.float32, ".fp16"),
        ([".fp16"], None, torch.float32, ".fp16"),
        ([""], None, torch.float16, ""),
        (["", ".fp16", ".non_ema"], None, torch.float32, ""),
        (["", ".non_ema"], "non_ema", torch.float32, ".non_ema"),
    ],
)
def test_the_nearest_file_is_taken(there, variant, dtype, taken, tmp_path, folder):
    shutil.copytree(folder, tmp_path / "m")
    for network, name in tiny.FILES.items():
        plain = tmp_path / "m" / network / name
        for suffix in there:
            if suffix == ".fp16" or (suffix == ".non_ema" and network == "unet"):
                shutil.copy(plain, plain.with_suffix(f"{suffix}.safetensors"))
        if "" not in there:
            plain.unlink()
    for network, part in open_checkpoint(tmp_path / "m", variant=variant, dtype=dtype).parts.items():
        suffix = "" if taken == ".non_ema" and network != "unet" else taken
        assert part.path.name == tiny.FILES[network].replace(".", f"{suffix}.", 1)


def test_a_variant_that_is_not_there_or_unknown(folder):
    with pytest.raises(ValueError, match=r"has no diffusion_pytorch_model.fp16.safetensors; it has config.json, diff"):
        open_checkpoint(folder, variant="fp16")
    with pytest.raises(ValueError, match="variant must be"):
        open_checkpoint(folder, variant="int8")


# ---------------------------------------------------------------- as other tools write it


def test_what_diffusers_and_transformers_save_today(tmp_path, folder, reference):
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    peers = {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "vae": AutoencoderKL.from_pretrained(folder / "vae"),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**tiny.CONFIGS["text_encoder"])),
    }
    text = load_file(folder / "text_encoder" / "model.safetensors")
    names = peers["text_encoder"].state_dict().keys()
    prefixed = any(name.startswith("text_model.") for name in names)
    text = text if prefixed else {key.removeprefix("text_model."): t for key, t in text.items()}
    peers["text_encoder"].load_state_dict(text, strict=False)
    for network, peer in peers.items():
        peer.save_pretrained(tmp_path / network)
    PNDMScheduler.from_config(tiny.SCHEDULER).save_pretrained(tmp_path / "scheduler")
    saved = json.loads((tmp_path / "text_encoder" / "config.json").read_text())
    assert ("dtype" in saved) != ("torch_dtype" in saved)  # today the one, before transformers 5 the other
    assert_same(StableDiffusion.load(tmp_path, device="cpu"), reference)


def test_symlinks_are_followed(tmp_path, folder, reference):
    (tmp_path / "m").symlink_to(folder)
    assert_same(StableDiffusion.load(tmp_path / "m", device="cpu"), reference)
    link = tmp_path / "blob"
    link.symlink_to(folder / "unet" / tiny.FILES["unet"])
    assert read_header(link)["conv_in.weight"] == ("F32", (16, 4, 3, 3))


# ---------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize(
    "value, dtype, message",
    [
        (torch.nan, "float32", "conv_norm_out.bias holds NaN or infinity; the file is damaged"),
        (torch.inf, "float32", "conv_norm_out.bias holds NaN or infinity"),
        (-torch.inf, "bfloat16", "conv_norm_out.bias holds NaN or infinity"),
        (1e5, "float16", "conv_norm_out.bias holds numbers too large for torch.float16; use bfloat16 or float32"),
        (1e5, "bfloat16", None),
    ],
)
def test_weights_must_be_finite(value, dtype, message, tmp_path):
    state = states()
    state["unet"]["conv_norm_out.bias"][3] = value
    write(tmp_path, state)
    open_checkpoint(tmp_path)  # nothing in the header tells
    if message is None:
        StableDiffusion.load(tmp_path, device="cpu", dtype=dtype)
    else:
        with pytest.raises(ValueError, match=message):
            StableDiffusion.load(tmp_path, device="cpu", dtype=dtype)
