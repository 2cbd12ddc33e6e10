"""Official weights from the Hugging Face hub: the nine files that are needed, by name, from the cache first."""

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

LICENCE = """\
These weights are licensed under CreativeML Open RAIL-M. You may use and redistribute them, also commercially, if the
same use restrictions and a copy of the licence go along. You may not deliberately make or share illegal or harmful
content with them. The authors claim no rights in your results; you answer for them. Full text:
https://huggingface.co/spaces/CompVis/stable-diffusion-license. No safety checker runs: not for public
services as is."""


class HubError(OSError):
    """The hub, or its cache, cannot give a file."""


def weight_files(variant: str | None) -> tuple[str, str, str]:
    """Names of the three weights files: variant None, "fp16" or (UNet only) "non_ema"."""
    unet = f".{variant}" if variant else ""
    rest = ".fp16" if variant == "fp16" else ""
    return (
        f"unet/diffusion_pytorch_model{unet}.safetensors",
        f"vae/diffusion_pytorch_model{rest}.safetensors",
        f"text_encoder/model{rest}.safetensors",
    )


def find_model(
    model: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    half: bool = False,
) -> Path:
    """A path as it is; a hub id "owner/name" -> the folder in the cache, downloaded if need be.

    half: the run is in a 16-bit type, so that the fp16 files are the nearest. Raises HubError when files can't be had.
    """
    if Path(model).exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) or model.endswith(".safetensors"):
        return Path(model)
    if model in REMOVED:
        raise HubError(f"{model} was removed from the hub in August 2024; use {REMOVED[model]}")
    wanted = [variant] if variant else (["fp16", None] if half else [None, "fp16"])
    for one in wanted:
        try:
            return fetch(model, one, revision=revision, cache_dir=cache_dir, local_files_only=True)
        except HubError as error:
            missing = error
    if local_files_only:
        raise HubError(f"{missing}; fetch it with: minidiffedit download {model}") from missing
    return download(model, variant=wanted[0], revision=revision, cache_dir=cache_dir)


def download(
    model: str = DEFAULT, *, variant: str | None = None, revision: str | None = None, cache_dir: Any = None
) -> Path:
    """Fetch a repository's needed files, resuming partial ones; shows the licence. Returns the folder."""
    if model in REMOVED:
        raise HubError(f"{model} was removed from the hub in August 2024; use {REMOVED[model]}")
    print(f"{model} is not in the cache, contacting the hub.\n\n{LICENCE}\n", file=sys.stderr)
    return fetch(model, variant, revision=revision, cache_dir=cache_dir, local_files_only=False)


def fetch(model: str, variant: str | None, *, revision: str | None, cache_dir: Any, local_files_only: bool) -> Path:
    """All named files of one variant -> their folder; one clear error names the first that cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    options = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
    where = f"{model}{f' at revision {revision}' if revision else ''}"
    name = SMALL[0]
    try:
        for name in (*SMALL, *weight_files(variant)):
            path = Path(hf_hub_download(model, name, **options))
    except HFValidationError as error:
        raise HubError(f"{model!r} is no hub id (owner/name): {error}") from error
    except LocalEntryNotFoundError as error:
        why = "not in the cache" if local_files_only else "not in the cache, and the hub cannot be reached (offline?)"
        raise HubError(f"{where}: {name} is {why}") from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise HubError(f"{where}: {name}: the repository is gated, private or does not exist") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{where}: no such revision; use a branch, a tag or a full 40-digit commit") from error
    except EntryNotFoundError as error:
        raise HubError(f"{where} has no file {name}") from error
    except (HfHubHTTPError, OSError) as error:
        raise HubError(f"{where}: {name} could not be fetched: {str(error).splitlines()[0]}") from error
    return path.parent.parent
