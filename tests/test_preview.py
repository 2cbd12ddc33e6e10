"""The linear map from latents to RGB: least squares, and nothing else."""

import numpy as np
import pytest
import torch
from PIL import Image

from minidiffedit.views import preview


def latent(h=8, w=10, seed=0):
    return torch.randn(1, 4, h, w, generator=torch.Generator().manual_seed(seed))


def test_a_linear_truth_is_found_again():
    x0 = latent()
    matrix, bias = 0.08 * torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0.4, 0.5, 0.6])
    colours = torch.einsum("bchw,cr->hwr", x0, matrix) + bias
    blocks = np.kron((colours * 255).round().numpy().astype(np.uint8), np.ones((8, 8, 1), np.uint8))
    rgb = preview.fit(x0, Image.fromarray(blocks))
    assert torch.allclose(rgb.matrix, matrix, atol=0.002) and torch.allclose(rgb.bias, bias, atol=0.002)
    assert rgb.explained > 0.999
    assert np.abs(np.asarray(preview.apply(rgb, x0), int) - blocks[::8, ::8]).max() <= 1


def test_it_is_numpys_least_squares_on_the_mean_of_each_block():
    x0, pixels = latent(), np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    means = pixels.reshape(8, 8, 10, 8, 3).mean(axis=(1, 3)).reshape(-1, 3) / 255
    known = np.concatenate([x0[0].flatten(1).T.numpy(), np.ones((80, 1))], axis=1)
    expected, left, *_ = np.linalg.lstsq(known, means, rcond=None)
    rgb = preview.fit(x0, Image.fromarray(pixels))
    assert np.allclose(torch.cat([rgb.matrix, rgb.bias[None]]), expected, atol=2e-3)  # Pillow rounds the means
    assert rgb.explained == pytest.approx(1 - left.sum() / (means - means.mean(axis=0)).__pow__(2).sum(), abs=0.01)


def test_any_picture_size_and_what_leaves_the_range_is_clipped():
    rgb = preview.fit(latent(), Image.new("RGB", (333, 201), (10, 200, 90)))
    assert rgb.explained == 1 and preview.apply(rgb, latent()).getpixel((3, 3)) == (10, 200, 90)
    steep = preview.LatentRGB(torch.eye(4, 3) * 100, torch.zeros(3), 1.0)
    shown = np.asarray(preview.apply(steep, torch.tensor([1.0, -1, 0.002, 0]).view(1, 4, 1, 1)))
    assert shown.tolist() == [[[255, 0, 51]]]


def test_fewer_cells_than_unknowns_and_equal_cells():
    for x0 in (latent(1, 1), latent(1, 3), torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)):
        rgb = preview.fit(x0, Image.new("RGB", (64, 64), "orange"))
        assert torch.isfinite(rgb.matrix).all() and preview.apply(rgb, x0).getpixel((0, 0)) == (255, 165, 0)


def test_refusals():
    picture = Image.new("RGB", (64, 64))
    with pytest.raises(ValueError, match="expected a latent"):
        preview.fit(torch.zeros(2, 4, 8, 8), picture)
    with pytest.raises(ValueError, match="and L"):
        preview.fit(latent(), picture.convert("L"))
    with pytest.raises(ArithmeticError, match="NaN"):
        preview.fit(torch.full((1, 4, 8, 8), torch.nan), picture)
    with pytest.raises(ValueError, match="expected a latent"):
        preview.apply(preview.fit(latent(), picture), torch.zeros(1, 3, 8, 8))
