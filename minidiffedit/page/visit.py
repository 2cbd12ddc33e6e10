"""What one visitor of the page has: a picture, the mask that was found on it, results with their files and settings.

Nothing here knows Gradio. Texts and numbers are what the controls say, by name; pictures are files that the server
itself put into its folder. A result's command and Python make the same bytes again.
"""

import re
import shlex
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..files import images
from ..files.masks import Steering
from ..files.metadata import identity, metadata, model_hash, prompt_of
from ..files.results import MARK, settings_in
from ..files.states import save_state
from ..options import Option
from ..run import GIVEN, Plan, Result, blank_plan, open_picture, parts_of, plan
from ..views.report import SHAPING, coloured, option, reduced, save_report, words
from .runs import NeedsModel, cut

TINT = (255, 88, 20)
LONGEST, DRAWN = 1024, 640  # pixels a side of what is shown and painted on, and of what arrows are drawn on
MOST_KEPT, MOST_REUSED = 24, 3  # results with their latents: of all visitors, and that one run begins from


@dataclass(eq=False)
class Made:
    """One result: its picture's file and those beside it, how it is made again; `result` holds no picture beside."""

    picture: Path
    files: list[Path]
    about: str
    command: str
    python: str
    before: Path
    result: Result | None = field(repr=False)


class Visit:
    """One visitor. folder: for this visitor's files alone."""

    def __init__(self, folder: Path):
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.photo: Path | None = None
        self.drawn: Path | None = None  # the photo that the brush paints on
        self.picture: Image.Image | None = None
        self.before = self.folder  # the picture as a file that a browser shows
        self.name, self.count, self.taken, self.stop = "", 0, 0, threading.Event()
        self.found: Result | None = None
        self.layers: list[Image.Image] = []  # what is painted
        self.made: list[Made] = []
        self.shown: Made | None = None

    def take(self, photo: Path | None, name: str = "") -> None:
        """Another picture to edit. Raises ValueError for a file that is none, or that no model takes."""
        self.photo = self.drawn = self.picture = self.found = None
        self.layers = []
        if photo is not None:
            picture = images.to_rgb(images.read_picture(photo))
            images.working_size(picture.size, 512)
            self.taken += 1
            self.before = self.folder / f"before-{self.taken}.png"
            images.write_picture(picture, self.before)
            self.photo, self.picture, self.name = photo, picture, Path(name or photo.name).name

    @property
    def at_hand(self) -> tuple[Path, Image.Image]:
        """The picture and its file. Raises ValueError where there is none."""
        if self.photo is None or self.picture is None:
            raise ValueError("there is no picture yet: upload, drop or paste one, or take an example")
        if not self.photo.exists():
            raise ValueError("the picture is no longer here, the server was started anew: choose it again")
        return self.photo, self.picture

    @property
    def result(self) -> Made:
        """What is shown. Raises ValueError where there is none."""
        if self.shown is None:
            raise ValueError("there is no result yet")
        return self.shown

    def known(self, sd: Any, size: int | None) -> list[Result]:
        """Earlier results on this picture by this model: what still holds of them is not paid twice."""
        _, at = open_picture(sd, self.at_hand[1], size)
        latest = [one.result for one in self.made if one.result and one.before == self.before][-MOST_REUSED:]
        return [one for one in (self.found, *latest) if one and one.sd is sd and one.settings["working_size"] == at]

    def mask(self, settled: Plan, steering: Steering | None, sd: Any) -> Result | Tensor | None:
        """The mask as the controls have it: of the maps that were found, or of a given or painted one the cells alone;
        None where nothing is known. Raises NeedsModel where it must be found anew. sd: the model if it is in memory.
        """
        _, picture = self.at_hand
        given, found = settled.given.get("mask"), self.found if "mask" in settled.functions else None
        if given is None and not painted(steering) and not found:
            return None
        if sd is None:
            raise NeedsModel
        if given is None and found:
            return cut(found, settled, steering)
        _, at = open_picture(sd, picture, settled.settings["size"])
        cells = torch.zeros(1, 1, at[1] // sd.factor, at[0] // sd.factor)
        M = cells if given is None else images.latent_mask(given, picture.size, at, sd.factor)
        return steering.at(picture.size, at, sd.factor)(M) if steering else M

    def mask_file(self, M: Tensor) -> Path:
        """A painted mask as a file, by which a command can name it."""
        self.count += 1
        path = self.folder / f"{Path(self.name).stem}-mask-{self.count}.png"
        images.write_picture(images.mask_picture(M, self.at_hand[1].size), path, MARK)
        return path

    def keep(self, done: Result, files: dict[str, Path], model: tuple[Sequence[str], str], about: str) -> Made:
        """Write a result's picture and mask. files: what plans were given as files, by name; model: how a command and
        how Python names it.
        """
        self.count += 1
        path = self.folder / f"{Path(self.name).stem}-edited-{self.count}.png"
        files = {name: file for name, file in files.items() if name in done.plan.given}
        hashes = {name: model_hash(file) for name, file in files.items()}
        done.settings.update(hashes)
        record = done.settings | identity(done.sd)
        images.write_picture(done.image, path, metadata(record, prompt_of(record)))
        beside = [file for file in files.values() if file != self.photo]
        if done.mask and "mask" not in files:
            beside.append(path.with_name(f"{path.stem}-mask.png"))
            images.write_picture(done.mask, beside[-1], MARK)
        names = {name: file.name for name, file in files.items() if file != self.photo}
        texts = command(done, self.name, names, model[0], path.name), python(done, self.name, names, hashes, model[1])
        saved = f'{texts[1]}done.save("{path.name}")\n'
        light = replace(done, source=self.picture, image=Image.new("RGB", (1, 1)))  # else most of its memory
        self.shown = Made(path, [path, *beside], about, texts[0], saved, self.before, light)
        self.made.append(self.shown)
        return self.shown

    def whole(self) -> Made:
        """The result that is shown, with its state and its report page among the files."""
        one = self.result
        if one.result is None:
            raise ValueError("only the picture of this result is left: its settings make it again")
        state, page = (one.picture.with_suffix(end) for end in (".safetensors", ".html"))
        if page not in one.files:
            result = replace(one.result, image=images.read_picture(one.picture))
            if result.inside is None:  # an edit with crop cannot be gone on from
                save_state(result, state)
                one.files.append(state)
            save_report(result, page, picture=self.name, state=state.name if state in one.files else None)
            one.files.append(page)
        return one


def let_go(visits: Sequence[Visit], but: int) -> None:
    """Of all results keep the last with their latents, the first visits go first; with but=0 no mask either."""
    held = [one for visit in visits for one in visit.made if one.result]
    for old in held[: max(0, len(held) - but)]:
        old.result = None
    for one in () if but else visits:
        one.found = None


# ---------------------------------------------------------------- from controls to a plan, and back


def settle(
    choices: tuple[str, str | None, str | None], said: dict[str, Any], photo: Path | None = None
) -> tuple[Plan, dict[str, Path]]:
    """A plan of what the controls say, and the files that it was given. choices: method, inversion, the mask's source
    (None: its own); said: texts, numbers and files by name. Raises ValueError as `plan` does.
    """
    (method, inversion, mask_from), blank = choices, blank_plan(*choices)
    files, arguments = dict[str, Path](), dict[str, Any]()
    for name in blank.given:
        value = said.get(name)
        if name == "mask" and value is None and photo and images.has_hole(photo):
            value = photo
        if value and GIVEN[name].kind in ("mask", "picture"):
            files[name] = Path(value)
            arguments[name] = images.read_picture(value) if name == "mask" else Path(value)
        elif value:
            arguments[name] = value
    for name, one in blank.options.items():
        if name in said and said[name] not in (None, ""):
            arguments[name] = typed(one, said[name])
        elif one.none and name in said:
            arguments[name] = None
    return plan(method, inversion=inversion, mask_from=mask_from, **arguments), files


def typed(one: Option, value: Any) -> Any:
    """What a control says as the option has it; a number's box gives floats for whole ones."""
    if isinstance(value, str) and (one.choices or one.type is not str):
        return one.parse(value)
    return int(value) if one.type is int and isinstance(value, float) and value.is_integer() else value


def settings_of(path: Path) -> tuple[tuple[str, str, str], dict[str, Any]]:
    """A result's picture -> the choices and what the controls said. They are what the file says, so each is checked.
    Raises ValueError for a picture without them.
    """
    settings = settings_in(path)
    if not isinstance(method := settings.get("method"), str):
        raise ValueError("this picture holds no settings of an edit: give one that minidiffedit wrote")
    blank, said = blank_plan(method), dict[str, Any]()
    own, mask, name = parts_of(method)
    for given in blank.given:
        value = settings.get(given)
        if GIVEN[given].kind == "pairs" and isinstance(value, list):
            said[given] = "; ".join("=>".join(map(str, pair)) for pair in value if isinstance(pair, list))
        elif GIVEN[given].kind in ("text", "points") and isinstance(value, str):
            said[given] = value
    for option_name in blank.options.keys() & settings.keys():
        said[option_name] = blank.options[option_name].check(settings[option_name])
    steering = one if isinstance(one := settings.get("steering"), dict) else {}
    shaping = {name: steering.get(name, getattr(Steering, name)) for name in SHAPING}
    Steering(**shaping)
    return (name, own, mask), said | shaping


def command(done: Result, photo: str, files: dict[str, str], model: Sequence[str], output: str) -> str:
    """The command line that writes the same bytes, with the files beside it."""
    said = words(done, photo, ()) + option("mask", files.get("mask"))
    for name, value in (done.steering.settings() if done.steering else {}).items():
        said += option(name, value)
    return shlex.join([*said, *model, "-o", output])


def python(done: Result, photo: str, files: dict[str, str], hashes: dict[str, str], load: str) -> str:
    """The same in Python, but for the line that saves it."""
    settled, usual, shaping = done.plan, blank_plan(done.plan.method), done.steering and done.steering.settings()
    said: dict[str, Any] = {n: v for n, v in settled.given.items() if GIVEN[n].kind in ("text", "pairs", "points")}
    said = {name: value for name, value in said.items() if value != usual.given[name]} | files
    said |= {name: v for name, v in settled.settings.items() if v != usual.settings.get(name) or name == "seed"}
    arguments = [f"{name}={value!r}" for name, value in said.items()]
    if shaping:
        arguments.append(f"steering=Steering({', '.join(f'{name}={value!r}' for name, value in shaping.items())})")
    imports = "StableDiffusion, Steering, edit" if shaping else "StableDiffusion, edit"
    lines = [f"from minidiffedit import {imports}", "", f"sd = {load}", "done = edit(", "    sd,", f"    {photo!r},"]
    lines += [f"    {settled.method!r},", *(f"    {one}," for one in arguments), ")"]
    lines += [f"done.settings[{name!r}] = {value!r}  # the file's hash" for name, value in hashes.items()]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- what is painted, and shown


def strokes(layers: Sequence[Image.Image], size: tuple[int, int]) -> dict[str, Image.Image]:
    """What was painted on the picture -> masks of its size: warm colours are added ("union"), cold ones taken away
    ("subtract"); none where nothing was painted.
    """
    whole = Image.new("RGBA", layers[0].size if layers else (1, 1))
    for layer in layers:
        whole.alpha_composite(layer.convert("RGBA").resize(whole.size))
    pixels = np.asarray(whole)
    there, warm = pixels[..., 3] > 127, pixels[..., 0] >= pixels[..., 2]
    inside = {"union": there & warm, "subtract": there & ~warm}
    made = {name: Image.fromarray(np.uint8(255) * one) for name, one in inside.items() if one.any()}
    return {name: mask.resize(size, Image.Resampling.NEAREST) for name, mask in made.items()}


def painted(steering: Steering | None) -> bool:
    return steering is not None and (steering.union is not None or steering.subtract is not None)


def tinted(picture: Image.Image, M: Tensor) -> Image.Image:
    """The mask laid over the picture, reduced to what is shown."""
    small = reduced(picture, LONGEST)
    laid = images.grey_picture(M, small.size).point(lambda v: int(0.55 * v))
    return Image.composite(Image.new("RGB", small.size, TINT), small, laid)


def own_parts(found: Result) -> list[tuple[Image.Image, str]]:
    """Of several edits in one picture each its own mask over it, with how much it covers, and its heat map."""
    assert found.source
    edits, parts, shown = found.plan.given.get("edits") or (), found.found, list[tuple[Image.Image, str]]()
    for (source, target), M, mask in zip(edits, getattr(parts, "each", ()), getattr(parts, "found", ())):
        name = f"{source} \N{RIGHTWARDS ARROW} {target}"
        shown += [(tinted(found.source, M), f"{name}: {share_of(M)}")]
        shown += [(heat_picture(mask.heat, found.source.size), f"{name}: heat map")]
    return shown


def share_of(M: Tensor) -> str:
    return f"{float((M > 0).float().mean()):.1%} of the picture, {int((M > 0).sum())} of {M.numel()} cells"


def heat_picture(heat: Tensor, size: tuple[int, int]) -> Image.Image:
    """(1, 1, h, w) in [0, 1] in the colours of the report page."""
    return reduced(coloured(heat[0, 0]).convert("RGB").resize(size, Image.Resampling.NEAREST), LONGEST)


def places_of(text: str) -> list[tuple[float, float]]:
    """Every place of "x,y=>x,y; ..." as far as it is written."""
    return [(float(x), float(y)) for x, y in re.findall(r"(\d+\.?\d*)\s*,\s*(\d+\.?\d*)", text or "")]


def points_of(places: Sequence[tuple[float, float]]) -> str:
    words = [f"{x:g},{y:g}" for x, y in places]
    return "; ".join("=>".join(words[i : i + 2]) for i in range(0, len(words), 2))


def clicked(picture: Image.Image, index: tuple[float, float]) -> tuple[float, float]:
    """A click on what `arrows` draws -> the place in the picture."""
    x, y = (min(max(v, 0) * max(picture.size) / DRAWN, side - 1) for v, side in zip(index, picture.size, strict=True))
    return round(x, 1), round(y, 1)


def arrows(picture: Image.Image, places: Sequence[tuple[float, float]]) -> Image.Image:
    """The picture, DRAWN pixels on its longer side: a dot at each source, an arrow from there to where it goes."""
    scale = DRAWN / max(picture.size)
    drawn = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    pen, at = ImageDraw.Draw(drawn), [scale * complex(x, y) for x, y in places]
    for colour, width in (("white", 7), (TINT, 3)):
        for start in at[::2]:
            pen.circle((start.real, start.imag), 4 + width, colour)
        for start, end in zip(at[::2], at[1::2]):
            back = 20 * (start - end) / max(1, abs(start - end))
            for tail in (start, end + back * (1 + 0.6j), end + back * (1 - 0.6j)):
                pen.line((tail.real, tail.imag, end.real, end.imag), colour, width)
    return drawn


def sentence(error: BaseException, folder: Path) -> str:
    """An error for the page: no traceback; of files below the server's folder the names alone."""
    text = re.sub(rf"{re.escape(str(folder))}(/[^/\s]+)*/", "", " ".join(str(error).split()))[:600]
    expected = isinstance(error, ValueError | OSError | ArithmeticError)
    return text if expected else f"This could not be done; load the page anew ({type(error).__name__}: {text})"
