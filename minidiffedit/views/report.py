"""A run as one HTML page, whatever the method: what it saw, how its mask came about, how it went through the noise.

One file that opens from disk and asks the network for nothing; its own content policy forbids it. The page recomputes
a mask under other thresholds, clips and steering just as `threshold_maps` and `Steering` do, and gives it as PNG.
"""

import base64
import hashlib
import inspect
import io
import json
import math
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import cost
from ..files import images
from ..files.masks import Steering
from ..files.metadata import versions
from ..files.states import fingerprint
from ..plans import GIVEN, blank_plan, function_at
from ..result import Result, nothing_to_edit
from ..run import edit
from .previews import LatentRGB, Level, apply, fit, walk
from .witness import Looks, reaches

if TYPE_CHECKING:
    from ..sd import StableDiffusion

LONGEST, SMALL = 1024, 256  # pixels a side at which pictures are shown, and what lies beside them
MOST_LOSSLESS = 400_000  # bytes of PNG; above it stands a JPEG
MOST_CELLS = 51 * 64 * 64  # latent cells pictured of one kind: every level of a 512 x 512 edit of 50 steps
MOST_WORD_CELLS = 51 * 64 * 64  # cells of words' maps pictured of one prompt and level
DECODED = 9  # levels shown through the autoencoder, where that is asked for
# One transparent pixel, until the script copies a picture there, or where there is none.
BLANK = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
NONE = "\u2013"
CUT = ("mask_threshold", "mask_clip")  # how `threshold_maps` cuts maps: the page's own options
SHAPING = ("largest", "invert", "dilate", "feather")  # of a Steering, beside the masks laid over
# Dark violet to pale yellow, its lightness rising evenly.
RAMP = ((10, 8, 30), (58, 18, 96), (122, 32, 110), (186, 54, 88), (233, 102, 62), (249, 165, 74), (253, 236, 170))
File = str | Path | None


def save_report(result: Result, path: str | Path, **options: Any) -> None:
    """Write the page of a result to `path` (.html), whole or not at all; options as for `report_page`.

    The same result gives the same bytes. Raises ValueError for another ending, or for anything but a `Result`.
    """
    check_report(Path(path))
    images.write_whole(Path(path), report_page(result, **options).encode())


def check_report(path: Path) -> None:
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{path}: the name of a report must end in .html")


@torch.no_grad()
def report_page(result: Result, *, picture: File = None, state: File = None, decode_previews: bool = False) -> str:
    """The page of a result as HTML text. picture, state: the files that the command lines on the page name, the input
    and the saved result if there is one. decode_previews: also show some predicted x_0 through the autoencoder.
    """
    if not isinstance(result, Result):
        raise ValueError(f"a report shows one Result, got {type(result).__name__}")
    seen = result.inside or result  # of an edit with crop, the levels of the square
    walked, name = walk(seen), Path(typed(picture)).stem if picture else "picture"
    clean = (seen.latent, seen.image) if seen.source is None else (seen.x0, seen.source)
    rgb, line = fit(*clean), commands(result, picture, state)  # type: ignore[arg-type]
    levels = [numbers(one, seen.latent_mask) for one in walked]
    data = mask_data(result) | {"name": name, "palette": plain(palette()), "commands": line}
    looks = [word_maps(one) for one in result.witness.looks] if result.witness else []
    data |= {"frames": frames(walked, rgb), "levels": levels, "looks": looks}
    vae = through_the_vae(result, walked) if decode_previews and edited(result) else ""
    style, script = part("report.css"), part("report.js")
    policy = f"default-src 'none'; img-src data:; style-src {allowed(style)}; script-src {allowed(script)}"
    parts = headline(result, name) | pictures(result)
    parts |= {"policy": policy, "style": style, "script": script, "blank": BLANK, "shows": shows(result, levels)}
    parts |= {"data": json.dumps(data, sort_keys=True, allow_nan=False).replace("<", "\\u003c"), "facts": facts(result)}
    parts |= {"reach": reach(result), "roles": roles(result), "kept": kept(result)}
    file = inspect.getmodule(function_at(result.plan.system.edit)) if parts["reach"] else None
    about = "<details><summary>What its own file says</summary><pre>{}</pre></details>"
    parts["file"] = about.format(escape(inspect.getdoc(file) or "")) if file else ""
    parts |= {"costs": costs(result), "vae": vae, "explained": f"{rgb.explained:.0%}", "again": escape(line["start"])}
    parts |= {"settings": definitions((key.replace("_", " "), one) for key, one in result.settings.items())}
    parts |= {"model": definitions(model_facts(result.sd).items()), "versions": definitions(versions().items())}
    return Template(part("report.html")).substitute(parts)


def shows(result: Result, levels: list[list[Any]]) -> str:
    """What there is, as the classes by which the page shows and hides its parts."""
    masked, computed, given = result.mask is not None, "maps" in result.tensors, result.given_mask is not None
    there = {"source": result.source, "masked": masked, "computed": computed, "given": given, "decoded": edited(result)}
    there |= {"unmasked": not (computed or given), "held": masked and not any(row[5] for row in levels)}
    there |= {"path": None not in levels[0][6:]}  # encoded and decoded
    there |= {"seen": result.witness, "touched": result.witness and result.witness.touched}
    there |= {"looked": result.witness and result.witness.looks}
    return " ".join(name for name, one in there.items() if one)


def edited(result: Result) -> bool:
    return any(latents for stage, latents in result.stages.items() if stage != "encode")


# ---------------------------------------------------------------- the head of the page and its end


def headline(result: Result, name: str) -> dict[str, Any]:
    """From what to what, in the texts that were given, and the method with its paper."""
    given, paper = result.plan.given, result.plan.system.paper
    pairs = given.get("edits") or [(given.get("source"), given.get("target"))]
    source, target = (", ".join(one for one in side if one) for side in zip(*pairs))
    nothing, target = ("the picture", target or result.method) if result.source else ("noise", target)
    link = f'<a href="https://arxiv.org/abs/{paper}" rel="noreferrer">arXiv {paper}</a>'
    paper = link if paper.replace(".", "").isdigit() else escape(paper)
    asked = [f"“<bdi>{escape(side)}</bdi>”" if side else "no text" for side in (source, target)]
    said = {"title": escape(f"{source or name} → {target}"), "asked": " and for ".join(asked), "paper": paper}
    said |= {"source": f"<bdi>{escape(source)}</bdi>" if source else nothing, "target": f"<bdi>{escape(target)}</bdi>"}
    why = "the method keeps none" if edited(result) else nothing_to_edit(result.plan, result.verdict)
    return said | {"method": escape(result.method), "why": escape(why)}


def facts(result: Result) -> str:
    """The line under the title."""
    said = {"verdict": result.verdict if edited(result) else nothing_to_edit(result.plan, result.verdict)}
    if result.coverage is not None:
        said["coverage"] = f"{math.floor(1000 * result.coverage + 0.5) / 10:.1f} %"
    if box := result.settings.get("crop_box"):
        said["edited alone"] = f"{box[2] - box[0]} x {box[3] - box[1]} pixels from {box[0]}, {box[1]}"
    said |= {"seed": str(result.seed), "cost": f"{result.rows} UNet rows, {sum(result.seconds.values()):.1f} s"}
    return "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>" for key, value in said.items())


def costs(result: Result) -> str:
    """Rows of the table: what each stage took, against what a fresh run is predicted to take."""
    given = {"mask": result.given_mask} if result.given_mask is not None else {}
    foretold = cost.cost(replace(result.plan, given=result.plan.given | given))
    rows: list[Sequence[Any]] = []
    for stage, seconds in result.seconds.items():
        paid = result.evaluations.get(stage, NONE)
        each = f"{seconds / paid:.3f}" if isinstance(paid, int) and paid else NONE
        rows.append([stage, paid, foretold.get(stage, NONE), f"{seconds:.2f}", each])
    rows.append(["together", result.rows, sum(foretold.values()), f"{sum(result.seconds.values()):.2f}", NONE])
    return "\n".join(f"<tr>{cells(*row)}</tr>" for row in rows)


def cells(head: Any, *rest: Any) -> str:
    return "".join([f"<th scope=row>{escape(str(head))}</th>", *(f"<td>{escape(str(one))}</td>" for one in rest)])


def model_facts(sd: "StableDiffusion") -> dict[str, Any]:
    """Name (no path), the hash of each network's file, dtype, device."""
    name = typed(Path(sd.name).resolve()) if sd.name and Path(sd.name).exists() else sd.name
    memory = {"files": "none, built in memory", "dtype": str(sd.dtype).removeprefix("torch.")}
    return {"model": name, **(fingerprint(sd) if sd.checkpoint else memory), "device": sd.device.type}


# ---------------------------------------------------------------- command lines


def commands(result: Result, picture: File, state: File) -> dict[str, Any]:
    """How the command lines on the page begin, and what they may add: the page says a mask's options itself."""
    sd, steering, maps = result.sd, result.steering, "maps" in result.tensors
    said = ["minidiffedit", "resume", typed(state)] if state else words(result, picture, CUT if maps else ())
    if sd.checkpoint is not None:
        usual = "float16" if sd.device.type == "cuda" else "float32"
        said += option("model", named(sd.name)) + option("vae", named(sd.vae_name) if sd.vae_name else "", "")
        said += option("dtype", str(sd.dtype).removeprefix("torch."), usual)
    laid = steering is not None and (steering.union is not None or steering.subtract is not None)
    options = not laid and (maps or (state is not None and result.given_mask is not None))
    return {"start": shlex.join(said), "steered": bool(state and steering), "options": options}


def words(result: Result, picture: File, without: Sequence[str]) -> list[str]:
    """What makes a result again, but for its mask: the texts and pictures given, the options that are not as usual."""
    plan, usual = result.plan, blank_plan(result.plan.method)
    method = inspect.signature(edit).parameters["method"].default
    said = ["minidiffedit", "edit", typed(picture or "PICTURE.png"), *option("method", plan.method, method)]
    for name, value in plan.given.items():
        kind = GIVEN[name].kind
        if kind == "pairs":
            said += [word for pair in value for word in option("edit", "=>".join(pair))]
        elif kind == "text":
            said += option(name, value, usual.given[name])
        elif kind == "picture":
            said += option(name, typed(value) if isinstance(value, str | os.PathLike) else f"{name.upper()}.png")
    for name in (name for name in plan.options if name not in without):
        said += option(name, plan.settings[name], usual.settings[name])
    return said


def option(name: str, value: Any, usual: Any = None) -> list[str]:
    """An option as words, none where it is as usual."""
    flag, text = name.replace("_", "-"), "none" if value is None else str(value)
    if value == usual:
        return []
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}={text}"] if text.startswith("-") else [f"--{flag}", text]


def named(model: str) -> str:
    """A model so that it is found from where the page is made: a page may go to others, but its commands stay here."""
    beside = os.path.relpath(model) if os.path.isabs(model) else model
    return os.fsencode(model if beside.startswith(os.pardir) else beside).decode(errors="replace")


def typed(path: str | os.PathLike[str]) -> str:
    """A path as it was typed, of an absolute one the name alone: pages are passed on. What is no text becomes �."""
    return os.fsencode(Path(path).name if Path(path).is_absolute() else path).decode(errors="replace")


# ---------------------------------------------------------------- the mask, the pictures


def mask_data(result: Result) -> dict[str, Any]:
    """What the page recomputes the mask from. Float32 arrays as base64; numbers are float32 values, exactly.

    The mean of the maps and the mean of that are taken here, by the very operations of `threshold_maps`: a sum depends
    on the order of its terms, while every operation after it is rounded alike wherever float32 is IEEE 754's.
    """
    steering, settings = result.steering or Steering(), result.settings
    h, w = (result.latent if result.x0 is None else result.x0).shape[2:]
    data: dict[str, Any] = {"cells": [w, h], "working": [*settings["working_size"]], "mean": None}
    data |= {"widths": spread(w, result.image.width), "heights": spread(h, result.image.height)}
    data |= {"used": plain(result.latent_mask), "given": plain(result.given_mask)}
    data |= {name.removeprefix("mask_"): settings.get(name) for name in CUT}
    data |= {name: getattr(steering, name) for name in SHAPING}
    data |= {"union": plain(steering.union), "subtract": plain(steering.subtract)}
    if "maps" in result.tensors:
        m = result.tensors["maps"][0].mean(dim=0)
        data |= {"mean": plain(m), "average": float(m.mean()), "least": float(result.tensors["flat_below"][0])}
    return data


def spread(count: int, length: int) -> list[int]:
    """How many pixels of a line show each of `count` cells, as Pillow resizes."""
    numbers = Image.fromarray(np.arange(count, dtype=np.int32)[None])
    resized = np.asarray(numbers.resize((length, 1), Image.Resampling.NEAREST))
    return np.bincount(resized.ravel(), minlength=count).tolist()


def pictures(result: Result) -> dict[str, Any]:
    """Source, result, what differs between them, and each map."""
    (after, how), maps = shown(result.image), map_figures(result)
    said: dict[str, Any] = {"after": after, "shown": how, "before": BLANK, "difference": BLANK, "most": 0}
    if result.source:
        before, changed = (np.asarray(reduced(one, SMALL), float) for one in (result.source, result.image))
        far = torch.from_numpy(np.abs(changed - before).mean(axis=2))
        said |= {"difference": uri(coloured(far / (far.max() or 1))), "most": round(float(far.max()))}
        said |= {"before": shown(result.source)[0]}
    return said | {"maps": "".join(maps), "n": len(maps)}


def map_figures(result: Result) -> list[str]:
    """Each of the n maps, all on the scale from 0 to the clip."""
    if "maps" not in result.tensors:
        return []
    maps, clip = result.tensors["maps"][0].cpu().double(), result.settings.get("mask_clip")
    m = maps.mean(dim=0)
    top = float(m.max() if clip is None else torch.minimum(m.max(), clip * m.mean())) or 1.0
    return [figure(uri(coloured(one / top)), f"map {i} of {len(maps)}", i, "cells") for i, one in enumerate(maps, 1)]


# ---------------------------------------------------------------- through the noise


def pictured(count: int, most: int) -> list[int]:
    """At most `most` of the levels 0..count-1, evenly, both ends among them."""
    most = min(count, max(2, most))
    return sorted({round(i * (count - 1) / max(1, most - 1)) for i in range(most)})


def frames(walked: list[Level], rgb: LatentRGB) -> dict[str, Any]:
    """The scrubber's pictures: of each kind one sheet, level after level in rows."""
    nothing = torch.zeros_like(next(iter(walked[0].shown.values())))
    chosen = pictured(len(walked), MOST_CELLS // nothing[0, 0].numel())
    some, columns = [walked[i].shown for i in chosen], math.ceil(math.sqrt(len(chosen)))
    most = max((float(one["apart"].mean(dim=1).max()) for one in some if "apart" in one), default=0.0) or 1.0
    made: dict[str, Any] = {"levels": chosen, "columns": columns, "tile": [nothing.shape[3], nothing.shape[2]]}
    for name in {name: None for one in some for name in one}:
        latents = [one.get(name, nothing) for one in some]
        tiles = [coloured(x[0].mean(dim=0) / most, hole=True) if name == "apart" else apply(rgb, x) for x in latents]
        made[name] = uri(sheet(tiles, columns))
    return made


def numbers(one: Level, mask: Tensor | None) -> list[Any]:
    """Level, t, alpha_bar; of |y - x| root mean square and largest in the mask, largest outside; sizes of x and y."""
    far, x, y = (one.shown.get(name) for name in ("apart", "x", "y"))
    apart: list[float] = [0.0, 0.0, 0.0]
    if far is not None:
        M = torch.ones_like(far) if mask is None else mask.cpu().expand_as(far)
        within, without = far[M > 0], far[M == 0]
        apart = [rms(within), within.max().item(), without.max().item() if len(without) else 0.0]
    sizes = [None if latent is None else rms(latent) for latent in (x, y)]
    return [one.j, one.t, one.a, *(None if size is None else float(f"{size:.6g}") for size in (*apart, *sizes))]


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def through_the_vae(result: Result, walked: list[Level]) -> str:
    """Some of the predicted x_0 through the autoencoder, from the top level down, as figures."""
    made = []
    for one in (walked[i] for i in reversed(pictured(len(walked), DECODED))):
        clean = one.shown.get("y_clean", one.shown.get("x_clean"))
        if clean is not None:
            picture = reduced(images.to_picture(result.sd.decode(clean.to(result.latent))), SMALL)
            alt = f"predicted x_0 at t = {one.t}, through the autoencoder"
            made.append(figure(uri(picture, "JPEG", quality=88), alt, f"t = {one.t}" if one.j is None else one.j))
    return "".join(made)


# ---------------------------------------------------------------- words, and what the method touched


def word_maps(one: Looks) -> dict[str, Any]:
    """What the page shows of the words of a prompt: of each level the maps of some steps, word after word, as square
    roots of shares, the largest 1.
    """
    levels = []
    for maps in one.maps.values():
        chosen = pictured(len(one.steps), MOST_WORD_CELLS // maps[0].numel())
        some, top = maps[chosen], float(maps.max())
        grey = (some / top).sqrt().mul(255).round().to(torch.uint8).flatten(0, 1)
        columns = math.ceil(math.sqrt(len(grey)))
        level: dict[str, Any] = {"cells": [*maps.shape[:1:-1]], "steps": [one.steps[i] for i in chosen], "top": top}
        level |= {"columns": columns, "sheet": uri(sheet([Image.fromarray(tile.numpy()) for tile in grey], columns))}
        levels.append(level)
    return {"stage": one.stage, "prompt": one.prompt, "words": [*one.words], "levels": levels}


def reach(result: Result) -> str:
    """Rows of the table: which layers the method reached into, and when."""
    made = []
    for one in reaches(result.witness, result.latent.shape[2:]) if result.witness else ():
        runs, edges = [], [i for i, now in enumerate(one.steps) if now != (one.steps[i - 1] if i else False)]
        runs = [*zip(edges[::2], [*edges[1::2], len(one.steps)])]
        bars = "".join(f'<rect x="{a}" y="0" width="{b - a}" height="1"/>' for a, b in runs)
        said = ", ".join(f"{a + 1}{NONE}{b}" if b > a + 1 else f"{b}" for a, b in runs) + f" of {len(one.steps)}"
        box = f'viewBox="0 0 {len(one.steps)} 1" preserveAspectRatio="none" role="img" aria-label="steps {said}"'
        bar = f'<svg class="bar" {box}>{bars}</svg>'
        made.append(f"<tr>{cells(one.where, one.stage, one.what, said)}<td>{bar}</td></tr>")
    return "\n".join(made)


def roles(result: Result) -> str:
    """Which text each row of a call is under."""
    texts = next(iter(result.witness.roles.values()), ()) if result.witness else ()
    spoken = {None: "a learned text", "": "no text"} | {text: f"“<bdi>{escape(text)}</bdi>”" for text in texts if text}
    return ", ".join(f"{i} {spoken[text]}" for i, text in enumerate(texts, 1))


def kept(result: Result) -> str:
    """Masks that the method made for itself on the way, the last of each, as figures."""
    own = vars(result.found) if result.found is not None else {}
    masks = {name: x for name, x in result.tensors.items() if name not in own and x.ndim == 4 and x.shape[:2] == (1, 1)}
    return "".join(
        figure(uri(coloured(x[0, 0].float())), f"the mask {name} of the method", name.replace("_", " "), "cells")
        for name, x in masks.items()
    )


# ---------------------------------------------------------------- pieces of HTML


def part(name: str) -> str:
    return (files(__package__) / "data" / name).read_text(encoding="utf-8")


def allowed(inline: str) -> str:
    """An inline style or script, as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()}'"


def figure(data: str, alt: str, caption: Any, kind: str = "") -> str:
    return f'<figure><img class="{kind}" src="{data}" alt="{alt}"><figcaption>{caption}</figcaption></figure>'


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


def uri(picture: Image.Image, kind: str = "PNG", **options: Any) -> str:
    encoded = io.BytesIO()
    picture.save(encoded, kind, optimize=kind == "PNG", **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def shown(picture: Image.Image) -> tuple[str, str]:
    """A picture as data, and how it was reduced if it was."""
    profile = picture.info.get("icc_profile") or b""
    profile = profile if len(profile) < 20_000 else b""
    small = reduced(picture, LONGEST)
    note = f"shown at {small.width} by {small.height}" if small.size != picture.size else ""
    data = uri(small, icc_profile=profile)
    if len(data) > MOST_LOSSLESS * 4 / 3:
        data = uri(small, "JPEG", quality=92, subsampling=0, icc_profile=profile)
        note = f"{note}, as JPEG" if note else "shown as JPEG"
    return data, note


def reduced(picture: Image.Image, side: int) -> Image.Image:
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def palette() -> np.ndarray:
    """(256, 3) uint8: RAMP, interpolated."""
    at = np.linspace(0, len(RAMP) - 1, 256)
    return np.stack([np.interp(at, range(len(RAMP)), channel) for channel in zip(*RAMP)], axis=1).round().astype("u1")


def coloured(values: Tensor, hole: bool = False) -> Image.Image:
    """(h, w) in [0, 1] -> palette picture. hole: what is exactly 0 is transparent, what is above it never."""
    indices = (values.detach().cpu().double().clamp(0, 1) * 255).round()
    indices = torch.where(values > 0, indices.clamp(min=1), 0) if hole else indices
    made = Image.fromarray(indices.numpy().astype(np.uint8))
    made.putpalette(palette().tobytes())
    made.info |= {"transparency": 0} if hole else {}
    return made


def sheet(tiles: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size and mode, row by row."""
    w, h = tiles[0].size
    made = tiles[0].resize((w * columns, h * math.ceil(len(tiles) / columns)))  # with its palette, if it has one
    made.paste((0, 0, 0) if made.mode == "RGB" else 0, (0, 0, *made.size))
    for i, tile in enumerate(tiles):
        made.paste(tile, (i % columns * w, i // columns * h))
    return made
