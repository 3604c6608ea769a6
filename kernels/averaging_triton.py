"""The averaging on a GPU: one Triton launch; a program takes a few samples and lets one member after the other join.

A row of up to LARGEST_BLOCK classes stays in registers. A longer one is taken block by block, so that the registers do
not limit it: the first of three passes over a member's logits reads them from memory, the others find them in the
cache, and so they find the averaged probabilities, which are then written to memory whether asked for or not.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .averaging_passes import (
    LOWEST,
    below_best,
    block_of,
    inspect,
    join_label,
    largest,
    largest_fp64,
    normaliser,
    read_block,
    to_fp32,
)
from .averaging_reference import EnsembleStatistics, rank_far_labels
from .averaging_weights import weight_tables

FLOATS = ("confidence", "sum_of_squares", "entropy", "mutual_information", "label_log_probability")
INTEGERS = ("disagreement", "label_rank")
LARGEST_BLOCK = 1024  # classes
THREADS, MOST_THREADS = 128, 256  # of a program
PER_THREAD = 4  # elements of a tile at most: 128 bits of fp32
# Per thread. Without a limit the assembler spills some to make room for one more program.
REGISTERS = {"adjacent classes": 80, "other strides": 96, "fp64": 96}
MAX_MEMBERS = 64
WIDEST_LOAD = 16  # bytes


@triton.jit
def averaging_kernel(
    logits,  # [M, N, C], any float type
    labels,  # int64 [N] or None
    order,  # int64 [M], members in the order in which they join; the weights and invalid are in this order
    rescalings,  # fp32 [M], see weight_tables
    weights,  # fp32 [M]
    totals,  # fp32 [M]
    prediction,  # int64 [M, N]
    floats,  # fp32 [5 (4 without labels), M, N], in the order of FLOATS
    integers,  # int32 [2 (1 without labels), M, N], in the order of INTEGERS
    probabilities,  # fp32 [N, C]; None is possible if all classes fit into one block, else they stay weighted sums
    invalid,  # int64 [M]
    members,
    samples,
    plane,  # members * samples
    member_stride,
    sample_stride,
    class_stride,
    temperature,
    classes: tl.constexpr,
    SAMPLES: tl.constexpr,
    CLASSES: tl.constexpr,  # of a block
    VOTES: tl.constexpr,  # at least as many as members
    VECTOR: tl.constexpr,  # rows of logits begin at multiples of so many elements
):
    ONE_BLOCK: tl.constexpr = classes <= CLASSES
    sample_N = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    present_N = sample_N < samples
    if labels is not None:
        label_N = tl.load(labels + sample_N, mask=present_N, other=0).to(tl.int32)
    if probabilities is not None:
        sums_N = probabilities + sample_N * classes
    sum_NC = tl.zeros([SAMPLES, CLASSES], tl.float32)
    vote_V = tl.arange(0, VOTES)
    votes_NV = tl.zeros([SAMPLES, VOTES], tl.int32)
    entropies_N = tl.zeros([SAMPLES], tl.float32)
    label_best_N = tl.full([SAMPLES], float("-inf"), tl.float32)
    label_sum_N = tl.zeros([SAMPLES], tl.float32)
    place_N = sample_N  # in [M, N]
    for m in range(members):
        rescaling = tl.load(rescalings + m)
        weight = tl.load(weights + m)
        total = tl.load(totals + m)
        logits_N = logits + tl.multiple_of(
            tl.load(order + m) * member_stride + sample_N * sample_stride, VECTOR
        )
        class_C = tl.arange(0, CLASSES)
        offset_N = None
        if logits.dtype.element_ty == tl.float64:
            offset_N = largest_fp64(logits_N, class_stride, present_N, classes, CLASSES)
        row_NC = None
        if ONE_BLOCK:
            row_NC = read_block(logits_N, offset_N, class_C, class_stride, present_N, classes)
        best_N, vote_N, invalid_N = inspect(
            row_NC, logits_N, offset_N, class_stride, present_N, classes, CLASSES
        )
        count = tl.sum(invalid_N.to(tl.int64))
        if count > 0:
            tl.atomic_add(invalid + m, count)
        mass_N, entropy_N = normaliser(
            row_NC, logits_N, offset_N, class_stride, present_N, best_N, temperature, classes, CLASSES
        )
        entropies_N = rescaling * entropies_N + weight * entropy_N

        factor_N = weight / mass_N
        top_NC = tl.full([SAMPLES, CLASSES], -1.0, tl.float32)
        predicted_NC = tl.zeros([SAMPLES, CLASSES], tl.int32)
        squares_NC = tl.zeros([SAMPLES, CLASSES], tl.float32)
        entropy_NC = squares_NC
        of_label_NC = squares_NC
        for begin in range(0, classes, CLASSES):
            class_C = begin + tl.arange(0, CLASSES)
            inside = present_N[:, None] & (class_C < classes)[None, :]
            logit_NC = block_of(row_NC, logits_N, offset_N, class_C, class_stride, present_N, classes)
            if not ONE_BLOCK:
                sum_NC = tl.load(sums_N[:, None] + class_C[None, :], mask=inside & (m > 0), other=0.0)
            power_NC = tl.exp(below_best(logit_NC, best_N, temperature))
            sum_NC = rescaling * sum_NC + factor_N[:, None] * power_NC
            if not ONE_BLOCK:
                tl.store(sums_N[:, None] + class_C[None, :], sum_NC, mask=inside)
            predicted_NC = tl.where(sum_NC > top_NC, class_C[None, :], predicted_NC)
            top_NC = tl.maximum(top_NC, sum_NC)
            mean_NC = sum_NC / total
            squares_NC += mean_NC * mean_NC
            entropy_NC -= mean_NC * tl.log(tl.maximum(mean_NC, 1e-37))
            if labels is not None:
                of_label_NC += tl.where(class_C[None, :] == label_N[:, None], sum_NC, 0.0)
        if not ONE_BLOCK:
            tl.debug_barrier()  # the thread that reads a sum need not be the one that wrote it

        top_N, predicted_N = largest(top_NC, predicted_NC)
        entropy_N = tl.sum(entropy_NC, 1)
        votes_NV = tl.where(vote_V[None, :] == m, vote_N[:, None], votes_NV)
        against_NV = (votes_NV != predicted_N[:, None]) & (vote_V[None, :] <= m)
        tl.store(prediction + place_N, predicted_N.to(tl.int64), mask=present_N)
        floats_N = floats + place_N
        integers_N = integers + place_N
        tl.store(floats_N, top_N / total, mask=present_N)
        floats_N += plane  # added, not multiplied: a product could exceed 32 bits
        tl.store(floats_N, tl.sum(squares_NC, 1), mask=present_N)
        floats_N += plane
        tl.store(floats_N, entropy_N, mask=present_N)
        floats_N += plane
        tl.store(floats_N, tl.maximum(entropy_N - entropies_N / total, 0.0), mask=present_N)
        tl.store(integers_N, tl.sum(against_NV.to(tl.int32), 1), mask=present_N)
        if labels is not None:
            logit_N = tl.load(logits_N + label_N.to(tl.int64) * class_stride, mask=present_N, other=0.0)
            below_N = tl.maximum((to_fp32(logit_N, offset_N) - best_N) / temperature, LOWEST)
            label_best_N, label_sum_N = join_label(
                label_best_N, label_sum_N, rescaling, weight, below_N - tl.log(mass_N)
            )
            log_probability_N = label_best_N + tl.log(label_sum_N / total)
            tl.store(floats_N + plane, log_probability_N, mask=present_N)
            label_value_N = tl.sum(of_label_NC, 1)
            before_NC = tl.zeros([SAMPLES, CLASSES], tl.int32)
            for begin in range(0, classes, CLASSES):
                class_C = begin + tl.arange(0, CLASSES)
                if not ONE_BLOCK:
                    inside = present_N[:, None] & (class_C < classes)[None, :]
                    sum_NC = tl.load(sums_N[:, None] + class_C[None, :], mask=inside, other=-1.0)
                tied = (sum_NC == label_value_N[:, None]) & (class_C[None, :] < label_N[:, None])
                before_NC += ((sum_NC > label_value_N[:, None]) | tied).to(tl.int32)
            tl.store(integers_N + plane, tl.sum(before_NC, 1), mask=present_N)
            if not ONE_BLOCK:
                tl.debug_barrier()
        place_N += samples

    if ONE_BLOCK and probabilities is not None:
        class_C = tl.arange(0, CLASSES)
        inside = present_N[:, None] & (class_C < classes)[None, :]
        whole = tl.load(totals + members - 1)  # what was assigned in the loop is not defined after it
        tl.store(sums_N[:, None] + class_C[None, :], sum_NC / whole, mask=inside)


def aligned_elements(logits: Tensor) -> int:
    """Elements at whose multiples every row of adjacent classes begins, up to the widest load; else 1."""
    if logits.stride(2) != 1:
        return 1
    return math.gcd(WIDEST_LOAD // logits.element_size(), *logits.stride()[:2])


def tiles(logits: Tensor) -> dict[str, int]:
    """The constants that depend on the logits [M, N, C], and the options of the launch.

    A thread holds elements of one sample only, as many as it loads at once: those of several would take registers.
    Raises ValueError for more members than the registers of a program can hold.
    """
    members, _, classes = logits.shape
    if members > MAX_MEMBERS:
        raise ValueError(
            f"logits may have at most {MAX_MEMBERS} members on CUDA, got {members}: average them on the CPU"
        )
    vector = aligned_elements(logits)
    per_thread = min(vector, PER_THREAD)
    block = min(triton.next_power_of_2(classes), LARGEST_BLOCK)
    votes = triton.next_power_of_2(members)
    samples = max(1, THREADS * per_thread // max(block, votes))
    threads = min(MOST_THREADS, samples * max(block, votes) // per_thread)
    sizes = {"classes": classes, "SAMPLES": samples, "CLASSES": block, "VOTES": votes, "VECTOR": vector}
    kind = "adjacent classes" if logits.stride(2) == 1 else "other strides"
    registers = REGISTERS["fp64" if logits.dtype == torch.float64 else kind]
    return sizes | {"num_warps": threads // 32, "maxnreg": registers}


def triton_averaging(
    logits: Tensor,
    labels: Tensor | None,
    joining: Sequence[int],
    weights_M: Sequence[float],
    temperature: float,
    probabilities: bool,
) -> tuple[EnsembleStatistics, Tensor]:
    """`reference_averaging` in one launch, in fp32 whatever the type of the logits."""
    members, samples, classes = logits.shape
    device = logits.device
    of_label = 0 if labels is None else 1
    prediction = torch.empty(members, samples, dtype=torch.int64, device=device)
    floats = torch.empty(4 + of_label, members, samples, dtype=torch.float32, device=device)
    integers = torch.empty(1 + of_label, members, samples, dtype=torch.int32, device=device)
    invalid_M = torch.zeros(members, dtype=torch.int64, device=device)
    sizes = tiles(logits)
    tables = weight_tables(weights_M)
    written = probabilities or classes > sizes["CLASSES"]
    mean = torch.empty(samples, classes, dtype=torch.float32, device=device) if written else None
    if samples:
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            averaging_kernel[(triton.cdiv(samples, sizes["SAMPLES"]),)](
                logits,
                None if labels is None else labels.long().contiguous(),
                torch.tensor(joining, dtype=torch.int64, device=device),
                *(torch.tensor(table, dtype=torch.float32, device=device) for table in tables),
                prediction,
                floats,
                integers,
                mean,
                invalid_M,
                members,
                samples,
                members * samples,
                *logits.stride(),
                temperature,
                **sizes,
            )
    fields = dict(zip(FLOATS, floats, strict=False)) | dict(zip(INTEGERS, integers, strict=False))
    fields = {"label_log_probability": None, "label_rank": None} | fields
    if mean is not None and classes > sizes["CLASSES"]:
        mean = mean.div_(tables[2][-1]) if probabilities else None
    statistics = EnsembleStatistics(prediction=prediction, probabilities=mean, **fields)
    if labels is not None:
        rank_far_labels(statistics, logits, labels, joining, weights_M, temperature)
    return statistics, invalid_M
