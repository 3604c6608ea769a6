"""What every contender is given: the same network, images, augmentation, batch size and schedule."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastsnap.data.datasets import Dataset, load_dataset
from fastsnap.data.sources import Augmentation, ImageSet, Source

DATASET = "cifar100"
CLASSES = 100
SYNTHETIC_IMAGES = 12_800  # enough not to stay in the cache
SYNTHETIC_TEST_IMAGES = 2_000


@dataclass(frozen=True)
class Task:
    """A training task; steps and epochs are as many as the measurement takes.

    data       folder that holds CIFAR-100; None: noise of its shape
    precision  of those who offer a choice: "auto", "bf16", "fp16" or "fp32"
    workers    processes of the opponents' DataLoader
    """

    net: str
    device: str
    data: Path | None = None
    batch_size: int = 64
    precision: str = "auto"
    workers: int = 0
    cycles: int = 5
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    epochs: int = 200


def load_images(data: Path | None) -> Dataset:
    """CIFAR-100 from `data`, or noise of its shape, for measuring speed alone."""
    return load_dataset(DATASET, data, download=False) if data else synthetic_images()


def synthetic_images(train: int = SYNTHETIC_IMAGES, test: int = SYNTHETIC_TEST_IMAGES) -> Dataset:
    """Noise in the shape of CIFAR-100."""
    generator = np.random.default_rng(0)

    def images(count: int) -> ImageSet:
        pixels = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
        return ImageSet(pixels, generator.integers(0, CLASSES, count))

    return Dataset(
        name="synthetic",
        train=images(train),
        validation=None,
        test=images(test),
        classes=tuple(str(number) for number in range(CLASSES)),
        mean=(129.3, 124.1, 112.4),
        std=(68.2, 65.4, 70.4),
        augmentation=Augmentation("crop", padding=4, flip=True),
        source="noise in the shape of CIFAR-100, for measuring speed",
    )


def shortened(dataset: Dataset, *, train: int | None = None, test: int | None = None) -> Dataset:
    """`dataset` with only the first images; None keeps all."""

    def first(images: Source, count: int | None) -> Source:
        return images.subset(np.arange(len(images.labels)) < (len(images.labels) if count is None else count))

    return replace(dataset, train=first(dataset.train, train), test=first(dataset.test, test))


def describe_data(data: Path | None) -> str:
    """The data, for the report."""
    return "CIFAR-100" if data else "noise of CIFAR-100's shape"
