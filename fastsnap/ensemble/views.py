"""Several views of a test image, of which probabilities are averaged: its mirror image, its corners.

The authors' -tenCrop. Their code averaged logits over the views and probabilities over the members; here it is
probabilities throughout, for single snapshots and ensembles alike.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import functional as transforms

from fastsnap.data.finishing import Finishing
from fastsnap.data.plan import Plan
from fastsnap.data.sources import Augmentation, FileSet
from fastsnap.data.streaming import ReadAhead, decoded, read_unchanged

ONE, MIRROR, TEN_CROP = "one", "mirror", "ten-crop"
VIEWS = {ONE: 1, MIRROR: 2, TEN_CROP: 10}


def require_views(kind: str, augmentation: Augmentation) -> None:
    """Raise ValueError for views that a run of this augmentation has none of."""
    if kind not in VIEWS:
        raise ValueError(f"views must be one of {', '.join(VIEWS)}, got {kind!r}")
    if kind == TEN_CROP and augmentation.kind == "none":
        raise ValueError(
            "--ten-crop needs a run that was trained on crops, and this one was trained on whole images (--augment "
            "none): use --mirror, which averages an image and its mirror image"
        )


def views_of(kind: str, images: Tensor, padding: int) -> Iterator[Tensor]:
    """The views, [B, C, H, W] each.

    images   normalised [B, C, H, W]; or [B, 5, C, H, W], the corners and the centre, as `CornerFiles` gives them
    padding  pixels that training pads with zeros, whose corners are the corners
    """
    crops: Sequence[Tensor] = [images]
    if kind == TEN_CROP:
        crops = images.unbind(1) if images.dim() == 5 else _corners(images, padding)
    for crop in crops:
        crop = crop.contiguous(memory_format=torch.channels_last)
        yield crop
        if kind != ONE:
            yield crop.flip(3).contiguous(memory_format=torch.channels_last)


def average_views(views: Iterator[Tensor]) -> Tensor:
    """The logarithm of the mean probability [B, C] of the logits of each view: logits of the mean."""
    # In logarithms throughout: a probability that fp32 rounds to 0 has a finite one.
    logarithms = torch.stack([logits.float().log_softmax(1) for logits in views])
    return logarithms.logsumexp(0) - math.log(len(logarithms))


def _corners(images: Tensor, padding: int) -> list[Tensor]:
    height, width = images.shape[2:]
    padded = functional.pad(images, (padding,) * 4)
    places = [(0, 0), (0, 2 * padding), (2 * padding, 0), (2 * padding, 2 * padding), (padding, padding)]
    return [padded[:, :, top : top + height, left : left + width] for top, left in places]


class CornerFiles:
    """See plan.Pipeline, but it yields images [B, 5, C, size, size]: the four corners and the centre of each test
    image, whose shorter side is brought to `resize`.
    """

    name = "corner-files"

    def __init__(
        self,
        source: FileSet,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        threads: int,
    ) -> None:
        plan = Plan(len(source.labels), batch_size)
        self.batch_size, self.steps_per_epoch = batch_size, plan.steps_per_epoch
        self.plan, self._source, self._device = plan, source, device
        self._finish = Finishing(plan, source.shape, source.shape[:2], mean, std, device)
        self._ahead = ReadAhead(
            plan, threads, lambda _, batch, place: _five(source, int(batch.indices[place]))
        )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See plan.Pipeline and above."""
        for step in self.plan.steps(first_step):
            batch = self.plan.batch(0, step)
            pixels = torch.from_numpy(np.concatenate(self._ahead.take((0, step)))).to(self._device)
            images = self._finish(pixels, np.arange(len(pixels)), batch).permute(0, 3, 1, 2)
            labels = torch.from_numpy(self._source.labels[batch.indices]).to(self._device)
            yield images.unflatten(0, (len(batch.indices), 5)), labels


def _five(source: FileSet, index: int) -> NDArray[np.uint8]:
    """uint8 [5, size, size, C]."""
    image = decoded(source, index, read_unchanged(source, index))
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    pixels = transforms.resize(pixels, [source.resize], antialias=True)
    crops = torch.stack(transforms.five_crop(pixels, [source.size, source.size]))
    return np.ascontiguousarray(crops.permute(0, 2, 3, 1).numpy())
