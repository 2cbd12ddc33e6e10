"""No method on attention ever holds a map of self-attention of 64 x 64 cells: the largest tensor of each is counted."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from minidiffedit import run as R
from minidiffedit.attention import weights
from minidiffedit.methods.table import SYSTEMS

MAP = 4096 * 4096  # of one head and row
SD = tiny.model()
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8))
ATTENTION = ["prompt-to-prompt", "masactrl", "masactrl-union", "tic-inversion", "plug-and-play", "pfb-diff",
             "pix2pix-zero", "ti-guided-edit", "tf-icon", "cross-image-attention", "words+diffedit",
             "ledits++", "sige"]  # fmt: skip
GIVEN = {"source": "a horse", "target": "a zebra", "reference": PICTURE, "mask": np.ones((64, 64), np.uint8) * 255,
         "edits": [("a horse", "a zebra")]}  # fmt: skip
AT_WORK = {"steps": 2, "maps": 1, "first_step": 0, "appearance_after": 0.0, "exchange_after": 0.0, "seed": 0,
           "object_words": "horse, zebra", "blend": "horse, zebra", "strength": 1.0, "self_levels": 3}  # fmt: skip


class Largest(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        made = [one for one in (out if isinstance(out, tuple | list) else [out]) if isinstance(one, torch.Tensor)]
        self.values = max([self.values, *(one.numel() for one in made)])
        return out


def largest(method, monkeypatch):
    seen, eps = Largest(), SD.eps

    def counted(x, t, texts, **hooks):
        assert x.shape[2:] == (64, 64)
        with seen:
            return eps(x, t, texts, **hooks)

    blank = R.blank_plan(method)
    told = {name: value for name, value in (GIVEN | AT_WORK).items() if name in {*blank.given, *blank.options}}
    monkeypatch.setattr(SD, "eps", counted)
    R.edit(SD, PICTURE, method, size=512, **told | ({} if "mask" in blank.needs else {"mask": None}))
    return seen.values


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("method", ATTENTION)
def test_no_map_of_64_x_64_cells_is_held(method, monkeypatch):
    assert 1 << 16 < largest(method, monkeypatch) < MAP // 2


def test_a_map_would_be_seen():
    seen, q = Largest(), torch.zeros(1, 1, 1024, 4)
    with seen:
        weights(q, q)
    assert seen.values == 1024**2


def test_every_method_on_attention_is_counted():
    from pathlib import Path

    folder = Path(R.__file__).parent / "methods"
    tapped = {path.stem for path in folder.glob("*.py") if "tap=" in path.read_text()}
    counted = {place.partition(":")[0] for name in ATTENTION for place in R.blank_plan(name).functions.values()}
    # Those with gradients keep what their way back needs; what that takes at this size is not counted yet.
    backward = {"baret", "cds", "dpl", "drag", "dragon_diffusion", "kv_inversion", "mag_edit", "style_diffusion"}
    assert tapped <= counted | backward, tapped - counted - backward
    assert {name for name in ATTENTION if "+" not in name} <= SYSTEMS.keys()
