"""The arithmetic of the learned metrics against closed forms and independent computation; tiny random networks."""

import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import sqrtm
from torch import nn

from minidiffedit import Tokenizer
from minidiffedit.many import perceptual
from minidiffedit.many.perceptual import (
    TransformersClip,
    clip_direction,
    clip_score,
    csfid,
    features,
    fid,
    kid,
    lpips,
    self_similarity,
    sfid,
    structure_distance,
    vit_keys,
)

RNG = np.random.default_rng(0)
A = RNG.integers(0, 256, (64, 48, 3), dtype=np.uint8)
B = np.clip(A + RNG.normal(0, 40, A.shape), 0, 255).astype(np.uint8)


def gaussian(n, mean, root, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, len(mean))) @ root.T + mean)


# ---------------------------------------------------------------- sets of features


def test_fid_is_its_definition():
    """Against Heusel's formula with numpy's covariance and scipy's root; more and fewer samples than features."""
    for n, m, d in ((50, 30, 4), (7, 9, 12), (40, 5, 12)):
        x, y = RNG.normal(size=(n, d)) @ RNG.normal(size=(d, d)), RNG.normal(size=(m, d)) + 0.3
        cx, cy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
        eigenvalues = np.linalg.eigvals(cx @ cy).real.clip(min=0)
        expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx + cy) - 2 * np.sqrt(eigenvalues).sum()
        assert fid(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-6)
        if min(n, m) > d:  # scipy's root needs full rank
            assert np.trace(sqrtm(cx @ cy)).real == pytest.approx(np.sqrt(eigenvalues).sum(), rel=1e-9)


def test_fid_of_two_gaussians_is_known():
    """N(m, A A') and N(0, I): |m|^2 + tr(A A' + 1 - 2 (A A')^1/2), in the limit; for one dimension m^2 + (s - 1)^2."""
    mean, root = np.array([1.0, -2.0, 0.5]), np.diag([2.0, 0.5, 1.0])
    x, y = gaussian(200_000, mean, root), gaussian(200_000, np.zeros(3), np.eye(3), seed=1)
    assert fid(x, y) == pytest.approx(5.25 + (2 - 1) ** 2 + (0.5 - 1) ** 2, rel=0.02)
    exact = torch.tensor([[-3.0], [3.0]]), torch.tensor([[9.0], [11.0]])  # means 0 and 10, variances 18 and 2
    assert fid(*exact) == pytest.approx(100 + (math.sqrt(18) - math.sqrt(2)) ** 2)


def test_fid_and_kid_do_not_know_order_nor_the_frame():
    x, y = gaussian(20, np.zeros(6), np.eye(6)), gaussian(30, np.ones(6), np.diag(np.arange(1.0, 7)), seed=1)
    turn = torch.from_numpy(np.linalg.qr(RNG.normal(size=(6, 6)))[0])
    for distance in (fid, kid, sfid):
        assert distance(x, y) == pytest.approx(distance(y.flip(0), x), rel=1e-9)
        assert distance(x @ turn, y @ turn) == pytest.approx(distance(x, y), rel=1e-9)
    assert fid(x, x) == pytest.approx(0, abs=1e-12) and fid(x, x) >= 0
    assert fid(x.float(), y.float()) == pytest.approx(fid(x, y), rel=1e-5)


def test_kid_is_the_unbiased_estimate_by_hand():
    x, y = gaussian(6, np.zeros(3), np.eye(3)), gaussian(4, np.ones(3), np.eye(3), seed=1)

    def k(u, v):
        return (sum(float(a * b) for a, b in zip(u, v)) / 3 + 1) ** 3

    within = [
        sum(k(z[i], z[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1)) for z, n in ((x, 6), (y, 4))
    ]
    across = sum(k(a, b) for a in x for b in y) / 24
    assert kid(x, y) == pytest.approx(sum(within) - 2 * across, rel=1e-12)


def test_kid_has_no_bias():
    """Its mean over many small sets of one distribution is 0 within three standard errors, and it goes below 0."""
    values = [kid(*gaussian(10, np.zeros(4), np.eye(4), seed=seed).split(5)) for seed in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20 and min(values) < 0


def test_torchmetrics_agrees():
    """Its own FID and KID classes around the same features; KID's subsets are all samples."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    class Pooled(nn.Module):
        num_features = 12

        def forward(self, pictures):
            return F.adaptive_avg_pool2d(pictures.double() / 255, (2, 2)).flatten(1)

    real, made = (torch.from_numpy(RNG.integers(0, high, (30, 3, 8, 8), dtype=np.uint8)) for high in (256, 200))
    x, y = (features([p.permute(1, 2, 0).numpy() for p in some], Pooled()) for some in (real, made))
    assert x.shape == (30, 12) and torch.equal(x, Pooled()(real))
    for metric, ours in (
        (FrechetInceptionDistance(Pooled(), input_img_size=(3, 8, 8)).set_dtype(torch.float64), fid(x, y)),
        (KernelInceptionDistance(Pooled(), subsets=1, subset_size=30), kid(x, y)),
    ):
        metric.update(real, real=True)
        metric.update(made, real=False)
        theirs = metric.compute()
        assert ours == pytest.approx(float(theirs[0] if isinstance(theirs, tuple) else theirs), rel=1e-4)


def test_sfid_and_csfid_by_hand():
    """Every aimed-at class counts the same, however many edits; real classes nobody aims at do not count."""
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 10.0]])  # class a twice: mean (1, 0); class b once
    y = torch.tensor([[1.0, 3.0], [1.0, 5.0], [10.0, 11.0], [99.0, 99.0]])  # a: mean (1, 4); b: (10, 11); c
    assert sfid(x[:2], y[:2]) == 16
    assert csfid(x, ["a", "a", "b"], y, ["a", "a", "b", "c"]) == pytest.approx((16 + 1) / 2)
    assert csfid(x.flip(0), ["b", "a", "a"], y.flip(0), ["c", "b", "a", "a"]) == pytest.approx((16 + 1) / 2)
    one, two = (gaussian(9, np.zeros(2), np.eye(2), seed=s) for s in (1, 2))
    labels = ["a"] * 4 + ["b"] * 5
    expected = (fid(one[:4], two[:4]) + fid(one[4:], two[4:])) / 2
    assert csfid(one, labels, two, labels, distance=fid) == pytest.approx(expected, rel=1e-12)


def test_features_that_do_not_fit_are_refused():
    x = torch.zeros(3, 4)
    for bad, words in (
        (lambda: fid(x, torch.zeros(3, 5)), r"\(n, d\)"),
        (lambda: fid(x, x[:1]), ">= 2"),
        (lambda: kid(x[:1], x), ">= 2"),
        (lambda: fid(x * math.nan, x), "NaN"),
        (lambda: csfid(x, [0, 0, 1], x, [0, 0, 0]), "class 1"),
        (lambda: csfid(x, [0, 0], x, [0, 0, 0]), "2 and 3 classes"),
        (lambda: features([], None), "no pictures"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()


# ---------------------------------------------------------------- LPIPS


@pytest.fixture
def alexnet(monkeypatch):
    """torchmetrics' LPIPS with its own heads around a random AlexNet: torchvision's weights cannot be had here."""
    from torchmetrics.functional.image import lpips as theirs

    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    monkeypatch.setattr(theirs, "_TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda net, pretrained: layers)
    monkeypatch.setattr("torchmetrics.image.lpip._TORCHVISION_AVAILABLE", True)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    return layers


def test_lpips_is_its_definition(alexnet):
    network = perceptual.load_lpips("alex")
    heads = perceptual.needed("torchmetrics.functional.image.lpips", "")._LPIPS(net="alex").lins
    expected, maps = 0.0, []
    for picture in (A, B):
        x = torch.from_numpy(picture / 127.5 - 1).float().permute(2, 0, 1)[None]
        x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
            :, None, None
        ]
        seen = []
        for layer in alexnet:
            x = layer(x)
            seen += [x[0]] if isinstance(layer, nn.ReLU) else []
        maps.append(seen)
    for one, two, head in zip(*maps, heads, strict=True):
        weights = head.model[-1].weight[0, :, 0, 0]
        apart = (one / one.norm(dim=0) - two / two.norm(dim=0)) ** 2
        expected += float((apart * weights[:, None, None]).sum(0).mean())
    assert lpips(A, B, network) == pytest.approx(expected, rel=1e-4)
    assert lpips(A, A, network) == 0 and lpips(A, B, network) > 0


def test_lpips_of_the_background_alone(alexnet):
    network, mask = perceptual.load_lpips("alex"), np.zeros((64, 48), bool)
    mask[:, :20] = True
    inside, black = A.copy(), A.copy()
    inside[mask], black[mask] = 255, 0
    assert lpips(A, inside, network, where=~mask) == 0 and lpips(A, inside, network) > 0
    assert lpips(A, B, network, where=~mask) == pytest.approx(lpips(black, B * ~mask[..., None], network), rel=1e-5)
    assert lpips(A[..., 0], B[..., 0], network) == pytest.approx(
        lpips(*(np.repeat(p[..., :1], 3, axis=-1) for p in (A, B)), network), rel=1e-6
    )  # grey pictures are three equal channels


# ---------------------------------------------------------------- CLIP


class Compass:
    """Pictures and texts as given directions, of lengths that must not matter."""

    def pictures(self, pictures):
        return torch.stack([picture * 7.0 for picture in pictures])

    def texts(self, texts):
        turn = {"east": 0, "north": 90, "north-west": 135, "west": 180}
        return torch.tensor([[3 * math.cos(math.radians(turn[t])), 3 * math.sin(math.radians(turn[t]))] for t in texts])


def at(degrees):
    return torch.tensor([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))])


def test_clip_score_is_a_hundred_times_the_cosine():
    assert clip_score(at(30), "east", Compass()) == pytest.approx(100 * math.cos(math.radians(30)))
    assert clip_score(at(90), "north", Compass()) == pytest.approx(100)
    assert clip_score(at(60), "west", Compass()) == 0  # never below


def test_clip_direction_is_the_angle_between_the_two_moves():
    """On the unit circle the chord from a to b points at (a + b) / 2 + 90 degrees."""
    for start, end, expected in ((0, 90, 0), (0, 60, 15), (90, 0, 180), (90, 180, 90)):
        chord = math.cos(math.radians(expected))  # between that chord and the one from east to north
        assert clip_direction(at(start), at(end), "east", "north", Compass()) == pytest.approx(chord, abs=1e-6)
    assert clip_direction(at(0), at(0), "east", "north", Compass()) == 0
    assert clip_direction(at(0), at(60), "east", "east", Compass()) == 0


@pytest.fixture(scope="module")
def tiny_clip():
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = shared | {"eos_token_id": 49407, "bos_token_id": 49406, "pad_token_id": 49407}
    vision = shared | {"image_size": 56, "patch_size": 28}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    return model, TransformersClip(model)


def test_clip_score_equals_the_models_own(tiny_clip):
    """transformers' joint call, on pixels prepared by hand: a picture of the model's size needs no resizing."""
    model, clip = tiny_clip
    picture = RNG.integers(0, 256, (56, 56, 3), dtype=np.uint8)
    mean, spread = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.from_numpy(((picture / 255 - mean) / spread).transpose(2, 0, 1)[None]).float()
    with torch.no_grad():
        texts = ["a horse", "a zebra", "a red car in the snow", ""]
        out = model(input_ids=Tokenizer()(texts), pixel_values=pixels)
        cosines = (out.logits_per_image / model.logit_scale.exp())[0].tolist()
    for text, cosine in zip(texts, cosines):
        for given in (picture, Image.fromarray(picture)):
            assert clip_score(given, text, clip) == pytest.approx(max(0, 100 * cosine), abs=1e-3)
    assert max(cosines) > 0.01


def test_clip_pictures_are_prepared_as_transformers_does(tiny_clip):
    import transformers

    _, clip = tiny_clip
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor  # before 5: that
    prepare = kind(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    seen = []
    clip.model = SimpleNamespace(get_image_features=lambda pixel_values: seen.append(pixel_values))
    try:
        for h, w in ((64, 97), (131, 64), (56, 56), (40, 30)):
            picture = Image.fromarray(RNG.integers(0, 256, (h, w, 3), dtype=np.uint8))
            clip.pictures([picture])
            theirs = prepare(images=picture, return_tensors="pt")["pixel_values"]
            assert torch.allclose(seen[-1], theirs, atol=1e-5)
    finally:
        clip.model = tiny_clip[0]


# ---------------------------------------------------------------- structure


def test_self_similarity_and_its_distance_by_hand():
    keys = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, 0.0]])
    half = math.sqrt(0.5)
    expected = torch.tensor([[1, 0, half, 0], [0, 1, half, 0], [half, half, 1, 0], [0, 0, 0, 0]], dtype=torch.float64)
    assert torch.allclose(self_similarity(keys), expected)
    other = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 1.0], [0.0, 0.0]])  # the second key turned to the first
    given = {0: keys, 1: other}
    a, b = np.zeros((4, 4), np.uint8), np.ones((4, 4), np.uint8)
    assert structure_distance(a, b, lambda p: given[int(p[0, 0])]) == pytest.approx(2 / 16)  # two pairs changed by 1
    assert structure_distance(a, a, lambda p: given[int(p[0, 0])]) == 0
    with pytest.raises(ValueError, match="one size"):
        structure_distance(a, a[:2], None)


def test_dino_keys_are_the_last_layers():
    """The keys, taken from the model's weights by hand: the last layer's input, normed, through its key projection."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    model = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8), add_pooling_layer=False).eval()
    picture = Image.fromarray(A[:24, :16])  # not the size of training: position embeddings are interpolated
    hooks = [len(m._forward_hooks) for m in model.modules()]  # transformers has some of its own
    keys = vit_keys(model, perceptual.normed(picture, *perceptual.IMAGENET))
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    pixels = torch.from_numpy(np.array(picture) / 255).permute(2, 0, 1)[None].float()
    mean, spread = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixels = (pixels - mean) / spread
    with torch.no_grad():
        states = model(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        if hasattr(model, "layers"):
            last, key = model.layers[-1], "attention.k_proj"
        else:  # before transformers 5
            last, key = model.encoder.layer[-1], "attention.attention.key"
        expected = last.get_submodule(key)(last.layernorm_before(states[-2]))[0]
    assert keys.shape == (1 + 3 * 2, 32) and torch.allclose(keys, expected, atol=1e-6)


# ---------------------------------------------------------------- what cannot be had


def test_a_missing_or_broken_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # what Python does for a package that is not there
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for load, package in (
        (perceptual.load_lpips, "torchvision"),
        (perceptual.load_inception, "torch-fidelity"),
        (perceptual.load_clip, "transformers"),
        (perceptual.load_dino, "transformers"),
    ):
        with pytest.raises(ValueError, match=rf"{package}.*pip install 'minidiffedit\[eval\]'") as error:
            load()
        assert "\n" not in str(error.value)

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist\nand a long story")

    monkeypatch.setattr(perceptual.importlib, "import_module", broken)
    with pytest.raises(ValueError, match=r"torchvision::nms does not exist\)") as error:
        perceptual.load_lpips()
    assert "story" not in str(error.value)
    with pytest.raises(ValueError, match="alex, vgg and squeeze"):
        perceptual.load_lpips("resnet")


def test_weights_that_cannot_be_had_are_one_line(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise ConnectionError("no route to the hub\nTraceback...")

    monkeypatch.setattr("transformers.CLIPModel.from_pretrained", fail)
    monkeypatch.setattr("transformers.ViTModel.from_pretrained", fail)
    inception = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    inception.FeatureExtractorInceptionV3 = fail
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, inception.__name__, inception)
    for load, name in (
        (perceptual.load_clip, "openai/clip-vit-large-patch14"),
        (perceptual.load_dino, "facebook/dino-vitb8"),
        (perceptual.load_inception, "Inception v3"),
    ):
        with pytest.raises(OSError, match=f"^no route to the hub; the weights of .*{name}.* cannot be had"):
            load()
