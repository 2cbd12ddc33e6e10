"""Every row of the table, run on the tiny model: inputs of every kind, options over their ranges, and what other methods
and other models left behind.

What each row needs and may take stands in TAKES, apart from the code; a row that is not there is taken at its word.
"""

import inspect
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import example
import numpy as np
import tiny
import torch
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minidiffedit import Result, StableDiffusion, plan, resume
from minidiffedit.cost import cost
from minidiffedit.files.metadata import describe_result
from minidiffedit.files.results import settings_in
from minidiffedit.files.states import checksum, load_state, save_state
from minidiffedit.methods.table import INVERSIONS, MASKS, SYSTEMS
from minidiffedit.run import blank_plan, execute, function_at

from . import manifests, pictures, prompts
from .harness import Case, World, nothing
from .pictures import encoded, write

METHODS = [name for name, row in SYSTEMS.items() if row.edit and name != "text-to-image"]
# Inputs -> the rows that take them; what ends in ! cannot be left out.
TAKES = {
    "target! source negative_prompt mask": "diffedit mask-only",
    "edits! source negative_prompt": "diffedit-regions",
    "mask! target! source negative_prompt": "user-mask instructedit",
    "target! source negative_prompt": "encode-only plug-and-play",
    "source": "reconstruction",
    "target negative_prompt mask": "sdedit",
    "mask! target! negative_prompt": "blended-latent-diffusion mfl sd-inpainting inpaint-anything",
    "target!": "null-text-guidance sds baret imagic",
    "reference! target negative_prompt": "noise-diffusion",
    "target! source": "replay direct-inversion edit-friendly-ddpm edict masactrl masactrl-union tic-inversion kv-inversion",
    "source! target!": "null-text-inversion negative-prompt-inversion pnp-inversion cycle-diffusion proxedit prox-masactrl "
    "prompt-to-prompt dds pix2pix-zero cds dpl style-diffusion disentanglement sine latent-inversion",
    "edits! source mask": "ledits++",
    "target! source mask": "sde-diffedit",
    "points! source mask": "sde-drag drag-diffusion drag-noise dragon-diffusion",
    "mask! source! target!": "pfb-diff mag-edit",
    "reference! target! source mask": "ti-guided-edit",
    "reference! source": "cross-image-attention",
    "reference! mask! target! reference_mask": "tf-icon",
    "instruction!": "instruct-pix2pix magicbrush hive",
    "instruction! mask": "watch-your-steps",
    "mask! reference!": "paint-by-example",
}  # fmt: skip
SOUND = {
    "target": "a zebra on grass", "source": "a horse on grass", "negative_prompt": "blur", "instruction": "make it snow",
    "edits": "a horse=>a zebra", "points": "40,30=>52,40", "mask": "mask.png", "reference": "in.png", "reference_mask":
    "mask.png",
}  # fmt: skip
TEXTS = ("target", "source", "negative_prompt", "instruction")
FLAGS = {"edits": "--edit", "negative_prompt": "--negative-prompt", "reference_mask": "--reference-mask"}
FEW = {
    name: 1 for name in ("maps", "moves", "inner_steps", "iterations", "lora_steps", "text_steps", "nudges", "batch")
}
FEW |= {"steps": 2, "seed": 3, "rank": 2}
LOOPS = {*FEW, "refine", "repeats", "fit_steps"} - {"seed", "rank"}  # what a run takes longer for
# The rows that look at words, which a text may lack or may not have one of its own.
OF_WORDS = {
    "null-text-inversion", "negative-prompt-inversion", "pnp-inversion", "prompt-to-prompt", "dpl", "style-diffusion",
    "mag-edit", "pfb-diff", "ledits++", "masactrl", "masactrl-union", "prox-masactrl", "tic-inversion",
}  # fmt: skip
LONG = {f"{n} words": "cat " * n for n in (73, 74, 75, 76, 77, 150, 151)} | {"other words": "una cebra en la hierba"}
POINTS: dict[str, tuple[Any, ...]] = {
    "done": (
        "0,0=>90,69", "90,69=>0,0", "9,9=>9,9", "40.5,30.25=>1e1,2e1", "90.99,69.99=>0,0", [((1, 2), (30, 40))], [[[1, 2], [3, 4]]],
        "; ".join(["9,9=>40,30"] * 3), "9,9=>40,30; 40,30=>9,9", np.array([[[1, 2], [30, 40]]]), "; ".join(
            f"{i % 91},{i % 70}=>{i % 89},{i % 67}" for i in range(2000)
        ),
    ),
    "refused": (
        "", " ", "9,9", "9,9=>", "=>9,9", "9,9=>1,1=>2,2", "9=>4", "9,9,9=>1,1,1", "nan,9=>1,1", "inf,9=>1,1", "-1,9=>1,1",
        "91,9=>1,1", "9,9=>9,70", "1e7,1=>1,1", "a,b=>c,d", "9;9=>1;1", 7, b"9,9=>1,1", [], [[]], [(1, 2)], [((1, 2), (3,))],
        {"a": 1}, [(("a", 1), (1, 1))], [((None, 1), (1, 1))], "9,9=>1,1;;", "\ud800", [((1, 2), (3, 4), (5, 6))], object(),
        "9,9=>" + "9" * 400 + ",1", np.full((1, 2, 2), np.nan), "x" * 50_000,
    ),
}  # fmt: skip
PAIRS: dict[str, tuple[Any, ...]] = {
    "done": ("a=>b", [("a", "b")], (["a", "b"],), "a=>b; c=>d", "a=>" + "b " * 10_000, "; ".join(["a=>b"] * 9), "\U0001f40e=>\U0001f993"),
    "any": ("", "=>", "a=>", "=>b", "a=>a", " => ", "a=>b;", "a\n=>b", "\x1b[2J=>b"),
    "refused": ("a", "a=>b=>c", "a=>b; c", [], (), [("a",)], [("a", "b", "c")], [7], [("a", 7)], [(None, "b")], {"a": "b"}, 7,
                "\ud800=>b", [("a", "\ud800")], ["ab"], [[["a"], ["b"]]], b"a=>b", object()),
}  # fmt: skip
WORDS = (
    "", " ", ",", ",,", "zebra", "ZEBRA", "zeb", "horse", "grass", "on grass", "zebra,zebra", "zebra, grass", "zebra=2", "zebra=",
    "=2", "zebra=nan", "zebra=1e999", "zebra=-1", "zebra==2", "zebra=0.5, grass=.5", "1", "1,2", "1,2,3", "nan", "-1", "1e999", "0x1",
    "\x1b[2J", "zebra " * 10_000, "1," * 5000, "\U0001f993", "<|endoftext|>", "%s",
)  # fmt: skip
REFUSED_WORDS = ("unicorn", "unicorn=2", "zebra, unicorn", "\ud800")  # which no text here has, and no number is


def cases(world: World, rng: random.Random, scale: float) -> Iterator[Case]:
    rows = Rows(world, rng, scale)
    for group in (
        rows.needs, rows.texts, rows.words, rows.points, rows.pairs, rows.references, rows.masks, rows.options, rows.strangers,
        rows.names, rows.weights, rows.reused, rows.states, rows.like, rows.add_ons, rows.batches, rows.without_picture,
    ):  # fmt: skip
        yield from group()


@cache
def takes(method: str) -> dict[str, bool]:
    """What a row may be given, and whether it cannot do without."""
    for inputs, names in TAKES.items():
        if method in names.split():
            return {one.rstrip("!"): one.endswith("!") for one in inputs.split()}
    blank = blank_plan(method)
    return {name: name in blank.needs for name in blank.given}


@cache
def own_options(method: str) -> frozenset[str]:
    """Of the row's functions and of every run."""
    row = SYSTEMS[method]
    places = [row.edit, INVERSIONS.get(row.inversion), MASKS.get(row.mask)]
    found = {"paste", "seed", "size", "prompt_syntax"}
    found |= {"crop", "crop_margin"} if "mask" in takes(method) and "points" not in takes(method) else set()
    for place in filter(None, places):
        signature = inspect.signature(function_at(place)).parameters.values()
        found |= {one.name for one in signature if one.kind is one.KEYWORD_ONLY}
    return frozenset(found - {"record", "earlier", "told"})


class Rows:
    def __init__(self, world: World, rng: random.Random, scale: float):
        self.world, self.rng, self.scale = world, rng, scale
        self.models: dict[str, Any] = {"base": world.sd}
        self.known: dict[str, Result] = {}

    def n(self, count: int) -> range:
        return range(max(2, round(count * self.scale)))

    def some(self, values: Any, count: int) -> list[Any]:
        """So many of them at scale 1, drawn; of a set the same ones in every process."""
        values = sorted(values) if isinstance(values, set | frozenset) else [*values]
        return self.rng.sample(values, min(len(values), len(self.n(count))))

    # ---------------------------------------------------------------- what a case does

    def model(self, kind: str) -> Any:
        if kind not in self.models:
            channels = {"instruct": 8, "inpainting": 9}
            folder = (
                example.write_folder(self.world.root / kind)
                if kind not in channels
                else tiny.write_folder(self.world.root / kind, channels=channels[kind], unet=tiny.QUICK)
            )
            self.models[kind] = StableDiffusion.load(folder, device="cpu")
        return self.models[kind]

    def arguments(self, method: str, every: bool = False) -> dict[str, Any]:
        """What the row needs (every: all that it takes) and few steps."""
        given = {name: SOUND[name] for name, needed in takes(method).items() if needed or every}
        return given | {name: value for name, value in FEW.items() if name in own_options(method)}

    def planned(self, name: str, method: str, expect: str, words: str = "", **changed: Any) -> Case:
        """No model: what can be told of the arguments alone."""
        arguments = self.arguments(method) | changed
        return Case(f"{method}: {name}", call=lambda sd: plan(method, **arguments), expect=expect, words=words)

    def real(
        self,
        name: str,
        method: str,
        expect: str = "done",
        words: str = "",
        make: Any = nothing,
        see: Any = None,
        **changed: Any,
    ) -> Case:
        arguments = self.arguments(method) | changed
        return Case(
            f"{method}: {name}", make=make, call=lambda sd: self.run(method, arguments, see), expect=expect, words=words
        )

    def run(
        self, method: str, arguments: dict[str, Any], see: Callable[[Result], Any] | None = None, **more: Any
    ) -> Result:
        """A run, and what holds of every one that was not refused."""
        settled, picture = plan(method, **arguments), self.world.picture
        sd = self.model(settled.system.weights)
        pixels, state = np.asarray(picture).copy(), torch.random.get_rng_state()
        done = execute(settled, sd, picture, **more)
        assert torch.isfinite(done.latent).all(), "a latent that is not finite"
        assert done.image.size == picture.size and done.image.mode == "RGB", f"{done.image.mode} {done.image.size}"
        assert np.array_equal(np.asarray(picture), pixels), "the source was changed"
        assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
        json.dumps(done.settings, allow_nan=False)
        describe_result(done)
        if done.paste_mask is not None:
            held, image = np.asarray(done.paste_mask) == 0, np.asarray(done.image)
            assert np.array_equal(image[held], pixels[held]), "pixels outside the mask changed"
        if see:
            see(done)
        return done

    def fresh(self, method: str, **changed: Any) -> Result:
        """What a row gives by itself, run once."""
        key = f"{method} {changed}"
        if key not in self.known:
            self.known[key] = self.run(method, self.arguments(method) | changed)
        return self.known[key]

    def command(
        self, name: str, argv: list[str], expect: str = "any", words: str = "", make: Any = nothing, check: Any = None
    ) -> Case:
        return Case(name, [*argv, "--model", "MODEL", "-o", "out.png", "--json"], make, expect, words, check)

    def flags(self, arguments: dict[str, Any]) -> list[str]:
        return [f"{FLAGS.get(name, '--' + name.replace('_', '-'))}={value}" for name, value in arguments.items()]

    @cached_property
    def source(self) -> np.ndarray:
        return np.asarray(self.world.picture)

    # ---------------------------------------------------------------- what is needed, and what is not taken

    def needs(self) -> Iterator[Case]:
        for method in METHODS:
            yield self.real("what it needs", method)
            yield self.real("all that it takes", method, **self.arguments(method, every=True))
            for name, value in SOUND.items():
                if takes(method).get(name):
                    yield self.planned(f"no {name}", method, "refused", f"needs .*{name}", **{name: None})
                elif name not in takes(method):
                    yield self.planned(f"{name} besides", method, "refused", f"no option '{name}'", **{name: value})
            argv = ["edit", "in.png", "--method", method, "--dry-run"]
            if (
                needed := [name for name in takes(method) if takes(method)[name]]
            ) and self.rng.random() < 4 * self.scale:
                few = {name: SOUND[name] for name in needed[1:]}
                yield self.command(f"{method}: a command without {needed[0]}", [*argv, *self.flags(few)], "refused")
            for name in self.some(SOUND.keys() - takes(method).keys(), 2):
                given = {one: SOUND[one] for one in needed} | {name: SOUND[name]}
                yield self.command(f"{method}: a command with {name}", [*argv, *self.flags(given)], "refused")

    def strangers(self) -> Iterator[Case]:
        """Options of one row given to another."""
        every = sorted({option for method in METHODS for option in own_options(method)})
        for method in METHODS:
            for name in self.some(set(every) - own_options(method), 24):
                yield self.planned(f"another's {name}", method, "refused", f"no option '{name}'", **{name: 1})
            for name in self.some(set(every) - own_options(method), 2):
                given = {one: SOUND[one] for one, needed in takes(method).items() if needed} | {name: 1}
                argv = ["edit", "in.png", "--method", method, "--dry-run", *self.flags(given)]
                yield self.command(f"{method}: a command with another's {name}", argv, "refused")

    # ---------------------------------------------------------------- inputs of every kind

    def texts(self) -> Iterator[Case]:
        many = prompts.TEXTS | LONG
        for method in METHODS:
            sure = "any" if method in OF_WORDS else "done"
            own = [name for name in TEXTS if name in takes(method)]
            for name in own:
                for kind, text in many.items():
                    draw = self.rng.random()
                    if draw < 0.2 * self.scale:
                        yield self.real(f"{name}: {kind}", method, sure, **{name: text})
                    elif draw < 0.5 * self.scale:
                        yield self.planned(f"{name}: {kind}", method, sure, **{name: text})
                for bad in self.some((7, b"a", ["a"], "\ud800", 1.5, {"a": 1}, True), 4):
                    yield self.planned(f"{name} is {bad!r}", method, "refused", "must be text", **{name: bad})
            for _ in self.n(4) if own else ():
                drawn = {name: self.rng.choice([*many.values()]) for name in own}
                syntax = self.rng.choice(("plain", "a1111", "compel"))
                yield self.real(
                    f"{syntax}, {[text[:9] for text in drawn.values()]}", method, "any", prompt_syntax=syntax, **drawn
                )
            if own:
                same = {name: "a horse on grass" for name in own}
                yield self.real("one text for all", method, sure, **same)

    def words(self) -> Iterator[Case]:
        """Options that name words of the texts or list numbers."""
        for method in METHODS:
            for name, option in blank_plan(method).options.items():
                if option.type is str and not option.choices:
                    for value in self.some(WORDS, 20):
                        yield self.real(
                            f"{name}={value[:20]!r}", method, "any", source=SOUND["source"], **{name: value}
                        )
                    for value in REFUSED_WORDS:
                        yield self.real(f"{name}={value!r}", method, "refused", source=SOUND["source"], **{name: value})
                    for value in (7, b"zebra", ["zebra"]):
                        yield self.planned(
                            f"{name}={value!r}", method, "refused", name, source=SOUND["source"], **{name: value}
                        )

    def points(self) -> Iterator[Case]:
        for method in (one for one in METHODS if "points" in takes(one)):
            for expect, values in POINTS.items():
                for value in values:
                    words = "points must" if expect == "refused" else ""
                    case = self.real(f"points {str(value)[:20]!a}", method, expect, words, points=value)
                    yield replace(case, megabytes=500)  # each of 2,000 points that lead by gradients has its own graph
            for _ in self.n(30):
                ends = [
                    f"{self.rng.uniform(0, 90.9):g},{self.rng.uniform(0, 69.9):g}"
                    for _ in range(2 * self.rng.randint(1, 4))
                ]
                drawn = "; ".join("=>".join(pair) for pair in zip(ends[::2], ends[1::2]))
                yield self.real(f"points {drawn[:30]}", method, points=drawn)

    def pairs(self) -> Iterator[Case]:
        for method in (one for one in METHODS if "edits" in takes(one)):
            for expect, values in PAIRS.items():
                for value in values:
                    yield self.real(f"edits {value!a:.30}", method, expect, edits=value)

    def references(self) -> Iterator[Case]:
        """Another picture: of any size and mode, damaged, none."""
        picture = self.world.picture
        several = {"save_all": True, "append_images": [Image.new("RGB", (91, 70), "red")] * 2}
        sound: dict[str, Any] = {
            "1 pixel": Image.new("RGB", (1, 1), "red"), "1 x 400": Image.new("RGB", (1, 400)), "black": Image.new("RGB", (91, 70)),
            "large": Image.new("RGB", (3000, 2000), "green"), "CMYK": encoded(picture.convert("CMYK"), "JPEG"), "animated":
            encoded(picture, "WEBP", **several), "a palette": encoded(picture.convert("P"), "PNG"), "transparent":
            Image.new("RGBA", (50, 50)), "16 bits": pictures.of_mode(picture, "I;16"), "1 bit": picture.convert("1"), "grey": picture.convert("LA"),
        }  # fmt: skip
        none = {name: content for name, content in pictures.NONE.items()}
        for method in (one for one in METHODS if "reference" in takes(one)):
            for name, one in sound.items():
                content = one if isinstance(one, bytes) else encoded(one, "PNG")
                yield self.real(f"reference: {name}", method, make=write("bad.png", content), reference="bad.png")
                if not isinstance(one, bytes):
                    yield self.real(f"reference: {name}, in memory", method, "any", reference=one)
            for name, content in none.items():
                yield self.real(
                    f"reference: {name}", method, "refused", "bad.png", write("bad.png", content), reference="bad.png"
                )
            for name, put in pictures.PLACES.items():
                yield self.real(f"reference: {name}", method, "refused", "bad.png", put, reference="bad.png")
            for name, one in pictures.objects().items():
                yield self.real(f"reference: {name}", method, "refused", reference=one)
        grey = Image.new("L", (91, 70), 128)
        for method in (one for one in METHODS if "reference_mask" in takes(one)):
            shapes = {
                "all": ("any", Image.new("L", (91, 70), 255)),
                "nothing": ("refused", Image.new("L", (91, 70))),
                "grey": ("any", grey),
            }
            shapes |= {
                "of another size": ("refused", Image.new("L", (9, 9), 255)),
                "NaN": ("refused", np.full((70, 91), np.nan)),
            }
            for name, (expect, one) in shapes.items():
                yield self.real(f"reference_mask: {name}", method, expect, reference_mask=one)

    def masks(self) -> Iterator[Case]:
        half = np.zeros((70, 91), np.uint8)
        half[:, 40:] = 255
        soft = np.random.default_rng(1).random((8, 10), dtype=np.float32)
        kinds: dict[str, tuple[str, Any]] = {
            "all 1": ("done", Image.new("L", (91, 70), 255)), "grey": ("done", Image.new("L", (91, 70), 128)), "value 1":
            ("done", Image.new("L", (91, 70), 1)), "soft cells": ("done", soft), "hard cells": ("done", soft > 0.5), "16 bits":
            ("done", half.astype(np.uint16) * 257), "one cell": ("done", np.eye(8, 10, dtype=bool) & (np.arange(10) == 3)), "tiny values":
            ("done", np.full((8, 10), 1e-30, np.float32)), "of another size": ("refused", np.ones((9, 9), np.uint8)), "NaN":
            ("refused", np.full((8, 10), np.nan)), "2": ("refused", np.full((8, 10), 2.0)), "text": ("refused", "mask?"), "none":
            ("refused", "no.png"), "a tensor": ("done", torch.from_numpy(soft)), "colours": ("any", self.world.picture),
        }  # fmt: skip
        for method in METHODS:
            if "mask" not in takes(method):
                for name, (_, mask) in self.some(kinds.items(), 3):
                    yield self.planned(f"a mask besides: {name}", method, "refused", "no option 'mask'", mask=mask)
                continue
            for name, (expect, mask) in kinds.items():
                yield self.real(f"mask: {name}", method, expect, mask=mask)
            for name, mask in (("nothing", np.zeros((8, 10))), ("a black picture", Image.new("L", (91, 70)))):
                yield self.real(f"mask: {name}", method, see=self.source_back, mask=mask)
            for paste in (True, False):
                yield self.real(
                    f"mask: half, paste {paste}", method, see=self.left_alone if paste else None, mask=half, paste=paste
                )
            for _ in self.n(4):
                edge = self.rng.randrange(8, 80)
                some = np.where(np.arange(91) < edge, 0, 255).astype(np.uint8)[None].repeat(70, 0)
                crop = {"crop": True} if "crop" in own_options(method) and self.rng.random() < 0.5 else {}
                yield self.real(
                    f"mask: from column {edge} {crop}",
                    method,
                    "any",
                    see=lambda done, at=edge: self.held(done, at - 24),
                    mask=some,
                    **crop,
                )

    def source_back(self, done: Result) -> None:
        assert np.array_equal(np.asarray(done.image), self.source), "the source should have come back"

    def left_alone(self, done: Result) -> None:
        self.held(done, 16)
        assert not np.array_equal(np.asarray(done.image), self.source), "nothing was edited"

    def held(self, done: Result, column: int) -> None:
        """Far from the mask, which lies to the right, nothing may change."""
        left = (slice(None), slice(0, max(column, 0)))
        assert np.array_equal(np.asarray(done.image)[left], self.source[left]), "pixels far outside the mask changed"

    # ---------------------------------------------------------------- options, names, weights

    def value(self, option: Any) -> Any:
        """One of its range: an end, or between; loops stay short."""
        rng, high = self.rng, option.high
        if option.choices:
            return rng.choice(option.choices)
        if option.type is bool:
            return rng.random() < 0.5
        if option.type is int:
            high = min(high, option.low + 3) if option.name in LOOPS else 96 if option.name == "size" else high
            high = min(high, 64) if option.name in ("rank", "chunk") else high
            return rng.choice(
                (int(option.low), int(high), rng.randint(int(option.low), int(min(high, option.low + 12))))
            )
        if option.type is float:
            middle = rng.uniform(option.low, high) if high <= 10 else 10 ** rng.uniform(-3, 1)
            return float(rng.choice((option.low, high, middle, middle, middle)))
        return rng.choice((None, "zebra"))

    def options(self) -> Iterator[Case]:
        for method in METHODS:
            known = blank_plan(method).options
            for number in self.n(20):
                names = self.rng.sample([*known], min(len(known), self.rng.randint(1, 6)))
                drawn = {name: self.value(known[name]) for name in names}
                said = ", ".join(f"{name}={value!s:.8}" for name, value in drawn.items())
                given = self.arguments(method, every=self.rng.random() < 0.5) | drawn
                paid = partial_cost(method, given) if number % 4 == 0 else None
                yield self.real(said, method, "any", see=paid, **given)

    def names(self) -> Iterator[Case]:
        for _ in self.n(220):
            method = self.rng.choice(METHODS)
            before = [self.rng.choice([*INVERSIONS])] * (bool(SYSTEMS[method].inversion) or self.rng.random() < 0.1)
            before += [self.rng.choice([*MASKS])] * (self.rng.random() < (0.6 if "mask" in takes(method) else 0.05))
            name = "+".join([*before, method])
            given = {one: SOUND[one] for one in takes(method)} | {
                "source": SOUND["source"],
                "target": SOUND["target"],
                "steps": 2,
            }
            given = {one: value for one, value in given.items() if one in takes(method) or one == "source"}
            yield Case(f"{name}", call=lambda sd, name=name, given=given: self.combined(name, given), expect="any")
        odd = ("", "+", "++", "ddim+", "ddim+ddim+diffedit", "words+words+diffedit", "diffedit+ddim", "no+diffedit", "DIFFEDIT",
               "diffedit ", "\x1b[2J", "x" * 5000, "../diffedit", "sora", "controlnet", "ddim++diffedit", "\ud800", "None", "ddim+sora")  # fmt: skip
        for name in odd:
            yield Case(
                f"a method called {name[:12]!a}", call=lambda sd, name=name: plan(name, target="a"), expect="refused"
            )
        for name in (7, None, ["diffedit"], b"diffedit", {"a": 1}):
            yield Case(f"a method {name!r}", call=lambda sd, name=name: plan(name, target="a"), expect="refused")  # type: ignore[arg-type]

    def combined(self, name: str, given: dict[str, Any]) -> None:
        known = blank_plan(name).options
        few = {one: value for one, value in FEW.items() if one in known}
        self.run(
            name, {one: value for one, value in given.items() if one in known or one in blank_plan(name).given} | few
        )

    def weights(self) -> Iterator[Case]:
        """Models of another kind than the row's."""
        for method in METHODS:
            for kind in (
                one for one in ("base", "instruct", "inpainting", "example") if one != SYSTEMS[method].weights
            ):
                settled = plan(method, **self.arguments(method))

                def call(sd: Any, settled: Any = settled, kind: str = kind) -> None:
                    execute(settled, self.model(kind), self.world.picture)

                yield Case(
                    f"{method} on {kind} weights",
                    call=call,
                    expect="refused",
                    words=f"needs {SYSTEMS[method].weights} weights",
                )

    # ---------------------------------------------------------------- what another run left

    def reused(self) -> Iterator[Case]:
        """With results of other rows at hand a row gives what it gives alone, bit for bit."""
        changes: list[dict[str, Any]] = [
            {},
            {"steps": 3},
            {"seed": 4},
            {"target": "a cow"},
            {"source": "a dog"},
            {"strength": 0.5},
        ]
        changes += [
            {"guidance_scale": 2.0},
            {"prompt_syntax": "a1111", "target": "(a cow:1.5)"},
            {"size": 80},
            {"mask": np.eye(8, 10)},
        ]
        for method in (one for one in METHODS if SYSTEMS[one].weights == "base"):
            for i in self.n(8):
                left = [(self.rng.choice(self.base), self.rng.choice(changes)) for _ in range(self.rng.randint(1, 3))]
                if i == 0:  # nearest to itself, where only texts tell the two apart
                    left = [(method, {"target": "a cow", "source": "a dog"})]
                said = ", ".join(f"{one} {[*change]}" for one, change in left)
                yield Case(
                    f"{method} after {said}", call=lambda sd, m=method, left=left: self.after(m, left), expect="any"
                )

    @cached_property
    def base(self) -> list[str]:
        return [one for one in METHODS if SYSTEMS[one].weights == "base"]

    def after(self, method: str, left: list[tuple[str, dict[str, Any]]]) -> None:
        before = []
        for one, change in left:
            fits = {name: value for name, value in change.items() if name in takes(one) or name in own_options(one)}
            before.append(self.fresh(one, **fits))
        done = self.run(method, self.arguments(method), reuse=before, bitwise=True)
        assert torch.equal(done.latent, self.fresh(method).latent), "another latent than without"

    def saved(self, method: str) -> Path:
        path = self.world.root / f"{method}.safetensors"
        if not path.exists():
            save_state(self.fresh(method), path)
        return path

    def states(self) -> Iterator[Case]:
        for method in self.base:
            go_on = ["resume", "s.safetensors"]

            def put(folder: Path, method: str = method) -> None:
                (folder / "s.safetensors").write_bytes(self.saved(method).read_bytes())

            def same(folder: Path, method: str = method) -> None:
                found = np.asarray(Image.open(folder / "out.png"))
                assert np.array_equal(found, np.asarray(self.fresh(method).image)), "another picture than the edit's"

            yield self.command(f"{method}: its state", go_on, "done", make=put, check=same)
            strange = self.some({"first_step", "moves", "eta", "blend", "mixing", "ratio"} - own_options(method), 2)
            for option in strange:
                yield self.command(
                    f"{method}: its state with {option}", [*go_on, *self.flags({option: 1})], "refused", make=put
                )
            for name in self.some((*TEXTS, "points", "mask"), 2):
                expect = "any" if name in takes(method) else "refused"
                yield self.command(
                    f"{method}: its state with {name}", [*go_on, *self.flags({name: SOUND[name]})], expect, make=put
                )
            for other in self.some({*METHODS} - {method}, 5):
                if other in self.base:
                    yield Case(f"{method}: its state, loaded for {other}",
                               call=lambda sd, m=method, o=other: self.loaded(sd, m, o))  # fmt: skip
                yield Case(f"{method}: its state, resumed as {other}", expect="refused", words="stays",
                           call=lambda sd, m=method, o=other: resume(load_state(self.saved(m), sd), method=o))  # fmt: skip
                yield self.command(f"{method}: its state, renamed {other}", go_on, make=self.renamed(method, other))

    def loaded(self, sd: Any, method: str, other: str) -> None:
        done = self.run(other, self.arguments(other), reuse=[load_state(self.saved(method), sd)], bitwise=True)
        assert torch.equal(done.latent, self.fresh(other).latent), "another latent than without the state"

    def renamed(self, method: str, other: str) -> Callable[[Path], None]:
        """A state that says that another row made it, with the right sum."""

        def put(folder: Path) -> None:
            with safe_open(self.saved(method), framework="pt") as file:
                record, tensors = json.loads(file.metadata()["minidiffedit"]), load_file(self.saved(method))
            record["settings"]["method"] = other
            record.pop("sha256")
            save_file(
                tensors,
                folder / "s.safetensors",
                {"minidiffedit": json.dumps(record | {"sha256": checksum(record, tensors)})},
            )

        return put

    def like(self) -> Iterator[Case]:
        """--like a picture of another row, or one whose settings are made up."""
        odd = (
            None,
            "",
            "x",
            -1,
            10**30,
            1e999,
            float("nan"),
            True,
            [],
            [1],
            {},
            {"a": 1},
            "\ud800",
            "\x1b[2J",
            "x" * 5000,
        )
        for method in METHODS:
            for other in self.some(self.base, 2):
                few = {
                    name: value
                    for name, value in self.arguments(other).items()
                    if name not in TEXTS or takes(other)[name]
                }
                argv = ["edit", "in.png", "--like", "like.png", "--method", other, "--dry-run", *self.flags(few)]
                yield self.command(f"{other} like {method}", argv, "done", make=self.picture_of(method))
            for _ in self.n(4):
                name, value = (
                    self.rng.choice(sorted({*own_options(method), *takes(method), "method", "steering"})),
                    self.rng.choice(odd),
                )
                needed = {
                    one: SOUND[one] for one, wanted in takes(method).items() if wanted and one in ("mask", "reference")
                }
                argv = ["edit", "in.png", "--like", "like.png", "--dry-run", *self.flags(needed)]
                yield self.command(
                    f"like {method} with {name}={value!a:.12}", argv, make=self.picture_of(method, {name: value})
                )
        for text in (
            "",
            "[]",
            "7",
            "{}",
            '{"method": 7}',
            '{"method": "no"}',
            '{"method": "sora"}',
            "[" * 10**5,
            '{"method": "+"}',
        ):
            argv = ["edit", "in.png", "--like", "like.png", "--dry-run"]
            yield self.command(f"like a picture that says {text[:20]!r}", argv, "refused", make=saying(text))

    def picture_of(self, method: str, changed: dict[str, Any] | None = None) -> Callable[[Path], None]:
        def put(folder: Path) -> None:
            done = self.fresh(method)
            done.save(folder / "like.png")
            if changed:
                saying(json.dumps(settings_in(folder / "like.png") | changed))(folder)

        return put

    # ---------------------------------------------------------------- other ways to the same

    def add_ons(self) -> Iterator[Case]:
        """LoRAs and learned words of other models, whatever the row."""
        to_k = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
        loras = {
            f"{width} wide": {f"{to_k}.lora_down.weight": (4, width), f"{to_k}.lora_up.weight": (16, 4)}
            for width in (768, 1024, 2048, 7)
        }
        loras |= {
            "no up": {f"{to_k}.lora_down.weight": (4, 24)},
            "rank 0": {f"{to_k}.lora_down.weight": (0, 24), f"{to_k}.lora_up.weight": (16, 0)},
        }
        loras |= {
            "another layer": {"lora_unet_x.lora_down.weight": (4, 24), "lora_unet_x.lora_up.weight": (16, 4)},
            "nothing": {},
        }
        loras |= {
            "SDXL's": {"lora_te1_text_model.lora_down.weight": (4, 24)},
            "a DoRA": {f"{to_k}.dora_scale": (16, 1)},
        }
        words = {f"{width} wide": {"<cat>": (2, width)} for width in (768, 1024, 1280)}
        words |= {
            "SDXL's": {"clip_l": (1, 768), "clip_g": (1, 1280)},
            "CLIP's own": {"cat": (1, 24)},
            "76 long": {"<cat>": (76, 24)},
            "0 long": {"<cat>": (0, 24)},
        }
        for flag, files in (("--lora", loras), ("--embedding", words)):
            for name, entries in files.items():
                for method in self.some(self.base, 3):
                    argv = [
                        "edit",
                        "in.png",
                        "--method",
                        method,
                        f"{flag}=add.safetensors",
                        *self.flags(self.arguments(method)),
                    ]
                    yield self.command(
                        f"{method}: {flag} {name}", argv, "refused", "add.safetensors", make=laid(entries)
                    )
        sound = {f"{to_k}.lora_down.weight": (4, 24), f"{to_k}.lora_up.weight": (16, 4)}
        for scale, expect in (
            ("1", "done"),
            ("-2", "done"),
            ("nan", "refused"),
            ("101", "refused"),
            ("1e999", "refused"),
            ("", "refused"),
        ):
            argv = [
                "edit",
                "in.png",
                f"--lora=add.safetensors:{scale}",
                *self.flags(self.arguments("sdedit")),
                "--method=sdedit",
            ]
            yield self.command(f"a LoRA at {scale!r}", argv, expect, make=laid(sound))

    def batches(self) -> Iterator[Case]:
        every = sorted({option for method in METHODS for option in own_options(method)})
        for method in self.some(self.base, 30):
            row = {"image": "in.png", "output": "b.png", "method": method, **self.arguments(method)}
            for name, value, expect in (
                ("steps", 2, "done" if "steps" in own_options(method) else "refused"), (self.rng.choice(sorted({*every} - own_options(method))), 1, "refused"),
                (self.rng.choice(sorted(SOUND.keys() - takes(method).keys() - {*TEXTS})), "x", "refused"),
            ):  # fmt: skip
                content = manifests.FIRST + json.dumps(row | {name: value}).encode() + b"\n"
                call = manifests.batch(self.world, "m.jsonl", sound_first=True)
                yield Case(f"a row of {method} with {name}", make=write("m.jsonl", content), call=call, expect=expect)

    def without_picture(self) -> Iterator[Case]:
        for name, value in (
            ("strength", 1),
            ("mask", "mask.png"),
            ("source", "a"),
            ("paste", 1),
            ("inversion", "ddim"),
        ):
            yield self.command(f"generate with {name}", ["generate", "a", *self.flags({name: value})], "refused")
        for words in ("a", "cat " * 10_000, "\U0001f993", "(a:1.5)"):
            for more in ([], ["--prompt-syntax=a1111"], ["--guidance-scale=1000"], ["--width=64", "--height=512"]):
                yield self.command(f"generate {words[:9]!a} {more}", ["generate", words, "--steps=1", *more])
        yield self.command("edit from nothing", ["edit", "in.png", "--method=text-to-image", "--target=a"], "refused")


def partial_cost(method: str, given: dict[str, Any]) -> Callable[[Result], None]:
    """No more is paid than what is predicted."""

    def see(done: Result) -> None:
        predicted = cost(done.plan)
        over = {stage for stage, rows in done.evaluations.items() if rows > predicted.get(stage, 0)}
        assert not over, f"{done.evaluations} paid, {predicted} predicted"

    return see


def saying(text: str) -> Callable[[Path], None]:
    """A picture that carries this for its settings."""
    info = PngImagePlugin.PngInfo()
    info.add_text("minidiffedit", text)
    return lambda folder: Image.new("RGB", (91, 70)).save(folder / "like.png", pnginfo=info)


def laid(entries: dict[str, tuple[int, ...]]) -> Callable[[Path], None]:
    return lambda folder: save_file(
        {key: torch.full(shape, 0.01) for key, shape in entries.items()}, folder / "add.safetensors"
    )
