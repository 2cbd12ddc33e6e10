"""An edit in one file: saved with all it computed, loaded, and gone on from, paying only for what changes.

The file is safetensors: tensors, and JSON in its metadata; opening one runs no code. It belongs to one model in one
dtype, told by the sha256 of the three networks' files.
"""

import hashlib
import inspect
import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from . import images
from ..ddim import Trajectory, level_at
from ..diffedit import Mask, Track, threshold_maps
from ..editor import NOTHING, OF_THE_ENCODING, OF_THE_MAPS, Edit, Picture, check_settings, edit, predicted_rows
from .metadata import model_hash
from .unsupported import Header, read_header
from .masks import Steering, checked

if TYPE_CHECKING:
    from ..sd import StableDiffusion

FORMAT = 1
# The arguments of `edit` that are plain values.
HANDLES = {"sd", "image", "mask", "steering", "reuse", "record", "track"}
ARGUMENTS = [name for name in inspect.signature(edit).parameters if name not in HANDLES]
MASK_ARGUMENTS = {"mask_strength", "maps", "mask_clip", "mask_threshold"}
SHAPING = ("largest", "invert", "dilate", "feather")
FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def save_state(edit: Edit, path: str | Path) -> None:
    """Write everything the edit computed to `path` (.safetensors), whole or not at all.

    Raises ValueError for another ending, for what `edit` did not make (an `arm` of the ablation), and for a model that
    was built in memory: it has no files to be told by.
    """
    check_name(Path(path))
    tensors = {
        "source": pixels(edit.source), "image": pixels(edit.image), "latent_mask": edit.latent_mask,
        "trajectory": torch.cat([edit.trajectory[j] for j in edit.trajectory]),
    }  # fmt: skip
    if edit.decoded:
        tensors["decoded"] = torch.cat(edit.decoded)
    if profile := edit.source.info.get("icc_profile"):
        tensors["icc_profile"] = torch.frombuffer(bytearray(profile), dtype=torch.uint8)
    steering, found = edit.steering, edit.found
    optional = {"given": edit.given}
    if found:
        optional |= {"maps": found.maps, "flat_below": found.flat_below, "reference": found.reference}
    if steering:
        optional |= {"union": steering.union, "subtract": steering.subtract}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    record = {
        "format": FORMAT,
        "settings": edit.settings, "verdict": edit.verdict, "evaluations": edit.evaluations, "seconds": edit.seconds,
        "model": fingerprint(edit.sd), "model_name": model_name(edit.sd),
        "steering": steering and {name: getattr(steering, name) for name in SHAPING},
    }  # fmt: skip
    try:
        check_record(json.loads(json.dumps(record)))
    except (ValueError, KeyError) as error:
        raise ValueError(f"only what `edit` or `resume` made can be saved: {error}") from error
    alone = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    record["sha256"] = checksum(record, alone)
    images.write_whole(Path(path), save(alone, {"minidiffedit": json.dumps(record, sort_keys=True)}))


def load_state(path: str | Path, sd: "StableDiffusion") -> Edit:
    """What `save_state` wrote -> the Edit, bit for bit (its found mask, from the maps), on the model's device.

    Raises ValueError for anything else, damaged or tampered files, and a state of another model or dtype.
    """
    path = Path(path)
    header, record = read_record(path)
    check_model(path, record["model"], sd)
    settings = record["settings"]
    check_tensors(path, header, settings, sd)
    with safe_open(path, framework="pt") as file:
        t = {name: file.get_tensor(name).to(copy=True) for name in header}  # a copy: the file may change
    if record.pop("sha256", None) != checksum(record, t):
        raise ValueError(f"{path} is damaged: its content does not have the sha256 it states; save the edit again")
    for name, tensor in t.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{path}: {name} holds NaN or infinity; save the edit again")
        t[name] = tensor if tensor.dtype == torch.uint8 else tensor.to(sd.device)
    for name in {"latent_mask", "given", "union", "subtract"} & t.keys():
        checked(t[name])
    M, trajectory = t["latent_mask"], Trajectory(t["trajectory"].split(1), settings["steps"])
    decoded = t["decoded"].split(1) if "decoded" in t else ()
    source, image = picture(t["source"], t.get("icc_profile")), picture(t["image"], t.get("icc_profile"))
    pasted = settings["paste"] and decoded
    shaping = record["steering"]
    return Edit(
        source=source, image=image, mask=images.mask_picture(M, source.size),
        paste_mask=images.paste_mask(M > 0, source.size) if pasted else None, x0=trajectory[0],
        latent=decoded[-1] if decoded else trajectory[0], latent_mask=M, found=found_mask(t, settings),
        trajectory=trajectory, decoded=decoded, verdict=record["verdict"], seed=settings["seed"],
        evaluations=record["evaluations"], seconds=record["seconds"], settings=settings, sd=sd, given=t.get("given"),
        steering=None if shaping is None else Steering(**shaping, union=t.get("union"), subtract=t.get("subtract")),
    )  # fmt: skip


def resume(
    state: Edit,
    *,
    mask: Picture | Tensor | None = None,
    steering: Steering | None = None,
    record: dict[str, list[Tensor]] | None = None,
    track: Track | None = None,
    **changes: Any,
) -> Edit:
    """The edit again with some of `edit`'s arguments changed, equal to a fresh one to the model's rounding.

    A given mask stays until another comes or an argument of the computed mask does; so does the steering.
    Model rows, of n maps and K levels: another threshold or clip, mask, steering, smaller strength, guidance or
    negative prompt 2 K; another target n more; other arguments what a fresh edit pays, less what they leave untouched.
    Raises as `edit` does.
    """
    kept = mask is None and not changes.keys() & MASK_ARGUMENTS
    arguments: dict[str, Any] = {name: state.settings[name] for name in ARGUMENTS} | changes
    done = edit(
        state.sd, state.source, mask=state.given if kept else mask, steering=steering or state.steering, reuse=state,
        record=record, track=track, **arguments,
    )  # fmt: skip
    if kept:
        done.settings["mask"] = state.settings["mask"]  # which may name the file
    return done


def resumed_rows(
    header: Header, record: dict[str, Any], changes: dict[str, Any], *, given: bool = False, nothing: bool = False
) -> dict[str, int]:
    """The model rows that `resume` will pay by stage, from what `read_record` returned, where it finds something to
    edit; given, nothing: as in `editor.predicted_rows`, of the mask that comes with the changes.
    """
    before = record["settings"]
    settings = {name: before[name] for name in ARGUMENTS} | changes
    settings["encoded_text"] = settings["source"] if settings["encode_text"] == "source" else ""

    def same(*names: str) -> bool:
        return all(settings[name] == before[name] for name in names)

    given = given or ("given" in header and not changes.keys() & MASK_ARGUMENTS)
    rows = predicted_rows(settings, given=given, nothing=nothing)
    if rows["mask"] and "maps" in header and same(*OF_THE_MAPS):
        rows["mask"] = 0 if same("target") else settings["maps"] * (1 if "reference" in header else 2)
    if same(*OF_THE_ENCODING) and level_at(settings["strength"], settings["steps"]) < header["trajectory"].shape[0]:
        rows["encode"] = 0
    return rows


# ---------------------------------------------------------------- the doors


def checksum(record: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """sha256 of the record and the tensors: one bit that a disk turns would give another picture, silently."""
    found = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_name(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of a saved edit must end in .safetensors")


def read_record(path: Path) -> tuple[Header, dict[str, Any]]:
    """The header and the JSON of a saved edit, checked as far as no model is needed.

    Raises ValueError, naming the path, for anything that is not one.
    """
    header = read_header(path)
    with safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get("minidiffedit")
    if said is None:
        raise ValueError(f"{path} is no saved edit; `minidiffedit edit --save-state` writes one")
    try:
        record = json.loads(said)
        check_record(record)
        if "source" not in header or len(header["source"].shape) != 3 or min(header["source"].shape) < 1:
            raise ValueError("there is no picture")
        if "trajectory" not in header or len(header["trajectory"].shape) != 4:
            raise ValueError("there is no trajectory")
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: its settings are not sound ({error!r}); save the edit again") from error
    return header, record


def check_record(record: dict[str, Any]) -> None:
    """Raise for a record that `save_state` cannot have written; lists become tuples again."""
    if record["format"] != FORMAT:
        raise ValueError(f"it has format {record['format']}, expected {FORMAT}")
    settings = record["settings"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were said when the edit was made
        plain = check_settings({name: settings[name] for name in ARGUMENTS})
    width, height = settings["working_size"]
    settings |= plain | {"working_size": (int(width), int(height))}
    encoded = settings["source"] if settings["encode_text"] == "source" else ""
    numbers = [*record["evaluations"].values(), *record["seconds"].values(), settings["seed"]]
    shaping = {} if record["steering"] is None else record["steering"]
    Steering(**shaping)
    if not (
        isinstance(settings["paste"], bool)
        and isinstance(record["model"], dict)
        and settings["encoded_text"] == encoded
        and isinstance(settings["mask"], str)
        and record["verdict"] in NOTHING
        and all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        and shaping.keys() <= {*SHAPING}
        and isinstance(record.get("model_name", ""), str)
    ):
        raise ValueError("they contradict one another")


def fingerprint(sd: "StableDiffusion") -> dict[str, str]:
    """The hash of each network's file, and the dtype."""
    if sd.checkpoint is None:
        raise ValueError("a model that was built in memory has no files to tell it by; load it from a folder or file")
    hashes = {network: model_hash(part.path) for network, part in sd.checkpoint.parts.items()}
    return hashes | {"dtype": str(sd.dtype).removeprefix("torch.")}


def model_name(sd: "StableDiffusion") -> str:
    """What `load` was asked for; a path in full, so that it holds from any folder."""
    return str(Path(sd.name).resolve()) if Path(sd.name).exists() else sd.name


def check_model(path: Path, saved: dict[str, str], sd: "StableDiffusion") -> None:
    here = fingerprint(sd)
    for what, ours in here.items():
        theirs = saved.get(what)
        if theirs != ours:
            advice = f"pass --dtype {theirs}" if what == "dtype" else "give the --model it was made with"
            raise ValueError(f"{path} was made by another model: its {what} is {theirs}, here it is {ours}; {advice}")


def check_tensors(path: Path, header: Header, settings: dict[str, Any], sd: "StableDiffusion") -> None:
    """Raise ValueError for a tensor that is missing, unknown, or not of the type and shape that the settings imply."""
    try:
        needed, optional = expected_tensors(header, settings, sd)
        if missing := needed.keys() - header.keys():
            raise ValueError(f"{', '.join(sorted(missing))} missing")
        for name, got in header.items():
            expected = (needed | optional).get(name)
            if expected != got:
                raise ValueError(f"{name} is {got.dtype} {[*got.shape]}, expected {expected or 'no such tensor'}")
        if ("maps" in header) != ("flat_below" in header):
            raise ValueError("of maps and flat_below one is missing")
    except ValueError as error:
        raise ValueError(f"{path} is no sound saved edit: {error}; save the edit again") from error


Expected = dict[str, tuple[str, tuple[int, ...]]]


def expected_tensors(header: Header, settings: dict[str, Any], sd: "StableDiffusion") -> tuple[Expected, Expected]:
    """The tensors that must and that may be there, each with its dtype and shape."""
    frame = header["source"].shape
    side = sd.side if settings["size"] is None else settings["size"]
    at = images.working_size((frame[1], frame[0]), side, sd.factor)
    if at != settings["working_size"]:
        raise ValueError(f"its working size is {settings['working_size']}, expected {at}")
    w, h = (n // sd.factor for n in at)
    c, n = sd.channels, settings["maps"]
    K = level_at(settings["strength"], settings["steps"]) if "decoded" in header else 0
    profile = header["icc_profile"].shape[:1] if "icc_profile" in header else ()
    pixels, mask, latents = ("U8", (*frame[:2], 3)), ("F32", (1, 1, h, w)), ("F32", (K + 1, c, h, w))
    needed: Expected = {"source": pixels, "image": pixels, "trajectory": latents, "latent_mask": mask}
    return needed, {
        "decoded": latents, "maps": ("F32", (1, n, h, w)), "flat_below": ("F32", (1,)), "given": mask, "union": mask,
        "subtract": mask, "icc_profile": ("U8", profile), "reference": (FLOATS[sd.dtype], (1, n, c, h, w)),
    }  # fmt: skip


# ---------------------------------------------------------------- pictures and the mask


def pixels(picture: Image.Image) -> Tensor:
    """PIL RGB -> (H, W, 3) uint8."""
    return torch.from_numpy(np.array(picture))


def picture(pixels: Tensor, profile: Tensor | None) -> Image.Image:
    made = Image.fromarray(pixels.numpy())
    made.info = {} if profile is None else {"icc_profile": profile.numpy().tobytes()}
    return made


def found_mask(t: dict[str, Tensor], settings: dict[str, Any]) -> Mask | None:
    if "maps" not in t:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the mask was found
        clip, threshold = settings["mask_clip"], settings["mask_threshold"]
        found = threshold_maps(t["maps"], t["flat_below"], clip=clip, threshold=threshold)
    return replace(found, reference=t.get("reference"))
