"""What a run will cost: the method itself, run against a model that knows nothing and counts, on an 8 x 8 latent.

No weights are read. Predicted rows are the rows paid where the method finds something to edit; where it may stop early
(refine, the inner steps of null-text inversion) they are the most it can pay.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .attention import Site
from .files.images import read_mask
from .run import GIVEN, Plan, Result, blank_plan, execute, execute_without_picture, inputs_of, plan
from .tokenizer import Tokenizer
from .unet import UNetConfig

CELLS = 8  # a side of the latent that is counted on
FURTHER = {"base": 0, "instruct": 4, "inpainting": 5}  # channels that a UNet reads beside the latent


class Counter:
    """In the place of a StableDiffusion. Taps and features see every site of its UNet, one head or channel wide."""

    def __init__(self, weights: str = "base", config: UNetConfig = UNetConfig()):
        self.kind, self.name, self.config = weights, "a counting model", config
        self.factor, self.side, self.channels, self.device = 8, 64, 4, torch.device("cpu")
        self.scale, self.coarsest = 1.0, len(config.block_out_channels) - 2
        self.projections = {"attn1.to_q.weight": (1, 1)}
        self.dtype, self.evaluations, self.gradients = torch.float32, 0, 0
        self.t, self.size, self.patterns = -1, 0.0, dict[Any, Tensor]()
        self.seen: dict[tuple[int, ...], Tensor] = {}
        self.generator = torch.Generator().manual_seed(0)
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        self._tokenizer = self._tokenizer or Tokenizer()
        return self._tokenizer

    def clock(self) -> float:
        return 0.0

    def text(self, prompts: Sequence[str]) -> Tensor:
        return torch.zeros(len(prompts), 77, 1)

    embed = text

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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are said when the edit is made
            made = count_one(settled, counter, done.get(kind, []))
        done[kind] = [made]
        found.append(made.evaluations)
    return found


def count_one(settled: Plan, counter: Counter, reuse: Sequence[Result]) -> Result:
    small: dict[str, Any] = {"size": 64} if "size" in settled.settings else {}
    given = dict(settled.given)
    if given.get("mask") is not None:
        some = torch.ones if read_mask(given["mask"]).any() else torch.zeros
        given["mask"] = some(1, 1, CELLS, CELLS)
    if "reference" in given:
        given["reference"] = Image.new("RGB", (64, 64), "grey")
    if "points" in given:
        given["points"] = "0,0=>63,63"
    tiny = replace(settled, settings=settled.settings | small | {"paste": False}, given=given)
    if "x_T" in inputs_of(settled.system.edit):
        return execute_without_picture(tiny, counter, (64, 64))  # type: ignore[arg-type]
    picture = Image.new("RGB", (64, 64), "grey")
    return execute(tiny, counter, picture, reuse=reuse)  # type: ignore[arg-type]


def rows_at_defaults(method: str) -> int:
    """Model rows in all that a method pays with a target and what else it needs, where it finds something to edit."""
    found = blank_plan(method)
    made_up = {"mask": torch.ones(1, 1, CELLS, CELLS), "pairs": [["one text", "another text"]], "points": "0,0=>63,63"}
    wanted = {*found.needs, "target"} & found.given.keys()
    given: dict[str, Any] = {name: made_up.get(GIVEN[name].kind, name) for name in wanted}  # a text is its own name
    return sum(cost(plan(method, seed=0, **given)).values())
