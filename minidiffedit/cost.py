"""What a run will cost: the method itself, run against a model that knows nothing and counts, on an 8 x 8 latent.

No weights are read. Predicted rows are the rows paid where the method finds something to edit; where it may stop early
(refine, the inner steps of null-text inversion) they are the most it can pay.
"""

import json
import warnings
import weakref
from collections import Counter as Counting
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.resources import files
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .attention import Site
from .checkpoint import build
from .diffedit import default_chunk
from .fast import decode_by_rows
from .files.images import read_mask
from .methods.table import SYSTEMS
from .plans import GIVEN, Plan, beside, blank_plan, function_at, inputs_of, plan
from .result import Result
from .run import execute, execute_without_picture
from .unet import UNetConfig

CELLS = 8  # a side of the latent that is counted on
FURTHER = {"base": 0, "instruct": 4, "inpainting": 5, "example": 5}  # channels that a UNet reads beside the latent


class Counter:
    """In the place of a StableDiffusion. Taps and features see every site of its UNet, one head or channel wide."""

    def __init__(self, weights: str = "base", config: UNetConfig = UNetConfig()):
        self.kind, self.name, self.config = weights, "a counting model", config
        self.factor, self.side, self.channels, self.device = 8, 64, 4, torch.device("cpu")
        self.scale, self.example_side, self.coarsest = 1.0, 8, len(config.block_out_channels) - 2
        self.projections = {"attn1.to_q.weight": (1, 1)}
        self.dtype, self.evaluations, self.gradients, self.most = torch.float32, 0, 0, 0
        self.t, self.size, self.patterns = -1, 0.0, dict[Any, Tensor]()
        self.seen: dict[tuple[int, ...], Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)

    tokenizer = property(lambda self: function_at("words:tokenizer")())  # one for all, which the plan's check has made

    def clock(self) -> float:
        return 0.0

    def exceptional(self) -> Tensor:
        return torch.zeros(1, 77, 1)

    def text(self, prompts: Sequence[str], syntax: str = "plain") -> Tensor:
        return torch.zeros(len(prompts), 77, 1)

    embed = text

    def example(self, pixels: Tensor) -> Tensor:
        return torch.zeros(1, 1, 1)

    def transform(self, embedded: Tensor) -> Tensor:
        return embedded + 0

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def shown(self, *shape: int) -> Tensor:
        """What taps and features see: the same at each call, so that nothing that is followed moves; and small, so that
        no word draws a map to itself: what learns to be looked at goes on to its end.
        """
        if shape not in self.seen:
            self.seen[shape] = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return self.seen[shape]

    def pattern(self, text: Tensor, t: int, shape: torch.Size) -> Tensor:
        """For each text drawn anew at each arrival at a level; the calls there change by less and less, so that what
        stops when it is near enough makes the most calls that it may.
        """
        if t != self.t:
            self.t, self.size, self.patterns = t, 10.0, {}
        if (id(text), shape) not in self.patterns:
            self.patterns[id(text), shape] = self.random(*shape).sign()
        return self.size * self.patterns[id(text), shape]

    def encode(self, image: Tensor) -> Tensor:
        return self.random(len(image), self.channels, image.shape[2] // self.factor, image.shape[3] // self.factor)

    def decode(self, latent: Tensor) -> Tensor:
        h, w = (side * self.factor for side in latent.shape[2:])
        return torch.zeros(len(latent), 3, h, w)

    def eps(
        self,
        x: Tensor,
        t: int,
        texts: Sequence[Tensor],
        *,
        tap: Any = None,
        feature: Any = None,
        given: Any = None,
        deltas: Any = None,
    ) -> list[Tensor]:
        if (0 if given is None else given.shape[1]) != FURTHER[self.kind]:
            raise ValueError(f"a part of this method needs other weights than {self.kind} ones")
        rows = len(x) * len(texts)
        self.evaluations += rows
        self.most = max(self.most, rows)  # at once
        # What gradients run along, from all that can be learned through all that is shown to the predictions.
        flow = 0 * sum((one.float().mean() for one in (x, *texts, *(deltas or {}).values())), torch.zeros(()))
        seen: dict[tuple[int, ...], Tensor] = {}  # one sum for all sites of a shape: the graph stays small
        for site, (h, w), m in self.sites(*x.shape[2:]) if tap or feature else ():
            queries, keys = (rows, 1, h * w, 1), (rows, 1, m or texts[0].shape[1], 1)
            shape = (rows, h * w, 1) if site.kind in ("self", "cross") else (rows, 1, h, w)
            for one in (queries, keys, shape):
                if one not in seen:
                    seen[one] = flow + self.shown(*one)
            made = []
            if tap and site.kind in ("self", "cross"):
                made.append(tap(plain, site, seen[queries], seen[keys], seen[keys]))
            if feature:
                made.append(feature(site, seen[shape]))
            if not flow.requires_grad and any(one.requires_grad for one in made):  # put in on the way, and learned
                flow, seen = flow + 0 * sum(one.mean() for one in made), {}
        e = [self.pattern(text, t, x.shape) + flow + 0 * x for text in texts]
        self.size *= 0.93
        self.gradients += rows if e[-1].requires_grad else 0
        return e

    def sites(self, h: int, w: int) -> Iterator[tuple[Site, tuple[int, int], int]]:
        """Each site in the order of a call, its grid of cells, and the keys that its attention has (0: the text's)."""
        n, last = self.config.layers_per_block, len(self.config.block_out_channels) - 1
        down: list[tuple[Any, int, int]] = [("down", level, i) for level in range(last + 1) for i in range(n)]
        up = [("up", level, i) for level in reversed(range(last + 1)) for i in range(n + 1)]
        for place, level, index in [*down, ("mid", last, 0), *up]:
            cells = -(-h // 2**level), -(-w // 2**level)
            yield Site(place, level, index, "conv"), cells, 0
            if place == "mid" or level < last:
                yield Site(place, level, index, "self"), cells, cells[0] * cells[1]
                yield Site(place, level, index, "cross"), cells, 0
            if place == "mid":
                yield Site(place, level, 1, "conv"), cells, 0
            yield Site(place, level, index, "block"), cells, 0
            if place == "down" and index == n - 1 and level < last:
                yield Site(place, level, n, "block"), cells, 0  # the downsampler


def plain(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An attention's shape, and what must be counted of its gradients."""
    return q + 0 * (k + v).mean(dim=2, keepdim=True)


def cost(settled: Plan, config: UNetConfig = UNetConfig()) -> dict[str, int]:
    """Model rows by stage that a plan will pay. Raises what the method itself raises of its inputs."""
    return costs([settled], config)[0]


def costs(plans: Sequence[Plan], config: UNetConfig = UNetConfig()) -> list[dict[str, int]]:
    """The same of several plans on one picture, one after another, each reusing what the ones before it made."""
    counters: dict[str, Counter] = {}
    done: dict[str, list[Result]] = {}  # by kind of weights: the last result, which holds what those before it made
    found = []
    for settled in plans:
        kind = settled.system.weights
        counter = counters.setdefault(kind, Counter(kind, config))
        with warnings.catch_warnings(), one_thread():
            warnings.simplefilter("ignore")  # they are said when the edit is made
            made = count_one(settled, counter, done.get(kind, []))
        done[kind] = [made]
        found.append(made.evaluations)
    return found


@contextmanager
def one_thread() -> Iterator[None]:
    """Tensors this small are done before a second thread wakes up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def count_one(settled: Plan, counter: Counter, reuse: Sequence[Result]) -> Result:
    given, picture = dict(settled.given), Image.new("RGB", (64, 64), "grey")
    if given.get("mask") is not None:
        given["mask"] = (torch.ones if read_mask(given["mask"]).any() else torch.zeros)(1, 1, CELLS, CELLS)
    given |= {name: picture for name, one in given.items() if GIVEN[name].kind == "picture" and one is not None}
    if "points" in given:
        given["points"] = "0,0=>63,63"
    tiny = replace(settled, settings=settled.settings | {"size": 64, "paste": False}, given=given)
    if "x_T" in inputs_of(settled.system.edit):
        return execute_without_picture(tiny, counter, (64, 64))  # type: ignore[arg-type]
    if not settled.settings.get("crop"):
        return execute(tiny, counter, picture, reuse=reuse)  # type: ignore[arg-type]
    # The mask may be known, the path of a square never is, nor is it handed on.
    tiny = replace(tiny, settings=tiny.settings | {"crop": False})
    known, fresh = (execute(tiny, counter, picture, reuse=some) for some in (reuse, ()))  # type: ignore[arg-type]
    rows = fresh.evaluations | {name: paid for name, paid in known.evaluations.items() if name == "mask"}
    path, before = settled.functions.get("path"), [call for one in reuse for call in one.calls]
    calls = tuple(call for call in known.calls if call.function != path or call in before)
    return replace(known, evaluations=rows, calls=calls)


def counted_rows(method: str) -> int:
    """`rows_at_defaults` as they were when the table was rendered (`make table`), else counted now."""
    counted = json.loads(files("minidiffedit").joinpath("data/rows.json").read_text(encoding="utf-8"))
    return counted.get(repr(SYSTEMS.get(method))) or rows_at_defaults(method)


def rows_at_defaults(method: str) -> int:
    """Model rows of a method where it finds something to edit; its texts have two words, as DPL learns none of one."""
    found = blank_plan(method)
    made_up = {"mask": torch.ones(1, 1, CELLS, CELLS), "pairs": [["one text", "another text"]], "points": "0,0=>63,63"}
    wanted = {*found.needs, "target"} & found.given.keys()
    given: dict[str, Any] = {name: made_up.get(GIVEN[name].kind, f"a {name}") for name in wanted}
    return sum(cost(plan(method, seed=0, **given)).values())


# ---------------------------------------------------------------- memory


class Held(TorchDispatchMode):
    """Bytes of the tensors that are alive at once, `most` of them so far; on the meta device nothing is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most, self.alive = 0, 0, Counting[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                self.now += 0 if self.alive[key] else size
                self.most, self.alive[key] = max(self.most, self.now), self.alive[key] + 1
                weakref.finalize(one, self.gone, key, size)
        return made

    def gone(self, key: int, size: int) -> None:
        self.alive[key] -= 1
        self.now -= 0 if self.alive[key] else size


def fused(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """An attention's shape; torch's own for this device would hold the whole map, which no fused kernel does."""
    return torch.empty_like(q)


@torch.no_grad()
def memory(settled: Plan, configs: dict[str, Any], at: tuple[int, int], dtype: torch.dtype) -> int | None:
    """Bytes that a run of a plan at the working size `at` (width, height) holds at most: the weights, and what the UNet
    or the autoencoder holds at once. None for methods that keep more: what gradients need, or (KEEPS) what calls saw.
    """
    w, h = (side // configs["vae"].factor for side in at)
    own = {"chunk": settled.settings["chunk"] or default_chunk(h, w)} if "chunk" in settled.settings else {}
    settled, counter = replace(settled, settings=settled.settings | own), Counter(settled.system.weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count_one(settled, counter, [])
    if counter.gradients or any(beside(place, "KEEPS") for place in settled.functions.values()):
        return None
    networks: dict[str, Any] = {name: build(name, config).to(dtype) for name, config in configs.items()}
    weights = sum(p.numel() * p.element_size() for one in networks.values() for p in one.parameters())
    unet, vae = networks["unet"], networks["vae"]
    with torch.device("meta"):
        x = torch.empty(max(1, counter.most), configs["unet"].in_channels, h, w, dtype=dtype)  # strength 0 asks no row
        text = torch.empty(len(x), 77, configs["unet"].cross_attention_dim, dtype=dtype)
        z, picture = x[:1, : configs["vae"].latent_channels], torch.empty(1, 3, at[1], at[0], dtype=dtype)
        decode = partial(decode_by_rows, vae) if h * w > 96 * 96 else partial(vae.decode, attend=fused)
        most, encode = [], partial(vae.encode, picture, attend=fused)
        for call in (partial(unet, x, 500, text, fused), partial(decode, z), encode):
            with Held() as held:
                call()
            most.append(held.most)
    return weights + max(most)
