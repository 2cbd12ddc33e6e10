"""A result in one file: saved with all it computed, loaded, and gone on from, paying only for what changes.

The file is safetensors: tensors, and JSON in its metadata; opening one runs no code. It belongs to one model in one
dtype, known by the sha256 of the three networks' files. Any method's results fit: what a function returns is read by
its annotation, which may name tensors, numbers, texts, lists, tuples, dicts, `Path` and dataclasses.
"""

import hashlib
import json
import math
import pathlib
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..path import Path
from ..plans import GIVEN, INPUTS, Plan, blank_plan, function_at, plan
from ..result import Call, Result
from . import images
from .masks import checked
from .metadata import model_hash
from .unsupported import Header, read_header

if TYPE_CHECKING:
    from ..sd import StableDiffusion

FORMAT = 2
# What is kept of a Result, by type; the rest of it follows from that, from its settings and calls.
REST = ("method", "settings", "mask", "paste_mask", "plan", "calls", "sd", "inside", "witness")
HINTS = get_type_hints(Result, localns={"StableDiffusion": Any})
KEPT = {name: hint for name, hint in HINTS.items() if name not in REST}
# What a Path is made of, and what containers are of whose annotation does not say it.
OF_A_PATH: dict[str, Any] = {"latents": list[Tensor], "steps": int, "null": Tensor | None, "eta": float, "pinned": bool}
OF_A_PATH |= dict.fromkeys(("nulls", "noises", "sources"), dict[int, Tensor]) | {"sampler": str}
OF_ANY: dict[Any, Any] = {list: (Any,), dict: (str, Any), tuple: (Any, ...)}
# What may be raised where a made-up file is taken at its word.
UNSOUND = (ValueError, TypeError, LookupError, AttributeError, NameError, ArithmeticError, RecursionError)


def save_state(result: Result, path: str | PathLike[str]) -> None:
    """Write everything the result holds to `path` (.safetensors), whole or not at all.

    Raises ValueError for another ending, for a result that no picture went into, for what a file cannot hold, and for a
    model that was built in memory: it has no files to be known by.
    """
    check_name(pathlib.Path(path))
    if result.source is None:
        raise ValueError("no picture went into this result, so there is nothing to go on from; save its image instead")
    if result.inside is not None:
        raise ValueError("an edit with crop cannot be saved; save it without, then resume it with crop")
    given, steering, tensors = result.given_mask, result.steering, dict[str, Tensor]()
    calls = [call for call in result.calls if call.function in result.plan.functions.values()]
    others = [name for name, value in result.plan.given.items() if GIVEN[name].kind == "picture" and value is not None]
    pictures = {name: images.to_rgb(images.read_picture(result.plan.given[name])) for name in others}
    record = {
        "format": FORMAT,
        "settings": result.settings,
        "model": fingerprint(result.sd),
        "model_name": whole_name(result.sd.name),
        "vae_name": whole_name(result.sd.vae_name),
        "mask_edits": given is not None and bool((steering(given) if steering else given).any()),
        "content": {name: packed(getattr(result, name), name, tensors) for name in KEPT},
        "pictures": packed(pictures, "pictures", tensors),
        "calls": [[c.function, c.given, packed(c.result, f"calls.{i}", tensors)] for i, c in enumerate(calls)],
    }
    transposed = {name: one for name, one in tensors.items() if one.ndim == 4 and not one.is_contiguous()}
    last = torch.channels_last
    record["channels_last"] = [name for name, one in transposed.items() if one.is_contiguous(memory_format=last)]
    alone = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:  # what could not be read again is not written
        said = json.loads(json.dumps(record))
        check_record(said)
        unpacked_result(said, alone, result.sd)
    except UNSOUND as error:
        raise ValueError(f"this result cannot be saved: {error}") from error
    record["sha256"] = checksum(record, alone)
    images.write_whole(pathlib.Path(path), save(alone, {"minidiffedit": json.dumps(record)}))


def load_state(path: str | PathLike[str], sd: "StableDiffusion") -> Result:
    """What `save_state` wrote -> the Result, bit for bit, on the model's device; of its calls, those of its own method.

    Raises ValueError for anything else, damaged or tampered files, and a state of another model or dtype.
    """
    path = pathlib.Path(path)
    header, record = read_record(path)
    check_model(path, record, sd)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).to(copy=True) for name in header}  # a copy: the file may change
    if record.pop("sha256", None) != checksum(record, tensors):
        raise ValueError(f"{path} is damaged: its content does not have the sha256 it states; save the edit again")
    try:
        return unpacked_result(record, tensors, sd)
    except UNSOUND as error:
        raise refusal(path, error) from error


def read_record(path: pathlib.Path) -> tuple[Header, dict[str, Any]]:
    """The header and the JSON of a saved edit, checked as far as no model is needed; header["source"] is (H, W, 3).

    Raises ValueError, naming the path, for anything that is not one.
    """
    header = read_header(path, again="save the edit again")
    with safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get("minidiffedit")
    if said is None:
        raise ValueError(f"{path} is no saved edit; `minidiffedit edit --save-state` writes one")
    try:
        record = json.loads(said)
        check_record(record)
        if len(header["source"].shape) != 3 or min(header["source"].shape) < 1:
            raise ValueError("its picture has no pixels")
        if strange := {one.dtype for one in header.values()} - {"F64", "F32", "F16", "BF16", "I64", "U8", "BOOL"}:
            raise ValueError(f"it holds numbers of type {min(strange)}")
    except UNSOUND as error:
        raise refusal(path, error) from error
    return header, record


def shows_source(path: pathlib.Path, picture: pathlib.Path) -> bool:
    """Whether a file holds, pixel for pixel, the picture that a saved edit was made of."""
    try:
        pixels = np.array(images.to_rgb(images.read_picture(picture)))
    except ValueError:  # not there, or no picture
        return False
    with safe_open(path, framework="np") as file:
        source = file.get_slice("source")
        return source.get_shape() == [*pixels.shape] and bool((source[:] == pixels).all())


def plan_of(record: dict[str, Any], header: Header | None = None) -> Plan:
    """The plan that a state's record tells of. A mask and pictures given to it are in the file; small ones stand here
    for them, at which the cost is the same. Raises ValueError for settings that no run can have had.
    """
    settings, own = record["settings"], blank_plan(record["settings"]["method"])
    plain = {*own.options, *(name for name in own.given if GIVEN[name].kind not in ("mask", "picture"))}
    given = {name: settings[name] for name in settings.keys() & plain}
    given |= {name: Image.new("RGB", (64, 64)) for name in record["pictures"]}
    if record["content"]["given_mask"] is not None:
        given["mask"] = torch.full((1, 1, 8, 8), float(record["mask_edits"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were said when the edit was made
        return plan(settings["method"], **given)


# ---------------------------------------------------------------- values as JSON and tensors


def packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; its tensors go into `tensors`, each once, named by where it stands in the value."""
    if isinstance(value, Tensor):
        same = [known for known, one in tensors.items() if one is value]
        name = same[0] if same else name + "'" * (name in tensors)
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Image.Image):
        for part, key in (("profile", "icc_profile"), ("exif", "exif")):
            tensors[f"{name}.{part}"] = torch.tensor([*value.info.get(key, b"")], dtype=torch.uint8)
        return packed(torch.from_numpy(np.array(value)), name, tensors) | {"dpi": value.info.get("dpi")}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [packed(one, f"{name}.{i}", tensors) for i, one in enumerate(value)]
    if type(value) is Path:
        parts = {"latents": [*value.values()], "null": value.any_null}
        value = {part: parts[part] if part in parts else getattr(value, part) for part in OF_A_PATH}
    elif is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if not isinstance(value, dict):
        raise ValueError(f"{name} is a {type(value).__name__}, which a saved edit does not hold")
    return {str(key): packed(one, f"{name}.{key}", tensors) for key, one in value.items()}


def unpacked(said: Any, hint: Any, take: Callable[[str], Tensor]) -> Any:
    """A value of an annotated type from such JSON. Raises what UNSOUND names for what is none."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    for one in inner if kind in (types.UnionType, Union) else ():  # X | None
        if (one is types.NoneType) == (said is None):
            return unpacked(said, one, take)
    if kind is Any:
        kind = Tensor if isinstance(said, dict) and [*said] == ["tensor"] else type(said)
    inner = inner or OF_ANY.get(kind, ())
    if kind is Tensor:
        return take(said["tensor"])
    if kind is Image.Image:
        name = said["tensor"]
        return picture(take(name), take(f"{name}.profile"), take(f"{name}.exif"), said["dpi"])
    if isinstance(said, list) and kind in (list, tuple, Sequence):
        each = [inner[0]] * len(said) if kind is not tuple or inner[1:] == (...,) else inner
        return (tuple if kind is tuple else list)(unpacked(*one, take) for one in zip(said, each, strict=True))
    if isinstance(said, dict) and kind in (dict, Mapping):
        return {inner[0](key): unpacked(one, inner[1], take) for key, one in said.items()}
    if isinstance(said, dict) and (kind is Path or is_dataclass(kind)):
        parts = OF_A_PATH if kind is Path else get_type_hints(kind)
        make: Any = kind
        return make(**{part: unpacked(one, parts[part], take) for part, one in said.items()})
    if (type(said) is not kind and (type(said), kind) != (int, float)) or (kind is float and not math.isfinite(said)):
        raise ValueError(f"{str(said)[:60]} is no {getattr(kind, '__name__', kind)}")
    return said


def picture(pixels: Tensor, profile: Tensor, exif: Tensor, dpi: Any) -> Image.Image:
    """(H, W, 3), (n,) and (m,), all uint8 -> PIL RGB with its colour profile, EXIF data and dpi."""
    types, dims = {pixels.dtype, profile.dtype, exif.dtype}, (pixels.ndim, profile.ndim, exif.ndim)
    if dims != (3, 1, 1) or pixels.shape[2] != 3 or types != {torch.uint8}:
        raise ValueError(f"a picture must be uint8 (H, W, 3), got {pixels.dtype} {[*pixels.shape]}")
    made = Image.fromarray(pixels.cpu().numpy())
    parts = {"icc_profile": profile, "exif": exif}
    made.info = {"dpi": dpi, **{name: part.cpu().numpy().tobytes() for name, part in parts.items() if len(part)}}
    try:
        checked_exif = images.describing(made)
    except Exception as error:  # Pillow's EXIF parser raises whatever the damage leads to
        raise ValueError("the EXIF data of its picture are damaged") from error
    kept = {"exif": checked_exif, "dpi": images.dpi_of(made)}
    made.info = {name: value for name, value in (made.info | kept).items() if value}
    return made


def unpacked_result(record: dict[str, Any], tensors: dict[str, Tensor], sd: "StableDiffusion") -> Result:
    """The Result of a record and its tensors, all on the CPU. Raises what UNSOUND names for one that is not sound."""
    used: dict[str, Tensor] = {}

    def take(name: str) -> Tensor:
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"{name} holds NaN or infinity")
        last = tensors[name].ndim == 4 and name in record["channels_last"]  # the order in memory decides how sums round
        order = torch.channels_last if last else torch.preserve_format
        return used.setdefault(name, tensors[name].to(sd.device, memory_format=order))

    content = {name: unpacked(record["content"][name], hint, take) for name, hint in KEPT.items()}
    given = unpacked(record["pictures"], dict[str, Image.Image], take)
    calls = []
    for function, known_by, said in record["calls"]:
        hint = get_type_hints(function_at(function)).get("return", Any)
        calls.append(Call(function, known_by, unpacked(said, hint, take)))
    if strange := tensors.keys() - used.keys():
        raise ValueError(f"{min(strange)} is no part of it")
    settings, settled, M, source = record["settings"], plan_of(record), content["latent_mask"], content["source"]
    given |= {"mask": content["given_mask"]} if "mask" in settled.given else {}
    pasted = M is not None and settings["paste"] and content["stages"].get("decode")
    result = Result(
        method=settled.method,
        settings=settings,
        mask=None if M is None else images.mask_picture(checked(M), source.size),
        paste_mask=images.paste_mask(M, source.size) if pasted else None,
        plan=replace(settled, given=settled.given | given),
        calls=tuple(calls),
        sd=sd,
        **content,
    )
    check_sizes(result)
    return result


# ---------------------------------------------------------------- the doors


def checksum(record: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """sha256 of the record and the tensors: one bit that a disk turns would give another picture, silently."""
    found = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_name(path: pathlib.Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of a saved edit must end in .safetensors")


def refusal(path: pathlib.Path, error: Exception) -> ValueError:
    said = error if isinstance(error, ValueError) else f"it does not hold together ({error!r})"
    return ValueError(f"{path} cannot be used: {said}; save the edit again")


def check_record(record: dict[str, Any]) -> None:
    """Raise for a record that `save_state` cannot have written; the working size becomes a tuple again."""
    if record["format"] != FORMAT:
        by = "an older version" if record["format"] == 1 else "another version"
        raise ValueError(f"it was saved by {by} of minidiffedit (format {record['format']!r}, expected {FORMAT})")
    json.dumps(record, ensure_ascii=False).encode()  # raises for text that no file can hold
    settings, settled = record["settings"], plan_of(record)
    width, height = settings["working_size"]
    settings["working_size"] = (int(width), int(height))
    for function, given, _ in record["calls"]:
        if function not in settled.functions.values():
            raise ValueError(f"{function!r} is no function of {settled.method}")
        for name in given.keys() - INPUTS.keys():
            settled.options[name].check(given[name])
    texts = [settings["mask"], record["model_name"], record.get("vae_name", "")]
    beside = {"working_size", "mask", "steering", *record["pictures"]}
    if not (
        {name: value for name, value in settings.items() if name not in beside} == settled.record
        and all(isinstance(one, str) for one in texts)
        and record["content"]["verdict"].isprintable()
        and (type(record["model"]), type(record["mask_edits"])) == (dict, bool)
    ):
        raise ValueError("its settings contradict one another")


def check_sizes(result: Result) -> None:
    """Raise ValueError for pictures, masks, latents and texts whose sizes contradict the settings or one another."""
    sd, settings, size, steering = result.sd, result.settings, result.image.size, result.steering
    at, side = settings["working_size"], settings["size"] or sd.side  # by a compiled model in larger steps
    fitting = [images.working_size(size, side, step) for step in (sd.factor, 64) if min(size) >= step]
    if (result.source and result.source.size) != size or at not in fitting:
        raise ValueError(f"its pictures do not fit the working size {settings['working_size']}")
    if (steering.settings() if steering else {}) != settings.get("steering", {}):
        raise ValueError("its steering is not that of its settings")
    masks = [result.latent_mask, result.given_mask, result.heat]
    masks += [steering.union, steering.subtract] if steering else []
    latents, texts = [result.x0, result.latent], list[Any]()
    for stage in [*result.stages.values(), *result.clean.values()]:
        latents += stage
    for call in result.calls:
        if isinstance(path := call.result, Path):
            latents += [*path.values(), *(path.noises[j] for j in path.down() if path.noises)]
            texts += [path.any_null, *path.nulls.values()]
            texts += [half for one in path.sources.values() for half in one.split(77, dim=1)]
        elif call.function == result.plan.functions.get("mask"):
            masks += [call.result.mask] if call.result.verdict[0] else []
    w, h = (side // sd.factor for side in at)
    long = max([77, *(one.shape[1] for one in texts if one is not None and one.ndim == 3)])
    text = (1, long if long % 77 == 0 else 77, sd.unet.config.cross_attention_dim)
    known: list[tuple[Tensor, tuple[int, ...]]] = [(checked(one), (1, 1, h, w)) for one in masks if one is not None]
    known += [(one, text) for one in texts if one is not None]
    known += [(one, (1, sd.channels, h, w)) for one in latents if one is not None]
    for tensor, shape in known:
        if tensor.shape != shape:
            raise ValueError(f"a tensor is {[*tensor.shape]}, expected {[*shape]}")


# ---------------------------------------------------------------- the model


def fingerprint(sd: "StableDiffusion") -> dict[str, str]:
    """The hash of each network's file, the add-ons with theirs, and the dtype."""
    if sd.checkpoint is None:
        raise ValueError("a model that was built in memory has no files to tell it by; load it from a folder or file")
    hashes = {network: model_hash(part.path) for network, part in sd.checkpoint.parts.items()}
    predicts = {"prediction": "v"} if sd.prediction == "v" else {}  # one file may stand for both
    return hashes | sd.checkpoint.add_ons | {"dtype": str(sd.dtype).removeprefix("torch.")} | predicts


def whole_name(name: str) -> str:
    return str(here.resolve()) if name and (here := pathlib.Path(name)).exists() else name


def check_model(path: pathlib.Path, record: dict[str, Any], sd: "StableDiffusion") -> None:
    here, saved = fingerprint(sd), record["model"]
    options = {"dtype": f"--dtype {saved.get('dtype')}", "lora": "--lora", "embeddings": "--embedding"}
    for what in [*here, *sorted(saved.keys() - here.keys())]:
        missing = "epsilon" if what == "prediction" else "none"
        theirs, ours = saved.get(what, missing), here.get(what, missing)
        if theirs != ours:
            vae = record.get("vae_name") or ("" if sd.vae_name else None)
            advice = f"give the {options.get(what, '--model')} it was made with"
            if what == "vae" and vae is not None:
                advice = f"pass --vae {vae}" if vae else "leave out --vae"
            raise ValueError(f"{path} was made by another model: its {what} is {theirs}, here it is {ours}; {advice}")
