"""What an evaluation found: the report, and the outputs that further figures and pictures follow from."""

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from fastsnap.data.sources import Source
from fastsnap.ensemble.against import Against
from fastsnap.ensemble.analysis import Analysis
from fastsnap.ensemble.choosing import Choice
from fastsnap.ensemble.decision import decision_of
from fastsnap.ensemble.metrics import MemberMetrics, Metrics, figures
from fastsnap.ensemble.weight_space import Line
from fastsnap.ensemble.worth import Worth
from fastsnap.run_schema import Decision, SnapshotEntry


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
