"""Batches of images on the device: uint8 arrays in memory -> normalised, augmented float32, channels-last.

Two pipelines give the same batches, bit for bit on the CPU: DALI's (`dali_pipeline.py`) where its wheel is installed,
and the PyTorch one below. Which images come when, and how each is cropped and flipped, is decided by `Plan` alone.

The augmentation is that of the authors' code: normalise, flip with probability 1/2, zero-pad, crop at random. The padding
follows the normalisation, so it has the mean colour.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .datasets import ImageSet
from .draws import crops_and_flips, permutation

LOADERS = ("auto", "dali", "torch")


class Pipeline(Protocol):
    """What the training loop and the evaluation iterate over."""

    name: str  # "dali-cpu", "dali-gpu" or "torch"
    batch_size: int
    steps_per_epoch: int  # batches in an epoch, the last partial one included

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `epoch` (from 0), starting at batch `first_step`.

        Yields images float32 [B, C, H, W] in channels-last memory and labels int64 [B], both on the device and owned
        by the caller: no later batch overwrites them. Epochs may be left early and visited in any order.
        """
        ...


class Batch(NamedTuple):
    """The draws of one batch."""

    indices: NDArray[np.int64]  # [B] into the image set
    offsets: NDArray[np.int64]  # [B, 2] corner of the crop in the padded image
    flips: NDArray[np.bool_]  # [B]


class Plan:
    """Which images each batch holds and how they are augmented: a function of (seed, epoch, step).

    Without augmentation the images come in their order, unflipped and uncropped.
    """

    def __init__(
        self, count: int, batch_size: int, seed: int, augment: bool, padding: int, flip: bool
    ) -> None:
        self.count, self.batch_size, self.augment = count, batch_size, augment
        self.steps_per_epoch = -(-count // batch_size)
        self._seed, self._padding, self._flip = seed, padding, flip
        # Two epochs are alive at once where one is prefetched while the other ends.
        self._draws = lru_cache(maxsize=2)(self._draw_epoch)

    def batch(self, epoch: int, step: int) -> Batch:
        """The draws of batch `step` of `epoch`."""
        order, offsets, flips = self._draws(epoch if self.augment else 0)
        indices = order[step * self.batch_size : (step + 1) * self.batch_size]
        return Batch(indices, offsets[indices], flips[indices])

    def _draw_epoch(self, epoch: int) -> Batch:
        if self.augment:
            offsets, flips = crops_and_flips(self._seed, epoch, self.count, self._padding, self._flip)
            return Batch(permutation(self._seed, epoch, self.count), offsets, flips)
        return Batch(np.arange(self.count), np.zeros((self.count, 2), np.int64), np.zeros(self.count, bool))


class TorchPipeline:
    """Whole batches by tensor operations on any device; the uint8 images stay on the device."""

    name = "torch"

    def __init__(
        self,
        images: ImageSet,
        plan: Plan,
        mean: Sequence[float],
        std: Sequence[float],
        padding: int,
        device: torch.device,
    ) -> None:
        self.batch_size, self.steps_per_epoch = plan.batch_size, plan.steps_per_epoch
        self._plan, self._padding, self._device = plan, padding, device
        self._images = torch.from_numpy(images.images).to(device)
        self._labels = torch.from_numpy(images.labels).to(device)
        self._mean = torch.tensor(mean, dtype=torch.float32, device=device)
        self._scale = 1 / torch.tensor(std, dtype=torch.float32, device=device)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See Pipeline."""
        for step in range(first_step, self.steps_per_epoch):
            batch = self._plan.batch(epoch, step)
            indices = torch.from_numpy(batch.indices).to(self._device, non_blocking=True)
            pixels = self._images[indices]  # uint8 [B, H, W, C]
            normalised = self._augmented(pixels, batch) if self._plan.augment else self._normalised(pixels)
            yield normalised.permute(0, 3, 1, 2), self._labels[indices]

    def _normalised(self, pixels: Tensor) -> Tensor:
        return torch.sub(pixels, self._mean).mul_(self._scale)

    def _augmented(self, pixels: Tensor, batch: Batch) -> Tensor:
        """Normalised, flipped, zero-padded and cropped copies of `pixels` [B, H, W, C]."""
        count, height, width, channels = pixels.shape
        flips = torch.from_numpy(batch.flips).to(self._device, non_blocking=True)
        offsets = torch.from_numpy(batch.offsets).to(self._device, non_blocking=True)
        pixels = torch.where(flips[:, None, None, None], pixels.flip(2), pixels)
        edge = 2 * self._padding
        padded = torch.zeros(count, height + edge, width + edge, channels, device=self._device)
        inner = padded[:, self._padding : self._padding + height, self._padding : self._padding + width]
        torch.sub(pixels, self._mean, out=inner).mul_(self._scale)
        # Every window as a view [B, edge + 1, edge + 1, H, W, C], of which each image takes one.
        windows = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)
        return windows[torch.arange(count, device=self._device), offsets[:, 0], offsets[:, 1]]


def choose_loader(loader: str) -> str:
    """ "dali" or "torch" for "auto", "dali" or "torch"; "auto" is DALI where it is installed."""
    if loader != "auto":
        return loader
    installed = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    return "dali" if installed else "torch"


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
    """The pipeline over `images` that `loader` asks for; "auto" takes DALI where it is installed.

    mean, std  per channel, in the images' units (0 to 255)
    augment    False gives the images in their order, only normalised (evaluation)
    padding    pixels of zero padding on each side before the random crop

    Raises ValueError for arguments that do not fit the images, and ImportError for "dali" without DALI.
    """
    _check(images, batch_size, mean, std, padding, loader)
    plan = Plan(len(images.labels), batch_size, seed, augment, padding, flip)
    if choose_loader(loader) == "dali":
        from .dali_pipeline import DaliPipeline  # here, since DALI need not be installed

        return DaliPipeline(images, plan, mean, std, padding, device)
    return TorchPipeline(images, plan, mean, std, padding, device)


def _check(
    images: ImageSet, batch_size: int, mean: Sequence[float], std: Sequence[float], padding: int, loader: str
) -> None:
    if loader not in LOADERS:
        raise ValueError(f"loader must be one of {', '.join(LOADERS)}, got {loader!r}")
    if batch_size < 1:
        raise ValueError(f"batch size must be at least 1, got {batch_size}")
    if padding < 0:
        raise ValueError(f"padding must be at least 0 pixels, got {padding}")
    channels = images.images.shape[-1]
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"mean and std need one value for each of the {channels} channels, got {len(mean)} and {len(std)}"
        )
    if min(std) <= 0:
        raise ValueError(f"std must be above 0 in every channel, got {tuple(std)}")
