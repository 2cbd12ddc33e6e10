"""Ours against diffusers on this machine: the same random full-size weights, both in one process, in turn.

    python tests/bench/against_diffusers.py [--size 512] [--pairs 3] [--only C1 C2 C4] [--json FILE]

C1 the UNet, one row, float32 and bfloat16      C2 an edit by our schedule / by diffusers' defaults, bfloat16
C3 UNet rows of both edits, counted             C4 the VAE's decoder, bfloat16
C5 seconds and memory of importing either       S1 a further edit of a picture / the first
S2 an image in a batch of four / alone

Ratios are ours over theirs: the median of pairs A B A B with their range. "cores" is CPU time over wall time, which a
busy machine pushes below the number of cores; "CPU" is the ratio of CPU time, which it moves less. Writes 2 GiB of
random fp16 weights to a temporary folder and removes them, or keeps them in --weights. --limit exits with 1 where a
ratio is above its limit ("must" in the project's table of numbers to beat).
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from alternating import alternate, row
from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, StableDiffusionDiffEditPipeline
from diffusers import UNet2DConditionModel as PeerUNet
from diffusers.utils import logging
from load_peak import write_folder
from transformers import CLIPTextModel, CLIPTokenizer

from minidiffedit import StableDiffusion, edit, encode, find_mask, masked_decode
from minidiffedit.many.verify import picture

MUST = {"C1": 1.03, "C2": 0.72, "C4": 0.85, "C5 seconds": 0.45, "C5 memory": 0.75, "S1": 0.74, "S2": 1.05}
SOURCE, TARGET = "a horse", "a zebra"
TOKENIZER = Path(__file__).parent.parent.parent / "weights" / "mini" / "tokenizer"  # CLIP's


def load() -> str:
    return "/".join(f"{average:.1f}" for average in os.getloadavg())


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def ours(folder: Path, dtype: torch.dtype, **options: Any) -> StableDiffusion:
    return StableDiffusion.load(folder, device="cpu", dtype=dtype, **options)


def peer(kind: Any, folder: Path, network: str, dtype: torch.dtype) -> Any:
    return kind.from_pretrained(folder / network, torch_dtype=dtype, variant="fp16").eval().requires_grad_(False)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def c1(folder: Path, args: argparse.Namespace) -> None:
    """The UNet on one latent under one text."""
    for dtype in (getattr(torch, name) for name in args.dtypes):
        one_unet(folder, args, dtype)
        gc.collect()


def one_unet(folder: Path, args: argparse.Namespace, dtype: torch.dtype) -> None:
    cells, name = args.size // 8, str(dtype).removeprefix("torch.")
    x, text = noise(1, 4, cells, cells), noise(1, 77, 768)
    sd, unet = ours(folder, dtype, **args.options), peer(PeerUNet, folder, "unet", dtype)

    def a() -> torch.Tensor:
        return sd.eps(x, 500, [text])[0]

    def b() -> torch.Tensor:
        return unet(x.to(dtype), 500, text.to(dtype)).sample

    apart = error(a(), b())
    args.found[f"C1 {name}"] = alternate(a, b, args.pairs, warm=False) | {"error": apart}
    print(row("C1", f"UNet {cells} x {cells}, {name}, error {apart:.1e}", args.found[f"C1 {name}"], MUST["C1"]))


def pipeline(folder: Path) -> StableDiffusionDiffEditPipeline:
    """diffusers' own DiffEdit around the same weights, in bfloat16."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    pipe = StableDiffusionDiffEditPipeline(
        vae=peer(AutoencoderKL, folder, "vae", torch.bfloat16), unet=peer(PeerUNet, folder, "unet", torch.bfloat16),
        text_encoder=peer(CLIPTextModel, folder, "text_encoder", torch.bfloat16), tokenizer=tokenizer,
        scheduler=scheduler, inverse_scheduler=DDIMInverseScheduler.from_config(scheduler.config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def c2_c3_s1(folder: Path, args: argparse.Namespace) -> None:
    """Whole edits; diffusers' defaults guide the mask and the encoding too and encode the picture for each map."""
    photo, sd, pipe = picture(args.size), ours(folder, torch.bfloat16, **args.options), pipeline(folder)
    settings: dict[str, Any] = {"steps": args.steps, "maps": args.maps, "size": args.size, "seed": 0}
    rows = {"ours": 0, "diffusers": 0}
    pipe.unet.register_forward_pre_hook(
        lambda module, inputs: rows.update(diffusers=rows["diffusers"] + len(inputs[0]))
    )
    their = {"num_inference_steps": args.steps}

    made: list[Any] = []

    def a() -> None:
        before = sd.evaluations
        made[:] = [edit(sd, photo, source=SOURCE, target=TARGET, **settings)]
        rows["ours"] = sd.evaluations - before

    def b() -> None:
        rows["diffusers"], generator = 0, torch.Generator().manual_seed(0)
        mask = pipe.generate_mask(
            photo, source_prompt=SOURCE, target_prompt=TARGET, num_maps_per_mask=args.maps, generator=generator, **their
        )
        latents = pipe.invert(SOURCE, photo, generator=generator, **their).latents
        pipe(TARGET, mask_image=mask, image_latents=latents, generator=generator, **their)

    if "C2" in args.only:  # one pair: the calls before the clock runs are left out, they take as long
        args.found["C2"] = alternate(a, b, args.pairs, warm=args.pairs > 1)
        print(row("C2", f"edit, {args.steps} steps, {args.maps} maps, bfloat16", args.found["C2"], MUST["C2"]))
    elif "C3" in args.only:
        a(), b()
    else:
        a()
    if rows["diffusers"]:
        K, ratio = max(made[0].trajectory), rows["ours"] / rows["diffusers"]
        counted = f"ours {rows['ours']}, 2 x {args.maps} + {K} + 2 x {K} wanted; diffusers {rows['diffusers']}"
        args.found["C3"] = {"rows": dict(rows), "wanted": 2 * args.maps + 3 * K, "ratio": ratio}
        print(f"C3  UNet rows of an edit, {args.steps} steps, {args.maps} maps: {counted}; ratio {ratio:.3f}")
    if "S1" in args.only:
        further = {"target": "a cow", "source": SOURCE, "reuse": made[0], **settings}
        args.found["S1"] = alternate(lambda: edit(sd, photo, **further), a, args.pairs, warm=False)
        print(row("S1", "a further edit of the picture / the first", args.found["S1"], MUST["S1"]))


def c4(folder: Path, args: argparse.Namespace) -> None:
    """The decoder on one latent."""
    z = noise(1, 4, args.size // 8, args.size // 8)
    sd, vae = ours(folder, torch.bfloat16, **args.options), peer(AutoencoderKL, folder, "vae", torch.bfloat16)
    scaled = (z / vae.config.scaling_factor).to(torch.bfloat16)
    a, b = lambda: sd.decode(z), lambda: vae.decode(scaled).sample
    apart = error(a(), b())
    args.found["C4"] = alternate(a, b, args.pairs, warm=False) | {"error": apart}
    print(row("C4", f"VAE decoder {args.size} px, bfloat16, error {apart:.1e}", args.found["C4"], MUST["C4"]))


IMPORTS = {
    "ours": "from minidiffedit import StableDiffusion, edit",
    "diffusers": "from diffusers import StableDiffusionDiffEditPipeline; from transformers import CLIPTextModel",
}
MEASURE = (
    "import time; start = time.perf_counter(); {}; seconds = time.perf_counter() - start; "
    "resident = [line for line in open('/proc/self/status') if line.startswith('VmRSS')][0].split()[1]; "
    "print(seconds, resident)"
)


def c5(folder: Path, args: argparse.Namespace) -> None:
    """Fresh processes, in turn; torch is in both."""
    seen: dict[str, list[tuple[float, float]]] = {"ours": [], "diffusers": []}
    for number in range(args.pairs + 1):
        for side in ("ours", "diffusers") if number % 2 else ("diffusers", "ours"):
            done = subprocess.run(
                [sys.executable, "-c", MEASURE.format(IMPORTS[side])], capture_output=True, text=True, check=True
            )
            seconds, resident = done.stdout.split()
            seen[side] += [(float(seconds), float(resident) / 1024)]
    for index, what in enumerate(("seconds", "memory")):
        one, two = ([both[index] for both in seen[side][1:]] for side in ("ours", "diffusers"))  # the first is warm-up
        ratios = [a / b for a, b in zip(one, two)]
        found = {
            "ratio": median(ratios),
            "least": min(ratios),
            "most": max(ratios),
            "values": [median(one), median(two)],
        }
        args.found[f"C5 {what}"], must = found, MUST[f"C5 {what}"]
        unit, verdict = ("s" if index == 0 else "MiB"), "met" if found["ratio"] <= must else "MISSED"
        print(
            f"C5  import, {what:37} {found['ratio']:.3f} ({found['least']:.3f}..{found['most']:.3f}) of {len(ratios)}; "
            f"{found['values'][0]:.1f} / {found['values'][1]:.1f} {unit}  {verdict} ({must})"
        )


def s2(folder: Path, args: argparse.Namespace) -> None:
    """Four pictures' latents through mask, encoding and decoding together, and one alone; per picture."""
    sd = ours(folder, torch.bfloat16, **args.options)
    four, (one, two) = noise(4, 4, args.size // 8, args.size // 8), (sd.text([text]) for text in (SOURCE, TARGET))

    def run(x0: torch.Tensor) -> None:
        M = find_mask(sd.eps, x0, two, one, steps=2, maps=1).mask
        M[..., :1, :1] = True  # one cell at least, so that there is something to decode
        masked_decode(sd.eps, encode(sd.eps, x0, one, steps=2, strength=0.5), M, two, one)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = alternate(lambda: run(four), lambda: run(four[:1]), args.pairs, warm=False)
    for name in ("ratio", "least", "most", "cpu_ratio"):
        found[name] /= 4
    args.found["S2"] = found
    print(row("S2", "an image in a batch of 4 (seconds of 4) / alone", found, MUST["S2"]))


ROWS: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "C5": c5, "C4": c4, "C1": c1, "C2": c2_c3_s1, "C3": c2_c3_s1, "S1": c2_c3_s1, "S2": s2,
}  # fmt: skip


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="side of the pictures (%(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="of the whole edits (%(default)s)")
    parser.add_argument("--maps", type=int, default=2, help="of the whole edits (%(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], metavar="DTYPE", help="of C1 (both)")
    parser.add_argument("--only", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ID")
    parser.add_argument("--option", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"),
                        help="handed to StableDiffusion.load, as in --option attention sdpa")  # fmt: skip
    parser.add_argument("--weights", type=Path, metavar="DIR", help="keep the weights here, or use those that are")
    parser.add_argument("--limit", action="store_true", help="exit with 1 where a ratio is above its limit")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    args.found, args.options = {}, {name: {"True": True}.get(value, value) for name, value in args.option}
    print(f"{time.strftime('%F %T')}, torch {torch.__version__}, {torch.get_num_threads()} threads, load {load()}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.weights or Path(temporary)
        if set(args.only) - {"C5"} and not (folder / "unet").exists():
            write_folder(folder)
        for call in dict.fromkeys(ROWS[name] for name in args.only):
            call(folder, args)
            gc.collect()
    print(f"{time.strftime('%F %T')}, load {load()}")
    if args.json:
        args.json.write_text(json.dumps(vars(args) | {"json": str(args.json)}, indent=1, default=str) + "\n")
    above = [name for name, found in args.found.items() if found["ratio"] > MUST.get(name, MUST.get(name[:2], 1))]
    return int(args.limit and bool(above))


if __name__ == "__main__":
    sys.exit(main())
