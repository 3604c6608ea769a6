"""What an averaging computes, and how in plain PyTorch: both kernels are tested against it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class EnsembleStatistics:
    """Per number of members m = 1..M (row m - 1) and per sample, from the averaged probabilities.

    prediction             int64 [M, N], the most probable class, ties go to the smallest
    confidence             float32 [M, N], its probability
    label_log_probability  float32 [M, N], finite however improbable the label is (at least -3.4e38); None
                           without labels
    label_rank             int32 [M, N], number of classes before the label, ties go to the smallest class; None
                           without labels
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
    mean = torch.empty(samples, classes, device=logits.device) if probabilities else None
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
    invalid_M = (~torch.isfinite(logits_MNC)).any(2).sum(1)
    logits_MNC = (logits_MNC - logits_MNC.amax(2, keepdim=True)) / temperature
    weights_M1 = torch.tensor(weights_M, dtype=torch.float64, device=logits.device)[:, None]
    weights_M1 = weights_M1 / weights_M1.max()
    totals_M1 = weights_M1.cumsum(0)
    log_MNC = logits_MNC.log_softmax(2)
    members_MNC = log_MNC.exp()
    mean_MNC = (weights_M1[:, :, None] * members_MNC).cumsum(0) / totals_M1[:, :, None]
    confidence_MN, prediction_MN = mean_MNC.max(2)
    entropy_MN = torch.special.entr(mean_MNC).sum(2)
    member_entropy_MN = -(members_MNC * log_MNC).sum(2)
    expected_MN = (weights_M1 * member_entropy_MN).cumsum(0) / totals_M1
    votes_MN = logits_MNC.argmax(2)
    count_M = range(1, len(logits) + 1)
    statistics = EnsembleStatistics(
        prediction=prediction_MN,
        confidence=confidence_MN,
        label_log_probability=None if labels is None else _log_label(log_MNC, labels, weights_M1),
        label_rank=None if labels is None else _rank(mean_MNC, labels),
        sum_of_squares=mean_MNC.square().sum(2),
        entropy=entropy_MN,
        mutual_information=(entropy_MN - expected_MN).clamp(min=0),
        disagreement=torch.stack([(votes_MN[:m] != prediction_MN[m - 1]).sum(0).int() for m in count_M]),
        probabilities=mean_MNC[-1] if probabilities else None,
    )
    return statistics, invalid_M


def _log_label(log_MNC: Tensor, labels: Tensor, weights_M1: Tensor) -> Tensor:
    index_MN1 = labels.long()[None, :, None].expand(len(log_MNC), -1, 1)
    weighted_MN = log_MNC.gather(2, index_MN1)[:, :, 0] + weights_M1.log()
    return weighted_MN.logcumsumexp(0) - weights_M1.cumsum(0).log()


def _rank(mean_MNC: Tensor, labels: Tensor) -> Tensor:
    label_N1 = labels.long()[:, None]
    of_label_MN1 = mean_MNC.gather(2, label_N1.expand(len(mean_MNC), -1, -1))
    earlier_NC = torch.arange(mean_MNC.shape[2], device=labels.device) < label_N1
    return ((mean_MNC > of_label_MN1) | ((mean_MNC == of_label_MN1) & earlier_NC)).sum(2).int()
