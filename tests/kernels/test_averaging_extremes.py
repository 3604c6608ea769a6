"""What fp32 would round away, in all implementations of the averaging: large fp64 logits and improbable labels."""

import math

import pytest
import torch
from torch import Tensor

from fastsnap.kernels.averaging_cpu import cpu_averaging
from fastsnap.kernels.averaging_reference import EnsembleStatistics, plain_averaging, reference_averaging
from fastsnap.kernels.averaging_triton import triton_averaging

IMPLEMENTATIONS = [
    pytest.param(cpu_averaging, id="cpu", marks=pytest.mark.needs_library),
    pytest.param(triton_averaging, id="triton"),
    pytest.param(reference_averaging, id="reference"),
    pytest.param(plain_averaging, id="plain"),
]
every_averaging = pytest.mark.parametrize("averaging", IMPLEMENTATIONS)


def average(
    averaging,
    logits: Tensor,
    labels: list[int] | None = None,
    weights_M: list[float] | None = None,
    temperature: float = 1.0,
) -> EnsembleStatistics:
    members = len(logits)
    labels_N = None if labels is None else torch.tensor(labels)
    weights_M = weights_M or [1.0] * members
    statistics, invalid_M = averaging(logits, labels_N, list(range(members)), weights_M, temperature, True)
    assert invalid_M.tolist() == [0] * members
    return statistics


def doubles(*rows: list[float]) -> Tensor:
    """One member, fp64 [1, N, C]."""
    return torch.tensor([rows], dtype=torch.float64)


@every_averaging
@pytest.mark.parametrize("offset", [0.0, 1e8, -1e8, 1e14])
def test_fp64_logits_lose_nothing_to_an_offset(averaging, offset):
    statistics = average(averaging, doubles([0.0, 1.0, 2.0]) + offset, [1])
    total = 1 + math.e + math.e**2
    assert statistics.confidence.item() == pytest.approx(0.6652409, abs=1e-6)
    assert statistics.probabilities.flatten().tolist() == pytest.approx(
        [1 / total, math.e / total, math.e**2 / total], abs=1e-6
    )
    assert statistics.label_log_probability.item() == pytest.approx(1 - math.log(total), abs=1e-6)
    assert (statistics.prediction.item(), statistics.label_rank.item()) == (2, 1)


@every_averaging
def test_fp64_logits_in_rows_of_several_blocks_lose_nothing_to_an_offset(averaging):
    logits = doubles([0.0] * 2500) + 1e8
    logits[0, 0, 1500] += 2
    logits[0, 0, 2400] += 1
    statistics = average(averaging, logits, [2400])
    assert statistics.confidence.item() == pytest.approx(math.e**2 / (2498 + math.e + math.e**2), abs=1e-6)
    assert (statistics.prediction.item(), statistics.label_rank.item()) == (1500, 1)


@every_averaging
def test_members_offsets_may_differ(averaging):
    logits = torch.cat([doubles([0.0, 1.0, 2.0]) + 1e8, doubles([2.0, 1.0, 0.0]) - 1e9])
    statistics = average(averaging, logits, [0])
    assert statistics.probabilities[0, 0].item() == pytest.approx(statistics.probabilities[0, 2].item())
    assert statistics.disagreement.flatten().tolist() == [0, 1]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
@every_averaging
def test_fp64_logits_at_both_ends_of_fp32_are_taken_and_those_beyond_counted(averaging):
    largest = torch.finfo(torch.float32).max
    statistics = average(averaging, doubles([largest, -largest, 0.0]), [1])
    assert statistics.confidence.item() == 1
    assert -math.inf < statistics.label_log_probability.item() < -3.3e38
    for beyond in (1e39, -1e39, math.inf, -math.inf, math.nan):
        logits = doubles([0.0, 1.0], [beyond, 1.0], [beyond, beyond])
        assert averaging(logits, None, [0], [1.0], 1.0, False)[1].tolist() == [2]


@every_averaging
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_labels_whose_probability_underflows_are_ranked_by_its_logarithm(averaging, dtype):
    logits = torch.tensor([0.0, -400.0, -100.0, -300.0, -200.0, -300.0], dtype=dtype).expand(1, 6, 6)
    statistics = average(averaging, logits, [0, 1, 2, 3, 4, 5])
    assert statistics.label_rank.flatten().tolist() == [0, 5, 1, 3, 2, 4]  # the tie goes to the smaller class


@every_averaging
def test_top_5_does_not_count_improbable_labels_by_their_index(averaging):
    logits = -torch.arange(100.0, 1100.0, 100.0).flip(0).expand(1, 10, 10).contiguous()
    ranks = average(averaging, logits, list(range(10))).label_rank.flatten()
    assert ranks.tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


@every_averaging
def test_the_average_s_logarithm_ranks_and_not_one_member_s(averaging):
    # Class 1: the mean of exp(-200) twice; class 2: of exp(-199.5) and next to nothing, which is less.
    logits = torch.tensor([[[0.0, -200.0, -199.5]], [[0.0, -200.0, -900.0]]])
    statistics = average(averaging, logits, [1])
    assert statistics.label_rank.flatten().tolist() == [2, 1]
    weighted = average(averaging, logits, [1], [1.0, 1e-3])  # now it is more
    assert weighted.label_rank.flatten().tolist() == [2, 2]


@every_averaging
def test_weights_count_where_probabilities_underflow(averaging):
    logits = torch.tensor([[[0.0, -10.0, -300.0]], [[0.0, -300.0, -150.0]]])
    assert average(averaging, logits, [1], [1e-80, 1.0]).label_rank.flatten().tolist() == [1, 2]
    assert average(averaging, logits, [1], [1e-40, 1.0]).label_rank.flatten().tolist() == [1, 1]


@every_averaging
@pytest.mark.parametrize(("temperature", "scale"), [(1e-30, 1e-30), (1e-3, 1.0), (1e30, 1e32)])
def test_temperatures_decide_what_is_far(averaging, temperature, scale):
    logits = torch.tensor([0.0, -4.0, -1.0, -3.0, -2.0]).expand(1, 5, 5) * scale
    statistics = average(averaging, logits, [0, 1, 2, 3, 4], temperature=temperature)
    assert statistics.label_rank.flatten().tolist() == [0, 4, 1, 3, 2]


@every_averaging
def test_logits_of_fp32_too_close_for_their_distance_are_told_apart_where_they_are_far(averaging):
    logits = torch.tensor([[[1e8, 1.0, 1.5, 1.25]]])  # as distances from 1e8 all the same in fp32
    assert average(averaging, logits, [1]).label_rank.item() == 3
