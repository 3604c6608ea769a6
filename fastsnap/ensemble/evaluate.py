"""Evaluating a run: each member forwarded once over a split, every ensemble from the logits kept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastsnap.data.datasets import Dataset
from fastsnap.device import choose_device
from fastsnap.ensemble.analysis import Analysis, analyse
from fastsnap.ensemble.averages import average_rows, training_batches
from fastsnap.ensemble.cascade import choose_threshold
from fastsnap.ensemble.choosing import Choice, averaged_log_probabilities, choose, reason_against
from fastsnap.ensemble.combining import COMBINATIONS, MEAN
from fastsnap.ensemble.forwards import BATCH_SIZE, Forwards, OnMember, Passes
from fastsnap.ensemble.inputs import choose_snapshots, evaluation_precision, require_known_network
from fastsnap.ensemble.metrics import measure_members
from fastsnap.ensemble.results import Outputs, Report
from fastsnap.ensemble.views import ONE
from fastsnap.ensemble.weight_space import WeightSpace, choose_soup, mean_nll, measure_line
from fastsnap.ensemble.worth import (
    Comparison,
    measure_worth,
    member_cost,
)
from fastsnap.run_folder import RunError, RunFolder
from fastsnap.run_schema import SnapshotEntry, check_plan
from fastsnap.training.ranks import Ranks


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
    combine: str = MEAN,
    averages: bool = False,
    interpolate: Sequence[int] | None = None,
    on_member: OnMember | None = None,
    say: Callable[[str], object] = str,
    check_memory: bool = True,
    ranks: Ranks | None = None,
) -> Report:
    """Evaluate the snapshots of the run in `folder`; which of them to use is decided on its held-out images before.

    dataset     the run's data set, if it is in memory already
    data        folder that holds the data sets; default: the one the run was trained from
    snapshots   numbers of those to evaluate; default: all that are saved
    split       "test", or "validation" where the run held images out
    batch_size  images per forward pass
    device      default: CUDA if there is one, else the CPU
    precision   of the forward passes, "auto", "bf16", "fp16" or "fp32", whatever the run was trained in
    views       of each image that are averaged: "one", "mirror" or "ten-crop"
    combine     what the members say: "mean", "geometric" or "vote", see combining.COMBINATIONS
    averages    also evaluate averages of the snapshots' weights, and the running average that training kept
    interpolate  numbers of two snapshots, to evaluate networks on the line between them
    on_member   called before each member's forward passes
    say         is told what else is computed
    check_memory  False for a process that has just trained: what it keeps for itself counts as taken, and it asked
                before it began
    ranks       that share the images, where this is the first of them; the others call `assist_evaluation`

    Raises RunError (a ValueError) for a run without snapshots or that split, and for snapshots that do not
    exist, are damaged, do not fit the net or give NaN; DataError (a ValueError) for missing data and for images or
    labels that are not those that the run had; ValueError for what several ranks cannot do together.
    """
    ranks = ranks or Ranks()
    config = folder.config()
    require_known_network(config, folder)
    entries = choose_snapshots(folder, snapshots)
    check_plan(config, folder.snapshots(), folder.metrics(), str(folder.path))
    if combine not in COMBINATIONS:
        raise ValueError(f"combine must be one of {', '.join(COMBINATIONS)}, got {combine!r}")
    if ranks.count > 1 and (averages or interpolate is not None):
        raise ValueError(
            "averages (--averages) and interpolate (--interpolate) need a single process, not torchrun"
        )
    ends = _ends(folder, interpolate)
    device = device or choose_device("auto")
    computed = evaluation_precision(precision, device)

    def forwards(split: str, dataset: Dataset | None) -> Forwards:
        task = Passes.of(
            config, entries, split=split, batch_size=batch_size, precision=computed.name, views=views
        )
        ranks.from_first(lambda: asdict(task))
        return Forwards(task, folder, dataset, data, device, ranks, check_memory=check_memory)

    def space(part: Forwards) -> WeightSpace:
        return WeightSpace(part, folder, training_batches(part, config["seed"]), computed.name, say)

    start = time.perf_counter()
    decided = Decided(_reason_against(config, split, combine))
    if not decided.why_not:
        part = forwards("validation", dataset)
        dataset = part.dataset
        decided = _decide(part, entries, on_member, space if averages else None)
    # What to use is decided; now, and only now, the split that is reported is read.
    part = forwards(split, dataset)
    dataset = part.dataset
    logits_MNC = part.logits(entries, on_member)
    ranks.from_first(dict)
    labels_N = part.labels
    worth = None
    if split == "test":
        cost = member_cost(part.network, part.seconds, len(labels_N))
        comparison = Comparison(logits_MNC, labels_N, cost)
        worth = measure_worth(comparison, decided.choice, decided.threshold, decided.thresholds)
        if averages:
            rows = average_rows(space(part), comparison, folder, entries, decided.soup)
            worth = replace(worth, rows=(*worth.rows, *rows))
    return Report(
        run=folder.path.resolve().name,
        net=config["net"],
        dataset=config["dataset"],
        split=split,
        images=len(labels_N),
        classes=len(dataset.classes),
        precision=computed.name,
        precision_reason=computed.reason,
        trained_precision=config["precision"],
        device=device.type,
        views=views,
        trained_mirrored=dataset.augmentation.flip,
        planned=config["cycles"],
        saved=len(folder.snapshots()),
        snapshots=tuple(entries),
        metrics=measure_members(logits_MNC, labels_N, combine),
        worth=worth,
        choice=decided.choice,
        no_choice=decided.why_not,
        line=measure_line(space(part), *ends) if ends else None,
        analysis=analysis_of(logits_MNC, labels_N, dataset.classes, decided.choice),
        outputs=Outputs(logits_MNC, labels_N, tuple(dataset.classes), part.images),
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True)
class Decided:
    """On held-out images; or nothing, and why not.

    threshold, thresholds  of the cascade, and of its curve
    soup                   snapshots whose averaged weights did best
    """

    why_not: str = ""
    choice: Choice | None = None
    threshold: float | None = None
    thresholds: Sequence[float] = ()
    soup: Sequence[SnapshotEntry] = ()


def _decide(
    part: Forwards,
    entries: Sequence[SnapshotEntry],
    on_member: OnMember | None,
    space: Callable[[Forwards], WeightSpace] | None,
) -> Decided:
    logits_MNC = part.logits(entries, on_member)
    labels_N = part.labels
    if not part.ranks.is_first:
        return Decided()
    too_few = reason_against(len(labels_N), logits_MNC.shape[2])
    if too_few:
        return Decided(too_few)
    choice = choose(logits_MNC, labels_N)
    threshold, thresholds = choose_threshold(logits_MNC, labels_N, choice.taken.weights)
    soup: Sequence[SnapshotEntry] = ()
    if space is not None and len(entries) > 1:
        nlls = [mean_nll(logits_NC, labels_N) for logits_NC in logits_MNC]
        soup = choose_soup(space(part), entries, nlls)
    return Decided("", choice, threshold, thresholds, soup)


def analysis_of(
    logits_MNC: Tensor, labels_N: Tensor, class_names: Sequence[str], choice: Choice | None
) -> Analysis:
    """Of what was decided, else of all members with equal weights."""
    weights = choice.taken.weights if choice else [1 / len(logits_MNC)] * len(logits_MNC)
    log_NC = averaged_log_probabilities(logits_MNC, weights)
    temperature = choice.temperature if choice else 1.0
    several_NC = averaged_log_probabilities(logits_MNC, [1.0] * len(weights)) if is_last(choice) else None
    return analyse(logits_MNC, labels_N, class_names, log_NC, temperature, several_NC)


def is_last(choice: Choice | None) -> bool:
    """Whether the decision was for the last snapshot alone."""
    return choice is not None and choice.taken.members == [len(choice.taken.weights) - 1]


def _ends(folder: RunFolder, numbers: Sequence[int] | None) -> list[SnapshotEntry]:
    """The two snapshots of a line; none without numbers, the last two for an empty list."""
    if numbers is None:
        return []
    saved = folder.snapshots()
    if not numbers:
        numbers = [entry.number for entry in saved[-2:]]
    if len(set(numbers)) != 2:
        raise RunError(
            f"interpolate (--interpolate) needs two snapshots, got {', '.join(map(str, numbers))}: {folder.path} holds "
            f"{', '.join(str(entry.number) for entry in saved)}"
        )
    found = {entry.number: entry for entry in choose_snapshots(folder, numbers)}
    return [found[number] for number in numbers]


def _reason_against(config: dict[str, Any], split: str, combine: str) -> str:
    """Why nothing is to be decided on held-out images, as a sentence's end; "": it is."""
    if split != "test":
        return f"the {split} images are what is reported"
    if combine != MEAN:
        return f"members are combined by {combine}, but predictions average their probabilities"
    if not config["images"].get("validation", 0):
        return "the run held no images out: train with --validation N"
    return ""


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
    device = device or choose_device("auto")
    while told := ranks.from_first(dict[str, Any]):
        task = Passes(**told)
        part = Forwards(task, folder, dataset, data, device, ranks, check_memory=check_memory)
        part.logits(task.entries)
        dataset = part.dataset
