"""Texts of every kind, as target, source and negative prompt, from the command line and from Python."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from minidiffedit import edit as edit_picture
from minidiffedit import generate

from .harness import QUICK, Case, World, drawn
from .pictures import DIRECT

TEXTS = {
    "empty": "", "a blank": " ", "blanks": " \t\n  ", "10,000 words": "cat " * 10_000, "one word of 50,000": "c" * 50_000,
    "control characters": "a\x01\x02\x1b[31mcat\x07\x7f", "line ends": "a\ncat\r\nhere", "right to left": "قطة على العشب",
    "overrides of direction": "a \u202egod\u202c cat", "emoji": "🐈\u200d⬛ 👩\u200d👩\u200d👧", "combining": "c" + "\u0301" * 500,
    "Chinese": "草地上的猫" * 40, "not a character": "\ufffe\uffff", "beyond the plane": "\U0010ffff", "the start token":
    "<|startoftext|>", "the end token": "a <|endoftext|> cat", "both": "<|startoftext|>a cat<|endoftext|>" * 30, "an option":
    "--steps", "a path": "../../etc/passwd", "a format": "%s %n {0} {x}", "quotes": "\"'`$(touch executed)`", "A1111's":
    "(cat:1.3) [dog|cat] <lora:x:1>, Steps: 9", "HTML": "<script>alert(1)</script>", "JSON": '{"a": 1}', "zero width":
    "\u200b\u200c\u200d", "NaN": "nan", "a number": "1e999",
}  # fmt: skip
NO_TEXTS: tuple[Any, ...] = (None, 7, b"a cat", ["a cat"], "\ud800", "a\udfff", np.str_, float("nan"), {"a": 1})


def cases(world: World, rng: random.Random, scale: float) -> Iterator[Case]:
    def n(count: int) -> int:
        return max(2, round(count * scale))

    source = np.asarray(world.picture)

    def source_back(folder: Any) -> None:
        assert np.array_equal(np.asarray(Image.open(folder / "out.png")), source), "the source should have come back"

    rest = ["--steps", "2", "--maps", "1", "--seed", "3", "--model", "MODEL", "-o", "out.png", "--json"]
    for name, text in TEXTS.items():
        yield Case(f"target: {name}", ["edit", "in.png", f"--target={text}", *rest], expect="done")
        yield Case(f"source: {name}", ["edit", "in.png", f"--source={text}", "--target=a cat", *rest], expect="done")
        yield Case(
            f"negative: {name}", ["edit", "in.png", f"--negative-prompt={text}", "--target=a", *rest], expect="done"
        )
        yield Case(f"both: {name}", ["edit", "in.png", f"--source={text}", f"--target={text}", *rest], expect="done",
                   check=source_back)  # fmt: skip
        yield Case(f"generate: {name}", ["generate", "--steps", "2", "--model", "MODEL", "-o", "out.png", "--", text],
                   expect="done")  # fmt: skip
        yield Case(f"pair: {name}", ["edit", "in.png", f"--edit={text}=>a cat", *rest], expect="any")
    for bad in ("a \udcff cat", "\udc80"):
        for option in ("target", "source", "negative-prompt"):
            yield Case(f"{option}: {bad!r}", ["edit", "in.png", *QUICK, f"--{option}={bad}", "--model", "MODEL", "-o",
                       "out.png"], expect="refused", words="must be text")  # fmt: skip
    for pair in ("", "a", "=>", "a=>", "=>b", "a=>b=>c", "a=b", "\udcff=>a"):
        yield Case(f"pair {pair!r}", ["edit", "in.png", f"--edit={pair}", *rest], expect="any")
    for bad in NO_TEXTS:
        for name in ("target", "source", "negative_prompt"):
            left_out = bad is None and name != "target"
            expect = "any" if left_out else "refused"
            yield Case(f"Python: {name} is {bad!r}", expect=expect, call=direct(world, {name: bad}))
        yield Case(f"Python: generate {bad!r}", expect="refused", call=lambda sd, bad=bad: generate(sd, bad, steps=1))
    for text in drawn(st.text(max_size=300), n(120), rng.randrange(2**32)):
        sound = text == text.encode(errors="ignore").decode()
        yield Case(f"Python: {text[:12]!r}", expect="any" if sound else "refused", call=direct(world, {"target": text}))
    for text in drawn(st.text(st.characters(exclude_characters="\0"), max_size=90), n(80), rng.randrange(2**32)):
        try:
            text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            continue  # no command line can hold it
        yield Case(f"target: {text[:12]!r}", ["edit", "in.png", f"--target={text}", *rest])


def direct(world: World, texts: dict[str, Any]) -> Any:
    def call(sd: Any) -> None:
        done = edit_picture(sd, world.picture, **DIRECT | texts)
        assert np.isfinite(done.latent.numpy()).all()

    return call
