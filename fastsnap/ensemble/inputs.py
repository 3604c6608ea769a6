"""What an evaluation takes from a run folder, checked before it begins: snapshots, the images of a split, a network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastsnap.data.archives import DataError
from fastsnap.data.datasets import load_dataset
from fastsnap.data.pictures import Wishes
from fastsnap.data.sources import Dataset, Source
from fastsnap.device import PRECISIONS, Precision, choose_precision, free_device_memory
from fastsnap.nets.build import build_network
from fastsnap.nets.resnet import KERNEL_OPERATIONS
from fastsnap.run_folder import RunError, RunFolder
from fastsnap.run_schema import SnapshotEntry, is_own_loop
from fastsnap.training.memory import evaluation_needs, footprint, require_memory

SPLITS = ("test", "validation")


def require_known_network(config: dict[str, Any], folder: RunFolder) -> None:
    """Raise RunError for a run whose network and data only the program that trained it has."""
    if is_own_loop(config):
        raise RunError(
            f"{folder.path} is of a training loop with a network of its own ({config['net']}), which this command does "
            f"not have: evaluate it from Python, with fastsnap.evaluate({str(folder.path)!r}, network, batches)"
        )


def choose_snapshots(folder: RunFolder, numbers: Sequence[int] | None) -> list[SnapshotEntry]:
    """The manifest's entries with these numbers (None: all), in its order. Raises RunError if one lacks."""
    entries = folder.snapshots()
    if not entries:
        raise RunError(
            f"{folder.path} holds no snapshot yet: the first is saved at the end of the first cycle. "
            "Run the training command again to go on with it"
        )
    if numbers is None:
        return entries
    available = [entry.number for entry in entries]
    missing = sorted(set(numbers) - set(available))
    if missing or not numbers:
        raise RunError(
            f"snapshots must be among the {', '.join(map(str, available))} that {folder.path} holds, "
            f"got {', '.join(map(str, numbers)) or 'none'}"
        )
    return [entry for entry in entries if entry.number in numbers]


def load_data(
    config: dict[str, Any], data: str | None, folder: RunFolder, storage: str | None = None
) -> Dataset:
    """Never downloaded: the run was trained on data that are somewhere.

    storage  of a folder of pictures, "arrays" or "files"; None: as the run was trained
    """
    if data and config["dataset"] == "digits":
        raise ValueError(
            f"data (--data) has no effect: the run was trained on scikit-learn's digits; got {data}"
        )
    shape = config.get("image_shape")
    wishes = Wishes(
        image_size=shape[0] if shape else None,
        storage=storage or config.get("storage"),
        cache=config.get("cache"),
        skip_damaged=config.get("skip_damaged", False),
    )
    try:
        return load_dataset(
            config["dataset"],
            data or _data_folder(folder, config["data"]),
            download=False,
            validation=config["validation"],
            train_images=config["train_images"],
            seed=config["seed"],
            augment=config.get("augment"),
            wishes=wishes,
        )
    except DataError:
        raise
    except ValueError as error:
        raise _damaged_config(folder, error) from error


def _damaged_config(folder: RunFolder, error: ValueError) -> RunError:
    return RunError(f"{folder.path / 'config.json'} is damaged: {error}; put back a copy of it")


def _data_folder(folder: RunFolder, data: str) -> Path:
    """Where the run found its data; version 0.1.0 kept a relative path, of the folder that it was started in."""
    starts = [Path(), *folder.path.resolve().parents]
    return next((start / data for start in starts if (start / data).exists()), Path(data))


def choose_split(dataset: Dataset, split: str, folder: RunFolder) -> Source:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    image_set = dataset.test if split == "test" else dataset.validation
    if image_set is None:
        raise RunError(
            f"the run in {folder.path} held no images out for validation: train with --validation N, "
            "or use --split test"
        )
    return image_set


def evaluation_precision(asked: str, device: torch.device) -> Precision:
    """What is asked for; but a CPU, which hardly computes in fp16, takes fp32 for it. Raises ValueError for another."""
    if asked not in PRECISIONS:  # it would be computed in fp32, and called by that name
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {asked!r}")
    if asked == "fp16" and device.type == "cpu":
        return Precision("fp32", "a CPU hardly computes in fp16")
    return choose_precision(asked, device)


def require_evaluation_memory(
    config: dict[str, Any],
    dataset: Dataset,
    folder: RunFolder,
    device: torch.device,
    batch: int,
    images: int,
    members: int,
) -> None:
    """Raise ValueError, with the figures, for what memory cannot hold."""
    height, width, channels = dataset.test.shape
    network = network_of(config, folder, dataset.test.shape, len(dataset.classes), device="meta")
    size = footprint(network, (channels, height, width))
    needs = evaluation_needs(size, batch, images, len(dataset.classes), members)
    remedy = "use a smaller --batch-size or fewer --snapshots"
    require_memory("the evaluation", needs, free_device_memory(device), remedy)


def network_of(
    config: dict[str, Any],
    folder: RunFolder,
    image_shape: tuple[int, int, int],
    classes: int,
    device: str = "cpu",
) -> nn.Module:
    """The run's network, freshly initialised.

    image_shape  height, width and channels of the images that it sees
    """
    height, width, channels = image_shape
    try:
        return build_network(
            config["net"],
            classes=classes,
            in_channels=channels,
            image_size=(height, width),
            shortcut=config["shortcut"],
            stem_stride=config.get("stem_stride") or 1,
            dropout=config.get("dropout") or 0.0,
            operations=KERNEL_OPERATIONS,
            device=device,
        )
    except ValueError as error:
        raise _damaged_config(folder, error) from error
