"""Prompt-to-prompt (Hertz et al., 2208.01626): the edit takes over the source's attention, word by word.

In the first steps the target's cross-attention maps are the source's for the words that both prompts have (section 3.2:
"replace" word for word, "refine" with new words added, "reweight" with a word's map multiplied), and its self-attention
maps the source's at the coarse levels. `blend` (local blend) puts the source back where neither prompt's word looks.

No map is built for it. An attention's output is linear in its values: with W the correspondence of positions, c the
weights, o = 1 for words without counterpart, and P the maps of softmax(q k^T / sqrt d),
    (P_source W + P_target diag(o)) diag(c) v  =  P_source (W diag(c) v) + P_target (diag(o c) v),
two fused attentions with other values. Only `blend` reads maps, 77 columns wide, at the coarsest level with text.

Model rows: 3 K b where the path holds the source's row, whose unguided prediction nobody reads, else 4 K b. Left out:
words to be subtracted from the blend, and the exchange of unguided rows (P2Plus).
"""

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import Attend, Site, weights
from ..options import About, Scale, Within
from ..path import HookedEps, Path
from .guidance import Guidance, Norm, Quantile, guide_of
from .words import Words, in_one_of, listed, numbered, refined, replaced, tokenizer, words_of

Mode = Annotated[Literal["refine", "replace"], About("refine: any two prompts; replace: word for word")]
Early = Annotated[float, Within(0, 1, "share of the steps, from the first, 0..1")]
OwnSteps = Annotated[str | None, About("words of the target with cross_steps of their own: zebra=0.4, grass=1")]
Reweight = Annotated[str | None, About("words of the target to be seen more or less: zebra=2, grass=0.5")]
Blend = Annotated[str | None, About("words of either prompt; the source stays where none of them looks: horse, zebra")]
BLEND_STEPS = 0.2  # share of the steps before the blend begins


@torch.no_grad()
def prompt_to_prompt(
    eps: HookedEps,
    path: Path,
    source: Any,
    target: Any,
    source_words: Words,
    target_words: Words,
    coarsest: int,
    *,
    mode: Mode = "refine",
    cross_steps: Early = 0.8,
    word_steps: OwnSteps = None,
    reweight: Reweight = None,
    self_steps: Early = 0.4,
    self_levels: Annotated[int, Within(0, 10, "levels of source self-attention, from the coarsest with text")] = 1,
    blend: Blend = None,
    blend_threshold: Annotated[float, Within(0, 1, "of a word's largest attention, 0..1", ("blend", None))] = 0.3,
    guidance_scale: Scale = 7.5,
    guidance: Guidance = "cfg",
    quantile: Quantile = 0.4,
    norm: Norm = "l0",
    record: dict[str, Tensor] | None = None,
) -> Tensor:
    """Rows of a call: the null text's, then the source and the target under their own, which exchange; asked as one
    text, so that each is a row of its own from the first layer on (see attention.Attend). coarsest: the coarsest level
    that reads the text (SD v1: 16 x 16, where self_levels = 1 ends; 2 adds 32 x 32). Raises ValueError for words that
    the prompts do not have.
    """
    b, K, x, step = len(path[0]), path.top, path.rows(2), path.walk()
    guide, u = guide_of(guidance, guidance_scale, quantile, norm), b if path.pinned else 2 * b  # u rows are guided
    W, until, c, looks = (one.to(x) for one in asked(source_words, target_words, mode, word_steps, reweight, blend))
    until = torch.where(until < 0, cross_steps, until).mul(K).add(0.5).floor()
    active = (torch.arange(K, device=x.device)[:, None] < until).to(x)  # (K, 77), and so on for all steps at once:
    shared = W * (active * c)[:, None]  # what the target's words take of the source's maps, and below of their own
    alone = active * c * (W.sum(0) == 0) + (1 - active)
    takes, adds = shared.flatten(1).any(1).tolist(), alone.any(1).tolist()  # in a step it would wait for the device
    seen: Any = 0.0  # (2, b, n): attention where the blend looks, summed over sites and steps

    def exchange(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal seen
        k, v = (k[:, :, :77], v[:, :, -77:]) if site.kind == "cross" else (k, v)  # of paired texts (path.Path.sources)
        (qs, qt), (ks, kt), vt = q[-2 * b :].split(b), k[-2 * b :].split(b), v[-b:]
        if site.kind == "self":
            if i >= first(self_steps, K) or site.level <= coarsest - self_levels:
                return plain(site, q, k, v)
            return torch.cat([plain(site, q[:-b], k[:-b], v[:-b]), plain(site, qs, ks, vt)])
        if blend and site.level == coarsest:
            P, own = (weights(*one).to(x).mean(1) for one in ((qs, ks), (qt, kt)))  # (b, n, 77) each
            seen = seen + torch.stack([P @ looks[0], (P @ shared[i] + own * alone[i]) @ looks[1]])
        if not takes[i]:
            return plain(site, q, k, v)
        out = plain(site, qs, ks, shared[i].to(v) @ vt)
        if adds[i]:
            out = out + plain(site, qt, kt, alone[i, :, None].to(v) * vt)
        return torch.cat([plain(site, q[:-b], k[:-b], v[:-b]), out])

    for i, j in enumerate(path.down()):
        texts = path.texts(*[path.null(j)] * (u // b), path.source(j, source), target)
        e_null, e_text = eps(torch.cat([x[-u:], x]), path.t[j], [texts], tap=exchange)[0].split([u, 2 * b])
        x = path.pin(step(x, torch.cat([e_text[:-u], guide(e_null, e_text[-u:])]), j), j - 1)
        if blend and i >= first(BLEND_STEPS, K):
            M = blend_mask(seen, x, coarsest, blend_threshold)
            x = torch.cat([x[:b], x[:b] + M * (x[b:] - x[:b])])
            (record if record is not None else {})["blend"] = M
    return x[b:]


def first(share: float, steps: int) -> int:
    """How many of the steps a share is."""
    return math.floor(share * steps + 0.5)


def asked(
    source: Words, target: Words, mode: str, word_steps: str | None, reweight: str | None, blend: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W (77, 77); of each position of the target its share of the steps, below 0 if it has none of its own, and its
    weight, (77,) each; the positions where the blend looks in the source and in the target, (2, 77) of 0 and 1.
    """
    W = (refined if mode == "refine" else replaced)(source, target)
    share, weight, looks = torch.full((77,), -1.0), torch.ones(77), torch.zeros(2, 77)
    for phrase, value in numbered("word_steps", word_steps, 0, 1).items():
        share[target.positions(phrase)] = value
    for phrase, value in numbered("reweight", reweight).items():
        weight[target.positions(phrase)] = value
    for phrase in listed(blend):
        for row, at in zip(looks, in_one_of(phrase, (source, target))):
            row[at] = 1
    return W, share, weight, looks


def check_prompt_to_prompt(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """What can be refused before any work."""
    source, target = (words_of(tokenizer(), given[name]) for name in ("source", "target"))
    asked(source, target, *(settings[name] for name in ("mode", "word_steps", "reweight", "blend")))


def blend_mask(seen: Tensor, x: Tensor, coarsest: int, threshold: float) -> Tensor:
    """(b, 1, h, w) of 0 and 1: where the attention, spread to its neighbours, is above a share of its largest, in the
    source or in the target (the authors' LocalBlend).
    """
    (h, w), (_, b, _) = x.shape[2:], seen.shape
    grid = [-(-side // 2**coarsest) for side in (h, w)]
    maps = F.max_pool2d(seen.flatten(0, 1).unflatten(1, grid)[:, None], 3, stride=1, padding=1)
    maps = F.interpolate(maps, (h, w))
    maps = maps / maps.amax(dim=(2, 3), keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)
    return (maps > threshold).unflatten(0, (2, b)).any(0).to(x)
