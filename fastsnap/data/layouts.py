"""Folders of images: which classes and splits a folder holds, by the names of its folders and files alone."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Names:
    """The files of a split, by their names relative to the layout's root, and their labels int64 [N]."""

    names: list[str]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """What `find_layout` found.

    kind      for the summary: "train/ and val/ folders", "class folders", "Tiny ImageNet", "ImageNet"
    classes   their names in order, as many as labels go to
    left_out  reason -> number of files and folders that are no image of a split
    """

    root: Path
    kind: str
    classes: tuple[str, ...]
    train: Names
    test: Names
    left_out: dict[str, int]
