"""Whether the ensemble notices images that it knows nothing of: another data set against the test split.

How unsure it is of each image is a score for being foreign; the area under the ROC curve (AUROC) says how well the
score tells the two sets apart: 0.5 not at all, 1 without fault. Entropy is how unsure it is in all, mutual information
the part that comes from the members' differing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsnap.data.datasets import load_dataset
from fastsnap.data.sources import ImageSet
from fastsnap.ensemble.combination import Combination
from fastsnap.ensemble.module import Ensemble
from fastsnap.ensemble.preprocessing import Preprocessing
from fastsnap.ensemble.reading import read_batches
from fastsnap.ensemble.walking import NoPicture, pictures_of
from fastsnap.run_files import RunError

FOLDER = "folder"
# Of ITU-R BT.601, in units of 1 / 65,536, as Pillow turns RGB into grey.
GREY = np.array([19595, 38470, 7471], np.uint32)


@dataclass(frozen=True)
class Against:
    """The test split against `images` of another set.

    name                 of the data set, or the folder
    skipped              pictures of a folder that cannot be decoded
    entropy, mutual_information  AUROC, 0 to 1; the latter None for a single member, whose is always 0
    test_entropy, other_entropy  float32, in nats, of each image
    """

    name: str
    images: int
    skipped: int
    entropy: float
    mutual_information: float | None
    test_entropy: Tensor = field(compare=False, repr=False)
    other_entropy: Tensor = field(compare=False, repr=False)

    def as_json(self) -> dict[str, Any]:
        """Without the images' own figures, of which the means are told."""
        names = ("name", "images", "skipped")
        return {name: getattr(self, name) for name in names} | {
            "auroc_by_entropy": self.entropy,
            "auroc_by_mutual_information": self.mutual_information,
            "mean_entropy_test": self.test_entropy.double().mean().item(),
            "mean_entropy_other": self.other_entropy.double().mean().item(),
        }


def measure_against(
    ensemble: Ensemble, test: Combination, name: str, folder: Path, batch_size: int, threads: int
) -> Against:
    """What `ensemble` says of the test images of the data set `name` in `folder`, or, with the name "folder", of all
    pictures in it, against what it says of the run's own.

    Raises ValueError for a data set that is not known or not there, and for a folder without pictures.
    """
    # scikit-learn takes a second to import, and only this needs it.
    from sklearn.metrics import roc_auc_score

    batches = _Others(ensemble.preprocessing, name, folder, batch_size, threads)
    entropies, information = [], []
    for pixels in batches:
        said = ensemble.combined(torch.from_numpy(pixels))
        entropies.append(said.entropy.cpu())
        information.append(said.mutual_information.cpu())
    if not entropies:
        raise RunError(f"against (--against) {name} {folder} has no picture that can be decoded")
    other = torch.cat(entropies)
    foreign = np.repeat([0, 1], [len(test.entropy), len(other)])

    def auroc(own: Tensor, others: Tensor) -> float:
        return float(roc_auc_score(foreign, torch.cat([own.cpu(), others]).numpy()))

    members = len(ensemble.members)
    return Against(
        name=str(folder) if name == FOLDER else name,
        images=len(other),
        skipped=batches.skipped,
        entropy=auroc(test.entropy, other),
        mutual_information=auroc(test.mutual_information, torch.cat(information)) if members > 1 else None,
        test_entropy=test.entropy.cpu(),
        other_entropy=other,
    )


class _Others:
    """Batches uint8 [B, H, W, C] of the run's size; counts the pictures that cannot be decoded."""

    def __init__(
        self, preprocessing: Preprocessing, name: str, folder: Path, batch_size: int, threads: int
    ) -> None:
        self.skipped = 0
        self._preprocessing, self._folder = preprocessing, folder
        self._batch_size, self._threads = batch_size, threads
        self._images: NDArray[np.uint8] | None = None
        if name != FOLDER:
            test = load_dataset(name, folder, download=False).test
            assert isinstance(test, ImageSet)
            self._images = test.images

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        return self._of_files() if self._images is None else self._of_arrays(self._images)

    def _of_arrays(self, images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
        for start in range(0, len(images), self._batch_size):
            part = with_channels(images[start : start + self._batch_size], self._preprocessing.image_shape[2])
            yield self._preprocessing.batch(torch.from_numpy(part)).numpy()

    def _of_files(self) -> Iterator[NDArray[np.uint8]]:
        found = (name for name in pictures_of([str(self._folder)]) if not isinstance(name, NoPicture))
        for batch in read_batches(self._preprocessing, found, self._batch_size, self._threads):
            arrays = [pixels for _, pixels in batch if not isinstance(pixels, ValueError)]
            self.skipped += len(batch) - len(arrays)
            if arrays:
                yield np.stack(arrays)


def with_channels(images: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """Images uint8 [N, H, W, C] in grey (1 channel) or RGB (3), as the run's are."""
    if images.shape[3] == channels:
        return np.ascontiguousarray(images)
    if channels == 3:
        return np.repeat(images, 3, axis=3)
    grey = (images.astype(np.uint32) @ GREY + 2**15) >> 16
    return grey.astype(np.uint8)[..., None]
