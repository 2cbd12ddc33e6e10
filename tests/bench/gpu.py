"""Everything that only a GPU can answer, in one command: is it right, then how fast, then what could be faster.

    python tests/bench/gpu.py --quick --json bench-gpu.json       # meant for 10 minutes: right or wrong, main figures
    python tests/bench/gpu.py --json bench-gpu.json               # everything, full size, on the CUDA device
    python tests/bench/gpu.py --only check G5 --tune              # the kernel alone: is it right, which settings win
    TRITON_INTERPRET=1 python tests/bench/gpu.py --tiny --device cpu --one-process   # the same code, tiny, anywhere

preflight   driver, compiler, Python.h, versions, clocks, free memory: what is missing is told before any work
check       the attention kernel against float64 in a field of NaN; the other kernels against float64
replay      every way to run the UNet, the fourth call with other inputs, so that a CUDA graph was recorded and replayed
edits       whole edits in float16 and bfloat16, eager and compiled, against float32; the miniature against the CPU
vae         each way to decode and encode against float32; what float16 cannot hold comes back by bfloat16
loops       waits for the device (torch's debug mode) that grow with the steps; graphs compiled again; a second GPU
ceiling     best rate of a matrix product and of a copy, measured here; G3, G6 and G7 are held against the first
G1, G2      a guided UNet call, ours / diffusers: both eager, ours compiled / theirs eager, both compiled
G3          rate of the compiled UNet / the matrix product's, for 1 and for 10 latents under 2 texts
G4          a whole edit / diffusers' defaults eager, and / diffusers' compiled networks under our schedule
G5          the attention kernel / torch's best backend, at every size of SD v1; --tune tries other settings as well
G6, G7, G8  a compiled edit / its floor; a picture of eight at once / its floor; default flags / the best flags
K1, K2      GroupNorm with SiLU, GEGLU: our kernels / torch, eager and compiled
M2, M3      peak memory of an edit over its weights, with 4 times the maps, compiled, and at 768 x 768
compile     seconds of the calls that compile, record and replay: with an empty cache, with what it left
busy        share of each stage in which the GPU computes
profile     where the time of one guided call goes: eager, compiled

Every figure runs in a process of its own, under --most seconds: what fails, hangs or breaks the device is recorded and
costs the others nothing. Each ratio is the median of pairs A B A B ... with its range. The weights are random, at the
official shapes. The file of --json is written anew after every figure. Without diffusers its rows say so and stay
unmeasured; what a device cannot run is named as such, never replaced. Exits with 1 where a result is wrong or a figure
failed; a limit missed is only shown.
"""

import argparse
import gc
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/tiny.py
sys.path.insert(0, str(Path(__file__).parents[2]))  # the package, where it is not installed

import gpu_checks
import tiny
from alternating import alternate
from gpu_checks import SOURCE, TARGET, relative
from load_peak import write_folder
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidiffedit import StableDiffusion, edit, encode, find_mask, masked_decode
from minidiffedit.attention import Site, backend, sdpa, split_heads
from minidiffedit.cost import cost
from minidiffedit.fast import CompiledUNet
from minidiffedit.kernels.together import together
from minidiffedit.many.bench import ceiling, counted, peak, reset_peak
from minidiffedit.many.verify import picture
from minidiffedit.run import plan

MUST = {  # of the project's table of numbers to beat
    "G1": 0.40, "G2": 1.00, "G4 defaults": 0.25, "G4 schedule": 0.95, "G5 self 4096": 1.05, "G5 cross 4096": 0.80,
    "M2 over weights": 1.40, "M2 maps": 1.02, "M3": 6e9, "G6": 2.3, "G7": 1.7, "G8": 1.2,
}  # fmt: skip
AT_LEAST = {"G3 b2": 0.30, "G3 b20": 0.45}
PEER = importlib.util.find_spec("diffusers") is not None


class Bench:
    """What the figures share: the weights' folder, the device, the sizes, and what was found so far."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.found = args, folder, {}
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)
        self.on_gpu, self.tiny = self.device.type == "cuda", args.tiny
        self.cells, self.pairs, self.inner = (8, 1, 1) if args.tiny else (64, 3 if args.quick else args.pairs, 10)
        self.quick = args.quick
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
        self.write()

    def write(self) -> None:
        if self.args.json:
            self.args.json.write_text(json.dumps(self.found, indent=1, default=str) + "\n")

    def load(self, **options: Any) -> StableDiffusion:
        """Ours; compile=True by the real compiler on a GPU, by torch's tracer alone in the tiny form."""
        compiling = options.pop("compile", False)
        real = compiling and not self.tiny
        options = {"device": self.device, "dtype": self.dtype} | options
        sd = StableDiffusion.load(self.folder, compile=real, **options)
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


def guarded(bench: Bench, name: str, figure: Callable[[Bench], None]) -> None:
    """A figure; what it raises is a finding of its own, and the next one begins."""
    try:
        figure(bench)
    except Exception as error:
        traceback.print_exc()
        said = str(error).strip().splitlines() or [""]
        bench.say(f"{name} failed", error=f"{type(error).__name__}: {said[0]}")
    bench.free()


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
        step = torch.full((), t, device=x.device)
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
        q, k, v = drawn(bench, n, n if kind == "self" else 77, d)
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
        calls = CAPTURED if bench.on_gpu else 1  # in one replay
        flop = calls * 4 * q.shape[0] * 8 * n * k.shape[2] * d
        bench.say(
            name, **times[best], limit=MUST.get(name), against=best, d=d,
            tflop_per_s=flop / times[best]["seconds"][0] / 1e12,
            others={option: row["ratio"] for option, row in times.items()},
        )  # fmt: skip
        if bench.args.tune:
            tune(bench, name, q, k, v, ours)


def drawn(bench: Bench, n: int, m: int, d: int) -> list[Tensor]:
    """q of n queries, k and v of m keys in 8 heads of d numbers, each as a projection of its own lays them."""
    generator = torch.Generator().manual_seed(n)
    made = [torch.randn(2, rows, 8 * d, generator=generator).to(bench.device, bench.dtype) for rows in (n, m, m)]
    return [split_heads(one, 8) for one in made]


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


CAPTURED = 20  # calls in a graph


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
        for _ in range(CAPTURED):
            call()
    return graph.replay


def floor(bench: Bench, sd: StableDiffusion, rows: dict[str, int]) -> float:
    """Seconds that the counted work of an edit would take at the rate of the best matrix product."""
    rate, tflop = bench.found.get("ceiling") or ceiling(sd), counted(sd, bench.size)
    pairs = (rows["mask"] + rows["decode"]) / 2
    work = tflop["VAE encode"] + tflop["VAE decode"] + rows["encode"] * tflop["UNet, 1 text"]
    return (work + pairs * tflop["UNet, 2 texts"]) / rate["tflop_per_s"]


def g6_g7_g8(bench: Bench) -> None:
    """An edit against its floor, eight pictures at once, and what a user gets without any flag."""
    best, usual = bench.load(attention="auto", compile=True), bench.load()
    photo, settings = picture(bench.size), {"steps": bench.steps, "maps": bench.maps, "size": bench.size, "seed": 0}

    def run(sd: StableDiffusion) -> Any:
        return edit(sd, photo, source=SOURCE, target=TARGET, **settings)

    rows, at_least = run(best).evaluations, floor(bench, usual, cost(plan(source=SOURCE, target=TARGET, **settings)))
    found = bench.compare(partial(run, usual), partial(run, best), 1)
    seconds = found["seconds"][1]
    made = {"seconds": seconds, "floor": at_least, "rows": sum(rows.values())}
    bench.say("G6", value=seconds / at_least, limit=MUST["G6"], **made)
    bench.say("G8", **found, limit=MUST["G8"])
    many = 2 if bench.tiny else 8

    def at_once() -> None:
        list(together(best, [lambda sd: iter([run(sd)])] * many, many))

    seconds = bench.compare(at_once, at_once, 1)["seconds"][0] / many
    bench.say("G7", value=seconds / at_least, limit=MUST["G7"], pictures=many, seconds=seconds)


def kernels_of_layers(bench: Bench) -> None:
    """K1, K2: ours / torch's, and / torch's compiled, at the sizes of SD v1 for a guided pair."""
    from minidiffedit.kernels.geglu import geglu
    from minidiffedit.kernels.norm import group_norm_silu

    def against(name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor]) -> None:
        found = bench.compare(captured(bench, ours), captured(bench, theirs))
        bench.say(name, **found)
        if not bench.tiny:
            compiled = torch.compile(theirs, dynamic=False)
            bench.say(f"{name} compiled", **bench.compare(captured(bench, ours), captured(bench, compiled)))

    with torch.no_grad():
        for side, c in ((4, 32),) if bench.tiny else ((64, 320), (64, 640), (32, 640), (16, 1280), (8, 1280)):
            x = torch.randn(2, c, side, side).to(bench.device, bench.dtype, memory_format=torch.channels_last)
            w, b = (torch.randn(c).to(bench.device, bench.dtype) for _ in range(2))
            plain = partial(lambda x, w, b: F.silu(F.group_norm(x, 32, w, b, 1e-5)), x, w, b)
            against(f"K1 {side} x {side} x {c}", partial(group_norm_silu, x, w, b, 32, 1e-5), plain)
        for m, width in ((32, 16),) if bench.tiny else ((8192, 320), (2048, 640), (512, 1280), (128, 1280)):
            x = torch.randn(m, width).to(bench.device, bench.dtype)
            w, b = (torch.randn(8 * width, *some).to(bench.device, bench.dtype) for some in ((width,), ()))
            plain = partial(lambda x, w, b: glu(F.linear(x, w, b)), x, w / width**0.5, b)
            against(f"K2 {m} x {width}", partial(geglu, x, w / width**0.5, b), plain)


def glu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


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
        value = measured(bench.maps, bench.size * 3 // 2, bench.load(low_memory=True))
        bench.say("M3 low memory", value=value, over_weights=value / weights)
        value = measured(bench.maps, bench.size, bench.load(compile=True))
        bench.say("M2 compiled", value=value, over_weights=value / weights)


def compiling(bench: Bench) -> None:
    """Seconds of the calls that compile (first), record (second) and replay (third, fourth)."""
    x, found = bench.x[:1], dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as folder, environment("TORCHINDUCTOR_CACHE_DIR", folder):
        for name in ("cold", "warm"):  # the second finds what the first left on disk
            torch._dynamo.reset()
            sd = bench.load(attention="sdpa", compile=True)
            texts, found[name] = bench.texts(sd), []
            for t in (981, 481, 241, 1):
                start = sd.clock()
                sd.eps(x, t, texts)
                found[name].append(sd.clock() - start)
            bench.say(f"compile {name}", seconds=found[name], of=["compiling", "recording", "replay", "replay"])
    eager = bench.load(attention="sdpa")
    plain = bench.compare(bench.pair(eager), bench.pair(eager))["seconds"][0]
    saved = 60 * (plain - found["warm"][-1])  # guided pairs of an edit, encoding counted as half
    edits = sum(found["cold"][:2]) / saved if saved > 0 else float("inf")
    bench.say("compile breaks even", edits=edits, eager_pair=plain, replayed_pair=found["warm"][-1])


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ.update({} if before is None else {name: before})


def busy(bench: Bench) -> None:
    """Kernel time of a stage by the profiler / its wall time without it."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    sd = bench.load(attention="sdpa", compile=True)
    source, target = bench.texts(sd)
    x, steps, photo = bench.x[:1], min(bench.steps, 10), torch.zeros(1, 3, bench.size, bench.size)
    path = encode(sd.eps, x, source, steps=steps)
    stages: dict[str, Callable[[], Any]] = {
        "mask": lambda: find_mask(sd.eps, x, target, source, maps=bench.maps),
        "encode": lambda: encode(sd.eps, x, source, steps=steps),
        "decode": lambda: masked_decode(sd.eps, path, torch.ones_like(x[:, :1]), target, source),
        "vae encode": lambda: sd.encode(photo), "vae decode": lambda: sd.decode(x),
    }  # fmt: skip
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.on_gpu else [])]
    for name, call in stages.items():
        call(), call(), call()
        start = sd.clock()
        call()
        wall = sd.clock() - start
        with profiler(activities=activities) as seen:
            call()
            bench.wait()
        which = ("self_device_time_total", "self_cuda_time_total") if bench.on_gpu else ("self_cpu_time_total",) * 2
        kernels = sum(getattr(row, which[0], getattr(row, which[1], 0)) for row in seen.key_averages()) / 1e6
        bench.say(f"busy {name}", value=kernels / wall, seconds=wall)


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
    "preflight": gpu_checks.preflight, "check": gpu_checks.check, "replay": gpu_checks.replay,
    "edits": gpu_checks.edits, "vae": gpu_checks.vae_paths, "loops": gpu_checks.loops, "ceiling": ceilings,
    "G1": g1_g2, "G2": g1_g2, "G3": g3, "G4": g4, "G5": g5, "G6": g6_g7_g8, "G7": g6_g7_g8, "G8": g6_g7_g8,
    "K1": kernels_of_layers, "K2": kernels_of_layers, "M2": memory, "M3": memory, "compile": compiling, "busy": busy,
    "profile": profile,
}  # fmt: skip
QUICK = "preflight check replay edits vae loops ceiling G1 G2 G3 G4 G6".split()  # noqa: SIM905 (a sentence)


def apart(bench: Bench, argv: list[str], name: str) -> None:
    """A figure in a process of its own; what it found is taken over, its death or overrun is a finding."""
    with tempfile.TemporaryDirectory() as temporary:
        part = Path(temporary) / "part.json"
        part.write_text(json.dumps({k: v for k, v in bench.found.items() if k == "ceiling"}))
        own = ["--one-process", "--only", name, "--weights", str(bench.folder), "--json", str(part)]
        try:
            code: Any = subprocess.run([sys.executable, __file__, *argv, *own], timeout=bench.args.most).returncode
        except subprocess.TimeoutExpired:
            code = f"more than {bench.args.most} s"
        bench.found |= json.loads(part.read_text())
    if code not in (0, 1):
        bench.say(f"{name} failed", error=f"its process ended with {code}")
    bench.write()


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(FIGURES), metavar="FIGURE")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, and fewer cases and pairs")
    about = "of the timings; what is right is asked in both half types (%(default)s, what `load` takes)"
    parser.add_argument("--dtype", default="float16", choices=["bfloat16", "float16", "float32"], help=about)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pairs", type=int, default=9, help="of timings per ratio (%(default)s)")
    parser.add_argument("--most", type=int, default=900, metavar="SECONDS", help="a figure may take (%(default)s)")
    parser.add_argument("--tune", action="store_true", help="G5: other settings of the kernel too")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and one pair: a check of this script")
    parser.add_argument("--one-process", action="store_true", help="all figures in this process")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="a model's folder, in place of random weights")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device here; --tiny --device cpu runs the same code on the CPU")
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(args, args.weights or Path(temporary))
        if not args.weights:
            write = partial(tiny.write_folder, unet=tiny.SHALLOW) if args.tiny else write_folder
            write(bench.folder)
        if args.one_process and args.json and args.json.exists():
            bench.found = json.loads(args.json.read_text())  # the ceiling, of a parent
        where = torch.cuda.get_device_name() if bench.on_gpu else args.device
        bench.say("machine", device=where, torch=torch.__version__, dtype=args.dtype, date=time.strftime("%F %T"))
        figures: dict[Callable[[Bench], None], str] = {}
        for name in args.only or (QUICK if args.quick else list(FIGURES)):
            figures.setdefault(FIGURES[name], name)
        for name in figures.values():
            if args.one_process:
                guarded(bench, name, FIGURES[name])
            else:
                apart(bench, argv, name)
    wrong = [name for name, found in bench.found.items() if found.get("right") is False or name.endswith(" failed")]
    if wrong:
        print(f"wrong: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
