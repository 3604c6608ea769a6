"""A fingerprint of images and labels: that a run goes on, and is evaluated, with those that it began with."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fastsnap.data.archives import DataError
from fastsnap.data.datasets import Dataset, ImageSet

NAMES = {"train": "training", "validation": "validation", "test": "test"}  # of the splits, in messages


def image_sets(dataset: Dataset) -> dict[str, ImageSet]:
    """The splits that there are, by the names that they have in config.json."""
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    return {name: split for name, split in splits.items() if split is not None}


def fingerprint(images: ImageSet) -> str:
    """SHA-256 of shapes, images and labels in their order, in hexadecimal."""
    digest = hashlib.sha256()
    for array in (images.images, images.labels):
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        digest.update(f"{little.dtype.str}{little.shape}".encode())
        digest.update(little.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def fingerprints(dataset: Dataset) -> dict[str, str]:
    """The fingerprint of each split, for config.json."""
    return {name: fingerprint(split) for name, split in image_sets(dataset).items()}


def require_same_images(splits: Mapping[str, ImageSet], config: Mapping[str, Any], run: str) -> None:
    """Raise DataError, which names the splits, if images or labels are not those that `run` had.

    config  config.json of the run; old ones have no fingerprints, and anything goes
    """
    saved = config.get("fingerprints") or {}
    found = {name: fingerprint(split) for name, split in splits.items() if name in saved}
    different = [NAMES[name] for name in found if found[name] != saved[name]]
    if different:
        raise DataError(
            f"the {' and '.join(different)} images or labels are not those that {run} was trained with. Give the "
            "folder of those with --data, or train a run of its own on these with another --out"
        )
