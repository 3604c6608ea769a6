"""Evaluating a run: each member forwarded once over a split, every ensemble from the logits kept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastsnap.data.datasets import Dataset
from fastsnap.data.pipeline import make_pipeline
from fastsnap.data.plan import Pipeline
from fastsnap.data.sources import Source
from fastsnap.device import choose_device
from fastsnap.ensemble.against import Against
from fastsnap.ensemble.analysis import Analysis, analyse
from fastsnap.ensemble.cascade import choose_threshold
from fastsnap.ensemble.choosing import Choice, averaged_log_probabilities, choose, reason_against
from fastsnap.ensemble.combining import COMBINATIONS, MEAN
from fastsnap.ensemble.decision import decision_of
from fastsnap.ensemble.forwards import Forwards, OnMember, Passes
from fastsnap.ensemble.inputs import choose_snapshots, evaluation_precision, require_known_network
from fastsnap.ensemble.metrics import MemberMetrics, Metrics, figures, measure_members
from fastsnap.ensemble.views import ONE
from fastsnap.ensemble.weight_space import Line, WeightSpace, choose_soup, mean_nll, mean_of, measure_line
from fastsnap.ensemble.worth import (
    AVERAGE,
    RUNNING,
    SOUP,
    Comparison,
    Row,
    Worth,
    measure_worth,
    member_cost,
)
from fastsnap.run_folder import RunError, RunFolder
from fastsnap.run_schema import Decision, SnapshotEntry, check_plan
from fastsnap.training.ranks import Ranks

BATCH_SIZE = 250  # fastest of 64 to 1,000 for ResNet-20 on a CPU, where larger activations leave the cache


@dataclass(frozen=True)
class Outputs:
    """Logits of the members for the images, float32 [M, N, C], their labels, int64 [N], the classes' names, and the
    images themselves.
    """

    logits: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    images: Source


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
    worth      of each way to use them, on the test images; None on others
    choice     made on the held-out images; None, and no_choice says why, where there is none
    analysis   of what the members' outputs say besides
    against    another data set, where it was asked for
    line       of networks between two snapshots, where it was asked for
    outputs    what the figures follow from, for pictures and further figures
    seconds    wall-clock time of reading the snapshots, the forward passes and the averaging
    """

    run: str
    net: str
    dataset: str
    split: str
    images: int
    classes: int
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
    worth: Worth | None = None
    choice: Choice | None = None
    no_choice: str = ""
    line: Line | None = None
    analysis: Analysis | None = None
    against: Against | None = None
    outputs: Outputs | None = field(default=None, compare=False, repr=False)

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
        numbers = [entry.number for entry in self.snapshots]
        return {name: getattr(self, name) for name in scalars} | {
            "members": [_member_json(entry, metrics) for entry, metrics in members],
            "last_m": [{"m": m} | figures(row) for m, row in enumerate(self.metrics.last_m, start=1)],
            "first_m": [{"m": m} | figures(row) for m, row in enumerate(self.metrics.first_m, start=1)],
            "all_against_last": asdict(self.metrics.all_against_last),
            "combine": self.metrics.combine,
            "worth": None if self.worth is None else self.worth.as_json(numbers),
            "decision": None if self.choice is None else asdict(self._decision(self.choice)),
            "no_decision": self.no_choice or None,
            "analysis": None if self.analysis is None else self.analysis.as_json(),
            "against": None if self.against is None else self.against.as_json(),
            "line": None if self.line is None else asdict(self.line) | {"barrier": self.line.barrier},
            "seconds": self.seconds,
        }

    def _decision(self, choice: Choice) -> Decision:
        return decision_of(choice, self.snapshots, self.worth.threshold if self.worth else None)


def _member_json(entry: SnapshotEntry, metrics: Metrics) -> dict[str, Any]:
    place = {name: getattr(entry, name) for name in ("cycle", "epoch", "step", "learning_rate", "train_loss")}
    alone = figures(metrics)
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
    combine: str = MEAN,
    averages: bool = False,
    interpolate: Sequence[int] | None = None,
    on_member: OnMember | None = None,
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
        return WeightSpace(part, folder, _training_batches(part, config["seed"]), computed.name)

    start = time.perf_counter()
    decided = Decided()
    no_choice = _reason_against(config, split, combine)
    if not no_choice:
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
            rows = _averages(space(part), comparison, folder, entries, decided.soup)
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
        no_choice=no_choice,
        line=measure_line(space(part), *ends) if ends else None,
        analysis=analysis_of(logits_MNC, labels_N, dataset.classes, decided.choice),
        outputs=Outputs(logits_MNC, labels_N, tuple(dataset.classes), part.images),
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True)
class Decided:
    """On held-out images; nothing where there are none.

    threshold, thresholds  of the cascade, and of its curve
    soup                   snapshots whose averaged weights did best
    """

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
    choice = choose(logits_MNC, labels_N)
    threshold, thresholds = choose_threshold(logits_MNC, labels_N, choice.taken.weights)
    soup: Sequence[SnapshotEntry] = ()
    if space is not None and len(entries) > 1:
        nlls = [mean_nll(logits_NC, labels_N) for logits_NC in logits_MNC]
        soup = choose_soup(space(part), entries, nlls)
    return Decided(choice, threshold, thresholds, soup)


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


def _training_batches(part: Forwards, seed: int) -> Pipeline:
    """Of the training images as training saw them, for running statistics."""
    dataset = part.dataset
    return make_pipeline(
        dataset.train,
        batch_size=min(BATCH_SIZE, len(dataset.train.labels)),
        mean=dataset.mean,
        std=dataset.std,
        device=part.device,
        seed=seed,
        augmentation=dataset.augmentation,
    )


def _averages(
    space: WeightSpace,
    comparison: Comparison,
    folder: RunFolder,
    entries: Sequence[SnapshotEntry],
    soup: Sequence[SnapshotEntry],
) -> list[Row]:
    """Rows of networks whose weights are averages: of the last m for each m, of those chosen, of training's own."""
    rows = []
    count = len(entries)
    for m in range(2, count + 1):
        rows.append(_average_row(AVERAGE, space, comparison, entries, entries[-m:]))
    if len(soup) > 1:
        rows.append(_average_row(SOUP, space, comparison, entries, soup))
    running = folder.average()
    if running is not None:
        logits_NC = space.logits([(running, 1.0)])
        weights = [float(entry.number == running.number) for entry in entries]
        rows.append(comparison.network(RUNNING, logits_NC, weights, space.forwards.seconds))
    return rows


def _average_row(
    name: str,
    space: WeightSpace,
    comparison: Comparison,
    entries: Sequence[SnapshotEntry],
    chosen: Sequence[SnapshotEntry],
) -> Row:
    logits_NC = space.logits(mean_of(chosen))
    weights = [1 / len(chosen) if entry in chosen else 0.0 for entry in entries]
    return comparison.network(name, logits_NC, weights, space.forwards.seconds)


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
    """Why nothing is decided on held-out images, as a sentence's end; "": it is."""
    if split != "test":
        return f"the {split} images are what is reported"
    if combine != MEAN:
        return f"members are combined by {combine}, but predictions average their probabilities"
    images = config["images"].get("validation", 0)
    if not images:
        return "the run held no images out: train with --validation N"
    return reason_against(images, config.get("classes") or 0) or ""


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
