"""The whole edit against diffusers' DiffEdit pipeline on the same weights, once its blend is shifted by one level.

    python tests/bench/diffusers_edit.py --model weights/mini

diffusers' pipeline blends each step with the encoded latent of the level it just *left*. Its callback runs after that
blend, so with a hard mask the blend is corrected from there by one level, the pipeline itself unchanged. Everything
else (encoding, guidance, steps, the autoencoder) must then agree. The mask is ours for both: theirs is estimated with
guidance, scaled by its maximum alone, and not comparable cell by cell.
"""

import argparse
import warnings
from typing import Any

import numpy as np
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, StableDiffusionDiffEditPipeline

from minidiffedit import StableDiffusion, edit


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@torch.no_grad()
def compare(folder: str, steps: int = 20, strength: float = 0.8, guidance_scale: float = 7.5) -> dict[str, Any]:
    """How far an edit of a picture is from diffusers', its blend as it is and corrected."""
    sd = StableDiffusion.load(folder, dtype="float32", device="cpu")
    peer = StableDiffusionDiffEditPipeline.from_pretrained(
        folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    peer.scheduler = DDIMScheduler.from_config(peer.scheduler.config, clip_sample=False)
    peer.inverse_scheduler = DDIMInverseScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)

    ramp = np.linspace(0, 255, sd.side).astype(np.uint8)
    picture = np.stack([np.broadcast_to(ramp, (sd.side, sd.side)), *np.meshgrid(ramp[::-1], ramp)], axis=-1)
    settings = {"steps": steps, "strength": strength, "guidance_scale": guidance_scale, "maps": 4, "seed": 0}
    ours = edit(sd, picture, source="a horse", target="a zebra", paste=False, **settings)
    mask, trajectory, K = ours.latent_mask, ours.trajectory, max(ours.trajectory)

    their = {"num_inference_steps": steps, "inpaint_strength": strength}
    encoded = peer.invert(prompt="", image=ours.x0, guidance_scale=1.0, output_type="latent", **their).latents
    mirrored = torch.stack([trajectory[j] for j in range(K, 0, -1)], dim=1)

    def corrected(step: int, t: int, latents: torch.Tensor) -> None:
        latents.copy_(mask * latents + (1 - mask) * trajectory[K - 1 - step])

    their |= {"guidance_scale": guidance_scale, "image_latents": encoded, "mask_image": mask, "prompt": "a zebra"}
    as_it_is = peer(output_type="latent", **their).images
    shifted = peer(output_type="latent", callback=corrected, callback_steps=1, **their).images
    seen = peer(output_type="np", callback=corrected, callback_steps=1, **their).images[0]
    return {
        "mask coverage": ours.coverage,
        "encoding": relative(mirrored, encoded.reshape(mirrored.shape)),
        "edit, blend shifted by one level": relative(ours.latent, shifted),
        "the same, largest pixel difference of 255": float(np.abs(np.asarray(ours.image) - 255.0 * seen).max()),
        "edit, diffusers as it is": relative(ours.latent, as_it_is),
        "outside the mask, ours to the source": float(((ours.latent - ours.x0) * (1 - mask)).abs().max()),
        "outside the mask, diffusers to the source": float(((as_it_is - ours.x0) * (1 - mask)).abs().max()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="weights/mini", help="a folder in the hub's layout (%(default)s)")
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name, value in compare(arguments.model, arguments.steps).items():
        print(f"{name:42} {value:.2e}")
