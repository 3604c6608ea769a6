"""Evaluating a run: each member forwarded once over a split, every ensemble from the logits kept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsnap.data.archives import DataError
from fastsnap.data.datasets import Dataset, ImageSet, load_dataset
from fastsnap.data.fingerprint import require_same_images
from fastsnap.data.pipeline import make_pipeline
from fastsnap.data.plan import Pipeline
from fastsnap.device import (
    AUTOCAST_DTYPES,
    Precision,
    choose_device,
    choose_precision,
    free_device_memory,
)
from fastsnap.ensemble.metrics import MemberMetrics, Metrics, measure_members
from fastsnap.nets.resnet import KERNEL_OPERATIONS, build_network
from fastsnap.run_folder import RunError, RunFolder
from fastsnap.run_schema import SnapshotEntry, check_plan
from fastsnap.training.memory import evaluation_needs, footprint, require_memory

SPLITS = ("test", "validation")
BATCH_SIZE = 250  # fastest of 64 to 1,000 for ResNet-20 on a CPU, where larger activations leave the cache
OnMember = Callable[[SnapshotEntry], None]


@dataclass(frozen=True)
class Report:
    """What a run's snapshots are worth on one split, alone and together.

    precision  of the forward passes: its name, why it was taken (precision_reason) and what the run was trained in
               (trained_precision)
    planned    snapshots that the finished run has; more than `saved` while it goes on
    saved      snapshots in the run folder; more than `snapshots` holds if some were chosen
    snapshots  those evaluated, in the order of the run
    metrics    of these snapshots
    seconds    wall-clock time of reading the snapshots, the forward passes and the averaging
    """

    run: str
    net: str
    dataset: str
    split: str
    images: int
    precision: str
    precision_reason: str
    trained_precision: str
    device: str
    planned: int
    saved: int
    snapshots: tuple[SnapshotEntry, ...]
    metrics: MemberMetrics
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The content of ensemble.json; errors in percent."""
        scalars = (
            "run",
            "net",
            "dataset",
            "split",
            "images",
            "precision",
            "trained_precision",
            "device",
            "planned",
        )
        members = zip(self.snapshots, self.metrics.alone, strict=True)
        return {name: getattr(self, name) for name in scalars} | {
            "members": [_member_json(entry, metrics) for entry, metrics in members],
            "last_m": [{"m": m} | asdict(metrics) for m, metrics in enumerate(self.metrics.last_m, start=1)],
            "first_m": [
                {"m": m} | asdict(metrics) for m, metrics in enumerate(self.metrics.first_m, start=1)
            ],
            "all_against_last": asdict(self.metrics.all_against_last),
            "seconds": self.seconds,
        }


def _member_json(entry: SnapshotEntry, metrics: Metrics) -> dict[str, Any]:
    place = {name: getattr(entry, name) for name in ("cycle", "epoch", "step", "learning_rate", "train_loss")}
    alone = asdict(metrics)
    del alone["mutual_information"], alone["disagreement"]  # 0 for a single network
    return {"snapshot": entry.number} | place | alone


def evaluate_run(
    folder: RunFolder,
    *,
    dataset: Dataset | None = None,
    data: str | None = None,
    snapshots: Sequence[int] | None = None,
    split: str = "test",
    batch_size: int = BATCH_SIZE,
    device: torch.device | None = None,
    precision: str = "auto",
    on_member: OnMember | None = None,
    check_memory: bool = True,
) -> Report:
    """Evaluate the snapshots of the run in `folder`.

    dataset     the run's data set, if it is in memory already
    data        folder that holds the data sets; default: the one the run was trained from
    snapshots   numbers of those to evaluate; default: all that are saved
    split       "test", or "validation" where the run held images out
    batch_size  images per forward pass
    device      default: CUDA if there is one, else the CPU
    precision   of the forward passes, "auto", "bf16", "fp16" or "fp32", whatever the run was trained in
    on_member   called before each member's forward passes
    check_memory  False for a process that has just trained: what it keeps for itself counts as taken, and it asked
                before it began

    Raises RunError (a ValueError) for a run without snapshots or that split, and for snapshots that do not
    exist, are damaged, do not fit the net or give NaN; DataError (a ValueError) for missing data and for images or
    labels that are not those that the run had.
    """
    config = folder.config()
    entries = choose_snapshots(folder, snapshots)
    check_plan(config, folder.snapshots(), folder.metrics(), str(folder.path))
    dataset = dataset or _load_data(config, data, folder)
    image_set = _choose_split(dataset, split, folder)
    require_same_images({split: image_set}, config, str(folder.path))
    device = device or choose_device("auto")
    computed = _evaluation_precision(precision, device)
    if check_memory:
        _require_memory(config, dataset, folder, device, batch_size, len(image_set.labels), len(entries))
    network = _build_network(config, dataset, folder).to(memory_format=torch.channels_last).to(device)
    pipeline = make_pipeline(
        image_set,
        batch_size=batch_size,
        mean=dataset.mean,
        std=dataset.std,
        device=device,
        augment=False,
    )
    start = time.perf_counter()
    labels_N = torch.from_numpy(image_set.labels).to(device)
    logits_MNC = torch.empty(
        len(entries), len(labels_N), len(dataset.classes), dtype=torch.float32, device=device
    )
    fill_member_logits(
        logits_MNC, network, folder, entries, pipeline, precision=computed.name, on_member=on_member
    )
    metrics = measure_members(logits_MNC, labels_N)
    return Report(
        run=folder.path.resolve().name,
        net=config["net"],
        dataset=config["dataset"],
        split=split,
        images=len(labels_N),
        precision=computed.name,
        precision_reason=computed.reason,
        trained_precision=config["precision"],
        device=device.type,
        planned=config["cycles"],
        saved=len(folder.snapshots()),
        snapshots=tuple(entries),
        metrics=metrics,
        seconds=time.perf_counter() - start,
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


def _load_data(config: dict[str, Any], data: str | None, folder: RunFolder) -> Dataset:
    """Never downloaded: the run was trained on data that are somewhere."""
    if data and config["dataset"] == "digits":
        raise ValueError(
            f"data (--data) has no effect: the run was trained on scikit-learn's digits; got {data}"
        )
    try:
        return load_dataset(
            config["dataset"],
            data or _data_folder(folder, config["data"]),
            download=False,
            validation=config["validation"],
            train_images=config["train_images"],
            seed=config["seed"],
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


def _choose_split(dataset: Dataset, split: str, folder: RunFolder) -> ImageSet:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    image_set = dataset.test if split == "test" else dataset.validation
    if image_set is None:
        raise RunError(
            f"the run in {folder.path} held no images out for validation: train with --validation N, "
            "or use --split test"
        )
    return image_set


def _evaluation_precision(asked: str, device: torch.device) -> Precision:
    """What is asked for; but a CPU, which hardly computes in fp16, takes fp32 for it."""
    if asked == "fp16" and device.type == "cpu":
        return Precision("fp32", "a CPU hardly computes in fp16")
    return choose_precision(asked, device)


def _require_memory(
    config: dict[str, Any],
    dataset: Dataset,
    folder: RunFolder,
    device: torch.device,
    batch: int,
    images: int,
    members: int,
) -> None:
    """Raise ValueError, with the figures, for what memory cannot hold."""
    _, height, width, channels = dataset.test.images.shape
    network = _build_network(config, dataset, folder, device="meta")
    size = footprint(network, (channels, height, width))
    needs = evaluation_needs(size, batch, images, len(dataset.classes), members)
    remedy = "use a smaller --batch-size or fewer --snapshots"
    require_memory("the evaluation", needs, free_device_memory(device), remedy)


def _build_network(
    config: dict[str, Any], dataset: Dataset, folder: RunFolder, device: str = "cpu"
) -> nn.Module:
    try:
        return build_network(
            config["net"],
            classes=len(dataset.classes),
            in_channels=dataset.test.images.shape[3],
            shortcut=config["shortcut"],
            operations=KERNEL_OPERATIONS,
            device=device,
        )
    except ValueError as error:
        raise _damaged_config(folder, error) from error


@torch.inference_mode()
def fill_member_logits(
    logits_MNC: Tensor,
    network: nn.Module,
    folder: RunFolder,
    entries: Sequence[SnapshotEntry],
    pipeline: Pipeline,
    *,
    precision: str = "fp32",
    on_member: OnMember | None = None,
) -> None:
    """Fill `logits_MNC`, float32 on the network's device, with each snapshot's outputs for the images.

    The members run one after the other through `network`, whose weights they replace; each is forwarded once.
    Raises RunError for a snapshot that is damaged, does not fit the network, or gives NaN or infinite logits.
    """
    for entry in entries:
        folder.load_snapshot(entry)  # a damaged last one should not be found only after minutes of computing
    network.eval()
    dtype = AUTOCAST_DTYPES.get(precision)
    for entry, logits_NC in zip(entries, logits_MNC, strict=True):
        if on_member:
            on_member(entry)
        _load_member(network, folder, entry)
        done = 0
        # Entered anew for each member: under no_grad, autocast would keep the first one's cast weights.
        with torch.autocast(logits_NC.device.type, dtype, enabled=dtype is not None):
            for images, _ in pipeline.epoch(0):
                logits_NC[done : done + len(images)] = network(images)
                done += len(images)
        if not torch.isfinite(logits_NC).all():
            raise RunError(
                f"snapshot {entry.number} ({entry.file}) gives NaN or infinite logits: leave it out"
            )


def _load_member(network: nn.Module, folder: RunFolder, entry: SnapshotEntry) -> None:
    try:
        network.load_state_dict(folder.load_snapshot(entry))
    except RuntimeError as error:
        raise RunError(
            f"snapshot {entry.number} ({entry.file}) does not fit the net of "
            f"{folder.path / 'config.json'}: {' '.join(str(error).split())}"
        ) from error
