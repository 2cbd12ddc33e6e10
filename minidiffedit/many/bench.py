"""How fast a model runs on this machine, stage by stage, beside what its matrix products alone could reach.

Work is counted on the networks' shapes (torch.utils.flop_counter on tensors without memory); the ceiling is measured:
the best rate of a large square matrix product in the same dtype. Weights decide nothing of this, so random ones do.
"""

import gc
import json
import os
import platform
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..checkpoint import build
from ..clip import CLIPConfig
from ..ddim import noises, whole
from ..diffedit import default_chunk
from ..fast import trim
from ..files.configs import STEMS
from ..run import edit
from ..sd import StableDiffusion
from ..unet import UNetConfig
from ..vae import VAEConfig
from .verify import picture

FULL = {"unet": UNetConfig(), "vae": VAEConfig(), "text_encoder": CLIPConfig()}
SMALL: dict[str, Any] = {"block_out_channels": (16, 32, 32, 32), "norm_num_groups": 4, "sample_size": 8}
TINY = {
    "unet": UNetConfig(**SMALL, cross_attention_dim=24, attention_head_dim=2),
    "vae": VAEConfig(block_out_channels=(8, 16, 16, 16), norm_num_groups=4),
    "text_encoder": CLIPConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48),
}
# Relative error of a fast path against the plain one, per network call.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}


def write_random(folder: Path, configs: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> Path:
    """A model of these configs in the hub's layout with random weights that keep activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    for network, config in configs.items():
        (folder / network).mkdir(parents=True)
        (folder / network / "config.json").write_text(json.dumps(asdict(config)))
        shapes = {name: tuple(t.shape) for name, t in build(network, config).state_dict().items()}
        state = {name: random_tensor(name, shape, generator).to(dtype) for name, shape in shapes.items()}
        save_file(state, folder / network / f"{STEMS[network]}.safetensors")
    return folder


def parameters(configs: dict[str, Any]) -> int:
    return sum(p.numel() for network, config in configs.items() for p in build(network, config).parameters())


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Norms around 1, small biases, the rest by fan-in."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return noise.mul_(0.3 if "embedding.weight" in name else noise[0].numel() ** -0.5)
    return noise.mul_(0.1).add_("norm" in name and name.endswith("weight"))


def bench(
    load: Callable[..., StableDiffusion],
    *,
    size: int | None = None,
    steps: int = 4,
    maps: int = 2,
    repeats: int = 3,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Seconds, rates, memory and errors of a model on square pictures of `size` pixels (None: its training size).

    load(plain=False) gives the model as its user wants it, load(plain=True) the same weights by the plain path: torch's
    own attention, nothing compiled. Every stage is called once to warm up and `repeats` times for the clock. Returns
    plain values for JSON, seconds as median, least and most; rates in TFLOP/s. say: told what is being measured.
    Raises ValueError for sizes out of range.
    """
    steps, maps, repeats = (whole(n, v, 1, 999) for n, v in zip(("steps", "maps", "repeats"), (steps, maps, repeats)))
    say("the plain path")
    reset_peak()
    sd = load(plain=True)
    size = sd.side if size is None else whole("size", size, 64, 1024)
    if size % sd.factor:
        raise ValueError(f"size must be a multiple of {sd.factor}, got {size}")
    inputs = Inputs(sd, size, maps)
    found: dict[str, Any] = {"machine": machine(sd), "model": model(sd, size)}
    found["ceiling"] = ceiling(sd)
    expected = {name: call(sd) for name, call in inputs.calls.items() if name in COMPARED}
    del sd
    gc.collect()

    reset_peak()
    start = time.perf_counter()
    sd = load(plain=False)
    found["load_seconds"] = time.perf_counter() - start
    found["stages"] = {}
    for name, call in inputs.calls.items():
        say(name)
        start = sd.clock()
        first = call(sd)
        row: dict[str, Any] = {"samples": inputs.samples[name], "first_seconds": sd.clock() - start}
        row |= timed(sd, partial(call, sd), repeats) | {"tflop": inputs.flops[name]}
        row["tflop_per_s"] = row["tflop"] / row["seconds"]
        row["of_ceiling"] = row["tflop_per_s"] / found["ceiling"]["tflop_per_s"]
        if name in COMPARED:
            row |= judged(sd, first, expected[name])
        found["stages"][name] = row
    say("an edit, and a further one of the same picture")
    found["edit"] = whole_edit(sd, inputs, found["ceiling"], steps, maps)
    weights = sum(p.nbytes for net in (sd.unet, sd.vae, sd.clip) for p in net.parameters())
    most = peak(sd)
    memory = {"weights_bytes": weights, "peak_bytes": most, "peak_over_weights": most and most / weights}
    return found | {"memory": memory}


COMPARED = ("UNet, 1 text", "UNet, 2 texts", "VAE encode", "VAE decode")


class Inputs:
    """The same inputs for every model of one config: calls by stage, samples and TFLOP of each."""

    def __init__(self, sd: StableDiffusion, size: int, maps: int):
        cells, chunk = size // sd.factor, min(maps, default_chunk(size // sd.factor, size // sd.factor))
        self.size, self.chunk = size, chunk
        x = noises((sd.channels, cells, cells), chunk, 0).to(sd.device)
        image = noises((3, size, size), 1, 1).clamp(-1, 1)
        texts = [sd.text([prompt]) for prompt in ("a horse", "a zebra")]
        self.calls: dict[str, Callable[[StableDiffusion], Tensor]] = {
            "text": lambda sd: sd.text(["a zebra on a meadow"]),
            "VAE encode": lambda sd: sd.encode(image),
            "UNet, 1 text": lambda sd: torch.cat(sd.eps(x[:1], 481, texts[:1])),
            "UNet, 2 texts": lambda sd: torch.cat(sd.eps(x[:1], 481, texts)),
            "VAE decode": lambda sd: sd.decode(x[:1]),
        }
        if chunk > 1:
            self.calls[f"mask, {chunk} maps"] = lambda sd: torch.cat(sd.eps(x, 481, texts))
        self.samples = {"text": 1, "VAE encode": 1, "UNet, 1 text": 1, "UNet, 2 texts": 2, "VAE decode": 1}
        self.samples |= {f"mask, {chunk} maps": 2 * chunk}
        self.flops = counted(sd, size)
        self.flops |= {f"mask, {chunk} maps": chunk * self.flops["UNet, 2 texts"]}


def counted(sd: StableDiffusion, size: int) -> dict[str, float]:
    """TFLOP by stage, counted on the plain networks of the model's configs, without memory or time."""
    nets = {"unet": sd.unet, "vae": sd.vae, "text_encoder": sd.clip}
    plain: list[Any] = [build(name, net.config) for name, net in nets.items()]
    unet, vae, clip = plain
    cells, width = size // sd.factor, sd.unet.config.cross_attention_dim

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = meta(1, sd.channels, cells, cells)
    calls = {
        "text": lambda: clip(meta(1, 77, dtype=torch.int64)),
        "VAE encode": lambda: vae.encode(meta(1, 3, size, size)),
        "UNet, 1 text": lambda: unet(x, 481, meta(1, 77, width)),
        "UNet, 2 texts": lambda: unet(x, 481, meta(2, 77, width)),
        "VAE decode": lambda: vae.decode(x),
    }
    flops = {}
    for name, call in calls.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        flops[name] = counter.get_total_flops() / 1e12
    return flops


def timed(sd: StableDiffusion, call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Median, least and most seconds of calls that have been made before; cores kept busy (CPU seconds a second)."""
    seconds, busy = [], []
    for _ in range(repeats):
        start, worked = sd.clock(), time.process_time()
        call()
        seconds.append(sd.clock() - start)
        busy.append((time.process_time() - worked) / seconds[-1])
    return {"seconds": median(seconds), "least": min(seconds), "most": max(seconds), "cpu_over_wall": median(busy)}


def ceiling(sd: StableDiffusion, repeats: int = 5) -> dict[str, Any]:
    """The best rate of a square matrix product in the model's dtype, over sizes; TFLOP/s."""
    best, side = 0.0, 0
    sides = (4096, 8192) if sd.device.type == "cuda" else (1024, 2048, 4096)
    for n in sides if sum(p.numel() for p in sd.unet.parameters()) > 1e8 else (256,):  # a tiny model's takes no time
        a, b = (torch.randn(n, n, generator=torch.Generator().manual_seed(i)).to(sd.device, sd.dtype) for i in (0, 1))
        a @ b
        least = min(timed(sd, partial(torch.matmul, a, b), repeats)["least"] for _ in range(2))
        best, side = max((best, side), (2 * n**3 / least / 1e12, n))
    return {"tflop_per_s": best, "side": side, "dtype": str(sd.dtype).removeprefix("torch.")}


def whole_edit(sd: StableDiffusion, inputs: Inputs, ceiling: dict[str, Any], steps: int, maps: int) -> dict[str, Any]:
    """An edit at the default strength, timed once, and a further edit of the same picture that reuses it."""
    photo, settings = picture(inputs.size), dict[str, Any](steps=steps, maps=maps)
    first = edit(sd, photo, source="a horse", target="a zebra", size=inputs.size, seed=0, **settings)
    again = edit(sd, photo, source="a horse", target="a cow", size=inputs.size, reuse=first, **settings)
    flops, rows, took = inputs.flops, first.evaluations, sum(first.seconds.values())
    alone, pair = flops["UNet, 1 text"], flops["UNet, 2 texts"]
    done = flops["VAE encode"] + 3 * flops["text"] + rows["encode"] * alone + (rows["mask"] + rows["decode"]) / 2 * pair
    done += flops["VAE decode"] if rows["decode"] else 0
    rate = done / took
    found = settings | {"rows": rows, "seconds": first.seconds, "seconds_in_all": took, "verdict": first.verdict}
    found |= {"tflop": done, "tflop_per_s": rate, "of_ceiling": rate / ceiling["tflop_per_s"]}
    over_first = sum(again.seconds.values()) / took
    return found | {"further": {"rows": again.evaluations, "seconds": again.seconds, "over_first": over_first}}


def judged(sd: StableDiffusion, got: Tensor, expected: Tensor) -> dict[str, float]:
    """|got - expected| / |expected|, by the root of the squares, and what it may be."""
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    return {"error": float(error), "error_bound": BOUNDS[sd.dtype]}


# ---------------------------------------------------------------- the machine


def machine(sd: StableDiffusion) -> dict[str, Any]:
    name = torch.cuda.get_device_name(sd.device) if sd.device.type == "cuda" else processor()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    here = {"device": str(sd.device), "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return here | {"load_average": load, "system": platform.platform()}


def model(sd: StableDiffusion, size: int) -> dict[str, Any]:
    nets: dict[str, nn.Module] = {"unet": sd.unet, "vae": sd.vae, "text_encoder": sd.clip}
    counts = {name: sum(p.numel() for p in net.parameters()) for name, net in nets.items()}
    return {"dtype": str(sd.dtype).removeprefix("torch."), "size": size, "parameters": counts}


def processor() -> str:
    with suppress(OSError):
        if told := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return told[1]
    return platform.processor() or platform.machine()


def reset_peak() -> None:
    """Peaks count from now on, where the system can forget; what was freed is given back first."""
    gc.collect()
    trim()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux alone
        Path("/proc/self/clear_refs").write_text("5")


def peak(sd: StableDiffusion) -> int | None:
    """Most bytes since `reset_peak`: of the GPU's memory, or of the process where the model runs on the CPU. None where
    the system does not tell (all but Linux).
    """
    if sd.device.type == "cuda":
        return torch.cuda.max_memory_allocated(sd.device)
    with suppress(OSError):
        if told := re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text()):
            return 1024 * int(told[1])
    return None
