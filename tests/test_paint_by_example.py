"""Paint by Example: its encoder against transformers' and diffusers' classes, its files, its whole pipeline."""

import json
import shutil
import sys
import warnings
from dataclasses import field, fields, make_dataclass

import example
import explicit
import numpy as np
import pytest
import tiny
import torch
from bench.manifests import encoder_class
from commands import failed, ran
from diffusers import AutoencoderKL, PaintByExamplePipeline, UNet2DConditionModel
from explicit import error
from files import save
from mutants import mutant, run
from PIL import Image
from proofs import edited
from stubs import Model, Shown, latent
from tiny import box
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from minidiffedit import StableDiffusion, levels, noises
from minidiffedit import clip_image as E
from minidiffedit import run as R
from minidiffedit.checkpoint import SINGLE, open_checkpoint
from minidiffedit.cli import main
from minidiffedit.clip_image import CLIPImageConfig, image_names
from minidiffedit.files.configs import KINDS, read_configs
from minidiffedit.methods import paint_by_example as P

N = 5
PIXELS = np.random.default_rng(4)
SQUARE, EXAMPLE = (
    Image.fromarray(PIXELS.integers(0, 256, (side, side, 3), dtype=np.uint8)) for side in (64, 50)
)  # fmt: skip
OPTIONS = {"reference": EXAMPLE, "steps": N, "seed": 3}


def peer_encoder():
    """diffusers' own, of the tiny size."""
    config = CLIPVisionConfig(**{name: value for name, value in example.JSON.items() if name != "architectures"})
    return example.at_random(encoder_class()(config), seed=1)


@pytest.fixture(scope="module")
def peer():
    return peer_encoder()


@pytest.fixture(scope="module")
def weights(peer, tmp_path_factory):
    return example.with_encoder(peer, tmp_path_factory.mktemp("example") / "tiny")


@pytest.fixture(scope="module")
def sd(weights):
    return StableDiffusion.load(weights, device="cpu")


@pytest.fixture(scope="module")
def model():
    return Model("example")


# ---------------------------------------------------------------- the encoder


def seen(n=2, seed=0):
    """Pictures as CLIP's processor hands them on, and as ours does."""
    pixels = latent(n, 3, 28, 28, seed=seed, dtype=torch.float32).clamp(-1, 1)
    mean, std = (
        torch.tensor(each)[:, None, None] for each in (CLIPImageProcessor().image_mean, CLIPImageProcessor().image_std)
    )
    return ((pixels / 2 + 0.5) - mean) / std, pixels


def ours_of(peer):
    """The package's encoder with the peer's weights, by the names that a folder has."""
    made, state = E.CLIPImage(example.CONFIG).eval(), peer.state_dict()
    keys = {name: next(key for key in E.image_names(0, name) if key in state) for name in made.state_dict()}
    made.load_state_dict({name: state[key] for name, key in keys.items()})
    left = {key for key in state if key not in keys.values()}
    assert all(".attn1.to_q." in key or ".attn1.to_k." in key for key in left) and len(left) == 8
    return made


@torch.no_grad()
def test_it_is_diffusers_encoder(peer):
    theirs, pixels = seen()
    ours = ours_of(peer)
    assert error(ours.see(pixels), peer(theirs)) <= 1e-5
    one, other = (ours.see(pixels[i : i + 1]) for i in (0, 1))
    assert error(one, other) > 0.1  # a bound that another picture would not meet
    vector = peer(theirs, return_uncond_vector=True)[1]
    assert torch.equal(ours(torch.full((2, 77), 49407)), vector.expand(2, 1, -1))


@torch.no_grad()
def test_its_tower_is_transformers(peer):
    tower = CLIPVisionModel(peer.config).eval()
    tower.load_state_dict(peer.model.state_dict())
    theirs, _ = seen(3)
    assert error(ours_of(peer).model(theirs)[:, 0], tower(theirs).pooler_output) <= 1e-5


def test_every_norm_has_its_eps(peer):
    """By layer, under the folder's names."""
    found = {n: m.eps for n, m in E.CLIPImage(example.CONFIG).named_modules() if hasattr(m, "eps")}
    theirs = {n: m.eps for n, m in peer.named_modules() if hasattr(m, "eps")}
    known = {
        key.removesuffix(".x")
        for name in found
        for key in E.image_names(0, f"{name}.x")
        if key.removesuffix(".x") in theirs
    }
    assert {*found.values()} == {*theirs.values()} == {1e-5} and known == theirs.keys()


def test_queries_and_keys_of_one_token_change_nothing(peer):
    """Why they are not read."""
    other = peer_encoder()
    for name, p in other.named_parameters():
        if ".to_q." in name or ".to_k." in name:
            p.data = torch.randn_like(p)
    assert error(other(seen()[0]), peer(seen()[0])) <= 1e-6


def test_there_is_no_text(sd):
    assert sd.text(["", ""]).shape == (2, 1, 24)
    with pytest.raises(ValueError, match="read an example, no text"):
        sd.text(["a horse"])


# ---------------------------------------------------------------- its files


def single(peer):
    """CompVis' names, by the authors' classes: queries, keys and values in one."""
    inner = {"attn1.to_out.0": "attn.c_proj", "norm1": "ln_1", "norm3": "ln_2", "ff.net.0.proj": "mlp.c_fc"}
    inner["ff.net.2"] = "mlp.c_proj"
    state, found = {}, peer.state_dict()
    for network, module in zip(("unet", "vae"), tiny.networks(9)):
        state |= {SINGLE[network](name)[0]: tensor for name, tensor in module.state_dict().items()}
    for key, tensor in found.items():
        if key.startswith("model."):
            rest = key.removeprefix("model.").removeprefix("vision_model.")
            state[f"cond_stage_model.transformer.vision_model.{rest}"] = tensor
        elif key.startswith("mapper.") and ".attn1.to_" in key and ".to_out." not in key:
            block, end = key.split(".attn1.")[0], key.rpartition(".")[2]
            fused = torch.cat([found[f"{block}.attn1.{one}.{end}"] for one in ("to_q", "to_k", "to_v")])
            state[f"cond_stage_model.{block.replace('blocks', 'resblocks')}.attn.c_qkv.{end}"] = fused
        elif key.startswith("mapper."):
            part = next(one for one in inner if f".{one}." in key)
            state["cond_stage_model." + key.replace("blocks", "resblocks").replace(part, inner[part])] = tensor
    state |= {f"cond_stage_model.final_ln.{end}": found[f"final_layer_norm.{end}"] for end in ("weight", "bias")}
    state |= {f"proj_out.{end}": found[f"proj_out.{end}"] for end in ("weight", "bias")}
    return state | {"learnable_vector": found["uncond_vector"]}


@pytest.fixture
def small_example(small_single_files, monkeypatch):
    """What a single file is assumed to hold: the tiny encoder, too."""
    own = [(one.name, one.type, field(default=getattr(example.CONFIG, one.name))) for one in fields(example.CONFIG)]
    monkeypatch.setitem(KINDS, "image_encoder", make_dataclass("Small", own, bases=(CLIPImageConfig,), frozen=True))


@pytest.mark.filterwarnings("error")
def test_both_layouts_load_to_the_same_tensors(peer, sd, small_example, tmp_path, capsys):
    file = save(tmp_path / "model.safetensors", single(peer) | {"model_ema.decay": torch.tensor(0.9)})
    other = StableDiffusion.load(file, device="cpu")
    assert sd.kind == other.kind == "example" and sd.further == 5 and sd.checkpoint.kind == "example"
    for ours, theirs in ((sd.unet, other.unet), (sd.vae, other.vae), (sd.clip, other.clip)):
        read = theirs.state_dict()
        assert all(tensor.equal(read[name]) for name, tensor in ours.state_dict().items()) and len(read) > 50
    for path in (file, sd.name):
        told = ran(capsys, "info", path)
        assert told["kind"] == "Stable Diffusion v1, Paint by Example"
    assert told["networks"].keys() == {"unet", "vae", "image_encoder"}


def test_the_single_files_names_are_those_that_diffusers_converts(peer, monkeypatch):
    """Its converter, which is not ours, makes its encoder of them again."""
    from diffusers.pipelines.stable_diffusion.convert_from_ckpt import convert_paint_by_example_checkpoint

    monkeypatch.setattr(CLIPVisionConfig, "from_pretrained", lambda *a, **k: peer.config)
    flat = not any(".vision_model." in key for key in peer.state_dict())
    state = {k.replace(".vision_model.", ".") if flat else k: t for k, t in single(peer).items()}
    again = convert_paint_by_example_checkpoint(state).state_dict()
    assert again.keys() == peer.state_dict().keys()
    assert all(tensor.equal(again[key]) for key, tensor in peer.state_dict().items())
    ours = {image_names(1, name)[0] for name in E.CLIPImage(example.CONFIG).state_dict()}
    assert ours == {key for key in single(peer) if not key.startswith(("model.", "first_stage_model."))}


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_with_and_without_the_towers_prefix(prefix, weights, sd, tmp_path):
    """As transformers wrote it up to 5.5, with positions' numbers, and as it does from then on."""
    shutil.copytree(weights, tmp_path / "m")
    state = {key: tensor for key, tensor in peer_encoder().state_dict().items()}
    state = {
        k.replace("model.vision_model.", "model.").replace("model.", f"model.{prefix}", 1)
        if k.startswith("model.")
        else k: t
        for k, t in state.items()
    }
    state |= {f"model.{prefix}embeddings.position_ids": torch.arange(17)[None]}
    save(tmp_path / "m" / "image_encoder" / "model.safetensors", state)
    found = StableDiffusion.load(tmp_path / "m", device="cpu").clip.state_dict()
    assert all(tensor.equal(found[name]) for name, tensor in sd.clip.state_dict().items())


def changed(name, **values):
    def change(folder):
        path = folder / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def no_vector(folder):
    path = folder / "image_encoder" / "model.safetensors"
    state = {k: t.contiguous() for k, t in peer_encoder().state_dict().items() if k != "uncond_vector"}
    save(path, state)


WRONG = {
    "an image variation's UNet": (changed("unet", in_channels=4), r"4 -> 4 channels, .*Paint by Example's, .* takes 9"),
    "another width": (changed("image_encoder", projection_dim=32), "texts 24 wide, the image encoder makes 32"),
    "another activation": (changed("image_encoder", hidden_act="gelu"), "hidden_act is 'gelu'; SD v1 has 'quick_gelu'"),
    "another tower": (changed("image_encoder", patch_size=14), "misshaped: model.*embeddings"),
    "no whole heads": (changed("image_encoder", num_attention_heads=5), "32 is no multiple of 5 heads"),
    "without a vector": (no_vector, "1 missing: uncond_vector"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_paint_by_example_is_refused(case, weights, tmp_path):
    change, reason = WRONG[case]
    shutil.copytree(weights, tmp_path / "m")
    change(tmp_path / "m")
    with pytest.raises(ValueError, match=reason):
        open_checkpoint(tmp_path / "m")


def test_beside_a_text_encoder_an_image_encoder_is_no_part(folder, weights, tmp_path):
    """As where an IP-Adapter was added to SD v1."""
    shutil.copytree(folder, tmp_path / "m")
    shutil.copytree(weights / "image_encoder", tmp_path / "m" / "image_encoder")
    assert [*read_configs(tmp_path / "m")] == ["unet", "vae", "text_encoder"]


def test_more_in_the_encoder_is_another_architecture(peer, small_example, tmp_path):
    for key in (
        "cond_stage_model.mapper.resblocks.2.ln_1.bias",
        "cond_stage_model.transformer.vision_model.encoder.layers.9.x",
    ):
        path = save(tmp_path / "m.safetensors", single(peer) | {key: torch.zeros(32)})
        with pytest.raises(ValueError, match=f"1 unknown: {key}"):
            open_checkpoint(path)


def test_add_ons(weights, tmp_path):
    """A LoRA changes its UNet; a learned word has no place."""
    q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    pair = {f"{q}.lora_down.weight": torch.ones(1, 16), f"{q}.lora_up.weight": torch.ones(16, 1)}
    path = save(tmp_path / "style.safetensors", pair)
    plain, styled = (StableDiffusion.load(weights, device="cpu", lora=lora) for lora in ((), [path]))
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(styled.unet.get_parameter(name), plain.unet.get_parameter(name) + 1)
    word = save(tmp_path / "qxz9.safetensors", {"emb_params": torch.zeros(24)})
    with pytest.raises(ValueError, match="reads a picture, no text: leave out --embedding"):
        StableDiffusion.load(weights, device="cpu", embeddings=[word])


def test_one_network_at_a_time(weights, sd, picture):
    small = StableDiffusion.load(weights, device="cpu", low_memory=True)
    one, two = (R.edit(each, picture, "paint-by-example", mask=box(), **OPTIONS) for each in (sd, small))
    assert error(two.latent, one.latent) < 1e-5


# ---------------------------------------------------------------- the method


def painted(sd, picture, **options):
    return R.edit(sd, picture, "paint-by-example", **OPTIONS | options)


def test_it_is_diffusers_pipeline(peer, weights, sd):
    """From the files to the last latent: loader, example, masked picture, order of the channels, guidance."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 8, 48, 40))  # whole cells
    vae = AutoencoderKL.from_pretrained(weights / "vae")
    with torch.no_grad():  # the pipeline draws from the posterior: without variance that is the mean, as here
        vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0, -60
    their = PaintByExamplePipeline(
        vae=vae, image_encoder=peer, unet=UNet2DConditionModel.from_pretrained(weights / "unet"),
        scheduler=explicit.scheduler(N), safety_checker=None, requires_safety_checker=False,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
    )  # fmt: skip
    their.set_progress_bar_config(disable=True)
    for options in ({}, {"guidance_scale": 2.0}):
        theirs = their(
            example_image=EXAMPLE, image=SQUARE, mask_image=mask, height=64, width=64, num_inference_steps=N,
            latents=noises((4, 8, 8), 1, 3), output_type="latent", **{"guidance_scale": 5.0} | options,
        ).images  # fmt: skip
        ours = painted(sd, SQUARE, mask=mask, paste=False, **options)
        assert error(ours.latent, theirs) < 1e-4 and ours.evaluations == {"decode": 2 * N}
        other = painted(sd, SQUARE, mask=mask, paste=False, reference=SQUARE, **options)
        assert error(other.latent, theirs) > 1e-3  # a bound that another example would not meet


def test_the_unet_sees_the_picture_without_its_inside_then_what_is_kept(model):
    x0, outside = latent(2, 4, 6, 5, dtype=torch.float32), latent(2, 4, 6, 5, seed=1, dtype=torch.float32)
    mask, eps = torch.zeros(2, 1, 6, 5), Shown(model)
    mask[:, :, 2:4, 1:4], mask[:, :, 5] = 1, 0.3
    null, example = model.text([""]), model.text(["in its place"])
    y = P.paint(eps, x0, mask, outside, null, example, steps=N, seed=3)
    assert [t for _, t, _, _ in eps.calls] == list(levels(N).t[:0:-1]) and y.shape == x0.shape
    assert torch.equal(eps.calls[0][0], torch.cat([noises((4, 6, 5), 1, seed) for seed in (3, 4)]))
    for _, _, texts, given in eps.calls:
        assert texts[0] is null and texts[1] is example
        assert torch.equal(given[:, :4], outside) and torch.equal(given[:, 4:], 1 - mask)
    x, (t, a) = eps.calls[0][0], levels(N)
    for j in range(N, 0, -1):  # guided DDIM, from the definition
        e_null, e_example = model.eps(x, t[j], [null, example], given=torch.cat([outside, 1 - mask], dim=1))
        e = e_null + 5 * (e_example - e_null)
        x = a[j - 1] ** 0.5 * (x - (1 - a[j]) ** 0.5 * e) / a[j] ** 0.5 + (1 - a[j - 1]) ** 0.5 * e
    torch.testing.assert_close(y, x, rtol=1e-3, atol=1e-3)


def test_on_the_tiny_network(sd, picture):
    done = edited(sd, picture, "paint-by-example", mask=box(), reference=EXAMPLE, steps=N)
    assert done.evaluations == {"decode": 2 * N}
    untouched = np.asarray(done.paste_mask) == 0
    assert 0.1 < untouched.mean() < 0.9
    assert np.array_equal(np.asarray(done.image)[untouched], np.asarray(picture)[untouched])
    for change in ({"reference": SQUARE}, {"seed": 4}, {"guidance_scale": 1.0}):
        other = painted(sd, picture, mask=box(), **{"seed": 0} | change)
        assert not torch.equal(other.latent, done.latent), change
    assert painted(sd, picture, mask=box(), seed=0, prompt_syntax="a1111").latent.equal(done.latent)


def test_what_it_needs(sd, model, picture, inpainting):
    with pytest.raises(ValueError, match="needs reference"):
        R.plan("paint-by-example", mask=box())
    with pytest.raises(ValueError, match="needs mask"):
        R.plan("paint-by-example", reference=EXAMPLE)
    with pytest.raises(ValueError, match="has no option 'target'"):
        R.plan("paint-by-example", target="a horse", mask=box(), reference=EXAMPLE)
    with pytest.raises(ValueError, match="paint-by-example needs example weights"):
        painted(inpainting, picture, mask=box())
    with pytest.raises(ValueError, match="sd-inpainting needs inpainting weights"):
        R.edit(sd, picture, "sd-inpainting", mask=box(), target="a horse")
    with pytest.raises(
        ValueError, match=r"given must be .* with example weights, got None: pass the latent of the pic"
    ):
        sd.eps(torch.zeros(1, 4, 8, 8), 500, [sd.text([""])])


def test_through_every_surface(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, one in (("in.png", SQUARE), ("ball.png", EXAMPLE), ("mask.png", Image.new("L", (64, 64), 255))):
        one.save(name)
    words = ["--method", "paint-by-example", "--reference", "ball.png", "--mask", "mask.png", "--steps", 2, "--seed", 3]
    model = ["--model", weights]
    assert ran(capsys, "edit", "in.png", *words, "--dry-run", *model)["rows"] == {"predicted": 4, "paid": 0}
    more = ["-o", "o.png", "--save-state", "s.safetensors", "--report", "r.html", "--preview", "p"]
    said = ran(capsys, "edit", "in.png", *words, *more, *model)
    assert said["rows"] == {"predicted": 4, "paid": 4} and "paint-by-example" in (tmp_path / "r.html").read_text()
    record = json.loads(Image.open("o.png").text["minidiffedit"])
    assert record["method"] == "paint-by-example" and len(record["reference"]) == 10
    ran(capsys, "resume", "s.safetensors", "-o", "again.png", *model)
    assert np.array_equal(np.asarray(Image.open("again.png")), np.asarray(Image.open("o.png")))
    (tmp_path / "m.csv").write_text(
        "image,method,reference,mask,steps,seed\nin.png,paint-by-example,ball.png,mask.png,2,3\n"
    )
    assert ran(capsys, "batch", "m.csv", "-o", "out", *model)["made"] == 1
    (batched,) = (tmp_path / "out").glob("*.png")
    assert np.array_equal(np.asarray(Image.open(batched)), np.asarray(Image.open("o.png")))
    assert "needs base weights" in failed(capsys, "edit", "in.png", "--target", "a horse", *model)
    assert (
        main(["generate", "a horse", "--model", str(weights)]) == 1 and "needs base weights" in capsys.readouterr().err
    )


# name: (where, what stands there, what a mistake would put, the test that must fail)
PIPELINE, BY_HAND = test_it_is_diffusers_pipeline, test_the_unet_sees_the_picture_without_its_inside_then_what_is_kept
MUTATIONS = {
    "the mask before the picture": ("methods.paint_by_example", "[x0_outside.to(x), 1 - mask.to(x)]",
                                    "[1 - mask.to(x), x0_outside.to(x)]", PIPELINE),
    "1 = fill": ("methods.paint_by_example", "1 - mask.to(x)", "mask.to(x)", BY_HAND),
    "they change places": ("methods.paint_by_example", "[null, example]", "[example, null]", BY_HAND),
    "another seed": ("methods.paint_by_example", "draws(x0.shape, seed)", "draws(x0.shape, 0)", BY_HAND),
    "all tokens": ("clip_image", "x[:, :1]", "x.mean(1, keepdim=True)", test_its_tower_is_transformers),
    "a causal tower": ("clip_image", 'index, "self")', 'index, "causal")', test_its_tower_is_transformers),
    "no norm before": ("clip_image", "self.pre_layrnorm(self.embeddings(x))", "self.embeddings(x)",
                       test_its_tower_is_transformers),
    "another mean": ("clip_image", "(0.48145466,", "(0.5,", test_it_is_diffusers_encoder),
    "quick-GELU in the blocks": ("clip_image", "F.gelu(self.fc1(self.norm2(x)))",
                                 "torch.sigmoid(1.702 * self.fc1(self.norm2(x))) * self.fc1(self.norm2(x))",
                                 test_it_is_diffusers_encoder),
    "a residual less": ("clip_image", "x = x + self.to_out", "x = self.to_out", test_it_is_diffusers_encoder),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_turns_a_test_red(name, peer, weights, sd, model, picture, monkeypatch):
    place, old, new, test = MUTATIONS[name]
    changed = mutant(place, old, new, monkeypatch)
    monkeypatch.setattr(sys.modules[__name__], "E" if place == "clip_image" else "P", changed)
    with pytest.raises((AssertionError, RuntimeError)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(test, peer=peer, weights=weights, sd=sd, model=model, picture=picture)
