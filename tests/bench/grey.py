"""How far grey moves the latent of a scene of the miniature, of white's way, by steps: the table of files/README.md.

python tests/bench/grey.py        # some five minutes of one core
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from minidiffedit import StableDiffusion, edit  # noqa: E402

SCENES = ("horse-zebra", "dog-cat", "lemon-strawberry", "salad-cake")
VALUES, STEPS, WAYS = (0.25, 0.5, 0.75), (10, 25, 50), ("level", "blend")


def shares(sd: StableDiffusion, picture: Path, target: str, steps: int) -> np.ndarray:
    """By value and way: the distance of the edit under grey from the source, by that under white."""

    def moved(value: float, **options: object) -> tuple[float, object]:
        mask = torch.full((1, 1, sd.side // 8, sd.side // 8), value)
        done = edit(sd, picture, "user-mask", target=target, mask=mask, steps=steps, seed=0, **options)
        return float((done.latent - done.x0).norm()), done

    white, done = moved(1.0)
    return np.array([[moved(v, grey=way, reuse=done)[0] / white for way in WAYS] for v in VALUES])


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = ROOT / "weights" / "mini"
    sd, known = (
        StableDiffusion.load(folder, device="cpu"),
        json.loads((folder / "scenes" / "scenes.json").read_text(encoding="utf-8")),
    )
    found = np.zeros((len(SCENES), len(STEPS), len(VALUES), len(WAYS)))
    for i, scene in enumerate(one for name in SCENES for one in known if one["folder"] == name):
        for j, steps in enumerate(STEPS):
            found[i, j] = shares(sd, folder / "scenes" / scene["folder"] / "source.png", scene["target"], steps)
        at_half = " / ".join(f"{share:.2f}" for share in found[i, :, VALUES.index(0.5), 0])
        print(f"{scene['folder']}: .5 by level {at_half}", flush=True)
    print(f"| value | {' | '.join(WAYS)} |\n|---|---|---|")
    for v, value in enumerate(VALUES):
        cells = [" / ".join(f"{share:.2f}" for share in found[:, :, v, way].mean(0)) for way in range(len(WAYS))]
        print(f"| {value:g} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
