"""MasaCtrl (Cao et al., 2304.08465): late, and in the decoder, the edit looks for its keys and values in the source.

Section 3.2, mutual self-attention: from `first_step` on, in the decoder's finer levels, Attention(Q_target, K_source,
V_source), so that the layout follows the target text while what is painted is the source's. Section 3.3: with
`object_words` the object looks at the source's object alone and the rest at the rest, both found by where the words of
either prompt are looked for at the coarsest level with text, in the same call. Model rows: 4 K b, and the inversion's.

`look` and `null_look` choose for the text's half and the unguided one: the source, source and target together (the
authors' union), or the target itself; with `guidance` prox they are ProxEdit's MasaCtrl (2306.05414), but that its
source is not guided: after negative-prompt inversion no scale changes it. On real pictures the source text is usually
left empty. Left out: masks given as pictures, T2I-Adapter.
"""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Attend, Site, weights
from ..options import About, Scale, Within
from ..path import HookedEps, Path
from .guidance import Guidance, Norm, Quantile, guide_of
from .words import Words, listed, tokenizer, words_of

Look = Annotated[Literal["source", "union", "own"], About("where keys and values are from; union: both")]
ObjectWords = Annotated[str | None, About("words of source and target that are the object: horse, zebra")]
OfObjects = Annotated[float, Within(0, 1, "of the words' map, rescaled to 0..1", ("object_words", None))]


@torch.no_grad()
def masactrl(
    eps: HookedEps,
    path: Path,
    target: Any,
    source: Any = "",
    coarsest: int = 2,
    source_words: Any = None,
    target_words: Any = None,
    *,
    guidance_scale: Scale = 7.5,
    first_step: Annotated[int, Within(0, 999, "steps before the source is looked at")] = 4,
    finest: Annotated[int, Within(0, 10, "the decoder's levels that look at it, from the finest")] = 2,
    look: Look = "source",
    null_look: Look = "source",
    object_words: ObjectWords = None,
    object_threshold: OfObjects = 0.1,
    guidance: Guidance = "cfg",
    quantile: Quantile = 0.4,
    norm: Norm = "l0",
    record: dict[str, Tensor] | None = None,
) -> Tensor:
    """Rows of a call: source and target under the null text, then source and target under their own; each half looks
    into its own source. In SD v1 the two finest levels are the authors' layers 10 to 15 (64 x 64 and 32 x 32), and the
    coarsest with text is level 2. Raises ValueError for object_words that either prompt lacks.
    """
    x, texts, b = path.rows(2), path.texts(source, target), len(path[0])
    guide = guide_of(guidance, guidance_scale, quantile, norm)
    at = objects(object_words, source_words, target_words) if object_words is not None else None
    seen = list[Tensor]()  # of this call: (2, b, n), attention to the words in source and target

    def mutual(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if at and site.kind == "cross" and site.level == coarsest:
            P = weights(q[-2 * b :], k[-2 * b :]).float().mean(1).unflatten(0, (2, b))
            seen.append(torch.stack([maps[..., words].sum(-1) for maps, words in zip(P, at)]))
        if site.kind != "self" or site.place != "up" or site.level >= finest:
            return plain(site, q, k, v)
        if look == null_look == "source" and not seen:
            k, v = (y.unflatten(0, (-1, 2, b))[:, [0, 0]].flatten(0, 2) for y in (k, v))
            return plain(site, q, k, v)
        inside = found(seen, x.shape[2:], coarsest, site.level, object_threshold) if seen else None
        q, k, v = (y.unflatten(0, (2, 2, b)) for y in (q, k, v))
        own = plain(site, *(y[:, 0].flatten(0, 1) for y in (q, k, v)))
        halves = [mixed(plain, site, q[i, 1], k[i], v[i], one, inside) for i, one in enumerate((null_look, look))]
        return torch.cat([one for pair in zip(own.split(b), halves) for one in pair])

    step = path.walk()
    for i, j in enumerate(path.down()):
        x = path.pin(x, j)
        seen.clear()
        e_null, e_text = eps(x, path.t[j], [path.null(j), texts], tap=mutual if i >= first_step else None)
        x = step(x, guide(e_null, e_text), j)
        if seen and record is not None:
            record |= objects_seen(seen, x.shape[2:], coarsest, object_threshold)
    return x[b:]


def objects(text: str | None, source: Words, target: Words) -> list[list[int]]:
    """The positions of the object's words in source and target."""
    if source is None or target is None:
        raise ValueError("object_words needs texts of one chunk of 75 tokens")
    found = [[at for phrase in listed(text) for at in words.find(phrase)] for words in (source, target)]
    for name, words, at in zip(("source", "target"), (source, target), found):
        if not at:
            had = ", ".join(words.names) or "none"
            raise ValueError(f"object_words must name a word of the {name}, got {text!r}; its words are {had}")
    return found


def check_masactrl(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """What can be refused before any work."""
    if settings["object_words"] is not None:
        objects(settings["object_words"], *(words_of(tokenizer(), given[name]) for name in ("source", "target")))


def found(seen: list[Tensor], size: Any, coarsest: int, level: int, threshold: float) -> Tensor:
    """(2, b, n) bool: which cells of a level are the object's, in source and target, by the maps seen so far."""
    coarse, fine = ([-(-side // 2**one) for side in size] for one in (coarsest, level))
    maps = torch.stack(seen).mean(0)
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    maps = (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
    return F.interpolate(maps.unflatten(-1, coarse), tuple(fine)).flatten(2) >= threshold


def objects_seen(seen: list[Tensor], size: Any, coarsest: int, threshold: float) -> dict[str, Tensor]:
    """The same on the grid of the latent, (b, 1, h, w) of 0 and 1 each, to be looked at."""
    source, target = found(seen, size, coarsest, 0, threshold).unflatten(-1, (1, *size)).float()
    return {"object_source": source, "object_target": target}


def mixed(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor, look: str, inside: Tensor | None) -> Tensor:
    """The target's attention (b, heads, n, d) in one half: q (b, heads, n, d), k and v (2, b, heads, n, d) of source
    and target, of which it looks at some; inside: see `found`. An empty part looks at all.
    """
    roles = {"source": [0], "union": [0, 1], "own": [1]}[look]
    k, v = (torch.cat([y[role] for role in roles], dim=2) for y in (k, v))
    if inside is None or look == "own":
        return plain(site, q, k, v)
    keys, out = torch.cat([inside[role] for role in roles], dim=1), []
    for i, own in enumerate(inside[1]):
        parts = []
        for part in (keys[i], ~keys[i]):
            at = part if part.any() else torch.ones_like(part)
            parts.append(plain(site, q[i : i + 1], k[i : i + 1, :, at], v[i : i + 1, :, at]))
        inner, outer = parts
        out.append(torch.where(own[:, None], inner, outer))
    return torch.cat(out)
