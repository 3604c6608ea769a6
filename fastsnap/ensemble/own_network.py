"""Evaluating a run of a loop that is not ours: the user's network and batches, the same figures, files and tables."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fastsnap.device import AUTOCAST_DTYPES
from fastsnap.ensemble.cascade import choose_threshold
from fastsnap.ensemble.choosing import choose, reason_against
from fastsnap.ensemble.evaluate import analysis_of
from fastsnap.ensemble.forwards import load_member
from fastsnap.ensemble.inputs import SPLITS, choose_snapshots, evaluation_precision
from fastsnap.ensemble.metrics import measure_members
from fastsnap.ensemble.outputs import logits_of
from fastsnap.ensemble.report import publish
from fastsnap.ensemble.results import Report
from fastsnap.ensemble.views import ONE
from fastsnap.ensemble.worth import Comparison, measure_worth, member_cost
from fastsnap.printing import make_console
from fastsnap.run_files import RunError, require_writable
from fastsnap.run_folder import RunFolder
from fastsnap.run_schema import SnapshotEntry, check_plan
from fastsnap.snapshot import plain_network

Batches = Iterable[Sequence[Tensor]]


def evaluate(
    folder: str | os.PathLike[str],
    network: nn.Module,
    batches: Batches,
    *,
    snapshots: Sequence[int] | None = None,
    split: str = "test",
    validation: Batches | None = None,
    device: torch.device | str | None = None,
    precision: str = "auto",
    out: str | os.PathLike[str] | None = None,
    console: Console | None = None,
) -> Report:
    """What `python -m fastsnap.ensemble_eval` does, for a run of SnapshotRecorder: tables, JSON and plots.

    network    of the run; in place of its weights each snapshot's are computed with, and then its own are back
    batches    pairs of images, whatever the network takes, and integer labels [B]: a DataLoader, a list or a generator,
               read once, in any order; each batch passes through all snapshots, which are kept in memory together
    snapshots  numbers of those to evaluate; default: all that are saved
    split      "test" or "validation": what the images are, which the names of the files say
    validation  held-out images, as batches are, on which is decided what to use; of the test split only
    device     default: where the network is; it is moved to another, and stays there
    precision  of the forward passes: "auto", "bf16", "fp16" or "fp32"
    out        folder for JSON and plots; default: the run's
    console    for the tables; default: standard output

    The network returns logits [B, classes], or an object that has them as `.logits`, or a tuple of them and more.
    Raises RunError (a ValueError) for a run without snapshots or that cannot be read, for snapshots that are damaged or
    of another network, and for NaN; ValueError for other batches and outputs.
    """
    run = RunFolder(folder)
    target = Path(out) if out is not None else run.path
    run.config()  # no run at all is a worse fault than a folder that cannot be written to
    require_writable(target)
    report = measure(
        run,
        network,
        batches,
        snapshots=snapshots,
        split=split,
        validation=validation,
        device=device,
        precision=precision,
    )
    publish(report, run, make_console() if console is None else console, target, asked_precision=precision)
    return report


def measure(
    folder: RunFolder,
    network: nn.Module,
    batches: Batches,
    *,
    snapshots: Sequence[int] | None,
    split: str,
    validation: Batches | None,
    device: torch.device | str | None,
    precision: str,
) -> Report:
    """The figures of `evaluate`, without files and tables."""
    config = folder.config()
    entries = choose_snapshots(folder, snapshots)
    check_plan(config, folder.snapshots(), folder.metrics(), str(folder.path))
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if device is not None:
        network.to(device)
    where = next(network.parameters()).device
    computed = evaluation_precision(precision, where)
    if validation is not None and split != "test":
        raise ValueError(
            f"validation decides what to use of the test split; leave it out with split={split!r}"
        )
    classes = config["classes"]
    start = time.perf_counter()
    choice = threshold = None
    thresholds: list[float] = []
    no_choice = "no held-out images were given: evaluate(..., validation=batches)"
    if validation is not None:
        logits_MNC, labels_N = member_logits(network, folder, entries, validation, classes, computed.name)
        no_choice = reason_against(len(labels_N), classes) or ""
        if not no_choice:
            choice = choose(logits_MNC, labels_N)
            threshold, thresholds = choose_threshold(logits_MNC, labels_N, choice.taken.weights)
    before = time.perf_counter()
    logits_MNC, labels_N = member_logits(network, folder, entries, batches, classes, computed.name)
    seconds = (time.perf_counter() - before) / len(entries)
    metrics = measure_members(logits_MNC, labels_N)
    worth = None
    if split == "test":
        comparison = Comparison(
            logits_MNC, labels_N, member_cost(plain_network(network), seconds, len(labels_N))
        )
        worth = measure_worth(comparison, choice, threshold, thresholds)
    return Report(
        run=folder.path.resolve().name,
        net=config["net"],
        dataset=config["dataset"],
        split=split,
        images=len(labels_N),
        classes=config["classes"],
        precision=computed.name,
        precision_reason=computed.reason,
        trained_precision=config["precision"],
        device=where.type,
        views=ONE,
        trained_mirrored=False,
        planned=config["cycles"],
        saved=len(folder.snapshots()),
        snapshots=tuple(entries),
        metrics=metrics,
        worth=worth,
        choice=choice,
        no_choice=no_choice if choice is None else "",
        analysis=analysis_of(logits_MNC, labels_N, _names(config), choice),
        seconds=time.perf_counter() - start,
    )


def _names(config: dict[str, Any]) -> list[str]:
    """Of the classes; their numbers where the run does not say them."""
    return config.get("class_names") or [str(index) for index in range(config["classes"])]


@torch.inference_mode()
def member_logits(
    network: nn.Module,
    folder: RunFolder,
    entries: Sequence[SnapshotEntry],
    batches: Batches,
    classes: int,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Logits [M, N, C], float32, of each snapshot for all images of `batches`, and their labels [N], int64.

    Raises as `evaluate` does.
    """
    device = next(network.parameters()).device
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    with _borrowed(plain_network(network)) as plain:
        members = [_state_on_device(plain, folder, entry) for entry in entries]
        for batch in batches:
            images, labels_B = _pair(batch)
            images, labels_B = images.to(device, non_blocking=True), labels_B.to(device).reshape(-1)
            rows = []
            for state in members:
                plain.load_state_dict(state)
                rows.append(_logits(network, images, len(labels_B), classes, precision))
            logits.append(torch.stack(rows))
            labels.append(labels_B)
    if not labels:
        raise ValueError("batches gave no images: an iterator that was read before gives none again")
    logits_MNC, labels_N = torch.cat(logits, dim=1), torch.cat(labels)
    _require_labels(labels_N, classes)
    for entry, logits_NC in zip(entries, logits_MNC, strict=True):
        if not torch.isfinite(logits_NC).all():
            raise RunError(
                f"snapshot {entry.number} ({entry.file}) gives NaN or infinite logits: leave it out"
            )
    return logits_MNC, labels_N.long()


@contextlib.contextmanager
def _borrowed(network: nn.Module) -> Iterator[nn.Module]:
    """The network in evaluation mode; afterwards weights and modes are as they were."""
    before = {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in network.state_dict().items()
    }
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield network
    finally:
        network.load_state_dict(before)
        for module in training:
            module.training = True


def _state_on_device(network: nn.Module, folder: RunFolder, entry: SnapshotEntry) -> dict[str, Any]:
    """A snapshot's state_dict as the network has it, checked by loading it; a copy where the network is."""
    load_member(network, folder, entry)
    return {
        name: value.clone() if isinstance(value, Tensor) else value
        for name, value in network.state_dict().items()
    }


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if (
        not isinstance(batch, tuple | list)
        or len(batch) != 2
        or not all(isinstance(t, Tensor) for t in batch)
    ):
        kind = type(batch).__name__
        raise ValueError(
            f"batches must give pairs of tensors, images and labels, got a {kind}: of a mapping, "
            '((batch["pixel_values"], batch["labels"]) for batch in loader)'
        )
    images, labels = batch
    if labels.is_floating_point() or labels.numel() != len(images):
        raise ValueError(
            f"labels must be integers, one per image, got {labels.dtype} of shape {tuple(labels.shape)} for "
            f"{len(images)} images"
        )
    return images, labels


def _logits(network: nn.Module, images: Tensor, count: int, classes: int, precision: str) -> Tensor:
    dtype = AUTOCAST_DTYPES.get(precision)
    # Entered anew for each member: autocast would keep the first one's cast weights.
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        output = network(images)
    return logits_of(output, count, classes)


def _require_labels(labels_N: Tensor, classes: int) -> None:
    lowest, highest = labels_N.min().item(), labels_N.max().item()
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"labels must be from 0 to {classes - 1}, as the run has {classes} classes, got {lowest} to {highest}"
        )
