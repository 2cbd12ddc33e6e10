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
    -> its timesteps in order; roles: stage -> the prompt of each row of a call with touches, None: a learned text.
    """

    def __init__(self) -> None:
        self.touched: dict[str, dict[Site, dict[int, str]]] = {}
        self.steps: dict[str, list[int]] = {}
        self.roles: dict[str, tuple[str | None, ...]] = {}
        self.texts: Mapping[str, Tensor] = {}
        self.known: dict[str, tuple[Any, Tensor]] = {}
        self.sums: dict[tuple[str, str, int], dict[int, tuple[Tensor, int]]] = {}

    def meet(self, texts: Mapping[str, Tensor], words_of: Callable[[str], Any]) -> None:
        """The prompts of the run, each (1, 77, width). Raises ValueError where it saw another run."""
        if self.texts:
            raise ValueError("a witness looks on at one run; this one has seen another")
        self.texts = texts
        for prompt, text in texts.items():
            if (words := words_of(prompt)).names:
                columns = torch.zeros(text.shape[1], len(words.names))
                for i, span in enumerate(words.spans):
                    columns[list(span), i] = 1
                self.known[prompt] = words, columns.to(text.device)

    def hooks(self, stage: str, x: Tensor, t: int, texts: Sequence[Tensor], hooks: dict[str, Any]) -> dict[str, Any]:
        """The hooks of a call of the model, with the witness before them; x (b, c, h, w)."""
        rows = torch.cat([text.expand(len(x), -1, -1) for text in texts])
        under = dict[str, list[int]]()
        for prompt, text in self.texts.items():
            same = (rows[:, : text.shape[1]] == text.to(rows)).flatten(1).all(1)  # of a pair the keys, see Path.texts
            under[prompt] = same.nonzero().flatten().tolist()
        roles = tuple(next((prompt for prompt, at in under.items() if i in at), None) for i in range(len(rows)))
        times = self.steps.setdefault(stage, [])
        times[:] = [*(one for one in times if one != t), t]  # a method may go up before it goes down
        looked = {prompt: at for prompt, at in under.items() if at and prompt in self.known}
        look = partial(self.look, looked, (stage, t), x.shape[2:])
        note = partial(self.note, stage, roles, t)
        wrapped: dict[str, Any] = {"tap": beside(hooks.get("tap"), look, note)}
        if hooks.get("feature") is not None:
            wrapped["feature"] = beside_feature(hooks["feature"], note)
        return hooks | wrapped

    def note(self, stage: str, roles: tuple[str | None, ...], t: int, site: Site, what: str) -> None:
        if what:
            self.roles.setdefault(stage, roles)
            self.touched.setdefault(stage, {}).setdefault(site, {})[t] = what

    @torch.no_grad()
    def look(
        self, under: dict[str, list[int]], now: tuple[str, int], size: Sequence[int], site: Site, q: Tensor, k: Tensor
    ) -> None:
        grid = [-(-side // 2**site.level) for side in size]
        if site.kind != "cross" or site.place == "mid" or q.shape[2] != grid[0] * grid[1]:  # of a part: no map
            return
        for prompt, rows in under.items():
            columns = self.known[prompt][1]
            map = weights(q[rows].detach(), k[rows, :, : len(columns)].detach()).float().mean((0, 1)) @ columns
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
            maps = {at: torch.stack([one[at][0] / one[at][1] for one in by_step]).cpu() for at in by_step[0]}
            words = self.known[prompt][0].names
            found.append(Looks(stage, prompt, words, steps, dict(sorted(maps.items(), reverse=True))))
        return sorted(found, key=lambda one: STAGES.index(one.stage))


def beside(tap: Tap | None, look: Callable[..., None], note: Callable[..., None]) -> Tap:
    """A tap that shows the attention to `look` and tells `note` what the method's own, if there is one, made of it."""

    def seen(plain: Attend, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        look(site, q, k)
        if tap is None:
            return plain(site, q, k, v)
        calls = list[tuple[Tensor, ...]]()

        def noted(site: Site, *now: Tensor) -> Tensor:
            calls.append((plain(site, *now), *now))
            return calls[-1][0]

        out = tap(noted, site, q, k, v)
        note(site, exchanged(out, calls, (q, k, v)))
        return out

    return seen


def beside_feature(feature: Feature, note: Callable[..., None]) -> Feature:
    def seen(site: Site, h: Tensor) -> Tensor:
        out = feature(site, h)
        note(site, replaced(out, h))
        return out

    return seen


# ---------------------------------------------------------------- what was touched, in words


@torch.no_grad()
def exchanged(out: Tensor, calls: Sequence[tuple[Tensor, ...]], asked: Sequence[Tensor]) -> str:
    """Which rows of an attention are not as asked, and from which rows their queries, keys and values are. calls: what
    the model's own attention made, and of what.
    """
    if len(calls) == 1 and calls[0][0] is out and all(one is was for one, was in zip(calls[0][1:], asked)):
        return ""
    made = [(one[i], [part[i] for part in parts]) for one, *parts in calls for i in range(len(one))]
    whole = [next((parts for one, parts in made if one.equal(row)), None) for row in out]
    pieces = [parts for one, parts in made if not any(one.equal(row) for row in out)]
    said, mixed = {}, {r for r, parts in enumerate(whole) if parts is None}
    for r, parts in enumerate(whole):
        used = [parts] if parts else [one for one in pieces if not rows_of(one[0], asked[0], r) & (mixed - {r})]
        kinds = enumerate(("queries", "keys", "values"))
        origin = {name: [rows_of(one[n], asked[n], r) for one in used] for n, name in kinds}
        said[r] = origins({name: set[int]().union(*rows) - {r} for name, rows in origin.items()})
        said[r] += [] if parts else ["put together by the method"]
    return spoken(said)


@torch.no_grad()
def replaced(out: Tensor, h: Tensor) -> str:
    """The same of a feature: its cells are looked up among the rows' own, of which the one that has most is told."""
    said = dict[int, list[str]]()
    for r, row in enumerate(out if out is not h else ()):
        alike = [float((row == one).all(0 if h.ndim == 4 else 1).float().mean()) for one in h]
        most = max(range(len(h)), key=lambda s: alike[s] if s != r else -1.0)
        if alike[r] < 1:
            said[r] = origins({"output": {most if alike[most] else -1}}) + ["in part"] * (0 < alike[most] < 1)
    return spoken(said)


def rows_of(one: Tensor, was: Tensor, r: int) -> set[int]:
    """Where (heads, n, d) is from: r, else the first row of was (rows, heads, m, d) that is equal; of other cells the
    rows that its first and its last are in; -1: from none.
    """
    order = sorted(range(len(was)), key=lambda s: (one.data_ptr() != was[s].data_ptr(), s != r))
    if one.shape == was.shape[1:]:
        return {next((s for s in order if one.equal(was[s])), -1)}
    ends = ((was == one[:, [at]]).all(-1).any(-1).all(-1) for at in (0, -1))
    return {next((s for s in order if end[s]), -1) for end in ends}


def origins(kinds: Mapping[str, set[int]]) -> list[str]:
    """{"queries": {1}, "keys": {1}, "values": {-1}} -> ["queries and keys of row 2", "values changed"]."""
    found = dict[str, list[str]]()
    for kind, rows in kinds.items():
        numbers = ", ".join(str(r + 1) for r in sorted(rows) if r >= 0)
        found.setdefault(f"of row {numbers}" if numbers else "changed" if rows else "", []).append(kind)
    return [f"{' and '.join(names)} {rows}" for rows, names in found.items() if rows]


def spoken(said: Mapping[int, Sequence[str]]) -> str:
    """By row, what is said of it -> one line, rows of which the same is said together."""
    alike = dict[str, list[str]]()
    for r, one in said.items():
        alike.setdefault(", ".join(one), []).append(str(r + 1))
    return "; ".join(f"row {', '.join(rows)}: {one}" for one, rows in alike.items() if one)


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
