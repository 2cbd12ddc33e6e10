"""How alike, how true to a text and how real pictures are, by the eyes of trained networks; the `eval` extra.

The arithmetic on features is written out here, in float64; the networks and their weights come from packages:

| figure | loader | package | network and weights |
|---|---|---|---|
| LPIPS | load_lpips | torchmetrics, torchvision | AlexNet, VGG16 or SqueezeNet 1.1 (ImageNet), LPIPS heads v0.1 |
| CLIP score, direction | load_clip | transformers | openai/clip-vit-large-patch14 (WIT-400M) |
| FID, KID, SFID, CSFID | load_inception | torch-fidelity | Inception v3 of the FID authors (2015-12-05), 2048 pooled |
| structure distance | load_dino | transformers | facebook/dino-vitb8 (ImageNet, no labels), keys of the last layer |

A figure is comparable with published ones only with the network named there. Each loader raises ValueError where its
package is missing or broken and OSError where its weights cannot be had, one line each. Each figure takes its network
as an argument, so another network with the same call will do:

    lpips(a, b, load_lpips())                              0 and up, 0 for equal pictures
    clip_score(picture, text, load_clip())                 0 to 100
    clip_direction(source, edited, source_text, target_text, load_clip())      -1 to 1
    structure_distance(a, b, load_dino())                  0 to 4, papers print it times 1000
    fid(x, y), kid(x, y), sfid(x, y)                       x = features(pictures, load_inception())
    csfid(x, x_classes, y, y_classes)

Pictures are PIL images or uint8 arrays (H, W, 3) or (H, W), as in metrics.py.
"""

import importlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..files.images import to_rgb
from ..tokenizer import Tokenizer
from .metrics import pair

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and spread of ImageNet's pictures in [0, 1]
CLIP_PICTURES = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


Classes = Sequence[Hashable]
Distance = Callable[[Tensor, Tensor], float]


class Clip(Protocol):
    """n pictures, or n texts -> (n, d): one space for both. Lengths don't matter."""

    def pictures(self, pictures: Sequence[Any]) -> Tensor: ...
    def texts(self, texts: Sequence[str]) -> Tensor: ...


# ---------------------------------------------------------------- two pictures


@torch.no_grad()
def lpips(a: Any, b: Any, network: Callable[[Tensor, Tensor], Tensor], where: np.ndarray | None = None) -> float:
    """Learned perceptual distance, 0 and up (Zhang et al., 1801.03924, eq. 1): at each of the network's layers the
    features are normed to length 1 along the channels, their squared differences weighted by the layer's head and
    averaged over the picture, and the layers added up.

    network(x, y), each (1, 3, H, W) float32 in [-1, 1] -> one number: `load_lpips`. where: bool (H, W); all other
    pixels are made black in both pictures, as PIE-Bench does for the background. Pictures are not resized.
    """
    x, y = pair(a, b, where)
    x, y = (p if where is None else p * where[..., None] for p in (x, y))
    one, two = (torch.from_numpy(np.broadcast_to(p, (*p.shape[:2], 3)) / 127.5 - 1) for p in (x, y))
    return float(network(*(p.permute(2, 0, 1)[None].float() for p in (one, two))))


@torch.no_grad()
def structure_distance(a: Any, b: Any, network: Callable[[Any], Tensor]) -> float:
    """Mean squared difference between two pictures' self-similarities, 0 to 4 (Tumanyan et al., "Splicing ViT
    Features", 2201.00424, section 3; the mean in place of the norm, as in their code): what resembles what within each
    picture, whatever the colours.

    network(picture) -> keys (tokens, d), heads joined, class token included: `load_dino`. Raises ValueError where the
    pictures differ in size.
    """
    pair(a, b)
    return float((self_similarity(network(a)) - self_similarity(network(b))).square().mean())


def self_similarity(keys: Tensor) -> Tensor:
    """(n, d) -> (n, n) float64, the cosines between all pairs; 0 for a key of length 0."""
    directions = F.normalize(keys.double(), dim=-1)
    return directions @ directions.T


# ---------------------------------------------------------------- pictures and texts


@torch.no_grad()
def clip_score(picture: Any, text: str, clip: Clip) -> float:
    """100 max(cos(picture, text), 0), 0 to 100 (Hessel et al., "CLIPScore", 2104.08718, section 3, with the weight 100
    that torchmetrics and PIE-Bench use in place of 2.5)."""
    return max(0.0, 100 * cosine(clip.pictures([picture])[0], clip.texts([text])[0]))


@torch.no_grad()
def clip_direction(source: Any, edited: Any, source_text: str, target_text: str, clip: Clip) -> float:
    """Does the picture move as the text does? cos(edited - source, target_text - source_text), -1 to 1, between
    embeddings of length 1 (Gal et al., "StyleGAN-NADA", 2108.00946: 1 - the directional loss; InstructPix2Pix,
    2211.09800, reports it so). 0 where one of them does not move.
    """
    before, after = F.normalize(clip.pictures([source, edited]).double(), dim=-1)
    said, wanted = F.normalize(clip.texts([source_text, target_text]).double(), dim=-1)
    return cosine(after - before, wanted - said)


def cosine(x: Tensor, y: Tensor) -> float:
    return float(F.cosine_similarity(x.double(), y.double(), dim=-1))


# ---------------------------------------------------------------- two sets of pictures


@torch.no_grad()
def features(pictures: Iterable[Any], network: Callable[[Tensor], Tensor]) -> Tensor:
    """n pictures of any sizes -> (n, d) float64 on the CPU. network((1, 3, H, W) uint8) -> (1, d): `load_inception`."""
    rows = [network(torch.from_numpy(np.array(to_rgb(as_image(p)))).permute(2, 0, 1)[None]) for p in pictures]
    if not rows:
        raise ValueError("no pictures to take features of")
    return torch.cat([row.double().cpu() for row in rows])


def fid(x: Tensor, y: Tensor) -> float:
    """Frechet inception distance between features (n, d) and (m, d), 0 and up (Heusel et al., 1706.08500, eq. 6):

    |mean x - mean y|^2 + tr(Cx + Cy - 2 (Cx Cy)^1/2), covariances with n - 1. The trace of the root is the sum of the
    singular values of X Y' / sqrt((n-1)(m-1)), X and Y the centred features: no matrix root, no complex remainder.
    It is biased: fewer pictures than a few times d give larger figures. Raises ValueError below 2 pictures.
    """
    x, y = both(x, y, least=2)
    roots = []
    for z in (x, y):
        centred = (z - z.mean(dim=0)) / (len(z) - 1) ** 0.5
        roots.append(torch.linalg.qr(centred, mode="r").R if len(z) > z.shape[1] else centred)  # R'R = C
    spread = sum(root.square().sum() for root in roots) - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return float(sfid(x, y) + spread.clamp(min=0))


def kid(x: Tensor, y: Tensor) -> float:
    """Kernel inception distance between features (n, d) and (m, d): the unbiased estimate of the squared maximum mean
    discrepancy under (u.v / d + 1)^3 (Binkowski et al., 1801.01401, section 4; Gretton et al. 2012, eq. 3).

    Around 0 for equal distributions, and below it half the time. Over all pairs at once: the same expectation as the
    usual mean over random subsets, without their noise. Raises ValueError below 2 pictures.
    """
    x, y = both(x, y, least=2)

    def kernel(u: Tensor, v: Tensor) -> Tensor:
        return (u @ v.T / u.shape[1] + 1) ** 3

    def within(u: Tensor) -> Tensor:
        k = kernel(u, u)
        return (k.sum() - k.diagonal().sum()) / (len(u) * (len(u) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def sfid(x: Tensor, y: Tensor) -> float:
    """Simplified FID, |mean x - mean y|^2 for features (n, d) and (m, d): the first term of `fid`, which small sets
    allow (Couairon et al., "FlexIT", 2203.04705: their published evaluation computes it and leaves the spread out)."""
    x, y = both(x, y, least=1)
    return float((x.mean(dim=0) - y.mean(dim=0)).square().sum())


def csfid(x: Tensor, x_classes: Classes, y: Tensor, y_classes: Classes, distance: Distance = sfid) -> float:
    """Class-conditional simplified FID, what DiffEdit's ImageNet figures show (2210.11427, section 4; from FlexIT,
    2203.04705, and its published evaluation): the mean, over the classes that edits aim at, of `sfid` between the edits
    aimed at a class and real pictures of it; every class counts the same. distance=fid takes the spread in as well.

    x (n, d): features of the edits, x_classes: the n classes they aim at; y, y_classes: the real ones; classes of y
    that x lacks are left out. Raises ValueError for lengths that differ, or a class without real pictures.
    """
    x, y = both(x, y, least=1)
    if len(x_classes) != len(x) or len(y_classes) != len(y):
        raise ValueError(f"{len(x)} and {len(y)} features, but {len(x_classes)} and {len(y_classes)} classes")
    classes = dict.fromkeys(x_classes)
    if missing := [c for c in classes if c not in set(y_classes)]:
        raise ValueError(f"no real pictures of the class {missing[0]!r}")
    of_class = ((x[[one == c for one in x_classes]], y[[one == c for one in y_classes]]) for c in classes)
    return sum(distance(made, real) for made, real in of_class) / len(classes)


def both(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Two sets of features as float64."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < least:
        raise ValueError(f"features must be (n, d) and (m, d), n and m >= {least}, got {(*x.shape,)} and {(*y.shape,)}")
    x, y = x.double(), y.double()
    if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("the features hold NaN or infinity")
    return x, y


# ---------------------------------------------------------------- the networks


def load_lpips(net: str = "alex", device: str | torch.device = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS v0.1: "alex" (its authors' default, and FlexIT's), "vgg" or "squeeze" (PIE-Bench's)."""
    if net not in ("alex", "vgg", "squeeze"):
        raise ValueError(f"LPIPS knows alex, vgg and squeeze, got {net!r}")
    needed("torchvision", "LPIPS")
    metric = needed("torchmetrics.image.lpip", "LPIPS").LearnedPerceptualImagePatchSimilarity
    with weights_of(f"LPIPS with torchvision's {net}"):
        network = metric(net_type=net).to(device)
    return lambda x, y: network(x.to(device), y.to(device))


def load_clip(name: str = "openai/clip-vit-large-patch14", device: str | torch.device = "cpu") -> Clip:
    """transformers' CLIPModel, by hub id or folder, in float32; texts by this package's tokenizer, at most 75 tokens.

    Pictures: shorter side to the model's size (bicubic), centre cut out, CLIP's mean and spread (the authors' own
    preprocessing).
    """
    module = needed("transformers", "CLIP").CLIPModel
    with weights_of(f"CLIP ({name})"):
        model = module.from_pretrained(name).to(device, torch.float32).eval()
    return TransformersClip(model, device)


class TransformersClip:
    """A transformers CLIPModel as `Clip`."""

    def __init__(self, model: Any, device: str | torch.device = "cpu"):
        self.model, self.device, self.side = model, device, model.config.vision_config.image_size
        self.tokenizer = Tokenizer()

    def pictures(self, pictures: Sequence[Any]) -> Tensor:
        rows = []
        for picture in pictures:
            small = shorter_side(to_rgb(as_image(picture)), self.side, BICUBIC)
            left, top = (round((n - self.side) / 2) for n in small.size)
            rows.append(normed(small.crop((left, top, left + self.side, top + self.side)), *CLIP_PICTURES))
        return projected(self.model.get_image_features(pixel_values=torch.cat(rows).to(self.device)))

    def texts(self, texts: Sequence[str]) -> Tensor:
        return projected(self.model.get_text_features(input_ids=self.tokenizer(texts).to(self.device)))


def projected(out: Any) -> Tensor:
    """transformers 5 wraps what 4 returned bare."""
    return getattr(out, "pooler_output", out)


def load_inception(weights: str | Path | None = None, device: str | torch.device = "cpu") -> Callable[[Tensor], Tensor]:
    """The network of the FID authors' code as torch-fidelity ports it (TensorFlow's 2015-12-05 weights and resizing to
    299 x 299): (n, 3, H, W) uint8 -> (n, 2048). weights: a file torch-fidelity would download otherwise."""
    module = needed("torch_fidelity.feature_extractor_inceptionv3", "FID")
    file = None if weights is None else str(weights)
    with weights_of("FID's Inception v3 (torch-fidelity)"):
        make = module.FeatureExtractorInceptionV3
        network = make("inception-v3-compat", ["2048"], feature_extractor_weights_path=file).to(device)
    return lambda pictures: network(pictures.to(device))[0]


def load_dino(name: str = "facebook/dino-vitb8", device: Any = "cpu", prepare: Any = None) -> Callable[[Any], Tensor]:
    """picture -> (tokens, d), the last layer's keys of a DINO ViT (Caron et al., 2104.14294), by hub id or folder.

    prepare: PIL RGB -> (1, 3, h, w); else Splice's: shorter side 224, longer at most 480, ImageNet's mean and spread.
    """
    prepare = prepare or (lambda picture: normed(shorter_side(picture, 224, longest=480), *IMAGENET))
    module = needed("transformers", "the structure distance").ViTModel
    with weights_of(f"DINO ({name})"):
        model = module.from_pretrained(name, add_pooling_layer=False).to(device, torch.float32).eval()
    return lambda picture: vit_keys(model, prepare(to_rgb(as_image(picture))))


@torch.no_grad()
def vit_keys(model: Any, pixels: Tensor) -> Tensor:
    """The output of the last key projection of a transformers ViTModel, (tokens, d), on pixels (1, 3, h, w)."""
    *_, last = (m for name, m in model.named_modules() if name.endswith((".key", ".k_proj")))  # transformers 4, 5
    kept: list[Tensor] = []
    hook = last.register_forward_hook(lambda module, inputs, out: kept.append(out))
    try:
        model(pixels.to(next(model.parameters()).device), interpolate_pos_encoding=True)
    finally:
        hook.remove()
    return kept[0][0]


def as_image(picture: Any) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture, np.uint8))


def shorter_side(picture: Image.Image, side: int, how: Any = BILINEAR, longest: int | None = None) -> Image.Image:
    """Resized so that the shorter side is `side`, or less where the longer would exceed `longest`."""
    w, h = picture.size
    scale = side / min(w, h)
    if longest is not None:
        scale = min(scale, longest / max(w, h))
    size = (side if scale * w == side else int(scale * w), side if scale * h == side else int(scale * h))
    return picture if size == picture.size else picture.resize(size, how)


def normed(picture: Image.Image, mean: Sequence[float], spread: Sequence[float]) -> Tensor:
    """PIL RGB -> (1, 3, H, W) float32."""
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(spread)[:, None, None]


def needed(module: str, who: str) -> Any:
    """A module of the eval extra. Raises ValueError where it cannot be imported, whatever the reason."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
        package, why = module.split(".")[0].replace("_", "-"), first_line(error)
        advice = "pip install 'minidiffedit[eval]'"
        raise ValueError(f"{who} needs {package}, which cannot be imported ({why}); {advice}") from error


@contextmanager
def weights_of(what: str) -> Iterator[None]:
    """Raises OSError for whatever goes wrong while weights are looked for, fetched or read."""
    try:
        yield
    except Exception as error:  # hubs and servers fail in many ways
        advice = f"the weights of {what} cannot be had: try again online, they are kept"
        raise OSError(f"{first_line(error)}; {advice}") from error


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
