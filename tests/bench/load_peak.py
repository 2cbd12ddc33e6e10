"""Peak memory of loading full-size weights, over the bytes of the loaded weights: at most 1.2.

    python tests/bench/load_peak.py [--kinds base] [--layouts folder single] [--dtypes float32 bfloat16 float16]

Writes random fp16 files of SD v1's size (2 GiB per layout) to a temporary folder, one tensor at a time, loads them in
fresh processes and removes them. --kinds: also instruct, inpainting, example (Paint by Example).
"""

import argparse
import itertools
import json
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from minidiffedit import StableDiffusion
from minidiffedit.checkpoint import FOLDER, SINGLE, build
from minidiffedit.files.configs import KINDS, STEMS

CONFIGS = Path(__file__).parent.parent / "data" / "manifests" / "configs" / "v1-5"
LIMIT = 1.2
INPUTS = {"base": 4, "instruct": 8, "inpainting": 9, "example": 9}


def random_tensor(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights that keep activations near 1: norms around 1, small biases, the rest by fan-in."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return noise * (0.3 if "embedding.weight" in name else noise[0].numel() ** -0.5)
    return 0.1 * noise + ("norm" in name and name.endswith("weight"))


def networks(kind: str) -> list[str]:
    return ["unet", "vae", "image_encoder" if kind == "example" else "text_encoder"]


def shapes_of(network: str, kind: str = "base") -> dict[str, tuple[int, ...]]:
    config = replace(KINDS["unet"](), in_channels=INPUTS[kind]) if network == "unet" else KINDS[network]()
    return {name: tuple(t.shape) for name, t in build(network, config).state_dict().items()}


def write_file(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """key -> (module name, shape), written as fp16 with one tensor in memory at a time."""
    header, end = {}, 0
    for key, (_, shape) in tensors.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors.values():
            file.write(random_tensor(name, shape, generator).half().numpy().data)


def write_folder(folder: Path, kind: str = "base") -> Path:
    """A random model of full size in the hub's layout, with the official configs, fp16 files only."""
    for network in networks(kind):
        tensors = {FOLDER[network](name)[0]: (name, shape) for name, shape in shapes_of(network, kind).items()}
        write_file(folder / network / f"{STEMS[network]}.fp16.safetensors", tensors)
        official, own = CONFIGS / network / "config.json", {"in_channels": INPUTS[kind]} if network == "unet" else {}
        config = json.loads(official.read_text()) if official.exists() else {}
        (folder / network / "config.json").write_text(json.dumps(config | own))
    shutil.copytree(CONFIGS / "scheduler", folder / "scheduler")
    return folder


def write_single(path: Path, kind: str = "base") -> Path:
    """The same as one file under CompVis' names, the VAE's attention as 1x1 convolutions."""
    tensors = {}
    for network in networks(kind):
        for name, shape in shapes_of(network, kind).items():
            matrix, key = network == "vae" and len(shape) == 2, SINGLE[network](name)[0]
            shape = (3 * shape[0], *shape[1:]) if ".attn.c_qkv." in key else shape
            tensors[key] = (name, (*shape, 1, 1) if matrix else shape)
    write_file(path, tensors)
    return path


def load(path: str, dtype: str) -> None:
    start = time.perf_counter()
    sd = StableDiffusion.load(path, device="cpu", dtype=dtype)
    seconds = time.perf_counter() - start
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    weights = sum(p.nbytes for module in (sd.unet, sd.vae, sd.clip) for p in module.parameters())
    print(json.dumps({"peak": peak, "weights": weights, "seconds": seconds}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["base"], choices=INPUTS)
    parser.add_argument("--layouts", nargs="+", default=["folder", "single"], choices=["folder", "single"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--load", nargs=2, metavar=("MODEL", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(*args.load)
        return 0
    worst = 0.0
    for kind, layout in itertools.product(args.kinds, args.layouts):
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / ("model" if layout == "folder" else "model.safetensors")
            (write_folder if layout == "folder" else write_single)(path, kind)
            for dtype in args.dtypes:
                command = [sys.executable, __file__, "--load", str(path), dtype]
                figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                ratio = figures["peak"] / figures["weights"]
                worst = max(worst, ratio)
                said = f"{kind:10} {layout:7} {dtype:9} {figures['seconds']:6.1f} s"
                peak, weights = (figures[name] / 2**30 for name in ("peak", "weights"))
                print(f"{said}  peak {peak:.2f} GiB / weights {weights:.2f} GiB = {ratio:.3f}", flush=True)
    print(f"worst {worst:.3f}, limit {LIMIT}")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
