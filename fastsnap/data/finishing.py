"""From uint8 images to the batch that a network sees, the same for every loader: crop, flip, colour, normalisation."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsnap.data import colour
from fastsnap.data.blocks import Blocks
from fastsnap.data.plan import Batch, Plan
from fastsnap.kernels.resized_crop import resized_crops


class Finishing:
    """What a plan asks for, by a few tensor operations on whole batches, on any device.

    The operations work on rows of W * C values rather than on pixels of C, which is several times faster.
    shape  height, width and channels of the images that come in
    size   height and width of those that come out
    """

    def __init__(
        self,
        plan: Plan,
        shape: tuple[int, int, int],
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ) -> None:
        self._plan, self._size, self._device = plan, size, device
        self._blocks = Blocks()
        self._mean_std = tuple(mean), tuple(std)
        height, width, channels = shape
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device).repeat(width)  # of a row [W * C]
        self._scale = (1 / torch.tensor(std, dtype=torch.float32, device=device)).repeat(width)
        # Where batches are built; its margin stays zero.
        margin = 2 * plan.padding
        cropped = plan.augmentation is not None and plan.augmentation.kind == "crop"
        self._padded = torch.zeros(
            *(plan.largest_batch if cropped else 0, height + margin, (width + margin) * channels),
            dtype=torch.float32,
            device=device,
        )

    def __call__(self, images: Tensor, indices: NDArray[np.int64], batch: Batch) -> Tensor:
        """Float32 [B, height, width, C] of the images uint8 [N, H, W, C] at `indices` [B], as `batch` says."""
        if self._plan.augmentation is None or self._plan.augmentation.kind == "none":
            return self._normalised(images, indices)
        if batch.boxes is not None:
            return self._resized(images, indices, batch, batch.boxes.astype(np.int64))
        if batch.colour_words is not None:
            whole = np.array([[0, 0, *images.shape[1:3]]], np.int64).repeat(len(indices), axis=0)
            pixels = self._resized(images, indices, batch, whole)
            self._inner(len(indices), pixels.shape[1:]).copy_(pixels.flatten(2))
            return self._cropped(batch, np.arange(len(indices)), pixels.shape)
        return self._flipped_and_cropped(images, indices, batch)

    def colours(self, batch: Batch) -> Tensor:
        """The colour transforms of a batch, normalisation included, on the CPU: see colour.transforms."""
        augmentation = self._plan.augmentation
        jitter, lighting = (augmentation.jitter, augmentation.lighting) if augmentation else (0.0, 0.0)
        words = (
            np.zeros((len(batch.indices), 4), np.uint64) if batch.colour_words is None else batch.colour_words
        )
        return torch.from_numpy(colour.transforms(words, jitter, lighting, *self._mean_std))

    def _send(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _normalised(self, images: Tensor, indices: NDArray[np.int64]) -> Tensor:
        pixels = images.index_select(0, self._send(indices))
        return torch.sub(pixels.flatten(2), self._mean).mul_(self._scale).view(pixels.shape)

    def _resized(
        self, images: Tensor, indices: NDArray[np.int64], batch: Batch, boxes: NDArray[np.int64]
    ) -> Tensor:
        flips, colours = self._send(batch.flips), self.colours(batch).to(self._device, non_blocking=True)
        where, output = (self._send(indices), self._send(boxes)), self.output(len(indices))
        return resized_crops(images, *where, flips, colours, self._size, output=output)

    def output(self, count: int) -> Tensor | None:
        """Memory for `count` resized crops on a CPU."""
        return (
            self._blocks.take(count, *self._size, len(self._mean_std[0]))
            if self._device.type == "cpu"
            else None
        )

    def _flipped_and_cropped(self, images: Tensor, indices: NDArray[np.int64], batch: Batch) -> Tensor:
        """Normalised, flipped, zero-padded and cropped."""
        # The flipped images come last while the batch is built, as one slice; the crop puts them in order
        # again.
        build_order = np.argsort(batch.flips, kind="stable")
        pixels = images.index_select(0, self._send(indices[build_order]))
        flipped = pixels[len(pixels) - int(batch.flips.sum()) :]
        flipped.copy_(flipped.flip(2))
        inner = self._inner(len(pixels), pixels.shape[1:])
        torch.sub(pixels.flatten(2), self._mean, out=inner).mul_(self._scale)
        return self._cropped(batch, np.argsort(build_order), pixels.shape)

    def _inner(self, count: int, shape: torch.Size) -> Tensor:
        """What the margin leaves of the first `count` padded images, [count, H, W * C]."""
        height, width, channels = shape
        padding = self._plan.padding
        start = padding * channels
        return self._padded[:count, padding : padding + height, start : start + width * channels]

    def _cropped(self, batch: Batch, order: NDArray[np.int64], shape: torch.Size) -> Tensor:
        """The crops of the padded images in `order`."""
        _, height, width, channels = shape
        row = width * channels
        _, padded_height, padded_row = self._padded.shape
        first_row = order * padded_height + batch.offsets[:, 0]
        corners = self._send(first_row * padded_row + batch.offsets[:, 1] * channels)
        starts = corners[:, None] + torch.arange(height, device=self._device) * padded_row  # of rows [B, H]
        # Every run of a row's length, as an overlapping view; the crop copies those that start a row.
        runs = self._padded.view(-1).as_strided((self._padded.numel() - row + 1, row), (1, 1))
        return runs[starts].view(shape)
