"""A cascade: the newest snapshot is asked first, the ones before it only while their average is unsure.

Its members are those that were decided on, with their weights. An image is answered by the average of the last k of
them for the first k whose confidence reaches the threshold, else by that of all. All of it follows from one pass of the
averaging kernel over the kept logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsnap.ensemble.choosing import of_members
from fastsnap.kernels.averaging import average_members
from fastsnap.kernels.averaging_reference import EnsembleStatistics

THRESHOLDS = 101  # tried between the least confident and the most confident image


@dataclass(frozen=True)
class CascadePoint:
    """At `threshold`: mean forward passes per image, error in percent, NLL in nats."""

    threshold: float
    forwards: float
    error: float
    nll: float


@dataclass(frozen=True)
class Answers:
    """Of a cascade for N images, each [N]: how many members were asked, what they say, and the label's NLL."""

    forwards: Tensor  # int64
    prediction: Tensor  # int64
    nll: Tensor  # float32
    confidence: Tensor  # float32


def answers(statistics: EnsembleStatistics, threshold: float) -> Answers:
    """statistics  of the last m members, m = 1..M, with labels; threshold: confidence that is enough, 0 to 1."""
    enough_MN = statistics.confidence >= threshold
    enough_MN[-1] = True
    asked_N = enough_MN.int().argmax(0)  # the first
    assert statistics.label_log_probability is not None

    def taken(values_MN: Tensor) -> Tensor:
        return values_MN.gather(0, asked_N[None])[0]

    return Answers(
        asked_N + 1,
        taken(statistics.prediction),
        -taken(statistics.label_log_probability),
        taken(statistics.confidence),
    )


def curve(statistics: EnsembleStatistics, labels_N: Tensor, thresholds: list[float]) -> list[CascadePoint]:
    """A point for each threshold."""
    points = []
    for threshold in thresholds:
        found = answers(statistics, threshold)
        points.append(
            CascadePoint(
                threshold,
                found.forwards.double().mean().item(),
                100 * (found.prediction != labels_N).double().mean().item(),
                found.nll.double().mean().item(),
            )
        )
    return points


def asked_in_turn(logits_MNC: Tensor, labels_N: Tensor, weights: Sequence[float]) -> EnsembleStatistics:
    """Of the averages of the last m of the members that have weight, for m = 1 to all of these."""
    members = [member for member, weight in enumerate(weights) if weight]
    counting = [weights[member] for member in members]
    return average_members(of_members(logits_MNC, members), labels_N, order="last", weights=counting)


def choose_threshold(
    logits_MNC: Tensor, labels_N: Tensor, weights: Sequence[float]
) -> tuple[float, list[float]]:
    """On held-out images: the threshold of the fewest forwards whose error there is no higher than that of all members
    together, and the thresholds that were tried, which are those of the curve.

    Equally spaced in the number of images that the newest member is sure enough of.
    """
    statistics = asked_in_turn(logits_MNC, labels_N, weights)
    parts = torch.linspace(0, 1, THRESHOLDS, dtype=torch.float64, device=logits_MNC.device)
    thresholds = sorted(set(torch.quantile(statistics.confidence[0].double(), parts).tolist()))
    # Whatever the images: the newest alone, and all, since nobody is as sure.
    thresholds = [0.0, *thresholds, 1.1]
    points = curve(statistics, labels_N, thresholds)
    enough = [point for point in points if point.error <= points[-1].error]
    return min(enough, key=lambda point: point.forwards).threshold, thresholds
