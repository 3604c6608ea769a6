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
        inputs = self._inputs(images)
        if not torch.compiler.is_compiling() and not len(inputs):
            return self.mean.new_empty((len(self.members), 0, len(self.classes)))
        return self.logits_of_inputs(inputs)

    def _inputs(self, images: Images) -> Tensor:
        """Normalised, [N, C, H, W], of the networks' type."""
        pixels = self._pixels(images)
        normalised = torch.sub(pixels.flatten(2), self.mean).mul_(self.scale).view(pixels.shape)
        return normalised.permute(0, 3, 1, 2).to(next(self.networks.network.parameters()).dtype)

    def logits_of_inputs(self, inputs: Tensor) -> Tensor:
        """Logits float32 [M, N, classes] of images that are normalised already: [N, C, H, W], of the networks' type."""
        return torch.stack([self._member_logits(index, inputs) for index in range(len(self.members))])

    def _member_logits(self, index: int, inputs: Tensor) -> Tensor:
        """Of member `index` from 0, float32 [N, classes]."""
        dtype = AUTOCAST_DTYPES.get(self.precision)
        # Entered anew for each member: autocast would keep the weights that it cast for another.
        with contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype):
            output = self.networks.take(index)(inputs)
        # Not len(inputs): it would be a constant in an exported graph.
        return logits_of(output, inputs.shape[0], len(self.classes))

    @torch.no_grad()
    def in_turn(self, images: Images, threshold: float) -> tuple[Combination, Tensor]:
        """A cascade: the newest member is asked first, those before it only while their average is unsure.

        images     see `forward`
        threshold  probability of the most probable class, at temperature 1, that is enough
        Returns what the members say that were asked of each image, and how many these are, int64 [N]. Raises ValueError
        as `forward` does.
        """
        inputs = self._inputs(images)
        count, classes = len(inputs), len(self.classes)
        total_NC = torch.zeros(count, classes, device=self.device)
        logits_MNC = torch.zeros(len(self.members), count, classes, device=self.device)
        asked_N = torch.zeros(count, dtype=torch.int64, device=self.device)
        unsure, weight = torch.arange(count, device=self.device), 0.0
        for index in range(len(self.members) - 1, -1, -1):
            if not len(unsure):
                break
            logits_MNC[index, unsure] = self._member_logits(index, inputs[unsure])
            total_NC[unsure] += self.weights[index] * logits_MNC[index, unsure].softmax(1)
            weight += self.weights[index]
            asked_N[unsure] += 1
            # Not "< threshold": NaN is for `combine` to complain of.
            unsure = unsure[~(total_NC[unsure].amax(1) / weight >= threshold)]
        return self._combined_in_turn(logits_MNC, asked_N), asked_N

    def _combined_in_turn(self, logits_MNC: Tensor, asked_N: Tensor) -> Combination:
        """Of the last asked_N members of each image."""
        whole = self.combine(logits_MNC[:, :0])
        parts = Combination(*(value.new_empty((len(asked_N), *value.shape[1:])) for value in whole))
        for asked in asked_N.unique().tolist():
            chosen = asked_N == asked
            said = combine(logits_MNC[-asked:, chosen], self.weights[-asked:], self.temperature)
            for values, value in zip(parts, said, strict=True):
                values[chosen] = value
        return parts

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
        threshold: float | None = None,
        threads: int | None = None,
    ) -> Predictions:
        """What the ensemble says of pictures, on the CPU.

        images      paths, PIL images, arrays or tensors uint8 [h, w, C] (grey: or [h, w]), of any sizes, or one of
                    these; or uint8 [N, H, W, C], see `forward`
        batch_size  images per forward pass
        members     also keep each member's probabilities
        threshold   ask the newest member first and others only below this confidence: see `in_turn`
        threads     that decode files; default: PyTorch's number
        Raises DamagedImage (a ValueError), which names the file, for one that cannot be decoded, and ValueError for
        other pixels than these. No image, no error: the result has length 0.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if threshold is not None and members:
            raise ValueError(
                "members and threshold exclude each other: not all members are asked of every image"
            )
        if not isinstance(images, Tensor | np.ndarray) or images.ndim != 4:
            pictures = listed(images)
            batches = read_batches(
                self.preprocessing, pictures, batch_size, threads or torch.get_num_threads()
            )
            parts = [
                self.describe(_stacked(batch), members=members, threshold=threshold) for batch in batches
            ]
        else:
            parts = [
                self.describe(images[start : start + batch_size], members=members, threshold=threshold)
                for start in range(0, len(images), batch_size)
            ]
        return joined(parts) if parts else self.describe([], members=members)

    def describe(
        self, images: Images, *, members: bool = False, threshold: float | None = None
    ) -> Predictions:
        """As `predict`, of what `forward` takes, in one forward pass of each member."""
        if threshold is not None:
            said, asked_N = self.in_turn(images, threshold)
            values = {name: value.cpu() for name, value in said._asdict().items()}
            return Predictions(self.classes, **values, asked=asked_N.cpu())
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
