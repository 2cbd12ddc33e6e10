"""What a few methods ask of the model besides its four verbs: texts and weights that can be learned, an example."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .clip import CLIPText
from .tokenizer import Tokenizer
from .unet import UNet


class Learnable:
    """Part of `StableDiffusion`; everything here is differentiable, and changes nothing for good."""

    unet: UNet
    clip: CLIPText
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """What `text` transforms: n prompts -> (n, 77, width), a vector for each position."""
        return self.clip.embeddings(self.tokenizer(prompts).to(self.device))

    def transform(self, embedded: Tensor) -> Tensor:
        """text(prompts) = transform(embed(prompts))."""
        return self.clip.transform(embedded.to(self.dtype))

    def exceptional(self, token: int = 7788) -> Tensor:
        """(1, 77, width): one token at all positions, without their embeddings (TF-ICON, 2307.12493, section 4.1)."""
        embedded: Tensor = self.clip.embeddings.token_embedding.weight[token]
        return self.clip.transform(embedded.expand(1, 77, -1))

    @property
    def example_side(self) -> int:
        """Of the square that `example` sees, in pixels."""
        return self.clip.config.image_size  # type: ignore[attr-defined]

    def example(self, pixels: Tensor) -> Tensor:
        """pixels (1, 3, side, side) in [-1, 1] -> (1, 1, width), read in a text's place by Paint by Example's UNet."""
        return self.clip.see(pixels.to(self.device, self.dtype))  # type: ignore[operator]

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """The shapes (out, in) of the weights of all the UNet's attentions, by name."""
        found = ((f"{name}.weight", module) for name, module in self.unet.named_modules() if ".attn" in name)
        return {n: (m.weight.shape[0], m.weight.shape[1]) for n, m in found if isinstance(m, nn.Linear)}

    def with_deltas(self, deltas: Mapping[str, Tensor]) -> Callable[..., Tensor]:
        """The UNet with something added to some of its weights, by name; gradients reach the deltas."""
        if not isinstance(self.unet, UNet):
            raise ValueError("weights can only be learned for a UNet in memory: load it without compile and low_memory")
        weights = {name: self.unet.get_parameter(name) + delta.to(self.dtype) for name, delta in deltas.items()}
        return lambda *asked: functional_call(self.unet, weights, asked)
