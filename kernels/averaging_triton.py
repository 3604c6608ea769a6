"""The averaging on a GPU: one Triton launch; each program keeps the running sums of a few samples in registers."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .averaging import EnsembleStatistics

FLOATS = ("confidence", "sum_of_squares", "entropy", "mutual_information", "label_log_probability")
INTEGERS = ("disagreement", "label_rank")
TILE = 256  # elements of a tile [samples, classes] while the classes are few; a thread holds 2 of them
LARGEST_BLOCK = 16384  # classes in registers; those beyond it go into a second block
MAX_MEMBERS = 64


@triton.jit
def read_block(logits_N, class_stride, class_C, samples_N, samples, classes, temperature):
    """Logits [N, C] of one member over the temperature; 0 for samples, -inf for classes that do not exist."""
    inside = (samples_N < samples)[:, None] & (class_C < classes)[None, :]
    pointers = logits_N[:, None] + class_C.to(tl.int64)[None, :] * class_stride
    scaled_NC = tl.load(pointers, mask=inside, other=0.0).to(tl.float32) / temperature
    return tl.where((class_C < classes)[None, :], scaled_NC, float("-inf"))


@triton.jit
def count_invalid(scaled_NC, class_C, samples_N, samples, classes):
    inside = (samples_N < samples)[:, None] & (class_C < classes)[None, :]
    return tl.sum((inside & ~(tl.abs(scaled_NC) < float("inf"))).to(tl.int32), 1)


@triton.jit
def first_class(values_NC, value_N, class_C):
    """Smallest class whose value is `value_N`; a large number if there is none."""
    return tl.min(tl.where(values_NC == value_N[:, None], class_C[None, :], 2147483647), 1)


@triton.jit
def exponentials(scaled_NC, best_N):
    """exp(logit - best), its sum, and its sum weighted with logit - best."""
    distance_NC = tl.maximum(
        scaled_NC - best_N[:, None], -1000.0
    )  # exp is 0 long before; avoids 0 * infinity
    power_NC = tl.exp(distance_NC)
    return power_NC, tl.sum(power_NC, 1), tl.sum(power_NC * distance_NC, 1)


@triton.jit
def reduce_mean(sum_NC, total):
    """Largest sum, and sum of squares and entropy of the probabilities sum / total."""
    mean_NC = sum_NC / total
    surprise_NC = -mean_NC * tl.log(tl.maximum(mean_NC, 1e-37))  # 0 for a probability of 0
    return tl.max(sum_NC, 1), tl.sum(mean_NC * mean_NC, 1), tl.sum(surprise_NC, 1)


@triton.jit
def of_class(values_NC, class_C, label_N):
    return tl.sum(tl.where(class_C[None, :] == label_N[:, None], values_NC, 0.0), 1)


@triton.jit
def classes_before(sum_NC, class_C, label_N, sum_of_label_N):
    earlier = (sum_NC == sum_of_label_N[:, None]) & (class_C[None, :] < label_N[:, None])
    return tl.sum(((sum_NC > sum_of_label_N[:, None]) | earlier).to(tl.int32), 1)


@triton.jit
def averaging_kernel(
    logits,  # [M, N, C], any float type
    labels,  # int64 [N] or None
    order,  # int64 [M], members in the order in which they join; weights and invalid are in this order
    weights,  # fp32 [M]
    prediction,  # int64 [M, N]
    floats,  # fp32 [5 (4 without labels), M, N], in the order of FLOATS
    integers,  # int32 [2 (1 without labels), M, N], in the order of INTEGERS
    probabilities,  # fp32 [N, C] or None
    invalid,  # int64 [M]
    members,
    samples,
    plane,  # members * samples
    classes,
    member_stride,
    sample_stride,
    class_stride,
    temperature,
    SAMPLES: tl.constexpr,
    CLASSES: tl.constexpr,
    REST: tl.constexpr,  # classes of the second block, 0: there is none
    VOTES: tl.constexpr,
):
    sample_N = tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES)
    present_N = sample_N < samples
    class_C = tl.arange(0, CLASSES)
    sum_NC = tl.zeros([SAMPLES, CLASSES], tl.float32)
    if REST > 0:
        class_R = CLASSES + tl.arange(0, REST)
        sum_NR = tl.zeros([SAMPLES, REST], tl.float32)
    if labels is not None:
        label_N = tl.load(labels + sample_N, mask=present_N, other=0).to(tl.int32)
    vote_V = tl.arange(0, VOTES)
    votes_NV = tl.zeros([SAMPLES, VOTES], tl.int32)
    entropies_N = tl.zeros([SAMPLES], tl.float32)
    label_mass_N = tl.full([SAMPLES], float("-inf"), tl.float32)  # log of the label's weighted sum
    place_N = sample_N.to(tl.int64)  # in [M, N]
    total = 0.0
    for m in range(members):
        weight = tl.load(weights + m)
        total += weight
        logits_N = logits + tl.load(order + m) * member_stride + sample_N.to(tl.int64) * sample_stride
        power_NC = read_block(logits_N, class_stride, class_C, sample_N, samples, classes, temperature)
        bad_N = count_invalid(power_NC, class_C, sample_N, samples, classes)
        best_N = tl.max(power_NC, 1)
        vote_N = first_class(power_NC, best_N, class_C)
        if REST > 0:
            power_NR = read_block(logits_N, class_stride, class_R, sample_N, samples, classes, temperature)
            bad_N += count_invalid(power_NR, class_R, sample_N, samples, classes)
            first_N = best_N
            best_N = tl.maximum(first_N, tl.max(power_NR, 1))
            vote_N = tl.where(first_N == best_N, vote_N, first_class(power_NR, best_N, class_R))
        bad = tl.sum((bad_N > 0).to(tl.int64))
        if bad > 0:
            tl.atomic_add(invalid + m, bad)
        votes_NV = tl.where(vote_V[None, :] == m, vote_N[:, None], votes_NV)
        if labels is not None:
            scaled_label_N = of_class(power_NC, class_C, label_N)
            if REST > 0:
                scaled_label_N += of_class(power_NR, class_R, label_N)

        power_NC, mass_N, weighted_N = exponentials(power_NC, best_N)
        if REST > 0:
            power_NR, rest_mass_N, rest_weighted_N = exponentials(power_NR, best_N)
            mass_N += rest_mass_N
            weighted_N += rest_weighted_N
        log_mass_N = tl.log(mass_N)
        entropies_N += weight * (log_mass_N - weighted_N / mass_N)

        share_N = weight / mass_N
        sum_NC += share_N[:, None] * power_NC
        top_N, squares_N, entropy_N = reduce_mean(sum_NC, total)
        predicted_N = first_class(sum_NC, top_N, class_C)
        if REST > 0:
            sum_NR += share_N[:, None] * power_NR
            rest_top_N, rest_squares_N, rest_entropy_N = reduce_mean(sum_NR, total)
            squares_N += rest_squares_N
            entropy_N += rest_entropy_N
            predicted_N = tl.where(top_N >= rest_top_N, predicted_N, first_class(sum_NR, rest_top_N, class_R))
            top_N = tl.maximum(top_N, rest_top_N)
        against_NV = (votes_NV != predicted_N[:, None]) & (vote_V[None, :] <= m)

        tl.store(prediction + place_N, predicted_N.to(tl.int64), mask=present_N)
        tl.store(floats + place_N, top_N / total, mask=present_N)
        tl.store(floats + plane + place_N, squares_N, mask=present_N)
        tl.store(floats + 2 * plane + place_N, entropy_N, mask=present_N)
        information_N = tl.maximum(entropy_N - entropies_N / total, 0.0)
        tl.store(floats + 3 * plane + place_N, information_N, mask=present_N)
        tl.store(integers + place_N, tl.sum(against_NV.to(tl.int32), 1), mask=present_N)
        if labels is not None:
            joined_N = scaled_label_N - best_N - log_mass_N + tl.log(weight)
            high_N = tl.maximum(label_mass_N, joined_N)
            low_N = tl.minimum(label_mass_N, joined_N)
            label_mass_N = high_N + tl.log(1.0 + tl.exp(low_N - high_N))
            sum_of_label_N = of_class(sum_NC, class_C, label_N)
            if REST > 0:
                sum_of_label_N += of_class(sum_NR, class_R, label_N)
            rank_N = classes_before(sum_NC, class_C, label_N, sum_of_label_N)
            if REST > 0:
                rank_N += classes_before(sum_NR, class_R, label_N, sum_of_label_N)
            tl.store(floats + 4 * plane + place_N, label_mass_N - tl.log(total), mask=present_N)
            tl.store(integers + plane + place_N, rank_N, mask=present_N)
        place_N += samples

    if probabilities is not None:
        row_N = probabilities + sample_N.to(tl.int64) * classes
        inside = present_N[:, None] & (class_C < classes)[None, :]
        tl.store(row_N[:, None] + class_C[None, :], sum_NC / total, mask=inside)
        if REST > 0:
            inside = present_N[:, None] & (class_R < classes)[None, :]
            tl.store(row_N[:, None] + class_R[None, :], sum_NR / total, mask=inside)


def tiles(members: int, classes: int) -> dict[str, int]:
    """Sizes of the tiles and number of warps for so many members and classes.

    Raises ValueError for more than the registers of a program can hold.
    """
    if members > MAX_MEMBERS or classes > 2 * LARGEST_BLOCK:
        raise ValueError(
            f"on CUDA at most {MAX_MEMBERS} members and {2 * LARGEST_BLOCK} classes, got {members} and {classes}: "
            "average the logits on the CPU"
        )
    block = min(triton.next_power_of_2(classes), LARGEST_BLOCK)
    rest = triton.next_power_of_2(classes - block) if classes > block else 0
    rows = max(1, TILE // block)
    return {
        "SAMPLES": rows,
        "CLASSES": block,
        "REST": rest,
        "VOTES": triton.next_power_of_2(members),
        "num_warps": min(32, rows * block // 64),
    }


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
    floats = torch.empty(4 + of_label, members, samples, device=device)
    integers = torch.empty(1 + of_label, members, samples, dtype=torch.int32, device=device)
    mean = torch.empty(samples, classes, device=device) if probabilities else None
    invalid_M = torch.zeros(members, dtype=torch.int64, device=device)
    sizes = tiles(members, classes)
    if samples:
        averaging_kernel[(triton.cdiv(samples, sizes["SAMPLES"]),)](
            logits,
            None if labels is None else labels.long().contiguous(),
            torch.tensor(joining, device=device),
            torch.tensor(weights_M, dtype=torch.float32, device=device),
            prediction,
            floats,
            integers,
            mean,
            invalid_M,
            members,
            samples,
            members * samples,
            classes,
            *logits.stride(),
            temperature,
            **sizes,
        )
    fields = dict(zip(FLOATS, floats, strict=False)) | dict(zip(INTEGERS, integers, strict=False))
    fields = {"label_log_probability": None, "label_rank": None} | fields
    return EnsembleStatistics(prediction=prediction, probabilities=mean, **fields), invalid_M
