"""The kinds of options that methods have: what a door checks, and what commands, tables and pages say about them.

An option is a keyword-only parameter of a method's function. Its annotation says what it is:

    steps: Steps = 50                                                       # a kind from below
    first_step: Annotated[int, Within(0, 999, "steps before it")] = 4       # a kind of its own
    guidance: Annotated[Literal["cfg", "prox"], About("...")] = "cfg"       # one of several words
    paste: Annotated[bool, About("...")] = True
"""

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from .ddim import real, whole

HANDLES = ("record", "earlier", "told")  # keyword-only too, but the runner's: see job.py


class Within(NamedTuple):
    """A number in low..high, whole if the option is an int, and what it is. unless: another option or text, and the
    value of it with which this option changes nothing.
    """

    low: float
    high: float
    about: str = ""
    unless: tuple[str, Any] | None = None


class About(NamedTuple):
    """What an option is that has no range; unless: as above."""

    about: str
    unless: tuple[str, Any] | None = None


Steps = Annotated[int, Within(1, 999, "sampling steps, 1..999")]
Strength = Annotated[float, Within(0, 1, "how far up the noise the picture is taken, 0..1; less keeps more of it")]
Scale = Annotated[float, Within(-1000, 1000, "how strictly to follow the text")]
Sampler = Annotated[Literal["ddim", "dpmsolver++"], About("of first order, or of second, which needs fewer steps")]
Seed = Annotated[int, Within(0, 2**63 - 1, "of the noise, 0 and up")]
Share = Annotated[float, Within(0, 1, "a share, 0..1")]
Count = Annotated[int, Within(0, 100_000, "a whole number")]
Grey = Annotated[Literal["level", "blend"], About("of grey in a mask: the level it joins at, or a share at each level")]


@dataclass(frozen=True)
class Option:
    """One option as its function declares it. type: int, float, bool or str; choices: the words it may be, if any;
    none: whether None ("none" in a shell) may stand for a value.
    """

    name: str
    default: Any
    type: type
    about: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()
    none: bool = False
    unless: tuple[str, Any] | None = None

    @property
    def numeric(self) -> bool:
        return self.type in (int, float)

    def check(self, value: Any) -> Any:
        """The value as a plain Python one. Raises ValueError that names the option and what is wanted."""
        if value is None and self.none:
            return None
        if self.choices:
            if value not in self.choices:
                raise ValueError(f"{self.name} must be one of {', '.join(map(str, self.choices))}, got {value!r}")
            return self.choices[self.choices.index(value)]
        if self.name == "seed" and type(value) is int and value < 0:  # -1 is other tools' way to say "any"
            raise ValueError(f"seed must be 0 and up, got {value}; leave it out for a random one, which is told")
        if self.numeric:
            low, high = (-1e9, 1e9) if self.low is None or self.high is None else (self.low, self.high)
            return (whole if self.type is int else real)(self.name, value, *map(self.type, (low, high)))
        if not (is_text(value) if self.type is str else isinstance(value, self.type)):
            wanted = "True or False" if self.type is bool else "text (UTF-8)"
            raise ValueError(f"{self.name} must be {wanted}, got {value!r}")
        return value

    def parse(self, text: str) -> Any:
        """A word of a shell or a cell of a table as a value, not yet checked. Raises ValueError for what is none."""
        if self.none and text.lower() == "none":
            return None
        if self.type is bool:
            words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
            if text.lower() not in words:
                raise ValueError(f"{self.name} must be true or false, got {text!r}")
            return words[text.lower()]
        try:
            return self.type(text)
        except ValueError:
            wanted = ("a whole number" if self.type is int else "a number") + (" or none" if self.none else "")
            raise ValueError(f"{self.name} must be {wanted}, got {text!r}") from None


def is_text(value: Any) -> bool:
    """Whether a value is text that UTF-8 can hold."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The options of a function by name, in the order of its signature. Raises TypeError for one without a kind."""
    hints = get_type_hints(function, include_extras=True)
    found = [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return {p.name: option(p.name, p.default, hints.get(p.name)) for p in found if p.name not in HANDLES}


def option(name: str, default: Any, hint: Any) -> Option:
    kind, metadata, none = unwrapped(hint)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    kind = type(choices[0]) if choices else kind
    if kind not in (int, float, bool, str) or default is inspect.Parameter.empty:
        raise TypeError(f"option {name!r} needs a default and a kind (int, float, bool, str or Literal), got {hint!r}")
    low, high, about, unless = None, None, "", None
    for one in metadata:
        if isinstance(one, Within):
            low, high = one.low, one.high
        about, unless = getattr(one, "about", about), getattr(one, "unless", unless)
    return Option(name, default, kind, about, low, high, choices, none or default is None, unless)


def unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """Annotated[X | None, ...] and Annotated[X, ...] | None -> X, what is said of it, and whether None is a value."""
    metadata, none = tuple[Any, ...](), False
    while True:
        if hasattr(hint, "__metadata__"):
            hint, metadata = get_args(hint)[0], metadata + hint.__metadata__
        elif get_origin(hint) in (types.UnionType, Union) and type(None) in get_args(hint):
            (hint,) = (one for one in get_args(hint) if one is not type(None))
            none = True
        else:
            return hint, metadata, none
