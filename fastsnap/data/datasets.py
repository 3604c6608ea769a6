"""Image data sets as uint8 arrays in memory, checked as untrusted input (see archives.py)."""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsnap.data.archives import DataError, as_array, as_texts, check_labels, read_idx, read_pickle
from fastsnap.data.downloads import locate
from fastsnap.data.draws import FIXED_SPLIT, HELD_OUT, KEPT, shuffled
from fastsnap.data.folder import FOLDERS, load_folder
from fastsnap.data.pictures import Wishes
from fastsnap.data.sources import Augmentation, Dataset, ImageSet, augmentation_of
from fastsnap.data.svhn import load_svhn
from fastsnap.limits import free_memory, require_memory

DATASETS = ("cifar10", "cifar100", "digits", "fashion-mnist", "svhn", *FOLDERS)
CIFAR_PIXELS = 3 * 32 * 32
LARGEST_META = 2**20  # bytes; the published ones have about a thousand
# Bytes of all images of a data set; the digits come with scikit-learn and are next to nothing.
IMAGE_BYTES = {
    "cifar10": 60_000 * CIFAR_PIXELS,
    "cifar100": 60_000 * CIFAR_PIXELS,
    "fashion-mnist": 70_000 * 28 * 28,
    "svhn": 99_289 * CIFAR_PIXELS,
}
DIGITS_TEST = 360  # of 1,797
FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def check_name(name: str) -> None:
    """Raise ValueError, with the nearest names, unless `name` is a data set."""
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown data set {name!r}: {hint}The data sets are {', '.join(DATASETS)}")


def load_dataset(
    name: str,
    folder: str | Path = "data",
    *,
    validation: int = 0,
    train_images: int | None = None,
    seed: int = 0,
    augment: str | None = None,
    wishes: Wishes | None = None,
    download: bool = True,
) -> Dataset:
    """The data set `name`, from `folder`, downloaded if it is not there.

    validation    training images to hold out, stratified by class, chosen by the seed
    train_images  how many of the others to keep, likewise; None keeps all
    augment       kind of augmentation, see sources.Augmentation; None: as the field trains on this data set
    wishes        how the pictures of a folder are read; of no effect for the others

    Raises ValueError for an unknown name, for numbers that do not fit and for images that memory cannot hold,
    and DataError, which is one, for
    files that are missing and cannot be downloaded, are damaged, or are not what the publisher describes.
    """
    check_name(name)
    if name in FOLDERS:
        return _split(
            load_folder(name, Path(folder), augment, wishes or Wishes()), validation, train_images, seed
        )
    images = IMAGE_BYTES.get(name, 0)
    needs = {"its images": images, "its file": images}
    require_memory(f"reading {name}", needs, free_memory(), "free some, or raise the container's limit")
    if name == "digits":
        whole = _digits()
    elif name == "fashion-mnist":
        whole = _fashion_mnist(Path(folder), download)
    elif name == "svhn":
        whole = load_svhn(Path(folder), download)
    else:
        whole = _cifar(name, Path(folder), download)
    whole = replace(whole, augmentation=augmentation_of(augment, whole.augmentation))
    return _split(whole, validation, train_images, seed)


def _cifar(name: str, folder: Path, download: bool) -> Dataset:
    files, source = locate(name, folder, download)
    ten = name == "cifar10"
    train_files = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
    names_key, labels_key = ("label_names", "labels") if ten else ("fine_label_names", "fine_labels")
    classes = _cifar_classes(files["batches.meta" if ten else "meta"], names_key, 10 if ten else 100)
    return Dataset(
        name=name,
        train=_cifar_images([files[file] for file in train_files], labels_key, 50_000, len(classes)),
        validation=None,
        test=_cifar_images([files["test_batch" if ten else "test"]], labels_key, 10_000, len(classes)),
        classes=classes,
        mean=(125.3, 123.0, 113.9) if ten else (129.3, 124.1, 112.4),
        std=(63.0, 62.1, 66.7) if ten else (68.2, 65.4, 70.4),
        augmentation=Augmentation("crop", padding=4, flip=True),
        source=source,
    )


def _cifar_classes(path: Path, key: str, count: int) -> tuple[str, ...]:
    return as_texts(_entry(read_pickle(path, LARGEST_META), key, path), path, key, count)


def _cifar_images(paths: Sequence[Path], labels_key: str, count: int, classes: int) -> ImageSet:
    """The images of all files, `count` together, from planar rows to [N, 32, 32, 3]."""
    rows = count // len(paths)
    images = np.empty((count, 32, 32, 3), np.uint8)
    labels = np.empty(count, np.int64)
    for i, path in enumerate(paths):
        content = read_pickle(path, 2 * rows * CIFAR_PIXELS)
        part = slice(i * rows, (i + 1) * rows)
        pixels = as_array(_entry(content, "data", path), path, "data", (rows, CIFAR_PIXELS))
        if pixels.dtype != np.uint8:
            raise DataError(f"{path} should hold uint8 images, got {pixels.dtype}: get it again")
        planes = pixels.reshape(rows, 3, 32, 32)
        for channel in range(3):  # 4 times faster than one transposed copy
            images[part, ..., channel] = planes[:, channel]
        labels[part] = as_array(_entry(content, labels_key, path), path, labels_key, (rows,))
        check_labels(labels[part], classes, path)
    return ImageSet(images, labels)


def _entry(content: dict[str, Any], key: str, path: Path) -> Any:
    if key not in content:
        raise DataError(
            f"{path} has no {key!r}, only {', '.join(sorted(content)) or 'nothing'}: get it again"
        )
    return content[key]


def _fashion_mnist(folder: Path, download: bool) -> Dataset:
    files, source = locate("fashion-mnist", folder, download)
    sets = []
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        images = read_idx(files[f"{part}-images-idx3-ubyte.gz"], (count, 28, 28))
        path = files[f"{part}-labels-idx1-ubyte.gz"]
        labels = read_idx(path, (count,)).astype(np.int64)
        check_labels(labels, len(FASHION_MNIST_CLASSES), path)
        sets.append(ImageSet(images[..., None], labels))
    return Dataset(
        name="fashion-mnist",
        train=sets[0],
        validation=None,
        test=sets[1],
        classes=FASHION_MNIST_CLASSES,
        mean=(72.94,),
        std=(90.02,),
        augmentation=Augmentation("crop", padding=4, flip=True),
        source=source,
    )


def _digits() -> Dataset:
    from sklearn.datasets import (
        load_digits,
    )  # here: only this data set needs it, and importing it takes a second

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # from 0..16
    test = stratified(bunch.target, DIGITS_TEST, seed=0, purpose=FIXED_SPLIT)
    whole = ImageSet(images, bunch.target.astype(np.int64))
    return Dataset(
        name="digits",
        train=whole.subset(~test),
        validation=None,
        test=whole.subset(test),
        classes=tuple(str(name) for name in bunch.target_names),
        mean=(77.87,),
        std=(95.87,),
        augmentation=Augmentation("crop", padding=1),
        source="scikit-learn's digits, from its package; the split is this project's own and fixed",
    )


def _split(whole: Dataset, validation: int, train_images: int | None, seed: int) -> Dataset:
    """`whole` with `validation` training images held out and `train_images` of the others kept."""
    classes = len(whole.classes)
    held_out = None
    if validation != 0:
        _check_count("validation", validation, classes, len(whole.train.labels) - classes)
        chosen = stratified(whole.train.labels, validation, seed, HELD_OUT)
        held_out = whole.train.subset(chosen)
        whole = replace(whole, train=whole.train.subset(~chosen), validation=held_out)
    if train_images is not None:
        _check_count("train_images", train_images, classes, len(whole.train.labels))
        chosen = stratified(whole.train.labels, train_images, seed, KEPT)
        whole = replace(whole, train=whole.train.subset(chosen))
    return whole


def _check_count(argument: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(
            f"{argument} must be between {least} (an image of every class) and {most}, got {value}: "
            "choose a number in this range, or leave the argument out"
        )


def stratified(labels: NDArray[np.int64], count: int, seed: int, purpose: int) -> NDArray[np.bool_]:
    """A mask bool [N] of `count` images, each class in proportion (largest remainder), chosen by the seed."""
    frequency = np.bincount(labels)
    share = frequency * count / len(labels)
    quota = share.astype(np.int64)
    quota[np.argsort(quota - share, kind="stable")[: count - quota.sum()]] += 1
    order = shuffled(seed, purpose, 0, len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    rank_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(frequency) - frequency, frequency)
    mask = np.zeros(len(labels), bool)
    mask[by_class[rank_in_class < quota[labels[by_class]]]] = True
    return mask
