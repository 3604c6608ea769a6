"""Evaluating a run: each member forwarded once over a split, every ensemble from the logits kept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsnap.data.datasets import Dataset
from fastsnap.data.fingerprint import require_same_images
from fastsnap.data.pipeline import make_pipeline
from fastsnap.data.plan import Pipeline
from fastsnap.data.sources import FileSet
from fastsnap.device import AUTOCAST_DTYPES, choose_device
from fastsnap.ensemble.inputs import (
    choose_snapshots,
    choose_split,
    evaluation_precision,
    load_data,
    network_of,
    require_evaluation_memory,
    require_known_network,
)
from fastsnap.ensemble.metrics import MemberMetrics, Metrics, measure_members
from fastsnap.ensemble.views import ONE, TEN_CROP, CornerFiles, average_views, require_views, views_of
from fastsnap.run_folder import RunError, RunFolder
from fastsnap.run_schema import SnapshotEntry, check_plan
from fastsnap.snapshot import load_plain

BATCH_SIZE = 250  # fastest of 64 to 1,000 for ResNet-20 on a CPU, where larger activations leave the cache
OnMember = Callable[[SnapshotEntry], None]


@dataclass(frozen=True)
class Report:
    """What a run's snapshots are worth on one split, alone and together.

    precision  of the forward passes: its name, why it was taken (precision_reason) and what the run was trained in
               (trained_precision)
    views      of each image, of which probabilities are averaged: see views.VIEWS
    trained_mirrored  whether training saw mirror images
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
    views: str
    trained_mirrored: bool
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
            "views",
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
    views: str = ONE,
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
    views       of each image that are averaged: "one", "mirror" or "ten-crop"
    on_member   called before each member's forward passes
    check_memory  False for a process that has just trained: what it keeps for itself counts as taken, and it asked
                before it began

    Raises RunError (a ValueError) for a run without snapshots or that split, and for snapshots that do not
    exist, are damaged, do not fit the net or give NaN; DataError (a ValueError) for missing data and for images or
    labels that are not those that the run had.
    """
    config = folder.config()
    require_known_network(config, folder)
    entries = choose_snapshots(folder, snapshots)
    check_plan(config, folder.snapshots(), folder.metrics(), str(folder.path))
    dataset = dataset or load_data(config, data, folder)
    require_views(views, dataset.augmentation)
    image_set = choose_split(dataset, split, folder)
    require_same_images({split: image_set}, config, str(folder.path))
    device = device or choose_device("auto")
    computed = evaluation_precision(precision, device)
    if check_memory:
        require_evaluation_memory(
            config, dataset, folder, device, batch_size, len(image_set.labels), len(entries)
        )
    network = network_of(config, folder, dataset.test.shape, len(dataset.classes))
    network = network.to(memory_format=torch.channels_last).to(device)
    pipeline = _pipeline(config, data, folder, dataset, split, views, batch_size=batch_size, device=device)
    start = time.perf_counter()
    labels_N = torch.from_numpy(image_set.labels).to(device)
    logits_MNC = torch.empty(
        len(entries), len(labels_N), len(dataset.classes), dtype=torch.float32, device=device
    )
    fill_member_logits(
        *(logits_MNC, network, folder, entries, pipeline),
        precision=computed.name,
        views=views,
        padding=dataset.augmentation.padding,
        on_member=on_member,
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
        views=views,
        trained_mirrored=dataset.augmentation.flip,
        planned=config["cycles"],
        saved=len(folder.snapshots()),
        snapshots=tuple(entries),
        metrics=metrics,
        seconds=time.perf_counter() - start,
    )


def _pipeline(
    config: dict[str, Any],
    data: str | None,
    folder: RunFolder,
    dataset: Dataset,
    split: str,
    views: str,
    *,
    batch_size: int,
    device: torch.device,
) -> Pipeline:
    """Over the images of the split; of resized crops, with their corners where those are asked for."""
    if views == TEN_CROP and dataset.augmentation.kind == "resized-crop":
        files = choose_split(load_data(config, data, folder, storage="files"), split, folder)
        if not isinstance(files, FileSet):
            raise RunError(
                "--ten-crop of resized crops needs the files of the images, which this data set has not"
            )
        return CornerFiles(files, batch_size, dataset.mean, dataset.std, device, torch.get_num_threads())
    return make_pipeline(
        choose_split(dataset, split, folder),
        batch_size=batch_size,
        mean=dataset.mean,
        std=dataset.std,
        device=device,
    )


@torch.inference_mode()
def fill_member_logits(
    logits_MNC: Tensor,
    network: nn.Module,
    folder: RunFolder,
    entries: Sequence[SnapshotEntry],
    pipeline: Pipeline,
    *,
    precision: str = "fp32",
    views: str = ONE,
    padding: int = 0,
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
        load_member(network, folder, entry)
        done = 0
        # Entered anew for each member: under no_grad, autocast would keep the first one's cast weights.
        with torch.autocast(logits_NC.device.type, dtype, enabled=dtype is not None):
            for images, _ in pipeline.epoch(0):
                logits_NC[done : done + len(images)] = _logits(network, images, views, padding)
                done += len(images)
        if not torch.isfinite(logits_NC).all():
            raise RunError(
                f"snapshot {entry.number} ({entry.file}) gives NaN or infinite logits: leave it out"
            )


def _logits(network: nn.Module, images: Tensor, views: str, padding: int) -> Tensor:
    if views == ONE:
        return network(images)
    return average_views(network(view) for view in views_of(views, images, padding))


def load_member(network: nn.Module, folder: RunFolder, entry: SnapshotEntry) -> None:
    """Load a snapshot into `network`. Raises RunError for one that is damaged or does not fit."""
    try:
        load_plain(network, folder.load_snapshot(entry))
    except RuntimeError as error:
        raise RunError(
            f"snapshot {entry.number} ({entry.file}) does not fit the net of "
            f"{folder.path / 'config.json'}: {' '.join(str(error).split())}"
        ) from error
