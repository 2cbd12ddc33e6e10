"""Pictures and masks: files to tensors and back. No network knows of files, no file function of networks.

A picture is resized (Lanczos) so that its shorter side has the model's training size, sides rounded to multiples of 8,
never cropped or padded; the result is resized back and, outside the mask, the input's own pixels are put back.
"""

import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MOST_PIXELS = 1024 * 1024  # what the model is asked to work on
MOST_ASPECT = 8


def read_picture(source: Any) -> Image.Image:
    """A path, PIL image or uint8 array (H, W, 3 or 1 or none) -> PIL, upright, as stored otherwise.

    PNG, JPEG and WebP. Raises ValueError for anything else, damaged, or above Pillow's limit of 89 million pixels.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or 0 in source.shape:
            raise ValueError(f"a picture array must be uint8 (H, W) or (H, W, 3), got {source.dtype} {source.shape}")
        source = Image.fromarray(source.squeeze(-1) if source.shape[2:] == (1,) else source)
    picture = source.copy() if isinstance(source, Image.Image) else _open(Path(source))
    if min(picture.size) < 1:
        raise ValueError(f"the picture has no pixels: {picture.size}")
    upright = ImageOps.exif_transpose(picture)
    upright.info.pop("exif", None)  # its orientation is spent
    return upright


def _open(path: Path) -> Image.Image:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a PNG, JPEG or WebP file is wanted")
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as file:
                if getattr(file, "n_frames", 1) > 1:
                    warnings.warn(f"{path} is animated; only its first frame is used", stacklevel=4)
                file.load()
                return file.copy()
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} is no PNG, JPEG or WebP picture ({path.stat().st_size} bytes)") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{path}: {error}; scale it down first") from error
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: permission denied") from error
    except (OSError, SyntaxError, ValueError, MemoryError) as error:  # Pillow's decoders raise all of these
        raise ValueError(f"{path} is damaged: {error}") from error


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode -> RGB: alpha (palettes' too) onto white, 16-bit grey scaled to 8; a colour profile is kept."""
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith("I"):
        picture = _grey8(picture)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    if picture.mode in ("CMYK", "LAB", "YCbCr", "HSV", "F"):
        profile = None  # it described the old colours
    rgb = picture.convert("RGB")
    rgb.info = {"icc_profile": profile} if profile else {}
    return rgb


def _grey8(picture: Image.Image) -> Image.Image:
    """16-bit grey ("I;16", or "I" from older Pillows) to 8-bit; a plain conversion would clip at 255."""
    values = np.asarray(picture, dtype=np.float64)
    return Image.fromarray(np.clip(np.rint(values / 257), 0, 255).astype(np.uint8))


def working_size(size: tuple[int, int], side: int, factor: int = 8) -> tuple[int, int]:
    """(width, height) of the picture -> what the model works on: shorter side `side`, at most 1024 x 1024 pixels in
    all, both sides the nearest multiples of `factor`.

    Raises ValueError beyond an aspect of 8:1, or where `side` is not from 64 to 1024.
    """
    if isinstance(side, bool) or not isinstance(side, int) or not 64 <= side <= 1024:
        raise ValueError(f"size must be a whole number from 64 to 1024, got {side!r}")
    if max(size) > MOST_ASPECT * min(size):
        raise ValueError(f"the picture is {size[0]} x {size[1]}: beyond 8:1; crop it first")
    scale = min(side / min(size), math.sqrt(MOST_PIXELS / (size[0] * size[1])))
    sides = [max(factor, factor * math.floor(s * scale / factor + 0.5)) for s in size]
    if sides[0] * sides[1] > MOST_PIXELS:  # rounding up by less than a cell
        sides[sides.index(max(sides))] -= factor
    return sides[0], sides[1]


def to_tensor(rgb: Image.Image, size: tuple[int, int]) -> Tensor:
    """PIL RGB, resized to (width, height) -> (1, 3, H, W) float32 in [-1, 1]."""
    if rgb.size != size:
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(rgb, dtype=np.uint8))
    return pixels.permute(2, 0, 1)[None].float() / 255 * 2 - 1


def to_picture(image: Tensor, size: tuple[int, int] | None = None) -> Image.Image:
    """(1, 3, H, W) in about [-1, 1] -> PIL RGB, clamped, rounded, resized to (width, height) if given."""
    pixels = ((image[0].float() / 2 + 0.5).clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return picture if size in (None, picture.size) else picture.resize(size, Image.Resampling.LANCZOS)


def read_mask(source: Any) -> np.ndarray:
    """A user's mask of any kind -> (H, W) float32 in [0, 1], 1 = edited; the source is left as it was.

    Files and PIL images are read as grey (alpha onto black), integers by their type's range, or as 0 and 1 where they
    hold nothing above 1; floats must lie in [0, 1]. Also arrays and tensors (H, W), (1, H, W), (1, 1, H, W).
    """
    if isinstance(source, Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    if not isinstance(source, np.ndarray):
        picture = read_picture(source)
        if picture.mode.startswith("I"):
            picture = _grey8(picture)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
        source = np.asarray(picture.convert("L"))
    values = source
    while values.ndim > 2 and values.shape[0] == 1:
        values = values[0]
    if values.ndim == 3 and values.shape[2] == 3 and values.dtype == np.uint8:
        values = np.asarray(Image.fromarray(values).convert("L"))
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"a mask must be (H, W), got {source.shape}")
    if values.dtype.kind in "iu":
        top = 1 if values.max() <= 1 else np.iinfo(values.dtype).max
        values = values / top
    elif values.dtype.kind not in "bf":
        raise ValueError(f"a mask must hold bool, integers or floats, got {values.dtype}")
    values = values.astype(np.float32)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError("a mask's values must lie in [0, 1], 1 = edited")
    return values


def latent_mask(source: Any, picture: tuple[int, int], working: tuple[int, int], factor: int = 8) -> Tensor:
    """A user's mask -> (1, 1, h, w) float32 in [0, 1] on the latent grid, soft values kept.

    picture, working: (width, height) of the input and of what the model works on. A mask of the input's size is
    averaged (BOX) to the working size; of each `factor` x `factor` block the largest value counts. One of latent
    size is taken as it is. Any other size raises ValueError.
    """
    values = read_mask(source)
    size = (values.shape[1], values.shape[0])
    latent = (working[0] // factor, working[1] // factor)
    if size in (picture, working):
        if size != working:
            values = np.asarray(Image.fromarray(values).resize(working, Image.Resampling.BOX)).clip(0, 1)
        return F.max_pool2d(torch.from_numpy(values.copy())[None, None], factor)
    if size == latent:
        return torch.from_numpy(values.copy())[None, None]
    raise ValueError(
        f"the mask is {size[0]} x {size[1]}; it must have the picture's size {picture[0]} x {picture[1]} "
        f"(or {working[0]} x {working[1]}, or the latent's {latent[0]} x {latent[1]})"
    )


def grey_picture(values: Tensor, size: tuple[int, int], smooth: bool = False) -> Image.Image:
    """(1, 1, h, w) in [0, 1] -> PIL L at (width, height), cells as blocks or interpolated."""
    cells = (values[0, 0].float() * 255).round().to("cpu", torch.uint8)
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    return Image.fromarray(cells.numpy()).resize(size, how)


def paste_mask(mask: Tensor, size: tuple[int, int]) -> Image.Image:
    """Latent mask (1, 1, h, w) -> PIL L at (width, height): grown by one cell, then faded out over one."""
    grown = F.max_pool2d(mask.float(), kernel_size=3, stride=1, padding=1)
    return grey_picture(grown, size, smooth=True)


def write_picture(picture: Image.Image, path: Path, text: dict[str, str] | None = None) -> None:
    """Write PNG, JPEG (quality 95, 4:4:4) or WebP (lossless) by the suffix, whole or not at all.

    text: metadata; PNG text chunks, in JPEG and WebP all of it in EXIF's UserComment.
    """
    text = text or {}
    options: dict[str, Any] = {"icc_profile": picture.info.get("icc_profile")}
    kind = picture_format(path)
    if kind == "PNG":
        options["pnginfo"] = info = PngImagePlugin.PngInfo()
        for key, value in text.items():
            info.add_text(key, value)
    else:
        exif = Image.Exif()
        comment = "\n".join(text.values())
        if comment:
            exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + comment.encode("utf-16-be")
        options |= {"exif": exif.tobytes()}
        options |= {"quality": 95, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            picture.save(file, kind, **options)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def picture_format(path: Path) -> str:
    """Pillow's format name for a path's suffix. Raises ValueError for one that is not written here."""
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: the name must end in .png, .jpg, .jpeg or .webp")
    return kind
