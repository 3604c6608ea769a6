"""What goes in: images in memory or in files, one interface; and how training images are varied."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

AUGMENTATIONS = ("crop", "resized-crop", "none")
PADDING = 4  # pixels, of a data set that has no other
JITTER, LIGHTING = 0.4, 0.1  # of the authors' ImageNet recipe (fb.resnet.torch)


@dataclass(frozen=True)
class Augmentation:
    """How a training image is varied; all draws come from the plan.

    kind      "crop": zero-padded by `padding` pixels (after normalisation: the mean colour) and cropped at random;
              "resized-crop": 8 to 100 % of the area, 3/4 to 4/3, brought to the image size; "none": as it is
    flip      mirrored with probability 1/2, for classes that keep their meaning
    jitter    brightness, contrast and saturation in random order, each by a factor from 1 - jitter to 1 + jitter
    lighting  standard deviation of PCA lighting along ImageNet's principal colours; RGB only
    """

    kind: str
    padding: int = 0
    flip: bool = False
    jitter: float = 0.0
    lighting: float = 0.0


def augmentation_of(kind: str | None, usual: Augmentation) -> Augmentation:
    """What `kind` means for a data set that `usual`ly is varied so; None is as usual.

    Raises ValueError for another kind.
    """
    if kind is None or kind == usual.kind:
        return usual
    if kind == "crop":
        return Augmentation("crop", padding=PADDING, flip=usual.flip)
    if kind == "resized-crop":
        return Augmentation("resized-crop", flip=usual.flip, jitter=JITTER, lighting=LIGHTING)
    if kind == "none":
        return replace(usual, kind="none", padding=0, flip=False, jitter=0.0, lighting=0.0)
    raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {kind!r}")


@dataclass(frozen=True)
class ImageSet:
    """Images uint8 [N, H, W, C], C-contiguous, in memory or memory-mapped, and their labels int64 [N].

    size  pixels of the side that training brings images to, where it is not theirs: resized-crop keeps them larger
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    size: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images that a network sees."""
        height, width, channels = self.images.shape[1:]
        return (self.size or height, self.size or width, channels)

    @property
    def nbytes(self) -> int:
        return self.images.nbytes

    def part(self, chosen: slice) -> ImageSet:
        """Those in a row, in the same memory."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])

    def subset(self, chosen: NDArray[np.bool_]) -> ImageSet:
        """Those where the mask bool [N] is true."""
        return replace(self, images=self.images[chosen], labels=self.labels[chosen])


@dataclass(frozen=True)
class FileSet:
    """Images in files, decoded as they are needed, and their labels int64 [N].

    root        folder that `names` are relative to
    sizes       int32 [N, 2]: height and width of each image as it is seen, its EXIF orientation applied
    stamps      int64 [N, 2]: bytes and modification time (ns) of each file when it was checked
    direct      int8 [N]: the EXIF orientation, 1 to 8, of files that any decoder takes as they are; 0: of all others
    size        pixels of the square side that a network sees
    resize      pixels that the shorter side of a test image is brought to before the centre crop
    channels    1 or 3
    background  the colour, 0 to 255 per channel, that transparent pixels show
    """

    root: Path
    names: list[str]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int32]
    stamps: NDArray[np.int64]
    direct: NDArray[np.int8]
    size: int
    resize: int
    channels: int
    background: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images that a network sees."""
        return (self.size, self.size, self.channels)

    @property
    def nbytes(self) -> int:
        """Of the images in memory: there are none."""
        return 0

    def part(self, chosen: slice) -> FileSet:
        """Those in a row."""
        mask = np.zeros(len(self.labels), bool)
        mask[chosen] = True
        return self.subset(mask)

    def subset(self, chosen: NDArray[np.bool_]) -> FileSet:
        """Those where the mask bool [N] is true."""
        return replace(
            self,
            names=list(compress(self.names, chosen)),
            labels=self.labels[chosen],
            sizes=self.sizes[chosen],
            stamps=self.stamps[chosen],
            direct=self.direct[chosen],
        )


Source = ImageSet | FileSet


@dataclass(frozen=True)
class Dataset:
    """A data set, and how the field trains on it."""

    name: str
    train: Source
    validation: Source | None  # held out of the training images
    test: Source
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, 0 to 255
    std: tuple[float, ...]
    augmentation: Augmentation  # of the training images
    source: str  # for the log: where the files came from, and whether their published checksums hold
    # Pixels of a test image's shorter side before its centre crop; None: used as it is.
    resize: int | None = None
    storage: str | None = None  # of a folder of pictures: "arrays" or "files"
    # Of a folder of pictures: the colour, 0 to 255, that transparent pixels show.
    background: tuple[int, ...] | None = None
