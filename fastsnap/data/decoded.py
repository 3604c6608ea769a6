"""One pass over the pictures of a split: each brought to one form, what is damaged named, exact sums of the rest."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastsnap.data.cache import Maker
from fastsnap.data.decoding import DamagedImage, centred, decode
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
        # Exact: integers, whatever the order in which the threads come.
        self._sums = np.zeros((2, form.channels), np.int64)
        self._pixels = 0

    def run(self, chosen: NDArray[np.bool_], background: tuple[int, ...]) -> None:
        """Decode those of the mask."""

        def work(index: int) -> tuple[int, str | None, NDArray[np.int64], int]:
            path = self._root / self.split.names[index]
            nothing = np.zeros((2, self._form.channels), np.int64)
            try:
                image = self._form.of(decode(path, self._form.channels, background))
                if image.shape != self._shape:
                    raise DamagedImage(f"{path}: it changed while it was read")
                if self._images is not None:
                    self._images[index] = image
            except DamagedImage as error:
                return index, str(error), nothing, 0
            # Of rows in 32 bits, which hold 66,000 squares; of all in 64.
            values = image.astype(np.uint32)
            rows = [values.sum(1, dtype=np.uint32), np.square(values).sum(1, dtype=np.uint32)]
            return index, None, np.stack([row.sum(0, dtype=np.int64) for row in rows]), values[..., 0].size

        for index, reason, sums, pixels in in_threads(work, np.flatnonzero(chosen).tolist(), self._threads):
            if reason is None:
                self._kept[index] = True
            else:
                self.damaged[index] = reason
            self._sums += sums
            self._pixels += pixels
            self._count(1)

    def mean(self, otherwise: int) -> tuple[int, ...]:
        """The mean colour so far, rounded; `otherwise` of no pixels."""
        if not self._pixels:
            return (otherwise,) * self._form.channels
        return tuple(round(total / self._pixels) for total in self._sums[0].tolist())

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel, 0 to 255; a channel of one value has deviation 1."""
        count = max(1, self._pixels)
        mean = self._sums[0] / count
        variance = np.maximum(0, self._sums[1] / count - mean**2)
        std = np.where(variance > 0, np.sqrt(variance), 1.0)
        return [round(value, 4) for value in mean.tolist()], [round(value, 4) for value in std.tolist()]
