"""Is a model what it should be? Its files' sha256 against the official ones, its headers, and one known edit.

For the first user of a set of weights: two machines that print the same line have the same model and the same code.
"""

import hashlib
from typing import Any

import numpy as np
from PIL import Image

from ..files.metadata import sha256
from ..job import Watch
from ..run import edit
from ..sd import StableDiffusion

# sha256 of the official files, as last seen on the hub: v1-5 is stable-diffusion-v1-5/stable-diffusion-v1-5, v1-4 is
# CompVis/stable-diffusion-v1-4.
OFFICIAL = {
    "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa": "v1-5 v1-5-pruned-emaonly",
    "1a189f0be69d6106a48548e7626207dddd7042a418dbf372cefd05e0cdba61b6": "v1-5 v1-5-pruned",
    "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1": "v1-5 unet",
    "c83908253f9a64d08c25fc90874c9c8aef9a329ce1ca5fb909d73b0c83d1ea21": "v1-5 unet fp16",
    "d008943c017f0092921106440254dbbe00b6a285f7883ec8ba160c3faad88334": "v1-5 text_encoder",
    "145a07e0f05ec5bbe6e2e9faf608bdb311caf708895cac8c8ed713c59864e1e8": "v1-4 unet",
    "a35404d03ec8f977715a4d2a080ddf72e2144f2ee49bb1ee213258bc64f9cc87": "v1-4 unet fp16",
    "7b3a12df205cb3c74dd4eae4354d93f606ae6b3bc29d5d06fd97921cb9ad8a81": "v1-4 text_encoder",
    "77795e2023adcf39bc29a884661950380bd093cf0750a966d473d1718dc9ef4e": "v1-4 and v1-5 text_encoder fp16",
    "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c": "v1-4 and v1-5 vae",
    "4fbcf0ebe55a0984f5a5e00d8c4521d52359af7229bb4d81890039d2aa16dd7c": "v1-4 and v1-5 vae fp16",
}
COUNTS = {"mask": 4, "encode": 3, "decode": 6}


def verify(sd: StableDiffusion, watch: Watch | None = None) -> dict[str, Any]:
    """Hashes of a loaded model's files, and an edit of a fixed picture with 4 steps and 2 maps.

    Returns per network the file, its sha256 and which official file that is (None: none of them); the edit's model rows
    and the sha256 of its 8-bit picture. That hash is a machine's own: other processors and dtypes round differently.
    Raises ValueError for a model that was not loaded from files, ArithmeticError when its rows are not as specified.
    """
    if sd.checkpoint is None:
        raise ValueError("this model was not loaded from files")
    hashes = {path: sha256(path) for path in {part.path for part in sd.checkpoint.parts.values()}}
    files = {
        network: {"file": str(part.path), "sha256": hashes[part.path], "official": OFFICIAL.get(hashes[part.path])}
        for network, part in sd.checkpoint.parts.items()
    }
    done = edit(sd, picture(sd.side), target="a zebra", source="a horse", steps=4, maps=2, seed=0, watch=watch)
    if done.evaluations != COUNTS:
        raise ArithmeticError(f"the known edit took {done.evaluations} model rows, {COUNTS} are specified")
    assert done.mask
    digest = hashlib.sha256(done.image.tobytes() + done.mask.tobytes()).hexdigest()
    return {"files": files, "evaluations": done.evaluations, "edit_sha256": digest}


def picture(side: int) -> Image.Image:
    """A fixed picture: three colour ramps."""
    across = np.broadcast_to(np.linspace(0, 255, side).round().astype(np.uint8), (side, side))
    return Image.fromarray(np.stack([across, across.T, across[:, ::-1]], axis=-1))
