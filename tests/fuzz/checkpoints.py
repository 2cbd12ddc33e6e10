"""Damaged, foreign and hostile model folders and files."""

import json
import math
import os
import pickle
import random
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import files
import tiny
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minidiffedit.tokenizer import build_vocab, packaged_merges

from .harness import CANARY, Case, World, damage, drawn, edit, flip

FILES = {network: f"{network}/{name}" for network, name in tiny.FILES.items()}
CONFIGS = tiny.CONFIGS | {"unet": tiny.unet_config(tiny.QUICK)}  # of the sound model
BAD = ["--model", "bad"]


def cases(world: World, rng: random.Random, scale: float) -> Iterator[Case]:
    """scale: 1 for the long form; the fixed cases come at any scale, of the drawn ones a share."""

    def bad(
        name: str, change: Callable[[Path], Any], expect: str = "refused", words: str = "", loaded: bool = False
    ) -> Case:
        """change: called with the copied model's folder. loaded: only loading it can tell; `info` reads no weights."""
        argv = edit(model="bad") if loaded or expect != "refused" or rng.random() < 0.3 else ["info", "bad"]
        return Case(name, argv, lambda folder: change(world.copy_model(folder)), expect, words)

    def n(count: int) -> range:
        return range(max(2, round(count * scale)))

    headers = {network: header_of(world.model / file) for network, file in FILES.items()}

    for network, file in FILES.items():
        entries, length = headers[network]
        size = (world.model / file).stat().st_size
        ends = sorted({8 + length + entry["data_offsets"][i] for entry in entries.values() for i in (0, 1)} - {size})
        edges = [0, 1, 7, 8, 9, 8 + length // 2, 8 + length - 1, 8 + length, 8 + length + 1, size - 1]
        for at in edges + rng.sample(ends, min(len(ends), len(n(60)))):
            yield bad(f"{network} cut at {at}", on(file, lambda content, at=at: content[:at]), words="cut|damaged|no s")
        yield bad(f"{network} too long", on(file, lambda content: content + b"\0"), words="damaged")
        for _ in n(130):
            yield bad(f"{network}: a bit of the header", on(file, flip(rng, 0, 8 + length)), "same")
        for _ in n(20):
            yield bad(f"{network}: 4 bits of the header", on(file, flip(rng, 8, 8 + length, 4)), "same")
        for _ in n(15):
            yield bad(
                f"{network}: NaN, infinity",
                weights(file, poisoned, rng.random()),
                words="holds NaN or infinity",
                loaded=True,
            )
        for _ in n(8):
            yield bad(f"{network}: a huge weight", weights(file, enormous, rng.random()), "any")
        for _ in n(20):
            yield bad(f"{network}: misshaped", weights(file, misshaped, rng.random()), words="misshaped")
        for _ in n(6):
            yield bad(f"{network}: another type", weights(file, retyped, rng.random()), words="not a float type")
        for _ in n(6):
            yield bad(f"{network}: a tensor gone", weights(file, gone, rng.random()), words="missing")
        for _ in n(6):
            yield bad(f"{network}: a tensor more", weights(file, more, rng.random()), words="unknown")
        yield bad(f"{network}: bfloat16", weights(file, cast(torch.bfloat16), 0), "done")
        yield bad(f"{network}: float64", weights(file, cast(torch.float64), 0), "same")
        for name, change in HEADERS.items():
            for _ in n(2):
                yield bad(
                    f"{network}: {name}",
                    on(file, reheaded(change, rng.random())),
                    words="damaged|not a float type|misshaped",
                )
        for name, content in CONTENTS.items():
            words = "missing" if "empty header" in name else "is an? |damaged|no safetensors|0 bytes"
            yield bad(f"{network} is {name}", replaced(file, content), words=words)
        for name, put in THINGS.items():
            for what in (file, f"{network}/config.json"):
                words = "not a regular file|no such|has no|folder|pickle|JSON"
                yield bad(f"{what} is {name}", placed(what, put), words=words)

    for name, size in (("a header of 2^63", 2**63), ("of 100 MB", 10**8), ("of 2^64 - 1", 2**64 - 1)):
        yield bad(name, on(FILES["unet"], lambda c, size=size: struct.pack("<Q", size) + c[8:]))
    yield bad("terabytes declared, none there", on(FILES["unet"], huge_header), words="damaged")
    yield bad("a hole of 40 GB", lambda folder: files.hollow(fresh(folder / FILES["unet"]), {"x": ([10**10], "F32")}))
    yield bad("a million tensors of nothing", on(FILES["vae"], many_entries), words="damaged|unknown")

    for name, (file, content) in PICKLES.items():
        yield bad(f"pickle: {name}", hostile(file, content, world.root / CANARY), words="pickle|tokenizer|JSON|is a",
                  loaded=True)  # fmt: skip
    for suffix in ("ckpt", "bin", "pt", "pth", "pkl", "safetensors"):
        yield Case(f"pickle: one .{suffix}", ["info", f"m.{suffix}"],
                   lambda folder, s=suffix: (folder / f"m.{s}").write_bytes(bomb(world.root / CANARY)),
                   "refused", "pickle")  # fmt: skip

    for network, values in CONFIGS.items():
        for key in values:
            for value in drawn(ODD, len(n(6)), rng.randrange(2**32)):
                yield bad(f"{network}/config.json: {key} is {str(value)[:40]}", configured(network, {key: value}),
                          "any" if key in FREE else "same")  # fmt: skip
        for value in drawn(JSON, len(n(15)), rng.randrange(2**32)):
            if not isinstance(value, dict):
                yield bad(f"{network}/config.json is {str(value)[:40]}",
                          replaced(f"{network}/config.json", json.dumps(value).encode()), words="config.json")  # fmt: skip
        for name, text in JSONS.items():
            yield bad(f"{network}/config.json: {name}", replaced(f"{network}/config.json", text), words="config.json")
    for key in ("prediction_type", "beta_start", "num_train_timesteps", "beta_schedule", "trained_betas"):
        for value in drawn(ODD, len(n(6)), rng.randrange(2**32)):
            yield bad(f"scheduler: {key} is {str(value)[:40]}", scheduled({key: value}), "same")

    for name, change in TOKENIZERS.items():
        yield bad(f"tokenizer: {name}", change, "same", "tokenizer")
    for _ in n(12):
        at, other = rng.sample(range(48_000), 2)
        yield bad(
            "tokenizer: two words exchanged", tokenizer(exchanged(at, other)), "refused", "tokenizer", loaded=True
        )
        yield bad(
            "tokenizer.json: two words exchanged",
            tokenizer(exchanged(at, other), one_file),
            "refused",
            "tokenizer",
            loaded=True,
        )
        yield bad(
            "tokenizer: two merges exchanged",
            tokenizer(merges=(at % 48_000, other % 48_000)),
            "refused",
            "tokenizer",
            loaded=True,
        )

    for name, argv in MODELS.items():
        yield Case(f"--model {name}", argv, lambda folder: (folder / "empty").mkdir(), "refused")
    yield from alone(world, rng, n)


def alone(world: World, rng: random.Random, n: Any) -> Iterator[Case]:
    """Single files; without data, as the headers decide."""
    entries = files.manifest("single")
    kinds = {
        "no VAE": (lambda key: not key.startswith("first_stage_model."), "without its VAE|has no VAE"),
        "no text encoder": (lambda key: not key.startswith("cond_stage_model."), "without its text|has no text"),
        "the UNet alone": (lambda key: key.startswith("model.diffusion_model."), "only the UNet"),
        "the VAE alone": (lambda key: key.startswith("first_stage_model."), "only the VAE"),
        "the text encoder alone": (lambda key: key.startswith("cond_stage_model."), "only the text encoder"),
    }
    for name, (kept, words) in kinds.items():
        some = {key: entry for key, entry in entries.items() if kept(key)}
        yield Case(f"single file: {name}", edit(model="m.safetensors"),  # `info` says what such a file is
                   lambda folder, some=some: files.hollow(folder / "m.safetensors", some), "refused", words)  # fmt: skip
    names = sorted(entries)
    for _ in n(40):
        key = rng.choice(names)
        how = rng.choice(["gone", "renamed", "misshaped", "retyped"])
        yield Case(f"single file: {key} {how}", ["info", "m.safetensors"],
                   lambda folder, k=key, h=how: files.hollow(folder / "m.safetensors", altered(entries, k, h)),
                   "any")  # fmt: skip


def altered(entries: files.Entries, key: str, how: str) -> files.Entries:
    changed = dict(entries)
    shape, dtype = changed.pop(key)
    if how == "renamed":
        changed[key + "x"] = shape, dtype
    elif how == "misshaped":
        changed[key] = [*shape, 2], dtype
    elif how == "retyped":
        changed[key] = shape, "I32"
    return changed


# ---------------------------------------------------------------- bytes


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return entries, length


def on(file: str, change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    return lambda folder: damage(folder / file, change)


def replaced(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: fresh(folder / file).write_bytes(content) and None


def fresh(path: Path) -> Path:
    path.unlink(missing_ok=True)
    return path


def placed(file: str, put: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda folder: put(fresh(folder / file)) and None


def pipe(path: Path) -> None:
    os.mkfifo(path)


def plug(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


THINGS: dict[str, Callable[[Path], Any]] = {
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to its folder": lambda path: path.symlink_to("."),
    "a pipe": pipe,
    "a socket": plug,
    "gone": lambda path: None,
}
CONTENTS = {
    "empty": b"",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:"
    + b"0" * 64
    + b"\nsize 3438167534\n",
    "HTML": b"<!DOCTYPE html><html><body>404</body></html>",
    "HTML after blanks": b"\n\n  <html>",
    "a zip": b"PK\x03\x04" + bytes(99),
    "gzip": b"\x1f\x8b\x08" + bytes(99),
    "text": b"not found\n" * 9,
    "JSON": b'{"error": "Repository not found"}',
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "8 bytes": struct.pack("<Q", 2),
    "an empty header": struct.pack("<Q", 2) + b"{}",
    "a header that is a list": struct.pack("<Q", 2) + b"[]",
    "GGUF": b"GGUF" + bytes(99),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(99),
    "a PNG": b"\x89PNG\r\n\x1a\n" + bytes(99),
}


# ---------------------------------------------------------------- headers

Entries = dict[str, Any]


def reheaded(change: Callable[[Entries, random.Random], Any], seed: float) -> Callable[[bytearray], bytes]:
    """The same data under a changed header: a dict, or text where JSON's own functions would not write it."""

    def changed(content: bytearray) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        entries = json.loads(content[8 : 8 + length])
        entries.pop("__metadata__", None)
        made = change(entries, random.Random(seed))
        text = made if isinstance(made, bytes) else json.dumps(entries if made is None else made).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return changed


def entry_changed(**values: Callable[[Any], Any]) -> Callable[[Entries, random.Random], None]:
    def change(entries: Entries, rng: random.Random) -> None:
        entry = entries[rng.choice(sorted(entries))]
        for name, value in values.items():
            entry[name] = value(entry[name])

    return change


def twice(entries: Entries, rng: random.Random) -> bytes:
    key = rng.choice(sorted(entries))
    return json.dumps(entries).encode()[:-1] + f", {json.dumps(key)}: {json.dumps(entries[key])}}}".encode()


def twice_inside(entries: Entries, rng: random.Random) -> bytes:
    return json.dumps(entries).encode().replace(b'"dtype": "F32"', b'"dtype": "F16", "dtype": "F32"', 1)


def overlapping(entries: Entries, rng: random.Random) -> None:
    one, other = rng.sample(sorted(entries), 2)
    begin = entries[one]["data_offsets"][0]
    size = entries[other]["data_offsets"][1] - entries[other]["data_offsets"][0]
    entries[other]["data_offsets"] = [begin, begin + size]


HEADERS: dict[str, Callable[[Entries, random.Random], Any]] = {
    "a key twice": twice,
    "a key twice inside an entry": twice_inside,
    "overlapping tensors": overlapping,
    "offsets turned round": entry_changed(data_offsets=lambda v: v[::-1]),
    "negative offsets": entry_changed(data_offsets=lambda v: [-1, v[1] - v[0] - 1]),
    "offsets beyond the end": entry_changed(data_offsets=lambda v: [v[0] + 2**40, v[1] + 2**40]),
    "offsets of 10^400": entry_changed(data_offsets=lambda v: [v[0], 10**400]),
    "fractional offsets": entry_changed(data_offsets=lambda v: [v[0] + 0.5, v[1] + 0.5]),
    "offsets that are text": entry_changed(data_offsets=lambda v: [str(v[0]), str(v[1])]),
    "three offsets": entry_changed(data_offsets=lambda v: [*v, 0]),
    "true and false for offsets": entry_changed(data_offsets=lambda v: [False, True]),
    "a shape of 2^62": entry_changed(shape=lambda v: [2**62, 4]),
    "a negative shape": entry_changed(shape=lambda v: [-n for n in v] or [-1]),
    "a shape that is text": entry_changed(shape=lambda v: "x"),
    "a shape of lists": entry_changed(shape=lambda v: [v]),
    "a shape of 10^5 ones": entry_changed(shape=lambda v: [*v, *[1] * 10**5]),
    "an unknown dtype": entry_changed(dtype=lambda v: "Q4_0"),
    "no dtype": entry_changed(dtype=lambda v: None),
    "a dtype that is a list": entry_changed(dtype=lambda v: [v]),
    "a dtype that is an object": entry_changed(dtype=lambda v: {"a": v}),
    "half the width": entry_changed(dtype=lambda v: "F16"),
    "integers": entry_changed(dtype=lambda v: "I32"),
    "NaN": lambda entries, rng: json.dumps(entries).replace('"F32"', "NaN", 1).encode(),
    "an entry that is a list": lambda entries, rng: {**entries, "x": []},
    "an entry that is null": lambda entries, rng: {**entries, "x": None},
    "metadata that is no text": lambda entries, rng: {**entries, "__metadata__": {"a": 1}},
    "metadata that is a list": lambda entries, rng: {**entries, "__metadata__": [1]},
    "deep nesting": lambda entries, rng: b'{"a":' + b"[" * 10**5,
    "deep objects": lambda entries, rng: b'{"a":' * 10**5,
    "bytes that are no text": lambda entries, rng: b"{\xff\xfe}",
    "half a character": lambda entries, rng: {
        **entries,
        "\ud800": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    },
    "control characters": lambda entries, rng: {**entries, "\x1b[2J\x07": {"dtype": "Q", "shape": 0}},
}


def huge_header(content: bytearray) -> bytes:
    text = json.dumps({"conv_in.weight": files.entry([10**6, 10**6, 3, 3])}).encode()
    return struct.pack("<Q", len(text)) + text + content[-99:]


def many_entries(content: bytearray) -> bytes:
    entries = {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


# ---------------------------------------------------------------- weights

Tensors = dict[str, torch.Tensor]


def weights(file: str, change: Callable[[Tensors, random.Random], Any], seed: float) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / file)
        made = change(tensors, random.Random(seed))
        save_file(tensors if made is None else made, fresh(folder / file))

    return changed


def one_of(tensors: Tensors, rng: random.Random) -> str:
    return rng.choice(sorted(tensors))


def cast(dtype: torch.dtype) -> Callable[[Tensors, random.Random], Tensors]:
    return lambda tensors, rng: {key: tensor.to(dtype) for key, tensor in tensors.items()}


def poisoned(tensors: Tensors, rng: random.Random) -> None:
    values = tensors[one_of(tensors, rng)].view(-1)
    values[rng.randrange(len(values))] = rng.choice([math.nan, math.inf, -math.inf])


def enormous(tensors: Tensors, rng: random.Random) -> None:
    values = tensors[one_of(tensors, rng)].view(-1)
    values[rng.randrange(len(values))] = rng.choice([3e38, -3e38, 1e30, 1e-45, 1e10])


def misshaped(tensors: Tensors, rng: random.Random) -> None:
    key = one_of(tensors, rng)
    old = tensors[key]
    new = rng.choice([old[None], old[..., None, None, None], old.reshape(-1)[:-1], torch.zeros(0), torch.zeros(())])
    tensors[key] = new.contiguous().clone() if new.shape != old.shape else torch.zeros(3, 1, 2)


def retyped(tensors: Tensors, rng: random.Random) -> None:
    key = one_of(tensors, rng)
    tensors[key] = tensors[key].to(rng.choice([torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool]))


def gone(tensors: Tensors, rng: random.Random) -> None:
    del tensors[one_of(tensors, rng)]


def more(tensors: Tensors, rng: random.Random) -> None:
    tensors[rng.choice(["x", one_of(tensors, rng) + ".1", "../../x", "", "é\n\x1b[1m"])] = torch.zeros(2)


# ---------------------------------------------------------------- what would run


class Run:
    """Pickled, it writes a file when it is opened."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.path)!r}, 'w').write('x')",)


def bomb(canary: Path) -> bytes:
    return pickle.dumps(Run(canary))


PICKLES: dict[str, tuple[str, str]] = {
    "the UNet": (FILES["unet"], "keep"),
    "the text encoder": (FILES["text_encoder"], "keep"),
    "the UNet's twin alone": ("unet/diffusion_pytorch_model.bin", FILES["unet"]),
    "the text encoder's twin alone": ("text_encoder/pytorch_model.bin", FILES["text_encoder"]),
    "a config": ("unet/config.json", "keep"),
    "the vocabulary": ("tokenizer/vocab.json", "keep"),
    "tokenizer.json": ("tokenizer/tokenizer.json", "keep"),
}


def hostile(file: str, removed: str, canary: Path) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        if removed != "keep":
            (folder / removed).unlink()
        fresh(folder / file).write_bytes(bomb(canary))
        if file.endswith("vocab.json"):
            (folder / "tokenizer" / "merges.txt").write_bytes(bomb(canary))

    return change


# ---------------------------------------------------------------- configs

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**6), 10**12), st.floats(), st.text(max_size=20),
    st.sampled_from([0, -1, 10**400, 1e308, "NaN"]), st.lists(st.integers(-9, 99999), max_size=9),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), st.lists(st.lists(st.none()), max_size=2),
)  # fmt: skip
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=30)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=9), inner, max_size=4)),
)
# What a model may set otherwise: its pictures are other ones. Names and labels change nothing.
FREE = {"sample_size", "scaling_factor", "attention_head_dim", "norm_num_groups", "num_attention_heads"}
JSONS = {
    "empty": b"",
    "cut": b'{"a": ',
    "bytes": b"\xff\xfe\x00",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "nested": b"[" * 10**6,
    "nested objects": b'{"a":' * 10**6,
    "100 MB": b" " * 10**8,
    "a long number": b'{"in_channels": ' + b"9" * 10**5 + b"}",
    "two values": b"{} {}",
}


def configured(network: str, values: dict[str, Any]) -> Callable[[Path], None]:
    text = json.dumps(CONFIGS[network] | values)
    return replaced(f"{network}/config.json", text.encode())


def scheduled(values: dict[str, Any]) -> Callable[[Path], None]:
    return replaced("scheduler/scheduler_config.json", json.dumps(tiny.SCHEDULER | values).encode())


# ---------------------------------------------------------------- tokenizers


def two_files(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges))


def one_file(folder: Path, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
    model = {
        "type": "BPE", "dropout": None, "unk_token": "<|endoftext|>", "continuing_subword_prefix": "",
        "end_of_word_suffix": "</w>", "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
        "merges": [list(pair) for pair in merges],
    }  # fmt: skip
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}, {"type": "Lowercase"}]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
        "post_processor": {"type": "RobertaProcessing", "sep": ["<|endoftext|>", 49407],
                           "cls": ["<|startoftext|>", 49406], "trim_offsets": False, "add_prefix_space": False},
        "decoder": None, "model": model,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(whole))


def exchanged(at: int, other: int) -> Callable[[dict[str, int]], dict[str, int]]:
    def change(vocab: dict[str, int]) -> dict[str, int]:
        turn = {at: other, other: at}
        return {token: turn.get(i, i) for token, i in vocab.items()}

    return change


def tokenizer(
    words: Callable[[dict[str, int]], dict[str, int]] = dict, write: Any = two_files, merges: tuple[int, int] = (0, 0)
) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "tokenizer").mkdir()
        pairs = packaged_merges()
        vocab = build_vocab(pairs)
        a, b = merges
        pairs[a], pairs[b] = pairs[b], pairs[a]
        write(folder / "tokenizer", words(vocab), pairs)

    return change


def greedy(folder: Path) -> None:
    """A pattern that tries every way to split a word before it gives up."""
    tokenizer(write=one_file)(folder)
    path = folder / "tokenizer" / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["normalizer"]["normalizers"].append(
        {"type": "Replace", "pattern": {"Regex": "(a|a|ab|cat)*z"}, "content": "q"}
    )
    path.write_text(json.dumps(whole))


def renamed_words(folder: Path) -> None:
    """CLIP's words and a rule that turns one into another before they are looked up."""
    tokenizer(write=one_file)(folder)
    path = folder / "tokenizer" / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["normalizer"]["normalizers"].append({"type": "Replace", "pattern": {"String": "cat"}, "content": "dog"})
    path.write_text(json.dumps(whole))


def texts(**contents: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "tokenizer").mkdir()
        for name, text in contents.items():
            (folder / "tokenizer" / name.replace("_", ".")).write_text(text)

    return change


TOKENIZERS: dict[str, Callable[[Path], Any]] = {
    "as it should be": tokenizer(),
    "as it should be, in one file": tokenizer(write=one_file),
    "an empty folder": texts(),
    "empty files": texts(vocab_json="", merges_txt=""),
    "lists": texts(vocab_json="[]", merges_txt="[]"),
    "nested": texts(tokenizer_json="[" * 10**5),
    "numbers": texts(vocab_json='{"a": 1e400}', merges_txt="a b"),
    "HTML": texts(tokenizer_json="<html>"),
    "a file": lambda folder: (folder / "tokenizer").write_text("x"),
    "a pipe": lambda folder: ((folder / "tokenizer").mkdir(), os.mkfifo(folder / "tokenizer" / "tokenizer.json")),
    "zeros without end": lambda folder: (
        (folder / "tokenizer").mkdir(),
        (folder / "tokenizer" / "tokenizer.json").symlink_to("/dev/zero"),
    ),
    "100 MB": texts(tokenizer_json=" " * 10**8),
    "a pattern without end": greedy,
    "a rule that exchanges words": renamed_words,
}

MODELS = {
    "none": ["info", ""],
    "a folder of nothing": ["info", "empty"],
    "this folder": ["info", "."],
    "a picture": ["info", "in.png"],
    "the device of zeros": ["info", "/dev/zero"],
    "nothing that is there": edit(model="no/such/thing/here"),
    "a path with control characters": edit(model="\x1b[2Jx"),
    "a name of 5,000 characters": edit(model="x" * 5000),
    "a name with half a character": edit(model="\udcff"),
    "a URL": edit(model="https://huggingface.co/a/b"),
    "a path upwards": edit(model="../../../etc/passwd"),
}
