import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

import tiny

# The machines are shared and slow at times; the examples are the same in every run.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

# On tensors this small, threads only wait for one another.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_rates(tmp_path_factory):
    """What runs take here is remembered apart from the user's own."""
    os.environ["MINIDIFFEDIT_CACHE"] = str(tmp_path_factory.mktemp("rates"))


@pytest.fixture(scope="session")
def sd():
    """One tiny model for tests that only read it."""
    return tiny.model()


@pytest.fixture(scope="session")
def inpainting():
    """The same for a UNet of 9 channels."""
    return tiny.model(9)


@pytest.fixture(scope="session")
def picture():
    return tiny.picture()


@pytest.fixture
def small_single_files(monkeypatch):
    """A single file carries no config, SD v1's is assumed: here the tiny one."""
    from minidiffedit.files.configs import KINDS

    for network, config in zip(tiny.FILES, (tiny.UNET, tiny.VAE_, tiny.CLIP)):
        monkeypatch.setitem(KINDS, network, lambda config=config: config)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The tiny model on disk; tests that change files copy it."""
    return tiny.write_folder(tmp_path_factory.mktemp("models") / "tiny")
