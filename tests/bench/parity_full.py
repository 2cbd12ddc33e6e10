"""The three networks at full size, with random weights, against diffusers and transformers in float32.

    python tests/bench/parity_full.py

One model at a time, its tensors shared with ours. Prints the largest difference over the largest value, and the
seconds of both; exit code 1 if one is above 1e-5, or if a norm's eps differs. Needs 8 GiB and some minutes.
"""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from load_peak import CONFIGS, random_tensor
from transformers import CLIPTextConfig, CLIPTextModel

from minidiffedit import Tokenizer
from minidiffedit.checkpoint import build
from minidiffedit.files.configs import KINDS

LIMIT = 1e-5
PROMPTS = ["a watercolour of a horse standing on a meadow, mountains behind it", ""]


def filled(peer: torch.nn.Module) -> torch.nn.Module:
    """The peer with random weights; on meta until now, so that the default initialisation costs nothing."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: tuple(t.shape) for name, t in peer.state_dict().items()}
    state = {name: random_tensor(name, shape, generator) for name, shape in shapes.items()}
    peer.load_state_dict(state, strict=True, assign=True)
    return peer.eval().requires_grad_(False)


def sharing(network: str, peer: torch.nn.Module) -> torch.nn.Module:
    """Our network around the peer's tensors."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in peer.state_dict().items()}
    module = build(network, KINDS[network]())
    module.load_state_dict(state, strict=True, assign=True)
    ours, theirs = (
        {name.removeprefix("text_model."): m.eps for name, m in net.named_modules() if hasattr(m, "eps")}
        for net in (module, peer)
    )
    if ours != theirs:
        sys.exit(f"{network}: eps of {[n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n)]} differ")
    return module.eval().requires_grad_(False)


def compare(what: str, ours: Callable, theirs: Callable, *inputs: Any) -> float:
    start = time.perf_counter()
    a = ours(*inputs)
    middle = time.perf_counter()
    b = theirs(*inputs)
    end = time.perf_counter()
    error = ((a - b).abs().max() / b.abs().max()).item()
    print(f"{what:26} error {error:.2e}   {middle - start:6.1f} s, peer {end - middle:6.1f} s", flush=True)
    return error if error == error else float("inf")  # NaN fails


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def text_encoder() -> Iterator[float]:
    with torch.device("meta"):
        peer = CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIGS / "text_encoder"))
    for module in peer.modules():
        if "position_ids" in module._buffers:  # no weights: a table, left on meta
            module.position_ids = torch.arange(77)[None]
    peer = filled(peer)
    clip = sharing("text_encoder", peer)
    yield compare("text encoder", clip, lambda ids: peer(ids).last_hidden_state, Tokenizer()(PROMPTS))


def vae() -> Iterator[float]:
    with torch.device("meta"):
        peer = AutoencoderKL.from_config(AutoencoderKL.load_config(CONFIGS / "vae"))
    peer = filled(peer)
    ours, image, z = sharing("vae", peer), randn(1, 3, 256, 256), randn(1, 4, 32, 32)
    yield compare("VAE encoder 256x256", lambda x: ours.encode(x)[0], lambda x: peer.encode(x).latent_dist.mean, image)
    yield compare("VAE decoder 256x256", ours.decode, lambda x: peer.decode(x).sample, z)


def unet() -> Iterator[float]:
    with torch.device("meta"):
        peer = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "unet"))
    peer = filled(peer)
    ours, text = sharing("unet", peer), randn(1, 77, 768)
    for t, h, w in ((500, 64, 64), (1, 37, 56)):
        yield compare(f"UNet {h}x{w}, t = {t}", ours, lambda *inputs: peer(*inputs).sample, randn(1, 4, h, w), t, text)


@torch.no_grad()
def main() -> int:
    worst = max(error for network in (text_encoder, vae, unet) for error in network())
    print(f"worst {worst:.2e}, limit {LIMIT:.0e}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
