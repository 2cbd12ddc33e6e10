"""LoRAs and learned words: diffusers' names for the same layers, the formula by hand, diffusers' own learned words."""

import json
import re
import sys
from importlib.metadata import version

import pytest
import tiny
import torch
from commands import failed, ran
from files import hollow, hollow_folder, save
from mutants import mutant, run
from PIL import Image
from proofs import pipeline
from safetensors.torch import save_file
from torch.torch_version import TorchVersion

from minidiffedit import StableDiffusion, edit, load_state, resume, save_state
from minidiffedit.checkpoint import compvis_unet, open_checkpoint
from minidiffedit.files.addons import with_add_ons
from minidiffedit.methods.words import words_of

QUICK = {"source": "a horse", "target": "a zebra", "steps": 4, "maps": 1, "seed": 0}
FAST = ["--source", "a horse", "--target", "a zebra", "--steps", "4", "--maps", "1", "--seed", "0"]


@pytest.fixture(scope="module")
def folder(deep_folder):
    return deep_folder


@pytest.fixture(scope="module")
def found(folder):
    """What is judged before any weights are read."""
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def plain(folder):
    return StableDiffusion.load(folder, device="cpu")


def layers():
    """Each matrix and convolution of the tiny UNet and text encoder, and a random pair for it: ranks 2, 3 and 4."""
    unet, _, clip = tiny.networks()
    generator = torch.Generator().manual_seed(1)
    for prefix, module in (("unet.", unet), ("text_encoder.text_model.", clip)):
        for name, one in module.named_parameters():
            if name.endswith(".weight") and one.ndim in (2, 4) and not name.startswith("embeddings."):
                out, *inner = one.shape
                rank = 2 + out % 3
                down = 0.3 * torch.randn(rank, *inner, generator=generator)
                up = 0.3 * torch.randn(out, rank, *[1] * len(inner[1:]), generator=generator)
                yield prefix + name.removesuffix(".weight"), down, up


def kohya(name, blocks=lambda name: name):
    network, _, layer = name.partition(".")
    return {"unet": "lora_unet_", "text_encoder": "lora_te_"}[network] + blocks(layer).replace(".", "_")


def compvis(name):
    return kohya(name, lambda layer: compvis_unet(layer + ".weight").removesuffix(".weight"))


def old(name):
    """As diffusers named what its attention processors held, before peft."""
    name = re.sub(r"self_attn\.(q|k|v|out)_proj", r"self_attn.to_\1", name.replace(".to_out.0", ".to_out"))
    return name.replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.")


NAMINGS = {
    "kohya": (kohya, ".lora_down", ".lora_up"),
    "compvis": (lambda name: compvis(name) if name.startswith("unet") else kohya(name), ".lora_down", ".lora_up"),
    "peft": (lambda name: name, ".lora_A", ".lora_B"),
    "diffusers": (lambda name: name, ".lora.down", ".lora.up"),
    "processors": (old, "_lora.down", "_lora.up"),
}


def lora(path, naming="kohya", alpha=1.5, only="", dtype=torch.float32, metadata=None):
    """A file for every layer (of the processors: for every attention), and what it adds by layer."""
    state, added = {}, {}
    call, down_end, up_end = NAMINGS[naming]
    for name, down, up in layers():
        if only not in name or (naming == "processors" and not re.search(r"\.(attn\d|self_attn)\.", name)):
            continue
        down, up = down.to(dtype), up.to(dtype)
        state |= {f"{call(name)}{down_end}.weight": down, f"{call(name)}{up_end}.weight": up}
        if alpha is not None:
            state[f"{call(name)}.alpha"] = torch.tensor(alpha)
        factor = 1 if alpha is None else alpha / len(down)
        added[name] = factor * torch.einsum("or...,r...->o...", up.double().flatten(1), down.double().flatten(1))
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata)
    return path, added


def weights(sd):
    named = [("unet.", sd.unet), ("text_encoder.text_model.", sd.clip), ("vae.", sd.vae)]
    return {prefix + name: one for prefix, module in named for name, one in module.state_dict().items()}


def check_added(plain, changed, added, scale):
    """The weights are the plain ones with so much added, to the last bits of float32; all others are bit-equal."""
    before, after = weights(plain), weights(changed)
    assert before.keys() == after.keys() and added
    for name, one in before.items():
        if (layer := name.removesuffix(".weight")) in added and name.endswith(".weight"):
            expected = one.double() + scale * added[layer].reshape(one.shape)
            assert not after[name].equal(one) and (after[name] - expected).abs().max() < 1e-6
        else:
            assert after[name].equal(one), name


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_lora_adds_its_product_to_each_layer_under_every_name(naming, folder, plain, tmp_path):
    path, added = lora(tmp_path / "style.safetensors", naming)
    check_added(plain, StableDiffusion.load(folder, device="cpu", lora=[(path, 0.8)]), added, 0.8)


@pytest.mark.skipif(TorchVersion(version("diffusers")) < (0, 35), reason="it does not know all of kohya's names yet")
def test_kohyas_names_are_those_that_diffusers_reads():
    """Its converter of names, which is not ours, finds the same layer behind each."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers as convert
    from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    asked = {name: down for name, down, _ in layers() if re.search(r"attn|ff|proj|mlp|conv|time", name)}
    state = {}
    for name, down in asked.items():
        state |= {f"{kohya(name)}.lora_down.weight": down, f"{kohya(name)}.lora_up.weight": down}
    converted, _ = convert(state)
    unet = {key.removeprefix("unet."): one for key, one in converted.items() if key.startswith("unet.")}
    text = {key: one for key, one in converted.items() if key.startswith("text_encoder.")}
    found = {f"unet.{key}": one for key, one in convert_unet_state_dict_to_peft(unet).items()}
    found |= convert_state_dict_to_peft(text)
    found = {key.removesuffix(".lora_A.weight"): one for key, one in found.items() if key.endswith("lora_A.weight")}
    assert found.keys() == asked.keys() and all(found[name] is one for name, one in asked.items())


def test_scales_add_up_and_zero_changes_no_bit(folder, plain, tmp_path):
    path, added = lora(tmp_path / "a:b.safetensors", alpha=None, only="attn2")  # without alpha it is the rank
    check_added(plain, StableDiffusion.load(folder, device="cpu", lora=[f"{path}:0.5", f"{path}:-.25"]), added, 0.25)
    none = StableDiffusion.load(folder, device="cpu", lora=[f"{path}:0"])
    assert all(one.equal(weights(none)[name]) for name, one in weights(plain).items())


def test_half_precision_is_merged_in_float32(folder, plain, tmp_path):
    path, added = lora(tmp_path / "half.safetensors", dtype=torch.float16)
    check_added(plain, StableDiffusion.load(folder, device="cpu", lora=[str(path)]), added, 1)
    rounded = StableDiffusion.load(folder, device="cpu", dtype="bfloat16", lora=[path])
    exact = StableDiffusion.load(folder, device="cpu", lora=[path])
    assert all(one.equal(weights(exact)[name].bfloat16()) for name, one in weights(rounded).items())


def test_one_network_at_a_time_reads_it_each_time(folder, tmp_path):
    path, _ = lora(tmp_path / "style.safetensors")
    sd, again = (StableDiffusion.load(folder, device="cpu", lora=[path], low_memory=low) for low in (False, True))
    again.text(["a horse"]), again.unet.conv_in
    read = weights(again)  # each network from its file once more
    assert all(one.equal(read[name]) for name, one in weights(sd).items())


def test_pefts_settings_count(folder, plain, tmp_path):
    """alpha 6 for all but the layers that end in to_q, divided by the rank's root where the note says so."""
    said = {"unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_q": 12}, "unet.use_rslora": False}
    path, added = lora(
        tmp_path / "noted.safetensors", "peft", None, "attn1", metadata={"lora_adapter_metadata": json.dumps(said)}
    )
    ranks = {name: len(down) for name, down, _ in layers()}
    alphas = {name: 12 if name.endswith("attn1.to_q") else 6 for name in added}
    scaled = {name: one * alphas[name] / ranks[name] for name, one in added.items()}
    check_added(plain, StableDiffusion.load(folder, device="cpu", lora=[path]), scaled, 1)
    for wrong, reason in (({"unet.use_dora": True}, "DoRA"), ({"unet.lora_alpha": "x"}, "no number"), ([], "note"),
                          ({"unet.lora_alpha": 10**400}, "no number")):  # fmt: skip
        lora(path, "peft", None, "attn1", metadata={"lora_adapter_metadata": json.dumps(wrong)})
        with pytest.raises(ValueError, match=reason):
            StableDiffusion.load(folder, device="cpu", lora=[path])


def named(*keys, shape=(4,)):
    return {key: torch.zeros(shape) for key in keys}


def pair(base, down, up):
    return {f"{base}.lora_down.weight": torch.zeros(down), f"{base}.lora_up.weight": torch.zeros(up)}


Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
DOTTED = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
MISFITS = {
    "LoHa": (named(f"{Q}.hada_w1_a"), "is a LoHa .*--lora takes LoRAs for SD v1"),
    "LoKr": (named(f"{Q}.lokr_w1"), "is a LoKr"),
    "OFT": (named(f"{Q}.oft_blocks"), "is an OFT"),
    "DoRA": (pair(Q, (4, 16), (16, 4)) | named(f"{Q}.dora_scale"), "is a DoRA"),
    "LoCon, Tucker": (named(f"{Q}.lora_mid.weight"), "Tucker"),
    "SDXL, kohya": (pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", (4, 16), (16, 4)), "a LoRA for SDXL"),
    "SDXL, by width": (pair(K, (4, 2048), (16, 4)), "a LoRA for SDXL"),
    "SD v2, by width": (pair(K, (4, 1024), (16, 4)), "a LoRA for SD v2"),
    "full size": (pair(K, (4, 768), (320, 4)), "for Stable Diffusion v1, texts 768 wide, not 24"),
    "Flux": (pair("lora_unet_double_blocks_0_img_attn_proj", (4, 16), (16, 4)), "a LoRA for SD3 or Flux"),
    "peft's own": (named("base_model.model.x.lora_A.weight"), "an adapter of peft alone"),
    "unknown layer": (pair(Q, (4, 16), (16, 4)) | pair(Q + "_x", (4, 16), (16, 4)), "2 tensors that fit no layer .*_x"),
    "no pair": (named(f"{Q}.lora_down.weight", shape=(4, 16)), "but not the up that belongs to it"),
    "ranks": (pair(Q, (4, 16), (16, 3)), r"do not make the layer's \[16, 16\]"),
    "a convolution": (pair(Q, (4, 16, 1, 1), (16, 4, 1, 1)), "does not fit this model"),
    "rank 0": (pair(Q, (0, 16), (16, 0)), "do not make"),
    "alpha": (pair(Q, (4, 16), (16, 4)) | named(f"{Q}.alpha", shape=(2,)), "must be one number"),
    "whole numbers": ({key: one.int() for key, one in pair(Q, (4, 16), (16, 4)).items()}, "not a float type"),
    "twice": (pair(Q, (4, 16), (16, 4)) | named(f"{DOTTED}.lora_A.weight", shape=(4, 16)), "names one layer twice"),
    "a learned word": (named("emb_params", shape=(2, 24)), "a learned word .*give it with --embedding"),
    "nothing": ({}, "is no LoRA|is damaged"),  # old releases of safetensors write no sound file of nothing
    "NaN": ({key: one + float("nan") for key, one in pair(Q, (4, 16), (16, 4)).items()}, "holds NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_is_no_lora_for_this_model_is_named(case, folder, found, tmp_path):
    state, reason = MISFITS[case]
    path = save(tmp_path / "x.safetensors", state)
    with pytest.raises(ValueError, match=reason):
        with_add_ons(found, [path]) if case != "NaN" else StableDiffusion.load(folder, device="cpu", lora=[path])


def test_files_given_in_each_others_place(folder, tmp_path, capsys, monkeypatch):
    """A LoRA as the model, a model and a word as a LoRA: each is told what it is, and how to give it."""
    monkeypatch.chdir(tmp_path)
    tiny.picture().save("in.png")
    style, _ = lora(tmp_path / "style.safetensors")
    word = save(tmp_path / "cat.safetensors", {"emb_params": torch.zeros(1, 24)})
    asked = ["edit", "in.png", *FAST, "--model"]
    assert "which adds to a checkpoint and is none; give it with --lora" in failed(capsys, *asked, style)
    assert "is no LoRA: it has " in failed(
        capsys, *asked, folder, "--lora", folder / "unet" / "diffusion_pytorch_model.safetensors"
    )
    assert "is no learned word" in failed(capsys, *asked, folder, "--embedding", style)
    assert "give it with --embedding" in failed(capsys, *asked, folder, "--lora", word)
    assert "no such file" in failed(capsys, *asked, folder, "--lora", "missing.safetensors:0.5")
    (tmp_path / "cat.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    assert "pickle" in failed(capsys, *asked, folder, "--embedding", "cat.pt")


@pytest.mark.parametrize("given", [3, ("x.safetensors",), ("x.safetensors", "y"), "x.safetensors:1e9", (None, 1.0)])
def test_what_names_no_file_and_scale(given, found):
    with pytest.raises(ValueError, match=r"must be (FILE|a list of files)"):
        with_add_ons(found, [given])


@pytest.mark.parametrize("name", ["lora", "embeddings"])
def test_one_file_in_the_place_of_a_list(name, found):
    with pytest.raises(ValueError, match="must be a list of files"):
        with_add_ons(found, **{name: "x.safetensors"})


def test_full_size_names_are_told_from_the_header_alone(tmp_path):
    """Official shapes without data: a LoRA of the miniature's widths is refused before a weight could be read."""
    found = open_checkpoint(hollow_folder(tmp_path / "v1-5"))
    path, _ = lora(tmp_path / "tiny.safetensors", only="attn2")
    with pytest.raises(ValueError, match="another model, texts 24 wide, not 768"):
        with_add_ons(found, [path])
    fitting = {f"{K}.lora_down.weight": ([8, 768], "F16"), f"{K}.lora_up.weight": ([320, 8], "F16")}
    added = with_add_ons(found, [(hollow(tmp_path / "style.safetensors", fitting), 0.7)])
    assert added.add_ons["lora"].startswith("style:0.7 (") and added.parts["unet"].changes


# ---------------------------------------------------------------- learned words


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """One vector under diffusers' key, three under A1111's."""
    place, generator = tmp_path_factory.mktemp("words"), torch.Generator().manual_seed(2)
    one = save(place / "one.safetensors", {"<cat-toy>": torch.randn(24, generator=generator)})
    return one, save(place / "BadHands-5.safetensors", {"emb_params": torch.randn(3, 24, generator=generator)})


@pytest.fixture(scope="module")
def learned(folder, words):
    return StableDiffusion.load(folder, device="cpu", embeddings=words)


def test_learned_words_are_those_of_diffusers(folder, words, learned, tmp_path):
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    peer = pipeline(StableDiffusionPipeline, folder, tmp_path)
    peer.load_textual_inversion(str(words[0]))
    peer.load_textual_inversion(load_file(words[1]), token="badhands-5")
    texts = ["a <cat-toy> on grass", "a <cat-toy>, <cat-toy>", "badhands-5", "no badhands-5, please", "a horse"]
    texts += ["word " * 73 + "badhands-5 and the end"]  # its third vector has no room
    for text in texts:
        expected = peer.encode_prompt(text, "cpu", 1, False)[0]
        with pytest.warns(UserWarning, match="cut off") if len(text) > 99 else pytest.MonkeyPatch().context():
            assert (learned.text([text]) - expected).abs().max() < 2e-6, text


def test_a_learned_word_in_any_case_and_nowhere_inside_another(learned, plain):
    upper, lower = learned.text(["a <Cat-Toy> and BADHANDS-5"]), learned.text(["a <cat-toy> and badhands-5"])
    assert upper.equal(lower)
    assert learned.text(["my badhands-50"]).equal(plain.text(["my badhands-50"]))
    assert learned.text(["a horse"]).equal(plain.text(["a horse"]))


def test_where_a_learned_word_stands(learned):
    found = words_of(learned.tokenizer, "no BadHands-5, my <cat-toy> x")
    assert found.names == ("no", "BadHands-5", ",", "my", "<cat-toy>", "x")
    assert found.positions("badhands-5") == [2, 3, 4] and found.positions("<cat-toy>") == [7] and found.end == 9
    assert found.ids[2:5] == (49409, 49410, 49411) and found.ids[7] == 49408


WRONG_WORDS = {
    "SD v2": ("x", {"emb_params": torch.zeros(2, 1024)}, "1024 wide is for SD v2, here it is 24"),
    "SDXL": ("x", {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)}, "a learned word for SDXL"),
    "full size": ("x", {"emb_params": torch.zeros(2, 768)}, "768 wide is for Stable Diffusion v1"),
    "known": ("horse", {"emb_params": torch.zeros(2, 24)}, "'horse' cannot be a new word"),
    "the end token": ("x", {"<|endoftext|>": torch.zeros(24)}, "cannot be a new word"),
    "no name": ("x", {" ": torch.zeros(24)}, "cannot be a new word"),
    "several": ("x", {"a1b2": torch.zeros(24), "b": torch.zeros(24)}, "it has 2 tensors"),
    "a cube": ("x", {"a1b2": torch.zeros(2, 2, 24)}, "no learned word"),
    "too many": ("x", {"a1b2": torch.zeros(76, 24)}, "room for 75"),
    "none": ("x", {"a1b2": torch.zeros(0, 24)}, "room for 75"),
    "NaN": ("qxz9", {"emb_params": torch.full((2, 24), float("inf"))}, "emb_params holds NaN or infinity"),
}


@pytest.mark.parametrize("case", WRONG_WORDS)
def test_what_is_no_word_for_this_model_is_named(case, folder, found, tmp_path):
    stem, state, reason = WRONG_WORDS[case]
    path = save(tmp_path / f"{stem}.safetensors", state)
    with pytest.raises(ValueError, match=reason):
        with_add_ons(found, (), [path]) if case != "NaN" else StableDiffusion.load(folder, embeddings=[path])


def test_two_files_of_one_name(found, tmp_path):
    paths = [save(tmp_path / n / "qxz9.safetensors", {"emb_params": torch.zeros(24)}) for n in "ab"]
    with pytest.raises(ValueError, match="two embeddings are called 'qxz9'"):
        with_add_ons(found, (), paths)


# ---------------------------------------------------------------- known by their hashes


def test_a_state_belongs_to_its_add_ons(folder, words, plain, picture, tmp_path):
    path, _ = lora(tmp_path / "style.safetensors")
    added = {"lora": [(path, 0.5)], "embeddings": [words[0]]}
    sd = StableDiffusion.load(folder, device="cpu", **added)
    done = edit(sd, picture, **QUICK | {"target": "a <cat-toy>"})
    save_state(done, tmp_path / "s.safetensors")
    again = resume(load_state(tmp_path / "s.safetensors", sd), guidance_scale=3)
    assert (
        again.image.tobytes()
        == edit(sd, picture, **QUICK | {"target": "a <cat-toy>", "guidance_scale": 3}).image.tobytes()
    )
    for change in ({"lora": [(path, 0.4)]}, {"lora": ()}, {"embeddings": ()}, {"embeddings": words}):
        other = StableDiffusion.load(folder, device="cpu", **added | change)
        with pytest.raises(
            ValueError, match=r"its (lora|embeddings) is .* give the --(lora|embedding) it was made with"
        ):
            load_state(tmp_path / "s.safetensors", other)
    save_state(edit(plain, picture, **QUICK), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"its lora is none, here it is style:0\.5"):
        load_state(tmp_path / "plain.safetensors", sd)


def test_from_the_shell_into_pictures_batches_and_pages(folder, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    tiny.picture().save("in/a.png")
    path, _ = lora(tmp_path / "style.safetensors")
    more = ["--model", folder, "--lora", f"{path}:0.5", "--embedding", words[0]]
    done = ran(capsys, "edit", "in/a.png", "-o", "out.png", "--report", "r.html", *FAST, *more)
    chunks = Image.open("out.png").text
    told = done["settings"]["lora"], done["settings"]["embeddings"]
    assert re.fullmatch(r"style:0\.5 \(\w{10}\)", told[0]) and re.fullmatch(r"<cat-toy> \(\w{10}\)", told[1])
    assert done["model"]["lora"] == told[0] and told[0] in (tmp_path / "r.html").read_text()
    assert f'Lora hashes: "{told[0]}"' in chunks["parameters"] and "TI hashes: " in chunks["parameters"]
    batch = ["batch", "in", "-o", "made", *FAST[:8]]
    assert ran(capsys, *batch, *more)["made"] == 1 == ran(capsys, *batch, *more)["already there"]
    assert ran(capsys, *batch, *more[:2], "--lora", path)["made"] == 1  # another scale is another model


# ---------------------------------------------------------------- each test can fail

BREAKS = {
    "without its scale": ("(factor * self.scale)", "factor", "test_scales_add_up_and_zero_changes_no_bit"),
    "without alpha": ('read["alpha"].item() / len(read["down"]) if "alpha" in read else factor', "1.0",
                      "test_half_precision_is_merged_in_float32"),
    "in the file's type": ('file.get_tensor(key).float()', "file.get_tensor(key).bfloat16()",
                           "test_half_precision_is_merged_in_float32"),
    "peft's pattern": ("alpha = own", "pass", "test_pefts_settings_count"),
}  # fmt: skip


@pytest.mark.parametrize("case", BREAKS)
def test_a_mistake_turns_a_test_red(case, folder, plain, tmp_path, monkeypatch):
    old_piece, new, test = BREAKS[case]
    broken = mutant("files.addons", old_piece, new, monkeypatch)
    monkeypatch.setattr("minidiffedit.sd.with_add_ons", broken.with_add_ons)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run(getattr(sys.modules[__name__], test), folder=folder, plain=plain, tmp_path=tmp_path)
