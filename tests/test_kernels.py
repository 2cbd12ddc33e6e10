"""The attention kernels without a GPU: NumPy runs them in a process of their own, and the compiler shows its code.

Triton decides on import whether kernels are compiled or interpreted, so the interpreter lives in a child process. It
knows float32 and float16; what a GPU does in bfloat16 is for tests/bench/gpu.py.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from attention_cases import SIZES, TOLERANCE, draw, kernel_errors, reference, relative
from gpu_checks import NORMS, PRODUCTS, geglu_error, norm_error, norm_limit

from minidiffedit import StableDiffusion, kernels
from minidiffedit.attention import Site, auto, backend, sdpa
from minidiffedit.kernels import attend as triton_attend
from minidiffedit.unet import Attention, UNet, UNetConfig

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is made for Linux only"),
    pytest.mark.skipif(bool(kernels.outdated()), reason="the kernels refuse a Triton this old"),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SELF, CROSS, CAUSAL = Site("down", 0, 0, "self"), Site("down", 0, 0, "cross"), Site("clip", 0, 0, "causal")


def set_up():
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def interpreter():
    """Calls a function in the process where kernels are interpreted."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), set_up) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


# The arithmetic


def test_sides_are_covered_by_two_powers_of_two():
    from minidiffedit.kernels.attention import split

    assert [split(n) for n in (40, 64, 77, 128)] == [(32, 16), (64, 0), (64, 16), (128, 0)]
    for n in range(1, 129):
        head, tail = split(n)
        assert n <= head + tail < 2 * max(n, 16) and all(side & (side - 1) == 0 for side in (head, tail))
        assert head >= 16 and (tail == 0 or tail >= 16)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n, m", [*SIZES, (4096, 4096)])
def test_twin_against_float64(n, m, dtype):
    from minidiffedit.kernels.attention import twin

    q, k, v = draw(1, n, m, 1, 40, dtype)
    ours = twin(q, k, v)
    assert ours.dtype == dtype and relative(ours, reference(q, k, v)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("d", [40, 80, 160, 24, 64, 8])
def test_kernel_against_float64_and_twin(interpreter, d, dtype):
    """In a field of NaN: one number read or written beyond the end would show."""
    for error, distance in interpreter(kernel_errors, SIZES, 1, 1, d, dtype):
        assert error <= TOLERANCE[dtype] and distance <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["longer"])
def test_variants_are_the_same_attention(interpreter, name):
    """Of d = 40, over more keys than one tile holds."""
    from minidiffedit.kernels.attention import VARIANTS

    for error, distance in interpreter(
        kernel_errors, [(130, 192), (40, 129)], 1, 1, 40, torch.float16, 2.0, "cpu", VARIANTS[name]
    ):
        assert error <= TOLERANCE[torch.float16] and distance <= TOLERANCE[torch.float16]


def test_settings_by_gpu():
    """A multiprocessor that holds fewer warps has smaller programs, so that several fit."""
    from minidiffedit.kernels.attention import settings

    for gpu in SHARED:
        small = gpu in ((8, 6), (8, 9), (12, 0))
        found = settings(40, 4096, gpu)
        assert (found["BLOCK_Q"], found["num_warps"]) == ((64, 4) if small else (128, 8))
        assert settings(160, 256, gpu)["BLOCK_K"] == (32 if small else 64) and settings(40, 77, gpu) == settings(40, 77)
        assert settings(160, 77, gpu)["BLOCK_Q"] == (64 if gpu in ((9, 0), (10, 0)) else 32)


def test_a_row_is_one_tile():
    """Two tiles of unequal width along d came out wrong on an H200 (Triton 3.6) outside a pipelined loop."""
    from minidiffedit.kernels.attention import settings

    assert {d: settings(d, n)["D"] for d in (8, 40, 64, 80, 160) for n in (77, 4096)} == {
        8: 16, 40: 64, 64: 64, 80: 128, 160: 256,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", NORMS)
def test_norm_and_silu_against_float64(interpreter, case, dtype):
    assert interpreter(norm_error, *case, dtype) <= norm_limit(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", PRODUCTS)
def test_geglu_against_float64(interpreter, case, dtype):
    assert interpreter(geglu_error, *case, dtype) <= TOLERANCE[dtype]


def layers():
    """(kernels, their twins, torch in float64) of GroupNorm with SiLU and of GEGLU, and whether NaN stayed outside."""
    from minidiffedit.kernels import geglu, norm

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 5, 7, generator=generator).to(memory_format=torch.channels_last)
    w, b = torch.randn(2, 24, generator=generator)
    rows, weight, bias = (torch.randn(shape, generator=generator) for shape in ((33, 24), (40, 24), (40,)))
    value, gate = F.linear(rows.double(), weight.double(), bias.double()).chunk(2, dim=-1)
    found = [
        (norm.group_norm_silu(x, w, b, 4, 1e-5), norm.twin(x, w, b, 4, 1e-5),
         F.silu(F.group_norm(x.double(), 4, w.double(), b.double(), 1e-5))),
        (geglu.geglu(rows, weight, bias), geglu.twin(rows, weight, bias), value * F.gelu(gate)),
    ]  # fmt: skip
    return [(relative(one, exact), relative(twin, exact), one.stride() == twin.stride()) for one, twin, exact in found]


def test_twins_of_the_layers(interpreter):
    for ours, twin, same_layout in interpreter(layers):
        assert ours <= 1e-6 and twin <= 1e-6 and same_layout


def refused():
    from minidiffedit.kernels import geglu, norm

    said = []
    for call in (
        lambda: norm.group_norm_silu(torch.ones(1, 8, 4, 4), torch.ones(8), torch.ones(8), 4, 1e-5),
        lambda: geglu.geglu(torch.ones(4, 8), torch.ones(12, 9), torch.ones(12)),
    ):
        with pytest.raises(ValueError) as found:
            call()
        said.append(str(found.value))
    return said


def test_layers_that_do_not_fit_are_refused(interpreter):
    layout, shapes = interpreter(refused)
    assert "channels last" in layout and "(12, 9)" in shapes


def test_kernel_tells_batch_and_heads_apart(interpreter):
    for error, _ in interpreter(kernel_errors, [(33, 77), (40, 200)], 2, 3, 40, torch.float32):
        assert error <= TOLERANCE[torch.float32]


def test_scores_beyond_the_exponential(interpreter):
    """Scores of thousands, of which only differences are bounded: the maximum is taken off, also a later block's."""
    for error, _ in interpreter(kernel_errors, [(33, 77), (40, 200)], 1, 1, 40, torch.float32, 50.0):
        assert error <= 1e-5


def attend_strided(name):
    generator = torch.Generator().manual_seed(0)
    if name == "fused":  # one projection for q, k and v
        q, k, v = torch.randn(2, 70, 3, 2, 40, generator=generator).transpose(1, 3).unbind(2)
    elif name == "expanded":  # one text for two latents
        q = torch.randn(2, 2, 70, 40, generator=generator)
        k, v = torch.randn(2, 1, 2, 77, 40, generator=generator).expand(2, 2, 2, 77, 40)
    else:  # the last stride is not 1
        q, k, v = torch.randn(3, 2, 2, 40, 70, generator=generator).mT
    with mock.patch("torch.empty", lambda *size, **options: torch.full(*size, torch.nan, **options)):
        out = triton_attend(CROSS, q, k, v)
    return relative(out, reference(q, k, v)), out.shape == q.shape, out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("name", ["fused", "expanded", "transposed"])
def test_any_strides_and_an_output_that_joins_without_a_copy(interpreter, name):
    error, same_shape, joins = interpreter(attend_strided, name)
    assert error <= 1e-6 and same_shape and joins


# Where it runs: where it was asked for, or nowhere

# The heads have SD's own 40, 80 and 160 numbers.
SMALL = UNetConfig(
    block_out_channels=(40, 80, 160, 160), layers_per_block=1, cross_attention_dim=24, attention_head_dim=1,
    norm_num_groups=4,
)  # fmt: skip


def whole_unet(dtype):
    """Error of a UNet call with the kernels to one with SDPA in float32, kernel launches, attention layers."""
    from minidiffedit.kernels import attention

    torch.manual_seed(0)
    unet = UNet(SMALL).eval().requires_grad_(False)
    for name, p in unet.named_parameters():
        p.data = torch.randn(p.shape) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5) + (
            "norm" in name and p.ndim == 1
        )
    x, text = torch.randn(1, 4, 16, 12), torch.randn(2, 77, 24)
    plain = unet(x, 500, text, sdpa)
    attend = backend("triton", CPU, dtype)
    with (
        mock.patch.object(F, "scaled_dot_product_attention", side_effect=AssertionError("fell back to SDPA")),
        mock.patch.object(attention, "twin", side_effect=AssertionError("fell back to the twin")),
        mock.patch.object(attention, "launch", wraps=attention.launch) as launches,
    ):
        ours = unet.to(dtype)(x.to(dtype), 500, text.to(dtype), attend)
    sites = sum(isinstance(module, Attention) for module in unet.modules())
    return relative(ours, plain), relative(unet(x.to(dtype), 500, text.to(dtype)), plain), launches.call_count, sites


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_whole_unet_runs_on_the_kernels_alone(interpreter, dtype):
    error, error_of_sdpa, launches, sites = interpreter(whole_unet, dtype)
    assert launches == sites == 20
    assert error <= (1e-5 if dtype == torch.float32 else 1.5 * error_of_sdpa)


def loaded(folder):
    sd = StableDiffusion.load(folder, device="cpu", dtype="float32", attention="triton")
    with mock.patch.object(F, "scaled_dot_product_attention", side_effect=AssertionError("fell back to SDPA")):
        ours = sd.eps(torch.ones(1, 4, 4, 4), 500, [torch.ones(1, 77, 24)])[0]
    return relative(
        ours, StableDiffusion.load(folder, device="cpu").eps(torch.ones(1, 4, 4, 4), 500, [torch.ones(1, 77, 24)])[0]
    )


def test_a_loaded_model_runs_on_the_kernels(interpreter, folder):
    assert interpreter(loaded, folder) <= 1e-5


def test_a_loaded_model_refuses_where_they_cannot_run(folder):
    with pytest.raises(ValueError, match="attention 'triton' cannot run: it needs a CUDA device, got cpu"):
        StableDiffusion.load(folder, device="cpu", attention="triton")
    with pytest.raises(ValueError, match="attention must be one of auto, sdpa, triton, got 'flash'"):
        StableDiffusion.load(folder, device="cpu", attention="flash")


def test_backends_by_name(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels, "CAPABILITY", {})
    assert backend("sdpa", CPU, torch.float32) is backend("auto", CPU, torch.float32) is sdpa
    for name in ("triton", "flash"):
        with pytest.raises(ValueError, match=name):
            backend(name, CPU, torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend("triton", CUDA, torch.bfloat16) is triton_attend
    assert backend("auto", CUDA, torch.float16) is auto
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match="it needs float16 or bfloat16, got float"):
            backend("triton", CUDA, dtype)
        assert backend("auto", CUDA, dtype) is sdpa
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "version", lambda name: "2.2.0")
        with pytest.raises(ValueError, match=r"it needs triton 3\.6 or newer, got 2\.2\.0"):
            backend("triton", CUDA, torch.float16)
        assert backend("auto", CUDA, torch.float16) is sdpa
    with monkeypatch.context() as patch:
        patch.setenv("CC", "no-such-compiler")
        with pytest.raises(ValueError, match=r"it needs 'no-such-compiler' \(from CC\), which is not installed"):
            backend("triton", CUDA, torch.float16)
        patch.delenv("CC")
        patch.setattr(kernels.sysconfig, "get_path", lambda name: "/nowhere")
        with pytest.raises(ValueError, match=r"it needs Python\.h .*, which is not installed"):
            backend("triton", CUDA, torch.float16)
        assert backend("auto", CUDA, torch.float16) is sdpa
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match="compute capability"):
        backend("triton", CUDA, torch.float16)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="package triton is missing"):
        backend("triton", CUDA, torch.float16)
    assert backend("auto", CUDA, torch.float16) is sdpa


@pytest.mark.parametrize(
    "site, d, dtype, gradient, reason",
    [
        (CAUSAL, 40, torch.float16, False, "no causal mask"),
        (SELF, 161, torch.float16, False, "at most 160 numbers, got 161"),
        (SELF, 40, torch.float16, True, "no gradient"),
        (SELF, 40, torch.float16, False, "CUDA device, got cpu"),
    ],
)
def test_a_call_that_cannot_run_says_why(monkeypatch, site, d, dtype, gradient, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.zeros(1, 2, 8, d, dtype=dtype, requires_grad=gradient)
    with pytest.raises(ValueError, match=f"attention 'triton' cannot run: .*{reason}.*; use 'auto' or 'sdpa'"):
        triton_attend(site, q, q, q)


def test_a_call_on_a_gpu_asks_nothing_of_the_machine(monkeypatch):
    """Or torch.compile would have to trace through the environment and the file system."""
    monkeypatch.setattr(kernels, "unfit", mock.Mock(side_effect=AssertionError("asked")))
    q = mock.Mock(is_cuda=True, dtype=torch.bfloat16, shape=(1, 2, 8, 40), requires_grad=False)
    assert kernels.refusal(SELF, q, q, q) is None


def test_mixed_dtypes_are_refused():
    q = torch.zeros(1, 2, 8, 40)
    with pytest.raises(ValueError, match="one dtype, got float32, float16 and float32"):
        triton_attend(SELF, q, q.half(), q)


@pytest.mark.parametrize("wrong", [(2, 2, 77, 40), (1, 1, 77, 40), (1, 2, 77, 48), (1, 2, 76, 40)])
def test_shapes_that_do_not_fit_are_not_read(wrong):
    """A kernel would read on beyond the end."""
    from minidiffedit.kernels.attention import attention

    q, k = torch.zeros(1, 2, 8, 40), torch.zeros(1, 2, 77, 40)
    with pytest.raises(AssertionError, match="fit no"):
        attention(q, k, torch.zeros(wrong))


def what_auto_takes():
    """Launches per call of auto when the kernel is preferred for self-attention over heads of 40."""
    from minidiffedit.kernels import attention

    counts = []
    with (
        mock.patch.object(kernels, "FASTER", frozenset({((0, 0), "self", 40)})),
        mock.patch.object(attention, "launch", wraps=attention.launch) as launches,
    ):
        for site, d, options in [
            (SELF, 40, {}), (CROSS, 40, {}), (SELF, 80, {}), (SELF, 40, {"requires_grad": True}),
            (SELF, 40, {"dtype": torch.float64}), (SELF, 40, {"dtype": torch.bfloat16}),
        ]:  # fmt: skip
            launches.reset_mock()
            q = torch.ones(1, 1, 8, d, **options)
            assert relative(auto(site, q, q, q).detach(), q.detach()) < 1e-6
            counts.append(launches.call_count)
    return counts


def test_auto_takes_the_kernel_only_where_it_was_faster_and_can_run(interpreter):
    assert not kernels.FASTER, "nothing has been measured; if it has been now, say so here"
    assert interpreter(what_auto_takes) == [1, 0, 0, 0, 0, 0]


def test_compiled_models_hold_the_kernel_in_one_graph(monkeypatch):
    """torch.compile traces through the choice to the kernel without a break; on a GPU it would launch it."""
    import torch.utils._triton

    graphs = []

    def take(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return lambda *tensors: tensors

    monkeypatch.setattr(kernels, "unfit", lambda device, dtype: None)  # as on a GPU
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    torch._dynamo.reset()
    q = torch.ones(1, 200, 2, 40).transpose(1, 2)
    monkeypatch.setattr(kernels, "FASTER", frozenset({((9, 0), "self", 40)}))
    monkeypatch.setattr(kernels, "CAPABILITY", {q.device.index: (9, 0)})
    torch.compile(lambda q: auto(SELF, q, q, q), fullgraph=True, backend=take)(q)
    torch._dynamo.reset()
    (graph,) = graphs
    assert sum("triton_kernel_wrapper" in node for node in graph) == 1, graph


@pytest.mark.slow
@pytest.mark.long
def test_the_script_for_a_gpu_runs_anywhere_in_small(tmp_path):
    """Every figure of tests/bench/gpu.py by the code a GPU would run, the kernels interpreted; not one is left out.

    Right or wrong is judged; the times of a tiny model mean nothing.
    """
    script, file = Path(__file__).parent / "bench" / "gpu.py", tmp_path / "gpu.json"
    options = ["--tiny", "--tune", "--device", "cpu", "--one-process", "--json", file]
    done = subprocess.run(
        [sys.executable, script, *options], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    types = "kernel float16, kernel float32, norm float16, norm float32, geglu float16, geglu float32"
    ways = ("longer",)
    variants = {f"kernel {dtype} {name}" for dtype in ("float16", "float32") for name in ways}
    right = {*types.split(", "), *variants, "replay float16 triton", "replay float16 compiled sdpa", "recompiles"}
    right |= {"edit float16 eager", "edit float16 compiled", "vae float16 by rows", "vae overflow"}
    timed = (
        "ceiling, copy, G5 self 16, G5 self 16 tuned, G5 cross 16, G5 cross 16 tuned, G1 both eager, G1, G2, G3 b2, "
        "G3 b20, G3 first calls, G4 ours, G4 defaults, G4 schedule, G6, G7, G8, K1 4 x 4 x 32, K2 32 x 16, "
        "M2 over weights, M2 maps, M3, compile cold, compile warm, compile breaks even, busy mask, busy encode, "
        "busy decode, busy vae encode, busy vae decode, profile eager, profile compiled"
    )
    cannot = {"kernel bfloat16", "replay float16 compiled triton", "waits", "second device"}
    assert set(found) == {"machine", "preflight", *right, *timed.split(", "), *cannot}
    assert {name for name, row in found.items() if "cannot_run" in row} == cannot
    assert not any("unmeasured" in row for row in found.values())
    assert {name for name, row in found.items() if row.get("right")} == right
    assert found["G1 both eager"]["error_between"] < 2e-2 and found["G2"]["error_between"] < 2e-2  # the same networks


def test_a_figure_that_fails_is_recorded_and_costs_no_other(tmp_path):
    """What a figure raises, and a process that dies of one: both are findings, the next is made, the exit code is 1."""
    sys.path.insert(0, str(Path(__file__).parent / "bench"))
    import gpu

    def raises(bench):
        raise RuntimeError("no kernel image\nfor this device")

    figures = {"first": raises, "second": lambda bench: bench.say("second", value=1.0)}
    for own in (["--one-process"], []):
        file = tmp_path / f"{len(own)}.json"
        with (
            mock.patch.dict(gpu.FIGURES, figures, clear=True),
            mock.patch.object(gpu.subprocess, "run", side_effect=ended_badly),
        ):
            assert gpu.main(["--tiny", "--device", "cpu", "--only", "first", "second", *own, "--json", str(file)]) == 1
        found = json.loads(file.read_text())
        assert found["second"] == {"value": 1.0} if own else found["second failed"]["error"].endswith("more than 900 s")
        assert found["first failed"]["error"] == (
            "RuntimeError: no kernel image" if own else "its process ended with -11"
        )


def ended_badly(command, timeout):
    """A process that was killed by a fault, and one that hangs."""
    if command[-5] == "second" or "second" in command[-4:]:
        raise subprocess.TimeoutExpired(command, timeout)
    return subprocess.CompletedProcess(command, -11)


# The code for a GPU


HOPPER = (9, 0)
SHARED = {(8, 0): 163, (8, 6): 99, (8, 9): 99, HOPPER: 227, (10, 0): 227, (12, 0): 99}  # KiB a program may have, by GPU


def built(kernel, constants, pointers, capability=HOPPER):
    """What a kernel becomes for a GPU; pointers: by argument the type, "*fp16", of what is no constant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else pointers[name] for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    return triton.compile(source, target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32), options=options)


POINTER = {torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def compiled(n, m, d, dtype, heads=8, capability=HOPPER, other=None):
    """The attention kernel's code; other: settings in place of the shipped ones."""
    from minidiffedit.kernels.attention import plan

    views = [torch.empty(2, rows, heads, d, dtype=dtype, device="meta").transpose(1, 2) for rows in (n, m, m, n)]
    kernel, constants = plan(*views, capability)
    return built(kernel, constants | (other or {}), dict.fromkeys(("q", "k", "v", "out"), POINTER[dtype]), capability)


def resources(code, folder):
    import triton

    (folder / "kernel.cubin").write_bytes(code.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", folder / "kernel.cubin"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(re.search(rf"\b{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL")}


SHIPPED = [  # (queries, keys, d) of SD v1 at 512 x 512 and 768 x 768, of the miniature at 128 x 128, and an odd size
    (4096, 4096, 40), (4096, 77, 40), (1024, 1024, 80), (1024, 77, 80), (256, 256, 160), (256, 77, 160), (64, 64, 160),
    (64, 77, 160), (9216, 9216, 40), (2304, 2304, 80), (576, 576, 160), (144, 144, 160), (144, 77, 160),
    (256, 256, 24), (256, 77, 24), (64, 64, 40), (64, 77, 40), (16, 16, 48), (16, 77, 48), (3000, 3000, 40),
    (750, 750, 80), (192, 192, 160),
]  # fmt: skip


def check_fits(code, folder, capability=HOPPER):
    """For 10.0 cuobjdump may tell of 8 bytes of stack where `ptxas -v` tells of no frame and no spill."""
    used = resources(code, folder)
    assert used["LOCAL"] == 0 and used["STACK"] <= 8 * (capability == (10, 0)), f"spills: {used}"
    assert code.metadata.shared <= SHARED[capability] * 1024, code.metadata.shared


def check_code(n, m, d, dtype, folder):
    code = compiled(n, m, d, dtype)
    check_fits(code, folder)
    assert "wgmma.mma_async" in code.asm["ptx"], "the products do not run on Hopper's own matrix instructions"
    if m > 128:
        assert "cp.async" in code.asm["ptx"], "the loads of keys and values do not overlap the arithmetic"


@pytest.mark.parametrize("n, m, d", [(4096, 4096, 40), (256, 77, 160)])
def test_compiles_for_hopper_without_spills(tmp_path, monkeypatch, n, m, d):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check_code(n, m, d, torch.bfloat16, tmp_path)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("n, m, d", [SHIPPED[i] for i in (0, 1, 2, 4, 5)])
def test_sd_sizes_compile_for_every_gpu_without_spills(tmp_path, monkeypatch, n, m, d, capability):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check_fits(compiled(n, m, d, torch.float16, capability=capability), tmp_path, capability)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ["longer"])
@pytest.mark.parametrize("capability", SHARED)
def test_variants_compile_without_spills(tmp_path, monkeypatch, capability, name):
    from minidiffedit.kernels.attention import VARIANTS

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check_fits(compiled(4096, 4096, 40, torch.float16, 8, capability, VARIANTS[name]), tmp_path, capability)


def norms(n, c, pointer):
    """(kernel, constants, pointers) of both launches."""
    from minidiffedit.kernels.norm import apply, moments, settings

    constants = {"n": n, "c": c, "groups": 32} | settings(n, c // 32)
    pieces = -(-n // constants["ROWS"])
    more = {"eps": 1e-5, "pieces": pieces, "PIECES": 1 << (pieces - 1).bit_length()}
    found = dict.fromkeys(("mean", "square"), "*fp32")
    yield moments, constants, {"x": pointer} | found
    yield apply, constants | more, dict.fromkeys(("x", "weight", "bias", "out"), pointer) | found


def products(m, k, pointer, capability):
    from minidiffedit.kernels.attention import SMALL
    from minidiffedit.kernels.geglu import product, settings

    constants = {"m": m, "n": 4 * k, "k": k} | settings(m, capability in SMALL)
    yield product, constants, dict.fromkeys(("x", "weight", "bias", "out"), pointer)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("dtype", POINTER)
@pytest.mark.parametrize("capability", SHARED)
def test_layers_compile_without_spills(tmp_path, monkeypatch, capability, dtype):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointer = POINTER[dtype]
    made = [one for n, c in ((4096, 320), (4096, 960), (64, 2560)) for one in norms(n, c, pointer)]
    made += [one for m, k in ((8192, 320), (128, 1280)) for one in products(m, k, pointer, capability)]
    for kernel, constants, pointers in made:
        check_fits(built(kernel, constants, pointers, capability), tmp_path, capability)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.long), torch.bfloat16])
@pytest.mark.parametrize(
    "n, m, d", [*SHIPPED[:6], *(pytest.param(*one, marks=pytest.mark.long) for one in SHIPPED[6:])]
)
def test_every_shipped_size_compiles_for_hopper_without_spills(tmp_path, monkeypatch, n, m, d, dtype):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    check_code(n, m, d, dtype, tmp_path)
