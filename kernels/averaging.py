"""Averaging the members of an ensemble: what every metric needs, for every number of members, in one pass.

The softmax outputs of the members join the average one after the other; after each, it is reduced per sample at
once, so that [M, N, C] probabilities are never written. Floor: each logit is read once. The temperature divides a
logit's distance from the largest of its row, not the logit, whose rounding would be as large as the logits are.

This file is the way in: it checks the arguments and chooses the kernel, `averaging_cpu` or `averaging_triton`;
without a C++ compiler the reference does the work.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from .averaging_reference import EnsembleStatistics, plain_averaging
from .cpu import has_library

Order = Literal["last", "first"]
LOGIT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FP32 = torch.finfo(torch.float32)


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

    logits         [M, N, C] fp32, bf16, fp16 or fp64, of any strides; finite in fp32. Those of fp64 may be as large
                   and as close to each other as they like: their distances are taken in fp64
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
    statistics, invalid_M = _kernel(logits.device)(
        logits.detach().resolve_neg(), labels_N, joining, in_order, temperature, probabilities
    )
    _require_finite(dict(zip(joining, invalid_M.tolist(), strict=True)), logits.shape[1])
    return statistics


def _kernel(device: torch.device) -> Callable[..., tuple[EnsembleStatistics, Tensor]]:
    if device.type == "cuda":
        from .averaging_triton import triton_averaging

        return triton_averaging
    if has_library():
        from .averaging_cpu import cpu_averaging

        return cpu_averaging
    return plain_averaging


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
