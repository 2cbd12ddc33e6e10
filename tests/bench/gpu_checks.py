"""What must be right on a GPU before its times mean anything; figures of gpu.py, which says what each asks.

"bench" is gpu.py's Bench: the weights' folder, the device, the sizes, `say` to keep a finding. A way is right where its
error to float64 is at most SLACK times the plain path's in the same type, which holds in every type; in
float32 it must besides be as near to the plain path as rounding is.
"""

import copy
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from attention_cases import SIZES, TOLERANCE, kernel_errors, relative
from torch import Tensor

from minidiffedit import StableDiffusion, edit, kernels
from minidiffedit.attention import backend, sdpa
from minidiffedit.fast import decode_by_rows
from minidiffedit.many.verify import picture

SLACK = 1.25
BOUND_FULL = 1e-5
SOURCE, TARGET = "a horse", "a zebra"
HALF = (torch.float16, torch.bfloat16)
MINI = Path(__file__).parents[2] / "weights" / "mini"
ASKED = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,clocks_throttle_reasons.active"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def types(bench: Any) -> tuple[torch.dtype, ...]:
    """The half types of a GPU; of a CPU, where the script is only tried, the one that was asked for."""
    return HALF if bench.on_gpu else (bench.dtype,)


@contextmanager
def without_tf32() -> Iterator[None]:
    """float32 as it is written: torch lets convolutions round to tf32, to 10 bits, unless told otherwise."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


# ---------------------------------------------------------------- preflight


def preflight(bench: Any) -> None:
    """What the other figures will need, each with what is missing."""
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    for package in ("torch", "triton", "diffusers", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["compiler"] = shutil.which(os.environ.get("CC") or "gcc") or "none"
    found["Python.h"] = Path(sysconfig.get_path("include"), "Python.h").exists()
    missing = [kernels.lacking_compiler("C" if bench.on_gpu else "C++")]
    missing += [None if importlib.util.find_spec("triton") else "the package triton"]
    if bench.on_gpu:
        free, total = torch.cuda.mem_get_info(bench.device)
        found |= {"cuda": torch.version.cuda, "devices": torch.cuda.device_count(), "free": free, "total": total}
        found["capability"] = torch.cuda.get_device_capability(bench.device)
        missing += [None if free > 6 * 2**30 else f"memory: {free / 2**30:.1f} GiB are free, a full edit takes 4 to 6"]
        if asked := shutil.which("nvidia-smi"):
            command = [asked, f"--query-gpu={ASKED}", "--format=csv,noheader", f"--id={bench.device.index or 0}"]
            told = subprocess.run(command, capture_output=True, text=True).stdout.split(", ")
            found |= dict(zip(ASKED.split(","), (one.strip() for one in told)))
    found |= {f"kernels {name_of(t)}": kernels.unfit(bench.device, t) or "fit" for t in (*HALF, torch.float32)}
    bench.say("preflight", **found, missing=[one for one in missing if one] or "nothing")


# ---------------------------------------------------------------- the kernels alone


def check(bench: Any) -> None:
    """The attention kernel and its variants in every type that the device takes; GroupNorm with SiLU; GEGLU."""
    for dtype in (*HALF, torch.float32):
        name = f"kernel {name_of(dtype)}"
        try:
            backend("triton", bench.device, dtype)
        except ValueError as reason:
            bench.say(name, cannot_run=str(reason))
            continue
        sizes = SIZES[2:4] if bench.tiny else [*SIZES, (4096, 4096), (4096, 77), (2304, 2304)]
        widths = (40,) if bench.tiny else (40, 80, 160) if bench.quick else (40, 80, 160, 24, 48, 64, 8)
        errors = [max(e) for d in widths for e in kernel_errors(sizes, 1, 2, d, dtype, device=bench.device)]
        judge(bench, name, errors, dtype)
        for variant, other in variants().items():
            options: dict[str, Any] = {"device": bench.device, "other": other}
            long = [(n, m) for n, m in sizes if m > 128]
            judge(bench, f"{name} {variant}", [max(e) for e in kernel_errors(long, 1, 2, 40, dtype, **options)], dtype)
        judge(bench, f"geglu {name_of(dtype)}", [geglu_error(*one, dtype, bench.device) for one in PRODUCTS], dtype)
        errors = [norm_error(*one, dtype, bench.device) for one in NORMS]
        judge(bench, f"norm {name_of(dtype)}", errors, dtype, norm_limit(dtype))


def variants() -> dict[str, dict[str, int]]:
    from minidiffedit.kernels.attention import VARIANTS

    return VARIANTS


def judge(bench: Any, name: str, errors: list[float], dtype: torch.dtype, limit: float | None = None) -> None:
    limit = TOLERANCE[dtype] if limit is None else limit
    right = all(error <= limit for error in errors)  # a NaN is not
    bench.say(name, value=max(errors, default=0.0), limit=limit, cases=len(errors), right=right)


MEAN = 30.0


def norm_limit(dtype: torch.dtype) -> float:
    """Values at MEAN, 1 apart, leave so much less to float32, which the sums are kept in."""
    return max(TOLERANCE[dtype], MEAN * 2.0**-23)


NORMS = [(2, 64, 4, (16, 16)), (1, 96, 32, (7, 9)), (3, 40, 4, (1, 1)), (1, 32, 32, (33, 40))]  # b, c, groups, (h, w)
PRODUCTS = [(70, 40, 48), (16, 16, 16), (1, 33, 20), (200, 64, 130)]  # m, k, n


def norm_error(b: int, c: int, groups: int, size: tuple[int, int], dtype: torch.dtype, device: Any = "cpu") -> float:
    """Of silu(group_norm(x)) to float64, far from zero, where a difference of squares would lose its digits."""
    from minidiffedit.kernels.norm import group_norm_silu

    generator = torch.Generator().manual_seed(c)
    x = (MEAN + torch.randn(b, c, *size, generator=generator)).to(device, dtype, memory_format=torch.channels_last)
    w, bias = (torch.randn(c, generator=generator).to(device, dtype) for _ in range(2))
    exact = F.silu(F.group_norm(x.double(), groups, w.double(), bias.double(), 1e-5))
    return relative(group_norm_silu(x, w, bias, groups, 1e-5), exact)


def geglu_error(m: int, k: int, n: int, dtype: torch.dtype, device: Any = "cpu") -> float:
    from minidiffedit.kernels.geglu import geglu

    generator = torch.Generator().manual_seed(m)
    shapes = (m, k), (2 * n, k), (2 * n,)
    x, w, bias = ((torch.randn(one, generator=generator)).to(device, dtype) for one in shapes)
    w /= k**0.5
    value, gate = F.linear(x.double(), w.double(), bias.double()).chunk(2, dim=-1)
    return relative(geglu(x, w, bias), value * F.gelu(gate))


# ---------------------------------------------------------------- the UNet, replayed


def replay(bench: Any) -> None:
    """Four calls of each way, with other latents, times and texts; the last is judged, the first must have stayed."""
    sizes = (bench.cells,) if bench.quick or bench.tiny else (bench.cells, 3 * bench.cells // 4)
    shapes = ((1, 1), (1, 2)) if bench.tiny else ((1, 1), (1, 2), (10, 2))  # latents, texts
    for dtype in types(bench):
        plain = bench.load(attention="sdpa", dtype=dtype)
        exact, wide = in_full(plain)
        for way in ("triton", "compiled sdpa", "compiled triton"):
            attention, compile = way.split()[-1], way.startswith("compiled")
            name = f"replay {name_of(dtype)} {way}"
            if attention == "triton" and compile and not bench.on_gpu:
                bench.say(name, cannot_run="an interpreted kernel cannot be compiled")
                continue
            try:
                fast = bench.load(attention=attention, compile=compile, dtype=dtype)
            except ValueError as reason:
                bench.say(name, cannot_run=str(reason))
                continue
            found = [judged_replay(plain, fast, exact, cells, *shape) for cells in sizes for shape in shapes]
            right = all(ours <= SLACK * theirs and same for ours, theirs, same in found)
            worst = max(found, key=lambda one: one[0] / one[1])
            shown = {"error": worst[0], "plain_error": worst[1], "first_stayed": all(one[2] for one in found)}
            bench.say(name, **shown, against=wide, cases=len(found), right=right)
            del fast
            bench.free()


def in_full(sd: StableDiffusion) -> tuple[Callable[..., Tensor], str]:
    """The plain UNet on the same rounded weights and inputs, in float64, or where that does not fit in float32; one
    latent at a time, in little memory.
    """
    with without_tf32():
        for wide in (torch.float64, torch.float32):
            try:
                net = copy.deepcopy(sd.unet).to(wide)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                continue
            break

    def exact(x: Tensor, t: int, texts: list[Tensor]) -> Tensor:
        text = torch.cat(texts).to(sd.dtype).to(wide)
        with without_tf32():
            each = [net(one.to(sd.dtype).to(wide), t, text, sdpa) for one in x.split(1)]  # (texts, 4, h, w) each
        return torch.cat([one[i : i + 1] for i in range(len(texts)) for one in each])

    return exact, name_of(wide)


def judged_replay(
    plain: StableDiffusion, fast: StableDiffusion, exact: Callable[..., Tensor], cells: int, latents: int, count: int
) -> tuple[float, float, bool]:
    """(error of the fourth call, the plain path's, whether the first call's result is what it was)."""
    generator, outs = torch.Generator().manual_seed(cells), list[Tensor]()
    for t in (981, 481, 241, 1):
        x = torch.randn(latents, 4, cells, cells, generator=generator).to(plain.device)
        texts = [plain.text([f"{prompt}, seen at {t}"]) for prompt in (SOURCE, TARGET)[:count]]
        outs.append(torch.cat(fast.eps(x, t, texts)))
        if len(outs) == 1:
            first = outs[0].clone()
    expected = exact(x, t, texts)
    errors = relative(outs[-1], expected), relative(torch.cat(plain.eps(x, t, texts)), expected)
    return *errors, torch.equal(outs[0], first)


# ---------------------------------------------------------------- whole edits


def edits(bench: Any) -> None:
    """Final latents and masks by each type and way, against float32 and eager; the miniature against a CPU."""
    photo, settings = picture(bench.size), {"steps": min(bench.steps, 10), "maps": bench.maps, "size": bench.size}

    def run(sd: StableDiffusion) -> Any:
        return edit(sd, photo, source=SOURCE, target=TARGET, seed=0, **settings)

    with without_tf32():
        truth = run(bench.load(attention="sdpa", dtype=torch.float32))
    bench.free()
    for dtype in types(bench):
        errors = {}
        for way in ("eager", "compiled"):
            done = run(bench.load(attention="sdpa", compile=way == "compiled", dtype=dtype))
            errors[way] = relative(done.latent, truth.latent)
            both, either = done.latent_mask * truth.latent_mask, (done.latent_mask + truth.latent_mask).clamp(max=1)
            iou = float(both.sum() / either.sum().clamp(min=1))
            right = errors[way] <= SLACK * errors["eager"] + 1e-3  # eager by itself: no NaN
            bench.say(f"edit {name_of(dtype)} {way}", error=errors[way], mask_iou=iou, right=right)
            bench.free()
    if bench.on_gpu and MINI.exists():
        mini(bench)


def mini(bench: Any) -> None:
    """The miniature's own edit on the device and on the CPU, in float32."""
    scene = MINI / "scenes" / "horse-zebra" / "source.png"
    texts = {"source": "a photo of a horse on a grass field", "target": "a photo of a zebra on a grass field"}
    with without_tf32():
        made = [
            edit(StableDiffusion.load(MINI, device=device, dtype="float32"), scene, seed=0, **texts)
            for device in (bench.device, "cpu")
        ]
    error = relative(made[0].latent.cpu(), made[1].latent)
    cells = int((made[0].latent_mask.cpu() != made[1].latent_mask).sum())
    bench.say("edit miniature", error=error, cells_that_differ=cells, right=error <= 1e-2 and cells <= 2)


# ---------------------------------------------------------------- the autoencoder


def vae_paths(bench: Any) -> None:
    z, image = bench.x[:1], torch.rand(1, 3, bench.size, bench.size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with without_tf32():
        full = bench.load(dtype=torch.float32)
        decoded, encoded = full.decode(z), full.encode(image)
    del full
    for dtype in types(bench):
        one_vae(bench, dtype, (z, decoded), (image, encoded))
        bench.free()
    overflow(bench)


def one_vae(bench: Any, dtype: torch.dtype, decoding: tuple[Tensor, Tensor], encoding: tuple[Tensor, Tensor]) -> None:
    """decoding, encoding: what goes in, and what comes out in float32."""
    (z, decoded), (image, encoded), plain = decoding, encoding, bench.load(dtype=dtype)
    scaled = (z / plain.scale).to(dtype)
    own = relative(plain.decode(z), decoded), relative(plain.encode(image), encoded)
    ways: dict[str, Callable[[], Tensor]] = {"by rows": lambda: decode_by_rows(plain.vae, scaled).float()}
    if not bench.tiny:
        compiled = bench.load(dtype=dtype, compile=True)
        ways |= {"compiled": lambda: compiled.decode(z), "compiled encode": lambda: compiled.encode(image)}
    for way, call in ways.items():
        call()  # a first call compiles
        encodes = way.endswith("encode")
        error = relative(call(), encoded if encodes else decoded)
        right = error <= SLACK * own[encodes]
        bench.say(f"vae {name_of(dtype)} {way}", error=error, plain_error=own[encodes], right=right)


def overflow(bench: Any) -> None:
    """A decoder whose result float16 cannot hold: decoded again, with a warning, equal to bfloat16's own."""
    sd, expected = (bench.load(dtype=dtype) for dtype in HALF)
    for one in (sd, expected):
        with torch.no_grad():
            one.vae.decoder.conv_out.weight.mul_(2.0**10)
            one.vae.decoder.conv_norm_out.weight.mul_(2.0**8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = sd.decode(bench.x[:1])
    error, told = relative(got, expected.decode(bench.x[:1])), any("bfloat16" in str(one.message) for one in said)
    bench.say("vae overflow", error=error, told=told, right=error <= 2e-2 and told)


# ---------------------------------------------------------------- the loops


def loops(bench: Any) -> None:
    waits(bench)
    recompiles(bench)
    second_device(bench)


def waits(bench: Any) -> None:
    """Times that the host waits in an edit, by torch's own debug mode, for few and for twice the steps."""
    if not bench.on_gpu:
        bench.say("waits", cannot_run="torch tells of waits for CUDA only; tests/test_waits.py asks on a CPU")
        return
    for compile in (False, True):
        sd, counts = bench.load(compile=compile), list[int]()
        for steps in (5, 5, 10):  # the first compiles
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    edit(sd, picture(bench.size), source=SOURCE, target=TARGET, size=bench.size, steps=steps, seed=0)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            counts.append(sum("synchronizing" in str(one.message) for one in said))
        right = counts[1] == counts[2]
        shown = {"at_5_steps": counts[1], "at_10_steps": counts[2]}
        bench.say(f"waits {'compiled' if compile else 'eager'}", **shown, right=right)


def recompiles(bench: Any) -> None:
    """Graphs that a second edit of the same size makes, with other texts, steps and strength."""
    sd = bench.load(attention="sdpa", compile=True)
    settings: dict[str, Any] = {"size": bench.size, "maps": 2, "seed": 0}
    edit(sd, picture(bench.size), source=SOURCE, target=TARGET, steps=3, **settings)
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    edit(sd, picture(bench.size), source="a cat", target="a dog", steps=5, strength=0.6, **settings)
    made = counters["unique_graphs"] - before
    bench.say("recompiles", value=made, right=made == 0)


def second_device(bench: Any) -> None:
    """The kernel and a call of the UNet on cuda:1; a batch under torchrun on every device."""
    if not bench.on_gpu or torch.cuda.device_count() < 2:
        bench.say("second device", cannot_run=f"{torch.cuda.device_count()} CUDA devices here")
        return
    one, two = (bench.load(device=torch.device("cuda", i), attention="triton") for i in (0, 1))
    got = []
    for sd in (one, two):  # the later load left cuda:1 as the current device
        texts = [sd.text([prompt]) for prompt in (SOURCE, TARGET)]
        got.append(torch.cat(sd.eps(bench.x[:1].to(sd.device), 481, texts)).cpu())
    error = relative(*got)
    bench.say("second device", error=error, right=error <= 1e-3)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(torch.cuda.device_count())]
    list_of = bench.folder / "list.csv"
    scenes = sorted((MINI / "scenes").glob("*/source.png"))[:4]
    list_of.write_text("image,target\n" + "".join(f"{scene},a zebra\n" for scene in scenes))
    command += ["-m", "minidiffedit", "batch", str(list_of), "--root", str(MINI), "--model", str(MINI), "--steps", "5"]
    done = subprocess.run([*command, "-o", str(bench.folder / "torchrun")], capture_output=True, text=True)
    bench.say("torchrun", ended=done.returncode, said=done.stderr[-200:], right=done.returncode == 0)
