"""Forward passes of a run's snapshots over a split of its data, which ranks share: logits [M, N, C]."""

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
from fastsnap.device import AUTOCAST_DTYPES
from fastsnap.ensemble.inputs import choose_split, load_data, network_of, require_evaluation_memory
from fastsnap.ensemble.views import ONE, TEN_CROP, CornerFiles, average_views, require_views, views_of
from fastsnap.run_folder import RunError, RunFolder
from fastsnap.run_schema import SnapshotEntry
from fastsnap.snapshot import load_plain
from fastsnap.training.ranks import Ranks

BATCH_SIZE = 250  # fastest of 64 to 1,000 for ResNet-20 on a CPU, where larger activations leave the cache
OnMember = Callable[[SnapshotEntry], None]


@dataclass(frozen=True)
class Passes:
    """What is to be forwarded: what the first rank knows of the folder and tells the others, JSON values.

    members    fields of their SnapshotEntry
    precision  without "auto"
    """

    config: dict[str, Any]
    members: list[dict[str, Any]]
    split: str
    batch_size: int
    precision: str
    views: str = ONE

    @classmethod
    def of(cls, config: dict[str, Any], entries: Sequence[SnapshotEntry], **others: Any) -> "Passes":
        """Of the snapshots `entries`."""
        return cls(config, [asdict(entry) for entry in entries], **others)

    @property
    def entries(self) -> list[SnapshotEntry]:
        """Of the members."""
        return [SnapshotEntry(**fields) for fields in self.members]


class Forwards:
    """A rank's part of the passes: batches in a row, the same as of a process that has them all.

    seconds  that the forward passes of a member took most recently, images and all
    Raises RunError for a split that the run has not, DataError for images that are not those that the run had, and
    ValueError for what does not fit into memory (unless check_memory is False).
    """

    def __init__(
        self,
        task: Passes,
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
        self.images, self.seconds = images, 0.0
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

    @property
    def labels(self) -> Tensor:
        """Of all images, int64 [N], on the device."""
        return torch.from_numpy(self.images.labels).to(self.device)

    def own_logits(self) -> Tensor:
        """Of the network as it is, float32 [N, C], for this process's images."""
        start = time.perf_counter()
        logits_NC = torch.empty(self.counts[self.ranks.rank], len(self.dataset.classes), device=self.device)
        fill_logits(
            *(logits_NC, self.network, self.pipeline),
            precision=self.task.precision,
            views=self.task.views,
            padding=self.dataset.augmentation.padding,
        )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - start
        return logits_NC

    def logits(self, entries: Sequence[SnapshotEntry], on_member: OnMember | None = None) -> Tensor:
        """Of all members for all images on the first rank, float32 [M, N, C]; on others, of its own images."""
        task, ranks = self.task, self.ranks
        shape = len(entries), self.counts[ranks.rank], len(self.dataset.classes)
        own_MNC = torch.empty(shape, dtype=torch.float32, device=self.device)
        seconds = fill_member_logits(
            *(own_MNC, self.network, self.folder, entries, self.pipeline),
            precision=task.precision,
            views=task.views,
            padding=self.dataset.augmentation.padding,
            on_member=on_member,
            ranks=ranks,
        )
        self.seconds = seconds / max(1, len(entries))
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
) -> float:
    """Fill `logits_MNC`, float32 on the network's device, with each snapshot's outputs for the images; returns the
    seconds that the forward passes of all took.

    The members run one after the other through `network`, whose weights they replace; each is forwarded once.
    entries   of the members, whose files only the first of the ranks reads; the others get the weights from it
    pipeline  over the images; None: there are none
    Raises RunError for a snapshot that is damaged, does not fit the network, or gives NaN or infinite logits.
    """
    ranks = ranks or Ranks()
    for entry in entries if ranks.is_first else ():
        folder.load_snapshot(entry)  # a damaged last one should not be found only after minutes of computing
    seconds = 0.0
    for entry, logits_NC in zip(entries, logits_MNC, strict=True):
        if on_member:
            on_member(entry)
        if ranks.is_first:
            load_member(network, folder, entry)
        ranks.meet(f"snapshot {entry.number}")
        ranks.send(list(network.state_dict().values()))
        start = time.perf_counter()
        fill_logits(logits_NC, network, pipeline, precision=precision, views=views, padding=padding)
        finite = bool(torch.isfinite(logits_NC).all())  # waits for the device
        seconds += time.perf_counter() - start
        if not finite:
            raise RunError(
                f"snapshot {entry.number} ({entry.file}) gives NaN or infinite logits: leave it out"
            )
    return seconds


@torch.inference_mode()
def fill_logits(
    logits_NC: Tensor,
    network: nn.Module,
    pipeline: Pipeline | None,
    *,
    precision: str = "fp32",
    views: str = ONE,
    padding: int = 0,
) -> None:
    """Fill `logits_NC`, float32 on the network's device, with what `network` says of the images."""
    network.eval()
    dtype = AUTOCAST_DTYPES.get(precision)
    done = 0
    # Entered anew for each network: under no_grad, autocast would keep the first one's cast weights.
    with torch.autocast(logits_NC.device.type, dtype, enabled=dtype is not None):
        for images, _ in pipeline.epoch(0) if pipeline else ():
            logits_NC[done : done + len(images)] = _logits(network, images, views, padding)
            done += len(images)


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
