"""Batches of images on the device: uint8 arrays in memory -> normalised, augmented float32, channels-last.

Two pipelines give the same batches, on the CPU bit for bit: the PyTorch one below and DALI's
(dali_pipeline.py). Which images come when, and how each is cropped and flipped, is decided by `Plan` alone.

The augmentation is that of the authors' code: normalise, flip with probability 1/2, zero-pad, crop at random.
The padding follows the normalisation, so it has the mean colour.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsnap.data.datasets import ImageSet
from fastsnap.data.draws import crops_and_flips, permutation

LOADERS = ("auto", "dali", "torch")


class Pipeline(Protocol):
    """What the training loop and the evaluation iterate over."""

    name: str  # "dali-cpu", "dali-gpu" or "torch"
    batch_size: int
    steps_per_epoch: int  # batches in an epoch, the last partial one included

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `epoch` (from 0), starting at batch `first_step`.

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


class Plan:
    """Which images each batch holds and how they are augmented: a function of (seed, epoch, step).

    Without augmentation every epoch is the same: the images in their order, unflipped and uncropped.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, augment: bool, padding: int, flip: bool
    ) -> None:
        self.count, self.batch_size = count, batch_size
        self.augment, self.padding = augment, padding if augment else 0
        self.steps_per_epoch = -(-count // batch_size)
        self._seed, self._flip = seed, flip
        # Two epochs are in use at once while the next one is prefetched.
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def steps(self, first_step: int) -> range:
        """The batches of an epoch from `first_step`. Raises ValueError outside 0..steps_per_epoch."""
        if not 0 <= first_step <= self.steps_per_epoch:
            raise ValueError(f"first step must be between 0 and {self.steps_per_epoch}, got {first_step}")
        return range(first_step, self.steps_per_epoch)

    def batch(self, epoch: int, step: int) -> Batch:
        """The draws of batch `step` of `epoch`."""
        part = slice(step * self.batch_size, (step + 1) * self.batch_size)
        indices, offsets, flips = self._epoch(epoch if self.augment else 0)
        return Batch(indices[part], offsets[part], flips[part])

    def _draw_epoch(self, epoch: int) -> Batch:
        if not self.augment:
            count = self.count
            return Batch(np.arange(count), np.zeros((count, 2), np.int64), np.zeros(count, bool))
        order = permutation(self._seed, epoch, self.count)
        offsets, flips = crops_and_flips(self._seed, epoch, self.count, self.padding, self._flip)
        return Batch(order, offsets[order], flips[order])


class TorchPipeline:
    """Whole batches by a few tensor operations, on any device. The uint8 images stay on the device.

    The operations work on rows of W * C values rather than on pixels of C, which is several times faster.
    """

    name = "torch"

    def __init__(
        self,
        images: ImageSet,
        plan: Plan,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ) -> None:
        self.batch_size, self.steps_per_epoch = plan.batch_size, plan.steps_per_epoch
        self._plan, self._device = plan, device
        self._images = torch.from_numpy(images.images).to(device)
        self._labels = torch.from_numpy(images.labels).to(device)
        height, width, channels = images.images.shape[1:]
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device).repeat(width)  # of a row [W * C]
        self._scale = (1 / torch.tensor(std, dtype=torch.float32, device=device)).repeat(width)
        # Where batches are built; its margin stays zero.
        batch, margin = min(plan.batch_size, plan.count), 2 * plan.padding
        self._padded = torch.zeros(batch, height + margin, (width + margin) * channels, device=device)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See Pipeline."""
        for step in self._plan.steps(first_step):
            batch = self._plan.batch(epoch, step)
            images = self._augmented(batch) if self._plan.augment else self._normalised(batch.indices)
            yield images.permute(0, 3, 1, 2), self._labels.index_select(0, self._send(batch.indices))

    def _send(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _normalised(self, indices: NDArray[np.int64]) -> Tensor:
        pixels = self._images.index_select(0, self._send(indices))
        return torch.sub(pixels.flatten(2), self._mean).mul_(self._scale).view(pixels.shape)

    def _augmented(self, batch: Batch) -> Tensor:
        """Normalised, flipped, zero-padded and cropped: float32 [B, H, W, C]."""
        # The flipped images come last while the batch is built, as one slice; the crop puts them in order
        # again.
        build_order = np.argsort(batch.flips, kind="stable")
        pixels = self._images.index_select(0, self._send(batch.indices[build_order]))
        count, height, width, channels = pixels.shape
        flipped = pixels[count - int(batch.flips.sum()) :]
        flipped.copy_(flipped.flip(2))

        padding, row = self._plan.padding, width * channels
        inner = self._padded[
            :count, padding : padding + height, padding * channels : padding * channels + row
        ]
        torch.sub(pixels.flatten(2), self._mean, out=inner).mul_(self._scale)

        _, padded_height, padded_row = self._padded.shape
        first_row = np.argsort(build_order) * padded_height + batch.offsets[:, 0]
        corners = self._send(first_row * padded_row + batch.offsets[:, 1] * channels)
        starts = corners[:, None] + torch.arange(height, device=self._device) * padded_row  # of rows [B, H]
        # Every run of a row's length, as an overlapping view; the crop copies those that start a row.
        runs = self._padded.view(-1).as_strided((self._padded.numel() - row + 1, row), (1, 1))
        return runs[starts].view(pixels.shape)


def choose_loader(loader: str, device: torch.device) -> str:
    """Which pipeline `loader` means, "dali" or "torch"; "auto" is what is faster on `device`.

    On a CPU that is PyTorch: it takes a third of DALI's time from the cores that train, and starts sooner.
    On a GPU it is DALI, where it is installed. Raises ValueError for another loader, and for "dali" where it is not.
    """
    if loader not in LOADERS:
        raise ValueError(f"loader must be one of {', '.join(LOADERS)}, got {loader!r}")
    installed = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    if loader == "dali" and not installed:
        raise ValueError(
            "loader dali needs NVIDIA DALI: pip install nvidia-dali-cuda130 (or -cuda120, to match torch's CUDA; the "
            "package nvidia-dali only raises). --loader torch gives the same batches without it"
        )
    if loader == "auto":
        return "dali" if device.type == "cuda" and installed else "torch"
    return loader


def make_pipeline(
    images: ImageSet,
    *,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    seed: int = 0,
    augment: bool = True,
    padding: int = 4,
    flip: bool = True,
    loader: str = "auto",
) -> Pipeline:
    """The pipeline over `images` that `loader` asks for.

    mean, std  per channel, in the images' units (0 to 255)
    augment    False gives the images in their order, only normalised (evaluation)
    padding    pixels of zero padding on each side before the random crop
    loader     see choose_loader

    Raises ValueError for arguments that do not fit the images, and for "dali" without DALI.
    """
    _check(images, batch_size, mean, std, padding)
    plan = Plan(len(images.labels), batch_size, seed, augment, padding, flip)
    if choose_loader(loader, device) == "torch":
        return TorchPipeline(images, plan, mean, std, device)
    from fastsnap.data.dali_pipeline import DaliPipeline  # here, since DALI need not be installed

    return DaliPipeline(images, plan, mean, std, device)


def _check(
    images: ImageSet, batch_size: int, mean: Sequence[float], std: Sequence[float], padding: int
) -> None:
    shape = images.images.shape
    if images.images.dtype != np.uint8 or len(shape) != 4 or 0 in shape:
        raise ValueError(f"images should be uint8 [N, H, W, C], got {images.images.dtype} {list(shape)}")
    if images.labels.dtype != np.int64 or images.labels.shape != shape[:1]:
        raise ValueError(
            f"labels should be int64 [{shape[0]}], got {images.labels.dtype} {list(images.labels.shape)}"
        )
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    if padding < 0:
        raise ValueError(f"padding must be at least 0 pixels, got {padding}")
    if not len(mean) == len(std) == shape[3] or min(std) <= 0:
        raise ValueError(
            f"mean and std need one value for each of the {shape[3]} channels, and std above 0, "
            f"got {list(mean)} and {list(std)}"
        )
