"""The hook of `sd.eps`: taps, features, further input channels, gradients; and the weights that need it.

`unet`, `attention`, `sd_module` are exchanged by the mutants at the end.
"""

import json
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from files import hollow, hollow_folder, manifest, save
from mutants import mutant
from stubs import latent
from torch.utils._python_dispatch import TorchDispatchMode

from minidiffedit import StableDiffusion, Tokenizer, attention, unet
from minidiffedit import sd as sd_module
from minidiffedit.attention import Site, sdpa
from minidiffedit.checkpoint import SINGLE
from minidiffedit.cli import main
from minidiffedit.clip import CLIPText
from minidiffedit.files.configs import KINDS

KIND = {4: "base", 8: "instruct", 9: "inpainting"}
X, TEXTS = latent(2, 4, 8, 8, dtype=torch.float32), [latent(1, 77, 24, seed=s, dtype=torch.float32) for s in (1, 2)]


def networks(channels=4):
    """The tiny model's; conv_in for more channels begins as the plain one, so that zeros given change nothing."""
    plain, vae, clip = tiny.networks()
    net = unet.UNet(replace(tiny.UNET, in_channels=channels)).eval().requires_grad_(False)
    state = plain.state_dict()
    extra = latent(16, channels - 4, 3, 3, seed=7, dtype=torch.float32) * 0.3
    net.load_state_dict(state | {"conv_in.weight": torch.cat([state["conv_in.weight"], extra], dim=1)})
    return net, vae, clip


def model(channels=4, dtype=torch.float32):
    return sd_module.StableDiffusion(*(network.to(dtype) for network in networks(channels)), Tokenizer())


def further(channels, rows=2, seed=5):
    return latent(rows, channels - 4, 8, 8, seed=seed, dtype=torch.float32)


def error(ours, theirs):
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def same(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs))


def plainly(plain, site, q, k, v):
    return plain(site, q, k, v)


class Seen(list):
    """A tap and a feature that change nothing and keep (site, shapes)."""

    def tap(self, plain, site, q, k, v):
        self.append((site, tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return plain(site, q, k, v)

    def feature(self, site, h):
        self.append((site, tuple(h.shape)))
        return h


class Operations(TorchDispatchMode):
    """Counts what reaches the processor, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **kwargs or {})


# ---------------------------------------------------------------- unused, it costs nothing


def test_auto_takes_the_kernel_where_it_is_preferred(monkeypatch):
    monkeypatch.setattr(attention.kernels, "attend", lambda site, q, k, v: "ours")
    q = torch.zeros(1, 1, 2, 4)
    for preferred in (True, False):
        monkeypatch.setattr(attention.kernels, "preferred", lambda *_, known=preferred: known)
        assert isinstance(attention.auto(Site("up", 0, 0, "self"), q, q, q), str) == preferred


@torch.no_grad()
def test_unused_it_is_the_unets_own_call():
    sd = model()
    text = torch.cat([one.expand(2, -1, -1) for one in TEXTS])
    with Operations() as direct:
        expected = sd.unet(X, 481, text)
    with Operations() as through:
        found = sd.eps(X, 481, TEXTS)
    with Operations() as hooked:
        looked = sd.eps(X, 481, TEXTS, tap=plainly, feature=lambda site, h: h)
    assert same([torch.cat(found)], [expected]) and same(looked, found)
    own = Counter({"aten.expand.default": 2, "aten.cat.default": 1, "aten.split.Tensor": 1})  # the rows, there and back
    assert through.counts - direct.counts == own and not direct.counts - through.counts
    assert hooked.counts == through.counts and sum(direct.counts.values()) > 500


@torch.no_grad()
def test_no_operation_but_the_networks_own():
    """22 ResBlocks add the time and a residual, 16 transformers have four residuals; nothing is copied on the way."""
    sd = model()
    with Operations() as counter:
        sd.eps(X, 481, [TEXTS[0]])
    assert counter.counts["aten.add.Tensor"] == 22 * 2 + 16 * 4
    assert counter.counts["aten.convolution.default"] == sum(isinstance(m, torch.nn.Conv2d) for m in sd.unet.modules())


# ---------------------------------------------------------------- what is seen, and in which order


def attended(place, level, index):
    return [Site(place, level, index, kind) for kind in ("conv", "self", "cross", "block")]


def bare(place, level, index):
    return [Site(place, level, index, kind) for kind in ("conv", "block")]


ORDER = [
    *(site for level in range(3) for site in (*attended("down", level, 0), *attended("down", level, 1),
                                              Site("down", level, 2, "block"))),
    *bare("down", 3, 0), *bare("down", 3, 1),
    *attended("mid", 3, 0)[:3], Site("mid", 3, 1, "conv"), Site("mid", 3, 0, "block"),
    *(site for index in range(3) for site in bare("up", 3, index)),
    *(site for level in (2, 1, 0) for index in range(3) for site in attended("up", level, index)),
]  # fmt: skip


@torch.no_grad()
def test_every_site_is_seen_once_in_the_order_of_computation():
    sd, seen, tapped = model(), Seen(), Seen()
    sd.eps(X, 481, TEXTS, feature=seen.feature, tap=tapped.tap)
    sites = [site for site, _ in seen]
    assert sites == ORDER and len(set(sites)) == len(sites)
    assert [site for site, *_ in tapped] == [site for site in ORDER if site.kind in ("self", "cross")]
    assert Counter(site.kind for site in sites) == {"conv": 22, "self": 16, "cross": 16, "block": 24}


@torch.no_grad()
def test_blocks_are_those_of_compvis():
    """By name: the ResBlock of each entry of input_blocks and output_blocks hands on where its block says so."""
    names = {f"{p}_blocks.{i}" for p, n in (("input", 12), ("output", 12)) for i in range(n)} - {"input_blocks.0"}
    found = set()
    for site in (site for site in ORDER if site.kind == "block" and site.place != "mid"):
        stage = site.level if site.place == "down" else 3 - site.level
        part = "resnets.{}.conv1" if site.place == "up" or site.index < 2 else "downsamplers.0.conv"
        name = f"{site.place}_blocks.{stage}.{part.format(site.index)}.weight"
        found.add(".".join(SINGLE["unet"](name)[0].removeprefix("model.diffusion_model.").split(".")[:2]))
    assert found == names


@torch.no_grad()
@pytest.mark.parametrize("h, w", [(8, 8), (7, 11)])
def test_shapes_are_as_documented(h, w):
    """2 latents under 2 texts: what lies before the first cross-attention sees 2 rows, all the rest 4."""
    seen, tapped = Seen(), Seen()
    model().eps(latent(2, 4, h, w, dtype=torch.float32), 481, TEXTS, feature=seen.feature, tap=tapped.tap)
    sides = [(h, w)]
    for _ in range(3):
        sides.append(tuple((side + 1) // 2 for side in sides[-1]))
    first = Site("down", 0, 0, "self")
    for site, q, k, v in tapped:
        n, c = sides[site.level][0] * sides[site.level][1], tiny.UNET.block_out_channels[site.level]
        rows = 2 if site == first else 4
        assert q == (rows, 4, n, c // 4) and k == v == (rows, 4, n if site.kind == "self" else 77, c // 4)
    for site, shape in seen:
        at = site.level
        if site.kind == "block" and site.place == "down" and site.index == 2:
            at += 1  # the downsampler
        if site.kind == "block" and site.place == "up" and site.index == 2 and site.level:
            at -= 1  # the upsampler at the block's end
        rows = 2 if site in (first, Site("down", 0, 0, "conv")) else 4
        c, (high, wide) = tiny.UNET.block_out_channels[site.level], sides[at]
        assert shape == ((rows, high * wide, c) if site.kind in ("self", "cross") else (rows, c, high, wide)), site


@torch.no_grad()
def test_rows_are_text_by_text_latent_by_latent():
    """A tap that exchanges the two texts' keys and values at every cross-attention gives the other's predictions."""

    def exchanged(plain, site, q, k, v):
        k, v = (y.roll(2, dims=0) if site.kind == "cross" else y for y in (k, v))
        return plain(site, q, k, v)

    sd = model()
    one, two = sd.eps(X, 481, TEXTS)
    swapped = sd.eps(X, 481, TEXTS, tap=exchanged)
    assert same(swapped, [two, one]) and error(one, two) > 1e-3


# ---------------------------------------------------------------- it changes the result, and where


@torch.no_grad()
def test_a_tap_stands_in_for_the_attention():
    def by_hand(plain, site, q, k, v):
        return attention.weights(q, k) @ v

    def doubled(plain, site, q, k, v):
        return 2 * plain(site, q, k, v)

    sd = model()
    found = sd.eps(X, 481, TEXTS)
    assert error(torch.cat(sd.eps(X, 481, TEXTS, tap=by_hand)), torch.cat(found)) <= 1e-5
    assert error(sd.eps(X, 481, TEXTS, tap=doubled)[0], found[0]) > 1e-3
    sd.attend = lambda site, q, k, v: 2 * sdpa(site, q, k, v)  # `plain` is the model's own, whatever that is
    assert same(sd.eps(X, 481, TEXTS, tap=plainly), model().eps(X, 481, TEXTS, tap=doubled))


@torch.no_grad()
def test_weights_are_the_softmax():
    q, k, v = latent(2, 3, 5, 8), latent(2, 3, 7, 8, seed=1), latent(2, 3, 7, 8, seed=2)
    found = attention.weights(q, k)
    assert found.shape == (2, 3, 5, 7) and error(found.sum(-1), torch.ones(2, 3, 5)) <= 1e-12
    assert error(found @ v, sdpa(Site("mid", 0, 0, "self"), q, k, v)) <= 1e-12
    large = torch.full((1, 1, 2, 160), 30.0, dtype=torch.float16)  # q k is 144,000 here, beyond float16
    assert bool((attention.weights(large, large) == 0.5).all())


@torch.no_grad()
def test_every_feature_can_change_the_result():
    sd = model()
    found = torch.cat(sd.eps(X, 481, TEXTS))
    for site in ORDER:
        changed = sd.eps(X, 481, TEXTS, feature=lambda at, h, site=site: h.flip(1, -1) if at == site else h)
        assert error(torch.cat(changed), found) > 1e-5, site


def zero(site):
    return lambda at, h: torch.zeros_like(h) if at == site else h


@torch.no_grad()
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_attentions_are_seen_before_their_residual(kind):
    """Without one of its attentions a transformer block is the other one and the feed-forward."""
    block = model().unet.mid_block.attentions[0].transformer_blocks[0]
    x, text, plain = latent(1, 9, 32, dtype=torch.float32), TEXTS[0], attention.Hooks()
    y = x if kind == "self" else x + block.attn1(block.norm1(x), block.norm1(x), plain)
    y = y if kind == "cross" else y + block.attn2(block.norm2(y), text, plain)
    without = block(x, text, attention.Hooks(feature=zero(Site("mid", 3, 0, kind))))
    assert torch.equal(without, y + block.ff(block.norm3(y)))


@torch.no_grad()
def test_branches_are_seen_before_their_residual_and_blocks_before_they_become_skips():
    """Without its branch a ResBlock of one width is the identity; what a block gives is what is read later."""
    sd, read = model(), {}
    for name, resnet in (("mid", sd.unet.mid_block.resnets[1]), ("up", sd.unet.up_blocks[0].resnets[0])):
        resnet.register_forward_pre_hook(lambda module, args, name=name: read.update({name: args[0]}))
    sd.eps(X, 481, TEXTS, feature=zero(Site("mid", 3, 1, "conv")))
    assert torch.equal(read["up"][:, :32], read["mid"]) and bool(read["mid"].any())
    sd.eps(X, 481, TEXTS, feature=zero(Site("down", 3, 1, "block")))
    assert not bool(read["up"][:, 32:].any())  # the last block of the way down is the first skip of the way up
    sd.eps(X, 481, TEXTS, feature=zero(Site("mid", 3, 0, "block")))
    assert not bool(read["up"][:, :32].any()) and bool(read["up"][:, 32:].any())


# ---------------------------------------------------------------- further input channels


@torch.no_grad()
@pytest.mark.parametrize("channels", [8, 9])
def test_wider_unets_are_diffusers(channels):
    net = networks(channels)[0]
    peer = UNet2DConditionModel.from_config(tiny.CONFIGS["unet"] | {"in_channels": channels}).eval()
    peer.load_state_dict(net.state_dict())
    x, text = latent(2, channels, 7, 11, dtype=torch.float32), latent(2, 77, 24, seed=1, dtype=torch.float32)
    assert error(net(x, 481, text), peer(x, 481, text).sample) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("channels", [8, 9])
def test_given_lies_behind_each_latent(channels):
    sd, given = model(channels), further(channels)
    assert (sd.kind, sd.channels, sd.further) == (KIND[channels], 4, channels - 4)
    found = sd.eps(X, 481, TEXTS, given=given)
    assert sd.evaluations == 4 and [one.shape for one in found] == [X.shape, X.shape]
    for one, text in zip(found, TEXTS):
        for i in range(2):
            whole = torch.cat([X[i : i + 1], given[i : i + 1]], dim=1)
            assert error(one[i : i + 1], sd.unet(whole, 481, text)) <= 1e-5
    once = sd.eps(X, 481, TEXTS, given=given[:1])
    assert same(once, sd.eps(X, 481, TEXTS, given=given[:1].expand(2, -1, -1, -1)))
    assert same([once[0][:1]], [found[0][:1]]) and error(once[0][1], found[0][1]) > 1e-3
    nothing = sd.eps(X, 481, TEXTS, given=torch.zeros_like(given))
    assert error(torch.cat(nothing), torch.cat(model().eps(X, 481, TEXTS))) <= 1e-5


@torch.no_grad()
def test_latents_that_differ_in_what_is_given_alone():
    """InstructPix2Pix asks one latent three times: (nothing, ""), (picture, ""), (picture, instruction)."""
    sd, picture = model(8), further(8, rows=1)
    asked = [(0 * picture, TEXTS[0]), (picture, TEXTS[0]), (picture, TEXTS[1])]
    together = sd.eps(X[:1].repeat(3, 1, 1, 1), 481, [torch.cat([text for _, text in asked])],
                      given=torch.cat([one for one, _ in asked]))[0]  # fmt: skip
    for row, (one, text) in zip(together, asked):
        assert error(row, sd.eps(X[:1], 481, [text], given=one)[0][0]) <= 1e-5


SHAPE = r"\(1, {0}, 8, 8\) or \(2, {0}, 8, 8\)"


@pytest.mark.parametrize("channels, given, words", [
    (4, further(9), r"^given must be None with base weights, got \(2, 5, 8, 8\): leave it out, or load inpainting"),
    (9, None, f"^given must be {SHAPE.format(5)} with inpainting weights, got None: pass the mask .* base weights$"),
    (9, further(8), r"^given must be .* with inpainting weights, got \(2, 4, 8, 8\): pass the mask .* base weights$"),
    (9, further(9, rows=3), r"got \(3, 5, 8, 8\)"),
    (9, further(9)[..., :7], r"got \(2, 5, 8, 7\)"),
    (9, further(9)[0], r"got \(5, 8, 8\)"),
    (8, None, f"^given must be {SHAPE.format(4)} with instruct weights, got None: pass the picture's latent, not "),
    (8, further(9), r"got \(2, 5, 8, 8\)"),
])  # fmt: skip
def test_what_is_given_must_fit_the_weights(channels, given, words):
    sd = model(channels)
    with pytest.raises(ValueError, match=words):
        sd.eps(X, 481, TEXTS, given=given)
    assert sd.evaluations == 0


def test_the_ends_of_what_a_model_takes():
    sd = model()
    for t in (0, 999):
        sd.eps(X, t, TEXTS)
    for t in (-1, 1000):
        with pytest.raises(ValueError, match="t must be a whole number from 0 to 999"):
            sd.eps(X, t, TEXTS)
    for value, fits in ((1.0, True), (-1.0005, True), (1.0015, False), (-1.0015, False), (torch.nan, False)):
        image = torch.full((1, 3, 8, 8), value)
        if fits:
            sd.encode(image)
        else:
            with pytest.raises(ValueError, match=r"floats in \[-1, 1\]"):
                sd.encode(image)
    for shape in ((1, 3, 8, 12), (1, 3, 0, 8), (1, 4, 8, 8), (3, 8, 8)):
        with pytest.raises(ValueError, match="sides multiples of 8"):
            sd.encode(torch.zeros(shape))
    for shape in ((1, 4, 0, 8), (1, 3, 8, 8), (4, 8, 8)):
        with pytest.raises(ValueError, match="latent must be"):
            sd.decode(torch.zeros(shape))


# ---------------------------------------------------------------- gradients


def test_gradients_are_the_finite_differences():
    """float64, through a tap that looks at maps, a feature, and what is given, to every input."""
    sd, weight = model(9, torch.float64), latent(2, 4, 8, 8, seed=9)

    def tap(plain, site, q, k, v):
        return attention.weights(q, k) @ v if site.kind == "cross" else plain(site, q, k, v)

    def loss(x, one, two, given, calls=1):
        found = []

        def feature(site, h):
            if site.kind == "block" and site.place == "up":
                found.append(h.square().mean())
            return h * 1.1

        for _ in range(calls):
            predictions = sd.eps(x, 481, [one, two], tap=tap, feature=feature, given=given)
        return sum((e * weight).sum() for e in predictions) + sum(found)

    at = [latent(2, 4, 8, 8), latent(1, 77, 24, seed=1), latent(1, 77, 24, seed=2), latent(1, 5, 8, 8, seed=3)]
    inputs = [one.requires_grad_() for one in at]
    gradients = torch.autograd.grad(loss(*inputs), inputs)
    assert (sd.evaluations, sd.gradients) == (4, 4)
    with torch.no_grad():
        for i, gradient in enumerate(gradients):
            step = latent(*at[i].shape, seed=20 + i) * 1e-5
            high, low = ([*at[:i], at[i] + sign * step, *at[i + 1 :]] for sign in (1, -1))
            assert float(loss(*high) - loss(*low)) / 2 == pytest.approx(float((gradient * step).sum()), rel=1e-6)
    assert (sd.evaluations, sd.gradients) == (36, 4)


def test_rows_with_a_gradient_are_counted_apart():
    sd = model()
    sd.eps(X, 481, TEXTS)
    assert (sd.evaluations, sd.gradients) == (4, 0)  # the weights have none
    sd.eps(X.clone().requires_grad_(), 481, TEXTS)
    assert (sd.evaluations, sd.gradients) == (8, 4)
    learned = TEXTS[0].clone().requires_grad_()
    sd.eps(X, 481, [learned])
    assert (sd.evaluations, sd.gradients) == (10, 6)
    with torch.no_grad():
        sd.eps(X, 481, [learned])
    assert (sd.evaluations, sd.gradients) == (12, 6)


def test_the_text_encoders_sites():
    sites = [one.site for one in networks()[2].modules() if hasattr(one, "site")]
    assert sites == [Site("clip", 0, 0, "causal"), Site("clip", 0, 1, "causal")]


def test_embeddings_can_be_learned():
    clip: CLIPText = networks()[2]
    ids = Tokenizer()(["a horse"])
    embedded = clip.embeddings(ids).requires_grad_()
    text = clip.transform(embedded)
    assert torch.equal(text, clip(ids))
    (gradient,) = torch.autograd.grad(text[0, 2].sum(), [embedded])
    assert bool((gradient[0, :3].abs().sum(-1) > 0).all()) and bool((gradient[0, 3:] == 0).all())  # none from later


# ---------------------------------------------------------------- weights that read more than the latent


def test_full_size_opens_and_is_described(tmp_path, capsys):
    for channels, said in ((9, "inpainting"), (8, "InstructPix2Pix")):
        conv = ([320, channels, 3, 3], "F32")
        folder = hollow_folder(tmp_path / said, unet=manifest("unet") | {"conv_in.weight": conv})
        config = folder / "unet" / "config.json"
        config.write_text(config.read_text().replace('"in_channels": 4', f'"in_channels": {channels}'))
        single = {"model.diffusion_model.input_blocks.0.0.weight": conv}
        file = hollow(tmp_path / f"{said}.safetensors", manifest("single") | single)
        for path in (folder, file):
            assert main(["info", str(path), "--json"]) == 0
            told = json.loads(capsys.readouterr().out)
            assert told["kind"] == f"Stable Diffusion v1, {said}"
            assert told["networks"]["unet"]["parameters"] == 859_520_964 + 320 * 9 * (channels - 4)


def write_folder(folder, channels):
    for network, module in zip(tiny.FILES, networks(channels)):
        save(folder / network / tiny.FILES[network], tiny.tensors(network, module))
        more = {"in_channels": channels} if network == "unet" else {}
        (folder / network / "config.json").write_text(json.dumps(tiny.CONFIGS[network] | more))
    return folder


def write_single(path, channels):
    state = {}
    for network, module in zip(tiny.FILES, networks(channels)):
        state |= {SINGLE[network](name)[0]: tensor for name, tensor in module.state_dict().items()}
    return save(path, state)


@pytest.mark.parametrize("write, channels", [
    (write_folder, 8), (write_folder, 9), (write_single, 4), (write_single, 8), (write_single, 9),
])  # fmt: skip
@torch.no_grad()
def test_all_kinds_load_from_both_layouts(write, channels, tmp_path, monkeypatch):
    for network, config in zip(tiny.FILES, (tiny.UNET, tiny.VAE_, tiny.CLIP)):  # what a single file is assumed to be
        monkeypatch.setitem(
            KINDS, network, partial(type(config), **vars(config)) if write is write_single else type(config)
        )
    sd = StableDiffusion.load(write(tmp_path / "m", channels), device="cpu")
    assert (sd.kind, sd.channels, sd.unet.config.in_channels) == (KIND[channels], 4, channels)
    assert sd.checkpoint.kind == sd.kind
    given = further(channels) if channels > 4 else None
    expected = model(channels).eps(X, 481, TEXTS, given=given)
    assert error(torch.cat(sd.eps(X, 481, TEXTS, given=given)), torch.cat(expected)) <= 1e-5
    state = networks(channels)[0].state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in sd.unet.state_dict().items())


# ---------------------------------------------------------------- mistakes, made on purpose

MISTAKES = {
    "the branch seen with its residual": (
        "unet", "self.conv_shortcut(x) + hooks.feature(self.site, h)",
        "hooks.feature(self.site, self.conv_shortcut(x) + h)",
        test_branches_are_seen_before_their_residual_and_blocks_before_they_become_skips,
    ),
    "a skip taken before its block is seen": (
        "unet", "            x = hooks.feature(self.sites[i], x)\n            skips.append(x)",
        "            skips.append(x)\n            x = hooks.feature(self.sites[i], x)",
        test_branches_are_seen_before_their_residual_and_blocks_before_they_become_skips,
    ),
    "features that are looked at only": (
        "unet", "            x = hooks.feature(self.sites[i], x)\n        return x",
        "            hooks.feature(self.sites[i], x)\n        return x", test_every_feature_can_change_the_result,
    ),
    "a block seen before its upsampler": (
        "unet", "if skips and i == len(self.resnets) - 1", "if skips and i == 0",
        partial(test_shapes_are_as_documented, 8, 8),
    ),
    "no fan-out": ("unet", "x if len(x) == rows else", "x if True else", partial(test_shapes_are_as_documented, 8, 8)),
    "attention seen with its residual": (
        "unet", "x = x + self.attn2(self.norm2(x), text, hooks)",
        "x = hooks.feature(self.attn2.site, x + self.attn2(self.norm2(x), text, Hooks(hooks.attend)))",
        partial(test_attentions_are_seen_before_their_residual, "cross"),
    ),
    "attention's output not shown": (
        "unet", "return hooks.feature(self.site, self.to_out", "return (lambda site, h: h)(self.site, self.to_out",
        test_every_site_is_seen_once_in_the_order_of_computation,
    ),
    "middle convolutions of one name": (
        "unet", 'Site("mid", level, i, "conv")', 'Site("mid", level, 0, "conv")',
        test_every_site_is_seen_once_in_the_order_of_computation,
    ),
    "maps over queries": (
        "attention", "k.transpose(-1, -2), dim=-1)", "k.transpose(-1, -2), dim=-2)", test_weights_are_the_softmax,
    ),
    "maps that overflow": (
        "attention", "torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)",
        "torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)", test_weights_are_the_softmax,
    ),
    "given before the latent": (
        "sd", "[x_t, given.to(x_t).expand(len(x_t), -1, -1, -1)]", "[given.to(x_t).expand(len(x_t), -1, -1, -1), x_t]",
        partial(test_given_lies_behind_each_latent, 9),
    ),
    "the first row's given for all": (
        "sd", "given.to(x_t).expand(", "given.to(x_t)[:1].expand(", partial(test_given_lies_behind_each_latent, 8),
    ),
    "sdpa for the model's own": (
        "sd", "partial(tap, self.attend)", "partial(tap, sdpa)", test_a_tap_stands_in_for_the_attention,
    ),
    "no gradient": (
        "sd", "(x, t, text, *hooks)", "(x.detach(), t, text, *hooks)",
        test_gradients_are_the_finite_differences,
    ),
    "all rows counted as gradients": (
        "sd", "len(predictions) * predictions.requires_grad", "len(predictions)",
        test_rows_with_a_gradient_are_counted_apart,
    ),
    "one operation for those without hooks": (
        "unet", "skips, time = [x], hooks", "skips, time = [x + 0], hooks",
        test_no_operation_but_the_networks_own,
    ),
    "the caller's tap left out": ("sd", "if tap is None else", "if True else", test_a_tap_stands_in_for_the_attention),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_turns_a_test_red(name, monkeypatch):
    file, old, new, test = MISTAKES[name]
    monkeypatch.setitem(globals(), "sd_module" if file == "sd" else file, mutant(file, old, new, monkeypatch))
    with pytest.raises((AssertionError, RuntimeError)):
        test()
