"""Sets of pictures with the edits they ask for, read from three layouts into one list of items.

- scenes: a folder with scenes.json, a list of {folder, source, target, kind}; in each folder source.png, and where they
  are known mask.png (white = may change) and target.png (the true edit). The miniature's are in weights/mini/scenes.
- CSV: a file with the columns image, target and, as far as known, source, mask, true_edit, kind, name; paths are taken
  from the file's folder. UTF-8, one header line.
- PIE-Bench (Ju et al., 2310.01506): mapping_file.json, in the folder or in its data/, and annotation_images/ beside it.
"""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files.images import read_mask
from ..files.masks import HAZE
from .manifest import comma_separated, lines_of

# PIE-Bench's editing_type_id, "0" to "9"
ATTRIBUTES = (f"change attribute {what}" for what in ("content", "pose", "color", "material"))
OBJECTS = ("change object", "add object", "delete object")
PIE_KINDS = ("random", *OBJECTS, *ATTRIBUTES, "change background", "change style")
PIE_SIDE = 512


@dataclass(frozen=True)
class Item:
    """One edit that is asked for. source may be ""; mask and true_edit are None where they are not known; mask: a file,
    white = may change, or PIE-Bench's pairs (start, length) over the rows of 512 x 512 pixels.
    """

    name: str
    picture: Path
    source: str
    target: str
    kind: str = ""
    mask: Path | tuple[int, ...] | None = None
    true_edit: Path | None = None
    layout: str = "csv"

    def truth(self, size: tuple[int, int]) -> np.ndarray | None:
        """Where a picture of size (width, height) may change, (H, W) bool. ValueError for a mask of another size."""
        if self.mask is None:
            return None
        read = pie_mask(self.mask) if isinstance(self.mask, tuple) else read_mask(self.mask)
        mask = read > read.max() * HAZE
        if mask.shape[::-1] != size:
            raise ValueError(f"the mask is {mask.shape[1]} x {mask.shape[0]}, the picture {size[0]} x {size[1]}")
        return mask


def open_dataset(path: Path) -> list[Item]:
    """The items of a folder or a CSV file in their order there. Pictures are not opened yet.

    Raises ValueError for what is none of the three layouts, or breaks its own; the message names the place.
    """
    if path.suffix.lower() == ".csv":
        items = numbered(path, read_csv(path), csv_item)
    elif (path / "scenes.json").is_file():
        items = numbered(path / "scenes.json", read_json(path / "scenes.json", list), scene_item)
    else:
        found = [file for file in (path / "mapping_file.json", path / "data" / "mapping_file.json") if file.is_file()]
        if not found:
            raise ValueError(f"{path} is no data set: a .csv file, or a folder with scenes.json or mapping_file.json")
        items = numbered(found[0], list(read_json(found[0], dict).items()), pie_item)
    if len({item.name for item in items}) < len(items):
        names = [item.name for item in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path}: two edits are named {twice!r}; give each a name of its own")
    return items


def numbered(file: Path, entries: list[Any], read: Callable[[Path, Any], Item]) -> list[Item]:
    items = []
    for number, entry in enumerate(entries, 1):
        try:
            items.append(read(file.parent, entry))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            wrong = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{file}, edit {number}: {wrong}") from error
    if not items:
        raise ValueError(f"{file} asks for no edit")
    return items


def text(entry: Any, name: str) -> str:
    if not isinstance(entry[name], str):
        raise ValueError(f"{name} must be text, got {entry[name]!r}")
    return entry[name]


def scene_item(folder: Path, entry: Any) -> Item:
    place, texts = folder / text(entry, "folder"), (text(entry, "source"), text(entry, "target"))
    mask, true_edit = (file if file.is_file() else None for file in (place / "mask.png", place / "target.png"))
    kind = text({"kind": ""} | entry, "kind")
    return Item(entry["folder"], place / "source.png", *texts, kind, mask, true_edit, layout="scenes")


def csv_item(folder: Path, entry: dict[str, Any]) -> Item:
    if not entry["image"] or not entry["target"]:
        raise ValueError("image and target must not be empty")
    mask, true_edit = (folder / entry[name] if entry.get(name) else None for name in ("mask", "true_edit"))
    name, source, kind = (entry.get(column) or "" for column in ("name", "source", "kind"))
    name = name or f"{entry['image']}: {entry['target']}"
    return Item(name, folder / entry["image"], source, entry["target"], kind, mask, true_edit)


def pie_item(folder: Path, entry: tuple[str, Any]) -> Item:
    """The authors' reading: brackets, which mark the words that change, are taken out of the prompts."""
    name, values = entry
    prompts = (text(values, f"{which}_prompt") for which in ("original", "editing"))
    source, target = (prompt.replace("[", "").replace("]", "") for prompt in prompts)
    kind, runs = str(values["editing_type_id"]), values["mask"]
    if kind not in [str(i) for i in range(len(PIE_KINDS))]:
        raise ValueError(f"editing_type_id must be '0' to '9', got {kind!r}")
    whole = isinstance(runs, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in runs)
    if not whole or len(runs) % 2:
        raise ValueError("mask must be pairs of a start and a length, whole numbers from 0")
    picture = folder / "annotation_images" / text(values, "image_path")
    return Item(name, picture, source, target, f"{kind} {PIE_KINDS[int(kind)]}", tuple(runs), layout="pie")


def pie_mask(runs: tuple[int, ...]) -> np.ndarray:
    """(start, length, start, length, ...) -> (512, 512) bool; the outermost pixels count as edited, as in the authors'
    evaluation, where annotators' strokes may miss them. What runs beyond the last pixel is cut off.
    """
    flat = np.zeros(PIE_SIDE * PIE_SIDE, bool)
    for start, length in zip(runs[::2], runs[1::2]):
        flat[start : start + length] = True
    mask = flat.reshape(PIE_SIDE, PIE_SIDE)
    mask[[0, -1], :] = mask[:, [0, -1]] = True
    return mask


def read_json(file: Path, kind: type) -> Any:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False).encode()  # raises for text that no file can hold
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON text: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(f"{file} must hold a JSON {'object' if kind is dict else 'list'}")
    return found


def read_csv(file: Path) -> list[dict[str, Any]]:
    rows = list[dict[str, Any]]()
    try:
        rows.extend(comma_separated(lines_of(file)))  # those before an error stay, and are counted below
    except (ValueError, csv.Error) as error:
        wanted = "CSV in UTF-8 is wanted, quotes around text that holds a comma"
        raise ValueError(f"{file}, row {len(rows) + 1}: {error} ({wanted})") from error
    if rows and not {"image", "target"} <= rows[0].keys():
        raise ValueError(f"{file} must have the columns image and target, got {', '.join(rows[0])}")
    return rows
