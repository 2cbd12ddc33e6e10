import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from minidiffedit.files.images import paste_mask
from minidiffedit.many.metrics import iou, mse, psnr, ssim

RNG = np.random.default_rng(0)
A = RNG.integers(0, 256, (40, 33, 3), dtype=np.uint8)
B = np.clip(A + RNG.normal(0, 25, A.shape), 0, 255).astype(np.uint8)
GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}


def test_psnr_and_ssim_equal_scikit_image():
    assert psnr(A, B) == pytest.approx(peak_signal_noise_ratio(A, B), rel=1e-12)
    assert ssim(A, B) == pytest.approx(structural_similarity(A, B, channel_axis=-1, **GAUSSIAN), rel=1e-9)
    assert ssim(A[..., 0], B[..., 0]) == pytest.approx(
        structural_similarity(A[..., 0], B[..., 0], **GAUSSIAN), rel=1e-9
    )


def test_only_the_picked_pixels_count():
    where = np.zeros((40, 33), bool)
    where[:, :10] = True
    changed = A.copy()
    changed[:, 20:] = 0
    assert mse(A, changed, where) == 0 and psnr(A, changed, where) == np.inf and psnr(A, changed) < 20
    assert ssim(A, changed, where) == pytest.approx(1) and ssim(A, changed) < 0.9
    assert np.isnan(mse(A, B, np.zeros((40, 33), bool)))
    shifted = np.full((4, 4), 10, np.uint8)
    assert mse(shifted, shifted + 5) == 25 and psnr(shifted, shifted + 5) == pytest.approx(34.1514, abs=1e-4)


def test_iou():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    assert iou(a, b) == 1
    a[:2], b[1:3] = True, True
    assert iou(a, b) == pytest.approx(4 / 12) and iou(a, a) == 1 and iou(a, ~a) == 0


def test_a_pasted_edit_keeps_everything_two_cells_away():
    cells = torch.zeros(1, 1, 6, 6)
    cells[..., 2:4, 2:3] = 1
    pixels = np.kron(cells[0, 0].numpy(), np.ones((8, 8))) > 0
    near = np.asarray(Image.fromarray(pixels).convert("L").filter(ImageFilter.MaxFilter(33))) > 0
    assert not np.asarray(paste_mask(cells, (48, 48)))[~near].any() and near.mean() < 0.9


def test_what_does_not_fit_is_refused():
    where = np.zeros((40, 33), bool)
    for bad, words in (
        (lambda: mse(A, A[:-1]), "one size"),
        (lambda: psnr(A, A[..., 0]), "one size"),
        (lambda: ssim(A[:8, :8], A[:8, :8]), "11 x 11"),
        (lambda: mse(A, B, where.T), "where must be bool"),
        (lambda: mse(A, B, where.astype(float)), "where must be bool"),
        (lambda: iou(where, where[:1]), "one shape"),
        (lambda: iou(where, where.astype(int)), "bool masks"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()
    assert np.isnan(ssim(A, B, where))
