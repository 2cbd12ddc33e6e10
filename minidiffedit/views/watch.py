"""Watching an edit while it runs: every k levels, the clean picture that its latents point to now, as a file.

Nothing in the loops knows of it: they append each level to a list (`edit(..., record=)`), and this one looks after each
step of the progress (`track=`).
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from ..files import images
from . import preview
from ..ddim import levels, whole
from ..diffedit import Track, untracked

if TYPE_CHECKING:
    from ..sd import StableDiffusion


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
        latents, x, a = self.record[stage], self.record["encode"], self.a
        at = len(latents) - 1 if stage == "encode" else len(x) - len(latents)
        if stage == "encode":
            clean = preview.predicted_x0(latents[-2], latents[-1], a[at - 1], a[at])
        elif at == 0:
            clean = latents[-1]
        else:
            (M,) = self.record["mask"]
            clean = preview.decoded_x0(latents[-2], latents[-1], x[at], x[0], M, a[at + 1], a[at])
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
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} is a file; --preview names a folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder for the previews")
    if not folder.exists() and not folder.parent.is_dir():
        raise ValueError(f"{folder}: there is no folder {folder.parent}")
