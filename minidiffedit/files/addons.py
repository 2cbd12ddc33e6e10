"""What is laid over a checkpoint while it is read: LoRAs, which change weights, and learned words.

A LoRA (Hu et al., 2106.09685) adds scale alpha / rank (up @ down) to the weight of a layer, here in float32, once, at
loading: nothing is slower afterwards. alpha is the file's, else the rank; the rank is the tensors' own. A learned word
(textual inversion, Gal et al., 2208.01618) is one or more rows behind CLIP's table of tokens, and a word that the
tokenizer turns into them. Both are checked name by name and shape by shape against the model before its weights are
read. Two names of layers are known: kohya's (`lora_unet_...lora_down`, `lora_te_...`; CompVis' blocks, too), and those
of diffusers, old (`...processor.to_q_lora.down`) and new (`unet....lora_A`).
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from tokenizers import AddedToken
from torch import Tensor

from ..ddim import real
from ..tokenizer import Tokenizer, build_vocab, packaged_merges
from .metadata import model_hash
from .unsupported import WIDTHS, Header, Known, add_on, read_header

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

PAIR = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|A|B)\.weight")
ALPHA = re.compile(r"(.+?)(?:_lora)?\.(alpha)")
ROLES = {"A": "down", "B": "up"}
FLOATS = {"F16", "BF16", "F32", "F64"}
TABLE = "embeddings.token_embedding.weight"


def with_add_ons(found: "Checkpoint", lora: Any = (), embeddings: Any = ()) -> "Checkpoint":
    """The checkpoint with add-ons that are laid over it as it is read; arguments as in `StableDiffusion.load`.

    Raises ValueError, from the headers alone, for a file that is no such add-on, or one for another model.
    """
    loras = [read_lora(*path_and_scale(one), found) for one in listed("lora", lora, str, Path, tuple, list)]
    words = [read_word(Path(one), found) for one in listed("embeddings", embeddings, str, Path)]
    if twice := {one.word for one in words if [two.word.lower() for two in words].count(one.word.lower()) > 1}:
        raise ValueError(f"two embeddings are called {min(twice)!r}; a file's name is the word: rename one")
    changes = {network: [one.change(network) for one in loras] for network in found.parts}
    configs = dict(found.configs)
    if words:
        text = configs["text_encoder"]
        configs["text_encoder"] = replace(text, vocab_size=text.vocab_size + sum(one.count for one in words))
        changes["text_encoder"].append(partial(longer_table, words))
    parts = {n: replace(part, changes=(*part.changes, *changes[n])) for n, part in found.parts.items()}
    added = {"lora": [one.told for one in loras], "embeddings": [one.told for one in words]}
    return replace(
        found,
        parts=parts,
        configs=configs,
        words={one.word: one.count for one in words},
        add_ons={kind: ", ".join(told) for kind, told in added.items() if told},
    )


def listed(name: str, given: Any, *kinds: type) -> Sequence[Any]:
    if not isinstance(given, list | tuple) or not all(isinstance(one, kinds) for one in given):
        raise ValueError(f"{name} must be a list of files, got {given!r}")
    return given


def path_and_scale(given: Any) -> tuple[Path, float]:
    """A path, "path:scale" or (path, scale) -> both; the scale is 1 where none is given."""
    if isinstance(given, str) and not Path(given).exists() and re.search(r":[-+.\d][^:/\\]*$", given):
        given = given.rpartition(":")[::2]
    try:
        path, scale = given if isinstance(given, tuple | list) else (given, 1.0)
        return Path(path), real("the scale", float(scale), -100, 100)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"a LoRA must be FILE, FILE:SCALE or (path, scale), got {given!r}: {error}") from error


# ---------------------------------------------------------------- LoRA


@dataclass(frozen=True)
class LoRA:
    """layers: for (network, parameter) the keys of its "down", "up" and, if the file has it, "alpha", and without that
    alpha / rank; told: its name, scale and hash.
    """

    path: Path
    scale: float
    layers: dict[tuple[str, str], tuple[dict[str, str], float]]
    told: str

    def change(self, network: str) -> Callable[[str, Tensor], Tensor]:
        return partial(self.changed, network)

    def changed(self, network: str, name: str, weight: Tensor) -> Tensor:
        """weight (out, in) or (out, in, k, k), with what the LoRA adds to it, in float32."""
        if (network, name) not in self.layers:
            return weight
        keys, factor = self.layers[network, name]
        with safe_open(self.path, framework="pt") as file:
            read = {role: file.get_tensor(key).float() for role, key in keys.items()}
        if strange := [keys[role] for role, one in read.items() if not one.isfinite().all()]:
            raise ValueError(f"{self.path}: {strange[0]} holds NaN or infinity; the file is damaged, download it again")
        factor = read["alpha"].item() / len(read["down"]) if "alpha" in read else factor
        added = read["up"].flatten(1) @ read["down"].flatten(1) * (factor * self.scale)
        return weight.float() + added.reshape(weight.shape)


def read_lora(path: Path, scale: float, found: "Checkpoint") -> LoRA:
    """A LoRA's header against the model. Raises ValueError for what is none, is of another kind, or does not fit."""
    header = read_header(path)
    kind = add_on(header)
    if kind and not (isinstance(kind, Known) and kind.fits and kind.option == "--lora"):
        raise ValueError(f"{path} is {kind}; --lora takes LoRAs for SD v1, as kohya or diffusers write them")
    known = {alias: place for place in layers_of(found) for alias in aliases(*place)}
    layers: dict[tuple[str, str], dict[str, str]] = {}
    unknown = []
    for key in header:
        match = PAIR.fullmatch(key) or ALPHA.fullmatch(key)
        place = known.get(match[1].replace(".processor.", ".")) if match else None
        if match is None or place is None:
            unknown.append(key)
            continue
        role = ROLES.get(match[2], match[2])
        if role in layers.setdefault(place, {}):
            raise ValueError(f"{path} names one layer twice: {layers[place][role]} and {key}")
        layers[place][role] = key
    check_family(path, header, found.configs["unet"].cross_attention_dim)
    if len(unknown) == len(header):
        raise ValueError(f"{path} is no LoRA: it has {', '.join(unknown[:2]) or 'no tensors'}; a checkpoint is --model")
    if unknown:
        raise ValueError(f"{path} has {len(unknown)} tensors that fit no layer of this model: {', '.join(unknown[:3])}")
    with safe_open(path, framework="pt") as file:
        said = adapter_settings(path, (file.metadata() or {}).get("lora_adapter_metadata"))
    made = {}
    for (network, name), keys in layers.items():
        check_layer(path, header, keys, found.parts[network].shapes[name])
        made[network, name] = keys, adapter_factor(said, network, name, header[keys["down"]].shape[0])
    return LoRA(path, scale, made, f"{os.fsencode(path.stem).decode(errors='replace')}:{scale:g} ({model_hash(path)})")


def check_family(path: Path, header: Header, width: int) -> None:
    """Raise ValueError where the cross-attention's keys and values are made of texts of another width."""
    for key, info in header.items():
        match = PAIR.fullmatch(key)
        reads_text = match and match[2] in ("down", "A") and re.search(r"attn2.(processor.)?to_[kv]$", match[1])
        if reads_text and info.shape[1:] and info.shape[1] != width:
            said = f"it is for {WIDTHS.get(info.shape[1], 'another model')}, texts {info.shape[1]} wide, not {width}"
            raise ValueError(f"{path} does not fit this model: {said}")


def layers_of(found: "Checkpoint") -> Iterator[tuple[str, str]]:
    """Every matrix and convolution that a LoRA may change: (network, parameter)."""
    for network in {"unet", "text_encoder"} & found.parts.keys():
        for name, shape in found.parts[network].shapes.items():
            if len(shape) in (2, 4) and not name.startswith("embeddings."):
                yield network, name


def aliases(network: str, name: str) -> Iterator[str]:
    """What files call a layer: the part of their keys before `lora`."""
    from ..checkpoint import compvis_unet

    layer = name.removesuffix(".weight")
    if network == "unet":
        for one in {layer, compvis_unet(name).removesuffix(".weight")}:
            yield "lora_unet_" + one.replace(".", "_")
        for one in (layer, layer.removesuffix(".0") if layer.endswith("to_out.0") else layer):
            yield from (one, f"unet.{one}")
        return
    yield "lora_te_text_model_" + layer.replace(".", "_")
    old = re.sub(r"self_attn\.(q|k|v|out)_proj", r"self_attn.to_\1", layer)
    for one in {layer, old}:
        yield from (f"text_encoder.text_model.{one}", f"text_encoder.{one}")


def check_layer(path: Path, header: Header, keys: dict[str, str], shape: torch.Size) -> None:
    """Raise ValueError unless a layer's tensors are there and make a weight of this shape."""
    if lacking := {"down", "up"} - keys.keys():
        raise ValueError(f"{path} has {min(keys.values())} but not the {lacking.pop()} that belongs to it")
    down, up = header[keys["down"]], header[keys["up"]]
    rank = down.shape[0] if down.shape else 0
    out, *inner = shape
    if rank < 1 or down.shape != (rank, *inner) or up.shape != (out, rank, *(1 for _ in shape[2:])):
        raise ValueError(
            f"{path} does not fit this model: {keys['down']} {list(down.shape)} and its other half {list(up.shape)} "
            f"do not make the layer's {list(shape)}"
        )
    if "alpha" in keys and torch.Size(header[keys["alpha"]].shape).numel() != 1:
        raise ValueError(f"{path}: {keys['alpha']} must be one number, it is {list(header[keys['alpha']].shape)}")
    if strange := {down.dtype, up.dtype} - FLOATS:  # alpha may be a whole number
        raise ValueError(f"{path}: {keys['down']} or its other half is {min(strange)}, not a float type")


def adapter_settings(path: Path, said: str | None) -> dict[str, Any]:
    """What diffusers notes of peft's settings in a file, by name: "unet.lora_alpha"... Raises ValueError for DoRA."""
    try:
        settings = json.loads(said or "{}")
        if any(settings.get(f"{network}use_dora") for network in ("unet.", "text_encoder.", "")):
            raise ValueError("it is a DoRA")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: its note of peft's settings cannot be used: {error}") from error
    return settings


def adapter_factor(said: dict[str, Any], network: str, name: str, rank: int) -> float:
    """alpha / rank as peft's settings have it, 1 where nothing is noted."""
    prefix = f"{network}." if f"{network}.lora_alpha" in said else ""
    alpha, layer = said.get(f"{prefix}lora_alpha", rank), name.removesuffix(".weight")
    try:
        for pattern, own in dict(said.get(f"{prefix}alpha_pattern") or {}).items():
            if f".text_model.{layer}".endswith(f".{pattern}"):
                alpha = own
        return real("alpha", float(alpha), -1e6, 1e6) / (rank**0.5 if said.get(f"{prefix}use_rslora") else rank)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the note of peft's settings has an alpha that is no number: {error}") from error


# ---------------------------------------------------------------- learned words


@dataclass(frozen=True)
class Word:
    """A learned word: key's tensor in the file holds its `count` vectors."""

    path: Path
    word: str
    key: str
    count: int

    @property
    def told(self) -> str:
        return f"{self.word} ({model_hash(self.path)})"


def read_word(path: Path, found: "Checkpoint") -> Word:
    """A learned word's header against the model. Raises ValueError for what is none or is another model's.

    Its name is the key, as diffusers writes it, else (A1111's `emb_params`) the file's.
    """
    header = read_header(path)
    if {"clip_l", "clip_g"} & header.keys():
        raise ValueError(f"{path} is a learned word for SDXL (clip_l, clip_g); one for SD v1 is needed")
    key = next(iter(header), "")
    if len(header) != 1 or not 1 <= len((info := header[key]).shape) <= 2 or info.dtype not in FLOATS:
        said = f"{len(header)} tensors" if len(header) != 1 else f"{key} {info.dtype} {list(info.shape)}"
        raise ValueError(f"{path} is no learned word, which is one tensor of one or more vectors; it has {said}")
    width, count = info.shape[-1], info.shape[0] if len(info.shape) == 2 else 1
    if "text_encoder" not in found.configs:
        raise ValueError(f"{path} is a learned word, and this model reads a picture, no text: leave out --embedding")
    if width != (here := found.configs["text_encoder"].hidden_size):
        family = WIDTHS.get(width, "another model")
        raise ValueError(f"{path} does not fit this model: a word {width} wide is for {family}, here it is {here}")
    if not 1 <= count <= 75:
        raise ValueError(f"{path} is a word of {count} vectors; a text has room for 75")
    word = path.stem if key in ("emb_params", "string_to_param.*") else key.strip()
    vocabulary = build_vocab(packaged_merges())
    if not word or not word.isprintable() or {word.lower(), f"{word.lower()}</w>"} & vocabulary.keys():
        raise ValueError(f"{path}: {word!r} cannot be a new word: CLIP knows it already, or it cannot be written")
    return Word(path, word, key, count)


class Encoding(NamedTuple):
    ids: list[int]
    tokens: list[str]
    offsets: list[tuple[int, int]]


class LearnedWords(Tokenizer):
    """CLIP's tokenizer with further words, whole and in any case of letters, and how many tokens each of them is."""

    def __init__(self, source: str | Path | None, words: dict[str, int]):
        super().__init__(source)
        first = end = self.bpe.get_vocab_size()
        self.bpe.add_tokens([AddedToken(word, single_word=True) for word in words])
        self.learned: dict[int, range] = {}  # by the id in the library, which is one a word, its rows in CLIP's table
        for i, count in enumerate(words.values(), start=first):
            self.learned[i], end = range(end, end + count), end + count

    def encode(self, text: str) -> Encoding:
        """The same; a learned word's tokens all stand where it does, and the last one is spelled as a word's end."""
        found, made = super().encode(text), Encoding([], [], [])
        for i, spelled, span in zip(found.ids, found.tokens, found.offsets):
            ids = self.learned.get(i, [i])
            made.ids.extend(ids)
            made.tokens.extend([*[""] * (len(ids) - 1), "</w>"] if i in self.learned else [spelled])
            made.offsets.extend([span] * len(ids))
        return made


def longer_table(words: Sequence[Word], name: str, tensor: Tensor) -> Tensor:
    """CLIP's table of tokens, (49408, width), with the vectors of the words behind it."""
    if name != TABLE:
        return tensor
    rows = [tensor.float()]
    for one in words:
        with safe_open(one.path, framework="pt") as file:
            vectors = file.get_tensor(one.key).float().reshape(one.count, -1)
        if not vectors.isfinite().all():
            raise ValueError(f"{one.path}: {one.key} holds NaN or infinity; the file is damaged, download it again")
        rows.append(vectors)
    return torch.cat(rows)
