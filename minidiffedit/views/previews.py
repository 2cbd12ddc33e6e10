"""Latents to look at without the autoencoder, and a run to look at while it goes on.

A linear map from latent to RGB is fitted on the spot to the picture at hand. It has no constants, so it serves any
checkpoint and any picture. What it cannot show is all that lies below a latent cell.
"""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..ddim import alpha_bar, levels, whole
from ..files import images

if TYPE_CHECKING:
    from ..job import Step
    from ..result import Result
    from ..sd import StableDiffusion

ROUNDING = 1e-12  # a variance below which a picture is one colour
LOWEST = 1  # the timestep of level 1, whatever the number of steps


def predicted_x0(x: Tensor, x_next: Tensor, a: float, a_next: float) -> Tensor:
    """The clean latent on which a DDIM step from x at alpha_bar a to x_next at a_next was based; any shape.

    Both lie on sqrt(a) x0 + sqrt(1 - a) eps with the step's own x0 and eps (2010.02502, eq. 12): two equations, two
    unknowns. Raises ValueError for one and the same level.
    """
    if a == a_next:
        raise ValueError("a step between equal noise levels says nothing of x0")
    s, s_next = math.sqrt(1 - a), math.sqrt(1 - a_next)
    return (s * x_next - s_next * x) / (s * math.sqrt(a_next) - s_next * math.sqrt(a))


class Level(NamedTuple):
    """What there is to see at timestep t, the run's level j if it is one. shown: latents (1, c, h, w) float64 on the
    CPU, so far as there are: "x" encoded, "y" decoded, "x_clean" and "y_clean" the clean ones that the predictions
    there lead to, and "apart", the difference |y - x|.
    """

    j: int | None
    t: int
    a: float
    shown: dict[str, Tensor]


def walk(result: "Result") -> list[Level]:
    """The decoding's steps from the last back to the first, with the encoding beside them; what it has above them last.

    The encoding's predictions are solved for, each of the two latents that it joins: a run keeps what a prediction
    leads to from the level that it was asked for, and an encoding is asked at one level for the next.
    """
    t, a = levels(result.settings.get("steps", 50))
    ways = {name: [one.cpu().double() for one in latents] for name, latents in result.stages.items()}
    x, down = ways.pop("encode", []), next(iter(ways), "")
    y, clean = ways.get(down, [])[::-1], [one.cpu().double() for one in result.clean.get(down, [])[::-1]]
    x = x or ([result.x0.cpu().double()] if result.x0 is not None and not y else [])
    times = [0, *result.times.get(down, [])[::-1]] if y else []
    times += [one for one in t[: len(x)] if one > max(times, default=-1)]
    solvable, made = not getattr(result.made("path"), "noises", None), []
    for i, at in enumerate(times):
        j, shown = t.index(at) if at in t else None, dict[str, Tensor]()
        if j is not None and j < len(x):
            shown["x"] = x[j]
            if solvable or not j:
                shown["x_clean"] = predicted_x0(x[j - 1], x[j], a[j - 1], a[j]) if j else x[0]
        if i < len(y):
            shown |= {"y": y[i], "y_clean": clean[i - 1] if i else y[0]}
        if "x" in shown and "y" in shown:
            shown["apart"] = (shown["y"] - shown["x"]).abs()
        made.append(Level(j, at, alpha_bar()[at], shown))
    return made


class LatentRGB(NamedTuple):
    """rgb = latent @ matrix + bias, in [0, 1]: matrix (c, 3), bias (3,), float32 on the CPU; explained: the share that
    the map accounts for of the variance of the picture, averaged over each cell's pixels (1 where it has none).
    """

    matrix: Tensor
    bias: Tensor
    explained: float


def fit(x0: Tensor, picture: Image.Image) -> LatentRGB:
    """Least squares between a clean latent x0 (1, c, h, w) and its picture (RGB, any size), averaged over each cell.

    Where cells are too few or too alike for one answer, the smallest map is taken. Raises ValueError for several
    latents or a picture that is not RGB, ArithmeticError for NaN or infinity.
    """
    if x0.ndim != 4 or len(x0) != 1 or 0 in x0.shape or picture.mode != "RGB":
        raise ValueError(f"expected a latent (1, c, h, w) and an RGB picture, got {tuple(x0.shape)} and {picture.mode}")
    rows = cells(x0)
    if not bool(torch.isfinite(rows).all()):
        raise ArithmeticError("the latent holds NaN or infinity")
    reduced = np.asarray(picture.resize((x0.shape[3], x0.shape[2]), Image.Resampling.BOX))
    colours = torch.from_numpy(reduced.reshape(-1, 3) / 255)
    known = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], dim=1)
    solved = torch.linalg.lstsq(known, colours, driver="gelsd").solution  # gelsd: any rank
    left, spread = (known @ solved - colours).square().sum(), (colours - colours.mean(dim=0)).square().sum()
    explained = 1.0 if spread < ROUNDING * len(rows) else float(1 - left / spread)
    return LatentRGB(solved[:-1].float(), solved[-1].float(), explained)


def apply(rgb: LatentRGB, latent: Tensor) -> Image.Image:
    """A latent (1, c, h, w), noisy or not -> PIL RGB of w x h pixels, one per cell; what leaves [0, 1] is clipped."""
    if latent.ndim != 4 or latent.shape[:2] != (1, len(rgb.matrix)):
        raise ValueError(f"expected a latent (1, {len(rgb.matrix)}, h, w), got {tuple(latent.shape)}")
    colours = cells(latent) @ rgb.matrix.double() + rgb.bias.double()
    pixels = (colours.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.reshape(*latent.shape[2:], 3).numpy())


def cells(latent: Tensor) -> Tensor:
    """(1, c, h, w) -> (h w, c) float64 on the CPU."""
    return latent[0].detach().to("cpu", torch.float64).flatten(1).T


class Previews:
    """Watches a run, of any method, and writes the clean picture that its latents point to now into a folder.

    Files are named NN-STAGE-tTTT.png by stage and timestep, and have the working size. Every `every` steps of a stage
    one is written, and one for its last step. picture: the run's; None, where nothing goes in. decode: by the
    autoencoder, sharper and slower, instead of the linear map. `files` lists what was written. Raises ValueError for a
    folder that cannot be used.

        edit(sd, picture, target="a zebra", watch=Previews(sd, picture, "previews"))
    """

    def __init__(
        self,
        sd: "StableDiffusion",
        picture: Image.Image | None,
        folder: str | Path,
        every: int = 5,
        decode: bool = False,
    ):
        self.sd, self.folder, self.every = sd, Path(folder), whole("preview_every", every, 1, 999)
        self.picture = None if picture is None else images.to_rgb(picture)
        self.decode = decode or picture is None
        self.files: list[Path] = []
        self.last: Step | None = None
        self.steps = 0  # of the stage so far; several calls at one timestep are one step
        self.map: LatentRGB | None = None
        check_folder(self.folder)

    def __call__(self, step: "Step") -> None:
        """A step is over when another one follows: of several calls at one timestep the last counts."""
        if step.stage == "mask":
            return  # its latents are noise on the source, and lead to no picture
        last, self.last = self.last, step
        follows = last is None or (last.stage, last.t) != (step.stage, step.t)
        if last and follows and not ends_run(last):
            over = last.stage != step.stage
            if over or self.steps % self.every == 0:
                self.write(last)
            self.steps = 0 if over else self.steps
        self.steps += follows
        if ends_run(step):
            self.write(step, again=not follows)

    def write(self, step: "Step", again: bool = False) -> None:
        """The picture of a step; again: in the place of the last one."""
        if not again:
            self.files.append(self.folder / f"{len(self.files) + 1:02d}-{step.stage}-t{step.t:03d}.png")
        self.folder.mkdir(exist_ok=True)
        images.write_picture(self.shown(step.clean), self.files[-1])

    @torch.no_grad()
    def shown(self, clean: Tensor) -> Image.Image:
        if self.decode:
            return images.to_picture(self.sd.decode(clean))
        size = (clean.shape[3] * self.sd.factor, clean.shape[2] * self.sd.factor)
        if self.map is None:
            assert self.picture
            self.map = fit(self.sd.encode(images.to_tensor(self.picture, size)), self.picture)
        return apply(self.map, clean).resize(size, Image.Resampling.BICUBIC)


def ends_run(step: "Step") -> bool:
    """Whether nothing but a clean latent can follow: an encoding goes up from the lowest level, all else ends there."""
    return step.t == LOWEST and step.stage != "encode"


def check_folder(folder: Path) -> None:
    """Raises ValueError unless previews can go there: into a new folder, or an empty one."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} is a file; --preview names a folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder for the previews")
    if not folder.exists() and not folder.parent.is_dir():
        raise ValueError(f"{folder}: there is no folder {folder.parent}")
