"""Stable Diffusion v1 (Rombach et al., 2112.10752) as four verbs: text, encode, decode, eps."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

from . import fast
from .attention import Attend, Feature, Tap, backend, sdpa
from .checkpoint import Checkpoint, load_network, open_checkpoint
from .clip import CLIPText
from .ddim import whole
from .fast import choose_device, choose_dtype
from .files.configs import Kind, kinds
from .files.hub import find_model
from .tokenizer import Tokenizer
from .unet import UNet
from .vae import VAE

# By kind of weights: what to do where `given` is not what their UNet reads behind the latent.
GIVEN: dict[Kind, str] = {
    "base": "leave it out, or load inpainting or InstructPix2Pix weights",
    "inpainting": "pass the mask (1: fill) and the latent of the picture without what it covers, or load base weights",
    "instruct": "pass the picture's latent, not scaled, or load base weights",
}


class StableDiffusion:
    """The three networks and the tokenizer on one device, in one dtype.

    `evaluations` counts UNet rows (texts x latents) since construction, `gradients` those of them with a gradient;
    `side` is the picture size of training in pixels, `factor` the pixels per latent cell, `channels` a cell's numbers,
    `scale` what they were multiplied by, `further` what the UNet reads beside them, `coarsest` the coarsest level that
    reads the text. `kind` is what the UNet was trained for: "base", "inpainting" or
    "instruct" (InstructPix2Pix). `attend` replaces the UNet's attention (see attention.py).
    """

    def __init__(self, unet: UNet, vae: VAE, clip: CLIPText, tokenizer: Tokenizer, attend: Attend = sdpa):
        self.unet, self.vae, self.clip, self.tokenizer, self.attend = unet, vae, clip, tokenizer, attend
        self.device, self.dtype = unet.conv_in.weight.device, unet.conv_in.weight.dtype
        inputs, side = unet.conv_in.in_channels, unet.config.sample_size
        self.factor, self.channels = vae.config.factor, vae.config.latent_channels
        self.scale: float = vae.config.scaling_factor
        self.coarsest: int = len(unet.config.block_out_channels) - 2
        self.side, self.further, self.kind = side * self.factor, inputs - self.channels, kinds(self.channels)[inputs]
        self.evaluations, self.gradients, self.low_memory, self.name = 0, 0, False, ""
        self.checkpoint: Checkpoint | None = None  # what `load` was asked for, and found

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        variant: str | None = None,
        attention: str = "auto",
        compile: bool = False,
        low_memory: bool = False,
    ) -> "StableDiffusion":
        """model: a folder in the hub's layout, a single .safetensors file, or a hub id "owner/name".

        device: "auto" (CUDA if there is one, else CPU) or torch's. dtype: "auto" (see choose_dtype), "float32",
        "float16", "bfloat16" or torch's. variant: None, "fp16" or "non_ema" of a folder's files. revision, cache_dir,
        local_files_only: for hub ids. attention: "auto", "sdpa" or "triton" (see attention.py). compile: by
        torch.compile, minutes at the first call of each shape. low_memory: one network at a time is in memory, read
        again when it is needed. Raises ValueError for anything that is not SD v1, before its weights are read, for NaN
        weights, and for what this machine cannot do; OSError when the hub cannot give the files.
        """
        device = choose_device(device)
        fast.check_options(device, compile, low_memory)
        nearest = choose_dtype(dtype, device)
        path = find_model(str(model), revision, cache_dir, local_files_only, variant, half=nearest != torch.float32)
        found = open_checkpoint(path, variant=variant, dtype=nearest)
        parameters = sum(shape.numel() for part in found.parts.values() for shape in part.shapes.values())
        dtype = choose_dtype(dtype, device, parameters)
        attend, tokenizer = backend(attention, device, dtype), Tokenizer(found.tokenizer)
        makes = [partial(load_network, n, found.configs[n], found.parts[n], device, dtype) for n in found.parts]
        # The largest first: while it is cast, little else is in memory.
        unet, vae, clip = fast.one_at_a_time(makes) if low_memory else (make() for make in makes)
        if compile:
            unet, vae = fast.CompiledUNet(unet), fast.compiled_vae(vae)
        sd = cls(unet, vae, clip, tokenizer, attend)
        sd.name, sd.checkpoint, sd.low_memory = str(model), found, low_memory
        return sd

    def text(self, prompts: Sequence[str]) -> Tensor:
        """n prompts -> (n, 77, width), the model's dtype. Warns over 75 tokens; ValueError for what is no text."""
        return self.clip(self.tokenizer(prompts).to(self.device))

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """What `text` transforms: n prompts -> (n, 77, width), a vector for each position; can be learned."""
        return self.clip.embeddings(self.tokenizer(prompts).to(self.device))

    def transform(self, embedded: Tensor) -> Tensor:
        """text(prompts) = transform(embed(prompts))."""
        return self.clip.transform(embedded.to(self.dtype))

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """The shapes (out, in) of the weights of all the UNet's attentions, by name."""
        found = ((f"{name}.weight", module) for name, module in self.unet.named_modules() if ".attn" in name)
        return {
            name: (module.out_features, module.in_features) for name, module in found if isinstance(module, nn.Linear)
        }

    def encode(self, image: Tensor) -> Tensor:
        """image (b, 3, H, W) in [-1, 1], H and W multiples of 8 -> latent (b, 4, H/8, W/8) float32: the posterior's
        mode (its mean) times the scaling factor, 0.18215 in SD v1. Raises ValueError for other shapes and ranges.
        """
        if image.ndim != 4 or image.shape[1] != 3 or any(n == 0 or n % self.factor for n in image.shape[2:]):
            raise ValueError(f"image must be (b, 3, H, W), sides multiples of {self.factor}, got {tuple(image.shape)}")
        if not image.is_floating_point() or not bool((image.abs() <= 1 + 1e-3).all()):
            raise ValueError("image must hold floats in [-1, 1]")
        mean, _ = self.vae.encode(image.to(self.device, self.dtype))
        fast.trim()
        return mean.float() * self.vae.config.scaling_factor

    def decode(self, latent: Tensor) -> Tensor:
        """latent (b, 4, h, w) -> image (b, 3, 8h, 8w) float32, about [-1, 1], not clamped; ValueError for others."""
        if latent.ndim != 4 or latent.shape[1] != self.channels or 0 in latent.shape:
            raise ValueError(f"latent must be (b, {self.channels}, h, w), got {tuple(latent.shape)}")
        fast.trim()
        z = (latent / self.vae.config.scaling_factor).to(self.device, self.dtype)
        by_rows = self.low_memory or latent.shape[2:].numel() > 96 * 96  # by size, not by what is free
        return (fast.decode_by_rows(self.vae, z) if by_rows else self.vae.decode(z)).float()

    def eps(
        self,
        x_t: Tensor,
        t: int,
        texts: Sequence[Tensor],
        *,
        tap: Tap | None = None,
        feature: Feature | None = None,
        given: Tensor | None = None,
        deltas: Mapping[str, Tensor] | None = None,
    ) -> list[Tensor]:
        """x_t (b, 4, h, w) at timestep t in 0..999; texts: k tensors (1 or b, 77, width) -> k predictions of the noise,
        each (b, 4, h, w) in the model's dtype, from one UNet call of k b rows (which `evaluations` counts).

        tap stands in for every attention, feature sees and may change what the layers make (see attention.py); their
        rows are all latents under the first text, then under the second. given (1 or b, further, h, w): what the UNet
        reads behind each latent (see GIVEN). deltas: what is added to weights of the UNet in this call alone, by name.
        Raises ValueError for texts, t and given that do not fit.
        """
        b = len(x_t)
        if not texts or not b or any(len(text) not in (1, b) for text in texts):
            raise ValueError(f"texts must have 1 or {b} rows for {b} latents, got {[len(text) for text in texts]}")
        whole("t", t, 0, 999)
        text = torch.cat([text.expand(b, -1, -1) for text in texts]).to(self.device, self.dtype)
        x = self.with_given(x_t, given).to(self.device, self.dtype)
        attend = self.attend if tap is None else partial(tap, self.attend)
        hooks = (attend,) if feature is None else (attend, feature)
        predictions = (self.with_deltas(deltas) if deltas else self.unet)(x, t, text, *hooks)
        self.evaluations += len(predictions)
        self.gradients += len(predictions) * predictions.requires_grad
        return list(predictions.chunk(len(texts)))

    def with_given(self, x_t: Tensor, given: Tensor | None) -> Tensor:
        """x_t (b, 4, h, w), with given behind it where the UNet reads more than the latent: (b, 4 + further, h, w)."""
        got = None if given is None else tuple(given.shape)
        rows = sorted({1, len(x_t)})
        fitting = [(n, self.further, *x_t.shape[2:]) for n in rows] if self.further else [None]
        if got not in fitting:
            expected = " or ".join(str(shape) for shape in fitting)
            raise ValueError(f"given must be {expected} with {self.kind} weights, got {got}: {GIVEN[self.kind]}")
        return x_t if given is None else torch.cat([x_t, given.to(x_t).expand(len(x_t), -1, -1, -1)], dim=1)

    def with_deltas(self, deltas: Mapping[str, Tensor]) -> Callable[..., Tensor]:
        """The UNet with something added to some of its weights; gradients reach the deltas."""
        if not isinstance(self.unet, UNet):
            raise ValueError("weights can only be learned for a UNet in memory: load it without compile and low_memory")
        weights = {name: self.unet.get_parameter(name) + delta.to(self.dtype) for name, delta in deltas.items()}
        return lambda *asked: functional_call(self.unet, weights, asked)

    def clock(self) -> float:
        """Seconds, after all work given to the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
