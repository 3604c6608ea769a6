"""Colour jitter, PCA lighting and normalisation of an image as one affine map of a pixel x and the mean colour m:
A x + K m + d.

The authors' ImageNet recipe (fb.resnet.torch): brightness, contrast and saturation in a random order, each x -> a x +
(1 - a) y with a from 1 - jitter to 1 + jitter and y black, the image's mean grey, the pixel's grey; then lighting along
the principal colours of ImageNet (Krizhevsky et al. 2012); nothing is clipped.
"""

from collections.abc import Sequence
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

GREY = np.array([0.299, 0.587, 0.114])  # Rec. 601
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])  # of ImageNet's colours, 0 to 1
EIGENVECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)  # in its columns
ORDERS = tuple(permutations(range(3)))
FIELD = np.uint64(2**31 - 1)


def transforms(
    words: NDArray[np.uint64], jitter: float, lighting: float, mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:
    """A, K and d of each image, below one another: float32 [B, 2 C + 1, C].

    words      uint64 [B, 4], random: brightness and contrast; saturation and the order; lighting
    jitter     0 for none
    lighting   standard deviation; 0 for none
    mean, std  per channel, in the pixels' units, 0 to 255
    A grey image has a brightness and a contrast, and no lighting.
    """
    count, channels = len(words), len(mean)
    matrix = np.broadcast_to(np.eye(channels), (count, channels, channels)).copy()
    of_mean = np.zeros_like(matrix)
    offset = np.zeros((count, channels))
    if jitter:
        _jitter(words, jitter, matrix, of_mean)
    if lighting and channels == 3:
        offset += 255 * (_normal(words[:, 2:]) * lighting * EIGENVALUES) @ EIGENVECTORS.T
    scale = 1 / np.asarray(std, np.float64)
    offset = (offset - np.asarray(mean)) * scale
    parts = [matrix * scale[:, None], of_mean * scale[:, None], offset[:, None]]
    return np.concatenate(parts, axis=1).astype(np.float32)


def _jitter(
    words: NDArray[np.uint64], jitter: float, matrix: NDArray[np.float64], of_mean: NDArray[np.float64]
) -> None:
    """Multiply the three, in each image's order, onto `matrix` and `of_mean` [B, C, C]."""
    channels = matrix.shape[1]
    grey = GREY if channels == 3 else np.ones(1)
    fields = [words[:, 0] >> np.uint64(33), words[:, 0] >> np.uint64(2) & FIELD, words[:, 1] >> np.uint64(33)]
    factors = [1 + jitter * (2 * (field / 2.0**31) - 1) for field in fields]
    order = ((words[:, 1] >> np.uint64(2) & FIELD) * np.uint64(len(ORDERS)) >> np.uint64(31)).astype(np.int64)
    for position in range(3):
        which = np.array(ORDERS)[order, position]
        factor = np.choose(which, factors)[:, None, None]
        rest = (1 - factor) * grey
        # Contrast mixes in the grey of the mean, which is (A + K) m so far; saturation that of the pixel, A x + K m.
        mean_grey = rest @ (matrix + of_mean)
        pixel_grey, grey_of_mean = rest @ matrix, rest @ of_mean
        contrast, saturation = which[:, None, None] == 1, which[:, None, None] == 2
        matrix[:] = factor * matrix + np.where(saturation, pixel_grey, 0)
        of_mean[:] = factor * of_mean + np.where(contrast, mean_grey, np.where(saturation, grey_of_mean, 0))


def _normal(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Three normal numbers [B, 3] of two words, by Box and Muller's method."""
    uniform = np.stack([words >> np.uint64(32), words & np.uint64(2**32 - 1)], axis=2) / 2.0**32  # [B, 2, 2]
    radius = np.sqrt(-2 * np.log(1 - uniform[..., 0]))
    angle = 2 * np.pi * uniform[..., 1]
    return np.concatenate([radius * np.cos(angle), (radius * np.sin(angle))[:, :1]], axis=1)
