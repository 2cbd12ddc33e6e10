r"""Texts with weights, and of any length, as the neighbours read them; "plain" reads letters, as many as fit.

a1111 (AUTOMATIC1111's web UI, its "original" emphasis): (word) weighs 1.1, ((word)) 1.21, [word] 1 / 1.1, (word:1.3)
    1.3; \( \) \[ \] \\ are signs; BREAK begins a new chunk. A chunk is 75 tokens encoded alone, between a begin and an
    end token; one that is full ends at a comma among its last 20. Its embeddings are multiplied by the weights, then
    all by one number, so that their mean is as before. Texts of different lengths are repeated: attention, which is
    a mean over positions, gives the same as if each had its own length. Schedules ([a:b:9], [a|b], AND) are refused.
compel (2.5, long texts not truncated): word+ and word- weigh 1.1 and .9, word++ 1.21, (some words)1.3 and "some
    words"1.3 1.3; weights multiply where they nest. A weight scales the distance from the empty text's embedding; one
    below 1 also draws it to the embedding of a text in which those words are masked, by tan((1 - weight) pi / 2) parts
    to one. A chunk ends with a sentence, else a phrase, else a word. Shorter texts are filled with the empty text. Its
    functions (.swap, .blend, .and, .attend, withLora) are refused.
"""

import itertools
import math
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Attend, Site
from .clip import CLIPText
from .tokenizer import BOS, EOS, LENGTH, Tokenizer

ROOM = LENGTH - 2  # tokens of a chunk beside its begin and end
MOST = 24  # chunks of a text
NEAR = 20  # so far from a full chunk's end a comma is looked for
DEEPEST = 200  # brackets that are open at once

# Parts of a text and their weights, in order; None in the place of a text: a new chunk begins.
Parts = list[tuple[str | None, float]]
# Tokens of a chunk: id, weight, and which part it belongs to.
Chunk = list[tuple[int, float, int]]


# ---------------------------------------------------------------- reading

# Each in a time that grows as the text does: no part of a text may be read in two ways.
A1111 = re.compile(r"\\[()\[\]\\]?|[(\[]|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[)\]]|[^\\()\[\]:]+|:")
SCHEDULE = re.compile(r"\[[^\[\]()\\]*(?:\||:\s*[\d.]+\s*)\]|\[[^\[\]()\\|]*\|[^\[\]]*\]|\bAND\b")
LORA = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>")


def parts_of(text: str, syntax: str) -> Parts:
    """A text's parts and weights. Raises ValueError for what a syntax has and this program has not."""
    if syntax == "plain":
        return [(text, 1.0)]
    if found := LORA.search(text):
        raise ValueError(f"a text cannot load {found[0]!r}: give the file with --lora FILE:SCALE, leave it out here")
    parts = read_a1111(text) if syntax == "a1111" else read_compel(text)
    joined: Parts = []
    for one, weight in parts:
        if not math.isfinite(weight) or abs(weight) > 1000:
            raise ValueError(f"the weight of {one!r} is {weight:g}, beyond 1000")
        last = joined[-1] if joined else (None, math.nan)
        if one is not None and last[0] is not None and last[1] == weight:
            joined[-1] = last[0] + ("" if syntax == "a1111" else " ") + one, weight
        else:
            joined.append((one, weight))
    return joined or [("", 1.0)]


def read_a1111(text: str) -> Parts:
    if found := SCHEDULE.search(text):
        raise ValueError(f"{found[0]!r} changes a text between steps, which is not supported; write one text")
    parts: list[tuple[str | None, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        parts[start:] = [(one, weight * factor) for one, weight in parts[start:]]

    for match in A1111.finditer(text):
        part, number = match[0], match[1]
        if part[0] == "\\":
            parts.append((part[1:], 1.0))
        elif part in opened:
            if sum(map(len, opened.values())) == DEEPEST:
                raise ValueError(f"the brackets of {text[:40]!r}... are nested too deeply")
            opened[part].append(len(parts))
        elif opened["("] and (number or part == ")"):
            weigh("(", float(number or 1.1))
        elif opened["["] and part == "]":
            weigh("[", 1 / 1.1)
        else:
            first, *others = re.split(r"\bBREAK\b", part)
            parts += [(first.rstrip() if others else first, 1.0)]
            parts += [one for text in others for one in ((None, 1.0), (text.strip(), 1.0))]
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):  # those never closed hold to the end
        while opened[bracket]:
            weigh(bracket, factor)
    return parts


SIGNS = r'\s()",.+\-='  # that mean something
WORD = re.compile(rf'(?:\\[()",.+\-=]|[-+](?![{SIGNS}]|\Z)|[^{SIGNS}])+')
QUOTED = re.compile(r'"((?:\\"|[^"\n])*)"')
FACTOR = re.compile(r"\++|-+|[+-]?(?:\d+\.\d*|\.\d+)|-?\d+")
CALL = re.compile(r'(?<=[)"\w])\.(?:swap|blend|and|add|attend)\s*\(|\b(?:use|with)Lora\s*\(')


def read_compel(text: str) -> Parts:
    if found := CALL.search(text):
        raise ValueError(f"compel's {found[0]!r} is not supported; its weights (+, -, numbers) are")
    text, at = re.sub(r",(\S)", r", \1", text), 0
    parts: Parts = []
    try:
        while (at := past_space(text, at)) < len(text):
            found_here = phrase(text, at)
            if found_here is None:  # what is no phrase is letters, up to the next space
                end = next((i for i in range(at, len(text)) if text[i].isspace()), len(text))
                found_here = [(text[at:end], 1.0)], end
            parts += found_here[0]
            at = found_here[1]
    except RecursionError:
        raise ValueError(f"the parentheses of {text[:40]!r}... are nested too deeply") from None
    signs = {'\\"': '"', "\\(": "(", "\\)": ")"}
    return [(re.sub(r'\\["()]', lambda m: signs[m[0]], one or ""), weight) for one, weight in parts]


def past_space(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def phrase(text: str, at: int) -> tuple[Parts, int] | None:
    """Words in parentheses or quotes with their weight, or one word with + or -, and where they end."""
    if found := enclosed(text, at):
        parts, at = found
        factor = FACTOR.match(text, at)
        weight = weight_of(factor[0]) if factor else 1.0
        return [(one, weight * inner) for one, inner in parts], factor.end() if factor else at
    word = WORD.match(text, at)
    signs = re.compile(r"\++|-+").match(text, word.end()) if word else None
    return ([(word[0], weight_of(signs[0]))], signs.end()) if word and signs else None


def weight_of(factor: str) -> float:
    return float(factor) if factor.strip("+-") else (1.1 if factor[0] == "+" else 0.9) ** len(factor)


def enclosed(text: str, at: int) -> tuple[Parts, int] | None:
    if quoted := QUOTED.match(text, at):
        parts, end = sequence(quoted[1], 0)
        return (parts or [("", 1.0)], quoted.end()) if end == len(quoted[1]) else None
    if text[at : at + 1] != "(":
        return None
    parts, end = sequence(text, at + 1)
    return (parts, end + 1) if text[end : end + 1] == ")" else None


def sequence(text: str, at: int) -> tuple[Parts, int]:
    """Phrases, words and marks one after another, and where something else begins."""
    parts: Parts = []
    while (at := past_space(text, at)) < len(text):
        found = phrase(text, at)
        if found is None and (word := WORD.match(text, at) or re.compile("[,.]").match(text, at)):
            found = [(word[0], 1.0)], word.end()
        if found is None:
            break
        parts += found[0]
        at = found[1]
    return parts, at


def spoken(text: str, syntax: str) -> str:
    """The words of a text, without what weighs them."""
    return text if syntax == "plain" else " ".join(one for one, _ in parts_of(text, syntax) if one)


WEIGHTED = re.compile(
    r"\([^()]*:\s*[+-]?[\d.]+\s*\)|\(\(|\[[^\[\]]+\]|\{[^{}|]*\|[^{}]*\}|\b(?:BREAK|AND)\b|[)\"][+-]|\)\d|\w(?:\+\+|--)(?!\S)"
)


def check_texts(texts: Sequence[str], syntax: str) -> None:
    """Refuse what a syntax does not have; warn, once each, of what "plain" reads as letters and of other scripts."""
    for text in texts:
        parts_of(text, syntax)
    if syntax == "plain" and (found := [m[0] for text in texts if (m := LORA.search(text) or WEIGHTED.search(text))]):
        said = f"the text looks weighted, {found[0]!r}, and is read as letters; prompt_syntax a1111 or compel weighs"
        warnings.warn(f"{said} (a LoRA is given with --lora)", stacklevel=4)
    for text in texts:
        letters = [c for c in unicodedata.normalize("NFKC", text) if c.isalpha()]
        strange = [c for c in letters if not unicodedata.name(c, "").startswith("LATIN")]
        if len(strange) > 1 or any(unicodedata.category(c) == "Lo" for c in strange):
            said = f"CLIP was trained on English and hardly knows words like {''.join(strange[:8])!r}"
            warnings.warn(f"{said}: say it in English", stacklevel=4)
            break


# ---------------------------------------------------------------- chunks


def chunks_of(tokenizer: Tokenizer, text: str, syntax: str) -> list[Chunk]:
    """A text's tokens by chunk, begin and end tokens left out. Raises ValueError for more than 24 chunks."""
    parts = parts_of(text, syntax)
    chunks = chunks_a1111(tokenizer, parts) if syntax == "a1111" else chunks_compel(tokenizer, parts)
    if len(chunks) > MOST:
        raise ValueError(f"a text has room for {MOST} chunks of {ROOM} tokens, this one takes {len(chunks)}")
    return chunks


def check_one_chunk(tokenizer: Tokenizer, text: str, syntax: str) -> None:
    """Raise ValueError for a text of several, in which words have no place that they keep."""
    if syntax != "plain" and (count := len(chunks_of(tokenizer, text, syntax))) > 1:
        raise ValueError(
            f"this method looks at words, for which a text must be one chunk of {ROOM} tokens, not {count}"
        )


def words_in(tokenizer: Tokenizer, text: str) -> Iterator[list[int]]:
    """A text's ids one by one, those of a learned word together."""
    count = itertools.count(1)
    found = tokenizer.encode(text)
    tokens = [*zip(found.ids, found.offsets)][1:-1]
    for _, group in itertools.groupby(tokens, lambda token: token[1][0] if token[0] > EOS else -next(count)):
        yield [i for i, _ in group]


def chunks_a1111(tokenizer: Tokenizer, parts: Parts) -> list[Chunk]:
    chunks: list[Chunk] = [[]]
    comma_id, comma = tokenizer.bpe.token_to_id(",</w>"), -ROOM  # where the chunk's last comma stands
    for i, (text, weight) in enumerate(parts):
        if text is None:
            chunks.append([])
            comma = -ROOM
        for ids in words_in(tokenizer, text or ""):
            moved: Chunk = []
            if ids == [comma_id]:
                comma = len(chunks[-1])
            elif len(chunks[-1]) == ROOM and ROOM - comma <= NEAR:
                moved = chunks[-1][comma + 1 :]
                del chunks[-1][comma + 1 :]
                chunks.append(moved)
                comma = -ROOM
            if len(chunks[-1]) + len(ids) > ROOM:
                chunks.append([])
                comma = -ROOM
            chunks[-1] += [(one, weight, i) for one in ids]
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


def chunks_compel(tokenizer: Tokenizer, parts: Parts) -> list[Chunk]:
    left: list[tuple[int, float, int, bool]] = []
    for i, (text, weight) in enumerate(parts):
        found = tokenizer.encode(text or "")
        left += [(one, weight, i, spelled.endswith("</w>")) for one, spelled in zip(found.ids, found.tokens)][1:-1]
    marks = {mark: tokenizer.bpe.token_to_id(f"{mark}</w>") for mark in ".,;:"}
    chunks: list[Chunk] = []
    while left or not chunks:
        end = ROOM
        if len(left) > ROOM:
            ends = [[marks["."]], [*marks.values()]]
            places = [[i for i, one in enumerate(left[:ROOM]) if one[0] in wanted] for wanted in ends]
            places += [[i for i, one in enumerate(left[:ROOM]) if one[3]], [ROOM - 1]]
            end = 1 + next(found[-1] for found in places if found)
        chunks.append([(one, weight, i) for one, weight, i, _ in left[:end]])
        left = left[end:]
    return chunks


# ---------------------------------------------------------------- embeddings


def embedding(text: str, syntax: str, tokenizer: Tokenizer, clip: CLIPText, device: torch.device) -> Tensor:
    """(1, 77 k, width) in the model's dtype, for a text of k chunks. Raises ValueError as `chunks_of`."""
    chunks = chunks_of(tokenizer, text, syntax)
    filled = [[BOS, *(one for one, _, _ in chunk), *[EOS] * (LENGTH - 1 - len(chunk))] for chunk in chunks]
    weights = [[1.0, *(weight for _, weight, _ in chunk), *[1.0] * (LENGTH - 1 - len(chunk))] for chunk in chunks]
    ids, w = torch.tensor(filled, device=device), torch.tensor(weights, device=device)[..., None]
    plain = encoded(clip, ids)
    z = plain.float()
    if syntax == "a1111":
        weighed = z * w
        ratio = z.mean((1, 2), keepdim=True) / weighed.mean((1, 2), keepdim=True)
        z = torch.where((w == 1).all(1, keepdim=True), z, weighed * ratio)
    else:
        z = mixed(clip, ids, z, w, chunks)
    if not (z := z.to(plain)).isfinite().all():
        raise ValueError(f"the weights of {text[:60]!r} make numbers beyond any bound; use weights nearer to 1")
    return z.reshape(1, len(chunks) * LENGTH, -1)


def encoded(clip: CLIPText, ids: Tensor, keep: Tensor | None = None) -> Tensor:
    """ids (k, 77) -> (k, 77, width), chunk by chunk; keep (k, 77): False where no token may look."""
    looks = [()] * len(ids) if keep is None else [(causal_but(one),) for one in keep]
    return torch.cat([clip.transform(clip.embeddings(row), *look) for row, look in zip(ids.split(1), looks)])


def causal_but(keep: Tensor) -> Attend:
    mask = keep & torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=keep.device).tril()

    def attend(site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


def mixed(clip: CLIPText, ids: Tensor, z: Tensor, w: Tensor, chunks: list[Chunk]) -> Tensor:
    """compel's weights: of z (k, 77, width), the chunks' plain embeddings, with weights w (k, 77, 1)."""
    empty = encoded(clip, torch.tensor([[BOS, *[EOS] * (LENGTH - 1)]], device=ids.device)).float()

    def away(one: Tensor) -> Tensor:
        return torch.where(w == 1, one, empty + (one - empty) * w)

    places: dict[int, list[int]] = {}  # of each part below 1, over all chunks
    below = {}
    for n, chunk in enumerate(chunks):
        for at, (_, weight, part) in enumerate(chunk, start=n * LENGTH + 1):
            if weight < 1:
                places.setdefault(part, []).append(at)
                below[part] = weight
    total, shares = away(z), 1.0
    for part, found in places.items():
        keep = torch.ones(len(chunks), LENGTH, dtype=torch.bool, device=ids.device)
        keep.view(-1)[found[0] : found[-1] + 1] = False
        keep[:, [0, -1]] = True
        share = math.tan((1 - max(1e-5, below[part])) * math.pi / 2)
        total, shares = total + share * away(encoded(clip, ids, keep).float()), shares + share
    return total / shares if places else total


def same_length(texts: Sequence[Tensor], syntax: str) -> list[Tensor]:
    """Embeddings (1, 77 k, width), the first of them the empty text's, of one length: see above."""
    counts = [text.shape[1] // LENGTH for text in texts]
    most = math.lcm(*counts) if syntax == "a1111" else max(counts)
    if most > MOST:
        raise ValueError(f"texts of {counts} chunks of {ROOM} tokens have no common length of at most {MOST}")
    if syntax == "a1111":
        return [text if most == n else text.repeat(1, most // n, 1) for text, n in zip(texts, counts)]
    return [text if most == n else torch.cat([text, *[texts[0]] * (most - n)], 1) for text, n in zip(texts, counts)]


def many(prompts: Sequence[str], syntax: str, *parts: Any) -> Tensor:
    """n texts -> (n, 77 k, width), k the most chunks that one needs."""
    return torch.cat(same_length([embedding(text, syntax, *parts) for text in ("", *prompts)], syntax)[1:])
