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
CONTRAST, SATURATION = 1, 2  # brightness is 0
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
    pixel, grey_of_pixel, grey_of_mean = _mixture(words, jitter)
    if channels == 1:  # a grey pixel is its own grey
        pixel, grey_of_pixel = pixel + grey_of_pixel, np.zeros(count)
    grey = (GREY if channels == 3 else np.ones(1)) / np.asarray(std, np.float64)[
        :, None
    ]  # [C, C]: its rows scaled
    scale = 1 / np.asarray(std, np.float64)
    result = np.empty((count, 2 * channels + 1, channels), np.float32)
    result[:, :channels] = pixel[:, None, None] * np.diag(scale) + grey_of_pixel[:, None, None] * grey
    result[:, channels:-1] = grey_of_mean[:, None, None] * grey
    result[:, -1] = -np.asarray(mean) * scale
    if lighting and channels == 3:
        result[:, -1] += 255 * (_normal(words[:, 2:]) * lighting * EIGENVALUES) @ EIGENVECTORS.T * scale
    return result


def _mixture(words: NDArray[np.uint64], jitter: float) -> tuple[NDArray[np.float64], ...]:
    """Of what each image is mixed after its three jitters: shares [B] of the pixel, of its grey and of the mean's grey.

    Grey is linear, and the grey of a grey is itself, so whatever the order, three numbers are enough.
    """
    fields = [words[:, 0] >> np.uint64(33), words[:, 0] >> np.uint64(2) & FIELD, words[:, 1] >> np.uint64(33)]
    factors = np.stack([(1 - jitter) + (2 * jitter / 2.0**31) * field for field in fields], axis=1)
    order = ((words[:, 1] >> np.uint64(2) & FIELD) * np.uint64(len(ORDERS)) >> np.uint64(31)).astype(np.int64)
    turns = np.array(ORDERS)[order]
    row = np.arange(len(words))
    pixel, grey, mean = np.ones(len(words)), np.zeros(len(words)), np.zeros(len(words))
    for position in range(3):
        which = turns[:, position]
        factor = factors[row, which]
        rest, contrast, saturation = 1 - factor, which == CONTRAST, which == SATURATION
        mixed_grey = rest * (pixel + grey)  # of the pixel so far
        mean = factor * mean + np.where(
            contrast, mixed_grey + rest * mean, np.where(saturation, rest * mean, 0)
        )
        grey = factor * grey + np.where(saturation, mixed_grey, 0)
        pixel = factor * pixel
    return pixel, grey, mean


def _normal(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Three normal numbers [B, 3] of two words, by Box and Muller's method."""
    uniform = np.stack([words >> np.uint64(32), words & np.uint64(2**32 - 1)], axis=2) / 2.0**32  # [B, 2, 2]
    radius = np.sqrt(-2 * np.log(1 - uniform[..., 0]))
    angle = 2 * np.pi * uniform[..., 1]
    return np.concatenate([radius * np.cos(angle), (radius * np.sin(angle))[:, :1]], axis=1)
