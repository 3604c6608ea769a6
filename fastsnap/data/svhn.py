"""Street View House Numbers (Netzer et al. 2011) from its MATLAB files, as untrusted input."""

from pathlib import Path

import numpy as np

from fastsnap.data.archives import DataError, check_labels
from fastsnap.data.downloads import locate
from fastsnap.data.sources import Augmentation, Dataset, ImageSet

PIXELS = (32, 32, 3)
MOST_IMAGES = 2**20  # the published files have 73,257 and 26,032
MOST_BYTES = 2**30
CLASSES = tuple(str(digit) for digit in range(10))


def load_svhn(folder: Path, download: bool) -> Dataset:
    """73,257 training and 26,032 test images. Raises DataError for missing and for damaged files."""
    files, source = locate("svhn", folder, download)
    return Dataset(
        name="svhn",
        train=_read(files["train_32x32.mat"]),
        validation=None,
        test=_read(files["test_32x32.mat"]),
        classes=CLASSES,
        mean=(111.61, 113.16, 120.57),
        std=(50.50, 51.26, 50.24),
        augmentation=Augmentation("none"),  # numbers have no mirror images, and the paper used none
        source=source,
    )


def _read(path: Path) -> ImageSet:
    """X uint8 [32, 32, 3, N] and y [N, 1], in which 10 is the digit 0."""
    import scipy.io  # here: only this data set needs it

    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("it is too large")
        # What is in the file, before any of it is unpacked.
        shapes = {name: (shape, kind) for name, shape, kind in scipy.io.whosmat(path)}
        shape, kind = shapes["X"]
        if shape[:3] != PIXELS or len(shape) != 4 or kind != "uint8" or not 1 <= shape[3] <= MOST_IMAGES:
            raise ValueError(f"X is {kind} {list(shape)} instead of uint8 [32, 32, 3, N]")
        if shapes["y"][0] != (shape[3], 1):
            raise ValueError(f"y is {list(shapes['y'][0])} instead of {[shape[3], 1]}")
        content = scipy.io.loadmat(path, variable_names=["X", "y"])
        images = np.ascontiguousarray(content["X"].transpose(3, 0, 1, 2))
        labels = content["y"].reshape(-1).astype(np.int64)
        if images.shape[1:] != PIXELS or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
            raise ValueError("its arrays are not what its list of contents says")
    except Exception as error:  # of a damaged file scipy raises anything
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is no file of SVHN ({reason}): get it again") from error
    labels[labels == len(CLASSES)] = 0
    check_labels(labels, len(CLASSES), path)
    return ImageSet(images, labels)
