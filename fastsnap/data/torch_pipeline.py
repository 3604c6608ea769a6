"""The PyTorch pipeline for images in memory."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastsnap.data.finishing import Finishing
from fastsnap.data.plan import Plan
from fastsnap.data.sources import ImageSet


class TorchPipeline:
    """See plan.Pipeline. The uint8 images stay on the device."""

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
        self.plan, self._device = plan, device
        self._images = torch.from_numpy(images.images).to(device)
        self._labels = torch.from_numpy(images.labels).to(device)
        height, width, channels = images.images.shape[1:]
        self._finish = Finishing(plan, (height, width, channels), images.shape[:2], mean, std, device)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See plan.Pipeline."""
        for step in self.plan.steps(first_step):
            batch = self.plan.batch(epoch, step)
            images = self._finish(self._images, batch.indices, batch)
            indices = torch.from_numpy(batch.indices).to(self._device, non_blocking=True)
            yield images.permute(0, 3, 1, 2), self._labels.index_select(0, indices)
