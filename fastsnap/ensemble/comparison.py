"""Several runs side by side on the same test images: paired image by image, and over seeds where only these differ."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from fastsnap.ensemble.choosing import averaged_log_probabilities
from fastsnap.ensemble.metrics import Difference, mean_difference
from fastsnap.ensemble.results import Report
from fastsnap.ensemble.ways import ALL
from fastsnap.ensemble.worth import DECIDED, NEWEST, Cost
from fastsnap.run_files import RunError

Interval = tuple[float, float]
COMPARED = (NEWEST, ALL, DECIDED)
# Of config.json: what does not make another experiment of it, a seed aside.
INCIDENTAL = (
    *(
        "seed",
        "out",
        "data",
        "threads",
        "memory",
        "cache",
        "timeout",
        "tensorboard",
        "device",
        "loader",
        "ranks",
    ),
    *(
        "versions",
        "fingerprints",
        "images",
        "data_source",
        "initial",
        "teacher",
        "storage",
        "compile",
        "update",
    ),
)


@dataclass(frozen=True)
class RunRow:
    """A way to use a run's snapshots: error in percent, NLL in nats, what it costs, and how far error and NLL lie above
    the first run's.
    """

    run: str
    way: str
    error: float
    nll: float
    cost: Cost
    error_difference: Difference
    nll_difference: Difference


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: its mean, and the 95 % interval of that (Student's t); None for a single seed."""

    mean: float
    interval: Interval | None


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    name     what it has where the groups differ
    errors   per way, in percent
    against_first  of the same way in the first group: difference of the means and its 95 % interval; paired by seed
                   where both have the same seeds, else Welch's
    """

    name: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    errors: dict[str, Spread]
    against_first: dict[str, Spread]


@dataclass(frozen=True)
class RunComparison:
    """rows: of each run and way; groups: where there are several runs of one."""

    dataset: str
    images: int
    rows: tuple[RunRow, ...]
    groups: tuple[Group, ...]

    def as_json(self) -> dict[str, Any]:
        """The content of comparison.json."""
        return {"dataset": self.dataset, "images": self.images} | {
            "rows": [_row_json(row) for row in self.rows],
            "groups": [asdict(group) for group in self.groups],
        }


def _row_json(row: RunRow) -> dict[str, Any]:
    values = asdict(row)
    for name in ("error_difference", "nll_difference"):
        values[name]["interval"] = list(getattr(row, name).interval)
    return values


def require_comparable(configs: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Raise RunError, naming the runs and what differs, unless all were tested on the same images and classes."""
    first, *others = configs
    for name, config in zip(names[1:], others, strict=True):
        for field, kind in (
            ("dataset", "data sets"),
            ("class_names", "classes"),
            ("classes", "numbers of classes"),
        ):
            mine, theirs = first.get(field), config.get(field)
            if mine is not None and theirs is not None and mine != theirs:
                raise RunError(
                    f"{names[0]} and {name} have different {kind} ({_shown(mine)}; {_shown(theirs)}): runs are "
                    "compared on the same images"
                )
        mine, theirs = ((config.get("fingerprints") or {}).get("test") for config in (first, config))
        if mine is not None and theirs is not None and mine != theirs:
            raise RunError(
                f"{names[0]} and {name} were tested on different images of {config['dataset']}: runs are compared on "
                "the same images"
            )


def _shown(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def compare(
    reports: Sequence[Report], configs: Sequence[dict[str, Any]], names: Sequence[str]
) -> RunComparison:
    """Reports with their outputs, of runs that are comparable; the first is what the others are compared with.

    Raises RunError for reports of different images.
    """
    first = reports[0].outputs
    assert first is not None
    found = []
    for name, report in zip(names, reports, strict=True):
        assert report.outputs is not None
        if not torch.equal(report.outputs.labels, first.labels):
            raise RunError(
                f"{names[0]} and {name} were tested on different images: runs are compared on the same"
            )
        found.append(_outcomes(report))
    rows = []
    for name, report, outcomes in zip(names, reports, found, strict=True):
        assert report.worth is not None
        for way in COMPARED:
            if way in outcomes and way in found[0]:
                wrong_N, nll_N = outcomes[way]
                base_wrong_N, base_nll_N = found[0][way]
                rows.append(
                    RunRow(
                        name,
                        way,
                        wrong_N.mean().item(),
                        nll_N.double().mean().item(),
                        report.worth.row(way if len(report.snapshots) > 1 else ALL).cost,
                        mean_difference(wrong_N, base_wrong_N),
                        mean_difference(nll_N, base_nll_N),
                    )
                )
    groups = _groups(rows, configs, names)
    return RunComparison(reports[0].dataset, reports[0].images, tuple(rows), groups)


def _outcomes(report: Report) -> dict[str, tuple[Tensor, Tensor]]:
    """Per way: 100 for each image that is called wrongly, else 0; and the NLL of each, nats. [N] both."""
    assert report.outputs is not None
    logits_MNC, labels_N = report.outputs.logits, report.outputs.labels
    members = len(logits_MNC)
    weightings: dict[str, tuple[Sequence[float], float]] = {
        NEWEST: ([0.0] * (members - 1) + [1.0], 1.0),
        ALL: ([1 / members] * members, 1.0),
    }
    if report.choice is not None:
        weightings[DECIDED] = (report.choice.taken.weights, report.choice.temperature)
    outcomes = {}
    for way, (weights, temperature) in weightings.items():
        log_NC = torch.log_softmax(averaged_log_probabilities(logits_MNC, weights) / temperature, 1)
        wrong_N = 100 * (log_NC.argmax(1) != labels_N).double()
        outcomes[way] = wrong_N, -log_NC.gather(1, labels_N[:, None])[:, 0]
    return outcomes


def _groups(
    rows: Sequence[RunRow], configs: Sequence[dict[str, Any]], names: Sequence[str]
) -> tuple[Group, ...]:
    kinds: list[dict[str, Any]] = []
    members: list[list[int]] = []
    for index, config in enumerate(configs):
        kind = {name: value for name, value in config.items() if name not in INCIDENTAL}
        if kind not in kinds:
            kinds.append(kind)
            members.append([])
        members[kinds.index(kind)].append(index)
    if all(len(indices) == 1 for indices in members):
        return ()
    errors = {(row.run, row.way): row.error for row in rows}
    groups: list[Group] = []
    base: dict[str, dict[int, float]] = {}
    for kind, indices in zip(kinds, members, strict=True):
        spreads, against = {}, {}
        for way in COMPARED:
            values = {
                configs[index].get("seed", 0): errors[names[index], way]
                for index in indices
                if (names[index], way) in errors
            }
            if len(values) != len(indices):
                continue
            spreads[way] = spread(list(values.values()))
            if not groups:
                base[way] = values
            elif way in base:
                against[way] = difference_of_groups(values, base[way])
        runs = tuple(names[index] for index in indices)
        seeds = tuple(configs[index].get("seed", 0) for index in indices)
        groups.append(Group(_what_differs(kind, kinds), runs, seeds, spreads, against))
    return tuple(groups)


def _what_differs(kind: dict[str, Any], kinds: Sequence[dict[str, Any]]) -> str:
    """What it has where the kinds differ."""
    names = [name for name in kind if any(kind[name] != other.get(name) for other in kinds)]
    return ", ".join(f"{name} {_shown(kind[name])}" for name in names) or "all runs"


def spread(values: Sequence[float]) -> Spread:
    """Of independent values."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return Spread(mean, None)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    margin = float(stats.t.ppf(0.975, len(values) - 1)) * math.sqrt(variance / len(values))
    return Spread(mean, (mean - margin, mean + margin))


def difference_of_groups(values: dict[int, float], base: dict[int, float]) -> Spread:
    """By seed -> figure: difference of the means, and its 95 % interval."""
    mean = sum(values.values()) / len(values) - sum(base.values()) / len(base)
    if min(len(values), len(base)) < 2:
        return Spread(mean, None)
    if values.keys() == base.keys():
        return spread([values[seed] - base[seed] for seed in values])
    interval = stats.ttest_ind(
        list(values.values()), list(base.values()), equal_var=False
    ).confidence_interval(0.95)
    return Spread(mean, (float(interval.low), float(interval.high)))
