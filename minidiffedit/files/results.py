"""What a file tells of itself: the settings that a picture carries, and whether its name may be written over."""

import json
import os
from pathlib import Path
from typing import Any

NAME = "minidiffedit"
PAGE = b"Made by minidiffedit"  # in the foot of every page
MADE_BY = {"made_by": NAME}  # in the header of learned weights, alone: several would change places
MARK = {"parameters": "", NAME: json.dumps({"made": "map"})}  # of masks and heat maps, which have no settings


def settings_in(path: Path) -> dict[str, Any]:
    """The settings that a result's picture carries, none where it carries none or is no picture. They are what the file
    says: whoever uses them checks them.
    """
    from PIL import Image

    if not os.path.isfile(path):  # a pipe would wait for ever
        return {}
    try:
        with Image.open(path) as file:
            if NAME in file.info:
                found = json.loads(file.info[NAME])
            else:
                comment = file.getexif().get_ifd(0x8769).get(0x9286, b"")
                text = comment.removeprefix(b"UNICODE\0").decode("utf-16-be")
                found = json.loads(json.JSONDecoder().raw_decode(text, text.index(f"{NAME}: ") + len(NAME) + 2)[0])
            return found if isinstance(found, dict) else {}
    except Exception:  # Pillow's decoders raise whatever the damage leads to
        return {}


def is_ours(path: Path) -> bool:
    """Whether minidiffedit wrote this picture, saved edit, page or LoRA, as far as the file itself tells."""
    from PIL import Image

    from .images import CELLS
    from .states import read_record
    from .unsupported import read_header

    if not os.path.isfile(path):
        return False
    try:
        if path.suffix == ".safetensors":
            return MADE_BY.items() <= read_header(path).metadata.items() or bool(read_record(path))
        if path.suffix.lower() in (".html", ".htm"):
            return PAGE in path.read_bytes()
        with Image.open(path) as file:
            cells = CELLS in file.info
        return cells or bool(settings_in(path))
    except Exception:
        return False


def free(path: Path, *beside: str) -> Path:
    """The path, or the first of its numbered neighbours (NAME-2.png, ...) that is not there; nor may be any other file
    of that stem with one of these ends instead.
    """
    stem, number = path.stem, 1
    while any(os.path.lexists(path.with_name(path.stem + end)) for end in (path.suffix, *beside)):
        number += 1
        path = path.with_name(f"{stem}-{number}{path.suffix}")
    return path
