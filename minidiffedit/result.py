"""What a run made, whatever the method."""

import base64
import html
import io
import pathlib
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from .ddim import Trajectory
from .files import images
from .files.masks import Steering
from .files.metadata import describe_result, prompt_of
from .plans import Plan

if TYPE_CHECKING:
    from .sd import StableDiffusion


@dataclass(frozen=True, eq=False)
class Call:
    """One run of a function that makes a mask or a path: what it depended on, and what it returned."""

    function: str
    given: dict[str, Any]
    result: Any = field(repr=False)


class Shown:
    """What a notebook shows of something with an `image`: the picture, and below it what it is."""

    image: Image.Image

    def _repr_png_(self) -> bytes:
        encoded = io.BytesIO()
        self.image.save(encoded, "PNG")
        return encoded.getvalue()

    def _repr_html_(self) -> str:
        data = base64.b64encode(self._repr_png_()).decode()
        return f'<img src="data:image/png;base64,{data}" style="max-width:100%"><div>{html.escape(repr(self))}</div>'


@dataclass(frozen=True, eq=False, repr=False)
class Result(Shown):
    """What a run made, whatever the method.

    source, image: PIL RGB at the input's size, before and after (source None: nothing went in). mask: PIL L at that
    size, white = may change (None: the method has none); paste_mask: PIL L, where it is 0 the image's pixels are the
    source's (None: nothing was pasted). x0, latent (1, 4, h, w), latent_mask (1, 1, h, w) float32, the mask as it was
    used. stages: lists of latents by name, "encode": x_0, ..., x_K and "decode": y_K, ..., y_0 (empty where nothing was
    to do); times, clean: the timestep of each prediction of a stage, and the x_0 that it led to, outside a mask the
    source's. tensors: what else there is to see, by name. verdict: "found", "no difference", "given", "strength 0",
    "encoded" (no more was wanted) or "edited" (no mask). evaluations (model rows) and seconds by stage. settings: all
    that decided the result. given_mask, steering: as handed in, on the latent grid. calls: masks and paths, for reuse.
    inside: of a run with crop, what was made of the square alone, settings["crop_box"] = [left, top, right, bottom];
    masks and tensors are the whole picture's then, latent, stages, times and clean the square's. witness: what looked
    on.
    """

    method: str
    settings: dict[str, Any]
    source: Image.Image | None
    image: Image.Image
    mask: Image.Image | None
    paste_mask: Image.Image | None
    x0: Tensor | None = field(repr=False)
    latent: Tensor = field(repr=False)
    latent_mask: Tensor | None = field(repr=False)
    stages: dict[str, list[Tensor]] = field(repr=False)
    clean: dict[str, list[Tensor]] = field(repr=False)
    times: dict[str, list[int]] = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)
    verdict: str
    evaluations: dict[str, int]
    seconds: dict[str, float]
    plan: Plan = field(repr=False)
    calls: tuple[Call, ...] = field(repr=False)
    sd: "StableDiffusion" = field(repr=False)
    given_mask: Tensor | None = field(default=None, repr=False)
    steering: Steering | None = field(default=None, repr=False)
    inside: "Result | None" = field(default=None, repr=False)
    witness: Any = field(default=None, repr=False)

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    @property
    def rows(self) -> int:
        """Model rows paid in all."""
        return sum(self.evaluations.values())

    @property
    def heat(self) -> Tensor | None:
        """(1, 1, h, w) in [0, 1]: the map that the mask was cut from, where one was sought."""
        return self.tensors.get("heat")

    @property
    def coverage(self) -> float | None:
        """Share of latent cells in the mask."""
        return None if self.latent_mask is None else float((self.latent_mask > 0).float().mean())

    @property
    def found(self) -> Any:
        """What the mask's own function returned, if it ran."""
        return self.made("mask")

    @property
    def trajectory(self) -> Trajectory:
        """The path that was walked down; where nothing was inverted, x_0 alone."""
        made = self.made("path")
        return Trajectory([self.x0], self.settings.get("steps", 50)) if made is None else made  # type: ignore[list-item]

    @property
    def decoded(self) -> tuple[Tensor, ...]:
        return tuple(self.stages.get("decode", ()))

    def made(self, what: str) -> Any:
        """What this run's own call made; calls of earlier runs are kept for reuse only."""
        place, sought = self.plan.functions.get(what), self.given_mask is None and self.verdict != "strength 0"
        own = {"path": bool(self.stages.get("encode")), "mask": sought}[what]
        return next((call.result for call in reversed(self.calls) if own and call.function == place), None)

    def __repr__(self) -> str:
        said = [self.method, repr(prompt) if len(prompt := self.prompt) <= 60 else repr(f"{prompt[:57]}...")]
        said += [f"{self.image.width} x {self.image.height}", self.verdict]
        said += [] if self.coverage is None else [f"mask {self.coverage:.0%}"]
        said += [f"seed {self.seed}", f"{self.rows} rows", f"{sum(self.seconds.values()):.1f} s"]
        return f"Result({', '.join(said)})"

    @property
    def prompt(self) -> str:
        """The target, the instruction, or the targets of several pairs."""
        return prompt_of(self.settings)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the picture with its settings, as `minidiffedit edit` does."""
        images.write_picture(self.image, pathlib.Path(path), describe_result(self))


# Why an edit changes nothing, by verdict.
NOTHING = {
    "strength 0": "the strength rounds to level 0",
    "no difference": "the prompts do not differ on this picture",
    "found": "the mask is empty",
    "given": "the mask is empty",
    "encoded": "only the way up was asked for",
}


def nothing_to_edit(plan: Plan, verdict: str) -> str:
    if verdict == "no difference" and "target" in plan.given and plan.given["target"] == plan.given.get("source"):
        return f"the prompts do not differ: both are {plan.given['target'][:60]!r}"
    return NOTHING.get(verdict, "no pair of prompts finds a cell")
