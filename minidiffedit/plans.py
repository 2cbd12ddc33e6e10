"""What a run is asked to do, settled and checked before any weights are read. What methods need is in their signatures.

A method's positional parameters are inputs (INPUTS says where each comes from), its keyword-only ones are options with
a default and a kind (options.py). One name is one value in a run, for inversion, mask and editor alike.
"""

import difflib
import inspect
import secrets
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from . import prompts
from .ddim import level_at, levels, real
from .methods.table import INVERSIONS, MASKS, SYSTEMS, System
from .options import About, Option, Seed, Within, is_text, options_of

if TYPE_CHECKING:
    from .job import Job

# ---------------------------------------------------------------- what a user gives, and what methods take


class Given(NamedTuple):
    """An argument of `edit` that is no option. kind: text, mask, picture, pairs or points."""

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
    crop_margin: Annotated[float, Within(0, 10, "shown around the mask, in sides of it", ("crop", False))] = 0.25,
) -> None:
    """The options of every run; the last two of those under a mask that may be any."""


COMMON = options_of(common)
CROPS = ("crop", "crop_margin")


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
    for place in found.functions.values():
        if check := beside(place, f"check_{place.partition(':')[2]}"):  # of how its options and texts fit together
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
    return beside(place, place.partition(":")[2])


def beside(place: str, name: str) -> Any:
    """What the module of "module:function" holds under a name, None where it holds nothing."""
    return getattr(import_module(f"{__package__}.methods.{place.partition(':')[0]}"), name, None)


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


# ---------------------------------------------------------------- what is checked


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
    except (TypeError, ValueError, OverflowError):
        found = []
    if not found or any(len(pair) != 2 for pair in found):
        raise ValueError(f"points must be places in pixels and where they go, 'x,y=>x,y; ...', got {value!r}")
    return found


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


def users(settled: Plan, name: str) -> set[str]:
    """Which of the "mask", the "path" and the "latent" an option or an argument decides, as the options stand."""
    found = set()
    for made, place in settled.functions.items():
        own = options_of(function_at(place))
        unread = name == "source" and "encode_text" in own and settled.settings["encode_text"] == "null"
        if name in own or (not unread and any(INPUTS[one].given == name for one in inputs_of(place))):
            found.add(made)
    return found


def idle(settled: Plan, asked: Collection[str], spell: Callable[[str], str] = str) -> list[str]:
    """Lines that name those of the options and arguments that were given which change nothing."""
    values, found = settled.settings | settled.given, dict[str, list[str]]()
    for name in sorted({*values} & {*asked}):
        one, by, why = settled.options.get(name), users(settled, name), ""
        other, value = one.unless if one and one.unless else ("", None)
        if other in values and (values[other] is None) == (value is None) and values[other] == value:
            why = f"with {spell(other)} {value}" if value else f"without {spell(other)}"
        elif name not in COMMON:
            own = by == {"mask"} and values.get("mask") is not None
            why = "under your own mask" if own else "" if by else f"with {spell('encode_text')} null"
        found.setdefault(why, []).append(name)
    return [f"{why} nothing depends on {', '.join(map(spell, names))}" for why, names in found.items() if why]


# ---------------------------------------------------------------- plans made of others


def changed(old: Plan, changes: dict[str, Any], mask: Any = None) -> tuple[Plan, bool]:
    """A plan with some arguments changed, and whether a mask that was given to it still holds."""
    if "method" in changes:
        raise ValueError("the method of a saved edit stays; edit(..., method=..., reuse=state) uses what still holds")
    own = {made: {*options_of(function_at(place))} for made, place in old.functions.items()}
    kept = mask is None and not changes.keys() & (own.pop("mask", set()) - set[str]().union(COMMON, *own.values()))
    method = old.method if changes.get("inversion") is None else "+".join(filter(None, parts_of(old.method)[1:]))
    fresh = blank_plan(method, changes.get("inversion"))  # another inversion has other options
    wanted = {*fresh.needs} - {*old.needs}  # "", where a text may be left out, is none that was given
    unsaid = {name for name in wanted if isinstance(one := old.given.get(name), str) and not one}
    given = {name: one for name, one in old.given.items() if name in fresh.given and name not in unsaid | {"mask"}}
    arguments = {**given, **{name: value for name, value in old.settings.items() if name in fresh.options}, **changes}
    mask = old.given.get("mask") if kept else mask  # None in a plan that was read from a file
    return plan(method, mask=mask, **arguments), kept


def plan_words(source: str, **options: Any) -> Plan:
    """A plan whose path goes up under the source: what it looks for is asked by `minidiffedit words`."""
    return plan("reconstruction", source=source, encode_text="source", **{"strength": 1.0} | options)
