"""Folders of images: which classes and splits a folder holds, by the names of its folders and files alone.

    train/<class>/..., val/<class>/...    the test is in val, valid, validation or test, the first of them that is there
    <class>/...                           a fifth of each class is held out for the test: see `is_held_out`
    Tiny ImageNet as published            train/<id>/images/, val/images/ with val_annotations.txt, names from words.txt
    ImageNet as torchvision lays it out   train/<id>/, val/<id>/ with meta.bin

Pictures lie at any depth below their class.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastsnap.data.archives import DataError
from fastsnap.data.imagenet import class_names_of_imagenet, find_tiny_imagenet
from fastsnap.data.listing import Listing, list_folder

TRAIN, TESTS = "train", ("val", "valid", "validation", "test")
HELD_OUT_SHARE = 5  # one of so many
SHAPES = (
    "The layouts are train/<class>/ with val/<class>/ (or valid, validation, test); <class>/ alone; Tiny ImageNet and "
    "ImageNet as they are published"
)


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


def find_layout(root: str | Path) -> Layout:
    """The layout of the folder `root`. Raises DataError, saying what to do, where there is none or it has a fault."""
    root = Path(root)
    _require_folder(root)
    tiny = find_tiny_imagenet(root)
    if tiny is not None:
        layout = Layout(
            tiny.root, "Tiny ImageNet", tiny.classes, _names(*tiny.train), _names(*tiny.test), tiny.left_out
        )
    elif (root / TRAIN).is_dir():
        layout = _train_and_test(root)
    else:
        layout = _class_folders(root)
    _check(layout)
    return layout


def is_held_out(name: str) -> bool:
    """Whether the file of this name, relative to its class's folder's parent, is of the test.

    One of five, by a hash of the name alone: whatever files come or go, all others stay where they are.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def describe(layout: Layout) -> list[str]:
    """What the log says of it: images, classes, the smallest and the largest class, what was left out and why."""
    counts = np.bincount(layout.train.labels, minlength=len(layout.classes))
    lines = [
        f"{layout.kind} in {layout.root}: {len(layout.train.names):,} training images, {len(layout.test.names):,} test "
        f"images, {len(layout.classes):,} classes, {_range(counts, layout.classes)}"
    ]
    untested = len(layout.classes) - len(np.unique(layout.test.labels))
    if untested:
        lines.append(f"{untested:,} classes have no test image")
    if layout.left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(layout.left_out.items()))
        lines.append(f"left out: {reasons}")
    return lines


def _range(counts: NDArray[np.int64], classes: Sequence[str]) -> str:
    small, large = int(counts.argmin()), int(counts.argmax())
    if counts[small] == counts[large]:
        return f"{counts[small]:,} training images in each"
    return (
        f"from {counts[small]:,} ({classes[small]}) to {counts[large]:,} ({classes[large]}) training images"
    )


def _names(names: list[str], labels: Sequence[int]) -> Names:
    return Names(names, np.asarray(labels, np.int64))


def _require_folder(root: Path) -> None:
    if not root.exists():
        raise DataError(f"there is no folder {root}: name the folder of your images with --data (make: DATA)")
    if not root.is_dir():
        raise DataError(f"{root} is a file: name the folder that your images lie in with --data (make: DATA)")


def _train_and_test(root: Path) -> Layout:
    there = [name for name in TESTS if (root / name).is_dir()]
    if not there:
        raise DataError(
            f"{root} has train/ but none of {', '.join(f'{name}/' for name in TESTS)}: add one with images of every "
            "class, or name the train folder itself with --data, of which a fifth is then held out"
        )
    test = there[0]
    train, tested = list_folder(root / TRAIN, f"{TRAIN}/"), list_folder(root / test, f"{test}/")
    only_tested = sorted(set(tested.classes) - set(train.classes))
    if only_tested:
        raise DataError(
            f"{root}/{test} has {_quoted(only_tested)}, which {root}/{TRAIN} has not: a network can learn only classes "
            "that it is trained on. Remove them, or add training images"
        )
    left_out = train.left_out + tested.left_out
    for name in there[1:]:
        left_out[f"other split folders ({name}/)"] += 1
    classes = train.classes
    numbers = {name: number for number, name in enumerate(classes)}
    own = np.array([numbers[name] for name in tested.classes], np.int64)
    titles = class_names_of_imagenet(root, classes)
    kind = "ImageNet" if titles else f"{TRAIN}/ and {test}/ folders"
    labels = own[tested.labels] if len(tested.names) else np.zeros(0, np.int64)
    return Layout(
        root,
        kind,
        titles or classes,
        Names(train.names, train.labels),
        Names(tested.names, labels),
        dict(left_out),
    )


def _class_folders(root: Path) -> Layout:
    found = list_folder(root, "")
    if not found.classes:
        loose = sum(count for reason, count in found.left_out.items() if reason.startswith("images outside"))
        what = f"{loose:,} images but no folders of classes" if loose else "no folders with images"
        raise DataError(f"{root} has {what}. {SHAPES}")
    held_out = _held_out(found)
    return Layout(
        root,
        "class folders, a fifth held out for the test",
        found.classes,
        Names(
            [name for name, out in zip(found.names, held_out, strict=True) if not out],
            found.labels[~held_out],
        ),
        Names([name for name, out in zip(found.names, held_out, strict=True) if out], found.labels[held_out]),
        dict(found.left_out),
    )


def _held_out(found: Listing) -> NDArray[np.bool_]:
    return np.fromiter((is_held_out(name) for name in found.names), bool, len(found.names))


def _check(layout: Layout) -> None:
    """Raise DataError for what nothing can be learned from."""
    root, counts = layout.root, np.bincount(layout.train.labels, minlength=len(layout.classes))
    images = len(layout.train.names) + len(layout.test.names)
    if images < 2:
        raise DataError(
            f"{root} has {images} image in all: at least two classes with several images each are needed"
        )
    if len(layout.classes) < 2:
        raise DataError(
            f"{root} has one class, {layout.classes[0]!r}: to tell images apart at least two are needed. {SHAPES}"
        )
    empty = [name for name, count in zip(layout.classes, counts, strict=True) if count == 0]
    if empty:
        tested = np.bincount(layout.test.labels, minlength=len(layout.classes))
        spoken = (
            "in the test only: so few that a fifth is all"
            if tested[layout.classes.index(empty[0])]
            else "at all"
        )
        raise DataError(
            f"{root} has no training image of {_quoted(empty)} (images {spoken}): add some, or remove the folder"
        )
    if not layout.test.names:
        raise DataError(
            f"{root} has no test image: with so few images none was held out. Add more, or use train/ and val/ folders"
        )


def _quoted(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"the class{'es' if len(names) > 1 else ''} {', '.join(map(repr, names[:most]))}{more}"
