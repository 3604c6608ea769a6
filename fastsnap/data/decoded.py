"""One pass over the pictures of a split: each brought to one form, what is damaged named, exact sums of the rest."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastsnap.data.cache import Maker
from fastsnap.data.decoding import centred, decode_checked
from fastsnap.data.headers import DamagedImage, read_picture
from fastsnap.data.survey import in_threads


@dataclass(frozen=True)
class Split:
    """The files of a split, surveyed: see sources.FileSet. Where the header is damaged, the size is 0."""

    names: list[str]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32]
    stamps: NDArray[np.int64]
    transparent: NDArray[np.bool_]
    coloured: NDArray[np.bool_]
    direct: NDArray[np.int8]


@dataclass(frozen=True)
class Form:
    """What every picture of a split is brought to.

    side  pixels of a square; None: as it is, where all are of one size
    """

    resize: int
    side: int | None
    channels: int

    def shape(self, split: Split) -> tuple[int, int, int]:
        """Height, width and channels."""
        height, width = (
            (self.side, self.side) if self.side else split.sizes[split.sizes[:, 0] > 0][0].tolist()
        )
        return height, width, self.channels

    def of(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A decoded picture in this form."""
        return centred(picture, self.resize, self.side) if self.side else picture


class Decoding:
    """Decoding one split: what was damaged, and the sums that mean and deviation are made of."""

    def __init__(
        self,
        root: Path,
        split: Split,
        form: Form,
        maker: Maker,
        part: str,
        keep: bool,
        threads: int,
        count: Callable[[int], None],
    ) -> None:
        self.split, self.damaged = split, dict[int, str]()
        self._root, self._form, self._threads, self._count = root, form, threads, count
        self._images = maker.array(part, (len(split.names), *form.shape(split)), np.uint8) if keep else None
        self._shape = form.shape(split)
        self._kept = maker.array(f"kept-{part}", (len(split.names),), bool)
        # Exact whatever the order in which the threads come: how often each channel has each value.
        self._counts = np.zeros((form.channels, 256), np.int64)

    def run(self, chosen: NDArray[np.bool_], background: tuple[int, ...]) -> None:
        """Decode those of the mask."""

        def work(index: int) -> tuple[int, str | None, NDArray[np.int64] | None]:
            path = self._root / self.split.names[index]
            try:
                content, channels = read_picture(path), self._form.channels
                direct = 0 if channels == 1 and self.split.coloured[index] else int(self.split.direct[index])
                image = self._form.of(decode_checked(content, str(path), channels, background, direct))
                if image.shape != self._shape:
                    raise DamagedImage(f"{path}: it changed while it was read")
            except DamagedImage as error:
                return index, str(error), None
            if self._images is not None:
                self._images[index] = image
            return (
                index,
                None,
                np.stack(
                    [np.bincount(plane, minlength=256) for plane in image.reshape(-1, len(self._counts)).T]
                ),
            )

        for index, reason, counts in in_threads(work, np.flatnonzero(chosen).tolist(), self._threads):
            if counts is None:
                self.damaged[index] = reason or ""
            else:
                self._kept[index] = True
                self._counts += counts
            self._count(1)

    def mean(self, otherwise: int) -> tuple[int, ...]:
        """The mean colour so far, rounded; `otherwise` of no pixels."""
        if not self._counts.any():
            return (otherwise,) * len(self._counts)
        return tuple(round(value) for value in self._moment(1).tolist())

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel, 0 to 255; a channel of one value has deviation 1."""
        mean = self._moment(1)
        variance = np.maximum(0, self._moment(2) - mean**2)
        std = np.where(variance > 0, np.sqrt(variance), 1.0)
        return [round(value, 4) for value in mean.tolist()], [round(value, 4) for value in std.tolist()]

    def _moment(self, power: int) -> NDArray[np.float64]:
        """The mean of the values' power, per channel."""
        return (self._counts @ np.arange(256, dtype=np.int64) ** power) / max(1, int(self._counts[0].sum()))
