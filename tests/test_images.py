"""Pictures and masks: what is read, what is refused, what is written."""

import os
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, JpegImagePlugin
from PIL.ExifTags import IFD
from stubs import no_address

from minidiffedit import edit
from minidiffedit.files import images

SIDES = st.integers(8, 5000)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(path, width, height, depth, colour, rows, chunks=()):
    """A PNG file by hand: Pillow writes no 16-bit colour, and no lies."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path


def rgb(source):
    return np.asarray(images.to_rgb(images.read_picture(source)))


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_on_its_side_is_read_upright(tmp_path, mode, orientation):
    """By its path, or a PIL image that Pillow has not read yet, it would map the pixels and scramble them."""
    stored = Image.fromarray(np.arange(20 * 30, dtype=np.uint16).reshape(20, 30) * 100)
    stored = stored if mode == "I;16" else Image.effect_noise((30, 20), 60).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.tif", exif=exif)
    way = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2)))  # Pillow's numbers of the ways to turn a picture back
    upright = stored.transpose(Image.Transpose(way[orientation])) if orientation > 1 else stored
    with Image.open(tmp_path / "a.tif") as lazy:
        for source in (tmp_path / "a.tif", lazy):
            assert np.array_equal(np.asarray(images.read_picture(source)), np.asarray(upright))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied(tmp_path, suffix, orientation):
    upright = Image.new("RGB", (48, 32), "black")
    upright.paste("white", (0, 0, 24, 16))  # top left
    upright.paste("red", (24, 0, 48, 16))  # top right
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(turned[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif.tobytes())
    read = images.read_picture(tmp_path / f"a.{suffix}")
    assert read.size == (48, 32) and read.getexif().get(0x0112, 1) == 1  # a writer could apply it a second time
    close = np.abs(np.asarray(read).astype(int) - np.asarray(upright))[4:12, 4:20].max()
    assert close < 30 and np.abs(np.asarray(read).astype(int) - np.asarray(upright)).mean() < 8


@pytest.mark.parametrize("junk", [
    b"Exif\0\0II*\0", b"Exif\0\0garbage", b"x", b"Exif\0\0II*\0\xff\xff\xff\xff",
    b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\0\0\0\x01\0",
    b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xffA\0\0\0\0\0\0\0",
])  # fmt: skip
def test_damaged_exif_is_said_once_and_not_applied(tmp_path, junk):
    noise(16, 24).save(tmp_path / "a.png", exif=junk)
    with pytest.warns(UserWarning, match="EXIF data is damaged") as said:
        assert images.read_picture(tmp_path / "a.png").size == (16, 24)
    assert len(said) == 1


def palette(transparency=None):
    picture = Image.new("P", (3, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    picture.putdata([0, 1, 2])
    if transparency is not None:
        picture.info["transparency"] = transparency
    return picture


def of_mode(mode, *pixels):
    picture = Image.new(mode, (len(pixels), 1))
    picture.putdata(pixels)
    return picture


COLOURS = [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
WHITE = [255, 255, 255]


@pytest.mark.parametrize("picture, expected", [
    (of_mode("RGBA", (1, 2, 3, 0), (1, 2, 3, 255), (0, 0, 0, 51)), [WHITE, [1, 2, 3], [204] * 3]),
    (of_mode("LA", (9, 0), (9, 255)), [WHITE, [9] * 3]),
    (palette(), COLOURS),
    (palette(1), [COLOURS[0], WHITE, COLOURS[2]]),
    (palette(bytes([0, 255, 255])), [WHITE, *COLOURS[1:]]),
    (of_mode("1", 0, 255), [[0] * 3, WHITE]),
    (of_mode("L", 7), [[7] * 3]),
], ids=["RGBA", "LA", "P", "P+index", "P+bytes", "1", "L"])  # fmt: skip
def test_every_mode_becomes_rgb_with_alpha_on_white(tmp_path, picture, expected):
    assert rgb(picture)[0].tolist() == expected
    picture.save(tmp_path / "a.png")
    assert rgb(tmp_path / "a.png")[0].tolist() == expected


DEEP = np.array([0, 300, 40000, 65535], dtype=">u2")


@pytest.mark.parametrize("width, depth, colour, rows, chunks, expected", [
    (4, 16, 0, DEEP.tobytes(), (), [[v] * 3 for v in (0, 1, 156, 255)]),  # convert("RGB") gives 0, 255, 255, 255
    (4, 16, 0, DEEP.tobytes(), [(b"tRNS", b"\x01\x2c")], [[v] * 3 for v in (0, 255, 156, 255)]),
    (1, 16, 2, DEEP[1:].tobytes(), (), [[1, 156, 255]]),
    (1, 16, 6, DEEP[[1, 2, 3, 0]].tobytes(), (), [WHITE]),
    (2, 8, 2, bytes([1, 2, 3, 4, 5, 6]), [(b"tRNS", b"\0\1\0\2\0\3")], [WHITE, [4, 5, 6]]),
    (2, 8, 0, bytes([1, 2]), [(b"tRNS", b"\0\1")], [WHITE, [2] * 3]),
], ids=["grey16", "grey16+tRNS", "rgb16", "rgba16", "rgb+tRNS", "grey+tRNS"])  # fmt: skip
def test_png_depths_and_transparent_colours(tmp_path, width, depth, colour, rows, chunks, expected):
    path = png(tmp_path / "a.png", width, 1, depth, colour, b"\0" + rows, chunks)
    assert rgb(path)[0].tolist() == expected


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(rgb(tmp_path / "a.jpg")[8, 8].astype(int) - [0, 255, 255]).max() < 4


@pytest.mark.parametrize("suffix", ["webp", "png"])
def test_an_animation_gives_its_first_frame_with_a_warning(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    with pytest.warns(UserWarning, match="animated"):
        assert rgb(path)[8, 8].tolist() == [255, 0, 0]


def test_a_phone_jpeg_with_a_preview_is_no_animation(tmp_path, recwarn):
    noise(16, 16).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[noise(8, 8)])
    assert images.read_picture(tmp_path / "a.jpg").size == (16, 16) and not recwarn


def cut(path, kind, share):
    noise(64, 64).save(path, kind)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


REFUSED = {
    "empty": (lambda p: p.write_bytes(b""), "0 bytes"),
    "text": (lambda p: p.write_text("<svg/>"), "is no picture"),
    "pdf": (lambda p: noise(9, 9).save(p, "PDF"), "is no picture"),
    "floats": (lambda p: Image.new("F", (9, 9)).save(p, "TIFF"), "no agreed white"),
    "LAB": (lambda p: Image.new("LAB", (9, 9)).save(p, "TIFF"), "no agreed white"),
    "signature": (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n"), "cut short"),
    "cut png": (lambda p: cut(p, "PNG", 0.5), "cut short"),
    "cut jpeg": (lambda p: cut(p, "JPEG", 0.5), "cut short"),
    "cut webp": (lambda p: cut(p, "WEBP", 0.5), "cut short"),
    "bomb": (lambda p: png(p, 10_000, 10_000, 8, 2, b""), "exceeds limit.*Scale it down"),
    "big bomb": (lambda p: png(p, 60_000, 60_000, 8, 2, b""), "exceeds limit.*Scale it down"),
    "no width": (lambda p: png(p, 0, 9, 8, 2, b""), "cut short"),
    "folder": (lambda p: p.mkdir(), "is a folder"),
    "missing": (lambda p: None, "no such file"),
    "device": (lambda p: p.symlink_to("/dev/null"), "not a regular file"),  # a pipe would hang where this is broken
    "text bomb": (
        lambda p: png(p, 1, 1, 8, 0, b"\0\0", [(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**21)))]),
        "damaged",
    ),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_what_is_no_picture_is_refused(tmp_path, make, message):
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(ValueError, match=f"(?s)a.png.*{message}"):
        images.read_picture(path)


@pytest.mark.parametrize("kind", images.READ)
@pytest.mark.filterwarnings("ignore")  # damaged EXIF, animations that are none
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_gives_a_picture_or_a_value_error(tmp_path_factory, kind, data):
    path = tmp_path_factory.getbasetemp() / f"fuzz.{kind}"
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(24, 16).save(path, kind, **({} if kind in ("GIF", "BMP") else {"exif": exif.tobytes()}))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    whole = data.draw(st.booleans())
    path.write_bytes(content if whole else content[: data.draw(st.integers(0, len(content)))])
    try:
        images.to_rgb(images.read_picture(path))
    except ValueError as error:
        assert "fuzz" in str(error)


def test_a_file_without_permission(tmp_path, monkeypatch):
    noise(9, 9).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    if os.access(tmp_path / "a.png", os.R_OK):  # root reads everything

        def denied(*_, **__):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Image, "open", denied)
    with pytest.raises(ValueError, match="permission denied"):
        images.read_picture(tmp_path / "a.png")


def test_a_picture_that_pillow_had_not_read_yet(tmp_path):
    cut(tmp_path / "a.jpg", "JPEG", 0.5)
    with Image.open(tmp_path / "a.jpg") as lazy, pytest.raises(ValueError, match="damaged"):
        images.read_picture(lazy)


@pytest.mark.parametrize("source", [
    None, 5, b"a.png", torch.zeros(3, 8, 8), [[1]], np.zeros((8, 8, 3)), np.zeros((8, 8, 2), np.uint8),
    np.zeros((0, 8, 3), np.uint8), np.zeros(8, np.uint8), np.zeros((1, 8, 8, 3), np.uint8),
    Image.new("I", (8, 8)), Image.new("F", (8, 8)), Image.new("RGB", (0, 8)),
], ids=no_address)  # fmt: skip
def test_objects_that_are_no_picture_are_refused(source):
    with pytest.raises(ValueError, match=r"picture"):
        images.read_picture(source)


def test_paths_strings_pil_and_arrays_give_the_same_and_stay_as_they_were(tmp_path):
    picture = noise(20, 12)
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        before = dict(opened.info)
        read = [rgb(source) for source in (tmp_path / "a.png", str(tmp_path / "a.png"), opened)]
        assert opened.info == before and opened.size == (20, 12)
    array = np.ascontiguousarray(read[0])
    read.append(rgb(array))
    assert all((one == np.rot90(np.asarray(picture), -1)).all() for one in read)
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert (rgb(grey) == grey[..., None]).all() and (rgb(grey[..., None]) == grey[..., None]).all()


# ---------------------------------------------------------------- sizes and tensors


@given(w=SIDES, h=SIDES, side=st.integers(64, 1024), k=st.integers(2, 7))
def test_working_size(w, h, side, k):
    if max(w, h) > 8 * min(w, h):
        with pytest.raises(ValueError, match="beyond 8:1"):
            images.working_size((w, h), side)
        return
    a, b = images.working_size((w, h), side)
    assert a % 8 == b % 8 == 0 and min(a, b) >= 64 and a * b <= 1024 * 1024
    assert images.working_size((h, w), side) == (b, a)
    assert images.working_size((k * w, k * h), side) == (a, b)
    uncapped = side * side * max(w, h) <= 1024 * 1024 * min(w, h)
    if uncapped and side % 8 == 0 and (a, b) != (1024, 1024):
        assert abs(min(a, b) - side) <= 8  # 8 only where rounding the longer side up passed the cap
    assert abs(a / b / (w / h) - 1) < 8 / 64 + 0.01  # half a cell on each side, a whole one at the cap


@pytest.mark.parametrize("size, side, expected", [
    ((512, 512), 512, (512, 512)), ((451, 300), 512, (768, 512)), ((640, 427), 512, (768, 512)),
    ((600, 400), 64, (96, 64)), ((8, 8), 64, (64, 64)), ((8, 64), 64, (64, 512)), ((4000, 3000), 1024, (1176, 888)),
    ((4000, 500), 512, (2896, 360)), ((68, 64), 64, (72, 64)), ((67, 64), 64, (64, 64)),
])  # fmt: skip
def test_working_size_by_example(size, side, expected):
    assert images.working_size(size, side) == expected


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 7)])
def test_less_than_a_cell_is_refused(size):
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}: less than a cell of 8 pixels"):
        images.working_size(size, 512)


@pytest.mark.parametrize("side", [0, 63, 1025, -512, 512.0, True, None, "512"])
def test_a_bad_side_is_refused(side):
    with pytest.raises(ValueError, match="from 64 to 1024"):
        images.working_size((512, 512), side)


def test_to_tensor_and_back_is_exact():
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(3).reshape(16, 16, 3))
    tensor = images.to_tensor(picture, picture.size)
    assert tensor.shape == (1, 3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert images.to_picture(tensor).tobytes() == picture.tobytes()
    assert images.to_picture(3 * tensor, (7, 5)).size == (7, 5)
    assert set(np.unique(images.to_picture(3 * tensor.sign()))) == {0, 255}  # clamped, not wrapped


# ---------------------------------------------------------------- masks

PICTURE, WORKING = (200, 160), (80, 64)
BLOCK = np.zeros((160, 200), bool)
BLOCK[40:121, 66:101] = BLOCK[145, 185] = True


def picture_of(mask):
    return Image.fromarray((mask * 255).astype(np.uint8))


KINDS = {
    "bool": lambda m: m,
    "uint8": lambda m: (m * 255).astype(np.uint8),
    "uint8 0 1": lambda m: m.astype(np.uint8),
    "uint16": lambda m: (m * 65535).astype(np.uint16),
    "int64": lambda m: m.astype(np.int64),
    "float32": lambda m: m.astype(np.float32),
    "float64": lambda m: m.astype(np.float64),
    "1 h w": lambda m: m[None],
    "h w 1": lambda m: m[..., None].astype(np.float32),
    "1 h w 1, bool": lambda m: m[None, ..., None] > 0,
    "h w 1, uint8": lambda m: (m * 255).astype(np.uint8)[..., None],
    "h w 1, tensor": lambda m: torch.tensor(m)[..., None].float(),
    "uint8 rgb": lambda m: (m * 255).astype(np.uint8)[..., None].repeat(3, 2),
    "read-only": lambda m: np.frombuffer(m.tobytes(), bool).reshape(m.shape),
    "tensor": lambda m: torch.tensor(m),
    "tensor 3": lambda m: torch.tensor(m)[None].long(),
    "tensor 4": lambda m: torch.tensor(m)[None, None].bfloat16().requires_grad_(),
    **{mode: (lambda m, mode=mode: picture_of(m).convert(mode)) for mode in ("L", "1", "P", "RGB", "RGBA")},
    "white on transparent": lambda m: Image.merge("LA", [Image.new("L", m.shape[::-1], 255), picture_of(m)]),
    "F": lambda m: Image.fromarray(m.astype(np.float32)),
    "I;16": lambda m: Image.fromarray((m * 65535).astype(np.uint16)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_every_kind_and_size_are_one_latent_mask(kind):
    at_work = np.asarray(Image.fromarray(BLOCK.astype(np.float32)).resize(WORKING, Image.Resampling.BOX))
    expected = at_work.reshape(8, 8, 10, 8).max((1, 3))  # blocks of 8 x 8, by hand
    assert set(np.unique(expected)) > {0, 1}
    for values, latent in ((BLOCK, expected), (at_work >= 0.5, (at_work >= 0.5).reshape(8, 8, 10, 8).max((1, 3)))):
        mask = images.latent_mask(KINDS[kind](values), PICTURE, WORKING)
        assert mask.shape == (1, 1, 8, 10) and mask.dtype == torch.float32
        np.testing.assert_array_equal(mask[0, 0], latent)
    cells = expected > 0.5
    np.testing.assert_array_equal(images.latent_mask(KINDS[kind](cells), PICTURE, WORKING)[0, 0], cells)


def test_soft_values_stay_soft_and_the_callers_array_as_it_was():
    for shape in ((160, 200), (64, 80), (8, 10)):
        soft = np.full(shape, 0.25, np.float32)
        mask = images.latent_mask(soft, PICTURE, WORKING)
        assert (mask == 0.25).all()
        mask += 1
        assert (soft == 0.25).all()
    tensor = torch.full((1, 1, 8, 10), 0.25)
    images.latent_mask(tensor, PICTURE, WORKING).zero_()
    assert (tensor == 0.25).all()
    for fifth in (np.full((160, 200), 51, np.uint8), np.full((160, 200), 13107, np.uint16)):
        assert (images.latent_mask(fifth, PICTURE, WORKING) == np.float32(0.2)).all()
        assert (images.latent_mask(Image.fromarray(fifth), PICTURE, WORKING) == np.float32(0.2)).all()


def test_all_ones_stay_exactly_one_under_any_scale():
    for size in ((301, 203), (97, 64), (5000, 3001)):
        assert (images.latent_mask(np.ones(size[::-1], bool), size, images.working_size(size, 512)) == 1).all()


def test_the_pictures_size_wins_over_the_latents():
    mask = np.zeros((64, 64), bool)
    mask[0, 0] = True
    assert images.latent_mask(mask, (64, 64), (512, 512)).sum() == 1
    assert images.latent_mask(mask, (64, 64), (64, 64)).shape == (1, 1, 8, 8)


def test_mask_files_are_turned_as_their_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    mask = Image.new("L", (80, 96))
    mask.paste(255, (0, 0, 80, 8))
    mask.save(tmp_path / "m.png", exif=exif.tobytes())
    read = images.read_mask(tmp_path / "m.png")
    assert read.shape == (80, 96) and (read[:, 88:] == 1).all() and read.sum() == 640


@pytest.mark.parametrize("mask", [
    np.full((160, 200), np.nan), np.full((160, 200), -0.1), np.full((160, 200), 1.1), np.full((160, 200), np.inf),
    np.full((160, 200), 255), np.full((160, 200), 255.0), np.full((160, 200), -1), np.zeros((160, 200), complex),
    np.zeros((160, 200), object), np.full((160, 200), "x"), np.zeros((161, 200)), np.zeros((200, 160)),
    np.zeros((3, 160, 200)),
    np.zeros((160, 200, 2), np.uint8), np.zeros((0, 0)), np.zeros(()), np.zeros(160), torch.zeros(2, 1, 160, 200),
    torch.zeros(0, 200), Image.new("I", (200, 160), 255), Image.new("L", (199, 160)), [[0, 1]], None, "missing.png",
], ids=lambda m: f"{type(m).__name__} {getattr(m, 'dtype', '')} {no_address(getattr(m, 'shape', m))}")  # fmt: skip
def test_bad_masks_are_refused(mask):
    with pytest.raises(ValueError):
        images.latent_mask(mask, PICTURE, WORKING)


# ---------------------------------------------------------------- in an edit


FEW = {"target": "a zebra", "source": "a horse", "steps": 4, "maps": 1, "seed": 0}


@pytest.mark.parametrize("given", [False, True], ids=["computed", "given"])
def test_outside_the_paste_mask_the_pixels_are_the_inputs(sd, given):
    picture = noise(301, 203)
    mask = np.zeros((203, 301), np.uint8)
    mask[60:90, 200:260] = 255
    done = edit(sd, picture, mask=mask if given else None, mask_threshold=0.9, **FEW)
    before, after, paste = (np.asarray(p) for p in (picture, done.image, done.paste_mask))
    assert done.image.size == (301, 203) == done.mask.size == done.paste_mask.size
    assert (paste == 0).mean() > 0.2 and (before == after)[paste == 0].all()
    assert (before != after)[paste == 255].mean() > 0.9
    assert (paste[np.asarray(done.mask) == 255] == 255).all()  # the whole mask shows the edit
    plain = edit(sd, picture, mask=mask if given else None, mask_threshold=0.9, paste=False, **FEW)
    assert plain.paste_mask is None and (np.asarray(plain.image) != before)[paste == 0].mean() > 0.9


def test_an_empty_mask_gives_the_source_and_a_full_one_an_edit(sd):
    picture = noise(75, 64)
    with pytest.warns(UserWarning, match="nothing to edit"):
        done = edit(sd, picture, mask=np.zeros((64, 75)), **FEW)
    assert done.image.tobytes() == picture.tobytes() and not any(done.evaluations.values())
    full = edit(sd, picture, mask=np.ones((64, 75)), **FEW)
    assert full.coverage == 1 and (np.asarray(full.paste_mask) == 255).all()
    assert (np.asarray(full.image) != np.asarray(picture)).mean() > 0.9


def test_a_saved_mask_is_the_same_mask_again(sd):
    """At sizes the grid divides; elsewhere a cell's border pixels touch its neighbours."""
    first = edit(sd, noise(96, 64), **FEW)
    again = edit(sd, noise(96, 64), mask=first.mask, **FEW)
    assert torch.equal(first.latent_mask, again.latent_mask) and first.image.tobytes() == again.image.tobytes()


@pytest.mark.parametrize("size, resized", [((40, 50), "up"), ((500, 300), "down"), ((8, 64), "1:8")])
def test_the_result_has_the_inputs_size_and_the_input_stays(sd, size, resized):
    picture = noise(*size)
    array = np.array(picture)
    before = array.copy()
    done = edit(sd, array, mask=np.ones(size[::-1], bool), **FEW)
    assert done.image.size == done.source.size == size and (array == before).all()


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize(
    "suffix, exact", [("png", True), ("PNG", True), ("webp", True), ("jpg", False), ("jpeg", False)]
)
def test_the_suffix_decides_the_format(tmp_path, suffix, exact):
    path = tmp_path / f"a.b.{suffix}"
    images.write_picture(noise(30, 20), path)
    with Image.open(path) as file:
        assert file.format == images.FORMATS["." + suffix.lower()]
        assert (file.tobytes() == noise(30, 20).tobytes()) == exact
        assert exact or JpegImagePlugin.get_sampling(file) == 0  # 4:4:4
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["a", "a.gif", "a.png.bak", ".png", "a.tiff", "a.jpg2"])
def test_other_suffixes_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="must end in"):
        images.write_picture(noise(9, 9), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_sides_beyond_the_format_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"at most 16383 pixels.*\.png"):
        images.write_picture(Image.new("RGB", (16384, 1)), tmp_path / "a.webp")
    images.write_picture(Image.new("RGB", (16383, 1)), tmp_path / "a.webp")
    with pytest.raises(ValueError, match=r"at most 65500"):
        images.write_picture(Image.new("RGB", (65501, 1)), tmp_path / "a.jpg")
    images.write_picture(Image.new("RGB", (65500, 1)), tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"old")
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # as good as a full disk
    try:
        with pytest.raises(OSError):
            images.write_picture(noise(100, 100), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        images.write_picture(noise(9, 9), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_written_files_have_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        images.write_picture(noise(9, 9), tmp_path / "a.png")
    finally:
        os.umask(before)
    assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_a_colour_profile_is_kept(tmp_path, sd, suffix):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    noise(64, 64).save(tmp_path / f"in.{suffix}", icc_profile=profile)
    for mask in (np.ones((64, 64)), None):
        done = edit(sd, tmp_path / f"in.{suffix}", mask=mask, **FEW)
        images.write_picture(done.image, tmp_path / f"out.{suffix}")
        with Image.open(tmp_path / f"out.{suffix}") as file:
            assert file.info["icc_profile"] == profile


def test_a_profile_of_other_colours_is_dropped():
    for mode, space in (("L", b"GRAY"), ("CMYK", b"CMYK")):
        picture = Image.new(mode, (8, 8))
        picture.info["icc_profile"] = bytes(16) + space + bytes(108)
        assert images.to_rgb(picture).info == {}


# ---------------------------------------------------------------- from the field


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "AVIF"])
def test_further_formats_are_read(tmp_path, kind):
    exact = kind != "AVIF"
    picture = noise(40, 24).quantize(16).convert("RGB") if exact else Image.radial_gradient("L").convert("RGB")
    picture.save(tmp_path / f"a.{kind.lower()}", quality=100)
    apart = np.abs(rgb(tmp_path / f"a.{kind.lower()}").astype(int) - np.asarray(picture))
    assert apart.max() == 0 if exact else apart.mean() < 12
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime")]
    if kind in ("GIF", "TIFF"):
        frames[0].save(tmp_path / "b", kind, save_all=True, append_images=frames[1:])
        with pytest.warns(UserWarning, match="2 pictures.*only the first"):
            assert rgb(tmp_path / "b")[8, 8].tolist() == [255, 0, 0]


def from_a_camera(path, **options):
    """An upright picture of 48 x 32, stored on its side with all that a camera writes."""
    exif, profile = Image.Exif(), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif[0x010F], exif[0x0132], exif[0x0112] = "Maker", "2024:01:02 03:04:05", 6
    exif[0x8769] = {0x9003: "2024:01:02 03:04:05", 0xA002: 32, 0xA003: 48}
    exif[0x8825] = {1: "N", 2: (48.0, 51.0, 30.0)}
    noise(32, 48).save(path, exif=exif.tobytes(), dpi=(300, 300), icc_profile=profile, **options)
    return profile


@pytest.mark.parametrize("written", ["png", "jpg", "webp"])
@pytest.mark.parametrize("stored", ["jpg", "png", "webp", "tiff", "avif"])
def test_what_a_camera_wrote_stays_but_for_its_orientation(tmp_path, sd, stored, written):
    profile = from_a_camera(tmp_path / f"in.{stored}")
    picture = images.to_rgb(images.read_picture(tmp_path / f"in.{stored}"))
    for name, text in (("with", {"parameters": "a zebra"}), ("without", {}), ("plain", None)):
        images.write_picture(picture, tmp_path / f"{name}.{written}", text)
        with Image.open(tmp_path / f"{name}.{written}") as file:
            exif = file.getexif()
            own, place = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
            assert file.size == (48, 32) and 0x0112 not in exif and not exif.get_ifd(IFD.IFD1)
            if name == "without":
                assert not exif and "icc_profile" not in file.info and "dpi" not in file.info
                continue
            assert exif[0x010F] == "Maker" and exif[0x0132] == "2024:01:02 03:04:05" and place[1] == "N"
            assert own[0x9003] == "2024:01:02 03:04:05" and 0xA002 not in own
            assert (0x9286 in own) == (name == "with" and written != "png") and file.info["icc_profile"] == profile
            dots = file.info.get("dpi", (0, 0))
            assert written == "webp" or stored in ("webp", "avif") or abs(dots[0] - 300) < 1


def test_the_thumbnail_is_dropped_and_the_rest_fits(tmp_path):
    """A hand-made EXIF block whose second directory is a thumbnail; a JPEG segment that it would overfill."""
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    first = exif.tobytes()[6:]
    end = struct.unpack(">H", first[8:10])[0] * 12 + 10
    second = struct.pack(">HHHII", 1, 0x0201, 4, 1, len(first) + 18) + bytes(4)
    block = b"Exif\0\0" + first[:end] + struct.pack(">I", len(first)) + first[end + 4 :] + second + b"thumbnail"
    noise(32, 32).save(tmp_path / "a.png", exif=block)
    with Image.open(tmp_path / "a.png") as file:
        assert file.getexif().get_ifd(IFD.IFD1)
    kept = images.read_picture(tmp_path / "a.png").info["exif"]
    assert b"Maker" in kept and b"thumbnail" not in kept
    picture = images.to_rgb(images.read_picture(tmp_path / "a.png"))
    exif[0x010E] = "x" * 60000
    picture.info["exif"] = exif.tobytes()
    with pytest.warns(UserWarning, match="the source's EXIF data are too long"):
        images.write_picture(picture, tmp_path / "b.jpg", {"parameters": "a zebra" * 900})
    with Image.open(tmp_path / "b.jpg") as file:
        assert 0x010E not in file.getexif() and 0x9286 in file.getexif().get_ifd(0x8769)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_mask_with_a_transparent_hole_is_the_hole(tmp_path, mode):
    """Whatever the picture shows, the hole is what is edited; before, it was what was kept."""
    hole = np.zeros((160, 200), bool)
    hole[40:80, 48:120] = True
    picture = noise(200, 160).convert("RGBA")
    picture.putalpha(Image.fromarray(np.where(hole, 0, 255).astype(np.uint8)))
    picture = picture.convert("LA") if mode == "LA" else picture
    if mode == "P":
        indices = np.where(hole, 3, 1).astype(np.uint8)
        picture = Image.fromarray(indices).convert("P")
        picture.putpalette([200, 30, 40] * 4)
        picture.info["transparency"] = 3
    picture.save(tmp_path / "m.png")
    for source in (picture, tmp_path / "m.png"):
        np.testing.assert_array_equal(images.read_mask(source), hole)
    faint = Image.new("RGBA", (200, 160), (9, 9, 9, 254))
    assert (images.read_mask(faint) == np.float32(1) / np.float32(255)).all()


def test_paint_of_one_colour_on_nothing_may_mean_either(tmp_path):
    """Of a layer of a drawing program; white paint is edited, a hole in a picture of one colour too."""
    for colour in ((255, 0, 0), (0, 0, 0), (120, 120, 120)):
        layer = Image.new("RGBA", (200, 160))
        layer.paste((*colour, 255), (48, 40, 120, 80))
        layer.save(tmp_path / "m.png")
        with pytest.raises(ValueError, match="on nothing: is the paint edited or the rest"):
            images.latent_mask(tmp_path / "m.png", PICTURE, WORKING)
    layer.paste((255, 255, 255, 255), (48, 40, 120, 80))
    read = images.read_mask(layer)
    assert read[60, 60] == 1 and read.mean() == pytest.approx(72 * 40 / (200 * 160))
    hole = Image.new("RGBA", (200, 160), (255, 0, 0, 255))
    hole.paste((0, 0, 0, 0), (48, 40, 120, 80))
    np.testing.assert_array_equal(images.read_mask(hole), images.read_mask(layer))


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_mask_of_16_bits_in_either_order_of_bytes(tmp_path, order):
    values = np.zeros((160, 200), f"{order}u2")
    values[40:80, 48:120] = 65535
    Image.frombytes("I;16" + "B" * (order == ">"), (200, 160), values.tobytes()).save(tmp_path / "m.tiff")
    with Image.open(tmp_path / "m.tiff") as file:
        assert file.mode == "I;16" + "B" * (order == ">")
    np.testing.assert_array_equal(images.read_mask(tmp_path / "m.tiff"), values > 0)


@pytest.mark.parametrize("mask", [
    noise(200, 160), np.asarray(noise(200, 160)), Image.new("RGB", (200, 160), (255, 0, 0)),
    Image.new("HSV", (200, 160), (80, 200, 200)),
], ids=["photo", "array", "red", "HSV"])  # fmt: skip
def test_a_mask_with_colours_is_refused_by_name(mask):
    with pytest.raises(ValueError, match=r"a mask is grey.*has colours, such as \(\d+, \d+, \d+\).*transparent"):
        images.latent_mask(mask, PICTURE, WORKING)


@pytest.mark.parametrize("low, high, said", [
    (1, 255, "from 0.00392 to 1 .*nothing is kept wholly"), (0, 2, "from 0 to 0.00784 .*nothing is edited wholly"),
    (0, 15, "from 0 to 0.0588 .*labels"), (0, 127, "to 0.498"), (3, 90, "nothing is edited"),
    (0, 255, ""), (0, 1, ""), (255, 255, ""), (0, 0, ""), (0, 128, ""),
])  # fmt: skip
def test_a_mask_that_says_neither_yes_nor_no_is_named_with_its_range(low, high, said, recwarn):
    values = np.full((160, 200), low, np.uint8)
    values[40:80, 40:80] = high
    images.latent_mask(values, PICTURE, WORKING)
    found = [str(one.message) for one in recwarn]
    assert len(found) == bool(said) and all(re.search(said, one) for one in found)


def test_a_mask_of_the_same_aspect_is_resized_with_a_word():
    large = np.zeros((640, 800), np.uint8)
    large[160:320, 200:400] = 255
    small = large[::8, ::8]
    wanted = images.latent_mask(large[::4, ::4], PICTURE, WORKING)
    for mask in (large, small):
        with pytest.warns(
            UserWarning, match=f"is {mask.shape[1]} x {mask.shape[0]}, resized to the picture's 200 x 160"
        ):
            assert torch.equal(images.latent_mask(mask, PICTURE, WORKING), wanted)
    with pytest.raises(ValueError) as refused:
        images.latent_mask(np.zeros((99, 200), np.uint8), (128, 128), (128, 128))
    assert str(refused.value).count("128 x 128") == 1


def test_what_is_half_transparent_or_no_mask_is_laid_on_white_with_a_word(sd):
    picture = noise(64, 64).convert("RGBA")
    picture.putalpha(128)
    with pytest.warns(UserWarning, match="laid on white; to edit them"):
        assert not images.has_hole(picture)
    picture.paste((0, 0, 0, 0), (8, 8, 30, 30))
    with pytest.warns(UserWarning, match="laid on white$"):
        edit(sd, picture, "masactrl", source="a", target="b", steps=2, seed=0)


@pytest.mark.parametrize("box, hole", [((8, 8, 30, 30), True), ((0, 0, 30, 30), False), ((0, 10, 20, 30), True)])
def test_an_erased_part_of_the_picture_is_its_mask(tmp_path, sd, box, hole):
    """A cut-out, transparent at a corner, is laid on white as ever."""
    picture = noise(64, 64).convert("RGBA")
    picture.paste((0, 0, 0, 0), box)
    picture.save(tmp_path / "a.png")
    if not hole:
        with pytest.warns(UserWarning, match="laid on white; to edit them give it as the mask"):
            assert not images.has_hole(tmp_path / "a.png")
        return
    with pytest.warns(UserWarning, match="erased.*taken for the mask"):
        done = edit(sd, tmp_path / "a.png", **FEW)
    given = edit(sd, tmp_path / "a.png", mask=tmp_path / "a.png", **FEW)
    assert done.verdict == "given" and done.image.tobytes() == given.image.tobytes()
    with pytest.warns(UserWarning, match="erased"):
        edit(sd, picture, "user-mask", target="a zebra", steps=2, seed=0)
    found = edit(sd, picture, target="a zebra", source="a horse", mask_from="words:horse", steps=2, seed=0)
    assert found.settings["mask"] == "computed"  # another mask is asked for
