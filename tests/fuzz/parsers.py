"""The readers of foreign text, fuzzed along what they run: an input that reaches a new line after another is kept and
changed further. `make fuzz-parsers MINUTES=10`; what it finds is mended and becomes a test.

A reader may raise ValueError or OSError, within seconds; what it accepts must hold what its `see` says.
"""

import atexit
import json
import math
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

import tiny
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from stubs import Model

from minidiffedit import options, plans, prompts, run
from minidiffedit.checkpoint import open_checkpoint
from minidiffedit.files import addons, configs, states, unsupported
from minidiffedit.many import datasets, manifest
from minidiffedit.methods import words

SLOW = 5.0  # seconds that a reader may take for a text this long
LONGEST = 12000  # bytes of an input
ODD: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    1.5,
    10**30,
    10**400,
    1e999,
    "",
    "x",
    "nan",
    [],
    [1],
    {},
    {"a": 1},
    "\ud800",
    "\0",
    "a/b",
    [[]],
)
Edge = tuple[str, int, int]  # a file, and two of its lines that ran one after the other


@dataclass
class Target:
    """see: reads bytes, and raises AssertionError where what it read cannot be. modules: whose lines are followed."""

    see: Callable[[bytes, Path], None]
    seeds: list[bytes]
    modules: tuple[ModuleType, ...]
    tokens: tuple[str, ...] = ()
    reached: set[Edge] = field(default_factory=set)


# ---------------------------------------------------------------- the readers


def header(content: bytes, folder: Path) -> None:
    path = folder / "a.safetensors"
    path.write_bytes(content)
    found = unsupported.read_header(path)
    with safe_open(path, framework="np") as file:
        assert {*file.keys()} == {*found}, "other tensors than the library's"
        assert all(tuple(file.get_slice(name).get_shape()) == tuple(one.shape) for name, one in found.items())
    for whole, vae in ((True, True), (True, False), (False, False)):  # what its names and shapes say it is
        with suppress(ValueError):
            unsupported.refuse_header(path, found, whole, vae)
    assert unsupported.input_channels(found) >= 0
    str(unsupported.add_on(found))


@cache
def checkpoint() -> Any:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return open_checkpoint(tiny.write_folder(folder, unet=tiny.QUICK))


def add_on(content: bytes, folder: Path) -> None:
    """The header of a LoRA or of a learned word, against a model."""
    path, found = folder / "a.safetensors", checkpoint()
    path.write_bytes(content)
    with suppress(ValueError):
        word = addons.read_word(path, found)
        assert 1 <= word.count <= 75 and word.word.isprintable()
    made = addons.read_lora(path, 1.0, found)
    for (network, name), (keys, factor) in made.layers.items():
        assert {"down", "up"} <= keys.keys() and math.isfinite(factor) and name in found.parts[network].shapes


def adapter(content: bytes, folder: Path) -> None:
    """What peft notes in a LoRA's file."""
    said = addons.adapter_settings(folder, content.decode(errors="replace"))
    for network, name in (("unet", "mid_block.attentions.0.proj_in.weight"), ("text_encoder", "encoder.x.weight")):
        assert math.isfinite(addons.adapter_factor(said, network, name, 4)), "a scale that is no number"


@cache
def saved() -> tuple[bytes, bytes, bytes, Model]:
    """A sound saved edit, before, in and after its JSON, and its model. What a file's maker can put right, the sum and
    the model's hash, is let through.
    """
    model, folder = Model(), Path(tempfile.mkdtemp())
    model.unet, model.vae_name = SimpleNamespace(config=SimpleNamespace(cross_attention_dim=8)), ""
    states.fingerprint, states.checksum, states.check_model = (lambda *_: {}), (lambda *_: None), (lambda *_: None)
    made = run.edit(model, Image.new("RGB", (64, 64), "red"), target="a", source="b", steps=2, maps=1, seed=3)
    states.save_state(made, folder / "a.safetensors")
    content = (folder / "a.safetensors").read_bytes()
    shutil.rmtree(folder)
    (length,) = struct.unpack("<Q", content[:8])
    head = json.loads(content[8 : 8 + length])
    record = head.pop("__metadata__")["minidiffedit"]
    return json.dumps(head).encode()[1:], record.encode(), content[8 + length :], model


def state(content: bytes, folder: Path) -> None:
    """The JSON of a saved edit, whose tensors are sound: what is read of it can be saved, and is then the same."""
    path, (rest, _, tensors, model) = folder / "a.safetensors", saved()
    said = json.dumps(content.decode(errors="replace")).encode()
    head = b'{"__metadata__": {"minidiffedit": ' + said + b"}, " + rest
    path.write_bytes(struct.pack("<Q", len(head)) + head + tensors)
    read = states.load_state(path, model)
    assert read.plan.record.items() <= read.settings.items(), "another plan than the record's"
    try:
        states.save_state(read, folder / "b.safetensors")
    except ValueError as error:
        raise AssertionError(f"what was read cannot be saved: {error}") from error
    again = states.load_state(folder / "b.safetensors", model)
    assert again.settings == read.settings and again.latent.equal(read.latent), "saved and read again it is another"


def data_set(content: bytes, folder: Path) -> None:
    """PIE-Bench's file, and that of scenes."""
    (folder / "scenes.json").unlink(missing_ok=True)
    (folder / ("scenes.json" if content[:1] == b"[" else "mapping_file.json")).write_bytes(content)
    for item in datasets.open_dataset(folder):
        assert all(map(options.is_text, (item.name, item.source, item.target, item.kind, str(item.picture))))
        if isinstance(item.mask, tuple):
            truth = item.truth((512, 512))
            assert truth is not None and truth[0].all()


def config(content: bytes, folder: Path) -> None:
    """A network's config.json, and a scheduler's."""
    path = folder / "config.json"
    path.write_bytes(content)
    for network in configs.KINDS:
        with suppress(ValueError):
            read = vars(configs.read_config(network, path))
            sizes = [one for value in read.values() for one in (value if isinstance(value, tuple) else [value])]
            assert all(0 < one <= 10**6 for one in sizes), "a size that no network has"
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_bytes(content)
    configs.prediction_of(folder)
    configs.check_fixed(path, configs.read_json(path), configs.FIXED["scheduler"])


def table(suffix: str) -> Callable[[bytes, Path], None]:
    def see(content: bytes, folder: Path) -> None:
        path = folder / f"m.{suffix}"
        path.write_bytes(content)
        rows = manifest.read_manifest(path, {"steps": 2})
        assert [row.number for row in rows] == [*range(1, len(rows) + 1)]
        for row in rows:
            try:
                chosen = row.options()
                found = {name: value for name, value in chosen.items() if name not in ("image", "output")}
                run.plan(**{name: value for name, value in found.items() if name not in manifest.FILES})
                manifest.files_of(row.own, folder)
            except (ValueError, OSError):
                continue

    return see


def prompt(syntax: str) -> Callable[[bytes, Path], None]:
    def see(content: bytes, folder: Path) -> None:
        text = content.decode(errors="ignore")
        parts = prompts.parts_of(text, syntax)
        assert all(abs(weight) <= 1000 for _, weight in parts), "a weight beyond 1000"
        chunks = prompts.chunks_of(words.tokenizer(), text, syntax)
        assert chunks and all(len(chunk) <= prompts.ROOM for chunk in chunks), "a chunk that is too long"
        letters = iter(text)
        if syntax == "a1111":  # what is spoken stands in the text, in that order
            assert all(c in letters for one, _ in parts for c in one or ""), "letters that the text has not"
        if not set(text) & set('()[]\\:"+-.,') and "BREAK" not in text:
            assert prompts.spoken(text, syntax).split() == text.split(), "plain words read otherwise"

    return see


def points(content: bytes, folder: Path) -> None:
    text = content.decode(errors="ignore")
    once = run.check_given("points", text)
    assert run.check_given("points", once) == once, "points that change as they are read again"


def lists(content: bytes, folder: Path) -> None:
    """Options that list words and numbers, and values as a shell gives them."""
    text = content.decode(errors="ignore")
    for one in (options.Option("a", 1, int, low=0, high=9), options.Option("a", 1.0, float, low=0, high=9, none=True),
                options.Option("a", True, bool), options.Option("a", "", str)):  # fmt: skip
        try:
            value = one.check(one.parse(text))
        except ValueError:
            continue
        assert value is None or one.check(one.parse(str(value))) == value, "a value that changes as it is read again"
    assert all(-1000 <= number <= 1000 for number in words.numbered("a", text).values())


# ---------------------------------------------------------------- where they begin


def targets() -> dict[str, Target]:
    rows = [
        {"image": "in.png", "target": "a", "steps": 2, "output": "b.png"},
        {"image": "a.png", "method": "masactrl", "target": "b"},
    ]
    head = json.dumps(
        {"a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}, "__metadata__": {"b": "c"}}
    ).encode()
    in_json = (
        '"',
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        "null",
        "true",
        "1e999",
        "NaN",
        "-1",
        "\\ud800",
        "\\u0000",
        '"dtype"',
        '"shape"',
        "[0, 0]",
    )
    marks = (
        "(",
        ")",
        "[",
        "]",
        "\\",
        ":1.3)",
        ":",
        "BREAK",
        "AND",
        "|",
        "+",
        "-",
        '"',
        ".5",
        "++",
        "<lora:x:1>",
        ", ",
        ".and(",
        "\n",
    )
    readers = (prompts, words)
    a1111 = [b"a (cat:1.3) on [grass], ((big)) \\(sic\\) BREAK a dog", b"(a:1.1", b"[a|b]"]
    compel = [b'a cat++ on (green grass)1.3, "a dog"- and. more', b"(a (b)+)-", b'"a']
    lines = "\n".join(map(json.dumps, rows)).encode()
    comma = b'image,target,steps,method\nin.png,a,2,diffedit\nb.png,"a, ""b""",3,\n'
    layer, down, up = (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        torch.ones(2, 16),
        torch.ones(16, 2),
    )
    peft = (
        b'{"unet.lora_alpha": 4, "unet.alpha_pattern": {"proj_in": 8}, "unet.use_rslora": true, "unet.use_dora": false}'
    )
    new = {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    kohya = "lora_" + layer.replace(".", "_")
    old = {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up, f"{kohya}.alpha": torch.ones(())}
    added = [save(new, {"lora_adapter_metadata": peft.decode()}), save(old), save({"<a>": torch.ones(2, 24)})]
    own = [json.dumps(one).encode() for one in (*tiny.CONFIGS.values(), tiny.SCHEDULER)]
    texts = {"original_prompt": "a [cat]", "editing_prompt": "a [dog]", "image_path": "1.jpg", "editing_type_id": "1"}
    pie = json.dumps({"1": texts | {"mask": [0, 5, 600, 9]}}).encode()
    scenes = json.dumps([{"folder": "a", "source": "a cat", "target": "a dog", "kind": "b"}]).encode()
    return {
        "add-on": Target(add_on, added, (addons, unsupported), in_json),
        "adapter": Target(adapter, [peft], (addons,), in_json),
        "config": Target(config, own, (configs,), in_json),
        "data-set": Target(data_set, [pie, scenes], (datasets,), in_json),
        "header": Target(header, [struct.pack("<Q", len(head)) + head + bytes(8)], (unsupported,), in_json),
        "state": Target(state, [saved()[1]], (states, plans, options), in_json),
        "manifest.jsonl": Target(
            table("jsonl"), [lines], (manifest, plans, options), (*in_json, "\n", "image", "method", "edits")
        ),
        "manifest.csv": Target(
            table("csv"), [comma], (manifest, plans, options), (",", '"', "\n", "\r", "edits", "points", "mask")
        ),
        "a1111": Target(prompt("a1111"), a1111, readers, marks),
        "compel": Target(prompt("compel"), compel, readers, marks),
        "points": Target(points, [b"9,9=>40,30; 1.5,2=>3,4"], (plans,), (",", "=>", ";", "nan", "1e9", "-", "_")),
        "lists": Target(
            lists, [b"zebra=2, grass=.5", b"none", b"7", b"yes"], (options, words), ("=", ",", "nan", "-1", "_", "1e3")
        ),
    }


# ---------------------------------------------------------------- the loop


def run_readers(seconds: float, number: int, only: str | None = None, say: Callable[[str], None] = print) -> int:
    """How many faults there are, each said once with its input; the time is shared by the readers."""
    manifest.columns = cache(manifest.columns)  # of the whole table, which no input changes
    chosen, faults = {name: one for name, one in targets().items() if only in (None, name)}, 0
    if not chosen:
        raise SystemExit(f"error: no reader {only!r}; there are {', '.join(targets())}")
    with tempfile.TemporaryDirectory() as folder:
        for name, target in chosen.items():
            rng, tried, known = random.Random(f"{number} {name}"), 0, set[str]()
            corpus, start, latest = [*target.seeds], time.monotonic(), 0.0
            for content in inputs(corpus, target, rng):
                spent = time.monotonic() - start
                if tried >= len(target.seeds) and spent > seconds / len(chosen):
                    break
                new, fault = tried_on(target, content, Path(folder))
                tried += 1
                latest = spent if new else latest
                corpus += [content] if new and content not in target.seeds else []
                if fault and fault.splitlines()[-1] not in known:
                    known.add(fault.splitlines()[-1])
                    say(f"{name}: {content[:300]!r}: {fault}")
            say(f"{name:<15}{tried:>8} inputs{len(corpus):>6} kept{len(target.reached):>6} edges, the latest after "
                f"{latest:.0f} s{len(known):>4} faults")  # fmt: skip
            faults += len(known)
    return faults


def inputs(corpus: list[bytes], target: Target, rng: random.Random) -> Iterator[bytes]:
    """The seeds, then changes of what was kept, the latest more often."""
    yield from target.seeds
    while True:
        content = corpus[max(rng.randrange(len(corpus)), rng.randrange(len(corpus)))]
        for _ in range(2 ** rng.randrange(4)):
            content = changed(content, corpus, target, rng)[:LONGEST]
        yield content


def changed(content: bytes, corpus: list[bytes], target: Target, rng: random.Random) -> bytes:
    at, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    kind = rng.randrange(7)
    if kind == 0 and content:
        return content[: at - 1] + bytes([rng.randrange(256)]) + content[at:] if at else content
    if kind == 1:
        return content[:at] + content[end:]
    if kind == 2:
        return content[:end] + content[at:end] * rng.choice((1, 1, 2, 50)) + content[end:]
    if kind == 3:
        other = rng.choice(corpus)
        return content[:at] + other[rng.randrange(len(other) + 1) :]
    if kind == 4 and target.tokens:
        return content[:at] + rng.choice(target.tokens).encode(errors="replace") + content[at:]
    if kind == 5 and (digits := [i for i, byte in enumerate(content) if 48 <= byte <= 57]):
        i = rng.choice(digits)
        return (
            content[:i] + rng.choice((b"0", b"-1", b"7", b"65536", b"99999999999999999999", b"1e9")) + content[i + 1 :]
        )
    return in_json(content, rng)


def in_json(content: bytes, rng: random.Random) -> bytes:
    """One value of a JSON text exchanged, left out or named otherwise, where the input holds one."""
    start = content.find(b"{")
    try:
        read, length = json.JSONDecoder().raw_decode(content[start:].decode() if start >= 0 else "")
        holder = rng.choice([*holders(read)])
        key = rng.choice([*holder] if isinstance(holder, dict) else [*range(len(holder))])
        if isinstance(holder, dict) and rng.random() < 0.3:
            holder[rng.choice((*holder, "x"))] = holder.pop(key)
        elif rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = rng.choice(ODD)
        put = json.dumps(read).encode()
    except (ValueError, IndexError, RecursionError):
        return content
    rest = content[start:].decode()[length:].encode()
    prefix = struct.pack("<Q", len(put)) if start == 8 else content[:start]  # of a header: its length
    return prefix + put + rest


def holders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list) and value:
        yield value
        for one in value.values() if isinstance(value, dict) else value:
            yield from holders(one)


def tried_on(target: Target, content: bytes, folder: Path) -> tuple[bool, str]:
    """Whether a new edge was reached, and what is wrong."""
    watched, before = {module.__file__ for module in target.modules}, len(target.reached)
    last: dict[int, int] = {}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if name not in watched:
            return None
        if event == "line":
            target.reached.add((str(name), last.get(id(frame), 0), frame.f_lineno))
            last[id(frame)] = frame.f_lineno
        return trace

    took, fault = timed(target, content, folder, trace)
    if took > SLOW and (took := timed(target, content, folder, None)[0]) > SLOW:  # following the lines is slow, too
        fault = fault or f"slow: {took:.0f} s"
    return len(target.reached) > before, fault


def timed(target: Target, content: bytes, folder: Path, trace: Any) -> tuple[float, str]:
    """Seconds, and what it raised that no reader may."""
    start, fault = time.process_time(), ""
    sys.settrace(trace)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.see(content, folder)
    except (ValueError, OSError):
        pass
    except Exception:
        fault = traceback.format_exc(limit=-3)
    finally:
        sys.settrace(None)
    return time.process_time() - start, fault
