"""How close two pictures, or two masks, are; exact definitions in numpy.

Pictures are uint8 arrays or PIL images of one size, (H, W, 3) or (H, W); `where` a bool (H, W) that picks pixels, such
as those outside a mask. Whatever does not fit raises ValueError. What needs trained networks is in perceptual.py.
"""

from typing import Any

import numpy as np


def mse(a: Any, b: Any, where: np.ndarray | None = None) -> float:
    """Mean squared difference in units of 1/255, squared: 0 to 255^2, over all channels; NaN for no pixels."""
    x, y = pair(a, b, where)
    squares = (x - y) ** 2 if where is None else ((x - y) ** 2)[where]
    return float(squares.mean()) if squares.size else float("nan")


def psnr(a: Any, b: Any, where: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(255^2 / mse); infinite for equal pictures."""
    error = mse(a, b, where)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def ssim(a: Any, b: Any, where: np.ndarray | None = None) -> float:
    """Structural similarity, at most 1 (Wang et al. 2004, eq. 13: Gaussian window 11 x 11, sigma 1.5, K1 .01, K2 .03).

    The mean over channels and the pixels in `where`, by default those whose whole window lies in the picture. NaN for
    no pixels; ValueError for pictures smaller than the window.
    """
    x, y = pair(a, b, where)
    if min(x.shape[:2]) < 11:
        raise ValueError(f"SSIM's window is 11 x 11, the pictures are {x.shape[1]} x {x.shape[0]}")
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    similarity = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    similarity = similarity[5:-5, 5:-5] if where is None else similarity[where]
    return float(similarity.mean()) if similarity.size else float("nan")


def blur(x: np.ndarray) -> np.ndarray:
    """(H, W, c) under the 11 x 11 Gaussian of sigma 1.5, mirrored at the borders."""
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window /= window.sum()
    for axis in (0, 1):
        padded = np.pad(x, [(5, 5) if i == axis else (0, 0) for i in range(3)], mode="symmetric")
        x = np.lib.stride_tricks.sliding_window_view(padded, 11, axis=axis) @ window
    return x


def pair(a: Any, b: Any, where: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Both pictures as float64 (H, W, c)."""
    x, y = (np.atleast_3d(np.asarray(picture, np.float64)) for picture in (a, b))
    if x.shape != y.shape or 0 in x.shape:
        raise ValueError(f"two pictures of one size are needed, got {x.shape} and {y.shape} (H, W, channels)")
    if where is not None and (np.asarray(where).dtype != bool or np.shape(where) != x.shape[:2]):
        raise ValueError(f"where must be bool {x.shape[:2]}, got {np.asarray(where).dtype} {np.shape(where)}")
    return x, y


def iou(mask: np.ndarray, truth: np.ndarray) -> float:
    """Intersection over union of two bool masks of one shape, 0 to 1; 1 where both are empty."""
    if mask.dtype != bool or truth.dtype != bool or mask.shape != truth.shape:
        got = f"{mask.dtype} {mask.shape}, {truth.dtype} {truth.shape}"
        raise ValueError(f"two bool masks of one shape are needed, got {got}")
    union = (mask | truth).sum()
    return float((mask & truth).sum() / union) if union else 1.0
