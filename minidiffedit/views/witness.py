"""What a run's attention looks at, word by word, and what its method puts in another's place: seen from beside.

    seen = Witness()
    done = edit(sd, "horse.png", "masactrl", target="a zebra", witness=seen)    # the same bits as without

A word's map is softmax(q k^T / sqrt d) at its positions, summed over them and averaged over heads, layers and the rows
that are under its prompt, of each level that reads the text: 77 columns, never a map of self-attention. It is taken
before a method changes anything. A run without a witness does nothing of this.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import Attend, Feature, Site, Tap, weights

KINDS = {"self": "self-attention", "cross": "text attention", "conv": "convolution", "block": "block"}
PLACES = {"down": "encoder", "mid": "middle", "up": "decoder"}
STAGES = ("mask", "encode", "decode", "generate")


class Looks(NamedTuple):
    """Where the words of a prompt were looked for in a stage. steps: timesteps in the order of the run; maps: by level,
    (steps, words, h, w) float32 on the CPU, shares of a cell's attention.
    """

    stage: str
    prompt: str
    words: tuple[str, ...]
    steps: list[int]
    maps: dict[int, Tensor]


class Witness:
    """Looks on at the calls of one run. touched: stage -> site -> timestep -> what the method did there; steps: stage
    -> its timesteps in order.
    """

    def __init__(self) -> None:
        self.touched: dict[str, dict[Site, dict[int, str]]] = {}
        self.steps: dict[str, list[int]] = {}
        self.known: dict[str, tuple[Tensor, Any, Tensor]] = {}
        self.sums: dict[tuple[str, str, int], dict[int, tuple[Tensor, int]]] = {}

    def meet(self, texts: Mapping[str, Tensor], words_of: Callable[[str], Any]) -> None:
        """The prompts of the run, each (1, 77, width). Raises ValueError where it saw another run."""
        if self.known or self.steps:
            raise ValueError("a witness looks on at one run; this one has seen another")
        for prompt, text in texts.items():
            if (words := words_of(prompt)).names:
                columns = torch.zeros(text.shape[1], len(words.names))
                for i, span in enumerate(words.spans):
                    columns[list(span), i] = 1
                self.known[prompt] = text, words, columns.to(text.device)

    def hooks(self, stage: str, x: Tensor, t: int, texts: Sequence[Tensor], hooks: dict[str, Any]) -> dict[str, Any]:
        """The hooks of a call of the model, with the witness before them; x (b, c, h, w)."""
        rows = torch.cat([text.expand(len(x), -1, -1) for text in texts])
        under = {prompt: (rows == text.to(rows)).flatten(1).all(1) for prompt, (text, _, _) in self.known.items()}
        found = {prompt: [i for i, one in enumerate(same.tolist()) if one] for prompt, same in under.items()}
        times = self.steps.setdefault(stage, [])
        times += [t] if t not in times else []
        look = partial(self.look, {prompt: at for prompt, at in found.items() if at}, (stage, t), x.shape[2:])
        note = partial(self.note, stage, t)
        wrapped: dict[str, Any] = {"tap": beside(hooks.get("tap"), look, note)}
        if hooks.get("feature") is not None:
            wrapped["feature"] = beside_feature(hooks["feature"], note)
        return hooks | wrapped

    def note(self, stage: str, t: int, site: Site, what: str) -> None:
        self.touched.setdefault(stage, {}).setdefault(site, {})[t] = what

    @torch.no_grad()
    def look(
        self, under: dict[str, list[int]], now: tuple[str, int], size: Sequence[int], site: Site, q: Tensor, k: Tensor
    ) -> None:
        if site.kind != "cross" or site.place == "mid":
            return
        grid = [-(-side // 2**site.level) for side in size]
        for prompt, rows in under.items():
            map = weights(q[rows].detach(), k[rows].detach()).float().mean((0, 1)) @ self.known[prompt][2]
            levels = self.sums.setdefault((now[0], prompt, now[1]), {})
            total, count = levels.get(site.level, (0.0, 0))
            levels[site.level] = total + map.T.unflatten(1, grid), count + 1  # (words, h, w)

    @property
    def looks(self) -> list[Looks]:
        """By stage and prompt, in the order of the run."""
        found = []
        for stage, prompt in dict.fromkeys((stage, prompt) for stage, prompt, _ in self.sums):
            steps = [t for t in self.steps[stage] if (stage, prompt, t) in self.sums]
            by_step = [self.sums[stage, prompt, t] for t in steps]
            maps = {
                level: torch.stack([one[level][0] / one[level][1] for one in by_step]).cpu() for level in by_step[0]
            }
            words = self.known[prompt][1].names
            found.append(Looks(stage, prompt, words, steps, dict(sorted(maps.items(), reverse=True))))
        return sorted(found, key=lambda one: STAGES.index(one.stage))

    def positions(self, prompt: str) -> list[list[int]]:
        """Of each word."""
        return [[*span] for span in self.known[prompt][1].spans]


def beside(tap: Tap | None, look: Callable[..., None], note: Callable[..., None]) -> Tap:
    """A tap that shows the attention to `look` and tells `note` what the method's own, if there is one, made of it."""

    def seen(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        look(site, q, k)
        if tap is None:
            return plain(site, q, k, v)
        calls = list[tuple[Tensor, list[str]]]()

        def noted(site: Site, *now: Tensor) -> Tensor:
            changed = [name for name, one, was in zip(("queries", "keys", "values"), now, (q, k, v)) if one is not was]
            calls.append((plain(site, *now), changed))
            return calls[-1][0]

        out = tap(noted, site, q, k, v)
        if not (whole := [changed for made, changed in calls if made is out]):
            note(site, "put together from several attentions")
        elif whole[0]:
            note(site, " and ".join(whole[0]))
        return out

    return seen


def beside_feature(feature: Feature, note: Callable[..., None]) -> Feature:
    def seen(site: Site, h: Tensor) -> Tensor:
        out = feature(site, h)
        if out is not h:
            note(site, "output")
        return out

    return seen


# ---------------------------------------------------------------- what was touched, in words


class Reach(NamedTuple):
    """Layers that were touched alike: where, what was put in another's place, and at which of the stage's steps."""

    stage: str
    where: str
    what: str
    steps: list[bool]


def reaches(seen: Witness, size: Sequence[int]) -> list[Reach]:
    """In the order of a call; size: (h, w) of the latent."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for stage, sites in seen.touched.items():
        for site, at in sites.items():
            for what in dict.fromkeys(at.values()):
                steps = tuple(at.get(t) == what for t in seen.steps[stage])
                found.setdefault((stage, site.place, site.level, site.kind, what, steps), []).append(site.index + 1)
    made = []
    for (stage, place, level, kind, what, steps), numbers in found.items():
        h, w = (-(-side // 2**level) for side in size)
        where = f"{PLACES[place]}, {w} x {h}, {KINDS[kind]} {', '.join(map(str, numbers))}"
        made.append(Reach(stage, where, what, [*steps]))
    return made
