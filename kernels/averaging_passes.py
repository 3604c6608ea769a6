"""What the Triton averaging does with one member's logits: a pass over a row of classes, in one block or several."""

# mypy: disallow-untyped-defs=False
# The arguments of jitted functions have no Python types.

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4e38)  # of the finite numbers, nearly
LARGEST = tl.constexpr(3.4028234663852886e38)  # of the finite numbers


@triton.jit
def to_fp32(logit, offset):
    """Logits of fp64 as their distances from `offset`, the largest of their row, NaN for those that fp32 cannot hold:
    rounded as they are, large ones would lose what tells them apart. Others as they are; then `offset` is None.
    """
    if offset is not None:
        distance = tl.maximum(logit - offset, LOWEST)
        logit = tl.where(tl.abs(logit) <= LARGEST, distance, float("nan"))
    return logit.to(tl.float32)


@triton.jit
def largest_fp64(logits_N, class_stride, present_N, classes, CLASSES: tl.constexpr):
    """fp64 [N], the largest logit of each sample; 0 for samples that do not exist."""
    best_NC = tl.full([present_N.shape[0], CLASSES], float("-inf"), tl.float64)
    for begin in range(0, classes, CLASSES):
        class_C = begin + tl.arange(0, CLASSES)
        exists_C = class_C < classes
        pointers = logits_N[:, None] + class_C.to(tl.int64)[None, :] * class_stride
        logit_NC = tl.load(pointers, mask=present_N[:, None] & exists_C[None, :], other=0.0)
        best_NC = tl.maximum(best_NC, tl.where(exists_C[None, :], logit_NC, float("-inf")))
    return tl.max(best_NC, 1)


@triton.jit
def read_block(logits_N, offset_N, class_C, class_stride, present_N, classes):
    """fp32 [N, C] logits of one member; 0 for samples, -inf for classes that do not exist. offset_N: see `to_fp32`."""
    exists_C = class_C < classes
    pointers = logits_N[:, None] + class_C.to(tl.int64)[None, :] * class_stride
    logit_NC = tl.load(pointers, mask=present_N[:, None] & exists_C[None, :], other=0.0)
    logit_NC = to_fp32(logit_NC, None if offset_N is None else offset_N[:, None])
    return tl.where(exists_C[None, :], logit_NC, float("-inf"))


@triton.jit
def block_of(row_NC, logits_N, offset_N, class_C, class_stride, present_N, classes):
    """Logits of these classes: `row_NC`, or read (again) where that is None because a row takes several blocks."""
    return (
        read_block(logits_N, offset_N, class_C, class_stride, present_N, classes)
        if row_NC is None
        else row_NC
    )


@triton.jit
def below_best(logit_NC, best_N, temperature):
    """(logit - best) / temperature, but at least -1000, where exp has long been 0: 0 * infinity is not a number."""
    return tl.maximum((logit_NC - best_N[:, None]) / temperature, -1000.0)


@triton.jit
def largest(value_NC, class_NC):
    """Largest value of each sample and its smallest class."""
    value_N = tl.max(value_NC, 1)
    return value_N, tl.min(tl.where(value_NC == value_N[:, None], class_NC, 2147483647), 1)


@triton.jit
def inspect(row_NC, logits_N, offset_N, class_stride, present_N, classes, CLASSES: tl.constexpr):
    """Of each sample the largest logit, its smallest class, and whether a logit is NaN or infinite."""
    best_NC = tl.full([present_N.shape[0], CLASSES], float("-inf"), tl.float32)
    vote_NC = tl.zeros(best_NC.shape, tl.int32)
    invalid_NC = vote_NC
    for begin in range(0, classes, CLASSES):
        class_C = begin + tl.arange(0, CLASSES)
        logit_NC = block_of(row_NC, logits_N, offset_N, class_C, class_stride, present_N, classes)
        vote_NC = tl.where(logit_NC > best_NC, class_C[None, :], vote_NC)
        best_NC = tl.maximum(best_NC, logit_NC)
        invalid_NC |= ((class_C < classes)[None, :] & ~(tl.abs(logit_NC) < float("inf"))).to(tl.int32)
    best_N, vote_N = largest(best_NC, vote_NC)
    return best_N, vote_N, tl.max(invalid_NC, 1)


@triton.jit
def normaliser(
    row_NC, logits_N, offset_N, class_stride, present_N, best_N, temperature, classes, CLASSES: tl.constexpr
):
    """Of each sample the sum of exp(logit - best), and the entropy of its softmax."""
    mass_NC = tl.zeros([present_N.shape[0], CLASSES], tl.float32)
    weighted_NC = mass_NC
    for begin in range(0, classes, CLASSES):
        class_C = begin + tl.arange(0, CLASSES)
        logit_NC = block_of(row_NC, logits_N, offset_N, class_C, class_stride, present_N, classes)
        below_NC = below_best(logit_NC, best_N, temperature)
        power_NC = tl.exp(below_NC)
        mass_NC += power_NC
        weighted_NC += power_NC * below_NC
    mass_N = tl.sum(mass_NC, 1)
    return mass_N, tl.log(mass_N) - tl.sum(weighted_NC, 1) / mass_N


@triton.jit
def join_label(best_N, sum_N, rescaling, weight, label_N):
    """The label's weighted sum of probabilities, exp(best) * sum, after a member that gives it exp(label_N) has joined.

    A member whose weight is 0 in fp32 must not decide what the sum is relative to.
    """
    best_N = tl.where(rescaling > 0, best_N, float("-inf"))
    label_N = tl.where(weight > 0, label_N, float("-inf"))
    high_N = tl.maximum(best_N, label_N)
    return high_N, rescaling * sum_N * tl.exp(best_N - high_N) + weight * tl.exp(label_N - high_N)
