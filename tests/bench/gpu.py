"""Everything that only a GPU can answer, in one command: figures G1 to G5, M2, M3, ceilings, correctness, a profile.

    python tests/bench/gpu.py --json bench-gpu.json               # bfloat16, full size, on the CUDA device
    python tests/bench/gpu.py --only check G5 --tune              # the kernel alone: is it right, which settings win
    TRITON_INTERPRET=1 python tests/bench/gpu.py --tiny --device cpu --dtype float16   # the same code, tiny, anywhere

ceiling  best rate of a matrix product and of a copy, measured here; G3 is held against the first
check    the kernel against float64 in a field of NaN; every way to run the UNet against the plain one and float64
G1, G2   a guided UNet call, ours / diffusers: both eager, ours compiled / theirs eager, both compiled
G3       rate of the compiled UNet / the matrix product's, for 1 and for 10 latents under 2 texts
G4       a whole edit / diffusers' defaults eager, and / diffusers' compiled networks under our schedule
G5       the attention kernel / torch's best backend, at every size of SD v1; --tune tries other settings as well
M2, M3   peak memory of an edit over its weights, with 4 times the maps, and at 768 x 768
profile  where the time of one guided call goes: eager, compiled

Each ratio is the median of pairs A B A B ... with its range. The weights are random, at the official shapes. The file
of --json is written anew after every figure, so that what was measured survives an interruption. Without diffusers its
rows say so and stay unmeasured; what a device cannot run is named as such, never replaced. Exits with 1 where a result
is wrong; a figure missed is only shown.
"""

import argparse
import gc
import importlib.util
import itertools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/tiny.py
sys.path.insert(0, str(Path(__file__).parents[2]))  # the package, where it is not installed

import tiny
from alternating import alternate
from attention_cases import SIZES, TOLERANCE, kernel_errors, relative
from load_peak import write_folder
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidiffedit import StableDiffusion, edit
from minidiffedit.attention import Site, backend, sdpa
from minidiffedit.fast import CompiledUNet
from minidiffedit.many.bench import ceiling, counted, peak, reset_peak
from minidiffedit.many.verify import picture

MUST = {  # of the project's table of numbers to beat
    "G1": 0.40, "G2": 1.00, "G4 defaults": 0.25, "G4 schedule": 0.95, "G5 self 4096": 1.05, "G5 cross 4096": 0.80,
    "M2 over weights": 1.40, "M2 maps": 1.02, "M3": 6e9,
}  # fmt: skip
AT_LEAST = {"G3 b2": 0.30, "G3 b20": 0.45}
BOUND = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
SOURCE, TARGET = "a horse", "a zebra"
PEER = importlib.util.find_spec("diffusers") is not None


class Bench:
    """What the figures share: the weights' folder, the device, the sizes, and what was found so far."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.found = args, folder, {}
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)
        self.on_gpu, self.tiny = self.device.type == "cuda", args.tiny
        self.cells, self.pairs, self.inner = (8, 1, 1) if args.tiny else (64, args.pairs, 10)
        self.steps, self.maps = (2, 2) if args.tiny else (50, 10)
        self.size = self.cells * 8
        self.x = torch.randn(10, 4, self.cells, self.cells, generator=torch.Generator().manual_seed(0)).to(self.device)

    def say(self, name: str, **found: Any) -> None:
        """Keep a figure, show it, write the file."""
        limit = found.get("limit") if "right" in found or not self.tiny else None  # a tiny model's times mean nothing
        value = found.get("ratio", found.get("value"))
        verdict = ""
        if limit is not None and value is not None:
            met = value >= limit if name in AT_LEAST else value <= limit
            verdict = f"  {'met' if met else 'MISSED'} ({limit:g})"
        shown = {k: v for k, v in found.items() if k not in ("limit", "table", "pairs", "cores")}
        self.found[name] = found
        print(f"{name:16}{verdict}  " + ", ".join(f"{k} {number(v)}" for k, v in shown.items()), flush=True)
        if "table" in found:
            print(found["table"], flush=True)
        if self.args.json:
            self.args.json.write_text(json.dumps(self.found, indent=1, default=str) + "\n")

    def load(self, **options: Any) -> StableDiffusion:
        """Ours; compile=True by the real compiler on a GPU, by torch's tracer alone in the tiny form."""
        compiling = options.pop("compile", False)
        real = compiling and not self.tiny
        sd = StableDiffusion.load(self.folder, device=self.device, dtype=self.dtype, compile=real, **options)
        if compiling and not real:
            sd.unet = CompiledUNet(sd.unet, backend="eager")
        return sd

    def texts(self, sd: StableDiffusion) -> list[Tensor]:
        return [sd.text([prompt]) for prompt in (SOURCE, TARGET)]

    def pair(self, sd: StableDiffusion, latents: int = 1) -> Callable[[], Tensor]:
        """latents under two texts: one guided call, or the maps of a mask."""
        x, texts = self.x[:latents], self.texts(sd)
        return lambda: torch.cat(sd.eps(x, 481, texts))

    def compare(self, a: Callable[[], Any], b: Callable[[], Any], inner: int | None = None) -> dict[str, Any]:
        """Pairs of `inner` calls each, on a device that has finished; seconds per call."""
        inner = inner or self.inner

        def repeated(call: Callable[[], Any]) -> None:
            for _ in range(inner):
                call()
            self.wait()

        found = alternate(partial(repeated, a), partial(repeated, b), self.pairs)
        return found | {"seconds": [s / inner for s in found["seconds"]]}

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


def number(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "/".join(number(v) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------- diffusers


class PeerUNet:
    """diffusers' UNet behind our call: x repeated for its texts, as its pipelines do."""

    def __init__(self, bench: Bench, compile: bool):
        from diffusers import UNet2DConditionModel

        net = from_disk(bench, UNet2DConditionModel, "unet")
        self.conv_in, self.on_gpu, self.compiled = net.conv_in, bench.on_gpu, compile
        self.config = SimpleNamespace(**net.config)
        self.call = net
        if compile:
            net.to(memory_format=torch.channels_last)
            how = {"mode": "reduce-overhead"} if bench.on_gpu else {"backend": "eager"}
            self.call = torch.compile(net, fullgraph=True, dynamic=False, **how)

    @torch.no_grad()
    def __call__(self, x: Tensor, t: int, text: Tensor, attend: Any) -> Tensor:
        x = x.repeat(len(text) // len(x), 1, 1, 1)
        if not self.compiled:
            return self.call(x, t, text, return_dict=False)[0]
        if self.on_gpu:
            torch.compiler.cudagraph_mark_step_begin()
        step = torch.tensor(t, device=x.device)
        return self.call(x.contiguous(memory_format=torch.channels_last), step, text, return_dict=False)[0].clone()


class PeerVAE:
    """diffusers' autoencoder behind our two calls."""

    def __init__(self, bench: Bench, compile: bool):
        from diffusers import AutoencoderKL

        self.net = from_disk(bench, AutoencoderKL, "vae")
        factor = 2 ** (len(self.net.config.block_out_channels) - 1)
        self.config = SimpleNamespace(**self.net.config, factor=factor)
        if compile and bench.on_gpu:
            self.net.to(memory_format=torch.channels_last)
            for name in ("encode", "decode"):
                setattr(self.net, name, torch.compile(getattr(self.net, name), dynamic=False))

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self.net.encode(image).latent_dist
        return found.mean, found.logvar

    def decode(self, z: Tensor) -> Tensor:
        return self.net.decode(z).sample


def from_disk(bench: Bench, kind: Any, network: str) -> Any:
    variant = None if bench.tiny else "fp16"
    net = kind.from_pretrained(bench.folder / network, torch_dtype=bench.dtype, variant=variant)
    return net.to(bench.device).eval().requires_grad_(False)


def peer(bench: Bench, sd: StableDiffusion, compile: bool) -> StableDiffusion:
    """diffusers' UNet and autoencoder under our schedule (the text model is ours)."""
    unet: Any = PeerUNet(bench, compile)
    vae: Any = PeerVAE(bench, compile)
    return StableDiffusion(unet, vae, sd.clip, sd.tokenizer)


def their_edit(bench: Bench) -> Callable[[], None]:
    """diffusers' DiffEdit pipeline with its own defaults: everything guided, the picture encoded for every map."""
    from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, UNet2DConditionModel
    from diffusers import StableDiffusionDiffEditPipeline as Pipeline
    from transformers import CLIPTextModel, CLIPTokenizer

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipe = Pipeline(
        vae=from_disk(bench, AutoencoderKL, "vae"), unet=from_disk(bench, UNet2DConditionModel, "unet"),
        text_encoder=from_disk(bench, CLIPTextModel, "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(Path(__file__).parents[2] / "weights" / "mini" / "tokenizer"),
        scheduler=scheduler, inverse_scheduler=DDIMInverseScheduler.from_config(scheduler.config),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    photo, settings = picture(bench.size), {"num_inference_steps": bench.steps}

    def run() -> None:
        generator = torch.Generator().manual_seed(0)
        mask = pipe.generate_mask(
            photo, source_prompt=SOURCE, target_prompt=TARGET, num_maps_per_mask=bench.maps, generator=generator,
            **settings,
        )  # fmt: skip
        latents = pipe.invert(SOURCE, photo, generator=generator, **settings).latents
        pipe(TARGET, mask_image=mask, image_latents=latents, generator=generator, **settings)

    return run


# ---------------------------------------------------------------- figures


def ceilings(bench: Bench) -> None:
    sd = bench.load(attention="sdpa")
    bench.say("ceiling", **ceiling(sd))
    n = 1 << (12 if bench.tiny else 30)
    a, b = torch.ones(n, dtype=torch.uint8, device=bench.device), torch.empty(n, dtype=torch.uint8, device=bench.device)
    seconds = bench.compare(lambda: b.copy_(a), lambda: b.copy_(a))["seconds"][0]
    bench.say("copy", bytes_per_s=2 * n / seconds)


def check(bench: Bench) -> None:
    """The kernel in every dtype the device takes, then the ways to run the whole UNet."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        name = f"kernel {str(dtype).removeprefix('torch.')}"
        try:
            backend("triton", bench.device, dtype)
        except ValueError as reason:
            bench.say(name, cannot_run=str(reason))
            continue
        sizes = SIZES[2:4] if bench.tiny else [*SIZES, (4096, 4096), (4096, 77), (2304, 2304)]
        widths = (40,) if bench.tiny else (40, 80, 160, 24, 48, 64, 8)
        errors = [max(e) for d in widths for e in kernel_errors(sizes, 1, 2, d, dtype, device=bench.device)]
        right = all(e <= TOLERANCE[dtype] for e in errors)  # a NaN is not
        bench.say(name, value=max(errors), limit=TOLERANCE[dtype], cases=len(errors), right=right)

    sd = bench.load(attention="sdpa")
    plain = bench.pair(sd)()
    exact = in_float64(bench, sd)
    bench.say("plain UNet", error_to_float64=relative(plain, exact))
    for name in ("triton", "compiled sdpa", "compiled triton"):
        attention, compiling = name.split()[-1], name.startswith("compiled")
        if attention == "triton" and compiling and not bench.on_gpu:
            bench.say(f"UNet {name}", cannot_run="an interpreted kernel cannot be compiled")
            continue
        try:
            got = bench.pair(bench.load(attention=attention, compile=compiling))()
        except ValueError as reason:
            bench.say(f"UNet {name}", cannot_run=str(reason))
            continue
        error = relative(got, plain)
        bench.say(
            f"UNet {name}", value=error, limit=BOUND[bench.dtype], error_to_float64=relative(got, exact),
            right=error <= BOUND[bench.dtype],
        )  # fmt: skip
        bench.free()


def in_float64(bench: Bench, sd: StableDiffusion) -> Tensor:
    """The plain UNet on the same rounded weights and inputs, computed in float64."""
    texts = torch.cat(bench.texts(sd)).double()
    x = bench.x[:1].to(bench.dtype).double()
    exact = sd.unet.double()(x, 481, texts, sdpa)
    sd.unet.to(bench.dtype)
    return exact


def g1_g2(bench: Bench) -> None:
    ours, compiled = bench.load(attention="sdpa"), bench.load(attention="sdpa", compile=True)
    if not PEER:
        bench.say("G1", unmeasured="diffusers is not installed")
        bench.say("G2", unmeasured="diffusers is not installed")
        return
    theirs, their_compiled = (peer(bench, ours, compile) for compile in (False, True))
    apart = relative(bench.pair(ours)(), bench.pair(theirs)())
    a, b = bench.pair(ours), bench.pair(theirs)
    bench.say("G1 both eager", **bench.compare(a, b), error_between=apart)
    a, c = bench.pair(compiled), bench.pair(their_compiled)
    bench.say("G1", **bench.compare(a, b), limit=MUST["G1"])
    bench.say("G2", **bench.compare(a, c), limit=MUST["G2"], error_between=relative(a(), c()))


def g3(bench: Bench) -> None:
    sd = bench.load(attention="sdpa", compile=True)
    rate = bench.found.get("ceiling") or ceiling(sd)
    tflop = counted(sd, bench.size)["UNet, 2 texts"]
    for latents in (1, 10):
        call = bench.pair(sd, latents)
        seconds = bench.compare(call, call)["seconds"][0]
        reached = latents * tflop / seconds
        name = f"G3 b{2 * latents}"
        bench.say(name, value=reached / rate["tflop_per_s"], limit=AT_LEAST[name], tflop_per_s=reached, seconds=seconds)
    bench.say("G3 first calls", seconds=dict((str(shape), s) for shape, s in sd.unet.seconds.items()))


def g4(bench: Bench) -> None:
    sd = bench.load(attention="sdpa", compile=True)
    photo, settings = picture(bench.size), {"steps": bench.steps, "maps": bench.maps, "size": bench.size, "seed": 0}

    def run(model: StableDiffusion) -> Any:
        return edit(model, photo, source=SOURCE, target=TARGET, **settings)

    first = run(sd)
    bench.say("G4 ours", rows=sum(first.evaluations.values()), verdict=first.verdict, seconds=first.seconds)
    if not PEER:
        bench.say("G4", unmeasured="diffusers is not installed")
        return
    same = peer(bench, sd, compile=True)
    ours, defaults = partial(run, sd), their_edit(bench)
    bench.say("G4 defaults", **bench.compare(ours, defaults, 1), limit=MUST["G4 defaults"])
    bench.say("G4 schedule", **bench.compare(ours, partial(run, same), 1), limit=MUST["G4 schedule"])


def g5(bench: Bench) -> None:
    """The kernel and each of torch's backends on one layer, as SD v1 has them; on a GPU replayed as a CUDA graph."""
    levels = ((16, 8),) if bench.tiny else ((4096, 40), (1024, 80), (256, 160), (64, 160))
    for (n, d), kind in itertools.product(levels, ("self", "cross")):
        name, site = f"G5 {kind} {n}", Site("down", 0, 0, kind)  # type: ignore[arg-type]
        x = torch.randn(2, n, 3, 8, d, generator=torch.Generator().manual_seed(n)).to(bench.device, bench.dtype)
        q, k, v = x.transpose(1, 3).unbind(2)
        if kind == "cross":
            k, v = k[:, :, :77].contiguous(), v[:, :, :77].contiguous()
        try:
            ours = captured(bench, partial(backend("triton", bench.device, bench.dtype), site, q, k, v))
        except ValueError as reason:
            bench.say(name, cannot_run=str(reason))
            continue
        times = {}
        for option in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            try:
                with sdpa_kernel(option):
                    theirs = captured(bench, partial(sdpa, site, q, k, v))
            except RuntimeError:  # not for this device, or not for this size
                continue
            times[option.name] = bench.compare(ours, theirs)
        if not times:
            times["MATH"] = bench.compare(ours, captured(bench, partial(sdpa, site, q, k, v)))
        best = max(times, key=lambda option: times[option]["ratio"])
        flop = 4 * q.shape[0] * 8 * n * k.shape[2] * d
        bench.say(
            name, **times[best], limit=MUST.get(name), against=best, d=d,
            tflop_per_s=flop / times[best]["seconds"][0] / 1e12,
            others={option: row["ratio"] for option, row in times.items()},
        )  # fmt: skip
        if bench.args.tune:
            tune(bench, name, q, k, v, ours)


def tune(bench: Bench, name: str, q: Tensor, k: Tensor, v: Tensor, ours: Callable[[], Any]) -> None:
    """Other settings of the kernel / the shipped ones, best first; what does not compile or fit is left out."""
    from minidiffedit.kernels.attention import ONE_TILE, launch

    out, rows = torch.empty_like(q), []
    blocks = [{}] if k.shape[2] <= ONE_TILE else [{"BLOCK_K": size} for size in (32, 64, 128)]
    for block, side, warps, stages in itertools.product(blocks, (64, 128), (4, 8), (1, 2, 3, 4)):
        other = {"BLOCK_Q": side, **block, "num_warps": warps, "num_stages": stages}
        try:
            found = bench.compare(captured(bench, partial(launch, q, k, v, out, **other)), ours)
        except Exception as error:  # Triton's own kinds: out of shared memory, not divisible
            rows.append((float("inf"), f"{type(error).__name__}: {other}"))
            continue
        rows.append((found["ratio"], f"{found['ratio']:.3f} ({found['least']:.3f}..{found['most']:.3f}) {other}"))
        if bench.tiny:
            break
    bench.say(f"{name} tuned", table="\n".join(line for _, line in sorted(rows)[:5]))


def captured(bench: Bench, call: Callable[[], Any]) -> Callable[[], Any]:
    """20 calls as one CUDA graph, so that the launch from Python is out of the measure; on a CPU the call itself."""
    if not bench.on_gpu:
        call()
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            call()
    return graph.replay


def memory(bench: Bench) -> None:
    """Of the GPU, or of the process on a CPU, where weights that were freed may still count."""
    bench.free()
    sd = bench.load()
    weights = sum(p.nbytes for net in (sd.unet, sd.vae, sd.clip) for p in net.parameters())

    def measured(maps: int, size: int, model: StableDiffusion) -> int:
        bench.free()
        reset_peak()
        steps = 2 if bench.tiny else 10  # more steps take no more memory
        edit(model, picture(size), source=SOURCE, target=TARGET, size=size, steps=steps, maps=maps, seed=0)
        return peak(model)

    few, many = (measured(maps, bench.size, sd) for maps in (bench.maps, 4 * bench.maps))
    bench.say("M2 over weights", value=few / weights, limit=MUST["M2 over weights"], peak=few, weights=weights)
    bench.say("M2 maps", value=many / few, limit=MUST["M2 maps"], peak=many)
    large = measured(bench.maps, bench.size * 3 // 2, sd)
    bench.say("M3", value=large, limit=MUST["M3"], size=bench.size * 3 // 2)
    del sd
    if bench.on_gpu:
        low = bench.load(low_memory=True)
        value = measured(bench.maps, bench.size * 3 // 2, low)
        bench.say("M3 low memory", value=value, over_weights=value / weights)


def profile(bench: Bench) -> None:
    """Kernels by time in one guided call."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    for compiling in (False, True):
        call = bench.pair(bench.load(attention="sdpa", compile=compiling))
        call(), call()
        with profiler(activities=activities) as seen:
            call()
            bench.wait()
        by = "self_cuda_time_total" if bench.on_gpu else "self_cpu_time_total"
        name = f"profile {'compiled' if compiling else 'eager'}"
        bench.say(name, table=seen.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=60))


FIGURES: dict[str, Callable[[Bench], None]] = {
    "ceiling": ceilings, "check": check, "G5": g5, "G1": g1_g2, "G2": g1_g2, "G3": g3, "G4": g4, "M2": memory,
    "M3": memory, "profile": profile,
}  # fmt: skip


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(FIGURES), choices=list(FIGURES), metavar="FIGURE")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pairs", type=int, default=9, help="of timings per ratio (%(default)s)")
    parser.add_argument("--tune", action="store_true", help="G5: other settings of the kernel too")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and one pair: a check of this script")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --tiny --device cpu runs the same code on the CPU")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(args, Path(temporary))
        if args.tiny:
            tiny.write_folder(bench.folder, unet=tiny.SHALLOW)
        else:
            write_folder(bench.folder)
        where = torch.cuda.get_device_name() if bench.on_gpu else args.device
        bench.say("machine", device=where, torch=torch.__version__, dtype=args.dtype, date=time.strftime("%F %T"))
        for figure in dict.fromkeys(FIGURES[name] for name in args.only):
            figure(bench)
            bench.free()
    wrong = [name for name, found in bench.found.items() if found.get("right") is False]
    if wrong:
        print(f"wrong: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
