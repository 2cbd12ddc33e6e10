"""Pictures that are damaged, hostile, odd or none."""

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from minidiffedit import edit as edit_picture

from .harness import QUICK, Case, World, damage, edit, flip

DIRECT = {"target": "a cat", "source": "a dog", "steps": 2, "maps": 1, "seed": 3}


def cases(world: World, rng: random.Random, scale: float) -> Iterator[Case]:
    def bad(name: str, put: Callable[[Path], Any], expect: str = "refused", words: str = "", **more: Any) -> Case:
        """put: writes `bad.png` (or the file that `picture` names)."""
        return Case(name, edit(picture=more.pop("picture", "bad.png")), put, expect, words, **more)

    def n(count: int) -> range:
        return range(max(2, round(count * scale)))

    sound = {kind: encoded(world.picture, kind) for kind in ("PNG", "WEBP", "JPEG")}
    for kind, content in sound.items():
        lossy, named = kind == "JPEG", f"bad.{SUFFIX[kind]}"
        checked = kind == "PNG"  # by sums; in the others a changed bit is another picture, and nothing tells
        for _ in n(35):
            at = rng.randrange(len(content))
            yield bad(f"{kind} cut at {at} of {len(content)}", write(named, content[:at]), "same", picture=named)
        for _ in n(70):
            yield bad(f"{kind}: a bit flipped", write(named, flipped(content, rng)), "same" if checked else "any",
                      picture=named)  # fmt: skip
        for _ in n(10):
            yield bad(f"{kind}: 20 bits flipped", write(named, flipped(content, rng, 20)), "any", picture=named)
        yield bad(f"{kind} and more behind", write(named, content + b"\0" * 999), "any" if lossy else "same",
                  picture=named)  # fmt: skip
        for other in {"png", "jpg", "webp"} - {SUFFIX[kind]}:
            yield bad(f"{kind} under .{other}", write(f"bad.{other}", content), "any" if lossy else "same",
                      picture=f"bad.{other}")  # fmt: skip
    for name, content in NONE.items():
        yield bad(name, write("bad.png", content), words="bad.png")
    for kind in ("BMP", "TIFF"):
        yield bad(f"{kind} under .png", write("bad.png", encoded(world.picture, kind)), "same")
    for kind in ("PPM", "TGA", "ICO", "EPS", "PDF"):
        yield bad(f"{kind} under .png", write("bad.png", encoded(world.picture, kind)), words="is no picture")
    lab = ImageCms.profileToProfile(
        world.picture, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert lab
    yield bad("LAB", write("bad.png", encoded(lab, "TIFF")), words="no agreed white")
    for mode in ("L", "1", "P", "RGBA", "LA", "I;16"):
        yield bad(f"mode {mode}", write("bad.png", encoded(of_mode(world.picture, mode), "PNG")), "done")
    yield bad("CMYK", write("bad.jpg", encoded(world.picture.convert("CMYK"), "JPEG")), "done", picture="bad.jpg")
    yield bad("opaque alpha", write("bad.png", encoded(world.picture.convert("RGBA"), "PNG")), "same")
    for kind in ("PNG", "WEBP"):
        several = {"save_all": True, "append_images": [Image.new("RGB", (91, 70), "red")] * 2}
        yield bad(f"animated {kind}", write("bad.png", encoded(world.picture, kind, **several)), "same")
    for junk in JUNK:
        yield bad(f"EXIF {junk[:20]!r}", write("bad.png", encoded(world.picture, "PNG", exif=junk)), "same")
    for _ in n(40):
        junk = (
            b"Exif\0\0" + rng.choice([b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b""]) + rng.randbytes(rng.randrange(60))
        )
        kind = rng.choice(["PNG", "WEBP"])
        # An orientation that chance wrote turns the picture; nothing tells it from one that is meant.
        yield bad(f"{kind}: EXIF by chance", write("bad.png", encoded(world.picture, kind, exif=junk)), "any")
    for junk in (b"", b"\0" * 128, b"x" * 5000):
        yield bad(f"ICC {junk[:9]!r}", write("bad.png", encoded(world.picture, "PNG", icc_profile=junk)), "same")

    for size in ((1, 1), (1, 8), (7, 7), (8, 1), (7, 56)):
        yield bad(f"{size}", blank(size), words="8")
    for size in ((8, 8), (8, 64), (9, 9), (16, 16), (64, 512)):
        yield bad(f"{size}", blank(size), "done")
    for size in ((1, 500), (500, 1), (20_000, 1), (20_000, 100), (64, 513), (8, 65)):
        yield bad(f"{size}", blank(size), words="8:1")
    yield bad("20,000 px wide", blank((20_000, 2_500)), "done", megabytes=1700)
    yield bad("just below the limit", blank((9_400, 9_400)), "done", megabytes=2600)
    yield bad("above Pillow's limit", blank((9_500, 9_500), "L"), words="exceeds|limit|Scale it down")
    for width, height in ((50_000, 50_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1), (0, 9), (9, 0), (2**32 - 1, 2)):
        yield bad(f"declared {width} x {height}", write("bad.png", declared(width, height)))
    yield bad("100 MB of text in a chunk", write("bad.png", encoded(world.picture, "PNG", pnginfo=swollen())), "same")
    yield bad("declared large, little there", write("bad.png", declared(9_000, 9_000, zlib.compress(bytes(999)))),
              megabytes=600)  # fmt: skip
    yield bad("more rows than declared", write("bad.png", declared(91, 70, zlib.compress(bytes(10**8)))), "any")
    yield bad("an endless chunk", write("bad.png", declared(91, 70)[:33] + b"\x7f\xff\xff\xffIDAT" + bytes(99)))

    for name, put in PLACES.items():
        yield bad(name, put, words="bad.png")
    for name in ("no.png", "x" * 300 + ".png", "..", "/", "\udcff.png", "\x1b[2J.png", "a\nb.png", "-"):
        yield Case(f"a picture called {name[:9]!r}", edit(picture=name), expect="refused")
    for out in (
        "out",
        "out.gif",
        "no/out.png",
        ".",
        "",
        "in.png",
        "out.PNG.txt",
        "x" * 300 + ".png",
        "\0.png",
    ):
        yield Case(f"-o {out[:9]!r}", ["edit", "in.png", *QUICK, "--model", "MODEL", "-o", out], expect="refused")
    for name in ("out.PNG", "out.jpeg", "é\u202e.png", "\udcff.png", " .png", "--.png", "a\nb.png", "\x1b[2J.png"):
        argv = ["edit", "in.png", *QUICK, "--model", "MODEL", "-o", f"./{name}"]
        yield Case(f"-o {name!r}", argv, expect="done")

    for name, source in objects().items():
        yield Case(f"Python: {name}", expect="refused", call=direct(source))
    for mode in ("RGB", "L", "1", "P", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB", "La", "RGBa", "RGBX", "I;16"):
        try:
            made = Image.new(mode, (32, 24))
        except ValueError:
            continue
        yield Case(f"Python: mode {mode}", expect="any", call=direct(made))
    for _ in n(40):
        shape = tuple(rng.choice([0, 1, 3, 8, 9, 24]) for _ in range(rng.randrange(5)))
        dtype = rng.choice(["u1", "i1", "u2", "i8", "f2", "f4", "f8", "?", "c8", "O", "U3"])
        yield Case(f"Python: {dtype} {shape}", expect="any", call=direct(np.zeros(shape, dtype)))


def direct(source: Any) -> Callable[[Any], Any]:
    def call(sd: Any) -> None:
        done = edit_picture(sd, source, **DIRECT)
        assert done.image.size == done.source.size

    return call


def objects() -> dict[str, Any]:
    broken = Image.new("RGB", (32, 24))
    broken.close()
    return {
        "None": None, "a number": 7, "bytes": b"x", "a list": [[1]], "a dict": {}, "a class": Image.Image, "a closed one": 0.5,
        "mode I": Image.new("I", (32, 24)), "mode F": Image.new("F", (32, 24)), "an empty path": "", "no pixels":
        Image.new("RGB", (0, 9)), "floats": np.zeros((9, 9, 3)), "NaN": np.full((9, 9, 3), np.nan), "4-D":
        np.zeros((1, 9, 9, 3), np.uint8), "two channels": np.zeros((9, 9, 2), np.uint8), "a tensor of none": np.zeros(0),
    }  # fmt: skip


SUFFIX = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **({"lossless": True} if kind == "WEBP" else {}), **options)
    return out.getvalue()


def write(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def flipped(content: bytes, rng: random.Random, bits: int = 1) -> bytes:
    changed = bytearray(content)
    flip(rng, 0, len(content), bits)(changed)
    return bytes(changed)


def blank(size: tuple[int, int], mode: str = "RGB") -> Callable[[Path], None]:
    return lambda folder: Image.new(mode, size).save(folder / "bad.png", compress_level=1)


def of_mode(picture: Image.Image, mode: str) -> Image.Image:
    return picture.convert("L").convert("I").convert("I;16") if mode == "I;16" else picture.convert(mode)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def declared(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header says so, whatever stands behind it."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def swollen() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a" * 900_000, zip=True)
    return info


NONE = {
    "zero bytes": b"", "a signature alone": b"\x89PNG\r\n\x1a\n", "text": b"hello", "SVG": b"<svg xmlns='x'/>", "HTML":
    b"<!DOCTYPE html>", "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\n", "zeros": bytes(9999), "a zip":
    b"PK\x03\x04" + bytes(99), "HEIC": b"\0\0\0\x18ftypheic" + bytes(99), "AVIF": b"\0\0\0\x18ftypavif" + bytes(99),
    "a header alone": declared(91, 70)[:33], "no pixels in it": declared(91, 70), "RIFF alone": b"RIFF\xff\xff\xff\xffWEBP",
    "JPEG's start": b"\xff\xd8\xff\xe0", "JPEG's start and end": b"\xff\xd8\xff\xd9",
}  # fmt: skip
JUNK = (
    b"x", b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03",
    b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xffA\0\0\0\0\0\0\0", b"\0" * 60_000,
    b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",
)  # fmt: skip


def pipe(folder: Path) -> None:
    import os

    os.mkfifo(folder / "bad.png")


PLACES: dict[str, Callable[[Path], Any]] = {
    "nothing there": lambda folder: None,
    "a folder": lambda folder: (folder / "bad.png").mkdir(),
    "a link to nothing": lambda folder: (folder / "bad.png").symlink_to("nothing"),
    "a link to itself": lambda folder: (folder / "bad.png").symlink_to("bad.png"),
    "a link to zeros": lambda folder: (folder / "bad.png").symlink_to("/dev/zero"),
    "a pipe": pipe,
}
__all__ = ["cases", "damage"]
