"""An edit as one HTML page: what it saw, how its mask came about, how it went up the noise and down again.

One file that opens from disk and asks the network for nothing; its own content policy forbids it. The page recomputes
the mask under other thresholds, clips and steering just as `threshold_maps` and `Steering` do, and gives it as PNG.
"""

import base64
import hashlib
import inspect
import io
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import __version__, editor
from ..files import images
from . import preview
from ..ddim import level_at, levels
from ..editor import NOTHING, Edit, predicted_rows
from ..files.states import ARGUMENTS, SHAPING, fingerprint

if TYPE_CHECKING:
    from ..sd import StableDiffusion

LONGEST = 1024  # pixels a side at which a picture is shown
MOST_LOSSLESS = 400_000  # bytes of PNG; above it stands a JPEG
MOST_CELLS = 51 * 64 * 64  # latent cells pictured per trajectory: every level of a 512 x 512 edit of 50 steps
DECODED = 9  # levels shown through the autoencoder, where that is asked for
# One transparent pixel, until the script copies a picture there.
BLANK = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
NONE = "\u2013"
PLAIN = {*ARGUMENTS} - {"target", "paste", "mask_clip", "mask_threshold"}  # settings that one option of `edit` sets
TINT = (255, 88, 20)  # what lies over the picture where the mask is
STAGES = ("text", "vae encode", "mask", "encode", "decode", "vae decode")
# Dark violet to pale yellow, its lightness rising evenly.
RAMP = ((10, 8, 30), (58, 18, 96), (122, 32, 110), (186, 54, 88), (233, 102, 62), (249, 165, 74), (253, 236, 170))


def save_report(
    edit: Edit,
    path: str | Path,
    *,
    picture: str | Path | None = None,
    state: str | Path | None = None,
    decode_previews: bool = False,
) -> None:
    """Write the page of an edit to `path` (.html), whole or not at all.

    picture, state: the files that the command lines on the page name: the edit's input, and its saved state if there
    is one. decode_previews: also show some predicted x_0 through the autoencoder. The same edit gives the same bytes.
    Raises ValueError for another ending, or for anything but an `Edit`.
    """
    check_report(Path(path))
    page = report_page(edit, picture=picture, state=state, decode_previews=decode_previews)
    images.write_whole(Path(path), page.encode())


@torch.no_grad()
def report_page(
    edit: Edit,
    *,
    picture: str | Path | None = None,
    state: str | Path | None = None,
    decode_previews: bool = False,
) -> str:
    """The page of an edit as HTML text; arguments and errors as for `save_report`."""
    if not isinstance(edit, Edit):
        raise ValueError(f"a report shows one edit with its one mask (an Edit), got {type(edit).__name__}")
    s, walked, rgb = edit.settings, walk(edit), preview.fit(edit.x0, edit.source)
    name = Path(typed(picture)).stem if picture else "picture"
    data = mask_data(edit) | {"name": name, "palette": plain(palette()), "commands": commands(edit, picture, state)}
    data |= {"frames": frames(edit, walked, rgb), "levels": level_data(edit, walked)}
    coded = json.dumps(data, sort_keys=True, allow_nan=False).replace("<", "\\u003c")
    vae = through_the_vae(edit, walked) if decode_previews and edit.decoded else ""
    style, script = part("report.css"), part("report.js")
    (before, how), (after, _) = shown(edit.source), shown(edit.image)
    return Template(part("report.html")).substitute(
        policy=f"default-src 'none'; img-src data:; style-src {allowed(style)}; script-src {allowed(script)}",
        style=style, script=script, data=coded, blank=BLANK, before=before, after=after, shown=how, facts=facts(edit),
        kind="computed" if edit.found else "given" if edit.given is not None else "unmasked",
        decoded="decoded" if edit.decoded else "undecoded",
        title=escape(f"{s['source'] or name} → {s['target']}"),
        source=f"<bdi>{escape(s['source'])}</bdi>" if s["source"] else "the picture",
        target=f"<bdi>{escape(s['target'])}</bdi>", asked=asked(s),
        tint=png(tinted(edit.latent_mask)), maps=map_figures(edit), n=s["maps"], t=mask_timestep(s),
        explained=f"{rgb.explained:.0%}", K=max(edit.trajectory), N=s["steps"], levels=level_rows(edit, walked),
        chart=chart(walked), top=f"{max(one.inside for one in walked):.2f}",
        vae=vae, vae_hidden="" if vae else "hidden", costs=costs(edit),
        settings=definitions((key.replace("_", " "), s[key]) for key in [*ARGUMENTS, *sorted(s.keys() - {*ARGUMENTS})]),
        model=definitions(model_facts(edit.sd).items()), versions=definitions(versions().items()),
    )  # fmt: skip


def check_report(path: Path) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{path}: the name of a report must end in .html")


# ---------------------------------------------------------------- the head of the page and its end


def facts(edit: Edit) -> str:
    s, K = edit.settings, max(edit.trajectory)
    verdict = NOTHING[edit.verdict] if not edit.decoded else edit.verdict
    rows, seconds = sum(edit.evaluations.values()), sum(edit.seconds.values())
    said = {
        "verdict": verdict, "coverage": f"{math.floor(1000 * edit.coverage + 0.5) / 10:.1f} %", "seed": edit.seed,
        "encoded to": f"level {K} of {s['steps']}", "guidance": f"{s['guidance_scale']:g}",
        "cost": f"{rows} UNet rows, {seconds:.1f} s",
    }  # fmt: skip
    return "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(str(value))}</dd></div>" for key, value in said.items())


def costs(edit: Edit) -> str:
    """Rows of the table: what each stage took, against what a fresh edit is predicted to take."""
    given = edit.given is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the edit was made
        foretold = predicted_rows(edit.settings, given=given, nothing=given and not bool(edit.latent_mask.any()))
    rows = []
    for stage, seconds in sorted(edit.seconds.items(), key=lambda item: [*STAGES, item[0]].index(item[0])):
        paid = edit.evaluations.get(stage)
        each = f"{seconds / paid:.3f}" if paid else NONE
        rows.append([stage, paid if paid is not None else NONE, foretold.get(stage, NONE), f"{seconds:.2f}", each])
    total = sum(edit.evaluations.values())
    rows.append(["together", total, sum(foretold.values()), f"{sum(edit.seconds.values()):.2f}", NONE])
    return table_rows(rows)


def model_facts(sd: "StableDiffusion") -> dict[str, Any]:
    """Name (no path), the hash of each network's file, dtype, device."""
    name = typed(Path(sd.name).resolve()) if sd.name and Path(sd.name).exists() else sd.name
    try:
        files = fingerprint(sd)
    except ValueError:  # built in memory
        files = {"files": "none, built in memory", "dtype": str(sd.dtype).removeprefix("torch.")}
    return {"model": name, **files, "device": sd.device.type}


def versions() -> dict[str, str]:
    names = ("torch", "safetensors", "tokenizers", "numpy", "pillow", "huggingface_hub")
    return {"minidiffedit": __version__, "python": sys.version.split()[0]} | {name: version(name) for name in names}


def commands(edit: Edit, picture: str | Path | None, state: str | Path | None) -> dict[str, Any]:
    """How the command lines on the page begin, and what they may add: the page knows the mask's options."""
    s, sd, steering = edit.settings, edit.sd, edit.steering
    if state:
        words = ["minidiffedit", "resume", typed(state)]
    else:
        words = ["minidiffedit", "edit", typed(picture or "PICTURE.png"), *option("target", s["target"])]
        for name, parameter in inspect.signature(editor.edit).parameters.items():
            if name in PLAIN and s[name] != parameter.default:
                words += option(name, s[name])
        words += [] if s["paste"] else ["--no-paste"]
    if sd.checkpoint is not None:
        words += option("model", typed(sd.name))
        dtype = str(sd.dtype).removeprefix("torch.")
        words += option("dtype", dtype) if dtype != ("float16" if sd.device.type == "cuda" else "float32") else []
    overlaid = steering is not None and (steering.union is not None or steering.subtract is not None)
    return {
        "start": shlex.join(words), "steered": bool(state and steering),
        "options": not overlaid and (edit.found is not None or (state is not None and edit.given is not None)),
    }  # fmt: skip


def option(name: str, value: Any) -> list[str]:
    name, value = f"--{name.replace('_', '-')}", str(value)
    return [f"{name}={value}"] if value.startswith("-") else [name, value]


def typed(path: str | Path) -> str:
    """A path as it was typed, of an absolute one the name alone: pages are passed on. What is no text becomes �."""
    return os.fsencode(Path(path).name if Path(path).is_absolute() else path).decode(errors="replace")


# ---------------------------------------------------------------- the mask


def mask_data(edit: Edit) -> dict[str, Any]:
    """What the page recomputes the mask from. Float32 arrays as base64; numbers are float32 values, exactly.

    The mean of the maps and the mean of that are taken here, by the very operations of `threshold_maps`: a sum depends
    on the order of its terms, while every operation after it is rounded alike wherever float32 is IEEE 754's.
    """
    found, steering = edit.found, edit.steering
    h, w = edit.latent_mask.shape[2:]
    column, row = (Image.fromarray(np.arange(n, dtype=np.int32)[None]) for n in (w, h))
    data: dict[str, Any] = {
        "cells": [w, h], "working": list(edit.settings["working_size"]),
        # How many pixels of a mask at picture size show each cell, as Pillow resizes.
        "widths": spread(column, edit.source.width), "heights": spread(row, edit.source.height),
        "used": plain(edit.latent_mask), "given": plain(edit.given), "mean": None,
        "threshold": edit.settings["mask_threshold"], "clip": edit.settings["mask_clip"],
        "largest": False, "invert": False, "dilate": 0, "feather": 0, "union": None, "subtract": None,
    }  # fmt: skip
    if steering:
        data |= {name: getattr(steering, name) for name in SHAPING}
        data |= {"union": plain(steering.union), "subtract": plain(steering.subtract)}
    if found:
        m = found.maps[0].mean(dim=0)
        data |= {"mean": plain(m), "average": float(m.mean()), "least": float(found.flat_below[0])}
    return data


def mask_timestep(settings: dict[str, Any]) -> int:
    """At which the maps were drawn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the mask was found
        return levels(settings["steps"]).t[level_at(settings["mask_strength"], settings["steps"], lowest=1)]


def asked(settings: dict[str, Any]) -> str:
    """The two texts that the mask contrasts."""
    said = [f"“<bdi>{escape(settings[name])}</bdi>”" if settings[name] else "no text" for name in ("source", "target")]
    return " and for ".join(said)


def spread(numbers: Image.Image, length: int) -> list[int]:
    resized = np.asarray(numbers.resize((length, 1), Image.Resampling.NEAREST))
    return np.bincount(resized.ravel(), minlength=numbers.width).tolist()


def map_figures(edit: Edit) -> str:
    """Each of the n maps, all on the scale from 0 to the clip."""
    if edit.found is None:
        return ""
    maps, clip = edit.found.maps[0].cpu().double(), edit.settings["mask_clip"]
    m = maps.mean(dim=0)
    top = float(m.max() if clip is None else torch.minimum(m.max(), clip * m.mean())) or 1.0
    return "".join(
        f'<figure><img class="cells" src="{png(coloured(one / top))}" alt="map {i} of {len(maps)}">'
        f"<figcaption>{i}</figcaption></figure>"
        for i, one in enumerate(maps, 1)
    )


# ---------------------------------------------------------------- up the noise and down again


@dataclass(frozen=True, eq=False)
class Level:
    """What the page shows of level j: latents (1, c, h, w) float64 on the CPU, the last three None where nothing was
    decoded. x, y: the encoded and the decoded latent; x_clean, y_clean: the clean latent that the prediction at this
    level leads to, y's blended as the result would be; apart (1, 1, h, w): mean over channels |y - x|. inside: its root
    mean square over values in the mask; inside_most, outside_most: the largest |y - x| in the mask and out of it.
    """

    j: int
    x: Tensor
    x_clean: Tensor
    y: Tensor | None = None
    y_clean: Tensor | None = None
    apart: Tensor | None = None
    inside: float = 0.0
    inside_most: float = 0.0
    outside_most: float = 0.0


def walk(edit: Edit) -> list[Level]:
    """Levels 0..K. The predictions were not kept: of x_{j-1} and x_j, which one prediction joins, it is solved for."""
    a = levels(edit.settings["steps"]).a
    M = edit.latent_mask.cpu().double()
    x = [edit.trajectory[j].cpu().double() for j in edit.trajectory]
    y = [latent.cpu().double() for latent in reversed(edit.decoded)]
    made = []
    for j in range(len(x)):
        x_clean = preview.predicted_x0(x[j - 1], x[j], a[j - 1], a[j]) if j else x[0]
        if not y:
            made.append(Level(j, x[j], x_clean))
            continue
        y_clean = preview.decoded_x0(y[j], y[j - 1], x[j - 1], x[0], M, a[j], a[j - 1]) if j else y[0]
        apart = (y[j] - x[j]).abs()
        within, without = apart[(M > 0).expand_as(apart)], apart[(M == 0).expand_as(apart)]
        measured = (rms(within), within.max().item(), without.max().item() if len(without) else 0.0)
        made.append(Level(j, x[j], x_clean, y[j], y_clean, apart.mean(dim=1, keepdim=True), *measured))
    return made


def pictured(count: int, most: int) -> list[int]:
    """At most `most` of the levels 0..count-1, evenly, both ends among them."""
    most = min(count, max(2, most))
    return sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)})


def frames(edit: Edit, walked: list[Level], rgb: preview.LatentRGB) -> dict[str, Any]:
    """The scrubber's pictures: per kind one sheet, the pictured levels row by row."""
    h, w = edit.x0.shape[2:]
    shown = [walked[j] for j in pictured(len(walked), MOST_CELLS // (h * w))]
    sheets = {
        "x": [preview.apply(rgb, one.x) for one in shown],
        "x_clean": [preview.apply(rgb, one.x_clean) for one in shown],
        "y": [preview.apply(rgb, one.y) for one in shown if one.y is not None],
        "y_clean": [preview.apply(rgb, one.y_clean) for one in shown if one.y_clean is not None],
    }
    most = max((float(one.apart.max()) for one in shown if one.apart is not None), default=0.0) or 1.0
    sheets["apart"] = [coloured(one.apart[0, 0] / most, hole=True) for one in shown if one.apart is not None]
    columns = math.ceil(math.sqrt(len(shown)))
    return {"levels": [one.j for one in shown], "columns": columns} | {
        name: png(sheet(tiles, columns)) for name, tiles in sheets.items() if tiles
    }


def level_data(edit: Edit, walked: list[Level]) -> list[list[float]]:
    """Per level t, alpha_bar, and the difference to the encoded latent: rms inside the mask, largest outside."""
    t, a = levels(edit.settings["steps"])
    return [[t[one.j], a[one.j], one.inside, one.outside_most] for one in walked]


def chart(walked: list[Level]) -> str:
    """The difference inside the mask by level as points of an SVG line, 1 x 1, level 0 at the left."""
    most, last = max(one.inside for one in walked) or 1.0, max(1, len(walked) - 1)
    return " ".join(f"{one.j / last:.4f},{1 - one.inside / most:.4f}" for one in walked)


def level_rows(edit: Edit, walked: list[Level]) -> str:
    """The table from the top level down."""
    t, a = levels(edit.settings["steps"])
    rows = []
    for one in reversed(walked):
        row: list[Any] = [one.j, t[one.j], f"{a[one.j]:.5f}", f"{rms(one.x):.3f}"]
        decoded = [f"{one.inside:.3f}", f"{one.inside_most:.3f}", f"{one.outside_most:g}"]
        rows.append(row + ([NONE] * 4 if one.y is None else [f"{rms(one.y):.3f}", *decoded]))
    return table_rows(rows)


def through_the_vae(edit: Edit, walked: list[Level]) -> str:
    """Some of the predicted x_0 through the autoencoder, from the top level down, as figures."""
    made = []
    for j in reversed(pictured(len(walked), DECODED)):
        y_clean = walked[j].y_clean
        picture = images.to_picture(edit.sd.decode((walked[j].x_clean if y_clean is None else y_clean).to(edit.x0)))
        picture.thumbnail((256, 256), Image.Resampling.LANCZOS)
        uri = data_uri(picture, "JPEG", quality=88)
        made.append(f'<figure><img src="{uri}" alt="predicted x_0 at level {j}, through the autoencoder">'
                    f"<figcaption>{j}</figcaption></figure>")  # fmt: skip
    return "".join(made)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


# ---------------------------------------------------------------- pieces of HTML


def part(name: str) -> str:
    return (files(__package__) / "data" / name).read_text(encoding="utf-8")


def allowed(inline: str) -> str:
    """An inline style or script, as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


def table_rows(rows: Iterable[Sequence[Any]]) -> str:
    cells = ((f"<th scope=row>{escape(str(head))}</th>", *(f"<td>{escape(str(c))}</td>" for c in rest))
             for head, *rest in rows)  # fmt: skip
    return "\n".join(f"<tr>{''.join(row)}</tr>" for row in cells)


def definitions(pairs: Iterable[tuple[str, Any]]) -> str:
    def said(value: Any) -> str:
        return value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False)

    rows = ((escape(key), escape(said(value)) or NONE) for key, value in pairs)
    return "\n".join(f"<div><dt>{key}</dt><dd><bdi>{value}</bdi></dd></div>" for key, value in rows)


def plain(values: Tensor | np.ndarray | None) -> str | None:
    """Float32 values, or bytes, as base64."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy().astype("<f4")
    return None if values is None else base64.b64encode(values.tobytes()).decode()


def data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    encoded = io.BytesIO()
    picture.save(encoded, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def png(picture: Image.Image, **options: Any) -> str:
    return data_uri(picture, "PNG", optimize=True, **options)


def shown(picture: Image.Image) -> tuple[str, str]:
    """A picture as data, and how it was reduced if it was."""
    profile = picture.info.get("icc_profile") or b""
    profile = profile if len(profile) < 20_000 else b""
    small = picture.copy()
    small.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    note = f"shown at {small.width} by {small.height}" if small.size != picture.size else ""
    uri = png(small, icc_profile=profile)
    if len(uri) > MOST_LOSSLESS * 4 / 3:
        uri = data_uri(small, "JPEG", quality=92, subsampling=0, icc_profile=profile)
        note = f"{note}, as JPEG" if note else "shown as JPEG"
    return uri, note


def palette() -> np.ndarray:
    """(256, 3) uint8: RAMP, interpolated."""
    at = np.linspace(0, len(RAMP) - 1, 256)
    return np.stack([np.interp(at, range(len(RAMP)), channel) for channel in zip(*RAMP)], axis=1).round().astype("u1")


def coloured(values: Tensor, hole: bool = False) -> Image.Image:
    """(h, w) in [0, 1] -> palette picture. hole: what is exactly 0 is transparent, what is above it never."""
    indices = (values.detach().cpu().double().clamp(0, 1) * 255).round()
    if hole:
        indices = torch.where(values > 0, indices.clamp(min=1), 0)
    made = Image.fromarray(indices.numpy().astype(np.uint8))
    made.putpalette(palette().tobytes())
    if hole:
        made.info["transparency"] = 0
    return made


def sheet(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    w, h = tiles[0].size
    made = Image.new(tiles[0].mode, (w * columns, h * math.ceil(len(tiles) / columns)))
    if made.mode == "P":
        made.putpalette(palette().tobytes())
        made.info |= {key: tiles[0].info[key] for key in ("transparency",) if key in tiles[0].info}
    for i, tile in enumerate(tiles):
        made.paste(tile, (i % columns * w, i // columns * h))
    return made


def tinted(mask: Tensor) -> Image.Image:
    """A latent mask -> RGBA, the tint that lies over the picture."""
    alpha = (mask[0, 0].cpu().double() * 0.55 * 255).round().numpy().astype(np.uint8)
    return Image.fromarray(np.dstack([np.full((*alpha.shape, 3), TINT, np.uint8), alpha]))
