"""An ensemble as one module: images in, averaged probabilities out, the preprocessing inside."""

import contextlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastsnap.device import AUTOCAST_DTYPES
from fastsnap.ensemble.combination import Combination, combine, combine_plainly
from fastsnap.ensemble.members import Members, describe_members
from fastsnap.ensemble.outputs import logits_of
from fastsnap.ensemble.predictions import Predictions, joined
from fastsnap.ensemble.preprocessing import Picture, Preprocessing, require_uint8
from fastsnap.ensemble.reading import BATCH_SIZE, Batch, listed, read_batches
from fastsnap.run_schema import SnapshotEntry

Images = Tensor | NDArray[np.uint8] | Sequence[Tensor | NDArray[np.uint8]]


class Ensemble(nn.Module):
    """Made by `load_ensemble`: images -> averaged probabilities [N, classes], always in evaluation, without gradients.

    classes        names, in the order of the probabilities
    image_size     height and width of what the networks see
    members        the snapshots' entries of the manifest, in the order of the run
    weights        of the members, adding up to 1
    temperature    of the averaged probabilities: p -> p^(1 / temperature), normalised again
    precision      of the forward passes: "fp32", or by autocast "bf16" or "fp16"
    preprocessing  what is done to a picture before
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        networks: Members,
        members: Sequence[SnapshotEntry],
        preprocessing: Preprocessing,
        *,
        weights: Sequence[float],
        temperature: float = 1.0,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.networks, self.members = networks, tuple(members)
        self.preprocessing, self.temperature, self.precision = preprocessing, temperature, precision
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self._normalise_on(torch.device("cpu"))
        super().train(False)

    def _normalise_on(self, device: torch.device) -> None:
        """Mean and 1 / deviation of a row of pixels [W * C], fp32: rows take a fraction of the time of pixels of C."""
        width = self.preprocessing.image_shape[1]
        mean, std = torch.tensor(self.preprocessing.mean), torch.tensor(self.preprocessing.std)
        self.register_buffer("mean", mean.repeat(width).to(device), persistent=False)
        self.register_buffer("scale", (1 / std).repeat(width).to(device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Ensemble":
        super()._apply(fn, recurse)
        # .half() is for the networks: pixels of 0 to 255 would lose in fp16 what training saw.
        self._normalise_on(self.device)
        return self

    def train(self, mode: bool = True) -> "Ensemble":
        """Stays in evaluation: batch statistics and dropout are for training, and are not meant here."""
        return super().train(False)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.preprocessing.classes

    @property
    def image_size(self) -> tuple[int, int]:
        height, width, _ = self.preprocessing.image_shape
        return height, width

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.mean.device

    def forward(self, images: Images) -> Tensor:
        """Probabilities float32 [N, classes], on the ensemble's device.

        images  uint8 [N, H, W, C], of any device: what has the run's size is taken as prepared, others are resized and
                cropped as the run's test images were; or a list of arrays uint8 [h, w, C] (grey: or [h, w]) of any
                sizes, which always are
        Raises ValueError for other types and shapes, and for networks that give NaN.
        """
        return self.combined(images).probabilities

    @torch.no_grad()
    def combined(self, images: Images) -> Combination:
        """As `forward`, with entropy, mutual information and disagreement [N]."""
        return self.combine(self.member_logits(images))

    def combine(self, logits_MNC: Tensor) -> Combination:
        """What the members' logits [M, N, classes] say together. Raises ValueError for NaN."""
        if torch.compiler.is_compiling():
            return combine_plainly(logits_MNC, self.weights, self.temperature)
        try:
            return combine(logits_MNC, self.weights, self.temperature)
        except ValueError as error:
            finite = [bool(torch.isfinite(logits).all()) for logits in logits_MNC]
            damaged = [
                str(entry.number) for entry, fine in zip(self.members, finite, strict=True) if not fine
            ]
            if not damaged:
                raise
            raise ValueError(
                f"NaN or infinite logits from snapshot {', '.join(damaged)}, in {self.precision}: compute in fp32, or "
                "leave it out with snapshots"
            ) from error

    @torch.no_grad()
    def member_logits(self, images: Images) -> Tensor:
        """Logits float32 [M, N, classes] of each member. Raises ValueError as `forward` does, but not for NaN."""
        return self.traceable_logits(images)

    def traceable_logits(self, images: Images) -> Tensor:
        """As `member_logits`, without turning gradients off, which torch.export cannot keep."""
        pixels = self._pixels(images)
        normalised = torch.sub(pixels.flatten(2), self.mean).mul_(self.scale).view(pixels.shape)
        inputs = normalised.permute(0, 3, 1, 2).to(next(self.networks.network.parameters()).dtype)
        if not torch.compiler.is_compiling() and not len(pixels):
            return normalised.new_empty((len(self.members), 0, len(self.classes)))
        return self.logits_of_inputs(inputs)

    def logits_of_inputs(self, inputs: Tensor) -> Tensor:
        """Logits float32 [M, N, classes] of images that are normalised already: [N, C, H, W], of the networks' type."""
        dtype = AUTOCAST_DTYPES.get(self.precision)
        logits = []
        for index in range(len(self.members)):
            # Entered anew for each member: autocast would keep the weights that it cast for another.
            with contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype):
                output = self.networks.take(index)(inputs)
            # Not len(inputs): it would be a constant in an exported graph.
            logits.append(logits_of(output, inputs.shape[0], len(self.classes)))
        return torch.stack(logits)

    def _pixels(self, images: Images) -> Tensor:
        """uint8 [N, H, W, C] of the run's size, where the ensemble is."""
        if isinstance(images, np.ndarray):
            require_uint8(images, "images")
            images = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        if not isinstance(images, Tensor):
            if not isinstance(images, list | tuple):
                raise ValueError(
                    f"images must be uint8 [N, height, width, channels] or a list of arrays, got a "
                    f"{type(images).__name__}: paths and PIL images are for ensemble.predict(images)"
                )
            named = ((f"image {index} of the list", image) for index, image in enumerate(images))
            pixels = [self.preprocessing.of_pixels(image, name) for name, image in named]
            shape = (0, *self.preprocessing.image_shape)
            images = torch.from_numpy(np.stack(pixels) if pixels else np.empty(shape, np.uint8))
        return self.preprocessing.batch(images).to(self.device, non_blocking=True)

    def predict(
        self,
        images: Picture | Iterable[Picture],
        *,
        batch_size: int = BATCH_SIZE,
        members: bool = False,
        threads: int | None = None,
    ) -> Predictions:
        """What the ensemble says of pictures, on the CPU.

        images      paths, PIL images, arrays or tensors uint8 [h, w, C] (grey: or [h, w]), of any sizes, or one of
                    these; or uint8 [N, H, W, C], see `forward`
        batch_size  images per forward pass
        members     also keep each member's probabilities
        threads     that decode files; default: PyTorch's number
        Raises DamagedImage (a ValueError), which names the file, for one that cannot be decoded, and ValueError for
        other pixels than these. No image, no error: the result has length 0.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not isinstance(images, Tensor | np.ndarray) or images.ndim != 4:
            pictures = listed(images)
            batches = read_batches(
                self.preprocessing, pictures, batch_size, threads or torch.get_num_threads()
            )
            parts = [self.describe(_stacked(batch), members=members) for batch in batches]
        else:
            parts = [
                self.describe(images[start : start + batch_size], members=members)
                for start in range(0, len(images), batch_size)
            ]
        return joined(parts) if parts else self.describe([], members=members)

    def describe(self, images: Images, *, members: bool = False) -> Predictions:
        """As `predict`, of what `forward` takes, in one forward pass."""
        logits_MNC = self.member_logits(images)
        combination = self.combine(logits_MNC)
        kept = torch.softmax(logits_MNC, 2).cpu() if members else None
        values = {name: value.cpu() for name, value in combination._asdict().items()}
        return Predictions(self.classes, **values, members=kept)

    def extra_repr(self) -> str:
        height, width, channels = self.preprocessing.image_shape
        return (
            f"{describe_members(self.networks)}, {len(self.classes)} classes, {width}x{height}x{channels}, "
            f"{self.precision}, temperature {self.temperature:g}"
        )


def _stacked(batch: Batch) -> Tensor:
    """uint8 [B, H, W, C]. Raises what the first that cannot be used raised."""
    arrays = []
    for _, pixels in batch:
        if isinstance(pixels, ValueError):
            raise pixels
        arrays.append(pixels)
    return torch.from_numpy(np.stack(arrays))
