"""Closed-form noise predictors: what stands in for the UNet where a result is known by hand, or must cost nothing."""

import re
import zlib
from functools import cached_property, partial

import numpy as np
import torch
import torch.nn.functional as F

from minidiffedit.attention import Site, sdpa
from minidiffedit.sd import StableDiffusion
from minidiffedit.tokenizer import Tokenizer

# The noise table from its definition, in numpy, apart from the code under test.
BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
ALPHA_BAR = np.cumprod(1.0 - BETAS)


def zero(x_t, t, texts):
    return [torch.zeros_like(x_t) for _ in texts]


def constant(value):
    """The same noise whatever is asked."""
    return lambda x_t, t, texts: [value.to(x_t).expand_as(x_t) for _ in texts]


def gaussian(x_t, t, texts, spread=0.7):
    """The exact noise prediction for pictures drawn from N(text, spread^2), cell by cell: a smooth predictor.

    A text is a number or a tensor that broadcasts against x_t: the mean of its pictures.
    """
    a = float(ALPHA_BAR[t])
    variance = a * spread**2 + 1 - a
    return [(1 - a) ** 0.5 * (x_t - a**0.5 * text) / variance for text in texts]


class Counting:
    """Counts rows (texts x latents) and keeps what a predictor was asked."""

    def __init__(self, eps=gaussian):
        self.eps, self.rows, self.calls = eps, 0, []

    def __call__(self, x_t, t, texts):
        self.rows += len(texts) * len(x_t)
        self.calls.append((x_t.clone(), t, list(texts)))
        return self.eps(x_t, t, texts)


class Model(StableDiffusion):
    """In the place of a StableDiffusion: its four verbs as a few lines of arithmetic, a thousand times as fast.

    Each row of a prediction depends on its latent, its text and the timestep alone; where two texts differ lies
    with the texts. Taps see a cross-attention at the coarsest level and a self-attention at the finest, whose output
    features see, beside two blocks, the middle and what enters the decoder's finest level. Of weights there is one.
    """

    projections = {"attn1.to_q.weight": (4, 4)}  # noqa: RUF012
    example_side = 28

    def __init__(self, kind="base"):
        self.kind, self.name, self.checkpoint, self.low_memory = kind, "a stand-in", None, False
        self.factor, self.side, self.channels, self.further = (
            8,
            64,
            4,
            {"base": 0, "inpainting": 5, "instruct": 4, "example": 5}[kind],
        )
        self.device, self.dtype, self.evaluations, self.gradients = torch.device("cpu"), torch.float32, 0, 0
        self.scale, self.coarsest = 1.0, 2

    @cached_property
    def tokenizer(self):
        return Tokenizer()

    def text(self, prompts, syntax="plain"):
        seeds = [zlib.crc32(prompt.encode()) for prompt in prompts]
        return torch.cat([latent(1, 77, 8, seed=seed, dtype=torch.float32) for seed in seeds])

    def exceptional(self):
        return self.text(["an exceptional prompt"])

    embed = text

    def example(self, pixels):
        seen = F.adaptive_avg_pool2d(pixels, (4, 6)).flatten(1)[:, None]
        return seen.repeat(1, 77, 1)[..., :8]  # as long as the stand-in's texts

    def transform(self, embedded):
        return embedded + 0

    def encode(self, image):
        cells = F.avg_pool2d(image, self.factor)
        return torch.cat([cells, cells.mean(1, keepdim=True)], dim=1)

    def decode(self, latent):
        return F.interpolate(latent[:, :3], scale_factor=self.factor)

    def eps(self, x, t, texts, *, tap=None, feature=None, given=None, deltas=None):
        given = self.with_given(x, given)[:, 4:]
        b, _, h, w = x.shape
        words = torch.cat([text.expand(b, -1, -1) for text in texts]).float()[:, None]
        x, text = torch.cat([x.float()] * len(texts)), words.mean((1, 2))[:, :4]
        if feature is not None:
            middle = F.adaptive_avg_pool2d(x, [-(-side // 8) for side in (h, w)])
            x = x + F.interpolate(feature(Site("mid", 3, 0, "block"), middle) - middle, (h, w))
            x = feature(Site("up", 1, 2, "block"), x)
        attend = sdpa if tap is None else partial(tap, sdpa)
        low = [-(-side // 2**self.coarsest) for side in (h, w)]
        cells = F.adaptive_avg_pool2d(x, low).flatten(2).transpose(1, 2)[:, None].repeat(1, 1, 1, 2)
        said = attend(Site("up", self.coarsest, 0, "cross"), cells, words, words)[:, 0, :, :4]
        said = F.interpolate(said.transpose(1, 2).unflatten(2, low), (h, w))
        site, tokens = Site("up", 0, 0, "self"), x.flatten(2).transpose(1, 2)[:, None]
        q = tokens + tokens @ deltas["attn1.to_q.weight"].T if deltas else tokens
        out = attend(site, q, tokens + text[:, None, None], tokens)[:, 0]
        out = (out if feature is None else feature(site, out)).transpose(1, 2).unflatten(2, (h, w))
        down, right = torch.linspace(0, 1, h)[:, None] ** 2, torch.linspace(0, 1, w) ** 2
        corners = torch.stack([down * right, (1 - down) * right, down * (1 - right), (1 - down) * (1 - right)])
        where = torch.einsum("rk,khw->rhw", text, corners)[:, None]
        further = given.mean(1, keepdim=True).repeat(len(texts), 1, 1, 1) if self.further else 0
        e = torch.tanh(0.4 * x + 0.3 * out + said + 9 * where + further) * (1 + t / 1000)
        self.evaluations += len(e)
        self.gradients += len(e) * e.requires_grad
        return list(e.to(self.dtype).chunk(len(texts)))


def latent(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def no_address(value):
    """A test's id without addresses, which differ from process to process."""
    return re.sub(r" at 0x\w+", "", str(value))


class Shown:
    """A predictor that keeps what it was shown."""

    def __init__(self, sd):
        self.sd, self.calls = sd, []

    def __call__(self, x, t, texts, *, given):
        self.calls.append((x.clone(), t, list(texts), given.clone()))
        return self.sd.eps(x, t, texts, given=given)
