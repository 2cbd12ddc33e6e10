"""The whole edit against diffusers' DiffEdit pipeline on the same weights, once its blend is shifted by one level.

    python tests/bench/diffusers_edit.py --model weights/mini

diffusers' pipeline blends each step with the encoded latent of the level it just *left*. Its callback runs after that
blend, so with a hard mask the blend is corrected from there by one level, the pipeline itself unchanged. Everything
else (encoding, guidance, steps) must then agree.
"""

import argparse
import warnings
from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, StableDiffusionDiffEditPipeline

from minidiffedit import StableDiffusion, encode, masked_decode


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@torch.no_grad()
def compare(folder: str, steps: int = 20, strength: float = 0.8, guidance_scale: float = 7.5) -> dict[str, Any]:
    """Relative differences of the trajectory and of the final latent, with diffusers' blend as it is and corrected."""
    sd = StableDiffusion.load(folder, dtype="float32", device="cpu")
    peer = StableDiffusionDiffEditPipeline.from_pretrained(
        folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    peer.scheduler = DDIMScheduler.from_config(peer.scheduler.config, clip_sample=False)
    peer.inverse_scheduler = DDIMInverseScheduler.from_config(peer.scheduler.config)
    peer.set_progress_bar_config(disable=True)

    side = sd.side // sd.factor
    x0 = torch.randn(1, sd.channels, side, side, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, side, side)
    mask[..., : side // 2, side // 4 :] = 1
    null, target = sd.text([""]), sd.text(["a zebra"])
    trajectory = encode(sd.eps, x0, null, steps=steps, strength=strength)
    ours = masked_decode(sd.eps, trajectory, mask, target, null, guidance_scale=guidance_scale)

    settings = {"num_inference_steps": steps, "inpaint_strength": strength}
    encoded = peer.invert(prompt="", image=x0, guidance_scale=1.0, output_type="latent", **settings).latents
    K = max(trajectory)
    theirs = torch.stack([trajectory[j] for j in range(K, 0, -1)], dim=1)

    def corrected(step: int, t: int, latents: torch.Tensor) -> None:
        latents.copy_(mask * latents + (1 - mask) * trajectory[K - 1 - step])

    options = settings | {"guidance_scale": guidance_scale, "output_type": "latent", "image_latents": encoded}
    as_it_is = peer(prompt="a zebra", mask_image=mask, **options).images
    shifted = peer(prompt="a zebra", mask_image=mask, callback=corrected, callback_steps=1, **options).images
    return {
        "encoding": relative(theirs, encoded.reshape(theirs.shape)),
        "edit, blend shifted by one level": relative(ours, shifted),
        "edit, diffusers as it is": relative(ours, as_it_is),
        "outside the mask, ours to the source": float(((ours - x0) * (1 - mask)).abs().max()),
        "outside the mask, diffusers to the source": float(((as_it_is - x0) * (1 - mask)).abs().max()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="weights/mini", help="a folder in the hub's layout (%(default)s)")
    parser.add_argument("--steps", type=int, default=50)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name, value in compare(arguments.model, arguments.steps).items():
        print(f"{name:42} {value:.2e}")
