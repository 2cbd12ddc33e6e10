"""Networks compiled, by torch or by OpenVINO: which of them can run, and how they are asked."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from . import lacking_compiler, openvino

# What `compile` may be, and torch's name of what builds the code; "" for nothing.
COMPILERS = {False: "", True: "inductor", "torch": "inductor", "openvino": "openvino"}


def choose_compiler(compile: bool | str, device: torch.device, dtype: torch.dtype, low_memory: bool) -> str:
    """Of COMPILERS. ValueError for options that exclude each other, and where nothing could be built."""
    if compile not in [*COMPILERS]:
        raise ValueError(f"compile must be False, True, 'torch' or 'openvino', got {compile!r}")
    if not compile:
        return ""
    if low_memory:
        raise ValueError("compile and low_memory exclude each other: what is compiled stays in memory")
    on_gpu = device.type == "cuda"
    if compile == "openvino":
        lacking = openvino.lacking(device, dtype)
    elif on_gpu and find_spec("triton") is None:
        lacking = "the package triton"
    else:
        lacking = lacking_compiler("C" if on_gpu else "C++")
    if lacking:
        raise ValueError(f"compile needs {lacking}; without it, load the model without compile")
    return COMPILERS[compile]


def compiled(
    network: nn.Module, function: Callable[..., Any], backend: str, mode: str | None = None
) -> Callable[..., Any]:
    """function, of the network, by torch.compile or OpenVINO, channels last. Both keep what they made in one folder."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if backend == "openvino":
        return openvino.Converted(network, function, os.environ.get("TORCHINDUCTOR_CACHE_DIR"))
    # Every size of picture is a graph of its own; beyond torch's limit of 8 the next one would be refused.
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    setattr(torch._dynamo.config, limit, max(64, getattr(torch._dynamo.config, limit)))
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode, backend=backend)
