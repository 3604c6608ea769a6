"""The DALI pipeline: one graph for the CPU (`device_id=None`) and for the GPU.

The images go in through `external_source`, in the order of the plan; `crop_mirror_normalize` normalises and flips, and
`slice` pads and crops. (`crop_mirror_normalize` cannot do all of it: its crop position is a share of the difference
between image and crop size, which is zero here, and padding uint8 images first would pad before the normalisation.)
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .datasets import ImageSet
from .pipeline import Plan

PREFETCH = 2  # batches that DALI prepares while the step runs
THREADS = {"cpu": 1, "gpu": 2}  # the CPU's cores belong to the training step

try:
    import nvidia.dali as dali
    from nvidia.dali import fn
except ImportError as error:
    raise ImportError(
        "the DALI pipeline needs NVIDIA DALI: pip install nvidia-dali-cuda130 (or -cuda120, to match torch's CUDA; "
        "the package called nvidia-dali only raises), or choose the PyTorch pipeline, which gives the same batches"
    ) from error


class DaliPipeline:
    """See `pipeline.Pipeline`.

    DALI asks for batches ahead of time. Each batch that it asked for is remembered by its position (epoch, step), in
    order, so a jump - an epoch left early, a resume - only moves the cursor and drops the few batches in flight.
    """

    def __init__(
        self,
        images: ImageSet,
        plan: Plan,
        mean: Sequence[float],
        std: Sequence[float],
        padding: int,
        device: torch.device,
    ) -> None:
        backend = "gpu" if device.type == "cuda" else "cpu"
        self.name = f"dali-{backend}"
        self.batch_size, self.steps_per_epoch = plan.batch_size, plan.steps_per_epoch
        self._plan, self._images, self._device, self._padding = plan, images.images, device, padding
        self._labels = torch.from_numpy(images.labels).to(device)
        self._cursor = (0, 0)
        self._in_flight: deque[tuple[int, int]] = deque()
        self._pipe = self._build(backend, list(mean), list(std))

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See Pipeline."""
        for step in range(first_step, self.steps_per_epoch):
            images = self._fetch((epoch, step))
            indices = torch.from_numpy(self._plan.batch(epoch, step).indices)
            yield images, self._labels[indices.to(self._device, non_blocking=True)]

    def _build(self, backend: str, mean: list[float], std: list[float]) -> Any:
        device_id = (self._device.index or 0) if backend == "gpu" else None
        pipe = dali.Pipeline(
            self._plan.batch_size,
            num_threads=THREADS[backend],
            device_id=device_id,
            prefetch_queue_depth=PREFETCH,
            exec_dynamic=True,  # outputs own their memory
        )
        layout = ["HWC", "", ""] if self._plan.augment else ["HWC"]
        with pipe:
            # DALI calls the source from this thread, inside run().
            images, *draws = fn.external_source(
                self._next_batch, num_outputs=len(layout), layout=layout, batch_info=True
            )
            images = images.gpu() if backend == "gpu" else images
            mirror = {"mirror": draws[1]} if draws else {}
            images = fn.crop_mirror_normalize(images, mean=mean, std=std, output_layout="HWC", **mirror)
            if draws:
                size = list(self._images.shape[1:3])
                images = fn.slice(
                    images,
                    start=draws[0],
                    shape=size,
                    axes=[0, 1],
                    out_of_bounds_policy="pad",
                    fill_values=0.0,
                )
            pipe.set_outputs(images)
        pipe.build()
        return pipe

    def _next_batch(self, _info: Any) -> tuple[NDArray[Any], ...]:
        """What DALI prepares next, and one step forward; epoch follows epoch without a pause."""
        epoch, step = self._cursor
        self._in_flight.append(self._cursor)
        self._cursor = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
        indices, offsets, flips = self._plan.batch(epoch, step)
        if not self._plan.augment:
            return (self._images[indices],)
        return self._images[indices], (offsets - self._padding).astype(np.int32), flips.astype(np.int32)

    def _fetch(self, position: tuple[int, int]) -> Tensor:
        if position not in self._in_flight:
            self._cursor = position
        while True:
            stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
            (batch,) = self._pipe.run(stream)
            if self._in_flight.popleft() == position:
                return torch.from_dlpack(batch.as_tensor()).permute(0, 3, 1, 2)
