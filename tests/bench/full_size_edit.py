"""The real command on a 512 x 512 picture with full-size random weights: counts, seconds, peak memory.

    python tests/bench/full_size_edit.py [--photo FILE] [--dtype bfloat16] [--maps N] [--low-memory] [--weights DIR]

Writes 2 GiB of random fp16 weights to a temporary folder and removes them, or keeps them in --weights. The picture it
makes means nothing. Exits with 1 where the peak is above 1.45 x the weights (M1 of the project's numbers to beat).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from load_peak import write_folder
from PIL import Image

PARAMETERS = 1_066_235_307
LIMIT = 1.45


def made_picture() -> Image.Image:
    """Gradients and noise, 512 x 512."""
    y, x = np.mgrid[0:512, 0:512] / 511
    noise = np.random.default_rng(0).normal(0, 12, (512, 512, 3))
    return Image.fromarray((np.stack([255 * x, 255 * y, 255 * (1 - x)], -1) + noise).clip(0, 255).astype(np.uint8))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photo", type=Path, help="512 x 512 (default: gradients and noise)")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--maps", type=int, default=2)
    parser.add_argument("--low-memory", action="store_true")
    parser.add_argument("--weights", type=Path, help="where the random weights are kept (default: nowhere)")
    args = parser.parse_args()
    # 4 steps at strength 0.8: encoded over 3. Each map is seen under two texts, and so is each step of the decoding.
    expected = {"mask": 2 * args.maps, "encode": 3, "decode": 6}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = args.weights or folder / "model"
        if not model.exists():
            write_folder(model)
        photo = args.photo or folder / "photo.png"
        if not args.photo:
            made_picture().save(photo)
        options = f"--dtype {args.dtype} --device cpu --steps 4 --maps {args.maps} --seed 0 --json".split()
        options += ["--low-memory"] * args.low_memory + ["-o"]
        command = [sys.executable, "-m", "minidiffedit", "edit", str(photo), "--model", str(model)]
        command += ["--target", "a zebra", "--source", "a horse", *options, str(folder / "out.png")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return done.returncode
        result = json.loads(done.stdout)
        with Image.open(folder / "out.png") as picture:
            size, spread = picture.size, float(np.asarray(picture).std())
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # KiB on Linux
    weights = PARAMETERS * (4 if args.dtype == "float32" else 2)
    seconds = {stage: round(s, 1) for stage, s in result["seconds"].items()}
    print(f"evaluations {result['evaluations']}, mask {result['verdict']} {result['coverage']:.0%}, picture {size}")
    print(f"seconds {seconds}, {sum(seconds.values()):.1f} in all")
    print(f"peak {peak / 2**30:.2f} GiB / weights {weights / 2**30:.2f} GiB = {peak / weights:.2f}")
    if result["evaluations"] != expected or spread == 0:
        print(f"expected {expected} and a picture that is not flat (its spread is {spread:.1f})")
        return 1
    print(f"limit {LIMIT}")
    return int(peak / weights > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
