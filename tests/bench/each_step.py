"""What each step towards speed bought on this machine, one row per step, each against the same code without it.

    python tests/bench/each_step.py [--size 512] [--pairs 3] [--only bf16 compile ...]

counted  UNet rows of an edit at the defaults / diffusers', and of a further edit of the same picture / the first
prefix   a guided pair that shares what lies before the first cross-attention / the two rows on their own
bf16     the UNet, and the VAE's decoder, in bfloat16 / in float32
layout   the VAE's decoder, channels_last, and as `load` gives it / contiguous weights and input, bfloat16
compile  the UNet, and the VAE's decoder, compiled / not, bfloat16 (only when asked for: takes minutes once)
once     a guided call that keeps what it made of timestep and texts / one that makes it anew, bfloat16
profile  where the time of one row, one guided pair and one decoding goes, by kind of operation (no ratio)

Ratios: median of pairs A B A B with their range. Random full-size weights in a temporary folder.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from alternating import alternate, row

from minidiffedit import StableDiffusion
from minidiffedit.cost import costs
from minidiffedit.many.bench import FULL, write_random
from minidiffedit.run import plan

BF16, F32 = torch.bfloat16, torch.float32


def load(folder: Path, dtype: torch.dtype, **options: object) -> StableDiffusion:
    return StableDiffusion.load(folder, device="cpu", dtype=dtype, **options)


def inputs(size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    made = [torch.randn(1, *shape, generator=torch.Generator().manual_seed(i)) for i, shape in
            enumerate(((4, size // 8, size // 8), (77, 768), (77, 768)))]  # fmt: skip
    return made[0], made[1:]


def prefix(folder: Path, size: int, pairs: int) -> None:
    sd, (x, texts) = load(folder, BF16), inputs(size)
    twice, both = x.repeat(2, 1, 1, 1), torch.cat(texts)
    a, b = (lambda: sd.eps(x, 500, texts)), (lambda: sd.eps(twice, 500, [both]))
    difference = (torch.cat(a()).float() - b()[0].float()).norm() / b()[0].float().norm()
    print(row("", f"prefix shared by a pair (difference {difference:.0e})", alternate(a, b, pairs, warm=False)))


def bf16(folder: Path, size: int, pairs: int) -> None:
    one, two, (x, texts) = load(folder, BF16), load(folder, F32), inputs(size)
    print(row("", "UNet in bfloat16 / float32", alternate(
        lambda: one.eps(x, 500, texts[:1]), lambda: two.eps(x, 500, texts[:1]), pairs)))  # fmt: skip
    print(row("", "VAE decoder in bfloat16 / float32", alternate(lambda: one.decode(x), lambda: two.decode(x), pairs)))


def layout(folder: Path, size: int, pairs: int) -> None:
    loaded, last, plain, (x, _) = load(folder, BF16), load(folder, BF16), load(folder, BF16), inputs(size)
    last.vae.to(memory_format=torch.channels_last)
    plain.vae.to(memory_format=torch.contiguous_format)
    z = (x / plain.vae.config.scaling_factor).to(BF16)
    z_last = z.contiguous(memory_format=torch.channels_last)
    before = lambda: plain.vae.decode(z)  # noqa: E731
    for name, call in (("channels_last", lambda: last.vae.decode(z_last)), ("as loaded", lambda: loaded.decode(x))):
        print(row("", f"VAE decoder {name} / contiguous", alternate(call, before, pairs)))


def counted(folder: Path, size: int, pairs: int) -> None:
    plans = [plan(target=target, source="a horse", seed=0) for target in ("a zebra", "a cow")]
    first, further = costs(plans)
    rows, again, K, maps = sum(first.values()), sum(further.values()), first["encode"], first["mask"] // 2
    peers = 4 * maps + 2 * K + 2 * K  # guided mask, guided encoding, guided decoding
    print(f"    schedule, UNet rows at the defaults: {rows} / {peers} = {rows / peers:.3f}")
    print(f"    further edit of the picture, rows:   {again} / {rows} = {again / rows:.3f}")


def compiled(folder: Path, size: int, pairs: int) -> None:
    plain, fast, (x, texts) = load(folder, BF16), load(folder, BF16, compile=True), inputs(size)
    start = time.perf_counter()
    got = fast.eps(x, 500, texts)
    first = time.perf_counter() - start
    expected = plain.eps(x, 500, texts)
    apart = (torch.cat(got).float() - torch.cat(expected).float()).norm() / torch.cat(expected).float().norm()
    found = alternate(lambda: fast.eps(x, 500, texts), lambda: plain.eps(x, 500, texts), pairs, warm=False)
    print(row("", f"UNet compiled / not (first call {first:.0f} s, error {apart:.0e})", found))
    start = time.perf_counter()
    fast.decode(x)
    first = time.perf_counter() - start
    found = alternate(lambda: fast.decode(x), lambda: plain.decode(x), pairs)
    print(row("", f"VAE decoder compiled / not (first call {first:.0f} s)", found))


def once(folder: Path, size: int, pairs: int) -> None:
    sd, (x, texts) = load(folder, BF16), inputs(size)
    text = torch.cat(texts).to(BF16)
    a, b = (lambda: sd.eps(x, 500, texts)), (lambda: sd.unet(x.to(BF16), 500, text))
    print(row("", "UNet that keeps what it made of t and texts", alternate(a, b, pairs)))


# By kind, the names of torch's operations, without aten:: and the _ of those in place; the rest goes by its own name.
KINDS = {
    "convolutions": "mkldnn_convolution _convolution convolution conv2d thnn_conv2d _slow_conv2d_forward",
    "products": "addmm mm bmm baddbmm linear mkldnn_linear matmul",
    "attention": "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu",
    "GroupNorm": "native_group_norm group_norm",
    "LayerNorm": "native_layer_norm layer_norm",
    "SiLU, GELU, gates": "silu gelu mul",
    "sums": "add",
    "copies, layout": "copy cat clone contiguous to _to_copy upsample_nearest2d empty empty_strided resize fill zeros",
    "views": "as_strided transpose t view _unsafe_view reshape expand flatten unflatten unsqueeze chunk split slice",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}


def by_kind(call: Callable[[], object]) -> str:
    """A line for each kind of operation: its share of the call, milliseconds, how often (what wraps another, too)."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        call()
    found: dict[str, list[float]] = {}
    for one in seen.key_averages():
        name = one.key.removeprefix("aten::").removesuffix("_")
        sums = found.setdefault(KIND_OF.get(name, name), [0.0, 0])
        sums[0] += one.self_cpu_time_total / 1000
        sums[1] += one.count
    whole = sum(ms for ms, _ in found.values())
    ordered = sorted(found.items(), key=lambda each: -each[1][0])
    lines = [f"{kind:28} {ms / whole:6.1%} {ms:9.1f} ms {count:6.0f}" for kind, (ms, count) in ordered[:12]]
    rest = sum(ms for _, (ms, _) in ordered[12:])
    lines += [f"{'others':28} {rest / whole:6.1%} {rest:9.1f} ms", f"{'in all':28} {whole:16.1f} ms"]
    return "\n".join(f"      {line}" for line in lines)


def profile(folder: Path, size: int, pairs: int) -> None:
    sd, (x, texts) = load(folder, BF16), inputs(size)
    image = torch.zeros(1, 3, size, size)
    calls: dict[str, Callable[[], object]] = {
        "UNet, a row": lambda: sd.eps(x, 500, texts[:1]), "UNet, a guided pair": lambda: sd.eps(x, 500, texts),
        "VAE, decoding": lambda: sd.decode(x), "VAE, encoding": lambda: sd.encode(image),
    }  # fmt: skip
    for name, call in calls.items():
        print(f"    {name}, bfloat16\n{by_kind(call)}", flush=True)


STEPS: dict[str, Callable[[Path, int, int], None]] = {
    "counted": counted, "prefix": prefix, "bf16": bf16, "layout": layout, "compile": compiled, "once": once,
    "profile": profile,
}  # fmt: skip


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="side of the pictures (%(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--only", nargs="+", default=["counted", "prefix", "bf16", "layout"], choices=list(STEPS))
    parser.add_argument("--weights", type=Path, metavar="DIR", help="keep the weights here, or use those that are")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    where = f"{args.size} px, torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"{time.strftime('%F %T')}, {where}, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.weights or Path(temporary)
        if not (folder / "unet").exists():
            write_random(folder, FULL, BF16)
        for name in args.only:
            STEPS[name](folder, args.size, args.pairs)
            gc.collect()
    print(f"{time.strftime('%F %T')}, load {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
