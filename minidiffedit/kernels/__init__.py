"""GPU kernels in Triton, each beside its plain-torch twin. Importing this package does not import Triton.

Some neighbours are no kernels, but know nothing of the package either: `once.py` keeps what calls of the model have in
common, `together.py` makes one call of several runs' calls, `alone.py` lets runs on one model take turns,
`compilers.py` and `openvino.py` compile networks.

Nothing here falls back: a call that cannot run raises and says why. Who wants torch's attention in its place asks for
it; the choice is made in attention.py.
"""

import os
import shutil
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..attention import Site

OLDEST = (3, 6)  # of Triton, that the tests run; 2.2 fails at these kernels
WIDEST = 160  # numbers per head, SD v1's widest; the keys and values of wider ones would not fit on the chip together
# (compute capability, kind, d) where the kernel was faster on that GPU than every SDPA of torch, so that "auto" takes
# it. Nothing has been measured yet; the command is tests/bench/gpu.py, figure G5.
FASTER: frozenset[tuple[tuple[int, int], str, int]] = frozenset()
# By the number of a GPU its compute capability, (9, 0) of a Hopper: asked when a model is loaded, as a graph that is
# being compiled cannot ask.
CAPABILITY: dict[int | None, tuple[int, int]] = {}


def unfit(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run there, None if they can."""
    # For tests: NumPy runs the kernels, and has no bfloat16. A GPU in float32 would round to tf32 or go without its
    # matrix units; SDPA does better there.
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    dtypes = (torch.float32, torch.float16) if interpreted else (torch.float16, torch.bfloat16)
    if find_spec("triton") is None:
        return "the package triton is missing (torch's CUDA builds for Linux bring it)"
    if old := outdated():
        return f"it needs triton {OLDEST[0]}.{OLDEST[1]} or newer, got {old}, which came with torch; update torch"
    if device.type != "cuda" and not interpreted:
        return f"it needs a CUDA device, got {device}"
    if device.type == "cuda":
        CAPABILITY[device.index] = torch.cuda.get_device_capability(device)
        if CAPABILITY[device.index] < (8, 0):
            return "it needs a GPU of compute capability 8.0 or newer"
        if lacking := lacking_compiler():
            return f"it needs {lacking}, which is not installed"
    if dtype not in dtypes:
        return f"it needs {' or '.join(name(x) for x in dtypes)}, got {name(dtype)}"
    return None


def lacking_compiler(language: str = "C") -> str | None:
    """What is missing of what Triton, and torch.compile with it, build their launchers with; language: C or C++, which
    torch.compile needs on a CPU.
    """
    variable, usual = {"C": ("CC", ["gcc", "clang", "cc"]), "C++": ("CXX", ["g++", "clang++"])}[language]
    own = os.environ.get(variable)
    if not any(shutil.which(one) for one in ([own] if own else usual)):
        return f"{own!r} (from {variable})" if own else f"a {language} compiler ({usual[0]})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h (Debian: python3-dev)"
    return None


def outdated() -> str:
    """The version of a Triton older than that; of a nightly's, which has another name, nothing is known."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return ""
    return found if tuple(map(int, found.split(".")[:2])) < OLDEST else ""


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refusal(site: "Site", q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why this call cannot run, None if it can."""
    if site.kind == "causal":
        return "it has no causal mask"
    if q.shape[-1] > WIDEST:
        return f"it takes heads of at most {WIDEST} numbers, got {q.shape[-1]}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it has no gradient"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must have one dtype, got {name(q.dtype)}, {name(k.dtype)} and {name(v.dtype)}"
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return None  # the rest was asked when the model was loaded; a compiled graph must not read the environment
    return unfit(q.device, q.dtype)


def capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) where no model was loaded to a GPU of this number."""
    return CAPABILITY.get(device.index, (0, 0))


def preferred(site: "Site", q: Tensor, k: Tensor, v: Tensor) -> bool:
    known = bool(FASTER) and (capability(q.device), site.kind, q.shape[-1]) in FASTER
    return known and refusal(site, q, k, v) is None


def attend(site: "Site", q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: q (b, heads, n, d), k and v (b, heads, m, d), any strides, d <= 160, all float16 or
    bfloat16 on a GPU -> (b, heads, n, d), a view of (b, n, heads, d). Raises ValueError where it cannot run.
    """
    reason = refusal(site, q, k, v)
    if reason:
        raise ValueError(f"attention 'triton' cannot run: {reason}; use 'auto' or 'sdpa'")
    from .attention import attention

    return attention(q, k, v)
