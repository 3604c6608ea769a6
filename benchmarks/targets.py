"""What the project has set itself to reach on two CPU cores, and whether the latest results reach it."""

from collections.abc import Sequence
from dataclasses import dataclass

import accuracy
import evaluation
import pipelines
import schedules
import throughput
from harness.measure import PROJECT
from harness.results import Record


@dataclass(frozen=True)
class Target:
    """A bound on one result.

    figure   "ratio": the project's times_better against `opponent`; "share": 1 / ratio; "median": of the result itself;
             "difference": upper end of the interval of the error's difference to the standard schedule
    at_most  whether `bound` is an upper bound
    """

    text: str
    benchmark: str
    case: str
    opponent: str
    figure: str
    bound: float
    at_most: bool = False


@dataclass(frozen=True)
class Verdict:
    """What was found, with its spread, as text; and whether the bound holds, None if that is not known."""

    target: Target
    found: str
    met: bool | None


RESNET20, RESNET110 = throughput.case_of("resnet20"), throughput.case_of("resnet110")
TARGETS = (
    Target(
        "training ResNet-20, times torchensemble's images/s",
        throughput.NAME,
        RESNET20,
        throughput.TORCHENSEMBLE,
        "ratio",
        3,
    ),
    Target(
        "training ResNet-20, times a plain PyTorch loop's images/s",
        throughput.NAME,
        RESNET20,
        throughput.PLAIN,
        "ratio",
        3,
    ),
    Target(
        "training ResNet-20, times a careful PyTorch loop's images/s",
        throughput.NAME,
        RESNET20,
        throughput.CAREFUL,
        "ratio",
        1.15,
    ),
    Target(
        "training ResNet-110, times a plain PyTorch loop's images/s",
        throughput.NAME,
        RESNET110,
        throughput.PLAIN,
        "ratio",
        2.5,
    ),
    Target(
        "data pipeline, times a DataLoader's images/s with 2 workers",
        pipelines.NAME,
        pipelines.CASE,
        pipelines.DATALOADERS[2],
        "ratio",
        10,
    ),
    Target(
        "data pipeline, percent of a ResNet-20 step",
        pipelines.NAME,
        pipelines.SHARE_CASE,
        PROJECT,
        "median",
        3,
        at_most=True,
    ),
    Target(
        "evaluating 5 snapshots, share of the time of 10 plain forwards",
        evaluation.NAME,
        evaluation.case_of("fp32"),
        evaluation.TWICE,
        "share",
        0.35,
        at_most=True,
    ),
    Target(
        "saving a snapshot, percent of an epoch",
        schedules.NAME,
        schedules.SHARE_CASE,
        PROJECT,
        "median",
        1,
        at_most=True,
    ),
    Target(
        "snapshot ensemble's error minus the standard schedule's, points, few images",
        accuracy.NAME,
        accuracy.case_of(accuracy.FEW),
        PROJECT,
        "difference",
        0,
        at_most=True,
    ),
)


def verdicts(records: Sequence[Record]) -> list[Verdict]:
    """What the records say about each target; a quick run says nothing."""
    found = {(record["benchmark"], record["case"], record["opponent"]): record for record in records}
    return [
        _verdict(target, found.get((target.benchmark, target.case, target.opponent))) for target in TARGETS
    ]


def _verdict(target: Target, record: Record | None) -> Verdict:
    if record is None or not record["n"] or record["quick"]:
        return Verdict(target, (record and record["missing"]) or "not measured", None)
    middle, low, high = _figures(target.figure, record)
    if low is None or high is None:
        return Verdict(target, f"{middle:.2f}, one seed: no interval", None)
    decisive = high if target.figure == "difference" else middle
    met = decisive <= target.bound if target.at_most else decisive >= target.bound
    return Verdict(target, f"{middle:.2f} ({low:.2f} to {high:.2f})", met)


def _figures(figure: str, record: Record) -> tuple[float, float | None, float | None]:
    """The figure itself, and the lower and upper end of its spread."""
    if figure == "difference":
        difference = record["details"]["against_standard"]
        return difference["mean"], difference["low"], difference["high"]
    if figure == "median":
        return record["median"], record["low"], record["high"]
    ratio = record["ratio"]
    if figure == "share":
        return 1 / ratio["median"], 1 / ratio["high"], 1 / ratio["low"]
    return ratio["median"], ratio["low"], ratio["high"]
