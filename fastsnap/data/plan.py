"""What every pipeline keeps to: which images a batch holds, and how each is cropped, flipped and coloured.

"crop" is the augmentation of the authors' CIFAR code: normalise, flip with probability 1/2, zero-pad, crop at random.
The padding follows the normalisation, so it has the mean colour. "resized-crop" is that of their ImageNet code.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastsnap.data import draws
from fastsnap.data.draws import crops_and_flips, permutation
from fastsnap.data.sources import Augmentation

# Fewest images of a training batch, unless smaller ones are asked for. A tenth of BatchNorm's running statistics comes
# from the last batch before a snapshot is saved, so a few images there spoil it: measured in CHANGELOG.md.
LEAST_BATCH = 16


class Pipeline(Protocol):
    """What the training loop and the evaluation iterate over."""

    name: str  # "dali-cpu", "dali-gpu" or "torch"
    batch_size: int
    steps_per_epoch: int  # batches in an epoch; all but the last hold `batch_size` images
    plan: "Plan"

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The plan's rank's part of the batches of `epoch` (from 0), starting at batch `first_step`.

        Yields images float32 [B, C, H, W] in channels-last memory and labels int64 [B], both on the device.
        They belong to the caller: no later batch overwrites them. Epochs may be left early and visited in
        any order.
        """
        ...


class Batch(NamedTuple):
    """The draws of one batch, or of a whole epoch, in the order in which the images are visited."""

    indices: NDArray[np.int64]  # [B] into the image set
    offsets: NDArray[np.int64]  # [B, 2] row and column of the crop in the padded image
    flips: NDArray[np.bool_]  # [B]
    boxes: NDArray[np.int32] | None = None  # [B, 4] top, left, height, width of a resized crop in the image
    colour_words: NDArray[np.uint64] | None = None  # [B, 4] see colour.transforms

    def part(self, chosen: slice) -> "Batch":
        """The draws of some of the images."""
        boxes, words = self.boxes, self.colour_words
        return Batch(
            self.indices[chosen],
            self.offsets[chosen],
            self.flips[chosen],
            None if boxes is None else boxes[chosen],
            None if words is None else words[chosen],
        )


class Share(NamedTuple):
    """A rank's part of a batch: `own` of its `whole` images; none where the batch has fewer images than ranks."""

    own: int
    whole: int


def part_of(count: int, rank: int, ranks: int) -> range:
    """Which of `count` things in a row are those of `rank` where `ranks` share them: the first ones get one more."""
    least, more = divmod(count, ranks)
    start = rank * least + min(rank, more)
    return range(start, start + least + (rank < more))


def training_steps(count: int, batch_size: int) -> int:
    """Batches in which an epoch trains on `count` images.

    The last holds what the others leave; where that is fewer than LEAST_BATCH, and than `batch_size`, it joins the
    batch before it, which then is larger than `batch_size`.
    """
    full, rest = divmod(count, batch_size)
    return max(1, full + (rest >= min(LEAST_BATCH, batch_size)))


def largest_batch(count: int, batch_size: int) -> int:
    """Images in the largest batch of an epoch that trains on `count` images."""
    return max(min(count, batch_size), count - (training_steps(count, batch_size) - 1) * batch_size)


class Plan:
    """Which images each batch holds and how they are augmented: a function of (seed, epoch, step).

    sizes  int32 [N, 2], height and width of each image, for resized crops
    rank   from 0, of the `ranks` that share each batch of training; their parts together are the batch of a single one

    `augmentation` None is evaluation: the images in their order, unflipped and uncropped, the same in every epoch, and
    the last batch holds what remains, however few. `largest_batch` is the number of images of the largest part.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int = 0,
        augmentation: Augmentation | None = None,
        sizes: NDArray[np.int32] | None = None,
        *,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.count, self.batch_size, self.augmentation = count, batch_size, augmentation
        self.training = training = augmentation is not None
        self.padding = augmentation.padding if augmentation else 0
        self.steps_per_epoch = training_steps(count, batch_size) if training else -(-count // batch_size)
        largest = largest_batch(count, batch_size) if training else min(count, batch_size)
        self.largest_batch = -(-largest // ranks)
        self._rank, self._ranks = rank, ranks
        self._seed, self._sizes = seed, sizes
        # Two epochs are in use at once while the next one is prefetched.
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def steps(self, first_step: int) -> range:
        """The batches of an epoch from `first_step`. Raises ValueError outside 0..steps_per_epoch."""
        if not 0 <= first_step <= self.steps_per_epoch:
            raise ValueError(f"first step must be between 0 and {self.steps_per_epoch}, got {first_step}")
        return range(first_step, self.steps_per_epoch)

    def batch(self, epoch: int, step: int) -> Batch:
        """The draws of this rank's part of batch `step` of `epoch`.

        Of a part without images, those of the batch's first one, which does not count: no pipeline, and no compiled
        network, has to know of empty batches.
        """
        whole = self._images(step)
        own = part_of(len(whole), self._rank, self._ranks) or range(1)
        part = slice(whole.start + own.start, whole.start + own.stop)
        return self._epoch(epoch if self.training else 0).part(part)

    def share(self, step: int) -> Share:
        """How many of the images of batch `step` are this rank's."""
        whole = len(self._images(step))
        return Share(len(part_of(whole, self._rank, self._ranks)), whole)

    def _images(self, step: int) -> range:
        """Those of batch `step`, all ranks together, as they come in the epoch."""
        last = step == self.steps_per_epoch - 1
        return range(step * self.batch_size, self.count if last else (step + 1) * self.batch_size)

    def _draw_epoch(self, epoch: int) -> Batch:
        if self.augmentation is None:
            count = self.count
            return Batch(np.arange(count), np.zeros((count, 2), np.int64), np.zeros(count, bool))
        order = permutation(self._seed, epoch, self.count)
        offsets, flips = crops_and_flips(self._seed, epoch, self.count, self.padding, self.augmentation.flip)
        boxes = colours = None
        if self.augmentation.kind == "resized-crop":
            assert self._sizes is not None
            boxes = draws.boxes(self._seed, epoch, self._sizes)[order]
        if self.augmentation.jitter or self.augmentation.lighting:
            colours = draws.colour_words(self._seed, epoch, self.count)[order]
        return Batch(order, offsets[order], flips[order], boxes, colours)
