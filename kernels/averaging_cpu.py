"""The averaging on a CPU: one call into averaging_cpu.cpp."""

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from .averaging_reference import PER_SAMPLE, EnsembleStatistics, empty_statistics, rank_far_labels
from .averaging_weights import weight_tables
from .cpu import address, library

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
INTEGERS = (
    *("logits", "type", "member_stride", "sample_stride", "class_stride", "members", "samples", "classes"),
    *(
        "order",
        "rescalings",
        "weights",
        "totals",
        "labels",
        *PER_SAMPLE,
        "probabilities",
        "invalid",
        "threads",
    ),
)


class AveragingArguments(ctypes.Structure):
    """`struct Averaging` of averaging_cpu.cpp."""

    _fields_ = (*((name, ctypes.c_int64) for name in INTEGERS), ("temperature", ctypes.c_double))


def cpu_averaging(
    logits: Tensor,
    labels: Tensor | None,
    joining: Sequence[int],
    weights_M: Sequence[float],
    temperature: float,
    probabilities: bool,
) -> tuple[EnsembleStatistics, Tensor]:
    """`reference_averaging` in one pass, in fp32 whatever the type of the logits."""
    statistics = empty_statistics(logits, labels, probabilities)
    invalid_M = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    labels = None if labels is None else labels.long().contiguous()
    order_table = array("q", joining)
    rescalings, weights, totals = (array("d", table) for table in weight_tables(weights_M))
    members, samples, classes = logits.shape
    outputs = {name: address(getattr(statistics, name)) for name in (*PER_SAMPLE, "probabilities")}
    arguments = AveragingArguments(
        logits=logits.data_ptr(),
        type=TYPES[logits.dtype],
        **dict(zip(("member_stride", "sample_stride", "class_stride"), logits.stride(), strict=True)),
        members=members,
        samples=samples,
        classes=classes,
        order=order_table.buffer_info()[0],
        rescalings=rescalings.buffer_info()[0],
        weights=weights.buffer_info()[0],
        totals=totals.buffer_info()[0],
        labels=address(labels),
        **outputs,
        invalid=invalid_M.data_ptr(),
        threads=torch.get_num_threads(),
        temperature=temperature,
    )
    library().fastsnap_average(ctypes.byref(arguments))
    if labels is not None:
        rank_far_labels(statistics, logits, labels, joining, weights_M, temperature)
    return statistics, invalid_M
