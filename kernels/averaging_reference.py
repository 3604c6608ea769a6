"""What an averaging computes, and how in plain PyTorch: both kernels are tested against it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .averaging_weights import weight_tables

PER_SAMPLE = {
    "prediction": torch.int64,
    "confidence": torch.float32,
    "label_log_probability": torch.float32,
    "label_rank": torch.int32,
    "sum_of_squares": torch.float32,
    "entropy": torch.float32,
    "mutual_information": torch.float32,
    "disagreement": torch.int32,
}
OF_LABEL = ("label_log_probability", "label_rank")
FP32 = torch.finfo(torch.float32)
FAR = math.log(
    1e-30
)  # log-probability of a label below which fp32 soon cannot tell averaged probabilities apart
AT_ONCE = 2**22  # fp64 numbers [M, samples, C]: 32 MB


@dataclass(frozen=True)
class EnsembleStatistics:
    """Per number of members m = 1..M (row m - 1) and per sample, from the averaged probabilities.

    prediction             int64 [M, N], the most probable class, ties go to the smallest
    confidence             float32 [M, N], its probability
    label_log_probability  float32 [M, N], finite however improbable the label is (at least -3.4e38); None
                           without labels
    label_rank             int32 [M, N], number of classes before the label: those whose averaged probability is
                           larger, or equal while their index is smaller. Probabilities are compared as the kernel
                           has them, in fp32; where the label's is below 1e-30, so that others of its size would
                           underflow, their logarithms are, in fp64. None without labels
    sum_of_squares         float32 [M, N], of the probabilities
    entropy                float32 [M, N], of the averaged probabilities, in nats (total uncertainty)
    mutual_information     float32 [M, N], entropy less the members' average entropy, in nats, >= 0
    disagreement           int32 [M, N], how many of the m members predict another class than their ensemble
    probabilities          float32 [N, C], averaged over all M members; None unless asked for
    """

    prediction: Tensor
    confidence: Tensor
    label_log_probability: Tensor | None
    label_rank: Tensor | None
    sum_of_squares: Tensor
    entropy: Tensor
    mutual_information: Tensor
    disagreement: Tensor
    probabilities: Tensor | None

    @property
    def label_probability(self) -> Tensor | None:
        """float32 [M, N], probability of the label; None without labels."""
        return None if self.label_log_probability is None else self.label_log_probability.exp()


def empty_statistics(logits: Tensor, labels: Tensor | None, probabilities: bool) -> EnsembleStatistics:
    """Statistics for a kernel to write into, on the device of `logits`."""
    members, samples, classes = logits.shape
    fields: dict[str, Tensor | None] = {
        name: torch.empty(members, samples, dtype=dtype, device=logits.device)
        for name, dtype in PER_SAMPLE.items()
    }
    if labels is None:
        fields |= dict.fromkeys(OF_LABEL)
    mean = None
    if probabilities:
        mean = torch.empty(samples, classes, dtype=torch.float32, device=logits.device)
    return EnsembleStatistics(**fields, probabilities=mean)  # type: ignore[arg-type]


def reference_averaging(
    logits: Tensor,
    labels: Tensor | None,
    joining: Sequence[int],
    weights_M: Sequence[float],
    temperature: float,
    probabilities: bool,
) -> tuple[EnsembleStatistics, Tensor]:
    """The statistics in plain PyTorch, in fp64: what the kernels are tested against.

    joining    the members in the order in which they join; weights_M in that order
    Returns the statistics and int64 [M], the number of samples with NaN or infinite logits, in that order.
    """
    logits_MNC = logits[list(joining)].double()
    invalid_M = (~(logits_MNC.abs() <= FP32.max)).any(2).sum(1)
    log_MNC = _log_softmax(logits_MNC, temperature)
    log_mean_MNC = _log_average(log_MNC, weights_M)
    members_MNC = log_MNC.exp()
    mean_MNC = _running_average(members_MNC, weights_M)
    confidence_MN, prediction_MN = mean_MNC.max(2)
    entropy_MN = torch.special.entr(mean_MNC).sum(2)
    expected_MN = _running_average(-(members_MNC * log_MNC).sum(2), weights_M)
    votes_MN = logits_MNC.argmax(2)
    count_M = range(1, len(logits) + 1)
    statistics = EnsembleStatistics(
        prediction=prediction_MN,
        confidence=confidence_MN,
        label_log_probability=(
            None if labels is None else _of_label(log_mean_MNC, labels).clamp(min=-FP32.max)
        ),
        label_rank=None if labels is None else _label_rank(mean_MNC, log_mean_MNC, labels),
        sum_of_squares=mean_MNC.square().sum(2),
        entropy=entropy_MN,
        mutual_information=(entropy_MN - expected_MN).clamp(min=0),
        disagreement=torch.stack([(votes_MN[:m] != prediction_MN[m - 1]).sum(0).int() for m in count_M]),
        probabilities=mean_MNC[-1] if probabilities else None,
    )
    return statistics, invalid_M


def plain_averaging(
    logits: Tensor,
    labels: Tensor | None,
    joining: Sequence[int],
    weights_M: Sequence[float],
    temperature: float,
    probabilities: bool,
) -> tuple[EnsembleStatistics, Tensor]:
    """`reference_averaging` in a kernel's types, a few samples at a time: for where there is no kernel."""
    members, samples, classes = logits.shape
    statistics = empty_statistics(logits, labels, probabilities)
    invalid_M = torch.zeros(members, dtype=torch.int64, device=logits.device)
    at_once = max(1, AT_ONCE // (members * classes))
    for begin in range(0, samples, at_once):
        some = slice(begin, begin + at_once)
        labels_N = None if labels is None else labels[some]
        part, invalid = reference_averaging(
            logits[:, some], labels_N, joining, weights_M, temperature, probabilities
        )
        invalid_M += invalid
        for name, values in vars(statistics).items():
            if values is not None:  # [M, N], and probabilities [N, C]
                place = values[some] if name == "probabilities" else values[:, some]
                place.copy_(getattr(part, name))
    return statistics, invalid_M


def rank_far_labels(
    statistics: EnsembleStatistics,
    logits: Tensor,
    labels: Tensor,
    joining: Sequence[int],
    weights_M: Sequence[float],
    temperature: float,
) -> None:
    """Rank the labels that are too improbable for a kernel's fp32 again, in fp64: writes into `statistics`."""
    assert statistics.label_log_probability is not None
    assert statistics.label_rank is not None
    far_MN = statistics.label_log_probability < FAR
    at_once = max(1, AT_ONCE // (len(logits) * logits.shape[2]))
    for samples in far_MN.any(0).nonzero()[:, 0].split(at_once):
        logits_MNC = logits[:, samples][list(joining)].double()
        log_mean_MNC = _log_average(_log_softmax(logits_MNC, temperature), weights_M)
        rank_MN = _classes_before(log_mean_MNC, labels[samples])
        known_MN = statistics.label_rank[:, samples]
        statistics.label_rank[:, samples] = torch.where(far_MN[:, samples], rank_MN, known_MN)


def _log_softmax(logits_MNC: Tensor, temperature: float) -> Tensor:
    return ((logits_MNC - logits_MNC.amax(2, keepdim=True)) / temperature).log_softmax(2)


def _running_average(values: Tensor, weights_M: Sequence[float]) -> Tensor:
    """Of the first m of M values, for m = 1..M; [M, ...]."""
    averages, total = [], torch.zeros_like(values[0])
    for value, rescaling, weight, weights in zip(values, *weight_tables(weights_M), strict=True):
        total = rescaling * total + weight * value
        averages.append(total / weights)
    return torch.stack(averages)


def _log_average(log_MNC: Tensor, weights_M: Sequence[float]) -> Tensor:
    """`_running_average` of the exponentials, as its logarithm."""
    log_weights = [math.log(weight) for weight in weights_M]
    log_weights_M11 = torch.tensor(log_weights, dtype=torch.float64, device=log_MNC.device)[:, None, None]
    return (log_MNC + log_weights_M11).logcumsumexp(0) - log_weights_M11.logcumsumexp(0)


def _of_label(values_MNC: Tensor, labels: Tensor) -> Tensor:
    return values_MNC.gather(2, labels.long()[None, :, None].expand(len(values_MNC), -1, 1))[:, :, 0]


def _label_rank(mean_MNC: Tensor, log_mean_MNC: Tensor, labels: Tensor) -> Tensor:
    far_MN1 = (_of_label(log_mean_MNC, labels) < FAR)[:, :, None]
    return _classes_before(torch.where(far_MN1, log_mean_MNC, mean_MNC), labels)


def _classes_before(values_MNC: Tensor, labels: Tensor) -> Tensor:
    of_label_MN1 = _of_label(values_MNC, labels)[:, :, None]
    classes_C = torch.arange(values_MNC.shape[2], dtype=torch.int64, device=labels.device)
    tied_MNC = (values_MNC == of_label_MN1) & (classes_C < labels.long()[:, None])
    return ((values_MNC > of_label_MN1) | tied_MNC).sum(2).int()
