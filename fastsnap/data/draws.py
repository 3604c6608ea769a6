"""Every random draw of the data flow, as a pure function of (seed, epoch, image index).

The draws come from NumPy's Philox, a counter-based generator: the key names the seed, the purpose and the
epoch, the counter runs over the images. So they depend on no loader, batch size, rank or earlier call, any
pipeline can make the same batches, and a run resumes anywhere without loader state. Only the raw bits of
Philox are used, never `Generator.permutation` and the like, whose streams NumPy is free to change between
versions.
"""

import numpy as np
from numpy.typing import NDArray

# The purposes: one independent stream each.
ORDER, AUGMENTATION, HELD_OUT, KEPT, FIXED_SPLIT, BOXES, COLOURS = range(7)
EPOCHS_PER_PURPOSE = 2**48
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random resized crop
ATTEMPTS = 10
BOXES_AT_ONCE = 2**16  # images; for all of ImageNet the words alone would take 200 MB
WORDS_PER_COUNT = 4  # of Philox


def permutation(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """The order in which epoch `epoch` visits `n` images: int64 [n], a permutation of 0..n-1.

    Raises ValueError for a seed or an epoch that does not fit the key.
    """
    return shuffled(seed, ORDER, epoch, n)


def crops_and_flips(
    seed: int, epoch: int, n: int, padding: int, flip: bool
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Crop offsets int64 [n, 2] (row, column) in [0, 2 * padding], and flips bool [n], by image index.

    An offset is the corner of the crop within the padded image: `padding` means the centre. One 64-bit word
    per image: bit 0 flips, two fields of 31 bits give the offsets (bias below 1e-6). Raises ValueError as
    above.
    """
    bits = _bits(seed, AUGMENTATION, epoch, n)
    fields = np.stack([bits >> np.uint64(33), (bits >> np.uint64(2)) & np.uint64(2**31 - 1)], axis=1)
    offsets = (fields * np.uint64(2 * padding + 1)) >> np.uint64(31)
    flips = (bits & np.uint64(1)).astype(bool) if flip else np.zeros(n, bool)
    return offsets.astype(np.int64), flips


def shuffled(seed: int, purpose: int, epoch: int, n: int) -> NDArray[np.int64]:
    """A permutation of 0..n-1 (int64 [n]) from the stream of `purpose`. Raises ValueError as above."""
    # Sorting words that end in their index is 4 times faster than a stable argsort, and leaves no ties.
    index_bits = np.uint64((1 << n.bit_length()) - 1)
    keys = (_bits(seed, purpose, epoch, n) & ~index_bits) | np.arange(n, dtype=np.uint64)
    keys.sort()
    return (keys & index_bits).astype(np.int64)


def _bits(seed: int, purpose: int, epoch: int, n: int, first: int = 0) -> NDArray[np.uint64]:
    """`n` words of the stream (seed, purpose, epoch) from word `first`, a multiple of 4: uint64 [n]. Word i does not
    depend on `n`.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be between 0 and 2**64 - 1, got {seed}")
    if not 0 <= epoch < EPOCHS_PER_PURPOSE:
        raise ValueError(f"epoch must be between 0 and 2**48 - 1, got {epoch}")
    key = np.array([seed, purpose * EPOCHS_PER_PURPOSE + epoch], np.uint64)
    return np.random.Philox(key=key, counter=first // WORDS_PER_COUNT).random_raw(n)


def boxes(seed: int, epoch: int, sizes: NDArray[np.int32]) -> NDArray[np.int32]:
    """The parts of images that random resized crops take: int32 [N, 4], top, left, height and width.

    sizes  int32 [N, 2], height and width of each image
    8 to 100 % of the area at a ratio of 3/4 to 4/3, up to ten attempts, then the centre: as in the authors' code and in
    torchvision. Two words of 64 bits per attempt. Raises ValueError as above.
    """
    result = np.empty((len(sizes), 4), np.int32)
    for start in range(0, len(sizes), BOXES_AT_ONCE):
        part = sizes[start : start + BOXES_AT_ONCE].astype(np.float64)
        first = start * 2 * ATTEMPTS
        words = _bits(seed, BOXES, epoch, len(part) * 2 * ATTEMPTS, first).reshape(len(part), ATTEMPTS, 2)
        result[start : start + BOXES_AT_ONCE] = _boxes(words, part)
    return result


def _boxes(words: NDArray[np.uint64], sizes: NDArray[np.float64]) -> NDArray[np.int32]:
    """words [N, ATTEMPTS, 2]: area and ratio, row and column; sizes [N, 2]."""
    high, low = (words >> np.uint64(32)) / 2.0**32, (words & np.uint64(2**32 - 1)) / 2.0**32  # in [0, 1)
    height, width = sizes[:, :1], sizes[:, 1:]
    area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * high[..., 0])
    ratio = np.exp(np.log(RATIO[0]) + (np.log(RATIO[1]) - np.log(RATIO[0])) * low[..., 0])
    wide, tall = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (wide >= 1) & (wide <= width) & (tall >= 1) & (tall <= height)
    chosen = np.argmax(fits, axis=1)
    row = np.arange(len(sizes))
    found = fits[row, chosen]
    wide, tall = wide[row, chosen], tall[row, chosen]
    top = np.floor(high[row, chosen, 1] * (height[:, 0] - tall + 1))
    left = np.floor(low[row, chosen, 1] * (width[:, 0] - wide + 1))
    # The centre, of a ratio that is allowed.
    centre_wide = np.minimum(width[:, 0], np.maximum(1, np.rint(height[:, 0] * RATIO[1])))
    centre_tall = np.minimum(height[:, 0], np.maximum(1, np.rint(width[:, 0] / RATIO[0])))
    centre = np.stack(
        [(height[:, 0] - centre_tall) // 2, (width[:, 0] - centre_wide) // 2, centre_tall, centre_wide],
        axis=1,
    )
    return np.where(found[:, None], np.stack([top, left, tall, wide], axis=1), centre).astype(np.int32)


def colour_words(seed: int, epoch: int, n: int) -> NDArray[np.uint64]:
    """What the colours of an image are changed by: uint64 [n, 4], see colour.transforms. Raises ValueError as above."""
    return _bits(seed, COLOURS, epoch, 4 * n).reshape(n, 4)
