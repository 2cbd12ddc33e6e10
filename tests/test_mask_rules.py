"""Rules that cut a mask's extremes: Watch Your Steps' quartiles, on plain weights, beside DiffEdit's clip."""

import sys

import numpy as np
import pytest
import torch
from mutants import mutant
from proofs import TEXTS, edited
from stubs import Counting, gaussian, latent

from minidiffedit.methods import diffedit as D
from minidiffedit.run import plan


def texts():
    return latent(1, 4, 6, 5, seed=5), latent(1, 4, 6, 5, seed=6)


@pytest.mark.parametrize("fence, threshold", [(1.5, 0.5), (0.2, 0.5), (0.2, 0.8), (0.0, 0.5)])
def test_quartiles_by_hand(fence, threshold):
    """In numpy, with Tukey's fence, each picture by its own; what was found before is cut again for nothing."""
    eps, x0, (target, source) = Counting(), latent(2, 4, 6, 5), texts()
    options = {"steps": 10, "maps": 3, "mask_fence": fence}
    found = D.quartiles(eps, x0, target, source, **options, mask_threshold=threshold)
    raw = D.contrast(gaussian, x0, target, source, steps=10, maps=3).maps.mean(dim=1).numpy()
    assert eps.rows == 2 * 3 * 2
    for mean, heat, mask in zip(raw, found.heat[:, 0].numpy(), found.mask[:, 0].numpy()):
        low, high = np.percentile(mean, [25, 75])
        cut = np.minimum(mean, high + fence * (high - low))
        wanted = (cut - cut.min()) / (cut.max() - cut.min())
        np.testing.assert_allclose(heat, wanted, rtol=1e-4, atol=1e-5)
        assert np.array_equal(mask, heat > threshold) and 0 < mask.mean() < 1
    again = D.quartiles(eps, x0, target, source, **options, earlier=lambda *but: [found])
    assert eps.rows == 2 * 3 * 2 and torch.equal(again.heat, found.heat)


def test_the_fence_is_where_outliers_begin():
    maps = torch.full((1, 1, 4, 5), 1.0)
    maps[0, 0, 0] = torch.tensor([2.0, 2.0, 2.0, 2.0, 90.0])  # one cell far beyond, which would be all the mask
    maps[0, 0, 1] = 1.5
    assert D.threshold_maps(maps, torch.zeros(1), clip=None).mask.sum() == 1
    assert D.fenced(maps, torch.zeros(1), 1.5, 0.4).mask.sum() > 1
    assert D.fenced(torch.cat([maps, 9 * maps]), torch.zeros(2), 1.5, 0.4).mask.flatten(1).sum(1).unique().numel() == 1
    assert D.fenced(torch.ones(1, 2, 4, 5), torch.zeros(1), 1.5, 0.4).verdict == ("no difference",)


@pytest.mark.filterwarnings("ignore")
def test_it_feeds_what_takes_a_mask(sd, picture):
    plain = edited(sd, picture, "diffedit", **TEXTS)
    done = edited(sd, picture, "quartiles+diffedit", **TEXTS, mask_fence=0.2, mask_threshold=0.6)
    assert done.evaluations == plain.evaluations == {"mask": 20, "encode": 8, "decode": 16}
    assert not torch.equal(done.latent_mask, plain.latent_mask) and "mask_clip" not in done.settings
    outside = (done.latent_mask == 0).expand_as(done.x0)
    assert torch.equal(done.latent[outside], done.x0[outside])
    with pytest.raises(ValueError, match="no option 'mask_clip'"):
        plan("quartiles+diffedit", **TEXTS, mask_clip=4.0)


@pytest.mark.parametrize("old, new", [
    ("high + fence", "low + fence"), ("mean.flatten(1)", "mean.flatten()[None]"), ("[0.25, 0.75]", "[0.1, 0.9]"),
])  # fmt: skip
def test_mutation_turns_a_test_red(old, new, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "D", mutant("methods.diffedit:fenced", old, new, monkeypatch))
    with pytest.raises(AssertionError):
        test_quartiles_by_hand(0.2, 0.5)
        test_the_fence_is_where_outliers_begin()
