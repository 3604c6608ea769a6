"""The files below a folder of classes: in an order of names, at any depth, links followed but never in circles."""

import os
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastsnap.data.archives import DataError

ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
CLUTTER = (
    "__macosx",
    "thumbs.db",
    "desktop.ini",
    "$recycle.bin",
    "@eadir",
)  # of systems and of photo servers
HIDDEN, NO_IMAGE, LOOPS = (
    "hidden files and folders",
    "files that are no image by their name",
    "links that lead back",
)
BROKEN, OUTSIDE = "links that lead nowhere", "images outside of any class's folder"
EMPTY = "folders without an image"


@dataclass
class Listing:
    """The images of a folder of classes.

    classes   names of its folders, in order
    names     of the files, in order, with `prefix` and relative to the root
    labels    int64 [N], into classes
    left_out  reason -> number of files and folders
    """

    classes: tuple[str, ...]
    names: list[str]
    labels: NDArray[np.int64]
    left_out: Counter[str] = field(default_factory=Counter)


def is_image(name: str) -> bool:
    """By its ending, in any case."""
    return name.lower().endswith(ENDINGS)


def is_hidden(name: str) -> bool:
    """What systems put into folders without being asked."""
    return name.startswith(".") or name.lower() in CLUTTER


def list_folder(folder: Path, prefix: str) -> Listing:
    """The images in the folders that `folder` holds, each a class. Raises DataError for an empty class."""
    left_out: Counter[str] = Counter()
    names: list[str] = []
    labels = array("q")
    classes: list[str] = []
    chain = frozenset([_identity(folder)])
    for entry in _entries(folder, left_out):
        if not entry.is_dir():
            left_out[OUTSIDE if is_image(entry.name) else NO_IMAGE] += 1
            continue
        before = len(names)
        _walk(Path(entry.path), f"{prefix}{entry.name}/", chain, names, left_out)
        if len(names) == before:
            raise DataError(
                f"the class {entry.name!r} in {folder} is empty: add images, or remove the folder"
            )
        labels.extend([len(classes)] * (len(names) - before))
        classes.append(entry.name)
    return Listing(tuple(classes), names, np.array(labels, np.int64), left_out)


def list_images(folder: Path, prefix: str, left_out: Counter[str]) -> list[str]:
    """All images below `folder`, in order, with `prefix`; the rest is counted in `left_out`."""
    names: list[str] = []
    _walk(folder, prefix, frozenset(), names, left_out)
    return names


def _walk(
    folder: Path, prefix: str, above: frozenset[tuple[int, int]], names: list[str], left_out: Counter[str]
) -> None:
    identity = _identity(folder)
    if identity in above:
        left_out[LOOPS] += 1
        return
    for entry in _entries(folder, left_out):
        if entry.is_dir():
            _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {identity}, names, left_out)
        elif is_image(entry.name):
            names.append(prefix + entry.name)
        else:
            left_out[NO_IMAGE] += 1


def _entries(folder: Path, left_out: Counter[str]) -> list[os.DirEntry[str]]:
    """What is in `folder`, in order, that is neither hidden nor a broken link."""
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be read: {error.strerror}; make it readable, or remove it"
        ) from error
    kept = []
    for entry in entries:
        if is_hidden(entry.name):
            left_out[HIDDEN] += 1
        elif entry.is_symlink() and not os.path.exists(entry.path):
            left_out[BROKEN] += 1
        else:
            kept.append(entry)
    return kept


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
