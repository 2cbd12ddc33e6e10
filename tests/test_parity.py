"""The networks against diffusers and transformers on the same random weights, float32.

`unet`, `vae`, `clip` are exchanged by test_mutations. At full size: tests/bench/parity_full.py (`make parity-full`).
"""

import inspect
import re
from dataclasses import replace

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from stubs import latent
from transformers import CLIPTextConfig, CLIPTextModel

from minidiffedit import StableDiffusion, clip, unet, vae

BOUND = 1e-5


def error(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def like(module, config, state):
    ours = module(config).eval()
    ours.load_state_dict(state)
    return ours


@pytest.fixture(scope="module")
def sd(deep):
    return deep


def peer_unet():
    peer = UNet2DConditionModel.from_config(tiny.CONFIGS["unet"]).eval()
    peer.load_state_dict(tiny.networks()[0].state_dict())
    return peer


def peer_vae():
    peer = AutoencoderKL.from_config(tiny.CONFIGS["vae"]).eval()
    peer.load_state_dict(tiny.networks()[1].state_dict())
    return peer


def peer_clip():
    names = {k: v for k, v in tiny.CONFIGS["text_encoder"].items() if not k.endswith("_token_id")}
    peer = CLIPTextModel(CLIPTextConfig(**names)).eval()
    state = tiny.networks()[2].state_dict()
    prefix = "text_model." if any(k.startswith("text_model.") for k in peer.state_dict()) else ""
    missing, extra = peer.load_state_dict({prefix + k: v for k, v in state.items()}, strict=False)
    assert not extra and all("position_ids" in k for k in missing)
    return peer


@torch.no_grad()
@pytest.mark.parametrize("h, w, t", [(8, 8, 1), (16, 8, 481), (7, 11, 999), (1, 1, 500), (37, 5, 0), (3, 2, 21)])
def test_unet(h, w, t):
    peer = peer_unet()
    ours = like(unet.UNet, tiny.UNET, peer.state_dict())
    x, text = latent(2, 4, h, w, dtype=torch.float32), latent(2, 77, 24, seed=1, dtype=torch.float32)
    assert error(ours(x, t, text), peer(x, t, text).sample) <= BOUND


@torch.no_grad()
def test_unet_with_a_timestep_per_row():
    peer = peer_unet()
    ours = like(unet.UNet, tiny.UNET, peer.state_dict())
    x, text = latent(3, 4, 8, 8, dtype=torch.float32), latent(3, 77, 24, seed=1, dtype=torch.float32)
    t = torch.tensor([1, 500, 999])
    assert error(ours(x, t, text), peer(x, t, text).sample) <= BOUND


@torch.no_grad()
@pytest.mark.skipif(torch.__version__ < (2, 4), reason="before 2.4, torch counts the FLOP of no part by itself")
@pytest.mark.parametrize("b, k", [(1, 2), (3, 2), (2, 3)])
def test_rows_that_share_a_latent_share_what_lies_before_the_text(b, k):
    from torch.utils.flop_counter import FlopCounterMode

    ours = like(unet.UNet, tiny.UNET, tiny.networks()[0].state_dict())
    x, text = latent(b, 4, 8, 5, dtype=torch.float32), latent(k * b, 77, 24, seed=1, dtype=torch.float32)
    with FlopCounterMode(display=False) as shared:
        once = ours(x, 481, text)
    with FlopCounterMode(display=False) as whole:
        repeated = ours(x.repeat(k, 1, 1, 1), 481, text)
    assert error(once, repeated) <= BOUND
    counts = [{name: sum(ops.values()) for name, ops in c.get_flop_counts().items()} for c in (shared, whole)]
    assert counts[1]["UNet.conv_in"] == k * counts[0]["UNet.conv_in"]
    first, later = "UNet.down_blocks.0.attentions.0.transformer_blocks.0", "UNet.down_blocks.0.attentions.1"
    assert counts[1][f"{first}.attn1"] == k * counts[0][f"{first}.attn1"]
    assert counts[1][f"{first}.ff"] == counts[0][f"{first}.ff"] and counts[1][later] == counts[0][later]


@torch.no_grad()
@pytest.mark.parametrize("h, w", [(64, 64), (8, 8), (40, 72)])
def test_vae_encoder(h, w):
    peer = peer_vae()
    ours = like(vae.VAE, tiny.VAE_, peer.state_dict())
    image = latent(2, 3, h, w, dtype=torch.float32)
    mean, log_variance = ours.encode(image)
    theirs = peer.encode(image).latent_dist
    assert error(mean, theirs.mode()) <= BOUND and error(log_variance, theirs.logvar) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("h, w", [(8, 8), (1, 1), (5, 9)])
def test_vae_decoder(h, w):
    peer = peer_vae()
    ours = like(vae.VAE, tiny.VAE_, peer.state_dict())
    z = latent(2, 4, h, w, dtype=torch.float32)
    assert error(ours.decode(z), peer.decode(z).sample) <= BOUND


@torch.no_grad()
def test_vae_bounds_the_log_variance():
    ours = like(vae.VAE, tiny.VAE_, tiny.networks()[1].state_dict())
    ours.quant_conv.bias.data[4:] = torch.tensor([-100.0, 100.0, 0.0, 0.0])
    log_variance = ours.encode(latent(1, 3, 8, 8, dtype=torch.float32))[1]
    assert (log_variance[:, 0] == -30).all() and (log_variance[:, 1] == 20).all()
    for sides in ((8, 12), (12, 8)):
        with pytest.raises(AssertionError, match=f"sides {re.escape(str(sides))} are no multiples of 8"):
            ours.encode(torch.zeros(1, 3, *sides))


@torch.no_grad()
def test_clip(sd):
    peer = peer_clip()
    ours = like(clip.CLIPText, tiny.CLIP, tiny.networks()[2].state_dict())
    ids = sd.tokenizer(["", "a photo of a horse on a grass field", "word " * 75])
    assert error(ours(ids), peer(ids).last_hidden_state) <= BOUND
    assert all(one.requires_grad for one in clip.CLIPText(tiny.CLIP).parameters())  # as of any new module
    with pytest.raises(AssertionError, match=r"^78 tokens are too many"):
        ours(torch.cat([ids, ids[:, :1]], dim=1))


def test_every_norm_has_its_eps():
    """1e-5 and 1e-6 are too close for a comparison of outputs: norm by norm."""
    pairs = (
        (unet.UNet(tiny.UNET), peer_unet(), 109), (vae.VAE(tiny.VAE_), peer_vae(), 52),
        (clip.CLIPText(tiny.CLIP), peer_clip(), 5),
    )  # fmt: skip
    for ours, theirs, count in pairs:
        peers = {name.removeprefix("text_model."): m.eps for name, m in theirs.named_modules() if hasattr(m, "eps")}
        assert {name: m.eps for name, m in ours.named_modules() if hasattr(m, "eps")} == peers and len(peers) == count


@torch.no_grad()
def test_the_latent_is_the_scaled_mode(sd):
    image = latent(1, 3, 64, 48, dtype=torch.float32).clamp(-1, 1)
    theirs = peer_vae().encode(image).latent_dist.mode() * 0.18215
    assert error(sd.encode(image), theirs) <= BOUND
    assert error(sd.decode(theirs), peer_vae().decode(theirs / 0.18215).sample) <= BOUND


def test_eps_gives_one_prediction_per_text(sd):
    x, texts = latent(3, 4, 8, 8, dtype=torch.float32), [sd.text(["a"]), sd.text(["b", "c", "d"])]
    before = sd.evaluations
    one, two = sd.eps(x, 481, texts)
    assert sd.evaluations == before + 6 and one.shape == two.shape == x.shape
    for i in range(3):
        torch.testing.assert_close(two[i], sd.unet(x[i : i + 1], 481, texts[1][i : i + 1])[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one[i], sd.unet(x[i : i + 1], 481, texts[0])[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="1 or 3 rows"):
        sd.eps(x, 481, [sd.text(["a", "b"])])


def test_a_new_model_says_its_sizes_and_counts_from_zero(deep, loads):
    sd = StableDiffusion(deep.unet, deep.vae, deep.clip, deep.tokenizer)
    assert (sd.side, sd.factor, sd.channels, sd.further, sd.scale, sd.coarsest) == (64, 8, 4, 0, 0.18215, 2)
    assert (sd.evaluations, sd.gradients, sd.low_memory, sd.name, sd.kind) == (0, 0, False, "", "base")
    options = [*inspect.signature(loads).parameters.values()][1:]
    assert all(one.kind is one.KEYWORD_ONLY for one in options)
    assert {one.name for one in options if one.default is False} == {"local_files_only", "compile", "low_memory"}


@torch.no_grad()
def test_the_verbs_take_their_ranges_and_no_more(sd):
    picture, texts = latent(1, 3, 8, 16, dtype=torch.float32).clamp(-1, 1), [sd.text(["a"])]
    assert sd.encode(1.0009 * picture).shape == (1, 4, 1, 2)  # rounding may overshoot by a thousandth
    for bad in (1.0011 * picture.sign(), picture[..., :12], picture[..., :4, :], picture[:, :2], picture[0],
                picture[..., :0], picture[..., :0, :], picture.long(), torch.zeros(1, 1, 3, 8, 8)):  # fmt: skip
        with pytest.raises(ValueError, match="image must"):
            sd.encode(bad)
    z = latent(1, 4, 2, 1, dtype=torch.float32)
    for bad in (z[:, :3], z[0], z[None], z[..., :0], z[:0]):
        with pytest.raises(ValueError, match="latent must"):
            sd.decode(bad)
    assert all(sd.eps(z, t, texts)[0].shape == z.shape for t in (0, 999))
    for t in (-1, 1000):
        with pytest.raises(ValueError, match="t must be a whole number from 0 to 999, got"):
            sd.eps(z, t, texts)
    for x, some in ((z, []), (z[:0], texts), (torch.cat([z, z, z]), [sd.text(["a", "b"])])):
        with pytest.raises(ValueError, match="texts must have"):
            sd.eps(x, 1, some)


@pytest.mark.parametrize("ours, theirs, network", [
    (unet.UNet, UNet2DConditionModel, "unet"), (vae.VAE, AutoencoderKL, "vae"),
])  # fmt: skip
def test_levels_of_unlike_widths_are_joined_as_the_peers(ours, theirs, network):
    """SD v1's two coarsest levels are equally wide: here none is."""
    widths = (8, 16, 24, 32)
    config = replace({"unet": tiny.UNET, "vae": tiny.VAE_}[network], block_out_channels=widths)
    with torch.device("meta"):
        peer = theirs.from_config(tiny.CONFIGS[network] | {"block_out_channels": [*widths]})
        own = ours(config)
    sizes = [{name: one.shape for name, one in module.state_dict().items()} for module in (own, peer)]
    assert sizes[0] == sizes[1]


def test_attend_replaces_every_attention_of_the_unet(sd):
    seen = []

    def attend(site, q, k, v):
        seen.append(site)
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        return weights @ v

    x, text = latent(1, 4, 8, 8, dtype=torch.float32), sd.text(["a"])
    assert error(sd.unet(x, 1, text, attend), sd.unet(x, 1, text)) <= BOUND
    assert len(seen) == len(set(seen)) == 32 and sum(site.kind == "cross" for site in seen) == 16
    assert {(s.place, s.level) for s in seen} == {("mid", 3), *((p, n) for p in ("down", "up") for n in range(3))}


def test_gradients_reach_the_latent(sd):
    """No network runs under no_grad: methods that optimise need them."""
    x = latent(1, 4, 8, 8, dtype=torch.float32).requires_grad_()
    sd.unet(x, 1, sd.text(["a"])).sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)
