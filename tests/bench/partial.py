"""SIGE on DiffEdit against the dense edit that it stands for: error and seconds at five sizes of the mask.

    python tests/bench/partial.py                      # the miniature on its horse; --size 256 for finer masks
    python tests/bench/partial.py --full --steps 4     # a UNet of full size with random weights: its seconds count

Masks are squares in the middle. Both ways encode the picture and decode it under the mask, in turn on the same threads;
the dense one walks the same path (`ddim_paper`). Error: root mean square of the latents' difference under the mask, and
beside it of what the edit changed there; with random weights it means nothing. PSNR: of the two pictures, and of the
dense one against the source. Seconds are those of the processor, of all threads together.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from minidiffedit import StableDiffusion, masked_decode
from minidiffedit.attention import sdpa
from minidiffedit.fast import DTYPES
from minidiffedit.files.images import to_tensor
from minidiffedit.methods.inversions import ddim_paper
from minidiffedit.methods.sige import rectangle, sige
from minidiffedit.unet import UNet, UNetConfig

MINI = Path(__file__).parents[2] / "weights" / "mini"
AREAS = (0.01, 0.05, 0.1, 0.2, 0.4)


def small(args):
    """eps, the picture's latent, the two texts, the coarsest level with text, and what decodes."""
    sd = StableDiffusion.load(args.model, device="cpu", dtype=args.dtype)
    source = Image.open(MINI / "scenes/horse-zebra/source.png").convert("RGB")
    x0 = sd.encode(to_tensor(source, (args.size or sd.side,) * 2))
    texts = [sd.text([prompt]) for prompt in ("", "a photo of a zebra on a grass field")]
    return sd.eps, x0, texts, sd.coarsest, lambda z: (sd.decode(z).clamp(-1, 1) + 1) / 2


def full(args):
    """The same of a UNet alone, on noise."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype := DTYPES[args.dtype])
    unet = UNet(UNetConfig()).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    texts = torch.randn(2, 77, 768).split(1)
    torch.set_default_dtype(torch.float32)

    def eps(x, t, texts, tap=None):
        attend = partial(tap, sdpa) if tap else sdpa
        return unet(x.to(dtype), t, torch.cat([*texts]), attend).to(x).chunk(len(texts))

    side = (args.size or 512) // 8
    return eps, torch.randn(1, 4, side, side), texts, 2, None


def timed(call):
    start = time.process_time()  # not of what else the machine does
    made = call()
    return made, time.process_time() - start


def rms(x):
    return float(x.float().square().mean().sqrt())


def psnr(one, other):
    error = float((one - other).square().mean())
    return f"{-10 * math.log10(error):.1f} dB" if error else "equal"


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MINI))
    parser.add_argument("--full", action="store_true", help="a random UNet of full size in its place")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32, with --full bfloat16")
    parser.add_argument("--size", type=int, help="a side of the picture (default: the training size)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--margin", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.full else "float32")
    torch.set_num_threads(args.threads)
    eps, x0, (null, target), coarsest, decode = full(args) if args.full else small(args)
    side, few = x0.shape[-1], {"steps": args.steps, "strength": 0.8}

    def dense(mask):
        path = ddim_paper(eps, x0, null, encode_text="null", **few)
        return masked_decode(eps, path, mask, target, null)

    eps(x0, 500, [null, target])  # what a first call alone pays
    print("| mask | rectangle | dense, s | SIGE, s | error | edit | PSNR | dense against source |\n|---|" + 7 * "---|")
    for area in AREAS:
        n = max(round(side * math.sqrt(area)), 1)
        low, mask = (side - n) // 2, torch.zeros(1, 1, side, side)
        mask[..., low : low + n, low : low + n] = 1
        top, left, bottom, right = rectangle(mask, args.margin, 2 ** (coarsest + 1))
        one, before = timed(lambda mask=mask: dense(mask))
        other, after = timed(
            lambda mask=mask: sige(eps, x0, mask, null, target, coarsest, margin=args.margin, **few)
        )  # fmt: skip
        inside = mask[0, 0] > 0
        errors = [rms((a - b)[..., inside]) for a, b in ((one, other), (one, x0))]
        seen = [decode(z) for z in (one, other, x0)] if decode else []
        said = [psnr(seen[0], z) for z in seen[1:]] or ["", ""]
        cells = (f"{float(mask.mean()):.1%}", f"{(bottom - top) * (right - left) / side**2:.1%}")
        print("|", " | ".join([*cells, f"{before:.2f}", f"{after:.2f}", *(f"{e:.4f}" for e in errors), *said]), "|")


if __name__ == "__main__":
    main()
