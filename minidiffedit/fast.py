"""What makes an edit faster or smaller and need not be known to read it: compiled networks, memory, the CPU's types.

`StableDiffusion.load` puts these around the plain networks when asked to. Each gives the plain path's numbers up to
rounding, or raises: none goes back to the plain path in silence.
"""

import ctypes
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import BACKENDS, Attend, Feature, Hooks, join_heads, sdpa, split_heads, unchanged
from .kernels.compilers import compiled
from .unet import Attention, UNet
from .vae import VAE, ResBlock

# ---------------------------------------------------------------- where, and in which type

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Parameters from which a CPU computes in bfloat16 by itself. At full size (1,066 million) that takes .3 of float32's
# time and half its memory; the miniature (18 million) gains too little to round its masks to 8 bits.
LARGE = 200_000_000
CPUINFO = Path("/proc/cpuinfo")


def multiplies_bfloat16() -> bool:
    """Has this processor instructions for it? A convolution takes .12 of float32's time by AMX, the UNet .54 by
    AVX512_BF16; by AVX-512 alone 1.4 to 4 times as long. Others have not been measured.
    """
    try:
        return not {"amx_bf16", "avx512_bf16"}.isdisjoint(CPUINFO.read_text().split())
    except OSError:
        return False


def choose_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        made = torch.empty(0, device=device)
        made.cpu()  # of "meta", which holds no data, nothing comes back
        return made.device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error


def choose_dtype(dtype: str | torch.dtype, device: torch.device, parameters: int = 0) -> torch.dtype:
    """auto: float16 on CUDA; bfloat16 on a CPU that multiplies it, for a model of full size; else float32."""
    if dtype == "auto":
        large = device.type == "cpu" and parameters >= LARGE and multiplies_bfloat16()
        return torch.float16 if device.type == "cuda" else torch.bfloat16 if large else torch.float32
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen not in DTYPES.values():
        raise ValueError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {dtype!r}")
    return chosen  # type: ignore[return-value]


# ---------------------------------------------------------------- memory


def trim() -> None:
    """Give memory that was freed back to the system: glibc keeps it, and the next stage's would come on top."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if release:
        release(0)


class OneAtATime:
    """A network that is read from its file when it is used, and dropped when another of its `shelf` is.

    make: builds it with its weights; shelf: the list, shared by the networks, that holds the one in memory.
    """

    def __init__(self, make: Callable[[], nn.Module], shelf: list[Any]):
        self.make, self.shelf = make, shelf

    def network(self) -> nn.Module:
        if not self.shelf or self.shelf[0] is not self:
            self.shelf.clear()  # before the next one is read, not after
            trim()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            self.shelf += [self, self.make()]
        return self.shelf[1]

    def __call__(self, *args: Any) -> Any:
        return self.network()(*args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("make", "shelf"):  # pickle and copy ask before __init__ has run
            raise AttributeError(name)
        return getattr(self.network(), name)


def one_at_a_time(makes: Sequence[Callable[[], nn.Module]]) -> list[Any]:
    """The networks on one shelf. Each is read once now, so that what is wrong with a file is said at once."""
    shelf: list[Any] = []
    networks = [OneAtATime(make, shelf) for make in makes]
    for network in networks:
        network.network()
    return networks


def decode(vae: VAE, z: Tensor, by_rows: bool) -> Tensor:
    """`vae.decode`, or `decode_by_rows`: once more in bfloat16, which reaches further, where float16 overflowed."""
    picture = decode_by_rows(vae, z) if by_rows else vae.decode(z)
    if z.dtype != torch.float16 or bool(picture.isfinite().all()):
        return picture
    warnings.warn("the VAE's decoder overflowed float16: decoded again in bfloat16", stacklevel=3)
    with torch.device("meta"):
        wider = VAE(vae.config)
    wider.load_state_dict({name: one.bfloat16() for name, one in vae.state_dict().items()}, assign=True)
    return decode(wider, z.bfloat16(), by_rows)


def decode_by_rows(vae: VAE, z: Tensor, rows: int = 64) -> Tensor:
    """`vae.decode` (b, 4, h, w) -> (b, 3, 8h, 8w) in less memory, image by image; equal up to rounding.

    Above the first block every norm, SiLU and convolution is made for `rows` rows of the picture at a time, with the
    norm's statistics taken over the whole picture first: unlike tiles, strips neither blend nor shift any colour.
    """
    decoder, pictures = vae.decoder, []
    for one in z.split(1):
        x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(one)), sdpa)
        for stage in decoder.up_blocks:
            for block in stage.resnets:  # type: ignore[union-attr]
                x = resblock_by_rows(block, x, rows)
            for upsample in getattr(stage, "upsamplers", ()):
                x = conv_by_rows(upsample.conv, x, rows // 2, grow=2)
        pictures.append(conv_by_rows(decoder.conv_out, x, rows, norm=decoder.conv_norm_out))
    return torch.cat(pictures)


def resblock_by_rows(block: ResBlock, x: Tensor, rows: int) -> Tensor:
    h = conv_by_rows(block.conv1, x, rows, norm=block.norm1)
    h = conv_by_rows(block.conv2, h, rows, norm=block.norm2)
    for out, part in zip(h.split(rows, dim=2), x.split(rows, dim=2)):
        out += block.conv_shortcut(part)
    return h


def conv_by_rows(conv: nn.Conv2d, x: Tensor, rows: int, *, norm: nn.GroupNorm | None = None, grow: int = 1) -> Tensor:
    """conv(silu(norm(x))) for a 3x3 convolution padded by 1, or conv of x enlarged `grow` times, by strips of x."""
    (b, _, h, w), f = x.shape, grow
    out = x.new_empty(b, conv.out_channels, f * h, f * w).contiguous(memory_format=torch.channels_last)
    factors = scale_and_shift(norm, x, rows) if norm else None
    for top in range(0, h, rows):
        end = min(top + rows, h)
        low, high = max(top - 1, 0), min(end + 1, h)  # a neighbour on each side; at the edges the padding's zeros
        part = x[:, :, low:high]
        if factors:
            scale, shift = factors
            part = F.silu(torch.addcmul(shift, part.float(), scale), inplace=True).to(x.dtype)
        if f > 1:
            part = F.interpolate(part, scale_factor=f, mode="nearest")
        out[:, :, f * top : f * end] = conv(part)[:, :, f * (top - low) : f * (end - low)]
    return out


def scale_and_shift(norm: nn.GroupNorm, x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(1, c, 1, 1) float32 each, so that norm(x) = scale x + shift, for x (1, c, h, w)."""
    means, squares, counts = [], [], []  # per strip and channel: no difference of large numbers is taken
    for part in x.split(rows, dim=2):
        part = part.float()
        means.append(part.mean(dim=(0, 2, 3)))
        squares.append((part - means[-1][:, None, None]).square_().mean(dim=(0, 2, 3)))
        counts.append(part.shape[2] / x.shape[2])
    share = torch.tensor(counts, device=x.device)
    mean, square = (torch.stack(rows_of, 1).unflatten(0, (norm.num_groups, -1)) for rows_of in (means, squares))
    centre = (mean * share).sum(-1).mean(1)  # (groups,)
    variance = ((square + (mean - centre[:, None, None]) ** 2) * share).sum(-1).mean(1)
    width = x.shape[1] // norm.num_groups
    scale = (variance + norm.eps).rsqrt().repeat_interleave(width) * norm.weight.float()
    shift = norm.bias.float() - centre.repeat_interleave(width) * scale
    return scale[:, None, None], shift[:, None, None]


# ---------------------------------------------------------------- compiling


CALLS = 50  # of an edit at the defaults that ask for one shape: 10 of the mask and 40 of the decoding


class FusedAttention(nn.Module):
    """unet.Attention with one product for q, k and v (of the text: for k and v); takes the plain one's weights."""

    def __init__(self, plain: Attention):
        super().__init__()
        self.heads, self.site, self.to_out = plain.heads, plain.site, plain.to_out
        self.to_q = plain.to_q if plain.site.kind == "cross" else None
        parts = [plain.to_k.weight, plain.to_v.weight]
        weight = torch.cat(parts if self.to_q else [plain.to_q.weight, *parts])
        self.together = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.together.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, context: Tensor, hooks: Hooks) -> Tensor:
        if self.to_q:
            q, (k, v) = self.to_q(x), self.together(context).chunk(2, dim=-1)
        else:
            q, k, v = self.together(x).chunk(3, dim=-1)
        q, k, v = (split_heads(part, self.heads) for part in (q, k, v))
        return hooks.feature(self.site, self.to_out[0](join_heads(hooks.attend(self.site, q, k, v))))


def fuse(unet: UNet) -> UNet:
    """Every attention of the UNet with its products joined, in place."""
    for module in [*unet.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, Attention):
                setattr(module, name, FusedAttention(child))
    return unet


class CompiledUNet:
    """unet(x, t, text, attend) by torch.compile or OpenVINO: the whole graph, once per shape; on a GPU replayed as a
    CUDA graph.

    Takes the UNet over (channels last; by torch, projections fused); for inference and the built-in attention only,
    without taps and features, else ValueError. seconds: by (latents, texts, h, w), what the first call of that shape
    took, compiling included. note: is told before, and after, with the edits from which on it pays. What was compiled
    is kept for the next run in TORCHINDUCTOR_CACHE_DIR, which the commands set; without it torch's in a folder that a
    reboot clears, OpenVINO's not.
    """

    grid = 64  # pixels: sides of pictures are multiples of it (run.open_picture), so that few shapes are compiled

    def __init__(self, unet: UNet, backend: str = "inductor", note: Callable[[str], None] | None = None):
        self.by_openvino = backend == "openvino"
        self.unet, self.note = unet if self.by_openvino else fuse(unet), note
        self.seconds: dict[tuple[int, ...], float] = {}
        self.on_gpu = unet.conv_in.weight.device.type == "cuda"
        mode = "reduce-overhead" if self.on_gpu and backend == "inductor" else None
        self.graph = compiled(unet, self.of_time if self.by_openvino else unet.forward, backend, mode)

    def __call__(self, x: Tensor, t: int, text: Tensor, attend: Attend = sdpa, feature: Feature = unchanged) -> Tensor:
        if attend not in BACKENDS.values() or feature is not unchanged:
            said = "a compiled UNet takes no tap, no feature and the built-in attention only"
            raise ValueError(f"{said}; load the model without compile")
        if torch.is_grad_enabled() and (x.requires_grad or text.requires_grad):
            raise ValueError("a compiled UNet has no gradient; load the model without compile")
        shape = (len(x), len(text), *x.shape[2:])
        if shape in self.seconds:
            return self.replay(x, t, text, attend)
        what = "compiling the UNet for {} x {} texts of {} x {} cells".format(*shape)
        self.say(f"{what}: once for each shape, up to minutes")
        plain = self.repeated(partial(self.unet, x, t, text, attend)) if self.note else 0.0
        start = time.perf_counter()
        try:
            predictions = self.replay(x, t, text, attend)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            advice = "or, if a run was killed at it, empty TORCHINDUCTOR_CACHE_DIR"
            raise RuntimeError(f"{what} failed: {reason}; load the model without compile, {advice}") from error
        if self.on_gpu:
            torch.cuda.synchronize()
        self.seconds[shape] = took = time.perf_counter() - start
        fast = self.repeated(partial(self.replay, x, t, text, attend)) if self.note else 0.0
        pays = f"after {math.ceil(took / (plain - fast) / CALLS)} edits" if plain > fast else "never here"
        self.say(f"{what}: {took:.1f} s; then a call takes {fast:.3g} s, before {plain:.3g}: it pays {pays}")
        return predictions

    @torch.no_grad()
    def repeated(self, call: Callable[[], Any]) -> float:
        """Seconds of the third call: a GPU compiles at the first, and records at the second."""
        for _ in range(3):
            start = time.perf_counter()
            call()
            if self.on_gpu:
                torch.cuda.synchronize()
        return time.perf_counter() - start

    def replay(self, x: Tensor, t: int, text: Tensor, attend: Attend) -> Tensor:
        x = x.clone(memory_format=torch.channels_last)  # one stride for all: `contiguous` leaves that of a single row
        step = torch.full((1,), t, device=x.device)  # as a number it would be compiled in; no copy to wait for
        with torch.no_grad():
            if not self.on_gpu:
                return self.graph(x, self.unet.time(step) if self.by_openvino else step, text, attend)
            torch.compiler.cudagraph_mark_step_begin()
            return self.graph(x, step, text, attend).clone()  # the graph's own memory is written anew by the next call

    def of_time(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """The UNet from its `time` on, which torch makes: a step of 481 is none of bfloat16's numbers."""
        unet = self.unet
        return unet(x, time, text, sdpa, unchanged, lambda layer, given: given if layer == unet.time else layer(given))

    def say(self, line: str) -> None:
        if self.note:
            self.note(line)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "unet":
            raise AttributeError(name)
        return getattr(self.unet, name)


def compiled_vae(vae: VAE, backend: str = "inductor") -> VAE:
    """Both halves compiled, in place; without CUDA graphs, which would keep the memory of what runs once."""
    for half in ("encode", "decode"):
        setattr(vae, half, compiled(vae, getattr(vae, half), backend))
    return vae
