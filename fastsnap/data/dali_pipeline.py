"""The DALI pipeline: one graph for the CPU (`device_id=None`) and for the GPU.

The images go in through `external_source`, in the order of the plan; `crop_mirror_normalize` normalises and
flips, `slice` pads and crops. `crop_mirror_normalize` cannot do it alone: its crop position is a fraction
of the difference between image size and crop size, which is zero here, and a padded uint8 image cannot have
the exact mean colour.

Resized crops and colours are finished as in the PyTorch pipeline, on the device: DALI then gathers and sends.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import nvidia.dali as dali
import torch
from numpy.typing import NDArray
from nvidia.dali import fn
from torch import Tensor

from fastsnap.data.finishing import Finishing
from fastsnap.data.plan import Plan
from fastsnap.data.sources import ImageSet

PREFETCH = 2  # batches that DALI prepares while the step runs
THREADS = 1  # the CPU's cores belong to the training step, and a GPU needs the host only for the gather


class DaliPipeline:
    """See plan.Pipeline.

    DALI asks for batches ahead of time. The position (epoch, step) of each batch that it asked for is kept,
    in order, so a jump - an epoch left early, a resume - only moves the cursor and drops the batches in
    flight.
    """

    def __init__(
        self,
        images: ImageSet,
        plan: Plan,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ) -> None:
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"DALI runs on cpu and cuda, got device {device}: use the PyTorch pipeline")
        self.name = "dali-gpu" if device.type == "cuda" else "dali-cpu"
        self.batch_size, self.steps_per_epoch = plan.batch_size, plan.steps_per_epoch
        self.plan, self._images, self._device = plan, images.images, device
        self._labels = torch.from_numpy(images.labels).to(device)
        self._raw = plan.augmentation is not None and bool(
            plan.augmentation.kind == "resized-crop" or plan.augmentation.jitter or plan.augmentation.lighting
        )
        height, width, channels = images.images.shape[1:]
        self._finish = Finishing(plan, (height, width, channels), images.shape[:2], mean, std, device)
        self._cursor = (0, 0)
        self._in_flight: deque[tuple[int, int]] = deque()
        self._pipe = self._build(list(mean), list(std))

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See plan.Pipeline."""
        for step in self.plan.steps(first_step):
            # Unaugmented epochs are all the same, so going from one to any other is not a jump.
            images = self._fetch((epoch if self.plan.training else 0, step))
            batch = self.plan.batch(epoch, step)
            if self._raw:
                images = self._finish(images, np.arange(len(batch.indices)), batch).permute(0, 3, 1, 2)
            else:
                images = images.permute(0, 3, 1, 2)
            indices = torch.from_numpy(batch.indices)
            yield images, self._labels.index_select(0, indices.to(self._device, non_blocking=True))

    def _build(self, mean: list[float], std: list[float]) -> Any:
        on_gpu = self._device.type == "cuda"
        pipe = dali.Pipeline(
            self.plan.largest_batch,
            num_threads=THREADS,
            device_id=self._labels.get_device() if on_gpu else None,
            prefetch_queue_depth=PREFETCH,
            exec_dynamic=True,  # outputs own their memory
        )
        training = self.plan.training and not self._raw
        layout = ["HWC", "", ""] if training else ["HWC"]
        with pipe:
            images, *draws = fn.external_source(
                self._next_batch, num_outputs=len(layout), layout=layout, batch_info=True
            )
            images = images.gpu() if on_gpu else images
            if not self._raw:
                flips = draws[1] if training else 0
                images = fn.crop_mirror_normalize(
                    images, mean=mean, std=std, mirror=flips, output_layout="HWC"
                )
            if training:
                size = list(self._images.shape[1:3])
                images = fn.slice(images, start=draws[0], shape=size, axes=[0, 1], out_of_bounds_policy="pad")
            pipe.set_outputs(images)
        pipe.build()
        return pipe

    def _next_batch(self, _info: Any) -> tuple[NDArray[Any], ...]:
        """What DALI prepares next, called within `run`; the cursor goes on from epoch to epoch."""
        epoch, step = self._cursor
        self._in_flight.append(self._cursor)
        following = epoch + 1 if self.plan.training else 0
        self._cursor = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (following, 0)
        batch = self.plan.batch(epoch, step)
        images = self._images[batch.indices]
        if self._raw or not self.plan.training:
            return (images,)
        return images, (batch.offsets - self.plan.padding).astype(np.int32), batch.flips.astype(np.int32)

    def _fetch(self, position: tuple[int, int]) -> Tensor:
        """The images of the batch at `position`, [B, H, W, C], without a copy."""
        if position not in self._in_flight:
            self._cursor = position
        while True:
            stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
            (images,) = self._pipe.run(stream)
            if self._in_flight.popleft() == position:
                return torch.from_dlpack(images.as_tensor())
