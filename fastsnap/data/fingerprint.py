"""A fingerprint of images and labels: that a run goes on, and is evaluated, with those that it began with."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsnap.data.archives import DataError
from fastsnap.data.datasets import Dataset
from fastsnap.data.sources import ImageSet, Source

NAMES = {"train": "training", "validation": "validation", "test": "test"}  # of the splits, in messages


def image_sets(dataset: Dataset) -> dict[str, Source]:
    """The splits that there are, by the names that they have in config.json."""
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    return {name: split for name, split in splits.items() if split is not None}


def fingerprint(source: Source) -> str:
    """SHA-256, in hexadecimal, of shapes, images and labels in their order; of files, their names, sizes and labels."""
    digest = hashlib.sha256()
    if isinstance(source, ImageSet):
        arrays: list[NDArray[Any]] = [source.images, source.labels]
    else:
        arrays = [source.stamps[:, 0], source.sizes, source.labels]
        for name in source.names:
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
    for array in arrays:
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        digest.update(f"{little.dtype.str}{little.shape}".encode())
        digest.update(little.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def fingerprints(dataset: Dataset) -> dict[str, str]:
    """The fingerprint of each split, for config.json."""
    return {name: fingerprint(split) for name, split in image_sets(dataset).items()}


def require_same_images(splits: Mapping[str, Source], config: Mapping[str, Any], run: str) -> None:
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
