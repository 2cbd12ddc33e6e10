"""Words of a prompt: at which of CLIP's 77 positions they stand, and which positions of two prompts correspond.

A word may take several positions ("giraffe's"), and punctuation takes its own. Alignment follows prompt-to-prompt
(Hertz et al., 2208.01626, section 3): `replaced` for prompts of equally many words, `refined` for any two prompts. The
authors' code aligns padding, and in `replaced` all that follows a word of another length, by absolute position; here
they are counted from the words on, and padding from the end token on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..tokenizer import EOS, LENGTH, Tokenizer


@dataclass(frozen=True)
class Words:
    """ids: the tokens of a prompt, begin and end included, as far as they fit into 77 positions; starts: at which
    positions a word begins, in order; names: the words as they were written.
    """

    tokenizer: Tokenizer
    ids: tuple[int, ...]
    starts: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def end(self) -> int:
        """The position of the end token, where padding begins."""
        return len(self.ids) - 1

    @property
    def spans(self) -> list[range]:
        """The positions of each word."""
        return [range(a, b) for a, b in zip(self.starts, (*self.starts[1:], self.end))]

    def find(self, phrase: str) -> list[int]:
        """All positions of a word or phrase, in any case of letters, wherever it stands; [] if nowhere."""
        wanted = tuple(token.id for token in self.tokenizer.encode(phrase)[1:-1])
        found: list[int] = []
        for start in self.starts if wanted else ():
            if self.ids[start : start + len(wanted)] == wanted:
                found += range(start, start + len(wanted))
        return found

    def positions(self, phrase: str) -> list[int]:
        """The same. Raises ValueError, which names the words there are, for what the prompt does not hold."""
        if found := self.find(phrase):
            return found
        raise ValueError(f"the prompt has no {phrase!r}; its words are {', '.join(self.names) or 'none'}")


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """CLIP's, for words that are looked up before a model is loaded."""
    return Tokenizer()


def words_of(tokenizer: Tokenizer, prompt: str) -> Words:
    """Words are runs of letters, single digits, and runs of other signs, as CLIP divides a text (tokenizer.WORDS)."""
    tokens = tokenizer.encode(prompt)
    ids = [token.id for token in tokens]
    if len(ids) > LENGTH:  # the text encoder sees as many as fit, and the end token
        ids = [*ids[: LENGTH - 1], EOS]
    end = len(ids) - 1
    starts = [i for i in range(1, end) if tokens[i - 1].ends]
    names = (prompt[tokens[a].start : tokens[b - 1].stop] for a, b in zip(starts, (*starts[1:], end)))
    return Words(tokenizer, tuple(ids), tuple(starts), tuple(names))


def replaced(source: Words, target: Words) -> Tensor:
    """W (77, 77) float32: the target's position j takes the sum over i of W[i, j] times the map of the source's i.

    Word for word; where a word has p positions and its counterpart q, each of the q takes all p over q, so that no
    attention is lost. A column of zeros: no counterpart. Raises ValueError for prompts of different numbers of words.
    """
    if len(source.names) != len(target.names):
        raise ValueError(
            f"replacing word for word needs as many words in both prompts, got {len(source.names)} "
            f"({' '.join(source.names)}) and {len(target.names)} ({' '.join(target.names)}); use mode refine"
        )
    W = torch.zeros(LENGTH, LENGTH)
    for one, other in zip(source.spans, target.spans):
        if len(one) == len(other):
            W[list(one), list(other)] = 1
        else:
            W[one.start : one.stop, other.start : other.stop] = 1 / len(other)
    return with_ends(W, source, target)


def refined(source: Words, target: Words) -> Tensor:
    """The same for any two prompts: their longest common subsequence of tokens corresponds (the authors' alignment: gap
    0, match 1, mismatch -1), what is new in the target has a column of zeros.
    """
    a, b = source.ids[1:-1], target.ids[1:-1]
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]  # of what follows i in a and j in b
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            best[i][j] = 1 + best[i + 1][j + 1] if a[i] == b[j] else max(best[i + 1][j], best[i][j + 1])
    W, i, j = torch.zeros(LENGTH, LENGTH), 0, 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            W[i + 1, j + 1] = 1
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1
    return with_ends(W, source, target)


def with_ends(W: Tensor, source: Words, target: Words) -> Tensor:
    """W with begin, end and padding in correspondence, the padding as far as the source's reaches."""
    W[0, 0] = 1
    count = LENGTH - max(source.end, target.end)
    W[range(source.end, source.end + count), range(target.end, target.end + count)] = 1
    return W


def listed(text: str | None) -> list[str]:
    """ "horse, grass field" -> its words or phrases."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def numbered(name: str, text: str | None, low: float = -1000, high: float = 1000) -> dict[str, float]:
    """ "zebra=2, grass field=0.5" -> its numbers; name: the option's. Raises ValueError for what is no such list."""
    found = {}
    for part in listed(text):
        phrase, _, number = part.rpartition("=")
        try:
            found[phrase.strip()] = value = float(number)
        except ValueError:
            value = float("nan")
        if not phrase.strip() or not low <= value <= high:
            raise ValueError(
                f"{name} must be WORD=NUMBER, separated by commas, numbers {low:g}..{high:g}, got {text!r}"
            )
    return found


def in_one_of(phrase: str, prompts: Sequence[Words]) -> list[list[int]]:
    """The positions of a phrase in each prompt, [] where it is not. Raises ValueError if it is in none."""
    found = [words.find(phrase) for words in prompts]
    if not any(found):
        names = "; ".join(" ".join(words.names) for words in prompts)
        raise ValueError(f"no prompt has {phrase!r}; their words are: {names}")
    return found
