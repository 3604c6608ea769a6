"""Every random draw of the data flow, as a pure function of (seed, epoch, image index).

The draws come from NumPy's Philox, a counter-based generator: the key names the seed, the purpose and the
epoch, the counter runs over the images. So they depend on no loader, batch size, rank or earlier call, any
pipeline can make the same batches, and a run resumes anywhere without loader state. Only the raw bits of
Philox are used, never `Generator.permutation` and the like, whose streams NumPy is free to change between
versions.
"""

import numpy as np
from numpy.typing import NDArray

ORDER, AUGMENTATION, HELD_OUT, KEPT, FIXED_SPLIT = range(5)  # the purposes: one independent stream each
EPOCHS_PER_PURPOSE = 2**48


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


def _bits(seed: int, purpose: int, epoch: int, n: int) -> NDArray[np.uint64]:
    """The first `n` words of the stream (seed, purpose, epoch), uint64 [n]; word i does not depend on `n`."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be between 0 and 2**64 - 1, got {seed}")
    if not 0 <= epoch < EPOCHS_PER_PURPOSE:
        raise ValueError(f"epoch must be between 0 and 2**48 - 1, got {epoch}")
    key = np.array([seed, purpose * EPOCHS_PER_PURPOSE + epoch], np.uint64)
    return np.random.Philox(key=key).random_raw(n)
