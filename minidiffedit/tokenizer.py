"""CLIP's byte-level BPE on the `tokenizers` library: text to 77 ids.

The rules are OpenAI CLIP's (https://github.com/openai/CLIP, `simple_tokenizer.py`) without ftfy and HTML unescaping,
as transformers 5 runs them; the merges are packaged (MIT, notice in data/LICENSE.clip).
"""

import gzip
import json
import warnings
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from torch import Tensor

BOS, EOS, LENGTH = 49406, 49407, 77  # EOS is also padding and the unknown token
BOS_TEXT, EOS_TEXT = "<|startoftext|>", "<|endoftext|>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def packaged_merges() -> list[tuple[str, str]]:
    """The 48,894 merges of CLIP, in order of priority."""
    return parse_merges(gzip.decompress(files(__package__).joinpath("data/clip_merges.txt.gz").read_bytes()).decode())


def parse_merges(text: str) -> list[tuple[str, str]]:
    pairs = [tuple(line.split()) for line in text.splitlines() if line.strip() and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("a line of the merges is not a pair of symbols")
    return pairs  # type: ignore[return-value]


def build_vocab(merges: list[tuple[str, str]]) -> dict[str, int]:
    """256 byte symbols, the same ending a word, one entry per merge, two special tokens: 49,408 in all."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges] + [BOS_TEXT, EOS_TEXT]
    return {token: i for i, token in enumerate(tokens)}


def build_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    bpe = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>", unk_token=EOS_TEXT, fuse_unk=False)
    )
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.post_processor = processors.RobertaProcessing(
        (EOS_TEXT, EOS), (BOS_TEXT, BOS), trim_offsets=False, add_prefix_space=False
    )
    bpe.add_special_tokens([AddedToken(token, special=True) for token in (BOS_TEXT, EOS_TEXT)])
    return bpe


def read_words(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of `vocab.json` + `merges.txt`, else of `tokenizer.json`, whose rules are not run."""

    def text(name: str) -> str:
        if not (folder / name).is_file() or (folder / name).stat().st_size > 1 << 24:  # a device, a pipe, a trap
            raise ValueError(f"{name} is no file of at most 16 MB")
        return (folder / name).read_text(encoding="utf-8")

    try:
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            return dict(json.loads(text("vocab.json"))), parse_merges(text("merges.txt"))
        if (folder / "tokenizer.json").exists():
            model = json.loads(text("tokenizer.json"))["model"]
            pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
            return dict(model["vocab"]), parse_merges("\n".join(pairs))
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{folder}: not a readable CLIP tokenizer ({error})") from error
    raise ValueError(f"{folder}: neither vocab.json with merges.txt nor tokenizer.json is there")


class Tokenizer:
    """Tokenizer()(["a horse"]) -> (1, 77) int64.

    source: None, or a folder whose `vocab.json` + `merges.txt` or `tokenizer.json` is checked: every word and merge
    must be CLIP's, or prompts would silently mean something else. Raises ValueError where they are not.
    """

    def __init__(self, source: str | Path | None = None):
        vocab = build_vocab(merges := packaged_merges())
        if source is not None and (found := read_words(Path(source))) != (vocab, merges):
            raise ValueError(f"{source}: not CLIP's tokenizer ({len(found[0])} tokens and {len(found[1])} merges)")
        self.bpe = build_bpe(vocab, merges)

    def encode(self, text: str) -> Any:
        """All tokens of a text, begin and end included: their ids, tokens (as they are spelled) and offsets in it."""
        return self.bpe.encode(text)

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """n prompts -> (n, 77) int64: BOS, at most 75 tokens, EOS, padded with EOS.

        A longer prompt is cut, and a warning shows what was lost. Raises ValueError for what is no list of texts.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts must be a list of strings, got the string {prompts!r}")
        return torch.tensor([*map(self._ids, prompts)], dtype=torch.int64).reshape(-1, LENGTH)

    def _ids(self, prompt: str) -> list[int]:
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt must be a string, got {type(prompt).__name__}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt {prompt!r} holds half a character (a lone surrogate)") from error
        encoding = self.encode(prompt)
        ids = encoding.ids
        if len(ids) > LENGTH:
            start = encoding.offsets[LENGTH - 1][0]
            lost = prompt[start:].strip()
            warnings.warn(f"the prompt has {len(ids) - 2} tokens, 75 fit; cut off: {lost!r}", stacklevel=3)
            ids = [*ids[: LENGTH - 1], EOS]
        return ids + [EOS] * (LENGTH - len(ids))
