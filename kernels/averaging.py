"""Averaging the members of an ensemble: what every metric needs, for every number of members, in one pass.

The softmax outputs of the members join the average one after the other; after each, it is reduced per sample at
once, so that [M, N, C] probabilities are never written. Floor: each logit is read once. The temperature divides a
logit's distance from the largest of its row, not the logit, whose rounding would be as large as the logits are.

This file is the contract, the reference and the choice of the kernel (`averaging_cpu`, `averaging_triton`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Order = Literal["last", "first"]
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
LOGIT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FP32 = torch.finfo(torch.float32)


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


def average_members(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    order: Order = "last",
    weights: Tensor | Sequence[float] | None = None,
    temperature: float = 1.0,
    probabilities: bool = False,
) -> EnsembleStatistics:
    """Statistics of the ensembles of m = 1..M members, in fp32.

    logits         [M, N, C] fp32, bf16, fp16 or fp64, of any strides; finite in fp32
    labels         integers [N] in 0..C-1, or None
    order          "last": the ensemble of m is the last m members; "first": the first m
    weights        [M] finite and > 0, one per member, normalised over the m members; default: equal
    temperature    divides the logits; 1.2e-38 to 3.4e38, the normal numbers of fp32
    probabilities  also return the averaged probabilities of all M members

    Raises ValueError for wrong shapes, types, devices and values, and for NaN or infinite logits, naming the members.
    """
    _check_logits(logits)
    if order not in ("last", "first"):
        raise ValueError(f'order must be "last" or "first", got {order!r}')
    labels_N = None if labels is None else _checked_labels(labels, logits)
    temperature = _checked_temperature(temperature)
    members = len(logits)
    joining = list(range(members)) if order == "first" else list(range(members - 1, -1, -1))
    weights_M = _checked_weights(weights, members)
    in_order = [weights_M[member] for member in joining]
    if logits.is_cuda:
        from .averaging_triton import triton_averaging as averaging
    else:
        from .averaging_cpu import cpu_averaging as averaging
    statistics, invalid_M = averaging(
        logits.detach().resolve_neg(), labels_N, joining, in_order, temperature, probabilities
    )
    _require_finite(dict(zip(joining, invalid_M.tolist(), strict=True)), logits.shape[1])
    return statistics


def _check_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor):
        raise ValueError(f"logits must be one tensor, got {type(logits).__name__}: torch.stack the members")
    if logits.device.type not in ("cpu", "cuda") or logits.layout != torch.strided:
        raise ValueError(
            f"logits must be strided on cpu or cuda, got {logits.layout} on {logits.device}: "
            "convert with to_dense() or cpu()"
        )
    shape = list(logits.shape)
    if logits.dtype not in LOGIT_TYPES or len(shape) != 3 or shape[0] < 1 or not 2 <= shape[2] <= 2**30:
        raise ValueError(
            "logits must be floats of 16, 32 or 64 bits [members >= 1, samples, classes >= 2], "
            f"got {logits.dtype} {shape}: convert with float()"
        )


def _checked_labels(labels: Tensor, logits: Tensor) -> Tensor:
    """int64 [N], contiguous."""
    samples, classes = logits.shape[1:]
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be a tensor, got {type(labels).__name__}: convert with torch.tensor")
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.is_quantized)
    plain = labels.layout == torch.strided and labels.device == logits.device
    if labels.shape != (samples,) or not integers or not plain:
        raise ValueError(
            f"labels must be integers [{samples}], strided on {logits.device}, "
            f"got {labels.dtype} {list(labels.shape)}, {labels.layout} on {labels.device}"
        )
    labels_N = labels.resolve_neg().long().contiguous()
    if samples:
        low, high = (int(bound) for bound in labels_N.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"labels must lie in 0..{classes - 1}, got {low}..{high}")
    return labels_N


def _checked_temperature(temperature: float) -> float:
    try:
        value = float(temperature)
    except (TypeError, ValueError):
        value = math.nan
    if not FP32.tiny <= value <= FP32.max:
        raise ValueError(f"temperature must lie in {FP32.tiny:.1e}..{FP32.max:.1e}, got {temperature!r}")
    return value


def _checked_weights(weights: Tensor | Sequence[float] | None, members: int) -> list[float]:
    if weights is None:
        return [1.0] * members
    try:
        weights_M = [float(weight) for weight in weights]
    except (TypeError, ValueError, RuntimeError):
        weights_M = []
    if len(weights_M) != members or not all(0 < weight < math.inf for weight in weights_M):
        raise ValueError(
            f"weights must be {members} finite numbers above 0, got {weights}: "
            "leave a member out instead of giving it weight 0"
        )
    return weights_M


def _require_finite(invalid: dict[int, int], samples: int) -> None:
    named = [f"member {member} in {invalid[member]} samples" for member in sorted(invalid) if invalid[member]]
    if named:
        raise ValueError(
            "logits must be finite in fp32, got NaN, infinity or more than 3.4e38 from "
            f"{', '.join(named)} of {samples}: leave them out"
        )


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
