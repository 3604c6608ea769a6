"""The PyTorch pipeline for images in files: threads that read, decode and, for resized crops, resize and colour."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastsnap.data.decoding import centred
from fastsnap.data.finishing import Finishing
from fastsnap.data.plan import Batch, Plan
from fastsnap.data.sources import FileSet
from fastsnap.data.streaming import ReadAhead, decoded, read_unchanged
from fastsnap.kernels.resized_crop import resized_crops_of


class TorchFiles:
    """See plan.Pipeline.

    Resized crops are taken from the whole decoded image and leave their thread finished; all else leaves it as uint8 of
    one size, and is finished as images in memory are.
    """

    name = "torch-files"

    def __init__(
        self,
        source: FileSet,
        plan: Plan,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        threads: int,
    ) -> None:
        self.batch_size, self.steps_per_epoch = plan.batch_size, plan.steps_per_epoch
        self._source, self.plan, self._device = source, plan, device
        self._labels = torch.from_numpy(source.labels)
        self._finish = Finishing(plan, source.shape, source.shape[:2], mean, std, device)

        def work(colours: Tensor, batch: Batch, place: int) -> Tensor:
            return _image(source, colours, batch, place)

        self._ahead = ReadAhead(plan, threads, work, self._finish.colours)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See plan.Pipeline. Raises DataError, naming it, for a file that changed."""
        for step in self.plan.steps(first_step):
            position = (epoch if self.plan.training else 0, step)
            batch = self.plan.batch(*position)
            images = torch.stack(self._ahead.take(position)).to(self._device, non_blocking=True)
            if images.dtype == torch.uint8:
                images = self._finish(images, np.arange(len(images)), batch)
            labels = self._labels[torch.from_numpy(batch.indices)].to(self._device, non_blocking=True)
            yield images.permute(0, 3, 1, 2), labels


def _image(source: FileSet, colours: Tensor, batch: Batch, place: int) -> Tensor:
    """Float32 [size, size, C], finished, for resized crops; else uint8 [size, size, C]."""
    index = int(batch.indices[place])
    image = decoded(source, index, read_unchanged(source, index))
    if batch.boxes is None:
        return torch.from_numpy(centred(image, source.resize, source.size))
    own = slice(place, place + 1)
    boxes, flips = torch.from_numpy(batch.boxes[own].astype(np.int64)), torch.from_numpy(batch.flips[own])
    size = source.shape[:2]
    return resized_crops_of([torch.from_numpy(image)], boxes, flips, colours[own], size, threads=1)[0]
