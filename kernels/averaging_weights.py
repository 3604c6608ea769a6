"""Members' weights as a kernel takes them: in the order in which the members join, each relative to those before."""

from collections.abc import Sequence
from itertools import accumulate


def weight_tables(weights_M: Sequence[float]) -> tuple[list[float], list[float], list[float]]:
    """For each member that joins: what the sums so far are multiplied by, its weight, and the total of the weights.

    In units of the largest weight so far, so that fp32 holds any weights: sums are multiplied by 1 unless a larger one
    joins, and equal weights add up exactly, as ties need. A weight too small for the type becomes 0.
    """
    ratios = [weight.as_integer_ratio() for weight in weights_M]
    integers = [
        numerator * (2**1074 // denominator) for numerator, denominator in ratios
    ]  # of the smallest number
    units = list(accumulate(integers, max))
    rescalings = [before / unit for before, unit in zip(units[:1] + units, units, strict=False)]
    weights = [integer / unit for integer, unit in zip(integers, units, strict=True)]
    totals = [total / unit for total, unit in zip(accumulate(integers), units, strict=True)]
    return rescalings, weights, totals
