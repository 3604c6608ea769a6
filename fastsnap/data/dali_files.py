"""The DALI pipeline for images in files: of a resized crop it decodes only the part that is taken.

On a CPU DALI only decodes, to the bits of `decoding.decode`; resizing and colours are those of the PyTorch pipeline, so
the batches are the same to the bit. On a GPU its decoder and its resize do the work.

What DALI would decode to other bits (16 bits, transparency, GIF, BMP, TIFF, AVIF) reaches it as a PNG of the right
pixels.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import nvidia.dali as dali
import torch
from numpy.typing import NDArray
from nvidia.dali import fn
from torch import Tensor
from torchvision.io import encode_png

from fastsnap.data.decoding import centred
from fastsnap.data.finishing import Finishing
from fastsnap.data.plan import Batch, Plan
from fastsnap.data.sources import FileSet
from fastsnap.data.streaming import Position, ReadAhead, decoded, read_unchanged
from fastsnap.data.survey import decoding_pool
from fastsnap.kernels.resized_crop import resized_crops_of
from fastsnap.kernels.resized_crop_reference import coloured

PREFETCH = 1  # batches that DALI prepares while the step runs: whole photographs are large
ABSOLUTE = {"normalized_anchor": False, "normalized_shape": False}  # of slices: in pixels


class DaliFiles:
    """See plan.Pipeline, and dali_pipeline.DaliPipeline for how positions are kept."""

    def __init__(
        self,
        source: FileSet,
        plan: Plan,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        threads: int,
    ) -> None:
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"DALI runs on cpu and cuda, got device {device}: use --loader torch")
        self.name = "dali-files-gpu" if device.type == "cuda" else "dali-files-cpu"
        self.batch_size, self.steps_per_epoch = plan.batch_size, plan.steps_per_epoch
        self._source, self.plan, self._device = source, plan, device
        self._labels = torch.from_numpy(source.labels)
        self._resized_crop = plan.augmentation is not None and plan.augmentation.kind == "resized-crop"
        self._finish = Finishing(plan, source.shape, source.shape[:2], mean, std, device)
        self._threads, self._pool = threads, decoding_pool(threads)
        self._ahead = ReadAhead(
            plan, threads, lambda _, batch, place: _encoded(source, int(batch.indices[place]))
        )
        self._cursor: Position = (0, 0)
        self._in_flight: list[Position] = []
        self._failure: BaseException | None = None
        self._pipe = self._build()

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """See plan.Pipeline. Raises DataError, naming it, for a file that changed."""
        for step in self.plan.steps(first_step):
            position = (epoch if self.plan.training else 0, step)
            images, batch = self._fetch(position), self.plan.batch(*position)
            pixels = (
                self._on_gpu(images, batch) if self._device.type == "cuda" else self._on_cpu(images, batch)
            )
            labels = self._labels[torch.from_numpy(batch.indices)].to(self._device, non_blocking=True)
            yield pixels.permute(0, 3, 1, 2), labels

    def _on_cpu(self, images: Any, batch: Batch) -> Tensor:
        """From decoded images of any sizes."""
        arrays = [np.asarray(images[place]) for place in range(len(batch.indices))]
        if self._resized_crop:
            whole = torch.tensor([(0, 0, *array.shape[:2]) for array in arrays])
            flips, tensors = torch.from_numpy(batch.flips), [torch.from_numpy(array) for array in arrays]
            colours, size = self._finish.colours(batch), self._source.shape[:2]
            output = self._finish.output(len(arrays))
            return resized_crops_of(tensors, whole, flips, colours, size, self._threads, output)
        resize, side = self._source.resize, self._source.size
        squares = list(self._pool.map(lambda array: centred(array, resize, side), arrays))
        return self._finish(torch.from_numpy(np.stack(squares)), np.arange(len(squares)), batch)

    def _on_gpu(self, images: Any, batch: Batch) -> Tensor:
        """From images of one size, float32 for resized crops, else uint8."""
        pixels = torch.from_dlpack(images.as_tensor())
        if not self._resized_crop:
            return self._finish(pixels, np.arange(len(pixels)), batch)
        flips = torch.from_numpy(batch.flips).to(self._device)[:, None, None, None]
        colours = self._finish.colours(batch).to(self._device, non_blocking=True)
        return coloured(torch.where(flips, pixels.flip(2), pixels), colours)

    def _build(self) -> Any:
        on_gpu = self._device.type == "cuda"
        pipe = dali.Pipeline(
            self.plan.largest_batch,
            num_threads=self._threads,
            device_id=torch.zeros(0, device=self._device).get_device() if on_gpu else None,
            prefetch_queue_depth=PREFETCH,
            exec_dynamic=True,  # outputs own their memory
        )
        operators: Any = fn  # its stubs do not know all arguments
        types: Any = dali.types
        how = {
            "device": "mixed" if on_gpu else "cpu",
            "output_type": types.RGB if self._source.channels == 3 else types.GRAY,
        }
        size = list(self._source.shape[:2])
        with pipe:
            # DALI warns of outputs that nobody uses.
            count = 3 if self._resized_crop or on_gpu else 1
            files, *parts = operators.external_source(self._next_batch, num_outputs=count, batch_info=True)
            if self._resized_crop:
                images = operators.decoders.image_slice(files, *parts, axes=[0, 1], **how, **ABSOLUTE)
                if on_gpu:
                    images = operators.resize(images, size=size, dtype=types.FLOAT)
            else:
                images = operators.decoders.image(files, **how)
                if on_gpu:
                    images = operators.resize(images, size=parts[1], dtype=types.UINT8)
                    images = operators.slice(images, parts[0], size, axes=[0, 1], **ABSOLUTE)
            pipe.set_outputs(images)
        pipe.build()
        return pipe

    def _next_batch(self, _info: Any) -> tuple[list[NDArray[Any]], ...]:
        """What DALI prepares next, called within `run`; the cursor goes on from epoch to epoch."""
        epoch, step = position = self._cursor
        self._in_flight.append(position)
        following = epoch + 1 if self.plan.training else 0
        self._cursor = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (following, 0)
        batch = self.plan.batch(epoch, step)
        try:
            files = self._ahead.take(position)
        except BaseException as error:
            self._failure = error  # DALI would make a text of it
            raise
        if not self._resized_crop and self._device.type == "cpu":
            return (files,)
        return files, *self._parts(batch)

    def _parts(self, batch: Batch) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]:
        """Corners and shapes: of the parts to decode; or of the centre, and what the image is resized to before."""
        if batch.boxes is not None:
            return [box[:2] for box in batch.boxes], [box[2:] for box in batch.boxes]
        shapes = [_resized_shape(size, self._source.resize) for size in self._source.sizes[batch.indices]]
        side = self._source.size
        corners = [np.array([round((length - side) / 2) for length in shape], np.int32) for shape in shapes]
        return corners, [np.array(shape, np.float32) for shape in shapes]

    def _fetch(self, position: Position) -> Any:
        """DALI's output for the batch at `position`."""
        if position not in self._in_flight:
            self._cursor = position
        while True:
            stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
            try:
                (images,) = self._pipe.run(stream)
            except RuntimeError as error:
                if self._failure is not None:
                    raise self._failure from None
                self._name_the_damaged()
                raise RuntimeError(f"DALI cannot decode a batch: {error}") from error
            if self._in_flight.pop(0) == position:
                return images

    def _name_the_damaged(self) -> None:
        """Raise DamagedImage for the first file of the batches in flight that cannot be decoded."""
        for position in self._in_flight:
            for index in self.plan.batch(*position).indices:
                decoded(self._source, int(index), read_unchanged(self._source, int(index)))


def _encoded(source: FileSet, index: int) -> NDArray[np.uint8]:
    """The bytes that DALI is given for file `index`."""
    content = read_unchanged(source, index)
    if source.direct[index]:
        return np.frombuffer(content, np.uint8)
    pixels = torch.from_numpy(decoded(source, index, content)).permute(2, 0, 1)
    return encode_png(pixels, compression_level=1).numpy()


def _resized_shape(size: NDArray[np.int32], resize: int) -> tuple[int, int]:
    """Height and width of an image of `size` when its shorter side is `resize` pixels, as torchvision counts."""
    height, width = int(size[0]), int(size[1])
    if height <= width:
        return resize, int(resize * width / height)
    return int(resize * height / width), resize
