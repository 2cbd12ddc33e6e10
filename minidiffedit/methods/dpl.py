"""DPL, dynamic prompt learning (Wang et al., 2309.15664): nouns learn to be looked at where they are, level by level.

Section 3.2 and 3.3, algorithm 1: along the path down, before null-text inversion's step (null_text.py), at most
`text_steps` of AdamW (rate 1e-3) on the nouns' input embeddings of CLIP's text encoder, on
    1 - the least over nouns of the largest value of its map  +  .05 mean cos of the maps of two nouns,
maps softmax(100 P) over the words, P the cross-attention at the coarsest level with text, mean over heads and layers,
smoothed by a Gaussian (3 x 3, .5). It stops where the first is below .3 exp(-i/25), the second below .9 exp(-i/25). The
null text then follows as there, under the learned text; the editor, prompt-to-prompt, has it in the source's row.

Model rows: K for the path, at most K text_steps with gradient, K for e_text, at most K inner_steps with gradient, K for
the steps. Left out: the loss of the background, which clusters self-attention; the nouns of the target stay its own.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Attend, Site, weights
from ..ddim import move
from ..options import About, Scale, Steps, Strength, Within
from ..path import HookedEps, Path
from .descent import Adam, slopes, wide
from .inversions import Refine, ddim
from .lora import one_picture
from .null_text import ENOUGH, ENOUGH_MORE, RATE, optimised
from .words import Words, listed, tokenizer, words_of

Nouns = Annotated[
    str | None,
    About("words of the source that learn: horse, grass (default: all of four letters or more)", ("text_steps", 0)),
]


@torch.no_grad()
def dpl(
    eps: HookedEps,
    x0: Tensor,
    null: Tensor,
    source_embedded: Tensor,
    source_words: Words,
    transform: Callable[[Tensor], Tensor],
    coarsest: int,
    *,
    nouns: Nouns = None,
    steps: Steps = 50,
    strength: Strength = 1.0,
    guidance_scale: Scale = 7.5,
    text_steps: Annotated[int, Within(0, 200, "of AdamW on each level's nouns, at most")] = 20,
    inner_steps: Annotated[int, Within(0, 200, "of Adam on each level's null text, at most")] = 51,
    refine: Refine = 1,
) -> Path:
    """source_embedded (1, 77, width), from which `transform` makes the text. Returns the path with a null text and a
    source text for each level. Raises ValueError for several pictures and for words that the source does not have.
    """
    x0, at = one_picture(x0, "DPL"), chosen(nouns, source_words)
    source = transform(source_embedded)
    path = ddim(eps, x0, null, source, steps=steps, strength=strength, refine=refine)
    x, nulls, texts, learned = path.rows(1), dict[int, Any](), dict[int, Any](), source_embedded.to(x0)
    for i, j in enumerate(path.down()):
        adam = Adam(1e-3, 1e-2)
        for _ in range(text_steps):
            terms: list[float] = []

            def unseen(vectors: Tensor, x: Tensor = x, j: int = j, now: Tensor = learned, terms: Any = terms) -> Tensor:
                look = Maps(coarsest, source_words.end)
                eps(x, path.t[j], [transform(put(now, at, vectors))], tap=look)
                one, other = apart(look.maps(x.shape[2:]), at)
                terms[:] = [float(one.detach()), float(other.detach())]
                return one + 0.05 * other

            vectors = learned[:, [p for word in at for p in word]]
            _, gradients = slopes(unseen, [vectors])
            learned = put(learned, at, *adam.step([vectors], gradients))
            if terms[0] < 0.3 * math.exp(-i / 25) and terms[1] < 0.9 * math.exp(-i / 25):
                break
        texts[j] = transform(learned)
        e_text = eps(x, path.t[j], [texts[j]])[0]

        def stepped(null: Tensor, x: Tensor = x, j: int = j, e_text: Tensor = e_text) -> Tensor:
            e_null = eps(x, path.t[j], [null])[0]
            return move(x, e_null + guidance_scale * (e_text - e_null), path.a[j], path.a[j - 1])

        rate = RATE * (1 - i / max(100, 2 * steps))
        null = optimised(null, path[j - 1], stepped, inner_steps, rate, ENOUGH + ENOUGH_MORE * i)
        nulls[j], x = null, stepped(null)
    return Path([*path.values()], steps, null, nulls=nulls, sources=texts)


def chosen(nouns: str | None, source: Words) -> list[list[int]]:
    """The positions of each noun."""
    if nouns is not None:
        return [source.positions(phrase) for phrase in listed(nouns) or [""]]
    long = [[*span] for name, span in zip(source.names, source.spans) if len(name) > 3]
    return long or [[*span] for span in source.spans] or [source.positions("")]


def check_dpl(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """What can be refused before any work."""
    chosen(settings["nouns"], words_of(tokenizer(), given["source"]))


def put(embedded: Tensor, at: list[list[int]], vectors: Tensor) -> Tensor:
    """embedded (1, 77, width) with vectors (1, p, width) at the nouns' positions."""
    return embedded.index_copy(1, torch.tensor([p for word in at for p in word]).to(embedded.device), vectors)


def apart(maps: Tensor, at: list[list[int]]) -> tuple[Tensor, Tensor]:
    """maps (77, h, w) -> 1 - the least of the nouns' largest values, and how alike their maps are, on average."""
    nouns = torch.stack([maps[word].sum(0).flatten() for word in at])
    alike = F.cosine_similarity(nouns[:, None], nouns[None], dim=-1)
    pairs = max(len(at) * (len(at) - 1), 1)
    return 1 - nouns.amax(1).min(), (alike.sum() - alike.diagonal().sum()) / pairs


class Maps:
    """A tap that changes nothing and keeps the maps of the coarsest level; end: the position of the end token."""

    def __init__(self, coarsest: int, end: int):
        self.coarsest, self.end, self.seen = coarsest, end, list[Tensor]()

    def __call__(self, plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if site.kind == "cross" and site.level == self.coarsest:
            self.seen.append(wide(weights(q, k)).mean((0, 1)))
        return plain(site, q, k, v)

    def maps(self, size: Any) -> Tensor:
        """(77, h, w): between the begin and the end token softmaxed over the words, smoothed; else zero."""
        words = torch.softmax(100 * torch.stack(self.seen).mean(0)[:, 1 : self.end], dim=-1).T
        maps = words.unflatten(1, [-(-side // 2**self.coarsest) for side in size])[:, None]
        side = torch.exp(-torch.tensor([1.0, 0.0, 1.0]) / (2 * 0.5**2)).to(maps)
        smooth = F.conv2d(F.pad(maps, (1, 1, 1, 1), "replicate"), (side[:, None] * side / side.sum() ** 2)[None, None])
        return F.pad(smooth[:, 0], (0, 0, 0, 0, 1, 77 - self.end))
