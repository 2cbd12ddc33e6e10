"""Results that no model made: any size, any maps, at once."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minidiffedit import Path as Walked
from minidiffedit import Result, StableDiffusion, Steering, ddim, plan, save_report, threshold_maps
from minidiffedit.files.images import mask_picture, paste_mask
from minidiffedit.run import Call


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft shapes under grain: about as hard to compress as a photograph."""
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    grain = rng.normal(0, 6, (height, width, 3))
    return Image.fromarray((np.asarray(soft) + grain).clip(0, 255).astype(np.uint8))


def maps(n: int, h: int, w: int, seed: int = 0) -> torch.Tensor:
    """(1, n, h, w): a bright patch in heavy-tailed noise, as differences of predictions look."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(1, n, h, w, generator=generator).mul(0.8).exp() * 0.02
    made[..., h // 4 : h // 2, w // 4 : 3 * w // 4] += 0.08
    return made


def made_up(
    sd: StableDiffusion,
    picture: tuple[int, int] = (93, 75),
    grid: tuple[int, int] = (10, 8),
    *,
    steps: int = 10,
    n: int = 3,
    seed: int = 0,
    raw: torch.Tensor | None = None,
    given: torch.Tensor | None = None,
    steering: Steering | None = None,
    clip: float | None = 3.0,
    threshold: float = 0.5,
    levels: int | None = None,
    **settings: object,
) -> Result:
    """A DiffEdit result whose parts fit one another as a real one's do: a random latent, path and decoding."""
    w, h = grid
    generator = torch.Generator().manual_seed(seed)
    K = round(0.8 * steps) if levels is None else levels
    found, M, verdict, tensors = None, given, "given", {}
    if given is None:
        raw = maps(n, h, w, seed) if raw is None else raw
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of very large and very small masks
            found = threshold_maps(raw, torch.full((1,), 1e-6), clip=clip, threshold=threshold)
        M, verdict = found.mask.float(), found.verdict[0]
        tensors = {"heat": found.heat, "maps": found.maps, "flat_below": found.flat_below}
    if steering and verdict != "no difference":
        M = steering(M)
    x = [torch.randn(1, 4, h, w, generator=generator) for _ in range(K + 1 if M.any() else 1)]
    y = [torch.where(M > 0, M * torch.randn(1, 4, h, w, generator=generator) + (1 - M) * one, one) for one in x[:-1]]
    decoded = [x[-1], *reversed(y)] if y else []
    source, image = photo(*picture, seed), photo(*picture, seed + 1)
    texts = {"target": "a zebra", "source": "a horse", "mask": given}
    options = {"steps": steps, "maps": n, "mask_clip": clip, "mask_threshold": threshold, "seed": seed}
    settled = plan("diffedit", **texts | options | settings)
    path = Call(settled.functions["path"], {}, Walked(x, steps))
    return Result(
        method=settled.method,
        settings=settled.record | {"working_size": (8 * w, 8 * h), "mask": "given" if found is None else "computed"},
        source=source,
        image=image if y else source,
        mask=mask_picture(M, picture),
        paste_mask=paste_mask(M, picture) if y else None,
        x0=x[0],
        latent=decoded[-1] if y else x[0],
        latent_mask=M,
        stages={"encode": x if y else [], "decode": decoded},
        clean={
            "decode": [torch.where(M > 0, torch.randn(one.shape, generator=generator), x[0]) for one in decoded[1:]]
        },
        times={"decode": [*reversed(ddim.levels(steps).t[1 : K + 1])] if y else []},
        tensors=tensors,
        verdict=verdict,
        evaluations={"mask": 2 * n if found else 0, "encode": K, "decode": 2 * K},
        seconds={"text": 0.25, "vae encode": 0.5, "mask": 1.5, "encode": 2.0, "decode": 4.0, "vae decode": 0.75},
        plan=settled,
        calls=(path,) if y else (),
        sd=sd,
        given_mask=given,
        steering=steering,
    )


def page_of(result: Result, path: Path, **options: object) -> Path:
    save_report(result, path, **options)
    return path
