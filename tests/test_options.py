"""Options as their signatures declare them: kinds, ranges, words, and what a shell or a table may write for them."""

import math
import re
from typing import Annotated, Literal, Optional, Union

import numpy as np
import pytest

from minidiffedit.options import About, Count, Option, Scale, Seed, Share, Steps, Strength, Within, option, options_of


def method(
    x0,
    text="",
    *,
    steps: Steps = 50,
    share: Annotated[float, Within(0, 1, "a share of its own")] = 0.25,
    scale: Scale = 7.5,
    form: Annotated[Literal["vp", "ve"], About("how it is written")] = "vp",
    grid: Literal[8, 16] = 8,
    paste: Annotated[bool, About("put back")] = True,
    name: str = "",
    plain: float = 1.0,
    record=None,
    earlier=None,
):
    """Positional parameters are inputs, `record` and `earlier` the runner's."""


FOUND = options_of(method)


def test_options_are_the_keyword_only_parameters_in_their_order():
    assert [*FOUND] == ["steps", "share", "scale", "form", "grid", "paste", "name", "plain"]
    assert FOUND["steps"] == Option("steps", 50, int, "sampling steps, 1..999", 1, 999)
    assert FOUND["share"] == Option("share", 0.25, float, "a share of its own", 0, 1)
    assert FOUND["form"] == Option("form", "vp", str, "how it is written", choices=("vp", "ve"))
    assert FOUND["grid"] == Option("grid", 8, int, choices=(8, 16))
    assert FOUND["paste"] == Option("paste", True, bool, "put back")
    assert FOUND["plain"] == Option("plain", 1.0, float)
    numeric = [name for name, one in FOUND.items() if one.numeric]
    assert numeric == ["steps", "share", "scale", "grid", "plain"]


def test_a_value_that_may_be_left_out():
    """Python 3.10 makes Optional of a hint whose default is None, and so hides the Annotated within."""

    def several(
        *,
        a: Seed | None = None,
        b: Annotated[int | None, Within(1, 9, "inside")] = None,
        c: Optional[Annotated[int, Within(1, 9, "inside")]] = None,  # noqa: UP045
        d: Union[None, Steps] = 3,  # noqa: UP007, RUF036
        e: Steps = None,  # type: ignore[assignment]
        f: Annotated[float | None, Within(1, 1e9)] = 3.0,
        g: Annotated[Annotated[int, Within(0, 5)], About("said last")] = 1,
    ):
        """In every way it can be written."""

    found = options_of(several)
    assert all(found[name].none for name in "abcdef") and not found["g"].none
    assert [found[name].high for name in "abcde"] == [2**63 - 1, 9, 9, 999, 999] and found["b"].about == "inside"
    assert (found["f"].low, found["f"].high, found["f"].type) == (1, 1e9, float)
    assert (found["g"].high, found["g"].about) == (5, "said last")
    assert found["a"].check(None) is None and found["a"].parse("none") is None and found["a"].parse("7") == 7
    with pytest.raises(ValueError, match="g must be a whole number"):
        found["g"].check(None)


def test_hints_may_be_words():
    """As `from __future__ import annotations` makes them."""
    space = {"Steps": Steps, "Literal": Literal}
    exec('def words(*, steps: "Steps" = 5, form: "Literal[\'a\', \'b\']" = "a"): ...', space)
    assert options_of(space["words"])["steps"].high == 999 and options_of(space["words"])["form"].choices == ("a", "b")


def test_options_without_a_kind_or_a_default_are_a_programmers_mistake():
    def no_kind(*, a=1): ...
    def no_default(*, a: int): ...
    def no_such_kind(*, a: list = ()): ...  # type: ignore[assignment]

    for function in (no_kind, no_default, no_such_kind):
        with pytest.raises(TypeError, match="option 'a' needs a default and a kind"):
            options_of(function)


@pytest.mark.parametrize("hint, default, value, expected", [
    (Steps, 50, np.int64(4), 4), (Strength, 0.8, np.float32(0.5), 0.5), (Strength, 0.8, 1, 1.0), (Scale, 7.5, -3, -3.0),
    (Seed, 0, 2**63 - 1, 2**63 - 1), (Share, 0.5, 0, 0.0), (Count, 0, np.uint8(7), 7), (bool, True, False, False),
    (str, "", "x", "x"), (Literal["a", "b"], "a", "b", "b"), (Literal[8, 16], 8, 16, 16), (float, 0.0, 1e9, 1e9),
])  # fmt: skip
def test_values_become_plain(hint, default, value, expected):
    checked = option("it", default, hint).check(value)
    assert checked == expected and type(checked) is type(expected)


@pytest.mark.parametrize("hint, default, value", [
    (Steps, 50, 0), (Steps, 50, 1000), (Steps, 50, 1.0), (Steps, 50, True), (Steps, 50, "50"), (Steps, 50, None),
    (Strength, 0.8, 1.01), (Strength, 0.8, math.nan), (Strength, 0.8, True), (Strength, 0.8, "0.8"),
    (Scale, 7.5, math.inf), (Scale, 7.5, 10**400), (Scale, 7.5, None),
    (Seed, 0, -1), (Seed, 0, 2**63), (Count, 0, np.float64(1)),
    (bool, True, 1), (bool, True, "true"), (bool, True, None), (str, "", 3), (str, "", None),
    (Literal["a", "b"], "a", "c"), (Literal["a", "b"], "a", None), (Literal[8, 16], 8, 9), (float, 0.0, 2e9),
])  # fmt: skip
def test_values_that_are_refused_name_the_option(hint, default, value):
    with pytest.raises(ValueError, match=r"^it must be "):
        option("it", default, hint).check(value)


@pytest.mark.parametrize("hint, default, text, expected", [
    (Steps, 50, "4", 4), (Strength, 0.8, ".5", 0.5), (Scale, 7.5, "-3", -3.0), (str, "", "None of it", "None of it"),
    (bool, True, "false", False), (bool, True, "No", False), (bool, False, "1", True), (bool, False, "Yes", True),
    (Literal["a", "b"], "a", "b", "b"), (Literal[8, 16], 8, "16", 16), (Steps | None, None, "none", None),
    (Steps | None, None, "NONE", None), (str | None, None, "none", None),
])  # fmt: skip
def test_words_are_read(hint, default, text, expected):
    one = option("it", default, hint)
    assert one.parse(text) == expected and one.check(one.parse(text)) == expected


@pytest.mark.parametrize("hint, default, text, wanted", [
    (Steps, 50, "4.0", "a whole number"), (Steps, 50, "", "a whole number"), (Strength, 0.8, "half", "a number"),
    (Steps | None, None, "nil", "a whole number or none"), (bool, True, "on", "true or false"),
    (Literal[8, 16], 8, "x", "a whole number"), (Steps, 50, "none", "a whole number"),
])  # fmt: skip
def test_words_that_say_nothing_are_refused(hint, default, text, wanted):
    with pytest.raises(ValueError, match=re.escape(f"it must be {wanted}, got {text!r}")):
        option("it", default, hint).parse(text)
