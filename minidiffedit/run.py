"""Any method by name. What it needs is read from its functions' signatures, so no command knows one from another.

A method's positional parameters are inputs (INPUTS says where each comes from), its keyword-only ones are options with
a default and a kind (options.py). One name is one value in a run, for inversion, mask and editor alike. The runner
hands the model over as `eps`, wrapped: counted, watched and in the latents' dtype, so that no method does it.

    settled = plan("masactrl", target="a zebra", source="a horse", steps=20)     # refuses before any weights are read
    done = execute(settled, sd, "horse.png")                                      # or `edit`, which is both
"""

import base64
import difflib
import html
import inspect
import io
import math
import pathlib
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import prompts
from .ddim import Trajectory, alpha_bar, level_at, levels, noises, real, whole
from .diffedit import finite
from .files import images
from .files.masks import HAZE, Steering, digest, largest_piece
from .methods.table import INVERSIONS, MASKS, SYSTEMS, System
from .options import About, Option, Seed, Within, is_text, options_of
from .path import Path

if TYPE_CHECKING:
    from .sd import StableDiffusion

Picture = str | PathLike[str] | Image.Image | np.ndarray


# ---------------------------------------------------------------- what a user gives, and what methods take


class Given(NamedTuple):
    """An argument of `edit` that is no option. kind: text, mask, picture or pairs."""

    kind: str
    about: str


GIVEN = {
    "target": Given("text", "what the result shall show"),
    "source": Given("text", "what the picture shows now"),
    "negative_prompt": Given("text", "what the edit leads away from"),
    "instruction": Given("text", "what is to be done to the picture"),
    "mask": Given("mask", "your own mask: white = edited, grey = partly"),
    "reference": Given("picture", "another picture, whose look or parts are taken"),
    "reference_mask": Given("picture", "which part of the reference is taken: white (default: all of it)"),
    "edits": Given("pairs", "pairs of texts, source and target, each edited where they differ"),
    "points": Given("points", "places in pixels and where they go: x,y=>x,y; ..."),
}


class Input(NamedTuple):
    """A positional parameter that methods may have. make: job -> its value, and what it is known by when results are
    reused (plain values; None: it is the same in all runs on one picture). given: the argument that it is made of.
    """

    make: Callable[["Job"], tuple[Any, Any]]
    given: str = ""


def text_of(name: str) -> Input:
    return Input(lambda job: job.text(job.plan.given[name]), name)


# A new kind of input is one line here, a new method none.
INPUTS: dict[str, Input] = {
    "eps": Input(lambda job: (job.eps, None)),
    "raw_eps": Input(lambda job: (job.raw_eps, None)),
    "x0": Input(lambda job: (job.x0, None)),
    "x_T": Input(lambda job: job.x_T()),
    "null": Input(lambda job: job.text("")),
    "target": text_of("target"),
    "source": text_of("source"),
    "source_words": Input(lambda job: job.words("source"), "source"),
    "target_words": Input(lambda job: job.words("target"), "target"),
    "source_embedded": Input(lambda job: job.embedded("source"), "source"),
    "transform": Input(lambda job: (job.sd.transform, None)),
    "projections": Input(lambda job: (job.sd.projections, None)),
    "coarsest": Input(lambda job: (job.sd.coarsest, None)),
    "negative": text_of("negative_prompt"),
    "instruction": text_of("instruction"),
    "x0_unscaled": Input(lambda job: (job.x0 / job.sd.scale, None)),
    "edits": Input(lambda job: job.pairs("edits"), "edits"),
    "edits_words": Input(lambda job: job.words("edits"), "edits"),
    "points": Input(lambda job: job.points(), "points"),
    "places": Input(lambda job: job.places(), "points"),
    "mask": Input(lambda job: job.mask(), "mask"),
    "vae": Input(lambda job: (getattr(job.sd, "vae", None), None)),  # what only counts has none
    "pixels": Input(lambda job: (job.pixels(), None)),
    "x0_outside": Input(lambda job: job.x0_outside(), "mask"),
    "reference": Input(lambda job: job.encoded("reference"), "reference"),
    "example": Input(lambda job: job.example(), "reference"),
    "placed": Input(lambda job: job.placed("placed"), "reference"),
    "shape": Input(lambda job: job.placed("shape"), "reference_mask"),
    "exceptional": Input(lambda job: (job.sd.exceptional(), None)),
    "path": Input(lambda job: job.path()),
    "found": Input(lambda job: job.found()),
}


def common(
    *,
    paste: Annotated[bool, About("put the input's own pixels back outside the mask")] = True,
    seed: Seed | None = None,
    size: Annotated[int | None, Within(64, 1024, "shorter side to work at (default: the training size)")] = None,
    prompt_syntax: Annotated[Literal["plain", "a1111", "compel"], About("whose weights in texts, if any")] = "plain",
    crop: Annotated[bool, About("find the mask on the whole picture, then edit a square around it alone")] = False,
    crop_margin: Annotated[float, Within(0, 10, "what the square shows on each side, in sides of the mask")] = 0.25,
) -> None:
    """The options of every run; the last two of those under a mask that may be any."""


COMMON = options_of(common)
CROPS = ("crop", "crop_margin")
MOST_CROPPED = 0.8  # of the picture's shorter side; a square that takes more shows hardly more than the whole


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True)
class Plan:
    """A method with everything settled but the picture. functions: "module:function" of what makes the mask, the path
    and the latent, as far as the method has them; options: theirs and the common ones; settings: the options' values;
    given: the arguments that are no options, those left out with their defaults; needs: those that cannot be left out.
    """

    method: str
    system: System
    functions: dict[str, str]
    options: dict[str, Option]
    settings: dict[str, Any]
    given: dict[str, Any]
    needs: tuple[str, ...]

    @property
    def masked(self) -> bool:
        """Whether the editor looks at a mask."""
        return "mask" in inputs_of(self.system.edit)

    @property
    def steerable(self) -> bool:
        return self.masked and "found" not in inputs_of(self.system.edit)

    @property
    def record(self) -> dict[str, Any]:
        """What decides the result, as plain values; of pictures only whether they are given."""
        kinds = {name: GIVEN[name].kind for name in self.given}
        plain = {name: value for name, value in self.given.items() if kinds[name] in ("text", "pairs", "points")}
        return {"method": self.method, **plain, **self.settings}


def plan(
    method: str = "diffedit", *, inversion: str | None = None, mask_from: str | None = None, **arguments: Any
) -> Plan:
    """Settle a method. arguments: what GIVEN and the method's options name; None for a given one is as good as none.

    method: a name of SYSTEMS, or INVERSION+MASK+EDITOR, of which either of the first two may be left out. mask_from:
    the mask's source by itself, MASK or MASK:TEXT, where that mask is told by text ("words:horse"). Raises ValueError
    for unknown names, what the method does not take, what it needs and did not get, and values out of range;
    no weights are read. A seed that is None is drawn.
    """
    found = blank_plan(method, inversion, mask_from)
    arguments = told_mask(found, mask_from) | arguments
    given = {name: value for name, value in arguments.items() if name in GIVEN and value is not None}
    told = {name: value for name, value in arguments.items() if name not in GIVEN}
    if strange := (given.keys() - found.given.keys()) | (told.keys() - found.options.keys()):
        name = min(strange)
        known = [*found.given, *found.options]
        ways = ", ".join([f"{kind}={one!r}" for kind, one in holders(name, found.method)][:3])
        hint = f", which comes with {ways} and the like" if ways else like(name, known)
        raise ValueError(f"{found.method} has no option {name!r}{hint}; it has {', '.join(known)}")
    if lacking := [name for name in found.needs if name not in given]:
        said = "; ".join(f"{name}: {GIVEN[name].about}" for name in lacking)
        raise ValueError(f"{found.method} needs {' and '.join(lacking)} ({said})")
    settings = {name: found.options[name].check(value) for name, value in (found.settings | told).items()}
    if mask_from and given.get("mask") is not None:
        raise ValueError(f"a mask is given, and besides one from {mask_from} is asked for; leave out one of them")
    if settings["seed"] is None:
        settings["seed"] = secrets.randbelow(2**32)
    check_levels(settings)
    if settings.get("crop") and "mask" not in found.functions and given.get("mask") is None:
        raise ValueError(f"crop edits around a mask, and {found.method} finds none: give one")
    given = {name: check_given(name, value) for name, value in (found.given | given).items()}
    spoken = check_prompts(found.functions, settings, given)
    for module, _, name in (place.partition(":") for place in found.functions.values()):
        check = getattr(import_module(f"{__package__}.methods.{module}"), f"check_{name}", None)
        if check:  # a function's own, of how options and texts fit together
            check(settings, spoken)
    return Plan(found.method, found.system, found.functions, found.options, settings, given, found.needs)


def told_mask(found: Plan, mask_from: str | None) -> dict[str, Any]:
    """MASK:TEXT -> the text as the option of the mask's function that is a text. Raises ValueError where none is."""
    source, colon, text = str(mask_from or "").partition(":")
    if not colon:
        return {}
    texts = [name for name, one in options_of(function_at(found.functions["mask"])).items() if one.type is str]
    if not texts:
        raise ValueError(f"a mask from {source} is told by no text, got {mask_from!r}")
    return {texts[0]: text}


def blank_plan(method: str, inversion: str | None = None, mask_from: str | None = None) -> Plan:
    """A method with its defaults, what it needs left out as None. Raises ValueError as `plan`."""
    own, mask, method = parts_of(str(method))
    source = str("" if mask_from is None else mask_from).partition(":")[0] or mask
    if mask not in ("", source):
        raise ValueError(f"the method's name asks for the mask {mask!r}, and besides {source!r} is given")
    if source and source not in MASKS:
        raise ValueError(f"a mask can come from {', '.join(MASKS)}, got {source!r}{like(source, MASKS)}")
    mask = source
    if own and inversion not in (None, own):
        raise ValueError(f"the method's name asks for the inversion {own!r}, and besides {inversion!r} is given")
    inversion, system = str(own if inversion in (None, "") else inversion), known_system(method)
    if not system.edit:
        raise ValueError(f"{method} does not work yet: {system.note or system.status}")
    if inversion and (inversion not in INVERSIONS or not system.inversion):
        wanted = f"one of {', '.join(INVERSIONS)}" if system.inversion else f"left out: {method} takes no path"
        raise ValueError(f"the inversion must be {wanted}, got {inversion!r}{like(inversion, INVERSIONS)}")
    if inversion and inversion != system.inversion:
        name = f"{inversion}+{method}"
    else:
        name, inversion = method, system.inversion
    if mask and not ("mask" in inputs_of(system.edit) and "found" not in inputs_of(system.edit)):
        raise ValueError(f"{method} takes no mask of another source, got {mask!r}")
    if mask and mask != system.mask:
        name = name.removesuffix(method) + f"{mask}+{method}"
    places = {"mask": MASKS.get(mask or system.mask, ""), "path": INVERSIONS.get(inversion, ""), "latent": system.edit}
    functions = {made: place for made, place in places.items() if place}
    options, given = dict[str, Option](), dict[str, Any]()
    needs = []
    for place in functions.values():
        options |= options_of(function_at(place))  # of one name, the editor's default holds
        for name_of, default in inputs_of(place).items():
            if not (argument := INPUTS[name_of].given) or (argument == "mask" and "mask" in functions):
                continue
            if default is inspect.Parameter.empty:
                needs += [argument] * (argument not in needs)
                default = None
            given.setdefault(argument, default)
    if "mask" in functions and "found" not in inputs_of(system.edit):
        given.setdefault("mask", None)  # instead of the computed one
    any_mask = "mask" in given and "points" not in given  # points are places in the whole picture
    options |= {name: one for name, one in COMMON.items() if any_mask or name not in CROPS}
    settings = {name: one.default for name, one in options.items()} | system.options
    settings = {name: value for name, value in settings.items() if name in options}
    return Plan(name, system, functions, options, settings, given, tuple(needs))


def parts_of(method: str) -> tuple[str, str, str]:
    """INVERSION+MASK+EDITOR -> the three, "" for what is left out. Raises ValueError for two of a kind."""
    parts: dict[str, str] = {"inversion": "", "mask": ""}
    while method not in SYSTEMS and "+" in method:
        one, _, method = method.partition("+")
        kind = "mask" if one in MASKS else "inversion"
        if parts[kind]:
            raise ValueError(f"a name has one {kind} (INVERSION+MASK+EDITOR), got {parts[kind]!r} and {one!r}")
        parts[kind] = one
    return parts["inversion"], parts["mask"], method


def holders(option: str, method: str) -> list[tuple[str, str]]:
    """What brings an option or an input: ("mask_from", a source of a mask for this method) and ("method", its name)."""
    methods = (method, *(one for one, row in SYSTEMS.items() if row.edit))
    plans, editor = {("method", one): blank_plan(one) for one in methods}, parts_of(method)[2]
    if plans["method", method].steerable:
        plans = {("mask_from", one): blank_plan(editor, mask_from=one) for one in MASKS} | plans
    return [one for one, plan in plans.items() if option in {*plan.given, *plan.options}]


def known_system(method: str) -> System:
    """A row of the table by its name or by the last of INVERSION+MASK+EDITOR. Raises ValueError, with a suggestion."""
    system = SYSTEMS.get(parts_of(method)[2])
    if system is None:
        raise ValueError(f"no method {method!r}{like(method, SYSTEMS)}; `minidiffedit methods` lists them")
    return system


def function_at(place: str) -> Callable[..., Any]:
    """ "module:function", the module in methods/."""
    module, _, name = place.partition(":")
    return getattr(import_module(f"{__package__}.methods.{module}"), name)


def inputs_of(place: str) -> dict[str, Any]:
    """A function's positional parameters and their defaults. Raises TypeError for one that no one can provide."""
    found = inspect.signature(function_at(place)).parameters.values()
    positional = {p.name: p.default for p in found if p.kind is p.POSITIONAL_OR_KEYWORD}
    if strange := positional.keys() - INPUTS.keys():
        raise TypeError(f"{place} asks for {min(strange)!r}; inputs are {', '.join(INPUTS)}")
    return positional


def like(name: str, known: Any) -> str:
    """A suggestion, if one name is near."""
    wanted = {name, name.replace("-", "_")}
    close = [one for word in sorted(wanted) for one in difflib.get_close_matches(word, {*known} - wanted, 1, 0.7)]
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_levels(settings: dict[str, Any]) -> None:
    """Warn of steps that do not reach full noise, and of a strength that rounds to nothing."""
    steps = settings.get("steps", 50)
    if 1000 % steps:
        top = levels(steps).t[-1]
        warnings.warn(f"{steps} steps do not divide 1000: the top level is t = {top}, below full noise", stacklevel=3)
    if "strength" in settings:
        level_at(settings["strength"], steps)


def check_given(name: str, value: Any) -> Any:
    """Texts must be UTF-8, pairs lists of two texts each, points become one text; masks and pictures are looked at when
    they are opened.
    """
    kind = GIVEN[name].kind
    if kind == "text" and not is_text(value):
        raise ValueError(f"{name} must be text (UTF-8), got {value!r}")
    if kind == "pairs":
        pairs = [pair.split("=>") for pair in value.split(";")] if isinstance(value, str) else value
        sound = isinstance(pairs, list | tuple) and pairs
        if not sound or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs):
            raise ValueError(f"{name} must be pairs (source, target), or text A=>B; C=>D, got {value!r}")
        pairs = [[check_given(*one) for one in zip(("source", "target"), pair)] for pair in pairs]
        return [[text.strip() for text in pair] for pair in pairs] if isinstance(value, str) else pairs
    if kind == "points":
        return "; ".join("=>".join(f"{x:g},{y:g}" for x, y in pair) for pair in places(value))
    return value


def texts_of(given: dict[str, Any]) -> list[str]:
    texts = []
    for name, value in given.items():
        kind = GIVEN[name].kind
        texts += [value] if kind == "text" else [one for pair in value for one in pair] if kind == "pairs" else []
    return texts


def check_prompts(functions: dict[str, str], settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What is given with its texts as they are spoken. Raises ValueError for what their syntax has not, and where a
    method looks at words, which have places in a text of one chunk only.
    """
    syntax = settings["prompt_syntax"]
    prompts.check_texts(texts_of(given), syntax)
    if syntax == "plain":
        return given
    asked = [one for place in functions.values() for one in inputs_of(place).items()]
    names = {name for name, default in asked if name.endswith("_words") and default is inspect.Parameter.empty}
    for text in texts_of({INPUTS[name].given: given[INPUTS[name].given] for name in names}):
        prompts.check_one_chunk(function_at("words:tokenizer")(), text, syntax)
    said = {text: prompts.spoken(text, syntax) for text in texts_of(given)}
    kinds = {name: GIVEN[name].kind for name in given}
    texts = {name: said[value] for name, value in given.items() if kinds[name] == "text"}
    pairs = {n: [[said[one] for one in pair] for pair in value] for n, value in given.items() if kinds[n] == "pairs"}
    return given | texts | pairs


def places(value: Any) -> list[list[tuple[float, float]]]:
    """Text, "x,y=>x,y; ...", or pairs ((x, y), (x, y)) -> pairs. Raises ValueError for what is neither."""
    try:
        if isinstance(value, str):
            value = [[place.split(",") for place in pair.split("=>")] for pair in value.split(";")]
        found = [[(real("x", float(x), 0, 1e6), real("y", float(y), 0, 1e6)) for x, y in pair] for pair in value]
    except (TypeError, ValueError):
        found = []
    if not found or any(len(pair) != 2 for pair in found):
        raise ValueError(f"points must be places in pixels and where they go, 'x,y=>x,y; ...', got {value!r}")
    return found


# ---------------------------------------------------------------- the result


@dataclass(frozen=True, eq=False)
class Call:
    """One run of a function that makes a mask or a path: what it depended on, and what it returned."""

    function: str
    given: dict[str, Any]
    result: Any = field(repr=False)


class Shown:
    """What a notebook shows of something with an `image`: the picture, and below it what it is."""

    image: Image.Image

    def _repr_png_(self) -> bytes:
        encoded = io.BytesIO()
        self.image.save(encoded, "PNG")
        return encoded.getvalue()

    def _repr_html_(self) -> str:
        data = base64.b64encode(self._repr_png_()).decode()
        return f'<img src="data:image/png;base64,{data}" style="max-width:100%"><div>{html.escape(repr(self))}</div>'


@dataclass(frozen=True, eq=False, repr=False)
class Result(Shown):
    """What a run made, whatever the method.

    source, image: PIL RGB at the input's size, before and after (source None: nothing went in). mask: PIL L at that
    size, white = may change (None: the method has none); paste_mask: PIL L, where it is 0 the image's pixels are the
    source's (None: nothing was pasted). x0, latent (1, 4, h, w), latent_mask (1, 1, h, w) float32, the mask as it was
    used. stages: lists of latents by name, "encode": x_0, ..., x_K and "decode": y_K, ..., y_0 (empty where nothing was
    to do); times, clean: the timestep of each prediction of a stage, and the x_0 that it led to, outside a mask the
    source's. tensors: what else there is to see, by name. verdict: "found", "no difference", "given", "strength 0",
    "encoded" (no more was wanted) or "edited" (no mask). evaluations (model rows) and seconds by stage. settings: all
    that decided the result. given_mask, steering: as handed in, on the latent grid. calls: masks and paths, for reuse.
    inside: of a run with crop, what was made of the square alone, settings["crop_box"] = [left, top, right, bottom];
    masks and tensors are the whole picture's then, latent, stages, times and clean the square's. witness: what looked
    on.
    """

    method: str
    settings: dict[str, Any]
    source: Image.Image | None
    image: Image.Image
    mask: Image.Image | None
    paste_mask: Image.Image | None
    x0: Tensor | None = field(repr=False)
    latent: Tensor = field(repr=False)
    latent_mask: Tensor | None = field(repr=False)
    stages: dict[str, list[Tensor]] = field(repr=False)
    clean: dict[str, list[Tensor]] = field(repr=False)
    times: dict[str, list[int]] = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)
    verdict: str
    evaluations: dict[str, int]
    seconds: dict[str, float]
    plan: Plan = field(repr=False)
    calls: tuple[Call, ...] = field(repr=False)
    sd: "StableDiffusion" = field(repr=False)
    given_mask: Tensor | None = field(default=None, repr=False)
    steering: Steering | None = field(default=None, repr=False)
    inside: "Result | None" = field(default=None, repr=False)
    witness: Any = field(default=None, repr=False)

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    @property
    def rows(self) -> int:
        """Model rows paid in all."""
        return sum(self.evaluations.values())

    @property
    def heat(self) -> Tensor | None:
        """(1, 1, h, w) in [0, 1]: the map that the mask was cut from, where one was sought."""
        return self.tensors.get("heat")

    @property
    def coverage(self) -> float | None:
        """Share of latent cells in the mask."""
        return None if self.latent_mask is None else float((self.latent_mask > 0).float().mean())

    @property
    def found(self) -> Any:
        """What the mask's own function returned, if it ran."""
        return self.made("mask")

    @property
    def trajectory(self) -> Trajectory:
        """The path that was walked down; where nothing was inverted, x_0 alone."""
        made = self.made("path")
        return Trajectory([self.x0], self.settings.get("steps", 50)) if made is None else made  # type: ignore[list-item]

    @property
    def decoded(self) -> tuple[Tensor, ...]:
        return tuple(self.stages.get("decode", ()))

    def made(self, what: str) -> Any:
        """What this run's own call made; calls of earlier runs are kept for reuse only."""
        place, sought = self.plan.functions.get(what), self.given_mask is None and self.verdict != "strength 0"
        own = {"path": bool(self.stages.get("encode")), "mask": sought}[what]
        return next((call.result for call in reversed(self.calls) if own and call.function == place), None)

    def __repr__(self) -> str:
        said = [self.method, repr(prompt) if len(prompt := self.prompt) <= 60 else repr(f"{prompt[:57]}...")]
        said += [f"{self.image.width} x {self.image.height}", self.verdict]
        said += [] if self.coverage is None else [f"mask {self.coverage:.0%}"]
        said += [f"seed {self.seed}", f"{self.rows} rows", f"{sum(self.seconds.values()):.1f} s"]
        return f"Result({', '.join(said)})"

    @property
    def prompt(self) -> str:
        """The target, the instruction, or the targets of several pairs."""
        from .files.metadata import prompt_of

        return prompt_of(self.settings)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the picture with its settings, as `minidiffedit edit` does."""
        from .files.metadata import describe_result

        images.write_picture(self.image, pathlib.Path(path), describe_result(self))


# Why an edit changes nothing, by verdict.
NOTHING = {
    "strength 0": "the strength rounds to level 0",
    "no difference": "the prompts do not differ on this picture",
    "found": "the mask is empty",
    "given": "the mask is empty",
    "encoded": "only the way up was asked for",
}


def nothing_to_edit(plan: Plan, verdict: str) -> str:
    if verdict == "no difference" and "target" in plan.given and plan.given["target"] == plan.given.get("source"):
        return f"the prompts do not differ: both are {plan.given['target'][:60]!r}"
    return NOTHING.get(verdict, "no pair of prompts finds a cell")


# ---------------------------------------------------------------- one run


class Step(NamedTuple):
    """What a watcher of a run sees after each call of the model: the stage, the timestep, the latent (1, 4, h, w) asked
    about, the clean latent that its prediction leads to (outside a mask the source's), and the model rows paid so far.
    """

    stage: str
    t: int
    x: Tensor
    clean: Tensor
    rows: int


Watch = Callable[[Step], None]
MOST_CALLS = 32  # that a result keeps for reuse, the latest used
STAGES = {"mask": "mask", "path": "encode", "latent": "decode"}  # what a function makes -> the stage's name


class Job:
    """One run of a plan: inputs are made when they are first asked for, equal prompts are one object."""

    sd: "StableDiffusion"

    def __init__(self, plan: Plan, sd: "StableDiffusion", picture: Image.Image | None, at: tuple[int, int]):
        self.plan, self.sd, self.picture, self.at = plan, sd, picture, at
        self.now, self.seconds = "", dict[str, float]()
        names = {made: STAGES[made] for made in plan.functions} | ({} if picture else {"latent": "generate"})
        self.stage_of = {made: names[made] for made in plan.functions}
        self.evaluations = dict.fromkeys(self.stage_of.values(), 0)
        self.values: dict[str, tuple[Any, Any]] = {}
        self.known: Sequence[Call] = ()
        self.bitwise, self.calls = False, list[Call]()
        self.watch: Watch | None = None
        self.witness: Any = None  # see views/witness.py
        self.x0: Tensor = torch.empty(0)  # until `prepare`
        self.texts: dict[str, Tensor] = {}
        self.begun = 0
        self.stages, self.clean = dict[str, list[Tensor]](), dict[str, list[Tensor]]()
        self.times, self.tensors = dict[str, list[int]](), dict[str, Tensor]()
        self.verdict = "edited"
        self.given_mask: Tensor | None = None
        self.steering: Steering | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        before, rows, start = self.now, self.sd.evaluations, self.sd.clock()
        self.now = name
        yield
        self.now = before
        self.seconds[name] = self.seconds.get(name, 0.0) + self.sd.clock() - start
        if name in self.evaluations:
            self.evaluations[name] += self.sd.evaluations - rows

    # The model.

    def raw_eps(self, x: Tensor, t: int, texts: Sequence[Any], **hooks: Any) -> list[Tensor]:
        """Predictions in the model's own dtype, counted and watched."""
        if self.witness:
            hooks = self.witness.hooks(self.now, x, t, texts, hooks)
        predictions = self.sd.eps(x, t, texts, **hooks)
        if self.now in ("encode", "decode", "generate"):
            self.saw(x.detach(), t, [one.detach() for one in predictions])
        elif self.watch:
            self.watch(Step(self.now, t, x[-1:], x[-1:], self.sd.evaluations - self.begun))
        return predictions

    def eps(self, x: Tensor, t: int, texts: Sequence[Any], **hooks: Any) -> list[Tensor]:
        """The same in x's dtype."""
        return [e.to(x) for e in self.raw_eps(x, t, texts, **hooks)]

    def saw(self, x: Tensor, t: int, predictions: list[Tensor]) -> None:
        """Keep the last role's latent and the clean one it leads to; of several calls at one level, the last."""
        x, first, last = x[-1:], predictions[0][-1:].to(x), predictions[-1][-1:].to(x)
        a, scale = alpha_bar()[t], self.plan.settings.get("guidance_scale", 1.0)
        clean = (x - math.sqrt(1 - a) * (first + scale * (last - first))) / math.sqrt(a)
        if self.now == "decode" and (M := self.values.get("mask", (None,))[0]) is not None:
            clean = M * clean + (1 - M) * self.x0
        latents, cleans = self.stages.setdefault(self.now, []), self.clean.setdefault(self.now, [])
        times = self.times.setdefault(self.now, [])
        if times[-1:] == [t]:
            del latents[-1:], cleans[-1:], times[-1:]
        latents.append(x)
        cleans.append(clean)
        times.append(t)
        if self.watch:
            self.watch(Step(self.now, t, x, clean, self.sd.evaluations - self.begun))

    # The functions of the method.

    def input(self, name: str) -> tuple[Any, Any]:
        if name not in self.values:
            self.values[name] = INPUTS[name].make(self)
        return self.values[name]

    def call(self, made: str) -> Call:
        """Run the function that makes the mask, the path or the latent, unless an earlier run's call was the same."""
        place = self.plan.functions[made]
        function, asked = function_at(place), {name: self.input(name) for name in inputs_of(place)}
        options = {name: self.plan.settings[name] for name in options_of(function)}
        given = {name: key for name, (_, key) in asked.items() if key is not None} | options
        same = [call for call in self.known if call.function == place and call.given == given]
        if same and made != "latent":
            self.calls.append(same[-1])
            return same[-1]
        handles = {"record": self.tensors, "earlier": self.earlier(place, given)}
        handles = {name: one for name, one in handles.items() if name in inspect.signature(function).parameters}
        with self.stage(self.stage_of[made]):
            call = Call(place, given, function(*(value for value, _ in asked.values()), **options, **handles))
        self.calls += [call] if made != "latent" else []
        return call

    def earlier(self, place: str, given: dict[str, Any]) -> Callable[..., Iterator[Any]]:
        """earlier(*but, exact=True): results of the same function given the same but for some names, the latest first.
        exact=False: what can be made of them rounds otherwise than a run without, so that some runs do without.
        """

        def without(names: tuple[str, ...], one: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in one.items() if name not in names}

        def find(*but: str, exact: bool = True) -> Iterator[Any]:
            for call in reversed(self.known if exact or not self.bitwise else ()):
                if call.function == place and without(but, call.given) == without(but, given):
                    yield call.result

        return find

    # The inputs.

    def prepare(self, x0: Tensor | None = None) -> None:
        """Texts and the picture's latent, unless it is known, before any loop."""
        self.begun = self.sd.evaluations
        asked, syntax = dict.fromkeys(["", *texts_of(self.plan.given)]), self.plan.settings["prompt_syntax"]
        with self.stage("text"):
            plain = syntax == "plain" or len(asked) == 1  # of the empty text every syntax makes the same
            self.texts = {text: self.sd.text([text]) if plain else self.sd.text([text], syntax) for text in asked}
        if not plain:
            self.texts = dict(zip(asked, prompts.same_length([*self.texts.values()], syntax)))
        if self.witness:
            self.witness.meet(self.texts, self.words_of)
        if self.picture:
            with self.stage("vae encode"):
                self.x0 = self.encode(images.to_tensor(self.picture, self.at)) if x0 is None else x0

    def encode(self, pixels: Tensor) -> Tensor:
        return finite(self.sd.encode(pixels), "the VAE")

    def x_T(self) -> tuple[Tensor, Any]:
        h, w = (side // self.sd.factor for side in reversed(self.at))
        seed = self.plan.settings["seed"]
        return noises((self.sd.channels, h, w), 1, seed).to(self.sd.device), seed

    def text(self, text: str) -> tuple[Tensor, Any]:
        """A text's embedding; it is known by its letters, and unless they are plain by what else made it."""
        syntax, found = self.plan.settings["prompt_syntax"], self.texts[text]
        return found, text if syntax == "plain" else [syntax, found.shape[1], text]

    def embedded(self, name: str) -> tuple[Tensor, Any]:
        """What a text's embedding is made of, to be learned. Raises ValueError for a text with weights."""
        text, syntax = self.plan.given[name], self.plan.settings["prompt_syntax"]
        if prompts.spoken(text, syntax) != text:
            raise ValueError(f"{self.plan.method} learns the vectors of {name}, which takes no weights, got {text!r}")
        return self.sd.embed([text]), text

    def pairs(self, name: str) -> tuple[list[tuple[Tensor, Tensor]], Any]:
        both = [[self.text(text) for text in pair] for pair in self.plan.given[name]]
        return [(source, target) for (source, _), (target, _) in both], [[key for _, key in pair] for pair in both]

    def words(self, name: str) -> tuple[Any, Any]:
        """Which positions the words of a text have, or those of pairs of texts, see methods/words.py."""
        given, of = self.plan.given[name], self.words_of
        try:
            for text in texts_of({name: given}):
                prompts.check_one_chunk(self.sd.tokenizer, text, self.plan.settings["prompt_syntax"])
        except ValueError:  # only a method that may do without words gets here (check_prompts)
            return None, given
        return of(given) if isinstance(given, str) else [[*map(of, pair)] for pair in given], given

    def words_of(self, prompt: str) -> Any:
        said = prompts.spoken(prompt, self.plan.settings["prompt_syntax"])
        return function_at("words:words_of")(self.sd.tokenizer, said)

    def points(self) -> tuple[list[tuple[tuple[int, int], ...]], Any]:
        """`places` as whole cells."""
        found, given = self.places()
        return [tuple((int(row), int(column)) for row, column in pair) for pair in found], given

    def places(self) -> tuple[list[tuple[tuple[float, float], ...]], Any]:
        """Places in pixels as (row, column) of the latent, 0 at its edge. ValueError for one outside the picture."""
        given = self.plan.given["points"]
        (width, height), (w, h) = self.picture.size, (side // self.sd.factor for side in self.at)  # type: ignore[union-attr]
        if any(x >= width or y >= height for pair in places(given) for x, y in pair):
            raise ValueError(f"points must lie in the picture of {width} x {height} pixels, got {given!r}")
        return [tuple((y * h / height, x * w / width) for x, y in pair) for pair in places(given)], given

    def mask(self) -> tuple[Tensor | None, Any]:
        """The mask as it is used: given or found, then steered; None where the method may do without."""
        M = self.given_mask
        if M is not None:
            self.verdict = "given"
        elif "mask" in self.plan.functions:
            found, _ = self.input("found")
            M, self.verdict = found.mask.float(), found.verdict[0]
            tensors = vars(found).items()
            self.tensors |= {name: one for name, one in tensors if isinstance(one, Tensor) and name != "mask"}
        elif self.steering:  # of what may change where no mask is given: all
            M, self.verdict = torch.ones_like(self.x0[:, :1]), "given"
        if M is not None and self.steering and self.verdict != "no difference":
            M = self.steering(M)
        return M, None if M is None else digest(M)

    def found(self) -> tuple[Any, Any]:
        """What the mask's function returned."""
        call = self.call("mask")
        return call.result, call.given

    def path(self) -> tuple[Path, Any]:
        call = self.call("path")
        finite(call.result[call.result.top], "the encoding")
        return call.result, [call.function, call.given]

    def pixels(self) -> Tensor:
        assert self.picture
        return images.to_tensor(self.picture, self.at).to(self.sd.device)

    def x0_outside(self) -> tuple[Tensor, Any]:
        """The latent of the picture with grey where the mask is not below one half."""
        assert self.picture
        M, known_by = self.input("mask")
        inside = F.interpolate(M.cpu(), (self.at[1], self.at[0]), mode="nearest") >= 0.5
        return self.encode(torch.where(inside, 0.0, images.to_tensor(self.picture, self.at))), known_by

    def encoded(self, name: str) -> tuple[Tensor, Any]:
        """Another picture's latent, at the working size."""
        pixels = images.to_tensor(images.to_rgb(images.read_picture(self.plan.given[name])), self.at)
        return self.encode(pixels), [digest(channel) for channel in (pixels / 2 + 0.5).split(1, dim=1)]

    def example(self) -> tuple[Tensor, Any]:
        """What Paint by Example's UNet reads of another picture, squeezed into a square as its authors do."""
        square = (self.sd.example_side,) * 2
        picture = images.to_rgb(images.read_picture(self.plan.given["reference"]))
        pixels = images.to_tensor(picture.resize(square, Image.Resampling.BICUBIC), square)
        return self.sd.example(pixels), [digest(channel) for channel in (pixels / 2 + 0.5).split(1, dim=1)]

    def placed(self, what: str) -> tuple[Tensor, Any]:
        """The reference's part laid into the mask's box, as large as fits: "placed", its latent, or "shape", where."""
        assert self.picture
        M, _ = self.input("mask")
        given = {name: self.plan.given[name] for name in ("reference", "reference_mask")}
        read = {name: images.read_picture(one) for name, one in given.items() if one is not None}
        rows, columns = ([int(one) for one in M[0, 0].amax(dim).nonzero()] for dim in (1, 0))
        box = [self.sd.factor * side for side in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
        laid, region = images.placed(self.picture.resize(self.at, Image.Resampling.LANCZOS), box, *read.values())
        pixels, shape = images.to_tensor(laid, self.at), images.latent_mask(region, self.at, self.at, self.sd.factor)
        known_by = [digest(one) for one in (*(pixels / 2 + 0.5).split(1, dim=1), shape)]
        return shape.to(self.sd.device) if what == "shape" else self.encode(pixels), known_by


# ---------------------------------------------------------------- the doors


def open_picture(sd: "StableDiffusion", image: Picture, size: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """The picture as RGB, and the (width, height) that the model works on."""
    picture = images.to_rgb(images.read_picture(image))
    side, grid = sd.side if size is None else size, getattr(getattr(sd, "unet", None), "grid", sd.factor)
    at = images.working_size(picture.size, side, sd.factor)
    if min(picture.size) >= grid and at != (few := images.working_size(picture.size, side, grid)):
        said = "{} x {} in place of {} x {}: compiled once for all pictures of about that shape".format(*few, *at)
        warnings.warn(f"the model works at {said}; the result has its picture's size", stacklevel=3)
        return picture, few
    return picture, at


def check_near(size: int | None, side: int) -> None:
    """Warn of a size that the model was not trained at, nor near it."""
    if size is not None and not side / 1.5 <= size <= side * 1.5:
        effect = "things come twice" if size > side else "pictures come apart"
        warnings.warn(f"size {size} is far from the {side} pixels that the model knows: {effect} there", stacklevel=3)


def check_takes_picture(plan: Plan) -> Plan:
    """The plan. Raises ValueError for one that begins with noise alone."""
    if "x_T" in inputs_of(plan.system.edit):
        raise ValueError(f"{plan.method} takes no picture: it begins with noise (`generate`)")
    return plan


def check_fits(plan: Plan, kind: str, name: str | None) -> None:
    """Raise ValueError where a method needs weights of another kind."""
    if plan.system.weights != kind:
        raise ValueError(
            f"{plan.method} needs {plan.system.weights} weights (a UNet with other input channels), and "
            f"{name or 'this model'} is {kind}; give another --model"
        )


def check_same(reuse: Result, sd: "StableDiffusion", picture: Image.Image, at: tuple[int, int]) -> None:
    if reuse.sd is not sd or reuse.settings["working_size"] != at:
        raise ValueError("reuse= holds a result by another model or at another working size (compiled: its own)")
    if reuse.source is None or reuse.source.size != picture.size or reuse.source.tobytes() != picture.tobytes():
        raise ValueError("reuse= holds a result of another picture")


def begin(
    plan: Plan,
    sd: "StableDiffusion",
    image: Picture,
    *,
    steering: Steering | None = None,
    reuse: Sequence[Result] = (),
    watch: Watch | None = None,
    witness: Any = None,
    bitwise: bool = False,
) -> Job:
    """A job with its picture, texts and given mask in hand; errors as `edit`."""
    check_fits(plan, sd.kind, sd.name)
    check_takes_picture(plan)
    picture, at = open_picture(sd, image, plan.settings["size"])
    check_near(plan.settings["size"], sd.side)
    job = Job(plan, sd, picture, at)
    if (mask := plan.given.get("mask")) is not None:
        job.given_mask = images.latent_mask(mask, picture.size, at, sd.factor).to(sd.device)
    if steering and not plan.steerable:
        raise ValueError(f"{plan.method} has no mask that could be steered")
    job.steering = steering.at(picture.size, at, sd.factor) if steering else None
    for one in reuse:
        check_same(one, sd, picture, at)
    job.known, job.watch, job.bitwise = [call for one in reuse for call in one.calls], watch, bitwise
    job.witness = witness
    job.prepare(reuse[0].x0 if reuse else None)
    return job


@torch.no_grad()
def execute(plan: Plan, sd: "StableDiffusion", image: Picture, **options: Any) -> Result:
    """Run a plan on a picture; options as in `begin`. Raises ValueError for unfit files, ArithmeticError for NaN."""
    job = begin(plan, sd, image, **options)
    latent, M, why = None, None, ""
    if "strength" in plan.settings and level_at(plan.settings["strength"], plan.settings.get("steps", 50)) == 0:
        M, _ = job.input("mask") if job.given_mask is not None else (None, None)
        job.verdict = "strength 0"
    else:
        M, _ = job.input("mask") if plan.masked else (None, None)
        if M is not None and M.any() and (box := square_around(job, M)):
            return edited_inside(job, M, box)
        if M is None or M.any():
            latent = finite(job.call("latent").result, "the edit")
            if "points" in plan.given and not job.evaluations[job.stage_of["latent"]]:  # nothing was asked of the model
                latent, why = None, f"no point goes to another cell of {sd.factor} pixels"
    if latent is None:
        why = why or nothing_to_edit(plan, job.verdict)
        warnings.warn(f"nothing to edit: {why}; the source comes back", stacklevel=3)
    return result_of(job, latent, M)


def square_around(job: Job, M: Tensor) -> tuple[int, int, int, int] | None:
    """The pixels (left, top, right, bottom) around a mask that the model works on alone, where that is asked for and
    shows them larger than the whole picture would: around all of it, else around its largest piece.
    """
    assert job.picture
    if not job.plan.settings.get("crop"):
        return None
    size, side = job.picture.size, 0
    cells = M.ge(min(HAZE, float(M.max()))).float()
    for inside in (cells, largest_piece(cells)):
        spans = [inside[0, 0].any(axis).nonzero() for axis in (0, 1)]
        ends = [(float(at.min()) * n / c, float(at.max() + 1) * n / c) for at, n, c in zip(spans, size, M.shape[:1:-1])]
        side = round(max(high - low for low, high in ends) * (1 + 2 * job.plan.settings["crop_margin"]))
        if (side := max(side, 8 * job.sd.factor)) <= MOST_CROPPED * min(size):
            left, top = (min(max(round((a + b - side) / 2), 0), n - side) for (a, b), n in zip(ends, size))
            if n := int((cells - inside).sum()):
                warnings.warn(f"crop edits the mask's largest piece; {n} other cells may stay", stacklevel=4)
            return left, top, left + side, top + side
    said = f"the mask and its margin take {side} of {min(size)} pixels: crop gains nothing, the whole is worked on"
    warnings.warn(said, stacklevel=4)
    return None


def edited_inside(job: Job, M: Tensor, box: tuple[int, int, int, int]) -> Result:
    """The same plan on the square alone, under the mask as it was found or given, and pasted back."""
    assert job.picture
    whole = result_of(job, None, M)
    places = {made: place for made, place in job.plan.functions.items() if made != "mask"}
    given = job.plan.given | {"mask": images.grey_picture(M, job.picture.size).crop(box)}
    mask = images.pixel_mask(job.plan.given.get("mask"), job.picture.size) if not job.steering else None
    given |= {"mask": mask[box[1] : box[3], box[0] : box[2]]} if mask is not None else {}
    plan = replace(job.plan, functions=places, given=given, settings=job.plan.settings | {"crop": False})
    inside = execute(plan, job.sd, job.picture.crop(box), watch=job.watch)
    image = job.picture.copy()
    image.paste(inside.image, box)
    pasted = Image.new("L", job.picture.size)
    pasted.paste(inside.paste_mask or 255, box)
    found: dict[str, Any] = {name: getattr(inside, name) for name in ("latent", "stages", "clean", "times")}
    for name in ("evaluations", "seconds"):
        one, two = getattr(whole, name), getattr(inside, name)
        found[name] = {key: one.get(key, 0) + two.get(key, 0) for key in one | two}
    settings = whole.settings | {"crop_box": [*box]}
    return replace(whole, image=image, paste_mask=pasted, settings=settings, inside=inside, **found)


def result_of(job: Job, latent: Tensor | None, M: Tensor | None) -> Result:
    """The pictures of a job and all that is known of it; latent None: nothing was edited."""
    plan, picture, sd = job.plan, job.picture, job.sd
    image, feathered = picture.copy() if picture else Image.new("RGB", job.at), None
    if M is None and plan.masked and (job.given_mask is not None or "mask" in plan.functions):
        M = torch.zeros_like(job.x0[:, :1])
    if latent is not None:
        with job.stage("vae decode"):
            shown = job.tensors.pop("pixels", None)  # of a method that decodes for itself
            shown = finite(sd.decode(latent) if shown is None else shown, "the VAE")
            image = images.to_picture(shown, picture.size if picture else job.at)
        if M is not None and picture and plan.settings["paste"]:
            feathered = images.paste_mask(M, picture.size)
            image = Image.composite(image, picture, feathered)
    if picture:
        image.info = dict(picture.info)
        job.stages["encode"] = [*job.values["path"][0].values()] if "path" in job.values else []
    job.values.clear()  # job.eps is among them: in a circle pictures would stay until Python sweeps
    decoding = job.stage_of["latent"]
    job.stages[decoding] = [*job.stages.get(decoding, []), latent] if latent is not None else []
    sought = "computed" if "mask" in plan.functions else "everywhere"
    kind = "none" if M is None else sought if job.given_mask is None else "given"
    settings = plan.record | {"working_size": job.at} | ({"mask": kind} if picture else {})
    used = {id(call) for call in job.calls}
    calls = [*(call for call in job.known if id(call) not in used), *job.calls][-MOST_CALLS:]
    settings |= {"steering": said} if job.steering and (said := job.steering.settings()) else {}
    kept = ("stages", "clean", "times", "tensors", "verdict", "evaluations", "seconds", "given_mask", "steering")
    return Result(
        method=plan.method,
        settings=settings,
        source=picture,
        image=image,
        mask=None if M is None or picture is None else images.mask_picture(M, picture.size),
        paste_mask=feathered,
        x0=job.x0 if picture else None,
        latent=job.x0 if latent is None else latent,
        latent_mask=M,
        plan=plan,
        calls=tuple(calls),
        sd=sd,
        witness=job.witness,
        **{name: getattr(job, name) for name in kept},
    )


def edit(
    sd: "StableDiffusion",
    image: Picture,
    method: str = "diffedit",
    *,
    target: str | None = None,
    source: str | None = None,
    mask: Picture | Tensor | None = None,
    negative_prompt: str | None = None,
    inversion: str | None = None,
    mask_from: str | None = None,
    steering: Steering | None = None,
    reuse: Result | Sequence[Result] = (),
    watch: Watch | None = None,
    witness: Any = None,
    bitwise: bool = False,
    progress: bool = False,
    **options: Any,
) -> Result:
    """Edit a picture so that `target` describes it, changing as little as possible, by any method of the table.

    image: path, PIL image or uint8 array; its shorter side is resized to the model's training size (or `size`), and the
    result has the input's size. method: a name that `minidiffedit methods` lists, or INVERSION+EDITOR; inversion:
    another one for the method; mask_from: another source of its mask ("words:horse"). source: what the picture shows
    now. mask: path, PIL image, array or tensor at picture or latent size, white = edited; where none is given, the part
    of the picture that is erased. steering: what to do with the mask, computed or given (see files/masks.py). options:
    the method's own (`minidiffedit methods NAME`), and those of every run (`common`): seed None draws one (with reuse:
    takes its). reuse: earlier results on the same picture by the same model, whatever the method; what still holds of
    them is not computed again (bitwise: only where that changes no bit). watch: called after each call of the model.
    witness: a `Witness`, which looks on at attention, for the page of the result. progress: show a bar on stderr.

    Where nothing is to edit the source comes back, and a warning says so. Raises ValueError for arguments and files it
    cannot use, before any weights are touched as far as it can, ArithmeticError for NaN.
    """
    earlier = [reuse] if isinstance(reuse, Result) else [*reuse]
    if earlier and options.get("seed") is None:
        options["seed"] = earlier[0].seed
    if mask is mask_from is None and images.has_hole(image, "mask" in blank_plan(method, inversion).given):
        mask = image
    given = {"target": target, "source": source, "mask": mask, "negative_prompt": negative_prompt}
    settled = plan(method, inversion=inversion, mask_from=mask_from, **given, **options)
    handles: dict[str, Any] = {"steering": steering, "reuse": earlier, "witness": witness, "bitwise": bitwise}
    if not progress:
        return execute(settled, sd, image, watch=watch, **handles)
    from .progress import bar

    with bar(settled, watch) as seen:
        return execute(settled, sd, image, watch=seen, **handles)


def resume(
    state: Result,
    *,
    mask: Picture | Tensor | None = None,
    steering: Steering | None = None,
    watch: Watch | None = None,
    witness: Any = None,
    **changes: Any,
) -> Result:
    """The edit again with some of `edit`'s arguments changed, equal to a fresh one to the model's rounding.

    A given mask stays until another comes or an option of the computed mask does; so does the steering. What the
    changes leave as it was is not paid for again. Raises as `edit` does.
    """
    settled, kept = changed(state.plan, changes, mask)
    mask = state.given_mask if kept else mask
    settled = replace(settled, given=settled.given | {"mask": mask} if settled.masked else settled.given)
    assert state.source  # only what worked on a picture is saved and goes on
    handles: dict[str, Any] = {"steering": steering or state.steering, "watch": watch, "witness": witness}
    done = execute(settled, state.sd, state.source, reuse=[state], **handles)
    if kept and "mask" in state.settings:
        done.settings["mask"] = state.settings["mask"]  # which may name the file
    return done


def changed(old: Plan, changes: dict[str, Any], mask: Any = None) -> tuple[Plan, bool]:
    """A plan with some arguments changed, and whether a mask that was given to it still holds."""
    if "method" in changes:
        raise ValueError("the method of a saved edit stays; edit(..., method=..., reuse=state) uses what still holds")
    own = {made: {*options_of(function_at(place))} for made, place in old.functions.items()}
    of_the_mask = own.pop("mask", set()) - set[str]().union(COMMON, *own.values())
    kept = mask is None and not changes.keys() & of_the_mask
    method = old.method if changes.get("inversion") is None else "+".join(filter(None, parts_of(old.method)[1:]))
    fresh = blank_plan(method, changes.get("inversion"))  # another inversion has other options
    wanted = {*fresh.needs} - {*old.needs}  # "", where a text may be left out, is none that was given
    unsaid = {name for name in wanted if isinstance(one := old.given.get(name), str) and not one}
    given = {name: one for name, one in old.given.items() if name in fresh.given and name not in unsaid | {"mask"}}
    arguments = {**given, **{name: value for name, value in old.settings.items() if name in fresh.options}, **changes}
    mask = old.given.get("mask") if kept else mask  # None in a plan that was read from a file
    return plan(method, mask=mask, **arguments), kept


def picture_mask(sd: "StableDiffusion", image: Picture, method: str = "diffedit", **arguments: Any) -> Result:
    """The mask that `edit` would use, alone, as a Result whose image is the source; arguments and errors as there."""
    handles = {name: arguments.pop(name) for name in ("steering", "watch") if name in arguments}
    return execute_mask(plan(method, **arguments), sd, image, **handles)


@torch.no_grad()
def execute_mask(settled: Plan, sd: "StableDiffusion", image: Picture, **options: Any) -> Result:
    """Run a plan as far as its mask; options as in `begin`."""
    if "mask" not in settled.functions:
        raise ValueError(f"{settled.method} finds no mask")
    job = begin(settled, sd, image, **options)
    M, _ = job.input("mask")
    if job.verdict == "no difference":
        warnings.warn(f"the mask is empty: {nothing_to_edit(settled, job.verdict)}", stacklevel=2)
    done = result_of(job, None, M)
    return replace(done, evaluations={"mask": done.evaluations["mask"]})


@torch.no_grad()
def execute_path(settled: Plan, sd: "StableDiffusion", image: Picture, **options: Any) -> Result:
    """Run a plan as far as its path; options as in `begin`. The result's image is the source."""
    job = begin(settled, sd, image, **options)
    job.input("path")
    done = result_of(job, None, None)
    return replace(done, evaluations={"encode": done.evaluations["encode"]}, verdict="encoded")


def plan_words(source: str, **options: Any) -> Plan:
    """A plan whose path goes up under the source: what it looks for is asked by `minidiffedit words`."""
    return plan("reconstruction", source=source, encode_text="source", **{"strength": 1.0} | options)


def generate(
    sd: "StableDiffusion",
    prompt: str,
    *,
    width: int | None = None,
    height: int | None = None,
    watch: Watch | None = None,
    **options: Any,
) -> Result:
    """Text to picture: plain guided DDIM from noise. width, height: pixels, multiples of 8 (default: training size);
    options: negative_prompt, steps, guidance_scale, seed. Model rows: 2 N, or N at guidance 1. Raises as `edit` does.
    """
    return execute_without_picture(plan("text-to-image", target=prompt, **options), sd, (width, height), watch)


@torch.no_grad()
def execute_without_picture(
    settled: Plan, sd: "StableDiffusion", size: tuple[int | None, int | None], watch: Watch | None = None
) -> Result:
    """Run a plan that starts from noise; size: (width, height) in pixels, None: the training size."""
    check_fits(settled, sd.kind, sd.name)
    check_near(min((side for side in size if side), default=None), sd.side)
    job = Job(settled, sd, None, picture_size(*size, sd.side, sd.factor))
    job.watch = watch
    job.prepare()
    return result_of(job, finite(job.call("latent").result, "the sampling"), None)


def picture_size(width: int | None, height: int | None, side: int, factor: int) -> tuple[int, int]:
    """The size of a picture to be made. Raises ValueError for one that is too large, or no multiple of `factor`."""
    w = side if width is None else whole("width", width, 64, 16384)
    h = side if height is None else whole("height", height, 64, 16384)
    if w % factor or h % factor:
        raise ValueError(f"width and height must be multiples of {factor}, got {w} x {h}")
    if w * h > images.MOST_PIXELS:
        raise ValueError(f"at most 1024 x 1024 pixels are made, got {w} x {h}")
    return w, h
