"""Which files are asked of the hub and its cache, in which order, and what is said if they can't be had. No network."""

import json
import shutil
import socket
from inspect import signature
from pathlib import Path
from unittest.mock import MagicMock

import huggingface_hub
import pytest
import tiny
import torch
from huggingface_hub import errors

from minidiffedit import HubError, StableDiffusion, download
from minidiffedit.cli import main
from minidiffedit.files.hub import DEFAULT, LICENCE, SMALL, find_model, find_vae, no_model
from minidiffedit.files.metadata import model_hash

PLAIN = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")
WEIGHTS = {
    None: [f"{name}.safetensors" for name in PLAIN],
    "fp16": [f"{name}.fp16.safetensors" for name in PLAIN],
    "non_ema": [f"{PLAIN[0]}.non_ema.safetensors", *(f"{name}.safetensors" for name in PLAIN[1:])],
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was used"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("the network was used"))


class Hub:
    """The library's two functions over a folder that plays the repository and a set of names that plays the cache."""

    def __init__(self, folder):
        self.folder, self.fetched, self.cached = folder, [], set()
        self.lacking, self.error, self.unreachable = set(), None, None

    def look_up(self, repo_id, filename, cache_dir=None, revision=None):
        return str(self.folder / filename) if filename in self.cached else None

    def metadata(self, url, timeout=None):
        if self.unreachable:
            raise self.unreachable

    def download(self, repo_id, filename, *, revision=None, cache_dir=None):
        self.fetched.append(filename)
        self.options = revision, cache_dir
        if self.error:
            raise self.error
        if filename in self.lacking:
            raise made(errors.EntryNotFoundError, "404")
        self.cached.add(filename)
        return str(self.folder / filename)


def made(kind, text):
    try:
        return kind(text, response=MagicMock()) if "response" in signature(kind).parameters else kind(text)
    except ValueError:  # of a class without a signature
        return kind(text)


@pytest.fixture
def hub(folder, monkeypatch):
    fake = Hub(folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", fake.look_up)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fake.metadata)
    return fake


# ---------------------------------------------------------------- what is asked


@pytest.mark.parametrize("variant", WEIGHTS)
def test_exactly_the_named_files_are_fetched(variant, hub, capsys, folder):
    assert download(DEFAULT, variant=variant, revision="main", cache_dir="/cache") == folder
    assert hub.fetched == [*SMALL, *WEIGHTS[variant]] and hub.options == ("main", "/cache")
    err = capsys.readouterr().err
    assert f"{DEFAULT} is not in the cache, contacting the hub" in err and LICENCE in err
    hub.fetched.clear()
    assert download(DEFAULT, variant=variant) == folder  # again: all in the cache, nothing to say
    assert hub.fetched == [] and capsys.readouterr().err == ""


def test_the_licence_is_shown_for_what_it_concerns(hub, capsys):
    for model in (DEFAULT, "CompVis/stable-diffusion-v1-4", "stable-diffusion-v1-5/stable-diffusion-inpainting"):
        hub.cached.clear()
        download(model)
        assert LICENCE in capsys.readouterr().err
    for model in ("owner/name", "timbrooks/instruct-pix2pix", "stable-diffusion-v1-5/else", "x/stable-diffusion-v1-5"):
        hub.cached.clear()
        download(model)
        err = capsys.readouterr().err
        assert LICENCE not in err and f"huggingface.co/{model}" in err


def test_no_licence_is_shown_before_an_offline_error(hub, capsys):
    hub.unreachable = OSError("no route")
    assert main(["download"]) == 1
    err = capsys.readouterr().err
    assert "licensed" not in err and err.splitlines()[-1].startswith("error: ")


def test_the_small_files_are_those_that_are_read():
    networks = [f"{network}/config.json" for network in tiny.FILES]
    rest = ["model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"]
    assert sorted(SMALL) == sorted(networks + rest)


@pytest.mark.parametrize("half, first", [(False, None), (True, "fp16")])
def test_the_nearest_variant_is_fetched_when_none_is_cached(half, first, hub):
    find_model("owner/name", half=half)
    assert hub.fetched == [*SMALL, *WEIGHTS[first]]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("networks", [[0], [1], [2], [0, 2]])
def test_a_cache_may_hold_each_network_in_either_form(networks, half, hub, capsys):
    """diffusers leaves, say, the UNet as fp16 alone."""
    hub.cached |= {*SMALL, *(WEIGHTS["fp16" if i in networks else None][i] for i in range(3))}
    find_model("owner/name", half=half, local_files_only=True)
    assert hub.fetched == [] and capsys.readouterr().err == ""


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("cached", [None, "fp16"])
def test_any_cached_variant_is_better_than_the_network(half, cached, hub, capsys):
    hub.cached |= {*SMALL, *WEIGHTS[cached]}
    find_model("owner/name", half=half)
    assert hub.fetched == [] and capsys.readouterr().err == ""


def test_a_half_cached_model_is_completed(hub):
    hub.cached |= {*SMALL, *WEIGHTS[None][:2]}
    find_model("owner/name")
    assert hub.fetched[-3:] == WEIGHTS[None]


def test_a_named_variant_is_the_only_one_tried(hub):
    hub.cached |= {*SMALL, *WEIGHTS[None]}
    find_model("owner/name", variant="fp16")
    assert hub.fetched[-3:] == WEIGHTS["fp16"]


def test_an_unknown_variant_is_not_asked_for(hub):
    with pytest.raises(ValueError, match="variant must be"):
        find_model("owner/name", variant="int8")
    assert hub.fetched == []


def test_a_repository_without_fp16_files_gives_its_plain_ones(hub, folder):
    hub.lacking |= {*WEIGHTS["fp16"]}
    assert find_model("owner/name", half=True) == folder
    assert hub.fetched[-3:] == WEIGHTS[None]


def test_another_model_is_refused_before_its_weights_are_fetched(hub, folder, tmp_path):
    hub.folder = shutil.copytree(folder, tmp_path / "m")
    config = tmp_path / "m" / "unet" / "config.json"
    config.write_text(json.dumps(tiny.CONFIGS["unet"] | {"in_channels": 5}))
    with pytest.raises(ValueError, match="SD v2 depth"):
        download("owner/name")
    assert hub.fetched == list(SMALL)


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    "kind, words",
    [
        (errors.RepositoryNotFoundError, "owner/name: model_index.json: the repository is gated, private or does not"),
        (errors.GatedRepoError, "gated, private or does not exist"),
        (errors.RevisionNotFoundError, "no such revision; use a branch, a tag or a full 40-digit commit"),
        (errors.LocalEntryNotFoundError, "model_index.json is not in the cache, and the hub cannot be reached"),
        (errors.OfflineModeIsEnabled, "could not be fetched: words"),
        (errors.EntryNotFoundError, "owner/name has no file model_index.json"),
        (errors.HfHubHTTPError, "could not be fetched: words"),
        (OSError, "could not be fetched: words"),
        (RuntimeError, "could not be fetched: words"),
    ],
)
def test_each_error_is_said_in_one_line(kind, words, hub, capsys):
    hub.error = made(kind, "words\nmore")
    with pytest.raises(HubError, match=words):
        find_model("owner/name")
    assert main(["download", "owner/name"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_an_error_without_words(hub):
    hub.error = TimeoutError()
    with pytest.raises(HubError, match="could not be fetched: TimeoutError"):
        download("owner/name")


def test_a_missing_weights_file_is_named(hub):
    hub.lacking.add(WEIGHTS[None][1])
    with pytest.raises(HubError, match=r"owner/name at revision v1 has no file vae/diffusion_pytorch_model.safetensor"):
        download("owner/name", revision="v1")


def test_a_repository_with_tokenizer_json_alone(hub, folder):
    two = {"tokenizer/vocab.json", "tokenizer/merges.txt"}
    hub.lacking = set(two)
    assert download("owner/name") == folder and "tokenizer/tokenizer.json" in hub.cached
    hub.fetched.clear()
    assert find_model("owner/name") == folder and not hub.fetched  # and it is found in the cache again
    hub.lacking, hub.cached = two | {"tokenizer/tokenizer.json"}, set()
    with pytest.raises(HubError, match=r"has no file tokenizer/vocab\.json"):
        download("owner/name")


@pytest.mark.parametrize(
    "error", [OSError("no route\nto host"), RuntimeError(), errors.OfflineModeIsEnabled("offline")]
)
def test_without_a_network_it_is_said_at_once(error, hub):
    """The library tries five times per file, half a minute in all; here nothing is downloaded."""
    hub.unreachable = error
    with pytest.raises(HubError, match=r"owner/name is not in the cache, and the hub cannot be reached \(\w+"):
        download("owner/name")
    assert not hub.fetched


def test_a_hub_that_answers_with_an_error_is_asked_for_the_files(hub, folder):
    hub.unreachable = made(errors.HfHubHTTPError, "429")
    assert download("owner/name") == folder


def test_only_the_cache_when_told_so(hub):
    hub.cached |= {*SMALL, *WEIGHTS[None][:1]}
    words = r"vae/diffusion_pytorch_model.safetensors is not in the cache\); to fetch it: minidiffedit download owner/n"
    with pytest.raises(HubError, match=words):
        find_model("owner/name", local_files_only=True)
    assert hub.fetched == []


def test_the_removed_repository_is_replaced_by_name(hub, folder):
    old = "runwayml/stable-diffusion-v1-5"
    for call in (find_model, download):
        with pytest.raises(HubError, match=f"removed from the hub in August 2024; use {DEFAULT}"):
            call(old)
    with pytest.raises(HubError, match=f"minidiffedit download {DEFAULT}"):
        find_model(old, local_files_only=True)
    assert hub.fetched == []
    hub.cached |= {*SMALL, *WEIGHTS[None]}  # who has it keeps it
    assert find_model(old) == folder


@pytest.mark.parametrize(
    "model",
    ["x", "./x/y", "../x", "/x/y", "a/b/c", "x/y.safetensors", "x/y.ckpt", "a b/c", "", "x/" + "y" * 300 + ".bin"],
)
def test_what_is_no_hub_id_is_a_path(model, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model(model) == Path(model) and hub.fetched == []


def test_an_existing_path_is_no_hub_id(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert find_model("owner/name") == Path("owner/name") and hub.fetched == []


def test_the_prefix_makes_an_id_of_what_is_there(hub, tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert find_model("hub:owner/name") == folder and hub.fetched


def test_what_may_have_been_a_path_is_asked_of_the_hub_with_a_word(hub, capsys):
    find_model("models/mine")
    assert "no file or folder models/mine here, so the hub is asked for it" in capsys.readouterr().err
    hub.cached.clear()
    find_model("hub:models/mine")
    assert "no file or folder" not in capsys.readouterr().err


# ---------------------------------------------------------------- the miniature, by name


@pytest.mark.parametrize("there", [["weights/mini", "minidiffedit/mini"], ["minidiffedit/mini"], []])
def test_mini_is_the_clones_else_the_packages(there, hub, tmp_path, monkeypatch):
    for one in there:
        (tmp_path / one / "unet").mkdir(parents=True)
    monkeypatch.setattr("minidiffedit.files.hub.__file__", str(tmp_path / "minidiffedit" / "files" / "hub.py"))
    if there:
        assert find_model("mini") == tmp_path / there[0]
    else:
        with pytest.raises(ValueError, match="the miniature is neither in a clone nor in the package"):
            find_model("mini")
    assert hub.fetched == []


def test_mini_loads_from_anywhere(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    assert StableDiffusion.load("mini", device="cpu", vae="mini").name == "mini"
    for model in ("weights/mini", "weights/mini/"):
        with pytest.raises(ValueError, match=r"no such folder here; .* the miniature is --model mini|no such file"):
            StableDiffusion.load(model, device="cpu")
    assert hub.fetched == []


def test_a_revision_is_a_hub_ids(folder):
    """Before, it was passed over."""
    for model in ("mini", str(folder)):
        with pytest.raises(ValueError, match="has no revisions, got 'x': only a hub id has"):
            find_model(model, "x")


def test_what_is_downloaded_is_named_as_everywhere(hub, folder, capsys):
    assert download("mini") == find_model("mini") and hub.fetched == [] and capsys.readouterr().err == ""
    assert download("hub:owner/name") == folder and "\nowner/name is not in the cache" in "\n" + capsys.readouterr().err


# ---------------------------------------------------------------- a VAE by its id


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("sub", ["vae/", ""])
@pytest.mark.parametrize("in_cache", [True, False])
def test_a_vae_is_found_alone_or_in_a_model(in_cache, sub, half, hub, folder, tmp_path, capsys):
    hub.folder = shutil.copytree(folder / "vae", tmp_path / "v") if not sub else folder
    names = [f"{sub}config.json", f"{sub}diffusion_pytorch_model.safetensors"]
    if in_cache:
        hub.cached |= {*names}
    hub.lacking |= {"vae/config.json"} if not sub else {f"{sub}diffusion_pytorch_model.fp16.safetensors"}
    if not sub:
        hub.lacking |= {"diffusion_pytorch_model.fp16.safetensors"}
    assert find_vae("owner/vae", None, in_cache, half) == hub.folder / names[1]
    assert bool(hub.fetched) == (not in_cache)
    assert StableDiffusion.load(folder, vae="hub:owner/vae", device="cpu").vae_name == "owner/vae"


@pytest.mark.parametrize("in_cache", [True, False])
def test_a_model_without_a_vae_takes_one_from_elsewhere(in_cache, hub, folder, tmp_path):
    """Of its repository nothing of a VAE is asked for."""
    hub.folder = shutil.copytree(folder, tmp_path / "m")
    shutil.rmtree(hub.folder / "vae")
    hub.lacking |= {name for name in (*SMALL, *WEIGHTS[None], *WEIGHTS["fp16"]) if name.startswith("vae/")}
    if in_cache:
        hub.cached |= {*SMALL, *WEIGHTS[None]} - hub.lacking
    loaded = StableDiffusion.load("owner/name", vae=folder, device="cpu", local_files_only=in_cache)
    assert loaded.checkpoint.parts["vae"].path == folder / WEIGHTS[None][1]
    assert not any(name.startswith("vae/") for name in hub.fetched) and bool(hub.fetched) == (not in_cache)
    with pytest.raises(HubError, match=r"vae/config\.json"):
        StableDiffusion.load("owner/name", device="cpu", local_files_only=in_cache)


def test_commands_know_a_cached_model_without_a_vae(hub, folder, tmp_path, monkeypatch, capsys):
    """And so refuse from its headers what does not fit it."""
    hub.folder = shutil.copytree(folder, tmp_path / "m")
    hub.cached |= {name for name in (*SMALL, *WEIGHTS[None]) if not name.startswith("vae/")}
    shutil.rmtree(hub.folder / "vae")
    monkeypatch.chdir(tmp_path)
    tiny.picture().save("in.png")
    monkeypatch.setattr("minidiffedit.sd.load_network", lambda *a: pytest.fail("weights were read"))
    asked = ["edit", "in.png", "--method", "hive", "--instruction", "x", "--model", "owner/name", "--vae", str(folder)]
    assert main(asked) == 1 and "hive needs instruct weights" in capsys.readouterr().err


def test_a_vae_that_cannot_be_had(hub):
    with pytest.raises(HubError, match="owner/vae: no such file or folder, nor a hub id of a VAE in the cache"):
        find_vae("owner/vae", None, True, False)
    hub.lacking |= {"vae/config.json", "config.json"}
    with pytest.raises(HubError, match="owner/vae holds no VAE"):
        find_vae("owner/vae", None, False, False)
    hub.unreachable = OSError("no route")
    with pytest.raises(HubError, match=r"the hub cannot be reached \(no route"):
        find_vae("owner/other", None, False, False)


def test_an_id_that_the_library_refuses():
    with pytest.raises(HubError, match="no hub id"):
        download("owner/name--x")


# ---------------------------------------------------------------- the library itself, over a cache on disk

SHA = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
BLOB = "19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1"


@pytest.fixture(scope="module")
def cache(folder, tmp_path_factory):
    """models--owner--name as the hub's library lays it out: links in a snapshot to blobs named by their hash."""
    root = tmp_path_factory.mktemp("cache")
    repository = root / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(SHA)
    for i, name in enumerate([*SMALL, *WEIGHTS[None]]):
        blob = repository / "blobs" / (BLOB if name == WEIGHTS[None][0] else f"{i:040}")
        if (folder / name).exists():
            shutil.copy(folder / name, blob)
        elif name == "model_index.json":
            blob.write_text("{}")
        else:
            blob.write_text(tokenizer_file(name))
        link = repository / "snapshots" / SHA / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return root


def tokenizer_file(name):
    from minidiffedit.tokenizer import build_vocab, packaged_merges

    merges = packaged_merges()
    return json.dumps(build_vocab(merges)) if name.endswith("json") else "\n".join(map(" ".join, merges))


@pytest.mark.parametrize("options", [{"local_files_only": True}, {}, {"revision": "main"}, {"revision": SHA}])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_model_in_the_cache_loads_without_the_network(options, dtype, cache, sd, capsys):
    loaded = StableDiffusion.load("owner/name", device="cpu", dtype=dtype, cache_dir=cache, **options)
    assert torch.equal(loaded.unet.conv_in.weight, sd.unet.conv_in.weight.to(loaded.dtype))
    assert capsys.readouterr().err == ""
    path = loaded.checkpoint.parts["unet"].path
    assert path.parts[-4:-2] == ("snapshots", SHA)
    assert model_hash(path) == BLOB[:10]  # the blob's name; its content was not hashed
    assert loaded.tokenizer(["a horse"])[0, :4].tolist() == [49406, 320, 4558, 49407]


@pytest.mark.parametrize("inside", ["", "snapshots", f"snapshots/{SHA}"])
def test_paths_into_the_cache_are_the_model_in_it(inside, cache, sd, folder):
    path = cache / "models--owner--name" / inside
    loaded = StableDiffusion.load(path, device="cpu", vae=path)
    assert torch.equal(loaded.unet.conv_in.weight, sd.unet.conv_in.weight)


def test_a_repository_of_several_revisions(tmp_path):
    repository = tmp_path / "models--owner--name"
    for name in ("aaa", "bbb"):
        (repository / "snapshots" / name).mkdir(parents=True)
    for revision, expected in ((None, None), ("bbb", "bbb"), ("ccc", None)):
        if expected:
            assert find_model(str(repository), revision) == repository / "snapshots" / expected
        else:
            with pytest.raises(ValueError, match=r"which of its revisions. It has aaa, bbb"):
                find_model(str(repository), revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("aaa")
    assert find_model(str(repository / "snapshots")) == repository / "snapshots" / "aaa"


def test_without_a_model_another_in_the_cache_is_named(cache, tmp_path, monkeypatch, capsys):
    (cache / "models--other--thing" / "snapshots").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert main(["generate", "x", "-o", str(tmp_path / "x.png"), "--cache-dir", str(cache)]) == 1
    err = capsys.readouterr().err
    assert f"no --model given, and {DEFAULT} is not in the cache, but owner/name is: give --model owner/name" in err
    assert no_model(None) in err
    assert "minidiffedit download" in no_model(tmp_path) and "--model mini" in no_model(tmp_path)


def test_the_cache_gives_no_other_revision_or_variant(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for options in ({"revision": "fp16"}, {"variant": "fp16"}):
        for local in (True, False):
            with pytest.raises(HubError, match=r"not in the cache|could not be fetched"):
                StableDiffusion.load("owner/name", device="cpu", cache_dir=cache, local_files_only=local, **options)
