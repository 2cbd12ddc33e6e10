"""Saved edits that were cut, changed or made up."""

import json
import math
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minidiffedit.files.states import checksum

from .checkpoints import CONTENTS, HEADERS, JSON, ODD, THINGS, bomb, header_of, reheaded
from .harness import CANARY, QUICK, Case, World, drawn
from .pictures import flipped

Record = dict[str, Any]
Tensors = dict[str, torch.Tensor]
GO_ON = ["resume", "bad.safetensors", "--model", "MODEL", "-o", "out.png", "--json"]


def cases(world: World, rng: random.Random, scale: float) -> Iterator[Case]:
    saved = world.root / "saved.safetensors"
    made = world.run(
        Case("", ["edit", "in.png", *QUICK, "--model", "MODEL", "-o", "out.png", "--save-state", str(saved)])
    )
    assert made.outcome == "done", made
    content, (entries, length) = saved.read_bytes(), header_of(saved)
    with safe_open(saved, framework="pt") as file:
        record = json.loads(file.metadata()["minidiffedit"])
    tensors = load_file(saved)

    def n(count: int) -> range:
        return range(max(2, round(count * scale)))

    def bad(name: str, put: Callable[[Path], Any], expect: str = "refused", argv: list[str] = GO_ON) -> Case:
        return Case(name, argv, put, expect, "bad.safetensors|latent mask|pickle" if expect == "refused" else "")

    def changed(change: Callable[[Tensors, Record], Any]) -> Callable[[Path], None]:
        def put(folder: Path) -> None:
            some, said = {key: tensor.clone() for key, tensor in tensors.items()}, json.loads(json.dumps(record))
            change(some, said)
            said.pop("sha256", None)
            said["sha256"] = checksum(said, some)  # the right sum: as one would who means it
            save_file(some, folder / "bad.safetensors", {"minidiffedit": json.dumps(said)})

        return put

    def written(text: bytes) -> Callable[[Path], Any]:
        return lambda folder: (folder / "bad.safetensors").write_bytes(text)

    yield bad("as it should be", written(content), "same")
    ends = sorted({8 + length + entry["data_offsets"][i] for entry in entries.values() for i in (0, 1)})
    for at in [0, 1, 8, 9, 8 + length // 2, 8 + length, *ends[:-1], len(content) - 1]:
        yield bad(f"cut at {at}", written(content[:at]))
    for _ in n(120):
        yield bad("a bit flipped anywhere", written(flipped(content, rng)), "same")
    for _ in n(60):
        head = flipped(content[: 8 + length], rng)
        yield bad("a bit of the header flipped", written(head + content[8 + length :]), "same")
    for name, change in HEADERS.items():
        for _ in n(2):
            put = written(reheaded(change, rng.random())(bytearray(content)))
            yield Case(f"header: {name}", GO_ON, put, "refused")
    for name, text in CONTENTS.items():
        yield bad(name, written(text))
    for name, lay in THINGS.items():
        yield bad(name, lambda folder, lay=lay: lay(folder / "bad.safetensors"))
    yield bad("a pickle", written(bomb(world.root / CANARY)))

    for name in tensors:
        yield bad(f"{name} gone", changed(lambda t, r, k=name: t.pop(k)))
        yield bad(f"{name} of zeros", changed(lambda t, r, k=name: t[k].zero_()), "any")
        free = name.startswith("tensors.")  # what else a mask's function found: its own next cut of it would notice
        misshaped = changed(lambda t, r, k=name: t.update({k: t[k][None]}))
        yield bad(f"{name} misshaped", misshaped, "any" if free else "refused")
        yield bad(f"{name} of integers", changed(lambda t, r, k=name: t.update({k: t[k].int()})))
        for value in (math.nan, math.inf):
            if tensors[name].is_floating_point():
                yield bad(f"{name} holds {value}", changed(lambda t, r, k=name, v=value: t[k].view(-1)[0].fill_(v)))
    yield bad("a tensor more", changed(lambda t, r: t.update({"../x": torch.zeros(1)})))
    paths = [*places(record)]
    named = [path for path in paths if len(path) <= 2 or path[0] == "calls"]
    for path in [*named, *rng.sample(paths, min(len(paths), len(n(60))))]:
        yield bad(f"without {path}", changed(lambda t, r, p=path: within(r, p[:-1]).pop(p[-1])), "any")
        for value in drawn(st.one_of(ODD, JSON), len(n(3)), rng.randrange(2**32)):
            put = changed(lambda t, r, p=path, v=value: within(r, p[:-1]).__setitem__(p[-1], v))
            yield bad(f"{path} is {str(value)[:30]}", put, "any")
    for name in ("/etc/passwd", "../../x", "\x1b[2J", "https://example.org/x", "a/b", "", "in.png", "/dev/zero"):
        yield bad(f"its model is {name!r}", changed(lambda t, r, v=name: r.update(model_name=v)), "refused",
                  ["resume", "bad.safetensors", "-o", "out.png"])  # fmt: skip
    for text in (b"", b"[]", b"null", b"1", b'"x"', b"[" * 10**5, b'{"format": 1}', b"\xff", b"{}" * 2, b"NaN"):
        yield bad(f"a record {text[:9]!r}", written(metadata(text)))
    for extra in (["--strength", "2"], ["--mask-threshold", "nan"], ["--target", "\udcff"], ["--steps", "0"], ["--eta", "1"],
                  ["-o", "bad.safetensors"], ["--mask", "small.png"], ["--union", "none.png"]):  # fmt: skip
        yield Case(
            f"sound, {extra}", [*GO_ON, *extra], lambda folder: (written(content)(folder), small(folder)), "refused"
        )


def small(folder: Path) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "small.png")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a record, at every depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def within(record: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        record = record[key]
    return record


def metadata(text: bytes) -> bytes:
    """A sound file with one picture and this for its record, which need not be text."""
    said = json.dumps(text.decode(errors="replace")).encode()
    if text == b"\xff":
        said = b'"\xff"'
    head = b'{"__metadata__": {"minidiffedit": ' + said + b'}, "source": {"dtype": "U8", "shape": [1, 1, 3], '
    head += b'"data_offsets": [0, 3]}}'
    return struct.pack("<Q", len(head)) + head + bytes(3)
