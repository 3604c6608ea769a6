"""What an ensemble's outputs for a split say besides its error: per class, how far to trust it, how members differ."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastsnap.ensemble.metrics import ECE_BINS

RISKS = (0.01, 0.05, 0.1)  # error rates of what is answered, for which the coverage is told
AT_ONCE = 2**22  # fp64 numbers [members, images, classes]: 32 MB
PAIRS = 10  # of classes, most often confused


@dataclass(frozen=True)
class ClassError:
    """Of the `images` of a class: error in percent, None without images."""

    name: str
    images: int
    error: float | None


@dataclass(frozen=True)
class Confused:
    """How many images of class `true` are called `predicted`."""

    true: str
    predicted: str
    images: int


@dataclass(frozen=True)
class Bin:
    """Of a reliability diagram: images whose confidence lies in (low, high]; mean confidence and accuracy, 0 to 1,
    None without images.
    """

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Analysis:
    """Of the ensemble that was decided, or of all members with equal weights.

    classes         in the order of the outputs
    confused        most often first
    untempered      reliability at temperature 1, and `tempered` at the one decided
    aurc            area under the risk-coverage curve, 0 to 1: the mean over k of the error of the k images that it is
                    most sure of. Geifman, Uziel and El-Yaniv (ICLR 2019)
    coverage        part of the images, 0 to 1, that can be answered with an error of at most each of RISKS
    correlation     [M][M], Pearson's, of the members' softmax outputs: figure 6 of Huang et al.
    disagreement    [M][M], part of the images, 0 to 1, for which two members predict different classes
    mended, broken  indices of the images that it gets right where the last member alone is wrong, and the other way
                    round; those that it is most sure of first. Of all members with equal weights, where it is that one
    """

    classes: tuple[ClassError, ...]
    confused: tuple[Confused, ...]
    untempered: tuple[Bin, ...]
    tempered: tuple[Bin, ...]
    aurc: float
    coverage: tuple[float, ...]
    correlation: tuple[tuple[float, ...], ...]
    disagreement: tuple[tuple[float, ...], ...]
    mended: tuple[int, ...]
    broken: tuple[int, ...]

    def as_json(self) -> dict[str, Any]:
        """Without the images, of which only the numbers are told."""
        values = asdict(self) | {"mended": len(self.mended), "broken": len(self.broken)}
        values["coverage"] = {f"{risk:g}": part for risk, part in zip(RISKS, self.coverage, strict=True)}
        return values


def analyse(
    logits_MNC: Tensor,
    labels_N: Tensor,
    class_names: Sequence[str],
    log_NC: Tensor,
    temperature: float = 1.0,
    several_NC: Tensor | None = None,
) -> Analysis:
    """logits float32 and labels int64 of a split; log_NC: log-probabilities of the ensemble at temperature 1.

    several_NC  likewise of all members, where the ensemble is the last one alone: of what is mended and broken
    """
    before_NC, after_NC = log_NC.softmax(1), (log_NC / temperature).softmax(1)
    confidence_N, predicted_N = after_NC.max(1)
    correct_N = predicted_N == labels_N
    last_right_N = logits_MNC[-1].argmax(1) == labels_N
    surest_N, right_N = confidence_N, correct_N
    if several_NC is not None:
        surest_N, right_N = several_NC.softmax(1).amax(1), several_NC.argmax(1) == labels_N
    mended, broken = right_N & ~last_right_N, ~right_N & last_right_N
    curve = risk_curve(confidence_N, ~correct_N)
    return Analysis(
        tuple(class_errors(predicted_N, labels_N, class_names)),
        tuple(most_confused(predicted_N, labels_N, class_names)),
        tuple(reliability(before_NC.amax(1), before_NC.argmax(1) == labels_N)),
        tuple(reliability(confidence_N, correct_N)),
        curve.mean().item(),
        tuple(coverage_at(curve, risk) for risk in RISKS),
        _rows(correlations(logits_MNC)),
        _rows(disagreements(logits_MNC)),
        _surest(mended, surest_N),
        _surest(broken, surest_N),
    )


def class_errors(predicted_N: Tensor, labels_N: Tensor, class_names: Sequence[str]) -> list[ClassError]:
    """In the order of the classes."""
    count = len(class_names)
    images = torch.bincount(labels_N, minlength=count).tolist()
    wrong = torch.bincount(labels_N[predicted_N != labels_N], minlength=count).tolist()
    rows = zip(class_names, images, wrong, strict=True)
    return [ClassError(name, total, 100 * bad / total if total else None) for name, total, bad in rows]


def most_confused(predicted_N: Tensor, labels_N: Tensor, class_names: Sequence[str]) -> list[Confused]:
    """The PAIRS of classes that are taken for each other most often, in one direction."""
    wrong = predicted_N != labels_N
    count = len(class_names)
    codes, images = torch.unique(labels_N[wrong] * count + predicted_N[wrong], return_counts=True)
    order = torch.argsort(images, descending=True, stable=True)[:PAIRS]
    pairs = zip(codes[order].tolist(), images[order].tolist(), strict=True)
    return [Confused(class_names[code // count], class_names[code % count], number) for code, number in pairs]


def reliability(confidence_N: Tensor, correct_N: Tensor) -> list[Bin]:
    """The bins that ECE counts with."""
    index_N = ((confidence_N.double() * ECE_BINS).ceil().long() - 1).clamp(0, ECE_BINS - 1)
    bins = []
    for index in range(ECE_BINS):
        chosen = index_N == index
        images = int(chosen.sum())
        means = (confidence_N[chosen].double().mean().item(), correct_N[chosen].double().mean().item())
        confidence, accuracy = means if images else (None, None)
        bins.append(Bin(index / ECE_BINS, (index + 1) / ECE_BINS, images, confidence, accuracy))
    return bins


def risk_curve(confidence_N: Tensor, wrong_N: Tensor) -> Tensor:
    """Error, 0 to 1, float64 [N], of the k images of the highest confidence, k = 1..N; of images that are equally sure,
    the mean error of all of them counts, so that their order is no matter.
    """
    order = torch.argsort(confidence_N, descending=True, stable=True)
    sorted_N = confidence_N[order]
    _, place, sizes = torch.unique_consecutive(sorted_N, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(sizes), dtype=torch.float64, device=wrong_N.device)
    sums.index_add_(0, place, wrong_N[order].double())
    levelled_N = (sums / sizes)[place]
    return levelled_N.cumsum(0) / torch.arange(1, len(order) + 1, device=order.device)


def coverage_at(curve_N: Tensor, risk: float) -> float:
    """The largest part of the images, 0 to 1, whose error is at most `risk`; curve: see risk_curve."""
    enough = torch.nonzero(curve_N <= risk + 1e-12)
    return (int(enough[-1]) + 1) / len(curve_N) if len(enough) else 0.0


def correlations(logits_MNC: Tensor) -> Tensor:
    """Pearson's correlation of the softmax outputs of each two members, float64 [M, M]."""
    members, _, classes = logits_MNC.shape
    products = torch.zeros(members, members, dtype=torch.float64, device=logits_MNC.device)
    # Some images at a time: in fp64, all of them would take twice what the logits take.
    for part in logits_MNC.split(max(1, AT_ONCE // (members * classes)), dim=1):
        # Probabilities of C classes have the mean 1 / C.
        centred = (torch.softmax(part.float(), 2).double() - 1 / classes).flatten(1)
        products += centred @ centred.T
    lengths = products.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return (products / lengths / lengths[:, None]).clamp(-1, 1)


def disagreements(logits_MNC: Tensor) -> Tensor:
    """Part of the images for which two members predict different classes, float64 [M, M]."""
    predicted_MN = logits_MNC.argmax(2)
    return (predicted_MN[:, None] != predicted_MN[None]).double().mean(2)


def _rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())


def _surest(chosen_N: Tensor, confidence_N: Tensor) -> tuple[int, ...]:
    found = torch.nonzero(chosen_N)[:, 0]
    return tuple(found[torch.argsort(confidence_N[found], descending=True, stable=True)].tolist())
