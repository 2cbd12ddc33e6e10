"""Official weights from the Hugging Face hub: the ten files that are needed, by name, from the cache first."""

import os
import re
import sys
from pathlib import Path
from typing import Any

DEFAULT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
REMOVED = {"runwayml/stable-diffusion-v1-5": DEFAULT}
SMALL = (
    "model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
    "unet/config.json", "vae/config.json", "text_encoder/config.json",
)  # fmt: skip
ONE_TOKENIZER = "tokenizer/tokenizer.json"  # what newer repositories hold instead of the tokenizer's two files

LICENCE = """\
These weights are licensed under CreativeML Open RAIL-M. You may use and redistribute them, also commercially, if the
same use restrictions and a copy of the licence go along. You may not deliberately make or share illegal or harmful
content with them. The authors claim no rights in your results; you answer for them. Full text:
https://huggingface.co/spaces/CompVis/stable-diffusion-license. No safety checker runs: not for public
services as is."""

NO_IDS = (".safetensors", ".json", ".ckpt", ".bin", ".pt", ".pth")  # ends of file names, not of hub ids


class HubError(OSError):
    """The hub, or its cache, cannot give a file."""


class NotCached(HubError):
    """A file is not in the cache."""


class NoSuchFile(HubError):
    """The repository is there, but not this file."""


def weight_files(variant: str | None) -> tuple[str, str, str]:
    """Names of the three weights files: variant None, "fp16" or (UNet only) "non_ema"."""
    if variant not in (None, "fp16", "non_ema"):
        raise ValueError(f"variant must be 'fp16', 'non_ema' or none, got {variant!r}")
    unet = f".{variant}" if variant else ""
    rest = ".fp16" if variant == "fp16" else ""
    return (
        f"unet/diffusion_pytorch_model{unet}.safetensors",
        f"vae/diffusion_pytorch_model{rest}.safetensors",
        f"text_encoder/model{rest}.safetensors",
    )


def is_id(model: str) -> bool:
    """Is it a hub id "owner/name", and no path that is there?"""
    written = re.fullmatch(r"\w[\w.-]*/[\w.-]+", model) and not model.endswith(NO_IDS)
    return bool(written) and not os.path.exists(model)


def find_model(
    model: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    half: bool = False,
) -> Path:
    """A path as it is; a hub id "owner/name" -> the folder in the cache, downloaded if need be.

    half: the run is in a 16-bit type, so that the fp16 files are the nearest. Raises as `download` does.
    """
    if not is_id(model):
        return Path(model)
    wanted = [variant] if variant else (["fp16", None] if half else [None, "fp16"])
    options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    missing = []
    for one in wanted:
        try:
            return find_cached(model, one, **options)
        except NotCached as error:
            missing.append(error)
    if local_files_only:
        raise HubError(
            f"{model}: no such file or folder, nor a hub id in the cache ({missing[0]}); "
            f"to fetch it: minidiffedit download {REMOVED.get(model, model)}"
        ) from missing[0]
    try:
        return download(model, variant=wanted[0], **options)
    except NoSuchFile:
        if len(wanted) == 1:
            raise
        return download(model, variant=wanted[1], **options)


def download(
    model: str = DEFAULT, *, variant: str | None = None, revision: str | None = None, cache_dir: Any = None
) -> Path:
    """The folder of a repository's needed files, fetched where the cache lacks them; then the licence is shown.

    Raises HubError when a file can't be had, and ValueError, before the weights are fetched, where the configurations
    tell that they are not SD v1's.
    """
    options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    try:
        return find_cached(model, variant, **options)
    except NotCached as error:
        if model in REMOVED:
            raise HubError(f"{model} was removed from the hub in August 2024; use {REMOVED[model]}") from error
    print(f"{model} is not in the cache, contacting the hub.\n\n{LICENCE}\n", file=sys.stderr)
    return fetch(model, variant, **options)


def find_cached(model: str, variant: str | None, *, revision: str | None, cache_dir: Any) -> Path:
    """The folder of one variant's files in the cache, also one that diffusers filled; HubError names what it lacks.

    Not hf_hub_download(local_files_only=True): from huggingface_hub 2 on, that asks the hub for a list of agents.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in (*SMALL, *weight_files(variant)):
        try:
            found = try_to_load_from_cache(model, name, cache_dir=cache_dir, revision=revision)
            if name.startswith("tokenizer/") and not isinstance(found, str):
                found = try_to_load_from_cache(model, ONE_TOKENIZER, cache_dir=cache_dir, revision=revision)
        except HFValidationError as error:
            raise HubError(f"{model!r} is no hub id (owner/name): {error}") from error
        if not isinstance(found, str):
            raise NotCached(f"{at(model, revision)}: {name} is not in the cache")
        path = Path(found)
    return path.parent.parent


def fetch(model: str, variant: str | None, *, revision: str | None, cache_dir: Any) -> Path:
    """All files of one variant from the hub -> their folder; one clear error names the first that cannot be had."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from .configs import read_configs

    where, name = at(model, revision), SMALL[0]
    try:  # asked once: downloads try again and again for half a minute, and say so each time
        get_hf_file_metadata(hf_hub_url(model, name, revision=revision), timeout=10)
    except HfHubHTTPError:
        pass  # the hub is there; what it says is told below
    except Exception as error:
        raise HubError(f"{where} is not in the cache, and the hub cannot be reached ({first_line(error)})") from error

    def get(name: str) -> Path:
        return Path(hf_hub_download(model, name, revision=revision, cache_dir=cache_dir))

    try:
        for name in SMALL:
            try:
                path = get(name)
            except EntryNotFoundError as error:
                if isinstance(error, LocalEntryNotFoundError) or not name.startswith("tokenizer/"):
                    raise
                get(ONE_TOKENIZER)
        read_configs(path.parent.parent)  # gigabytes of another model need not come first
        for name in weight_files(variant):
            path = get(name)
    except LocalEntryNotFoundError as error:
        raise HubError(f"{where}: {name} is not in the cache, and the hub cannot be reached (offline?)") from error
    except RepositoryNotFoundError as error:  # or its subclass GatedRepoError
        raise HubError(f"{where}: {name}: the repository is gated, private or does not exist") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{where}: no such revision; use a branch, a tag or a full 40-digit commit") from error
    except EntryNotFoundError as error:
        raise NoSuchFile(f"{where} has no file {name}") from error
    except ValueError:  # of read_configs
        raise
    except Exception as error:  # a full disk, a server's error, or what the HTTP library of the day raises
        raise HubError(f"{where}: {name} could not be fetched: {first_line(error)}") from error
    return path.parent.parent


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def at(model: str, revision: str | None) -> str:
    return f"{model} at revision {revision}" if revision else model
