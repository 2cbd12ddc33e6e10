import copy
import os
import sys
from dataclasses import field, fields, make_dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

import tiny

from minidiffedit import StableDiffusion

MINI = Path(__file__).parents[1] / "weights" / "mini"

# The machines are shared and slow at times; the examples are the same in every run.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

# On tensors this small, threads only wait for one another.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_rates(tmp_path_factory):
    """What runs take here is remembered apart from the user's own."""
    os.environ["MINIDIFFEDIT_CACHE"] = str(tmp_path_factory.mktemp("rates"))


@pytest.fixture(scope="session", autouse=True)
def loads(files_of_one):
    """What no test changes is loaded once in each way; further loads share its networks."""
    load, known, shared = StableDiffusion.load, {}, (str(files_of_one), str(MINI))

    def once(model, **options):
        key = str(model), repr(sorted(options.items()))
        more = ("vae", "lora", "embeddings", "compile", "low_memory")
        if str(model) not in shared or any(options.get(name) for name in more):
            return load(model, **options)
        if key not in known:
            known[key] = load(model, **options)
        return copy.copy(known[key])

    StableDiffusion.load = once
    yield load
    StableDiffusion.load = load


@pytest.fixture(scope="session")
def sd():
    """One tiny model for tests that only read it."""
    return tiny.model(unet=tiny.QUICK)


@pytest.fixture(scope="session")
def inpainting():
    """The same for a UNet of 9 channels."""
    return tiny.model(9, tiny.QUICK)


@pytest.fixture(scope="session")
def picture():
    return tiny.picture()


@pytest.fixture
def small_single_files(monkeypatch):
    """A single file carries no config, SD v1's is assumed: here the tiny one."""
    from minidiffedit.files.configs import KINDS

    for network, config in zip(tiny.FILES, (tiny.UNET, tiny.VAE_, tiny.CLIP)):
        own = [(one.name, one.type, field(default=getattr(config, one.name))) for one in fields(config)]
        monkeypatch.setitem(KINDS, network, make_dataclass("Small", own, bases=(type(config),), frozen=True))


@pytest.fixture(scope="session")
def folder(files_of_one):
    """The tiny model on disk; tests that change files copy it."""
    return files_of_one


@pytest.fixture(scope="session")
def files_of_one(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("models") / "tiny", unet=tiny.QUICK)


@pytest.fixture(scope="session")
def deep():
    """One of as many levels and blocks as SD v1 has."""
    return tiny.model()


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory):
    return tiny.write_folder(tmp_path_factory.mktemp("models") / "deep")
