"""A network by OpenVINO on a CPU: traced and converted once for each shape, and compiled at each start.

What is kept between runs is the converted network in OpenVINO's own files, .xml and .bin, two bytes a weight where they
are bfloat16, else four. `torch.compile(backend="openvino")` is not used: what fails in it goes back to torch in
silence, and what it keeps is named by the graph, not by the weights. Nor is `openvino.convert_model`, which reports its
use over the internet unless told not to.
"""

import inspect
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}  # by the weights' dtype, what OpenVINO computes in
MOST = 20 * 2**30  # bytes of converted networks that are kept; those of SD v1's UNet are 1.7e9 in bfloat16, for a shape
HELD = 6.5  # bytes of memory for each weight and shape, measured with SD v1's UNet in bfloat16; float32 takes no less
GRAPH = "network.xml"  # beside it the weights, network.bin


def lacking(device: torch.device, dtype: torch.dtype) -> str | None:
    """What OpenVINO needs and has not got here, None if it can run."""
    if device.type != "cpu":
        return f"the CPU for OpenVINO, got {device}"
    if dtype not in HINTS:
        return f"float32 or bfloat16 for OpenVINO, got {str(dtype).removeprefix('torch.')}"
    if find_spec("openvino") is None:
        return 'the package openvino (pip install "minidiffedit[openvino]", in a clone ".[openvino]")'
    return None


class Converted:
    """function(*tensors), of a network, by OpenVINO, without gradients; what else is given, its attention, is not read.

    Takes float32 or bfloat16 weights on the CPU, as they are at the first call of a shape: later changes are not seen.
    folder: where conversions are kept for later runs, None for nowhere. Meanwhile the weights are float32, twice the
    memory of bfloat16; afterwards OpenVINO holds its own copy of them for each shape. Raises ValueError where a
    gradient is asked for, RuntimeError for what OpenVINO cannot convert or compile, and where memory is short.
    """

    def __init__(self, network: nn.Module, function: Callable[..., Any], folder: str | Path | None = None):
        self.network, self.function = network, function
        self.dtype = next(network.parameters()).dtype
        self.folder = Path(folder, "openvino") if folder else None
        self.compiled: dict[tuple[torch.Size, ...], Any] = {}

    def __call__(self, *given: Any) -> Any:
        tensors = [one for one in given if isinstance(one, Tensor)]
        if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
            raise ValueError("a network by OpenVINO has no gradient; load the model without compile")
        asked = [one.detach().float() if one.is_floating_point() else one for one in tensors]
        shapes = tuple(one.shape for one in asked)
        if shapes not in self.compiled:
            self.compiled[shapes] = self.compile(asked)
        answers = self.compiled[shapes]([one.contiguous().numpy() for one in asked]).values()  # arrays of their own
        made = tuple(torch.from_numpy(one).to(self.dtype) for one in answers)
        return made if len(made) > 1 else made[0]

    def compile(self, given: Sequence[Tensor]) -> Any:
        import openvino

        wanted, free = HELD * sum(one.numel() for one in self.network.parameters()) / 2**30, free_memory()
        if wanted > free:  # else the system kills the process, without a word
            raise RuntimeError(f"OpenVINO holds some {wanted:.1f} GiB for each shape, {free:.1f} GiB are free")
        how: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": HINTS[self.dtype], "PERFORMANCE_HINT": "LATENCY"}
        how["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        core, kept = openvino.Core(), self.folder and self.folder / self.key(given)
        if kept and os.path.isdir(kept):
            try:
                os.utime(kept)  # what was used longest ago goes first
                return core.compile_model(kept / GRAPH, "CPU", how)
            except (OSError, RuntimeError) as error:
                warnings.warn(f"{kept} cannot be read, it is made anew: {str(error).splitlines()[0]}", stacklevel=4)
                shutil.rmtree(kept, ignore_errors=True)
        self.network.float()
        try:
            model = self.convert(given)
            if not (kept and self.keep(model, kept)):
                return core.compile_model(model, "CPU", how)
            del model  # and its float32 weights with it, before it is compiled
        finally:
            self.network.to(self.dtype)
        return core.compile_model(kept / GRAPH, "CPU", how)

    def key(self, given: Sequence[Tensor]) -> str:
        """By all that a conversion depends on: the weights themselves, the network's numbers and code, the shapes."""
        import openvino

        shapes, versions = [one.shape for one in given], (openvino.__version__, torch.__version__)
        numbers = getattr(self.network, "config", None)
        made = sha256(repr((self.function.__name__, self.dtype, shapes, versions, numbers)).encode())
        for path in sorted(Path(inspect.getfile(type(self.network))).parent.glob("*.py")):
            made.update(path.read_bytes())
        for name, weight in self.network.state_dict().items():
            made.update(name.encode())
            made.update(weight.reshape(-1).view(torch.uint8).numpy())
        return made.hexdigest()[:32]

    def convert(self, given: Sequence[Tensor]) -> Any:
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # sides become numbers of the graph: it is for this shape alone
            traced = torch.jit.trace(Asked(self.network, self.function), tuple(given), strict=False, check_trace=False)
            decoder = TorchScriptPythonDecoder(traced)  # held until it is converted: OpenVINO does not hold it
            frontend = FrontEndManager().load_by_framework("pytorch")
            try:
                model = frontend.convert(frontend.load(decoder))
            except Exception as error:  # its own kinds are no RuntimeErrors
                raise RuntimeError(f"OpenVINO cannot convert the network: {error}") from error
        model.reshape({number: [*one.shape] for number, one in enumerate(given)})
        return model

    def keep(self, model: Any, kept: Path) -> bool:
        """Whether it is in the folder now; where it cannot be, a warning says why."""
        import openvino

        weights = [*self.network.parameters()]
        # bfloat16 as float16, which holds a weight up to 65504 to within 3e-8, mostly exactly
        half = self.dtype == torch.bfloat16 and all(bool((one.abs() <= 65504).all()) for one in weights)
        wanted = sum(one.numel() for one in weights) * (2 if half else 4)
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            make_room(kept.parent, wanted)
            with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
                openvino.save_model(model, Path(folder, GRAPH), compress_to_fp16=half)
                if not os.path.isdir(kept):  # by another process
                    os.rename(folder, kept)
        except (OSError, RuntimeError) as error:
            warnings.warn(f"the converted network is not kept for later runs: {error}", stacklevel=5)
        return os.path.isdir(kept)


class Asked(nn.Module):
    """A function of a network as a network, which can be traced."""

    def __init__(self, network: nn.Module, function: Callable[..., Any]):
        super().__init__()
        self.network, self.function = network, function

    def forward(self, *given: Tensor) -> Any:
        return self.function(*given)


def make_room(folder: Path, wanted: int) -> None:
    """Remove what was used longest ago until `wanted` bytes keep within MOST. OSError where the disk has no room."""
    held = sorted(folder.iterdir(), key=lambda one: one.stat().st_mtime)
    sizes = [sum(file.stat().st_size for file in one.iterdir()) for one in held]
    while held and sum(sizes) + wanted > MOST:
        shutil.rmtree(held.pop(0), ignore_errors=True)
        sizes.pop(0)
    if (free := shutil.disk_usage(folder).free) < wanted + 2**30:
        raise OSError(f"{wanted / 1e9:.1f} GB and a GiB to spare are wanted in {folder}, {free / 1e9:.1f} are free")


def free_memory() -> float:
    """GiB that a process can still have on Linux; infinite where the system does not say."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) / 2**20
    except (OSError, KeyError, ValueError):
        return float("inf")
