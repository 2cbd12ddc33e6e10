"""One run of a plan: the model as its functions see it, their inputs, and their calls, which later runs may reuse.

The model is handed over as `eps`, wrapped: counted, watched and in the latents' dtype, so that no method does it.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import prompts
from .ddim import alpha_bar, noises
from .diffedit import finite
from .files import images
from .files.masks import Steering, digest
from .options import options_of
from .path import Path
from .plans import INPUTS, Plan, function_at, inputs_of, places, texts_of
from .result import Call

if TYPE_CHECKING:
    from .sd import StableDiffusion


class Step(NamedTuple):
    """What a watcher of a run sees after each call of the model: the stage, the timestep, the latent (1, 4, h, w) asked
    about, the clean latent that its prediction leads to (outside a mask the source's), and the model rows paid so far.
    """

    stage: str
    t: int
    x: Tensor
    clean: Tensor
    rows: int


Watch = Callable[[Step], None]
STAGES = {"mask": "mask", "path": "encode", "latent": "decode"}  # what a function makes -> the stage's name


class Job:
    """One run of a plan: inputs are made when they are first asked for, equal prompts are one object."""

    sd: "StableDiffusion"

    def __init__(self, plan: Plan, sd: "StableDiffusion", picture: Image.Image | None, at: tuple[int, int]):
        self.plan, self.sd, self.picture, self.at = plan, sd, picture, at
        self.now, self.seconds = "", dict[str, float]()
        names = {made: STAGES[made] for made in plan.functions} | ({} if picture else {"latent": "generate"})
        self.stage_of = {made: names[made] for made in plan.functions}
        self.evaluations = dict.fromkeys(self.stage_of.values(), 0)
        self.values: dict[str, tuple[Any, Any]] = {}
        self.known: Sequence[Call] = ()
        self.bitwise, self.calls = False, list[Call]()
        self.watch: Watch | None = None
        self.witness: Any = None  # see views/witness.py
        self.x0: Tensor = torch.empty(0)  # until `prepare`
        self.texts: dict[str, Tensor] = {}
        self.begun = 0
        self.stages, self.clean = dict[str, list[Tensor]](), dict[str, list[Tensor]]()
        self.times, self.tensors = dict[str, list[int]](), dict[str, Tensor]()
        self.verdict = "edited"
        self.given_mask: Tensor | None = None
        self.steering: Steering | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        before, rows, start = self.now, self.sd.evaluations, self.sd.clock()
        self.now = name
        yield
        self.now = before
        self.seconds[name] = self.seconds.get(name, 0.0) + self.sd.clock() - start
        if name in self.evaluations:
            self.evaluations[name] += self.sd.evaluations - rows

    # The model.

    def raw_eps(self, x: Tensor, t: int, texts: Sequence[Any], **hooks: Any) -> list[Tensor]:
        """Predictions in the model's own dtype, counted and watched."""
        if self.witness:
            hooks = self.witness.hooks(self.now, x, t, texts, hooks)
        predictions = self.sd.eps(x, t, texts, **hooks)
        if self.now in ("encode", "decode", "generate"):
            self.saw(x.detach(), t, [one.detach() for one in predictions])
        elif self.watch:
            self.watch(Step(self.now, t, x[-1:], x[-1:], self.sd.evaluations - self.begun))
        return predictions

    def eps(self, x: Tensor, t: int, texts: Sequence[Any], **hooks: Any) -> list[Tensor]:
        """The same in x's dtype."""
        return [e.to(x) for e in self.raw_eps(x, t, texts, **hooks)]

    def saw(self, x: Tensor, t: int, predictions: list[Tensor]) -> None:
        """Keep the last role's latent and the clean one it leads to; of several calls at one level, the last."""
        x, first, last = x[-1:], predictions[0][-1:].to(x), predictions[-1][-1:].to(x)
        a, scale = alpha_bar()[t], self.plan.settings.get("guidance_scale", 1.0)
        clean = (x - math.sqrt(1 - a) * (first + scale * (last - first))) / math.sqrt(a)
        if self.now == "decode" and (M := self.values.get("mask", (None,))[0]) is not None:
            clean = M * clean + (1 - M) * self.x0
        latents, cleans = self.stages.setdefault(self.now, []), self.clean.setdefault(self.now, [])
        times = self.times.setdefault(self.now, [])
        if times[-1:] == [t]:
            del latents[-1:], cleans[-1:], times[-1:]
        latents.append(x)
        cleans.append(clean)
        times.append(t)
        if self.watch:
            self.watch(Step(self.now, t, x, clean, self.sd.evaluations - self.begun))

    # The functions of the method.

    def input(self, name: str) -> tuple[Any, Any]:
        if name not in self.values:
            self.values[name] = INPUTS[name].make(self)
        return self.values[name]

    def call(self, made: str) -> Call:
        """Run the function that makes the mask, the path or the latent, unless an earlier run's call was the same."""
        place = self.plan.functions[made]
        function, asked = function_at(place), {name: self.input(name) for name in inputs_of(place)}
        options = {name: self.plan.settings[name] for name in options_of(function)}
        given = {name: key for name, (_, key) in asked.items() if key is not None} | options
        same = [call for call in self.known if call.function == place and call.given == given]
        if same and made != "latent":
            self.calls.append(same[-1])
            return same[-1]
        handles = {"record": self.tensors, "earlier": self.earlier(place, given)}
        handles = {name: one for name, one in handles.items() if name in inspect.signature(function).parameters}
        with self.stage(self.stage_of[made]):
            call = Call(place, given, function(*(value for value, _ in asked.values()), **options, **handles))
        self.calls += [call] if made != "latent" else []
        return call

    def earlier(self, place: str, given: dict[str, Any]) -> Callable[..., Iterator[Any]]:
        """earlier(*but, exact=True): results of the same function given the same but for some names, the latest first.
        exact=False: what can be made of them rounds otherwise than a run without, so that some runs do without.
        """

        def without(names: tuple[str, ...], one: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in one.items() if name not in names}

        def find(*but: str, exact: bool = True) -> Iterator[Any]:
            for call in reversed(self.known if exact or not self.bitwise else ()):
                if call.function == place and without(but, call.given) == without(but, given):
                    yield call.result

        return find

    # The inputs.

    def prepare(self, x0: Tensor | None = None) -> None:
        """Texts and the picture's latent, unless it is known, before any loop."""
        self.begun = self.sd.evaluations
        asked, syntax = dict.fromkeys(["", *texts_of(self.plan.given)]), self.plan.settings["prompt_syntax"]
        with self.stage("text"):
            plain = syntax == "plain" or len(asked) == 1  # of the empty text every syntax makes the same
            self.texts = {text: self.sd.text([text]) if plain else self.sd.text([text], syntax) for text in asked}
        if not plain:
            self.texts = dict(zip(asked, prompts.same_length([*self.texts.values()], syntax)))
        if self.witness:
            self.witness.meet(self.texts, self.words_of)
        if self.picture:
            with self.stage("vae encode"):
                self.x0 = self.encode(images.to_tensor(self.picture, self.at)) if x0 is None else x0

    def encode(self, pixels: Tensor) -> Tensor:
        return finite(self.sd.encode(pixels), "the VAE")

    def x_T(self) -> tuple[Tensor, Any]:
        h, w = (side // self.sd.factor for side in reversed(self.at))
        seed = self.plan.settings["seed"]
        return noises((self.sd.channels, h, w), 1, seed).to(self.sd.device), seed

    def text(self, text: str) -> tuple[Tensor, Any]:
        """A text's embedding; it is known by its letters, and unless they are plain by what else made it."""
        syntax, found = self.plan.settings["prompt_syntax"], self.texts[text]
        return found, text if syntax == "plain" else [syntax, found.shape[1], text]

    def embedded(self, name: str) -> tuple[Tensor, Any]:
        """What a text's embedding is made of, to be learned. Raises ValueError for a text with weights."""
        text, syntax = self.plan.given[name], self.plan.settings["prompt_syntax"]
        if prompts.spoken(text, syntax) != text:
            raise ValueError(f"{self.plan.method} learns the vectors of {name}, which takes no weights, got {text!r}")
        return self.sd.embed([text]), text

    def pairs(self, name: str) -> tuple[list[tuple[Tensor, Tensor]], Any]:
        both = [[self.text(text) for text in pair] for pair in self.plan.given[name]]
        return [(source, target) for (source, _), (target, _) in both], [[key for _, key in pair] for pair in both]

    def words(self, name: str) -> tuple[Any, Any]:
        """Which positions the words of a text have, or those of pairs of texts, see methods/words.py."""
        given, of = self.plan.given[name], self.words_of
        try:
            for text in texts_of({name: given}):
                prompts.check_one_chunk(self.sd.tokenizer, text, self.plan.settings["prompt_syntax"])
        except ValueError:  # only a method that may do without words gets here (check_prompts)
            return None, given
        return of(given) if isinstance(given, str) else [[*map(of, pair)] for pair in given], given

    def words_of(self, prompt: str) -> Any:
        said = prompts.spoken(prompt, self.plan.settings["prompt_syntax"])
        return function_at("words:words_of")(self.sd.tokenizer, said)

    def points(self) -> tuple[list[tuple[tuple[int, int], ...]], Any]:
        """`places` as whole cells."""
        found, given = self.places()
        return [tuple((int(row), int(column)) for row, column in pair) for pair in found], given

    def places(self) -> tuple[list[tuple[tuple[float, float], ...]], Any]:
        """Places in pixels as (row, column) of the latent, 0 at its edge. ValueError for one outside the picture."""
        given = self.plan.given["points"]
        (width, height), (w, h) = self.picture.size, (side // self.sd.factor for side in self.at)  # type: ignore[union-attr]
        if any(x >= width or y >= height for pair in places(given) for x, y in pair):
            raise ValueError(f"points must lie in the picture of {width} x {height} pixels, got {given!r}")
        return [tuple((y * h / height, x * w / width) for x, y in pair) for pair in places(given)], given

    def mask(self) -> tuple[Tensor | None, Any]:
        """The mask as it is used: given or found, then steered; None where the method may do without."""
        M = self.given_mask
        if M is not None:
            self.verdict = "given"
        elif "mask" in self.plan.functions:
            found, _ = self.input("found")
            M, self.verdict = found.mask.float(), found.verdict[0]
            tensors = vars(found).items()
            self.tensors |= {name: one for name, one in tensors if isinstance(one, Tensor) and name != "mask"}
        elif self.steering:  # of what may change where no mask is given: all
            M, self.verdict = torch.ones_like(self.x0[:, :1]), "given"
        if M is not None and self.steering and self.verdict != "no difference":
            M = self.steering(M)
        return M, None if M is None else digest(M)

    def found(self) -> tuple[Any, Any]:
        """What the mask's function returned."""
        call = self.call("mask")
        return call.result, call.given

    def path(self) -> tuple[Path, Any]:
        call = self.call("path")
        finite(call.result[call.result.top], "the encoding")
        return call.result, [call.function, call.given]

    def pixels(self) -> Tensor:
        assert self.picture
        return images.to_tensor(self.picture, self.at).to(self.sd.device)

    def x0_outside(self) -> tuple[Tensor, Any]:
        """The latent of the picture with grey where the mask is not below one half."""
        assert self.picture
        M, known_by = self.input("mask")
        inside = F.interpolate(M.cpu(), (self.at[1], self.at[0]), mode="nearest") >= 0.5
        return self.encode(torch.where(inside, 0.0, images.to_tensor(self.picture, self.at))), known_by

    def encoded(self, name: str) -> tuple[Tensor, Any]:
        """Another picture's latent, at the working size."""
        pixels = images.to_tensor(images.to_rgb(images.read_picture(self.plan.given[name])), self.at)
        return self.encode(pixels), [digest(channel) for channel in (pixels / 2 + 0.5).split(1, dim=1)]

    def example(self) -> tuple[Tensor, Any]:
        """What Paint by Example's UNet reads of another picture, squeezed into a square as its authors do."""
        square = (self.sd.example_side,) * 2
        picture = images.to_rgb(images.read_picture(self.plan.given["reference"]))
        pixels = images.to_tensor(picture.resize(square, Image.Resampling.BICUBIC), square)
        return self.sd.example(pixels), [digest(channel) for channel in (pixels / 2 + 0.5).split(1, dim=1)]

    def placed(self, what: str) -> tuple[Tensor, Any]:
        """The reference's part laid into the mask's box, as large as fits: "placed", its latent, or "shape", where."""
        assert self.picture
        M, _ = self.input("mask")
        given = {name: self.plan.given[name] for name in ("reference", "reference_mask")}
        read = {name: images.read_picture(one) for name, one in given.items() if one is not None}
        rows, columns = ([int(one) for one in M[0, 0].amax(dim).nonzero()] for dim in (1, 0))
        box = [self.sd.factor * side for side in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
        laid, region = images.placed(self.picture.resize(self.at, Image.Resampling.LANCZOS), box, *read.values())
        pixels, shape = images.to_tensor(laid, self.at), images.latent_mask(region, self.at, self.at, self.sd.factor)
        known_by = [digest(one) for one in (*(pixels / 2 + 0.5).split(1, dim=1), shape)]
        return shape.to(self.sd.device) if what == "shape" else self.encode(pixels), known_by
