"""Three sources of one tokenizer, equal to transformers'."""

import gzip
import json
import shutil
from importlib.metadata import version
from importlib.resources import files as resources
from pathlib import Path

import pytest
import torch
from files import CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.torch_version import TorchVersion

from minidiffedit import Tokenizer
from minidiffedit.tokenizer import build_vocab, packaged_merges

CASES = json.loads((Path(__file__).parent / "data" / "token_cases.json").read_text())["cases"]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The folder of the official repositories; its vocabulary and merges are the packaged ones."""
    folder = shutil.copytree(CONFIGS / "v1-5" / "tokenizer", tmp_path_factory.mktemp("t") / "tokenizer")
    (folder / "vocab.json").write_text(json.dumps(build_vocab(packaged_merges())), encoding="utf-8")
    packed = resources("minidiffedit").joinpath("data/clip_merges.txt.gz").read_bytes()
    (folder / "merges.txt").write_bytes(gzip.decompress(packed))
    return folder


@pytest.fixture(scope="module")
def peer(official):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(official)


OLD = TorchVersion(version("transformers")) < (5,)
NEW = pytest.mark.skipif(OLD, reason="before 5 it has a tokenizer in Python and other files")


@pytest.fixture(scope="module")
def resaved(peer, tmp_path_factory):
    """tokenizer.json alone, as transformers 5 saves it after use: with truncation and padding set."""
    folder = tmp_path_factory.mktemp("resaved")
    peer(["a horse"], padding="max_length", max_length=16, truncation=True)
    peer.save_pretrained(folder)
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["truncation"] and saved["padding"] and not (folder / "vocab.json").exists()
    return folder


@pytest.mark.filterwarnings("ignore:the prompt has")
@pytest.mark.parametrize("source", [None, "official", pytest.param("resaved", marks=NEW)])
def test_the_cases_of_transformers(source, request):
    tokenizer = Tokenizer(source and request.getfixturevalue(source))
    assert len(CASES) == 300
    ids = tokenizer([case["text"] for case in CASES])
    assert ids.shape == (300, 77) and ids.dtype == torch.int64
    for case, row in zip(CASES, ids.tolist()):
        assert row == case["ids"], case["text"]


@pytest.mark.filterwarnings("ignore:the prompt has")
@NEW
@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_any_text_as_transformers(text, peer):
    expected = peer(text, padding="max_length", max_length=77, truncation=True)["input_ids"]
    assert PACKAGED([text])[0].tolist() == expected


PACKAGED = Tokenizer()


def test_the_vocabulary_has_the_official_sizes(official, peer):
    merges = packaged_merges()
    vocab = build_vocab(merges)
    assert (len(merges), len(vocab)) == (48_894, 49_408) and sorted(vocab.values()) == list(range(49_408))
    assert vocab == peer.get_vocab() == PACKAGED.bpe.get_vocab()
    assert (official / "merges.txt").stat().st_size == 524_619
    assert (vocab["<|startoftext|>"], vocab["<|endoftext|>"]) == (49_406, 49_407)


def test_no_prompt_and_the_empty_one():
    assert PACKAGED([]).shape == (0, 77) and PACKAGED([]).dtype == torch.int64
    assert PACKAGED([""]).tolist() == [[49406] + [49407] * 76]


@pytest.mark.parametrize("n", [75, 76, 100])
def test_a_long_prompt_is_cut_with_a_warning(n, recwarn):
    prompt = " ".join(["horse"] * 75 + ["zebra"] * (n - 75))
    ids = PACKAGED([prompt])[0].tolist()
    assert ids == [49406] + [4558] * 75 + [49407]
    said = [str(w.message) for w in recwarn]
    lost = " ".join(["zebra"] * (n - 75))
    assert said == ([f"the prompt has {n} tokens, 75 fit; cut off: {lost!r}"] if lost else [])
    assert all(w.filename == __file__ for w in recwarn)  # the caller's line, not ours


@pytest.mark.parametrize("prompt", ["a \ud800 horse", "\udfff", b"a horse", None, 7, ["a horse"]])
def test_what_is_no_text_is_refused(prompt):
    with pytest.raises(ValueError, match=r"lone surrogate|a prompt must be a string, got \w+"):
        PACKAGED(["a horse", prompt])


BROKEN = {
    "nothing": ({}, "neither vocab.json with merges.txt nor tokenizer.json"),
    "no merges": ({"vocab.json": "{}"}, "neither"),
    "empty files": ({"vocab.json": "", "merges.txt": ""}, "not a readable CLIP tokenizer"),
    "a list": ({"vocab.json": "[]", "merges.txt": ""}, "not CLIP's tokenizer .0 tokens"),
    "words for ids": ({"vocab.json": '{"a": "b"}', "merges.txt": ""}, "not CLIP's tokenizer"),
    "too few tokens": ({"vocab.json": '{"a": 0, "<|endoftext|>": 1}', "merges.txt": ""}, "not CLIP's tokenizer"),
    "merges of three": ({"vocab.json": "{}", "merges.txt": "#version: 0.2\na b c\n"}, "not a pair of symbols"),
    "an unknown merge": ({"vocab.json": '{"a": 0}', "merges.txt": "x y\n"}, "not CLIP's tokenizer"),
    "no JSON": ({"tokenizer.json": "{"}, "not a readable CLIP tokenizer"),
    "another's": ({"tokenizer.json": '{"version":"1.0","model":{"type":"BPE","vocab":{"a":0},"merges":[]}}'},
                  "not CLIP's tokenizer .1 tokens"),
    "no text": ({"vocab.json": b"\xff\xfe", "merges.txt": ""}, "not a readable CLIP tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folders_are_refused(kind, tmp_path):
    contents, words = BROKEN[kind]
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=words):
        Tokenizer(tmp_path)


def test_a_vocabulary_whose_ids_are_shifted_is_refused(tmp_path):
    """As many tokens, other words: prompts would silently mean something else."""
    merges = packaged_merges()
    vocab = build_vocab(merges)
    shifted = {token: (i + 1) % 49406 if i < 49406 else i for token, i in vocab.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(shifted))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in merges))
    with pytest.raises(ValueError, match="not CLIP's tokenizer"):
        Tokenizer(tmp_path)
