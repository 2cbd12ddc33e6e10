"""prompt-to-prompt by its two fused attentions against the same edit with every map built; how far they are apart.

    python tests/bench/words_and_maps.py --pairs 5                    # full-size random UNet, 256 x 256, two steps
    python tests/bench/words_and_maps.py --model weights/mini --steps 10 --side 16

The maps' way is the same method with another attention: softmax(q k^T / sqrt d) in full, edited as the paper writes it,
then times the values. Both run in one process in turn (alternating.py); the ratio is fused / maps. Memory is counted by
tests/test_memory_of_maps.py.
"""

import argparse

import torch
from alternating import alternate, row

from minidiffedit import StableDiffusion, Tokenizer
from minidiffedit.attention import weights
from minidiffedit.clip import CLIPConfig, CLIPText
from minidiffedit.methods.inversions import direct
from minidiffedit.methods.prompt_to_prompt import asked, first, prompt_to_prompt
from minidiffedit.methods.words import words_of
from minidiffedit.unet import UNet, UNetConfig
from minidiffedit.vae import VAE, VAEConfig

SOURCE, TARGET = "a photo of a horse on a grass field", "a photo of a zebra on a grass field"


def full_size() -> StableDiffusion:
    torch.manual_seed(0)
    clip = CLIPConfig()
    return StableDiffusion(UNet(UNetConfig()).eval(), VAE(VAEConfig()).eval(), CLIPText(clip).eval(), Tokenizer())


class ByMaps:
    """prompt-to-prompt with every map in hand: rows (null text's, source, target) of a held path."""

    def __init__(self, sd, path, words, cross_steps=0.8, self_steps=0.4, self_levels=1, scale=7.5):
        self.sd, self.path, self.scale, K = sd, path, scale, path.top
        self.W, *_ = asked(*words, "refine", None, None, None)
        self.kept = self.W.sum(0)
        self.cross, self.own, self.finest = first(cross_steps, K), first(self_steps, K), sd.coarsest - self_levels
        self.largest = 0

    def tap(self, plain, site, q, k, v):
        P = weights(q, k)
        self.largest = max(self.largest, P[0].numel())
        if site.kind == "cross" and self.i < self.cross:
            P[2] = P[1] @ self.W * self.kept + P[2] * (1 - self.kept)
        elif site.kind == "self" and self.i < self.own and site.level > self.finest:
            P[2] = P[1]
        return P @ v

    @torch.no_grad()
    def run(self, source, target):
        x = self.path.rows(2)
        for i, j in enumerate(self.path.down()):
            self.i = i
            texts = self.path.texts(self.path.null(j), source, target)
            e_null, e_source, e = self.sd.eps(torch.cat([x[1:], x]), self.path.t[j], [texts], tap=self.tap)[0].split(1)
            x = self.path.step(x, torch.cat([e_source, e_null + self.scale * (e - e_null)]), j)
            x = self.path.pin(x, j - 1)
        return x[1:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="(a full-size UNet with random weights)")
    parser.add_argument("--side", type=int, default=32, help="cells of the latent (%(default)s)")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    sd = StableDiffusion.load(args.model, device="cpu") if args.model else full_size()
    texts, words = sd.text(["", SOURCE, TARGET]).split(1), [words_of(sd.tokenizer, one) for one in (SOURCE, TARGET)]
    x0 = torch.randn(1, 4, args.side, args.side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        path = direct(sd.eps, x0, *texts[:2], steps=args.steps)
    maps = ByMaps(sd, path, words)

    def fused():
        return prompt_to_prompt(sd.eps, path, *texts[1:], *words, sd.coarsest)

    ours, theirs = fused(), maps.run(*texts[1:])
    print(
        f"apart {float((ours - theirs).norm() / theirs.norm()):.1e}; the maps' way holds {maps.largest:,} values a row"
    )
    print(row("P2P", f"{args.side} x {args.side} cells, {args.steps} steps, fused / maps",
              alternate(fused, lambda: maps.run(*texts[1:]), args.pairs)))  # fmt: skip


if __name__ == "__main__":
    main()
