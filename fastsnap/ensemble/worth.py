"""What each way to use a run's snapshots is worth on the test images: one table, one row per way.

Every row says what it gains against all snapshots averaged with equal weights, paired image by image, and what it
costs.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from fastsnap.ensemble.cascade import CascadePoint, answers, asked_in_turn, curve
from fastsnap.ensemble.choosing import Choice, averaged_log_probabilities, of_members
from fastsnap.ensemble.combining import GEOMETRIC, VOTE, combined_statistics
from fastsnap.ensemble.metrics import (
    Difference,
    Metrics,
    error_difference,
    expected_calibration_error,
    figures,
    mean_difference,
    summarise,
)
from fastsnap.ensemble.ways import ALL, GREEDY, LAST, SUBSET, WEIGHTED
from fastsnap.kernels.averaging import average_members
from fastsnap.kernels.averaging_reference import EnsembleStatistics

WAYS = {
    ALL: "all, equal",
    LAST: "last m",
    SUBSET: "best subset",
    GREEDY: "greedy",
    WEIGHTED: "weighted",
    GEOMETRIC: "all, geometric",
    VOTE: "all, voting",
    "greedy weights": "weights, greedy",
    "running mean": "weights, running",
}
DECIDED, NEWEST, CASCADE = "decided", "newest alone", "cascade"
# Single networks, of averaged weights.
AVERAGE, SOUP, RUNNING = "mean weights", "greedy weights", "running mean"


@dataclass(frozen=True)
class Cost:
    """forwards per image (a mean, of a cascade); parameters and bytes that are kept; milliseconds per image."""

    forwards: float
    parameters: int
    bytes: int
    milliseconds: float


@dataclass(frozen=True)
class MemberCost:
    """Of one member: parameters, bytes of its file, and milliseconds of a forward pass per image as measured."""

    parameters: int
    bytes: int
    milliseconds: float

    def times(self, forwards: float, members: int) -> Cost:
        """Of `members` of which `forwards` are asked on average."""
        return Cost(forwards, members * self.parameters, members * self.bytes, forwards * self.milliseconds)


def member_cost(network: nn.Module, seconds: float, images: int) -> MemberCost:
    """Of a network whose forward passes over `images` took so many seconds."""
    parameters = sum(parameter.numel() for parameter in network.parameters())
    tensors = network.state_dict().values()
    return MemberCost(parameters, sum(tensor.nbytes for tensor in tensors), 1000 * seconds / images)


@dataclass(frozen=True)
class Row:
    """A way to use the snapshots, on the test images.

    name     what it is; see WAYS
    members  from 0, that count
    weights  of these
    metrics  NaN where the way has no probabilities, and for what a cascade has not
    error_gain, nll_gain  against all members with equal weights: below 0 is better; nll_gain None for votes
    """

    name: str
    members: tuple[int, ...]
    weights: tuple[float, ...]
    temperature: float
    metrics: Metrics
    cost: Cost
    error_gain: Difference
    nll_gain: Difference | None


@dataclass(frozen=True)
class Worth:
    """The rows, and the cascade's curve where its thresholds could be chosen."""

    rows: tuple[Row, ...]
    cascade: tuple[CascadePoint, ...] = ()
    threshold: float | None = None

    def row(self, name: str) -> Row:
        """The row of this name. Raises KeyError where there is none."""
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise KeyError(name)
        return found[0]

    def as_json(self, numbers: Sequence[int]) -> dict[str, Any]:
        """numbers: of the members; NaN is null."""
        return {
            "ways": [_row_json(row, numbers) for row in self.rows],
            "cascade": {
                "threshold": self.threshold,
                "curve": [asdict(point) for point in self.cascade],
            }
            if self.cascade
            else None,
        }


def _row_json(row: Row, numbers: Sequence[int]) -> dict[str, Any]:
    values = asdict(row) | {"snapshots": [numbers[member] for member in row.members]}
    values["metrics"] = figures(row.metrics)
    for name in ("error_gain", "nll_gain"):
        gain: Difference | None = getattr(row, name)
        values[name] = None if gain is None else asdict(gain) | {"interval": list(gain.interval)}
    del values["members"]
    return values


class Comparison:
    """Rows against the baseline: all members of logits_MNC, averaged with equal weights."""

    def __init__(self, logits_MNC: Tensor, labels_N: Tensor, cost: MemberCost) -> None:
        self.logits_MNC, self.labels_N, self.cost = logits_MNC, labels_N, cost
        self._baseline = average_members(logits_MNC, labels_N, order="last")

    def row(
        self,
        name: str,
        statistics: EnsembleStatistics,
        weights: Sequence[float],
        *,
        temperature: float = 1.0,
        metrics: Metrics | None = None,
        cost: Cost | None = None,
    ) -> Row:
        """statistics: whose last row is meant; weights of the M members, 0: left out; metrics, cost: where they do not
        follow from these.
        """
        members = tuple(member for member, weight in enumerate(weights) if weight)
        error_gain = error_difference(statistics.prediction[-1], self._baseline.prediction[-1], self.labels_N)
        assert statistics.label_log_probability is not None
        nll_gain = None
        if not statistics.label_log_probability[-1].isnan().any():
            nll_gain = self._nll_gain(-statistics.label_log_probability[-1])
        return Row(
            name,
            members,
            tuple(weights[member] for member in members),
            temperature,
            metrics or summarise(statistics, self.labels_N)[-1],
            cost or self.cost.times(len(members), len(members)),
            error_gain,
            nll_gain,
        )

    def _nll_gain(self, nll_N: Tensor) -> Difference:
        assert self._baseline.label_log_probability is not None
        return mean_difference(nll_N, -self._baseline.label_log_probability[-1])

    def weighted(self, name: str, weights: Sequence[float], temperature: float = 1.0) -> Row:
        """The weighted average of the members."""
        members = [member for member, weight in enumerate(weights) if weight]
        counting = [weights[member] for member in members]
        chosen_MNC = of_members(self.logits_MNC, members)
        statistics = average_members(chosen_MNC, self.labels_N, order="first", weights=counting)
        if temperature == 1:
            return self.row(name, statistics, weights)
        plain = summarise(statistics, self.labels_N)[-1]
        log_NC = averaged_log_probabilities(self.logits_MNC, weights) / temperature
        statistics = average_members(log_NC[None], self.labels_N)
        # What says how members differ is no matter of the temperature.
        metrics = replace(
            summarise(statistics, self.labels_N)[0],
            mutual_information=plain.mutual_information,
            disagreement=plain.disagreement,
        )
        return self.row(name, statistics, weights, temperature=temperature, metrics=metrics)

    def network(self, name: str, logits_NC: Tensor, weights: Sequence[float], seconds: float) -> Row:
        """A single network, whose weights are members' averaged by `weights`, and whose passes took so many seconds."""
        own = replace(self.cost, milliseconds=1000 * seconds / len(self.labels_N))
        statistics = average_members(logits_NC[None], self.labels_N)
        return self.row(name, statistics, weights, cost=own.times(1, 1))

    def cascade(self, threshold: float, weights: Sequence[float], statistics: EnsembleStatistics) -> Row:
        """See cascade.answers, of statistics of the members with `weights` asked in turn."""
        found = answers(statistics, threshold)
        members = tuple(member for member, weight in enumerate(weights) if weight)
        correct_N = found.prediction == self.labels_N
        nothing = math.nan
        metrics = Metrics(
            error=100 * (~correct_N).double().mean().item(),
            top5_error=nothing,
            nll=found.nll.double().mean().item(),
            ece=expected_calibration_error(found.confidence[None], correct_N[None]).item(),
            brier=nothing,
            entropy=nothing,
            mutual_information=nothing,
            disagreement=nothing,
        )
        return Row(
            CASCADE,
            members,
            tuple(weights[member] for member in members),
            1.0,
            metrics,
            self.cost.times(found.forwards.double().mean().item(), len(members)),
            error_difference(found.prediction, self._baseline.prediction[-1], self.labels_N),
            self._nll_gain(found.nll),
        )


def measure_worth(
    comparison: Comparison,
    choice: Choice | None = None,
    threshold: float | None = None,
    thresholds: Sequence[float] = (),
) -> Worth:
    """All rows that follow from the members' logits for the test images.

    choice      made on held-out images; None: there were none
    threshold   of the cascade, likewise, and those of its curve
    """
    logits_MNC, labels_N = comparison.logits_MNC, comparison.labels_N
    members = len(logits_MNC)
    equal = [1 / members] * members
    newest = [0.0] * (members - 1) + [1.0]
    rows = [comparison.weighted(NEWEST, newest)] if members > 1 else []
    if choice is None:
        rows.append(comparison.weighted(ALL, equal))
    else:
        rows += [comparison.weighted(way.method, way.weights) for way in choice.candidates]
        rows.append(comparison.weighted(DECIDED, choice.taken.weights, choice.temperature))
    if members > 1:
        for combine in (GEOMETRIC, VOTE):
            statistics = combined_statistics(logits_MNC, labels_N, combine)
            rows.append(comparison.row(combine, statistics, equal))
    if choice is None or threshold is None or len(choice.taken.members) == 1:
        return Worth(tuple(rows))
    statistics = asked_in_turn(logits_MNC, labels_N, choice.taken.weights)
    rows.append(comparison.cascade(threshold, choice.taken.weights, statistics))
    points = curve(statistics, labels_N, list(thresholds))
    return Worth(tuple(rows), tuple(points), threshold)
