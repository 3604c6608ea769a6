"""Evaluating a run: each member forwarded once over a split, every ensemble from the logits kept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsnap.data.datasets import Dataset
from fastsnap.data.fingerprint import require_same_images
from fastsnap.data.pipeline import make_pipeline, require_batch_size
from fastsnap.data.plan import Pipeline, part_of
from fastsnap.data.sources import FileSet, Source
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
from fastsnap.training.ranks import Ranks

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
    ranks: Ranks | None = None,
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
    ranks       that share the images, where this is the first of them; the others call `assist_evaluation`

    Raises RunError (a ValueError) for a run without snapshots or that split, and for snapshots that do not
    exist, are damaged, do not fit the net or give NaN; DataError (a ValueError) for missing data and for images or
    labels that are not those that the run had.
    """
    ranks = ranks or Ranks()
    config = folder.config()
    require_known_network(config, folder)
    entries = choose_snapshots(folder, snapshots)
    check_plan(config, folder.snapshots(), folder.metrics(), str(folder.path))
    device = device or choose_device("auto")
    computed = evaluation_precision(precision, device)
    members = [asdict(entry) for entry in entries]
    task = _Task(config, members, split, batch_size, computed.name, views)
    ranks.from_first(lambda: asdict(task))
    part = _Part(task, folder, dataset, data, device, ranks, check_memory=check_memory)
    dataset = part.dataset
    start = time.perf_counter()
    labels_N = torch.from_numpy(choose_split(dataset, split, folder).labels).to(device)
    metrics = measure_members(part.logits(on_member), labels_N)
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


def assist_evaluation(
    ranks: Ranks,
    folder: RunFolder,
    *,
    dataset: Dataset | None = None,
    data: str | None = None,
    device: torch.device | None = None,
    check_memory: bool = True,
) -> None:
    """What all ranks but the first do while that one is in `evaluate_run`: their part of the images.

    folder  for the words of errors: it is not read
    All else as in evaluate_run. Raises RanksLost, and what evaluate_run raises for data and memory.
    """
    task = _Task(**ranks.from_first(dict))
    device = device or choose_device("auto")
    part = _Part(task, folder, dataset, data, device, ranks, check_memory=check_memory)
    part.logits()


@dataclass(frozen=True)
class _Task:
    """What the first rank knows of the folder and tells the others, JSON values; precision has no "auto".

    members  fields of their SnapshotEntry
    """

    config: dict[str, Any]
    members: list[dict[str, Any]]
    split: str
    batch_size: int
    precision: str
    views: str


class _Part:
    """A rank's part of an evaluation: batches in a row, the same as of a process that has them all."""

    def __init__(
        self,
        task: _Task,
        folder: RunFolder,
        dataset: Dataset | None,
        data: str | None,
        device: torch.device,
        ranks: Ranks,
        *,
        check_memory: bool,
    ) -> None:
        require_batch_size(task.batch_size)
        config, split = task.config, task.split
        dataset = dataset or load_data(config, data, folder)
        require_views(task.views, dataset.augmentation)
        images = choose_split(dataset, split, folder)
        require_same_images({split: images}, config, str(folder.path))
        count = len(images.labels)
        if check_memory:
            members = len(task.members)
            require_evaluation_memory(config, dataset, folder, device, task.batch_size, count, members)
        self.task, self.folder, self.dataset, self.ranks = task, folder, dataset, ranks
        batches = -(-count // task.batch_size)
        parts = [part_of(batches, rank, ranks.count) for rank in range(ranks.count)]
        ends = [min(count, part.stop * task.batch_size) for part in parts]
        starts = [0, *ends[:-1]]
        self.counts = [end - start for start, end in zip(starts, ends, strict=True)]
        own = slice(starts[ranks.rank], ends[ranks.rank])
        network = network_of(config, folder, dataset.test.shape, len(dataset.classes))
        self.network = network.to(memory_format=torch.channels_last).to(device)
        self.pipeline = self._pipeline(images, own, data, device) if own.stop > own.start else None
        self.device = device

    def _pipeline(self, images: Source, own: slice, data: str | None, device: torch.device) -> Pipeline:
        """Over the rank's images of the split; of resized crops, with their corners where those are asked for."""
        task, dataset = self.task, self.dataset
        if task.views == TEN_CROP and dataset.augmentation.kind == "resized-crop":
            of_files = load_data(task.config, data, self.folder, storage="files")
            files = choose_split(of_files, task.split, self.folder)
            if not isinstance(files, FileSet):
                raise RunError(
                    "--ten-crop of resized crops needs the files of the images, which this data set has not"
                )
            threads = torch.get_num_threads()
            return CornerFiles(files.part(own), task.batch_size, dataset.mean, dataset.std, device, threads)
        return make_pipeline(
            images.part(own),
            batch_size=task.batch_size,
            mean=dataset.mean,
            std=dataset.std,
            device=device,
        )

    def logits(self, on_member: OnMember | None = None) -> Tensor:
        """Of all members for all images on the first rank, float32 [M, N, C]; on others, of its own images."""
        task, ranks = self.task, self.ranks
        entries = [SnapshotEntry(**fields) for fields in task.members]
        shape = len(entries), self.counts[ranks.rank], len(self.dataset.classes)
        own_MNC = torch.empty(shape, dtype=torch.float32, device=self.device)
        fill_member_logits(
            *(own_MNC, self.network, self.folder, entries, self.pipeline),
            precision=task.precision,
            views=task.views,
            padding=self.dataset.augmentation.padding,
            on_member=on_member,
            ranks=ranks,
        )
        if ranks.count == 1:
            return own_MNC
        ranks.meet("all images are forwarded")
        # One member after the other: all at once would be in memory twice.
        all_MNC = own_MNC.new_empty(shape[0], sum(self.counts) if ranks.is_first else shape[1], shape[2])
        for whole_NC, own_NC in zip(all_MNC, own_MNC, strict=True):
            whole_NC.copy_(ranks.collect(own_NC, self.counts))
        return all_MNC


@torch.inference_mode()
def fill_member_logits(
    logits_MNC: Tensor,
    network: nn.Module,
    folder: RunFolder,
    entries: Sequence[SnapshotEntry],
    pipeline: Pipeline | None,
    *,
    precision: str = "fp32",
    views: str = ONE,
    padding: int = 0,
    on_member: OnMember | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Fill `logits_MNC`, float32 on the network's device, with each snapshot's outputs for the images.

    The members run one after the other through `network`, whose weights they replace; each is forwarded once.
    entries   of the members, whose files only the first of the ranks reads; the others get the weights from it
    pipeline  over the images; None: there are none
    Raises RunError for a snapshot that is damaged, does not fit the network, or gives NaN or infinite logits.
    """
    ranks = ranks or Ranks()
    for entry in entries if ranks.is_first else ():
        folder.load_snapshot(entry)  # a damaged last one should not be found only after minutes of computing
    network.eval()
    dtype = AUTOCAST_DTYPES.get(precision)
    for entry, logits_NC in zip(entries, logits_MNC, strict=True):
        if on_member:
            on_member(entry)
        if ranks.is_first:
            load_member(network, folder, entry)
        ranks.meet(f"snapshot {entry.number}")
        ranks.send(list(network.state_dict().values()))
        done = 0
        # Entered anew for each member: under no_grad, autocast would keep the first one's cast weights.
        with torch.autocast(logits_NC.device.type, dtype, enabled=dtype is not None):
            for images, _ in pipeline.epoch(0) if pipeline else ():
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
