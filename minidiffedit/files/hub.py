"""Official weights from the Hugging Face hub: the ten files that are needed, by name, from the cache first."""

import contextlib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DEFAULT = "stable-diffusion-v1-5/stable-diffusion-v1-5"
REMOVED = {"runwayml/stable-diffusion-v1-5": DEFAULT}
CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json")
BESIDE = ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt")
SMALL = (*BESIDE, *CONFIGS)
ONE_TOKENIZER = "tokenizer/tokenizer.json"  # what newer repositories hold instead of the tokenizer's two files

LICENCE = """\
These weights are licensed under CreativeML Open RAIL-M. You may use and redistribute them, also commercially, if the
same use restrictions and a copy of the licence go along. You may not deliberately make or share illegal or harmful
content with them. The authors claim no rights in your results; you answer for them. Full text:
https://huggingface.co/spaces/CompVis/stable-diffusion-license. No safety checker runs: not for public
services as is."""

MINI = "mini"  # the name of the miniature, wherever it is
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
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", model)) and not (model.endswith(NO_IDS) or os.path.exists(model))


def find_mini() -> Path:
    """The miniature: the clone's weights/mini, else the copy that is packaged."""
    package = Path(__file__).parents[1]
    for folder in (package.parent / "weights" / MINI, package / MINI):
        if (folder / "unet").is_dir():
            return folder
    raise ValueError(f"--model {MINI}: the miniature is neither in a clone nor in the package; install it anew")


def find_model(
    model: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    variant: str | None = None,
    half: bool = False,
    with_vae: bool = True,
) -> Path:
    """A path as it is; a hub id "owner/name" -> the folder in the cache, downloaded if need be; "mini" -> where it is.

    "hub:owner/name" is an id whatever stands on the disk. half: the run is in a 16-bit type, so that the fp16 files are
    the nearest. with_vae: its VAE is needed. Raises as `download` does.
    """
    if model == MINI:
        return snapshot(find_mini(), revision)
    path, model, named = Path(model), model.removeprefix("hub:"), model.startswith("hub:")
    if not named and path.parts[-2:] == ("weights", MINI) and not os.path.exists(path):
        raise ValueError(f"{model}: no such folder here; from anywhere the miniature is --model {MINI}")
    if not named and not is_id(model):
        return snapshot(path, revision)
    wanted = [variant] if variant else (["fp16", None] if half else [None, "fp16"])
    options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "with_vae": with_vae}
    try:
        return find_cached(model, wanted, **options)
    except NotCached as error:
        if local_files_only:
            raise HubError(
                f"{model}: no such file or folder, nor a hub id in the cache ({error}); "
                f"to fetch it: minidiffedit download {REMOVED.get(model, model)}"
            ) from error
    if not named:
        print(f"There is no file or folder {model} here, so the hub is asked for it.", file=sys.stderr)
    try:
        return download(model, variant=wanted[0], **options)
    except NoSuchFile:
        if len(wanted) == 1:
            raise
        return download(model, variant=wanted[1], **options)


def find_vae(vae: str, cache_dir: Any, local_files_only: bool, half: bool) -> Path:
    """The file of a VAE: of a path, of a folder, of a hub id that holds a VAE alone or a whole model, or of "mini".

    Its config.json stands beside it, where it has one. half, and what is raised: as for `find_model`.
    """
    from .configs import vae_file

    if vae == MINI or not (vae.startswith("hub:") or is_id(vae)):
        return vae_file(find_model(vae), half)
    vae, options = vae.removeprefix("hub:"), {"revision": None, "cache_dir": cache_dir}
    files = [weight_files(variant)[1].removeprefix("vae/") for variant in (["fp16", None] if half else [None, "fp16"])]
    for sub in ("vae/", ""):
        with contextlib.suppress(NotCached):
            return cached(vae, [[f"{sub}config.json"], [sub + file for file in files]], **options)
    if local_files_only:
        raise HubError(f"{vae}: no such file or folder, nor a hub id of a VAE in the cache")
    print(f"There is no file or folder {vae} here, so the hub is asked for it.", file=sys.stderr)
    reach(vae, None)
    for sub in ("vae/", ""):
        with contextlib.suppress(NoSuchFile):
            get_file(vae, f"{sub}config.json", **options)
            try:
                return get_file(vae, sub + files[0], **options)
            except NoSuchFile:
                return get_file(vae, sub + files[1], **options)
    raise NoSuchFile(f"{vae} holds no VAE: neither vae/{files[0]} nor {files[0]}")


def snapshot(path: Path, revision: str | None) -> Path:
    """A repository's folder in the hub's cache (models--owner--name), or its snapshots/ -> the model in it; any other
    path as it is.
    """
    root = path.parent if path.name == "snapshots" else path
    if not os.path.isdir(root / "snapshots"):
        if revision:
            raise ValueError(f"{path} has no revisions, got {revision!r}: only a hub id has")
        return path
    there = sorted(one for one in (root / "snapshots").iterdir() if one.is_dir())
    named = root / "refs" / (revision or "main")
    wanted = named.read_text().strip() if named.is_file() else revision
    found = [one for one in there if one.name == wanted] or (there if not revision else [])
    if len(found) != 1:
        raise ValueError(f"{path}: which of its revisions? It has {', '.join(one.name for one in there) or 'none'}")
    return found[0]


def no_model(cache_dir: Any) -> str:
    """What to say where no model is given and the default one is not in the cache; names another SD v1 model there."""
    from huggingface_hub import constants

    said, others = f"no --model given, and {DEFAULT} is not in the cache", []
    for one in sorted(Path(cache_dir or constants.HF_HUB_CACHE).glob("models--*--*")):
        with contextlib.suppress(ValueError, OSError):
            from .configs import read_configs

            name = one.name.removeprefix("models--").replace("--", "/")
            read_configs(find_cached(name, [None, "fp16"], revision=None, cache_dir=cache_dir))
            others.append(name)
    if others:
        return f"{said}, but {', '.join(others[:3])} is: give --model {others[0]}"
    return f"{said}: fetch it (4.3 GB) with `minidiffedit download`, or use the miniature with --model {MINI}"


def download(
    model: str = DEFAULT,
    *,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: Any = None,
    with_vae: bool = True,
) -> Path:
    """The folder of a repository's needed files, fetched where the cache lacks them; then the licence is shown.

    Raises HubError when a file can't be had, and ValueError, before the weights are fetched, where the configurations
    tell that they are not SD v1's.
    """
    if model == MINI:
        return find_mini()
    options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "with_vae": with_vae}
    try:
        return find_cached(model := model.removeprefix("hub:"), [variant], **options)
    except NotCached as error:
        if model in REMOVED:
            raise HubError(f"{model} was removed from the hub in August 2024; use {REMOVED[model]}") from error
    print(f"{model} is not in the cache, contacting the hub.", file=sys.stderr)
    return fetch(model, variant, **options)


def needed(names: Sequence[str], with_vae: bool) -> list[str]:
    """Of a repository's files those that are needed, where the VAE may come from elsewhere."""
    return [name for name in names if with_vae or not name.startswith("vae/")]


def find_cached(
    model: str, variants: Sequence[str | None], *, revision: str | None, cache_dir: Any, with_vae: bool = True
) -> Path:
    """The folder of a model's files in the cache, also one that diffusers filled, each network's in the first variant
    that is there; NotCached names what it lacks.
    """
    names = [[name, ONE_TOKENIZER] if name.startswith("tokenizer/") else [name] for name in needed(SMALL, with_vae)]
    names += [[*each] for each in zip(*(needed(weight_files(variant), with_vae) for variant in variants))]
    return cached(model, names, revision=revision, cache_dir=cache_dir).parent.parent


def cached(model: str, names: Sequence[Sequence[str]], *, revision: str | None, cache_dir: Any) -> Path:
    """The last of a repository's files in the cache, of each entry of names the first that is there.

    Not hf_hub_download(local_files_only=True): from huggingface_hub 2 on, that asks the hub for a list of agents.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for either in names:
        try:
            found = [try_to_load_from_cache(model, name, cache_dir=cache_dir, revision=revision) for name in either]
        except HFValidationError as error:
            raise HubError(f"{model!r} is no hub id (owner/name): {error}") from error
        there = [one for one in found if isinstance(one, str)]
        if not there:
            raise NotCached(f"{at(model, revision)}: {either[0]} is not in the cache")
    return Path(there[0])


def fetch(model: str, variant: str | None, *, revision: str | None, cache_dir: Any, with_vae: bool = True) -> Path:
    """All files of one variant from the hub -> their folder; one clear error names the first that cannot be had."""
    from .configs import read_configs

    options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    reach(model, revision)
    print(f"\n{licence_of(model)}\n", file=sys.stderr)
    for name in needed(SMALL, with_vae):
        try:
            path = get_file(model, name, **options)
        except NoSuchFile as error:
            if not name.startswith("tokenizer/"):
                raise
            try:
                get_file(model, ONE_TOKENIZER, **options)
            except NoSuchFile:
                raise error from None
    if with_vae:
        read_configs(path.parent.parent)  # gigabytes of another model need not come first
    for name in needed(weight_files(variant), with_vae):
        path = get_file(model, name, **options)
    return path.parent.parent


def licence_of(model: str) -> str:
    """The licence of the weights that are known here; of others, where it stands."""
    owner, _, name = model.partition("/")
    if owner in ("CompVis", DEFAULT.partition("/")[0]) and name.startswith("stable-diffusion-"):
        return LICENCE
    return f"The licence of these weights is what their page says: https://huggingface.co/{model}"


def reach(model: str, revision: str | None) -> None:
    """Raise HubError where the hub cannot be reached. Asked once: downloads try again and again for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(model, SMALL[0], revision=revision), timeout=10)
    except HfHubHTTPError:
        pass  # the hub is there; what it says is told with the files
    except Exception as error:
        where = at(model, revision)
        raise HubError(f"{where} is not in the cache, and the hub cannot be reached ({first_line(error)})") from error


def get_file(model: str, name: str, *, revision: str | None, cache_dir: Any) -> Path:
    """One file of a repository, from the hub if need be. Raises HubError, NoSuchFile where only the file lacks."""
    from huggingface_hub import errors, hf_hub_download

    where = at(model, revision)
    try:
        return Path(hf_hub_download(model, name, revision=revision, cache_dir=cache_dir))
    except errors.LocalEntryNotFoundError as error:
        raise HubError(f"{where}: {name} is not in the cache, and the hub cannot be reached (offline?)") from error
    except errors.RepositoryNotFoundError as error:  # or its subclass GatedRepoError
        raise HubError(f"{where}: {name}: the repository is gated, private or does not exist") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{where}: no such revision; use a branch, a tag or a full 40-digit commit") from error
    except errors.EntryNotFoundError as error:
        raise NoSuchFile(f"{where} has no file {name}") from error
    except Exception as error:  # a full disk, a server's error, or what the HTTP library of the day raises
        raise HubError(f"{where}: {name} could not be fetched: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def at(model: str, revision: str | None) -> str:
    return f"{model} at revision {revision}" if revision else model
