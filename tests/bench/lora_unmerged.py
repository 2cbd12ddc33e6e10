"""A LoRA merged into the weights, as the package does it, against the same LoRA beside them: is a call as fast?

    python tests/bench/lora_unmerged.py [--model mini] [--rank 16] [--pairs 15] [--compile]

Beside them, each layer computes W x + s up(down x). The UNet answers two texts; times are taken in turn
(alternating.py).
"""

import argparse
import copy
import tempfile
import time
from pathlib import Path

import torch
from alternating import alternate, row
from safetensors.torch import save_file
from torch import Tensor, nn

from minidiffedit import StableDiffusion
from minidiffedit.fast import CompiledUNet
from minidiffedit.unet import UNet


class Beside(nn.Module):
    """A layer and its LoRA, added at each call."""

    def __init__(self, layer: nn.Module, down: Tensor, up: Tensor):
        super().__init__()
        self.layer, self.down, self.up = layer, nn.Parameter(down), nn.Parameter(up)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            added = nn.functional.conv2d(nn.functional.conv2d(x, self.down), self.up)
        else:
            added = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return self.layer(x) + added


def layers(unet: UNet) -> dict[str, nn.Module]:
    """What LoRAs usually change: the matrices and 1 x 1 convolutions of the transformers."""
    found = {name: one for name, one in unet.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)}
    return {name: one for name, one in found.items() if ".attentions." in name}


def write(unet: UNet, rank: int, path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    generator, made = torch.Generator().manual_seed(0), {}
    for name, layer in layers(unet).items():
        out, *inner = layer.weight.shape
        down, up = torch.randn(rank, *inner, generator=generator), torch.randn(out, rank, generator=generator)
        made[name] = 0.02 * down, 0.02 * up.reshape(out, rank, *[1] * len(inner[1:]))
    state = {}
    for name, (down, up) in made.items():
        base = "lora_unet_" + name.replace(".", "_")
        state |= {f"{base}.lora_down.weight": down.contiguous(), f"{base}.lora_up.weight": up.contiguous()}
    save_file(state, path)
    return made


def beside(unet: UNet, made: dict[str, tuple[Tensor, Tensor]]) -> UNet:
    for name, (down, up) in made.items():
        above, _, own = name.rpartition(".")
        setattr(unet.get_submodule(above), own, Beside(unet.get_submodule(name), down, up).requires_grad_(False))
    return unet


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    plain = StableDiffusion.load(args.model, device="cpu", dtype="float32")
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "random.safetensors"
        made = write(plain.unet, args.rank, path)
        loads = []
        for lora in ((), (path,)):
            start = time.perf_counter()
            merged = StableDiffusion.load(args.model, device="cpu", dtype="float32", lora=lora)
            loads.append(time.perf_counter() - start)
    x = torch.randn(1, 4, merged.unet.config.sample_size, merged.unet.config.sample_size)
    text = torch.cat([plain.text(["a horse"]), plain.text(["a zebra"])])
    apart = beside(copy.deepcopy(plain.unet), made)
    a, b = merged.unet(x, 481, text), apart(x, 481, text)
    said = f"{len(made)} layers, rank {args.rank}; largest difference {float((a - b).abs().max()):.1e}, of the LoRA"
    print(f"{said} {float((a - plain.unet(x, 481, text)).abs().max()):.1e}")
    print(f"loading without and with it: {loads[0]:.2f}, {loads[1]:.2f} s")
    found = alternate(lambda: apart(x, 481, text), lambda: merged.unet(x, 481, text), args.pairs)
    print(row("", "beside / merged", found))
    if args.compile:
        one, t = CompiledUNet(merged.unet), torch.tensor([481])
        other = torch.compile(apart.to(memory_format=torch.channels_last), dynamic=False)
        laid = x.contiguous(memory_format=torch.channels_last)
        found = alternate(lambda: other(laid, t, text), lambda: one(x, 481, text), args.pairs)
        print(row("", "the same, both compiled", found))


if __name__ == "__main__":
    main()
