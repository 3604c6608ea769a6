"""What an ensemble's averaged predictions are worth: pure functions of the averaging kernel's statistics.

Statistics are [M, N] (row m-1: the average over m members; N images), figures are float64 [M].
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from fastsnap.ensemble.combining import MEAN, combined_statistics
from fastsnap.kernels.averaging_reference import EnsembleStatistics

ECE_BINS = 15  # Guo et al. 2017
NORMAL_95 = 1.959964  # standard errors on either side that hold 95 % of a normal distribution


@dataclass(frozen=True)
class Metrics:
    """The figures of one ensemble (or of one snapshot) on one split.

    error               share of images whose most probable class is wrong, percent
    top5_error          share of images whose label is not among the five most probable classes, percent;
                        always 0 with five classes or fewer
    nll                 mean negative log probability of the label, nats
    ece                 expected calibration error, 0 to 1
    brier               mean squared distance to the one-hot label, summed over the classes, 0 to 2
    entropy             mean entropy of the averaged prediction, nats
    mutual_information  mean mutual information of prediction and member, nats: 0 where all members agree
    disagreement        mean share of the m members whose own prediction differs from the ensemble's, 0 to 1
    """

    error: float
    top5_error: float
    nll: float
    ece: float
    brier: float
    entropy: float
    mutual_information: float
    disagreement: float


def figures(metrics: Metrics) -> dict[str, float | None]:
    """As JSON has them: what is NaN, since votes have no probabilities, is null."""
    return {name: None if math.isnan(value) else value for name, value in asdict(metrics).items()}


def error(prediction_MN: Tensor, labels_N: Tensor) -> Tensor:
    """Top-1 error in percent; predictions and labels int64."""
    return 100 * (prediction_MN != labels_N).double().mean(1)


def top_k_error(label_rank_MN: Tensor, k: int = 5) -> Tensor:
    """Share of labels that are not among the k most probable classes, percent; rank 0: the most probable."""
    return 100 * (label_rank_MN >= k).double().mean(1)


def expected_calibration_error(confidence_MN: Tensor, correct_MN: Tensor) -> Tensor:
    """Mean gap between confidence and accuracy over 15 equal-width bins (lo, hi], weighted by images, 0 to 1.

    Guo et al., On Calibration of Modern Neural Networks (ICML 2017), equation 3. `correct_MN` is bool.
    """
    confidence = confidence_MN.double()
    if confidence.isnan().any():  # of votes
        return confidence.mean(1)
    bins = ((confidence * ECE_BINS).ceil().long() - 1).clamp(0, ECE_BINS - 1)
    # |B| * |accuracy - confidence| of a bin is the absolute sum of (correct - confidence) over its images.
    gaps = confidence.new_zeros(len(confidence), ECE_BINS)
    gaps.scatter_add_(1, bins, correct_MN.double() - confidence)
    return gaps.abs().sum(1) / confidence.shape[1]


def brier_score(sum_of_squares_MN: Tensor, label_probability_MN: Tensor) -> Tensor:
    """Sum over classes of (probability - one-hot label)^2, mean over images, 0 to 2."""
    return (sum_of_squares_MN.double() - 2 * label_probability_MN.double() + 1).mean(1)


def summarise(statistics: EnsembleStatistics, labels_N: Tensor) -> list[Metrics]:
    """Metrics of each ensemble in `statistics`, m = 1..M; NaN where votes have none.

    Raises ValueError if these come without labels.
    """
    log_probability, rank = statistics.label_log_probability, statistics.label_rank
    if log_probability is None or rank is None:
        raise ValueError("statistics must be computed with the labels: average_members(logits, labels)")
    members = torch.arange(1, len(statistics.prediction) + 1, device=labels_N.device)
    nll = -log_probability.double().mean(1)
    rows = torch.stack(
        [
            error(statistics.prediction, labels_N),
            torch.where(nll.isnan(), nll, top_k_error(rank)),  # votes put no classes in order
            nll,
            expected_calibration_error(statistics.confidence, statistics.prediction == labels_N),
            brier_score(statistics.sum_of_squares, log_probability.double().exp()),
            statistics.entropy.double().mean(1),
            statistics.mutual_information.double().mean(1),
            statistics.disagreement.double().mean(1) / members,
        ],
        dim=1,
    )
    return [Metrics(*row) for row in rows.tolist()]


@dataclass(frozen=True)
class Difference:
    """How far one classifier lies above another on the same images, paired image by image.

    points  of error in percent, or nats of NLL; standard_error likewise
    """

    points: float
    standard_error: float

    @property
    def interval(self) -> tuple[float, float]:
        """In which the difference over all such images lies, with 95 % confidence (normal approximation)."""
        return self.points - NORMAL_95 * self.standard_error, self.points + NORMAL_95 * self.standard_error


def error_difference(prediction_N: Tensor, baseline_N: Tensor, labels_N: Tensor) -> Difference:
    """Error of `prediction_N` minus error of `baseline_N` in percentage points, paired image by image.

    Both see the same hard images, so the difference is known better than either error. Its standard error is
    that of the mean of N differences in {-1, 0, 1}: it covers the draw of the images, not of the seeds.
    """
    return mean_difference(100 * (prediction_N != labels_N).double(), 100 * (baseline_N != labels_N).double())


def mean_difference(values_N: Tensor, baseline_N: Tensor) -> Difference:
    """Mean of `values_N` minus mean of `baseline_N`, paired: see error_difference."""
    differences = values_N.double() - baseline_N.double()
    mean = differences.mean()
    spread = ((differences - mean).square().mean() / len(differences)).sqrt()
    return Difference(mean.item(), spread.item())


@dataclass(frozen=True)
class MemberMetrics:
    """The figures of M members and of their ensembles.

    alone             each member
    last_m            row m-1: the last m members averaged
    first_m           row m-1: the first m members averaged
    all_against_last  error of all members together minus that of the last one alone
    combine           how members are combined: see combining.COMBINATIONS
    """

    alone: tuple[Metrics, ...]
    last_m: tuple[Metrics, ...]
    first_m: tuple[Metrics, ...]
    all_against_last: Difference
    combine: str = MEAN


def measure_members(logits_MNC: Tensor, labels_N: Tensor, combine: str = MEAN) -> MemberMetrics:
    """All figures from the members' logits (any float type, in the order of the run) and the labels."""
    alone = [
        summarise(combined_statistics(logits_NC[None], labels_N), labels_N)[0] for logits_NC in logits_MNC
    ]
    last = combined_statistics(logits_MNC, labels_N, combine, order="last")
    first = combined_statistics(logits_MNC, labels_N, combine, order="first")
    return MemberMetrics(
        alone=tuple(alone),
        last_m=tuple(summarise(last, labels_N)),
        first_m=tuple(summarise(first, labels_N)),
        all_against_last=error_difference(last.prediction[-1], last.prediction[0], labels_N),
        combine=combine,
    )
