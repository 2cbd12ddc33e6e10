"""Masks: files and Python's objects; all, nothing, wrong, soft, impossible."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from minidiffedit import Steering
from minidiffedit import edit as edit_picture

from .harness import Case, World, drawn, edit
from .pictures import DIRECT, NONE, encoded, flipped, write

SIZE = (91, 70)
LATENT = (10, 8)  # of the tiny model: 64 pixels on the shorter side, 8 to a cell


def cases(world: World, rng: random.Random, scale: float) -> Iterator[Case]:
    source = np.asarray(world.picture)

    def masked(
        name: str, put: Callable[[Path], Any], expect: str, words: str = "", *more: str, check: Any = None
    ) -> Case:
        return Case(name, edit("--mask", "bad.png", *more), put, expect, words, check)

    def n(count: int) -> range:
        return range(max(2, round(count * scale)))

    def source_back(folder: Path) -> None:
        assert np.array_equal(np.asarray(Image.open(folder / "out.png")), source), "the source should have come back"

    def left_alone(folder: Path) -> None:
        """Far from the mask, which lies right of column 40, nothing may change."""
        out = np.asarray(Image.open(folder / "out.png"))
        assert np.array_equal(out[:, :16], source[:, :16]), "pixels far outside the mask changed"
        assert not np.array_equal(out, source), "nothing was edited"

    yield masked("all 0", flat(SIZE, 0), "done", check=source_back)
    yield masked("all 0, of latent size", flat(LATENT, 0), "done", check=source_back)
    for value in (1, 255):
        yield masked(f"all {value}", flat(SIZE, value), "done")
    for size in ((1, 1), (90, 70), (91, 60), (70, 91), (182, 100), (8, 10), (512, 512), (9999, 9)):
        yield masked(f"{size}", flat(size, 255), "refused", "91 x 70|8:1")
        # Told before the model is loaded, or that there is none.
        argv = ["edit", "in.png", "--target", "x", "--mask", "bad.png", "--size", "64", "--model", "no-such-model"]
        yield Case(f"{size}, no model", argv, flat(size, 255), "refused", "91 x 70|no-such-model")
        argv = [
            "edit",
            "in.png",
            "--target",
            "x",
            "--union",
            "bad.png",
            "--model",
            "MODEL",
            "--dry-run",
            "--size",
            "64",
        ]
        yield Case(f"{size}, dry run", argv, flat(size, 255), "refused", "91 x 70")
    for option in ("--union", "--subtract"):
        yield Case(f"{option} of another size", edit(option, "bad.png"), flat((9, 9), 255), "refused", "91 x 70")
        yield Case(f"{option} that is none", edit(option, "bad.png"), write("bad.png", b"x"), "refused", "bad.png")
    for name, content in NONE.items():
        yield masked(name, write("bad.png", content), "refused", "bad.png")
    half = (world.root / "mask.png").read_bytes()
    for _ in n(40):
        yield masked("a bit flipped", write("bad.png", flipped(half, rng)), "any", check=left_alone)
    for mode in ("1", "P", "RGB", "RGBA", "LA"):
        picture = Image.open(world.root / "mask.png").convert(mode)
        yield masked(f"mode {mode}", write("bad.png", encoded(picture, "PNG")), "done", check=left_alone)
    for kind in ("JPEG", "WEBP"):
        picture = Image.open(world.root / "mask.png").convert("RGB")
        yield masked(f"{kind} under .png", write("bad.png", encoded(picture, kind)), "done")
    for text in ("10x8 AAAA", "10x8", "999999x999999 eJw=", "10x8 " + "A" * 10**5, "-1x-1 x", "\0", "10x8 é"):
        yield masked(f"cells {text[:12]!r}", cells(half_mask(), text), "done", check=left_alone)
    yield Case("its own output", edit("--mask", "in.png", "-o", "in.png"), expect="refused", words="overwrite|colours")

    for name, mask in objects().items():
        yield Case(f"Python: {name}", expect="refused", call=direct(mask))
    shapes = st.one_of(
        st.sampled_from([(70, 91), (8, 10), (1, 8, 10), (1, 1, 8, 10), (64, 80), (70, 91, 3)]),
        hnp.array_shapes(min_dims=0, max_dims=5, max_side=12),
    )
    types = st.one_of(
        hnp.boolean_dtypes(), hnp.integer_dtypes(), hnp.unsigned_integer_dtypes(), hnp.floating_dtypes(),
        hnp.complex_number_dtypes(), hnp.unicode_string_dtypes(max_len=3),
    )  # fmt: skip
    arrays = types.flatmap(lambda dtype: hnp.arrays(dtype, shapes, fill=hnp.from_dtype(dtype)))
    for mask in drawn(arrays, len(n(120)), rng.randrange(2**32)):
        yield Case(f"Python: {mask.dtype} {mask.shape}", expect="any", call=checked(mask))
    for mask in drawn(hnp.arrays(np.float32, (8, 10), elements=st.floats(0, 1, width=32)), len(n(20)), 1):
        yield Case("Python: a soft one", expect="any", call=checked(torch.from_numpy(mask)))
    for options in (
        {"dilate": 10**9},
        {"feather": -1},
        {"dilate": 0.5},
        {"largest": 1},
        {"union": 7},
        {"subtract": "no"},
    ):
        yield Case(f"Python: {options}", expect="refused", call=steered(options))


def flat(size: tuple[int, int], value: int) -> Callable[[Path], None]:
    return lambda folder: Image.new("L", size, value).save(folder / "bad.png")


def half_mask() -> Image.Image:
    half = np.zeros(SIZE[::-1], np.uint8)
    half[:, 40:] = 255
    return Image.fromarray(half)


def cells(picture: Image.Image, text: str) -> Callable[[Path], None]:
    """A mask whose kept cells are not its own."""
    from PIL import PngImagePlugin

    from minidiffedit.files.images import CELLS

    info = PngImagePlugin.PngInfo()
    info.add_text(CELLS, text)
    return lambda folder: picture.save(folder / "bad.png", pnginfo=info)


def objects() -> dict[str, Any]:
    ones = np.ones((8, 10), np.float32)
    return {
        "NaN": ones * np.nan, "infinite": ones * np.inf, "negative": -ones, "2": ones * 2, "1 + 1e-6": ones * (1 + 1e-6),
        "one NaN": np.where(np.arange(80).reshape(8, 10) == 9, np.nan, 1), "wrong size": np.ones((9, 10)), "text": "mask?",
        "a list": [[1]], "a number": 1, "complex": ones * 1j, "objects": np.full((8, 10), None), "empty": np.ones((0, 10)),
        "0-D": np.array(1), "two of them": np.ones((2, 1, 8, 10)), "int 255": np.full((8, 10), 255), "a tensor of NaN":
        torch.full((8, 10), torch.nan), "a sparse tensor": torch.eye(8).to_sparse(), "dates": np.zeros((8, 10), "M8[s]"),
        "a meta tensor":
        torch.ones(8, 10, device="meta"), "mode F of 255": Image.new("F", (10, 8), 255), "mode I": Image.new("I", (10, 8), 9),
    }  # fmt: skip


def direct(mask: Any) -> Callable[[Any], Any]:
    return lambda sd: edit_picture(sd, np.zeros((70, 91, 3), np.uint8), mask=mask, **DIRECT)


def steered(options: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda sd: edit_picture(sd, np.zeros((70, 91, 3), np.uint8), steering=Steering(**options), **DIRECT)


def checked(mask: Any) -> Callable[[Any], Any]:
    """Where the mask is taken, what it holds is what is used: nothing where it is all 0, all where it is all 1."""

    def call(sd: Any) -> None:
        before = np.array(mask)
        done = edit_picture(sd, np.zeros((70, 91, 3), np.uint8), mask=mask, **DIRECT)
        values = before.astype(np.float64)
        assert np.isfinite(values).all() and values.min() >= 0, "it is no mask"
        assert (done.coverage > 0) == bool(values.any()), f"coverage {done.coverage} of a mask to {values.max()}"
        assert np.array_equal(before, np.array(mask)), "the caller's mask was changed"
        assert torch.isfinite(done.latent).all()

    return call
