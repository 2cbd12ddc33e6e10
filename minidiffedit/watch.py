"""Watching an edit while it runs: every k levels, the clean picture that its latents point to now, as a file.

Nothing in the loops knows of it: they append each level to a list (`edit(..., record=)`), and this one looks after each
step of the progress (`track=`).
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from . import images, preview
from .ddim import levels, whole
from .diffedit import Track, untracked

if TYPE_CHECKING:
    from .sd import StableDiffusion


def predicted_x0(x: Tensor, x_next: Tensor, a: float, a_next: float) -> Tensor:
    """The clean latent on which a DDIM step from x at alpha_bar a to x_next at a_next was based; any shape.

    Both lie on sqrt(a) x0 + sqrt(1 - a) eps with the step's own x0 and eps (2010.02502, eq. 12): two equations, two
    unknowns. Raises ValueError for one and the same level.
    """
    if a == a_next:
        raise ValueError("a step between equal noise levels says nothing of x0")
    s, s_next = math.sqrt(1 - a), math.sqrt(1 - a_next)
    return (s * x_next - s_next * x) / (s * math.sqrt(a_next) - s_next * math.sqrt(a))


class Watch:
    """Writes the predicted x_0 of a running edit into a folder: NN-encode-level-J.png, then NN-decode-level-J.png.

    picture: the one that is edited; steps: the edit's; every: levels between two files, a stage's last aside; decode:
    by the autoencoder, slower, instead of the linear map of `preview`. Files have the working size.

        watch = Watch(sd, picture, "previews", every=5, steps=50)
        edit(sd, picture, target="a zebra", record=watch.record, track=watch.track())
    """

    def __init__(
        self,
        sd: "StableDiffusion",
        picture: Image.Image,
        folder: str | Path,
        *,
        steps: int = 50,
        every: int = 5,
        decode: bool = False,
    ):
        self.sd, self.picture, self.folder, self.a = sd, images.to_rgb(picture), Path(folder), levels(steps).a
        self.every, self.decode = whole("preview_every", every, 1, 999), decode
        self.record: dict[str, list[Tensor]] = {}
        self.files: list[Path] = []
        self.map: preview.LatentRGB | None = None
        check_folder(self.folder)

    def track(self, inner: Track = untracked) -> Track:
        """`inner`, looking after each of its steps."""

        def tracked(items: Iterable[Any], stage: str) -> Iterable[Any]:
            total = len(items)  # type: ignore[arg-type]  # the loops hand over ranges
            for done, item in enumerate(inner(items, stage), 1):
                yield item
                made = len(self.record.get(stage, ())) - 1
                if made > 0 and (made % self.every == 0 or done == total):
                    self.look(stage)

        return tracked

    def look(self, stage: str) -> None:
        """Write what the stage's last two levels point to."""
        latents, up = self.record[stage], stage == "encode"
        at = len(latents) - 1 if up else len(self.record["encode"]) - len(latents)
        before = at - 1 if up else at + 1
        clean = latents[-1] if at == 0 else predicted_x0(latents[-2], latents[-1], self.a[before], self.a[at])
        self.folder.mkdir(exist_ok=True)
        self.files.append(self.folder / f"{len(self.files) + 1:02d}-{stage}-level-{at}.png")
        images.write_picture(self.shown(clean), self.files[-1])

    def shown(self, clean: Tensor) -> Image.Image:
        if self.decode:
            return images.to_picture(self.sd.decode(clean))
        if self.map is None:
            self.map = preview.fit(self.record["encode"][0], self.picture)
        size = (clean.shape[3] * self.sd.factor, clean.shape[2] * self.sd.factor)
        return preview.apply(self.map, clean).resize(size, Image.Resampling.BICUBIC)


def check_folder(folder: Path) -> None:
    """Raises ValueError unless previews can go there: into a new folder, or an empty one."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; --preview names a folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder for the previews")
    if not folder.exists() and not folder.parent.is_dir():
        raise ValueError(f"{folder}: there is no folder {folder.parent}")
