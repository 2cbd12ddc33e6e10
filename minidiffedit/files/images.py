"""Pictures and masks: files to tensors and back. No network knows of files, no file function of networks.

A picture is resized (Lanczos) so that its shorter side has the model's training size, sides rounded to multiples of 8,
never cropped or padded; the result is resized back and, outside the mask, the input's own pixels are put back.
"""

import base64
import io
import json
import math
import os
import secrets
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from ..ddim import whole

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # written
READ = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
LONGEST_SIDE = {"PNG": 2**31 - 1, "JPEG": 65500, "WEBP": 16383}  # what the encoders take
LONGEST_EXIF = 65533  # one JPEG segment
MOST_PIXELS = 1024 * 1024  # what the model is asked to work on
MOST_ASPECT = 8
CELLS = "minidiffedit-mask"  # the text chunk that keeps a mask's latent cells
# What of a picture's EXIF describes it, whatever its format and size: texts, makers, dates, density, its two parts.
DESCRIBING = {270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 33432, 34665, 34853, *range(40091, 40096)}
EXIF, COMMENT, PIXELS_OF = 0x8769, 0x9286, (0xA002, 0xA003)
MOST_COLOUR = 32  # by how much the channels of a mask may differ: a JPEG's noise


def read_picture(source: Any) -> Image.Image:
    """A path, PIL image or uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) -> PIL, upright, otherwise as stored.

    PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF; of several frames or pages the first. `info` keeps the colour profile, the
    dpi, and of the EXIF data what describes the picture. The source stays as it was. Raises ValueError for anything
    else, damaged files, and more than Pillow's limit of 89 million pixels.
    """
    name = source if isinstance(source, str | os.PathLike) else "the picture"
    if isinstance(source, np.ndarray):
        channels = source.shape[2:] in ((), (1,), (3,), (4,))
        if source.dtype != np.uint8 or source.ndim < 2 or not channels or 0 in source.shape:
            raise ValueError(f"a picture array must be uint8 (H, W) or (H, W, 3), got {source.dtype} {source.shape}")
        picture = Image.fromarray(source.squeeze(-1) if source.shape[2:] == (1,) else source)
    elif isinstance(source, Image.Image):
        with _read_or_refused(name):  # Pillow may not have read its pixels yet
            named = getattr(source, "filename", "")
            vars(source).update(filename="")  # else Pillow maps a TIFF's pixels; one on its side is scrambled
            picture = source.copy()
            vars(source).update(filename=named)
    elif isinstance(source, str | os.PathLike):
        picture = _open(Path(source))
    else:
        raise ValueError(f"a picture must be a path, a PIL image or a uint8 array, got {type(source).__name__}")
    if min(picture.size) < 1:
        raise ValueError(f"{name} has no pixels: the picture is {picture.size[0]} x {picture.size[1]}")
    if picture.mode in ("I", "F", "LAB"):  # 255, 65535 or 1 could be white
        raise ValueError(f"{name}: a picture of the mode {picture.mode} has no agreed white; convert it to L or RGB")
    exif = b""
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        try:
            picture = ImageOps.exif_transpose(picture)
            exif = describing(picture)
        except Exception as error:  # Pillow's EXIF parser raises whatever the damage leads to
            complaints.append(error)  # type: ignore[arg-type]
    if complaints:
        warnings.warn("the picture's EXIF data is damaged; check that the result is not on its side", stacklevel=3)
    picture.info.pop("exif", None)  # its orientation is spent
    picture.info |= {"exif": exif} if exif else {}
    return picture


def describing(picture: Image.Image) -> bytes:
    """The EXIF data of an upright picture without thumbnail, orientation and what belongs to its file; b"" for none."""
    exif, kept = picture.getexif(), Image.Exif()
    for tag in exif.keys() & DESCRIBING:
        kept[tag] = dict(exif.get_ifd(tag)) if tag > 34000 and tag < 35000 else exif[tag]
    for tag in PIXELS_OF if EXIF in kept else ():
        kept[EXIF].pop(tag, None)
    return kept.tobytes() if len(kept) else b""


def has_hole(source: Any, masked: bool = True) -> bool:
    """Whether a part of a picture is erased: transparent, while its corners are not, as those of a cut-out are. Said
    in a warning, as is what is transparent otherwise; what cannot be read has none. masked: whether a hole is a mask.
    """
    try:
        if isinstance(source, str | os.PathLike):
            if not os.path.isfile(source):  # a pipe would wait for ever
                return False
            with warnings.catch_warnings(), Image.open(source) as file:  # looks at the header alone
                warnings.simplefilter("ignore")
                if not file.has_transparency_data:
                    return False
        picture = read_picture(source)
        if picture.mode.startswith("I") or not picture.has_transparency_data:
            return False
        alpha = np.asarray(picture.convert("RGBA"))[..., 3]
    except Exception:
        return False
    hole = bool(masked and alpha.min() == 0 and corners(alpha).min() == 255)
    if hole:
        warnings.warn("a part of the picture is erased (transparent), and taken for the mask", stacklevel=3)
    elif alpha.min() < 255:
        advice = "; to edit them give it as the mask, too" if masked else ""
        warnings.warn(f"transparent parts of the picture are laid on white{advice}", stacklevel=3)
    return hole


def corners(alpha: np.ndarray) -> np.ndarray:
    return alpha[[0, 0, -1, -1], [0, -1, 0, -1]]


def _open(path: Path) -> Image.Image:
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder; name a picture")
    if not os.path.isfile(path):  # a pipe would wait for ever
        raise ValueError(f"{path} is not a regular file" if os.path.exists(path) else f"{path}: no such file")
    with _read_or_refused(f"{path} ({os.path.getsize(path)} bytes)"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow's on EXIF data: read_picture has its own
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.init()
        kinds = [kind for kind in READ if kind in Image.OPEN]  # AVIF: as built
        with path.open("rb") as raw, Image.open(raw, formats=kinds) as file:
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # MPO: a JPEG with a preview
            picture = file.copy()
            with suppress(Exception):  # whatever damage leads to
                picture.info |= {"exif": describing(file)} if file.format == "TIFF" else {}  # stands in its own tags
    if frames > 1:
        warnings.warn(f"{path} is animated or has pages ({frames} pictures); only the first is used", stacklevel=4)
    return picture


@contextmanager
def _read_or_refused(name: Any) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        kinds = f"{', '.join(READ[:-1])} or {READ[-1]}"
        raise ValueError(f"{name} is no picture ({kinds}), or cut short; convert it or get it again") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: {error} Scale it down first.") from error
    except PermissionError as error:
        raise ValueError(f"{name} cannot be read: permission denied") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, IndexError, ...
        raise ValueError(f"{name} is damaged or cut short ({error}); get it again") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode -> RGB: alpha (palettes' too) onto white, 16-bit grey scaled to 8; colour profile, EXIF and dpi stay."""
    profile, kept = picture.info.get("icc_profile") or b"", {"exif": picture.info.get("exif"), "dpi": dpi_of(picture)}
    if picture.mode.startswith("I;16"):
        picture = _grey8(picture)
    rgb = _flattened(picture, "white").convert("RGB")
    kept["icc_profile"] = profile if profile[16:20] == b"RGB " else None  # grey's and CMYK's fit no more
    rgb.info = {name: value for name, value in kept.items() if value}
    return rgb


def dpi_of(picture: Image.Image) -> tuple[float, float] | None:
    """Pixels an inch, across and down, as far as it is a sound number."""
    try:
        x, y = (float(one) for one in picture.info.get("dpi", ()))
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 1 <= x <= 65535 and 1 <= y <= 65535 else None


def _flattened(picture: Image.Image, colour: str) -> Image.Image:
    """Alpha, also of a palette or of one transparent colour, laid onto a colour."""
    if not picture.has_transparency_data:
        return picture
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, colour), picture)


def _grey8(picture: Image.Image) -> Image.Image:
    """16-bit grey ("I;16") to 8-bit; a plain conversion would clip at 255. A transparent grey becomes white."""
    values = np.asarray(picture).astype(np.float64)
    values[values == picture.info.get("transparency", -1)] = 65535
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def working_size(size: tuple[int, int], side: int, factor: int = 8) -> tuple[int, int]:
    """(width, height) of the picture -> what the model works on: shorter side `side`, at most 1024 x 1024 pixels in
    all, both sides the nearest multiples of `factor`.

    Raises ValueError beyond an aspect of 8:1, for less than `factor` pixels, or where `side` is not from 64 to 1024.
    """
    if isinstance(side, bool) or not isinstance(side, int) or not 64 <= side <= 1024:
        raise ValueError(f"size must be a whole number from 64 to 1024, got {side!r}")
    if max(size) > MOST_ASPECT * min(size):
        raise ValueError(f"the picture is {size[0]} x {size[1]}: beyond 8:1; crop it first")
    if min(size) < factor:
        raise ValueError(f"the picture is {size[0]} x {size[1]}: less than a cell of {factor} pixels; enlarge it")
    w, h = size  # each side at the scale of `side`, or at the one that makes w h = MOST_PIXELS
    exact = [min(a * side / min(w, h), math.sqrt(MOST_PIXELS * a / b)) for a, b in ((w, h), (h, w))]
    sides = [factor * math.floor(a / factor + 0.5) for a in exact]
    while sides[0] * sides[1] > MOST_PIXELS:  # rounded up
        sides[sides.index(max(sides))] -= factor
    return sides[0], sides[1]


def to_tensor(rgb: Image.Image, size: tuple[int, int]) -> Tensor:
    """PIL RGB, resized to (width, height) -> (1, 3, H, W) float32 in [-1, 1]."""
    if rgb.size != size:
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(rgb, dtype=np.uint8)).permute(2, 0, 1)[None].float() / 255 * 2 - 1


def to_picture(image: Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """(1, 3, H, W) in about [-1, 1] -> PIL RGB, clamped, rounded, resized to (width, height) if given."""
    pixels = ((image[0].float() / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return picture if size in (None, picture.size) else picture.resize(size, Image.Resampling.LANCZOS)


def read_mask(source: Any) -> np.ndarray:
    """A user's mask of any kind -> (H, W) float32 in [0, 1], 1 = edited; the source is left as it was.

    Files and PIL images are read as grey, 8- and 16-bit values by their range, or as 0 and 1 where none is above 1;
    where some of it is transparent, that hole is 1, whatever is seen around it, unless that is white paint alone: then
    the paint is. Wider integers must be 0 and 1, floats in [0, 1]. Also arrays and tensors (H, W), (1, H, W),
    (1, 1, H, W), (H, W, 1), (1, H, W, 1), and uint8 (H, W, 3 or 4). Raises ValueError for colours and anything else.
    """
    if isinstance(source, Tensor):
        try:
            source = source.detach().cpu()
            source = (source.float() if source.is_floating_point() else source).numpy()
        except (TypeError, RuntimeError) as error:  # sparse, quantised, or without data
            raise ValueError(f"a mask must be a plain tensor with data, got {source.layout} {source.dtype}") from error
    values = source
    if isinstance(source, np.ndarray):
        while values.ndim > 2 and 1 in (values.shape[0], values.shape[-1]):
            values = values[0] if values.shape[0] == 1 else values[..., 0]
        if values.ndim == 3 and values.dtype == np.uint8:
            values = _grey_values(read_picture(values))
    elif isinstance(source, Image.Image) and source.mode in ("I", "F"):
        values = np.asarray(source)
    else:
        values = _grey_values(read_picture(source))
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"a mask must be (H, W), got {values.shape}")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"a mask must hold bool, integers or floats, got {values.dtype}")
    if values.dtype in (np.uint8, np.uint16) and values.max() > 1:
        values = values / np.iinfo(values.dtype).max
    if not (values.min() >= 0 and values.max() <= 1):  # also false for NaN
        got = f"{values.dtype} from {values.min()} to {values.max()}"
        raise ValueError(f"a mask's values must lie in [0, 1], 1 = edited (or be uint8, uint16), got {got}")
    return values.astype(np.float32)


def _grey_values(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I;16"):
        return np.asarray(picture).astype(np.uint16)  # a TIFF has its own order of bytes
    pixels = np.asarray(picture.convert("RGBA"))
    alpha, seen = pixels[..., 3], pixels[pixels[..., 3] > 0, :3]
    if alpha.min() < 255:
        painted = seen.size > 0 and seen.min() >= 250
        if seen.size and not painted and np.ptp(seen, axis=0).max() <= MOST_COLOUR and corners(alpha).min() == 0:
            raise ValueError(
                f"a mask of one colour, {(*seen[0].tolist(),)}, on nothing: is the paint edited or the rest? Make what "
                "is edited white and the rest black"
            )
        return (alpha if painted else 255 - alpha).astype(np.float32) / 255
    spread = np.ptp(seen.astype(int), axis=1)
    if spread.max() > MOST_COLOUR:
        raise ValueError(
            f"a mask is grey, white = edited, and this one has colours, such as {(*seen[spread.argmax()].tolist(),)}; "
            "make the region white and the rest black, or erase it from the picture (transparent = edited)"
        )
    return np.asarray(picture.convert("L"))


def latent_mask(source: Any, picture: tuple[int, int], working: tuple[int, int], factor: int = 8) -> Tensor:
    """A user's mask -> (1, 1, h, w) float32 in [0, 1] on the latent grid, soft values kept.

    picture, working: (width, height) of the input and of what the model works on. A mask of the input's size is
    averaged (BOX) to the working size; of each `factor` x `factor` block the largest value counts. One of latent
    size is taken as it is, one of the picture's aspect resized, with a warning; any other size raises ValueError. So
    does a warning tell of values that edit nothing wholly, or keep nothing wholly. One that `mask_picture` made for
    this picture and this grid, also as a PNG file, gives the very cells it was made of, if nobody painted in it.
    """
    if isinstance(source, str | os.PathLike):
        source = read_picture(source)
    latent = (working[0] // factor, working[1] // factor)
    if (cells := kept_cells(source, picture, latent)) is not None:
        return cells
    values = read_mask(source)
    size = (values.shape[1], values.shape[0])
    check_range(float(values.min()), float(values.max()))
    if size == latent and size not in (picture, working):
        return torch.from_numpy(values)[None, None]
    same_aspect = min(size) >= factor and abs(size[0] * picture[1] / picture[0] - size[1]) <= 0.51
    if size in (picture, working) or same_aspect:
        if size not in (picture, working):
            said = f"the mask is {size[0]} x {size[1]}, resized to the picture's {picture[0]} x {picture[1]}"
            warnings.warn(said, stacklevel=2)
        if size != working:
            values = np.asarray(Image.fromarray(values).resize(working, Image.Resampling.BOX)).clip(0, 1)
        return F.max_pool2d(torch.from_numpy(values)[None, None], factor)
    others = f"or {working[0]} x {working[1]}, " if working != picture else ""
    raise ValueError(
        f"the mask is {size[0]} x {size[1]}; it must have the picture's size {picture[0]} x {picture[1]} or aspect "
        f"({others}or the latent's {latent[0]} x {latent[1]})"
    )


def pixel_mask(source: Any, picture: tuple[int, int]) -> np.ndarray | None:
    """A mask (H, W) as `read_mask`, if it has the picture's size and no cells of its own."""
    if source is None or (isinstance(source, Image.Image) and CELLS in source.info):
        return None
    values = read_mask(source)
    return values if (values.shape[1], values.shape[0]) == picture else None


def check_range(low: float, high: float) -> None:
    """Warn of a mask whose values, 0 = kept and 1 = edited, say neither."""
    reach = f"the mask's values reach from {low:.3g} to {high:.3g} (0 = kept, 1 = edited)"
    if 0 < high < 0.5:
        warnings.warn(f"{reach}: nothing is edited wholly; make the region white, also of labels", stacklevel=3)
    elif 0 < low < 1:
        warnings.warn(f"{reach}: nothing is kept wholly; make what shall stay black", stacklevel=3)


def grey_picture(values: Tensor, size: tuple[int, int], smooth: bool = False) -> Image.Image:
    """(1, 1, h, w) in [0, 1] -> PIL L at (width, height), cells as blocks or interpolated."""
    cells = (values[0, 0].float() * 255).round().to("cpu", torch.uint8)
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return Image.fromarray(cells.numpy()).resize(size, how)


def mask_picture(mask: Tensor, size: tuple[int, int]) -> Image.Image:
    """Latent mask (1, 1, h, w) in [0, 1] -> PIL L at (width, height), cells as blocks.

    Where the blocks do not divide the picture, or grey rounds, pixels alone do not tell the cells. So they stand in its
    `info` besides; `write_picture` keeps them in a PNG, and `latent_mask` gives them back bit for bit.
    """
    picture = grey_picture(mask, size)
    cells = mask[0, 0].float().cpu().numpy().astype("<f4")
    coded = base64.b64encode(zlib.compress(cells.tobytes(), 9)).decode()
    picture.info[CELLS] = f"{cells.shape[1]}x{cells.shape[0]} {coded}"
    return picture


def kept_cells(source: Any, picture: tuple[int, int], latent: tuple[int, int]) -> Tensor | None:
    """The cells (1, 1, h, w) float32 that `mask_picture` left in a mask of this size, if its pixels still show them."""
    if not isinstance(source, Image.Image) or source.mode != "L" or source.size != picture:
        return None
    shape, _, coded = str(source.info.get(CELLS, "")).partition(" ")
    if shape != f"{latent[0]}x{latent[1]}":
        return None
    length = 4 * latent[0] * latent[1]
    try:
        raw = zlib.decompressobj().decompress(base64.b64decode(coded), length + 1)
    except (ValueError, zlib.error):
        return None
    if len(raw) != length:
        return None
    cells = torch.from_numpy(np.frombuffer(raw, "<f4").astype(np.float32).reshape(1, 1, latent[1], latent[0]))
    if not bool(((cells >= 0) & (cells <= 1)).all()):  # also false for NaN
        return None
    return cells if grey_picture(cells, picture).tobytes() == source.tobytes() else None  # painted in since


def composite(
    image: Any, patch: Any, box: tuple[int, int, int, int], mask: Any = None
) -> tuple[Image.Image, Image.Image]:
    """A patch pasted in pixels, for SDEdit to blend in: (composite PIL RGB, region PIL L, white = pasted).

    box: (left, top, right, bottom) in the image's pixels, to which the patch is resized (Lanczos); mask: which of the
    patch's pixels are pasted, at its size, soft values mix. `edit(sd, composite, "sdedit", mask=region)` redraws
    the patch alone, without mask= its surroundings too. Raises ValueError for a box that is not inside the image, or a
    mask of another size than the patch.
    """
    picture, piece = (to_rgb(read_picture(one)) for one in (image, patch))
    left, top, right, bottom = box = tuple(whole("box", side, 0, 2**31 - 1) for side in box)  # type: ignore[assignment]
    if not (left < right <= picture.width and top < bottom <= picture.height):
        raise ValueError(f"box must lie inside the picture of {picture.width} x {picture.height}, got {box}")
    shape = Image.new("L", piece.size, 255)
    if mask is not None:
        values = torch.from_numpy(read_mask(mask))[None, None]
        if values.shape[:1:-1] != piece.size:
            raise ValueError(f"the mask must have the patch's size {piece.size}, got {tuple(values.shape[:1:-1])}")
        shape = grey_picture(values, (piece.width, piece.height))
    size, region = (right - left, bottom - top), Image.new("L", picture.size)
    region.paste(shape.resize(size, Image.Resampling.BOX), box)
    laid = picture.copy()
    laid.paste(piece.resize(size, Image.Resampling.LANCZOS), box)
    result = Image.composite(laid, picture, region)
    result.info = dict(picture.info)
    return result, region


def placed(picture: Image.Image, box: Sequence[int], patch: Image.Image, mask: Any = None) -> tuple[Any, Any]:
    """`composite` of the part of a patch that the mask shows (all of it without one), as large as it fits into box and
    in its middle, its sides in proportion. Raises ValueError for an empty mask, or one of another size than the patch.
    """
    part = (0, 0, *patch.size)
    if mask is not None:
        mask = Image.fromarray((read_mask(mask) * 255).round().astype(np.uint8))
        if mask.size != patch.size or not (part := mask.getbbox()):
            raise ValueError(f"reference_mask must be white somewhere and as large as the reference, {patch.size}")
        mask = mask.crop(part)
    patch, (left, top, right, bottom) = patch.crop(part), box
    scale = min((right - left) / patch.width, (bottom - top) / patch.height)
    w, h = (max(1, round(scale * side)) for side in patch.size)
    x, y = (left + right - w) // 2, (top + bottom - h) // 2
    return composite(picture, patch, (x, y, x + w, y + h), mask)


def paste_mask(mask: Tensor, size: tuple[int, int]) -> Image.Image:
    """Latent mask (1, 1, h, w) -> PIL L at (width, height), how much of each pixel is the edit's: cells of value 1 are
    grown by one cell, then faded out over one; elsewhere at most the cell's value, less beside lesser neighbours.
    """
    M = mask.float()
    grown = F.max_pool2d((M == 1).float(), kernel_size=3, stride=1, padding=1)
    soft = ImageChops.darker(grey_picture(M, size), grey_picture(M, size, smooth=True))
    return ImageChops.lighter(grey_picture(grown, size, smooth=True), soft)


def write_picture(picture: Image.Image, path: Path, text: dict[str, str] | None = None) -> None:
    """Write PNG, JPEG (quality 95, 4:4:4) or WebP (lossless) by the suffix, whole or not at all.

    text: metadata. In PNG one text chunk each (and one for the cells of a `mask_picture`); in JPEG and WebP the first
    is EXIF's UserComment, the others follow it as JSON-quoted extras, `, name: "value"`. The picture's own colour
    profile, dpi and EXIF data are written besides, unless text is {}: then the file holds pixels alone.
    """
    kind, own = picture_format(path, picture.size), picture.info if text is None or text else {}
    options: dict[str, Any] = {"icc_profile": own.get("icc_profile")}
    options |= {name: own[name] for name in ("dpi", "exif") if name in own and (name, kind) != ("dpi", "WEBP")}
    profile = picture.info.get("icc_profile", b"").replace(b"\0", b"")  # its name may be UTF-16
    if profile and not own and b"sRGB" not in profile:
        warnings.warn("the picture's colour profile is left out too: its colours will be taken for sRGB", stacklevel=2)
    if kind == "PNG":
        options["pnginfo"] = info = PngImagePlugin.PngInfo()
        cells = {CELLS: picture.info[CELLS]} if CELLS in picture.info else {}
        for key, value in ((text or {}) | cells).items():
            info.add_text(key, value)
    else:
        options |= {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
        wanted = [user_comment(text, own.get("exif", b"")), user_comment(text)] if text else []
        wanted += [options.pop("exif", b"")]
        fitting = [exif for exif in wanted if kind != "JPEG" or len(exif) <= LONGEST_EXIF]
        if fitting[:1] != wanted[:1]:
            left = "the source's EXIF data are" if text and fitting[:1] == wanted[1:2] else "the settings are"
            warnings.warn(f"{left} too long for JPEG's EXIF data and left out; PNG takes them", stacklevel=2)
        options |= {"exif": fitting[0]} if fitting and fitting[0] else {}
    encoded = io.BytesIO()  # Pillow, given a file, does not notice when the disk takes only a part
    picture.save(encoded, kind, **options)
    write_whole(path, encoded.getbuffer())


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """A file's content under its name, whole or not at all: what stood there stays until all is on the disk."""
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def user_comment(text: dict[str, str], exif_of_the_source: bytes = b"") -> bytes:
    (_, comment), *rest = text.items()
    comment = ", ".join([comment, *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in rest)])
    exif = Image.Exif()
    exif.load(exif_of_the_source)
    own = {COMMENT: b"UNICODE\0" + comment.encode("utf-16-be")}
    exif[EXIF] = exif.get_ifd(EXIF) | own  # set, as Pillow 11.0 forgets what get_ifd made
    return exif.tobytes()


def picture_format(path: Path, size: tuple[int, int] = (1, 1)) -> str:
    """Pillow's format name for a path's suffix. Raises ValueError for one that is not written here, or not so large."""
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: the name must end in .png, .jpg, .jpeg or .webp")
    if max(size) > LONGEST_SIDE[kind]:
        raise ValueError(f"{path}: {kind} holds at most {LONGEST_SIDE[kind]} pixels a side, not {max(size)}; use .png")
    return kind
