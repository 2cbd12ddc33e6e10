"""Stable Diffusion v1 (Rombach et al., 2112.10752) as four verbs: text, encode, decode, eps."""

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import fast
from .attention import Attend, Feature, Tap, backend, sdpa, unchanged
from .checkpoint import Checkpoint, load_network, open_checkpoint
from .clip import CLIPText
from .ddim import alpha_bar, whole
from .fast import choose_device, choose_dtype
from .files.addons import LearnedWords, with_add_ons
from .files.configs import Kind, Prediction, kinds
from .files.hub import find_model, find_vae
from .kernels.compilers import choose_compiler
from .kernels.once import Once
from .learnable import Learnable
from .prompts import many
from .tokenizer import Tokenizer
from .unet import UNet
from .vae import VAE

# By kind of weights: what to do where `given` is not what their UNet reads behind the latent.
GIVEN: dict[Kind, str] = {
    "base": "leave it out, or load inpainting or InstructPix2Pix weights",
    "inpainting": "pass the mask (1: fill) and the latent of the picture without what it covers, or load base weights",
    "instruct": "pass the picture's latent, not scaled, or load base weights",
    "example": "pass the latent of the picture without what the mask covers and 1 - mask, or load base weights",
}


class StableDiffusion(Learnable):
    """The three networks and the tokenizer on one device, in one dtype.

    `evaluations` counts UNet rows (texts x latents) since construction, `gradients` those of them with a gradient;
    `side` is the picture size of training in pixels, `factor` the pixels per latent cell, `channels` a cell's numbers,
    `scale` what they were multiplied by, `further` what the UNet reads beside them, `coarsest` the coarsest level that
    reads the text. `kind`, what the UNet was trained for: "base", "inpainting", "instruct" (InstructPix2Pix), "example"
    (Paint by Example); `prediction`, of "epsilon" or "v". `attend` replaces the UNet's attention (see attention.py).
    """

    def __init__(self, unet: UNet, vae: VAE, clip: CLIPText, tokenizer: Tokenizer, attend: Attend = sdpa):
        self.unet, self.vae, self.clip, self.tokenizer, self.attend = unet, vae, clip, tokenizer, attend
        self.device, self.dtype = unet.conv_in.weight.device, unet.conv_in.weight.dtype
        self.factor, self.channels = vae.config.factor, vae.config.latent_channels
        self.scale: float = vae.config.scaling_factor
        self.coarsest: int = len(unet.config.block_out_channels) - 2
        self.side, self.further = unet.config.sample_size * self.factor, unet.config.in_channels - self.channels
        self.kind: Kind = kinds(self.channels, clip.config)[unet.config.in_channels]
        self.evaluations, self.gradients, self.low_memory, self.name, self.vae_name = 0, 0, False, "", ""
        self.once = Once()
        self.prediction: Prediction = "epsilon"
        self.checkpoint: Checkpoint | None = None  # what `load` was asked for, and found

    @classmethod
    @torch.inference_mode(False)  # whose tensors no gradient could pass
    def load(
        cls,
        model: str | Path,
        *,
        vae: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        variant: str | None = None,
        lora: Sequence[str | Path | tuple[str | Path, float]] = (),
        embeddings: Sequence[str | Path] = (),
        attention: str = "auto",
        compile: bool | str = False,
        low_memory: bool = False,
    ) -> "StableDiffusion":
        """model: a folder in the hub's layout, a single .safetensors file, a hub id "owner/name", or "mini".

        vae: another VAE of the model's latents: a file, a folder or a hub id, of a VAE alone or of a whole model.
        device: "auto" (CUDA if there is one, else CPU) or torch's. dtype: "auto" (see choose_dtype), "float32",
        "float16", "bfloat16" or torch's. variant: None, "fp16" or "non_ema" of a folder's files. revision, cache_dir,
        local_files_only: for hub ids. lora: files, "x.safetensors:0.8" or (path, scale); embeddings: files of learned
        words (see files/addons.py). attention: "auto", "sdpa" or "triton" (see attention.py). compile: by "torch"
        (True) or "openvino", minutes at the first call of each shape. low_memory: one network at a time is in memory,
        read again when it is needed. Raises ValueError for anything that is not SD v1, before its weights are read, for
        NaN weights, and for what this machine cannot do; OSError when the hub cannot give the files.
        """
        device = choose_device(device)
        nearest = choose_dtype(dtype, device)
        compiler = choose_compiler(compile, device, nearest, low_memory)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # Triton launches on the current one
        half = nearest != torch.float32
        path = find_model(str(model), revision, cache_dir, local_files_only, variant, half, vae is None)
        other = None if vae is None else find_vae(str(vae), cache_dir, local_files_only, half)
        found = with_add_ons(open_checkpoint(path, variant=variant, dtype=nearest, vae=other), lora, embeddings)
        parameters = sum(shape.numel() for part in found.parts.values() for shape in part.shapes.values())
        dtype = choose_dtype(dtype, device, parameters)
        attend, tokenizer = backend(attention, device, dtype), LearnedWords(found.tokenizer, found.words)
        makes = [partial(load_network, n, found.configs[n], found.parts[n], device, dtype) for n in found.parts]
        # The largest first: while it is cast, little else is in memory.
        unet, coder, clip = fast.one_at_a_time(makes) if low_memory else (make() for make in makes)
        if compiler:
            unet, coder = fast.CompiledUNet(unet, compiler), fast.compiled_vae(coder, compiler)
        sd = cls(unet, coder, clip, tokenizer, attend)
        sd.name, sd.checkpoint, sd.low_memory = str(model).removeprefix("hub:"), found, low_memory
        sd.vae_name, sd.prediction = str(vae or "").removeprefix("hub:"), found.prediction
        return sd

    def text(self, prompts: Sequence[str], syntax: str = "plain") -> Tensor:
        """n prompts -> (n, 77, width); with another syntax (prompts.py) (n, 77 k, width). ValueError for no text."""
        self.once = Once()  # other texts, another run: in between weights may have been written to
        if syntax != "plain":
            return many(prompts, syntax, self.tokenizer, self.clip, self.device)
        return self.clip(self.tokenizer(prompts).to(self.device))

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
        return fast.decode(self.vae, z, self.low_memory or latent.shape[2:].numel() > 96 * 96).float()  # by size alone

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
        """x_t (b, 4, h, w) at timestep t in 0..999; texts: k tensors (1 or b, 77 n, width) -> k predictions of noise,
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
        hooks: Sequence[Any] = (attend,) if feature is None else (attend, feature)
        unet = self.with_deltas(deltas) if deltas else self.unet
        if isinstance(unet, UNet) and tap is None:
            hooks = attend, feature or unchanged, self.once.keeper(unet, t, texts, b)
        predictions = unet(x, t, text, *hooks)
        if self.prediction == "v":  # v = sqrt(a) eps - sqrt(1 - a) x0 (Salimans and Ho, 2202.00512, appendix D)
            a, z = alpha_bar()[t], torch.cat([x_t] * len(texts)).to(self.device, torch.float32)
            predictions = (a**0.5 * predictions.float() + (1 - a) ** 0.5 * z).to(self.dtype)
        self.evaluations += len(predictions)
        self.gradients += len(predictions) * predictions.requires_grad
        return list(predictions.chunk(len(texts)))

    def with_given(self, x_t: Tensor, given: Tensor | None) -> Tensor:
        """x_t (b, 4, h, w), with given behind it where the UNet reads more than the latent: (b, 4 + further, h, w)."""
        got = None if given is None else tuple(given.shape)
        fitting = [(n, self.further, *x_t.shape[2:]) for n in sorted({1, len(x_t)})] if self.further else [None]
        if got not in fitting:
            expected = " or ".join(str(shape) for shape in fitting)
            raise ValueError(f"given must be {expected} with {self.kind} weights, got {got}: {GIVEN[self.kind]}")
        return x_t if given is None else torch.cat([x_t, given.to(x_t).expand(len(x_t), -1, -1, -1)], dim=1)

    def clock(self) -> float:
        """Seconds, after all work given to the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
