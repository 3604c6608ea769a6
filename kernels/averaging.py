"""Averaging the members of an ensemble: everything the metrics need, for every number of members, in one pass.

The softmax outputs of the first m members (in the order asked for) are averaged, for every m = 1..M, and reduced per
sample at once, so that no [M, N, C] probabilities are ever written. Floor: each logit is read once.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Order = Literal["last", "first"]


@dataclass(frozen=True)
class EnsembleStatistics:
    """Per number of members m = 1..M (row m - 1) and per sample, from the averaged probabilities.

    prediction             int64 [M, N], most probable class, ties go to the smallest
    confidence             float32 [M, N], its probability
    label_log_probability  float32 [M, N], log of the probability of the label, finite however small; None without labels
    label_rank             int32 [M, N], number of classes before the label, ties go to the smallest class; None without
    sum_of_squares         float32 [M, N], of the probabilities
    entropy                float32 [M, N], of the averaged probabilities, in nats (total uncertainty)
    mutual_information     float32 [M, N], entropy less the average of the members' entropies, in nats, >= 0
    disagreement           int32 [M, N], members among the m that predict another class than the ensemble of the m
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


def average_members(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    order: Order = "last",
    weights: Tensor | None = None,
    temperature: float = 1.0,
    probabilities: bool = False,
) -> EnsembleStatistics:
    """Statistics of the ensembles of m = 1..M members.

    logits         [M, N, C], any float type and strides
    labels         int64 [N] in 0..C-1, or None
    order          "last": the ensemble of m is the last m members; "first": the first m
    weights        [M], > 0, one per member, normalised over the m members; default: equal
    temperature    > 0, divides the logits
    probabilities  also return the averaged probabilities of all M members

    Raises ValueError for wrong shapes, types and values, and for logits that are NaN or infinite, naming the members.
    """
    weights_M = _checked(logits, labels, order, weights, temperature)
    return reference_averaging(logits, labels, order, weights_M, temperature, probabilities)


def _checked(
    logits: Tensor, labels: Tensor | None, order: str, weights: Tensor | None, temperature: float
) -> list[float]:
    """The weights of the members, after all arguments have been looked at."""
    if logits.ndim != 3 or not logits.is_floating_point() or logits.shape[0] < 1 or logits.shape[2] < 2:
        raise ValueError(
            "logits must be floating point [members >= 1, samples, classes >= 2], "
            f"got {logits.dtype} {list(logits.shape)}"
        )
    members, samples, classes = logits.shape
    if order not in ("last", "first"):
        raise ValueError(f'order must be "last" or "first", got {order!r}')
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")
    if labels is not None:
        if labels.shape != (samples,) or labels.is_floating_point() or labels.device != logits.device:
            raise ValueError(
                f"labels must be integers [{samples}] on {logits.device}, "
                f"got {labels.dtype} {list(labels.shape)} on {labels.device}"
            )
        if samples and not (0 <= int(labels.min()) and int(labels.max()) < classes):
            raise ValueError(
                f"labels must lie in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}"
            )
    weights_M = [1.0] * members if weights is None else [float(weight) for weight in weights]
    if len(weights_M) != members or not all(0 < weight < float("inf") for weight in weights_M):
        raise ValueError(
            f"weights must be {members} finite numbers above 0, got {weights_M}: to weigh a member 0, leave it out"
        )
    return weights_M


def reference_averaging(
    logits: Tensor,
    labels: Tensor | None,
    order: str,
    weights_M: list[float],
    temperature: float,
    probabilities: bool,
) -> EnsembleStatistics:
    """The statistics in plain PyTorch, member after member, in fp32 (fp64 for fp64 logits)."""
    members, samples, classes = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    order_M = range(members) if order == "first" else range(members - 1, -1, -1)
    sum_NC = torch.zeros(samples, classes, dtype=dtype, device=logits.device)
    log_label_N = torch.full((samples,), -torch.inf, dtype=dtype, device=logits.device)
    entropies_N = torch.zeros_like(log_label_N)
    votes_MN = torch.empty(members, samples, dtype=torch.int64, device=logits.device)
    bad_M, rows, total = {}, [], 0.0
    for count, member in enumerate(order_M, start=1):
        weight = weights_M[member]
        total += weight
        scaled_NC = logits[member].to(dtype) / temperature
        bad = int((~torch.isfinite(scaled_NC)).any(1).sum())
        if bad:
            bad_M[member] = bad
        log_NC = scaled_NC.log_softmax(1)
        exp_NC = log_NC.exp()
        sum_NC += weight * exp_NC
        entropies_N += weight * -torch.where(exp_NC > 0, exp_NC * log_NC, 0).sum(1)
        votes_MN[count - 1] = scaled_NC.argmax(1)
        row = _row(sum_NC / total, entropies_N / total, votes_MN[:count])
        if labels is not None:
            label_N1 = labels.long()[:, None]
            log_label_N = torch.logaddexp(
                log_label_N, log_NC.gather(1, label_N1)[:, 0] + torch.tensor(weight).log()
            )
            row["label_log_probability"] = log_label_N - torch.tensor(total, dtype=dtype).log()
            row["label_rank"] = _rank(sum_NC, label_N1)
        rows.append(row)
    _require_finite(bad_M, samples)
    fields: dict[str, Tensor | None] = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if labels is None:
        fields |= {"label_log_probability": None, "label_rank": None}
    return EnsembleStatistics(**fields, probabilities=sum_NC / total if probabilities else None)


def _row(mean_NC: Tensor, entropies_N: Tensor, votes_mN: Tensor) -> dict[str, Tensor]:
    confidence_N, prediction_N = mean_NC.max(1)
    entropy_N = torch.special.entr(mean_NC).sum(1)
    return {
        "prediction": prediction_N,
        "confidence": confidence_N,
        "sum_of_squares": mean_NC.square().sum(1),
        "entropy": entropy_N,
        "mutual_information": (entropy_N - entropies_N).clamp(min=0),
        "disagreement": (votes_mN != prediction_N).sum(0).int(),
    }


def _rank(sum_NC: Tensor, label_N1: Tensor) -> Tensor:
    of_label_N1 = sum_NC.gather(1, label_N1)
    earlier_NC = torch.arange(sum_NC.shape[1], device=sum_NC.device) < label_N1
    return ((sum_NC > of_label_N1) | ((sum_NC == of_label_N1) & earlier_NC)).sum(1).int()


def _require_finite(bad_M: dict[int, int], samples: int) -> None:
    if bad_M:
        named = ", ".join(
            f"member {member} in {bad_M[member]} of {samples} samples" for member in sorted(bad_M)
        )
        raise ValueError(f"logits must be finite, got NaN or infinity from {named}: leave these members out")
