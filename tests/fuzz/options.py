"""Options: out of range, contradictory, not numbers, huge; told by the ranges that `--help` states."""

import math
import random
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from minidiffedit import edit as edit_picture
from minidiffedit.run import blank_plan

from .harness import Case, World, drawn, edit
from .methods import FLAGS, METHODS, SOUND, takes
from .pictures import DIRECT

# What is accepted, written down apart from the code: lowest and highest, whole numbers or not.
WHOLE = {
    "steps": (1, 999), "maps": (1, 1000), "refine": (1, 100), "chunk": (1, 1000), "seed": (0, 2**63 - 1), "size": (64, 1024),
    "dilate": (-1024, 1024), "feather": (0, 1024),
}  # fmt: skip
NONE_IS_DEFAULT = ("chunk", "seed", "size")
REAL = {
    "strength": (0, 1), "mask-strength": (0, 1), "guidance-scale": (-1000, 1000), "mask-clip": (1, 1e9),
    "mask-threshold": (0, 1),
}  # fmt: skip
ODD = ["", " ", "nan", "-nan", "inf", "-inf", "1e999", "-1e999", "1e-400", "0x10", "1_000", "1,5", "½", "\u0661", "none", "None",
       "true", "9" * 5000, "-0", "+1", "1.", ".5", "1e2", "--", "\x1b", "1;rm", "1 2", "null", "1e", "0b1", "²"]  # fmt: skip

CONTRADICTIONS = (
    ["--target", "a", "--edit", "a=>b"], ["--mask", "mask.png", "--save-heat", "h.png"], ["--edit", "a=>b", "--mask",
    "mask.png"], ["--edit", "a=>b", "--invert"], ["--image", "in.png"],
    ["--save-mask", "out.png"], ["--save-mask", "in.png"], ["--save-state", "s.png"], ["--save-state", "s"], ["--save-mask",
    "m.gif"], ["--save-mask", "no/m.png"], ["--save-heat", "out.png"], ["--variant", "fp32"], ["--variant", "fp16"],
    ["--dtype", "int8"], ["--device", "tpu"], ["--device", "cuda:99"], ["--device", ""], ["--device", "meta"], ["--encode-text",
    "target"], ["--mask-t", ".5"], ["--unknown"], ["more"], ["--seed"], ["--cache-dir", "in.png",
    "--model", "a/b"], ["--cache-dir", "/proc/none", "--model", "a/b", "--local-files-only"], ["--union", "none.png"],
    ["--save-mask", "./out.png"], ["--save-state", "../no/such/in.png"],
)  # fmt: skip


def cases(world: World, rng: random.Random, scale: float) -> Iterator[Case]:
    def n(count: int) -> int:
        return max(2, round(count * scale))

    def of(name: str, text: str, accepted: bool) -> Case:
        return Case(
            f"--{name}={text[:20]}", edit("--dry-run", f"--{name}={text}"), expect="done" if accepted else "refused"
        )

    for name, (low, high) in WHOLE.items():
        values = [low, high, low - 1, high + 1, 0, -1, 10**30, -(10**30), 2**31, 2**63, 2**64]
        values += [rng.randint(low, high) for _ in range(n(6))]
        for value in values:
            yield of(name, str(value), low <= value <= high and (name != "size" or value >= 64))
        for text in ODD + drawn(st.floats().map(str), n(6), rng.randrange(2**32)):
            fits = whole(text) is not None and low <= whole(text) <= high  # type: ignore[operator]
            yield of(name, text, fits or (name in NONE_IS_DEFAULT and text.lower() == "none"))
    for name, bounds in REAL.items():
        values = [*bounds, bounds[0] - 1e-9, bounds[1] * (1 + 1e-9) + 1e-9, math.nan, math.inf, -math.inf]
        values += [rng.uniform(*bounds) for _ in range(n(6))] + drawn(st.floats(), n(10), rng.randrange(2**32))
        for value in values:
            yield of(name, repr(value), bounds[0] <= value <= bounds[1] and low_enough(name, value))
        for text in ODD:
            value = number(text)
            fits = value is not None and bounds[0] <= value <= bounds[1] and low_enough(name, value)
            yield of(name, text, fits or (name == "mask-clip" and text.lower() == "none"))
    for extra in CONTRADICTIONS:
        yield Case(f"{extra}", edit(*extra), expect="refused")
    for argv in ([], ["edit"], ["edit", "in.png"], ["nothing"], ["--target"], ["mask", "in.png"], ["generate"], ["resume"],
                 ["info"], ["edit", "in.png", "--target"], ["generate", "x", "--width", "100"], ["generate", "x", "--height",
                 "99999999999999"], ["generate", "x", "--width", "1024", "--height", "1032", "--model", "MODEL"],
                 ["sdedit", "in.png"], ["edit", "in.png", "--method", "none", "--target", "a"]):  # fmt: skip
        yield Case(f"{argv}", argv, expect="refused")
    for option, value in (("eta", "nan"), ("eta", "2"), ("repeats", "0"), ("strength", "1.1"), ("repeats", "99999999")):
        argv = ["edit", "in.png", "--method", "sdedit", f"--{option}", value]
        yield Case(f"{argv}", argv, expect="refused")

    yield from of_methods(rng)

    # Several at once, run to the end where all are in range.
    sets = st.fixed_dictionaries(
        {}, optional={
            "strength": st.floats(0, 1), "mask-strength": st.floats(0.5, 1), "guidance-scale": st.floats(-1000, 1000),
            "mask-clip": st.floats(1, 1e9), "mask-threshold": st.floats(0, 1), "dilate": st.integers(-9, 9), "feather":
            st.integers(0, 1024), "chunk": st.integers(1, 1000), "seed": st.integers(0, 2**63 - 1), "refine":
            st.integers(1, 3), "encode-text": st.sampled_from(["null", "source"]),
        },
    )  # fmt: skip
    flags = st.lists(st.sampled_from(["--largest", "--invert", "--no-paste", "--no-metadata", "--quiet"]), unique=True)
    for options, more in drawn(st.tuples(sets, flags), n(100), rng.randrange(2**32)):
        given = [f"--{name}={value}" for name, value in options.items()]
        yield Case(f"{given} {more}", edit(*given, *more), expect="any")

    anything: Any = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2),
        st.complex_numbers(), st.binary(max_size=3),
    )  # fmt: skip
    for name in (*WHOLE, *REAL, "encode-text"):
        if name not in ("dilate", "feather"):
            for value in drawn(anything, n(12), rng.randrange(2**32)):
                yield Case(f"Python: {name}={value!r}", call=direct(world, name.replace("-", "_"), value))


def of_methods(rng: random.Random) -> Iterator[Case]:
    """Each option of each method of the table, as its signature declares it: around its range, and what is none; beside
    all that the method needs, so that nothing but the option can be refused.
    """
    for method in METHODS:
        needed = [name for name, wanted in takes(method).items() if wanted]
        argv = ["edit", "in.png", "--method", method, "--dry-run"]
        argv += [f"{FLAGS.get(name, f'--{name}')}={SOUND[name]}" for name in needed]
        for option in blank_plan(method).options.values():
            flag = "--" + option.name.replace("_", "-")
            wrong: list[Any] = ["", rng.choice(("\x1b", "nan", "1e999", "9" * 5000, "1,5", "²", "true false"))]
            right = [*option.choices]
            if option.numeric and not option.choices and option.low is not None and option.high is not None:
                wrong += [option.low - 1, option.high * 2 + 1]
                right = [option.low, option.high, rng.uniform(option.low, option.high)]
            elif option.type is str and not option.choices:
                wrong = []
            if option.type is int:
                wrong[2:], right = map(int, wrong[2:]), [*map(int, right)]
            given = [(value, "refused") for value in wrong] + [(value, "any") for value in right]
            for value, expect in rng.sample(given, min(3, len(given))):
                words = option.name.replace("_", "[-_]")
                yield Case(f"{method} {flag}={str(value)[:20]}", [*argv, f"{flag}={value}"], expect=expect, words=words)


def direct(world: World, name: str, value: Any) -> Any:
    def call(sd: Any) -> None:
        from minidiffedit import plan
        from minidiffedit.cost import cost

        settings = dict(DIRECT, strength=0.8, guidance_scale=7.5, mask_strength=0.5, mask_clip=3.0, mask_threshold=0.5)
        settings |= dict(negative_prompt="", encode_text="null", refine=1, size=None, chunk=None) | {name: value}
        settled = plan(**settings)
        checked = settled.settings
        assert all(math.isfinite(v) for v in checked.values() if isinstance(v, float)), checked
        if sum(cost(settled).values()) < 50 and (checked["size"] or 64) <= 64:
            assert math.isfinite(edit_picture(sd, world.picture, **settings).latent.sum())

    return call


def whole(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def low_enough(name: str, value: float) -> bool:
    return True
