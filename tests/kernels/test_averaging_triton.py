"""The Triton averaging kernel in Triton's interpreter, against fp64."""

import pytest
import torch
from averaging_cases import cases, check_against_float64, large_cases
from hypothesis import given, settings

from fastsnap.kernels.averaging_triton import tiles, triton_averaging


@settings(max_examples=30)
@given(cases(most_classes=300))
def test_agrees_with_float64(case):
    check_against_float64(case, *triton_averaging(**case))


@pytest.mark.parametrize("case", large_cases())
def test_many_classes_or_members_agree_with_float64(case):
    check_against_float64(case, *triton_averaging(**case))


def test_members_of_very_different_weight_in_rows_of_several_blocks():
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 2500) * 4
    logits[1, 0, 2400] = logits[2, 1, 5] = 60.0
    case = {
        "logits": logits,
        "labels": torch.tensor([2400, 17]),
        "joining": [2, 0, 1],
        "weights_M": [1e-12, 2e3, 0.5],
        "temperature": 1.5,
        "probabilities": True,
    }
    check_against_float64(case, *triton_averaging(**case))


def test_a_member_too_light_for_fp32_counts_as_nothing_and_does_no_harm():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 5), torch.arange(4)
    logits[2, :, 0] = -3e38
    logits[
        :2, 1, 1
    ] = -1000.0  # the light member finds the label of sample 1 far more probable than the others
    for order, weights_M in (([2, 0, 1], [1e-60, 1.0, 1.0]), ([0, 2, 1], [1.0, 1e-60, 1.0])):
        ours, _ = triton_averaging(logits, labels, order, weights_M, 1.0, False)
        alone, _ = triton_averaging(logits[:2], labels, [0, 1], [1.0, 1.0], 1.0, False)
        for name in ("confidence", "label_log_probability", "entropy", "label_rank"):
            torch.testing.assert_close(getattr(ours, name)[-1], getattr(alone, name)[-1])
        assert ours.label_log_probability.isfinite().all()


def test_ties_between_blocks_go_to_the_smallest_class():
    logits = torch.zeros(2, 4, 2500)
    logits[:, 0, 2400] = logits[:, 0, 1500] = 5.0
    logits[:, 1, 1023] = logits[:, 1, 1024] = 5.0
    logits[0, 2, 1500] = logits[1, 2, 2400] = 5.0  # each member votes for one; their average has both
    logits[:, 3, 100] = logits[:, 3, 1124] = 5.0  # in the same place of their blocks
    labels = torch.tensor([2400, 1024, 2400, 1124])
    statistics, _ = triton_averaging(logits, labels, [0, 1], [1.0, 1.0], 1.0, False)
    assert statistics.prediction.tolist() == [[1500, 1023, 1500, 100]] * 2
    assert statistics.label_rank[1].tolist() == [1, 1, 1, 1]
    assert statistics.disagreement.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]
    assert triton_averaging(logits.zero_(), None, [0, 1], [1.0, 1.0], 1.0, False)[0].prediction.eq(0).all()


def test_mutual_information_of_equal_members_is_not_negative():
    logits = torch.randn(1, 50, 10, generator=torch.Generator().manual_seed(0)).expand(3, 50, 10)
    statistics, _ = triton_averaging(logits, None, [0, 1, 2], [1.0] * 3, 1.0, False)
    assert statistics.mutual_information.min() == 0
    assert statistics.mutual_information.max() < 4e-6


def test_certain_members_that_are_as_many_for_one_class_as_for_another_tie():
    logits = torch.zeros(14, 1, 3)
    logits[:7, 0, 2] = logits[7:, 0, 1] = 1e4
    statistics, _ = triton_averaging(logits, None, list(range(14)), [0.3] * 14, 1.0, False)
    assert statistics.prediction.flatten().tolist() == [2] * 13 + [1]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_offsets_beyond_32_bits(axis, tmp_path):
    far = 2**30 + 1
    # A file of 8 GB that takes next to no space. An offset that wraps round lands in its empty first half.
    storage = torch.from_file(str(tmp_path / "logits"), shared=True, size=2**32 + 100, dtype=torch.bfloat16)
    strides = [20, 5, 1]
    strides[axis] = far
    logits = storage.as_strided((3, 3, 3), strides, 2**31)
    logits.copy_(torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0)))
    far_apart, near = (
        triton_averaging(array, torch.arange(3), [0, 1, 2], [1.0] * 3, 1.0, False)[0]
        for array in (logits, logits.contiguous())
    )
    assert torch.equal(far_apart.entropy, near.entropy)
    assert torch.equal(far_apart.label_log_probability, near.label_log_probability)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_logits_that_are_not_finite_are_counted():
    logits = torch.randn(3, 5, 10)
    logits[0, 1, 2] = float("nan")
    logits[2, 1, 2] = logits[2, 1, 3] = logits[2, 4, 9] = float("inf")
    _, invalid_M = triton_averaging(logits, None, [2, 1, 0], [1.0] * 3, 1.0, False)
    assert invalid_M.tolist() == [2, 0, 1]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, in the interpreter
def test_a_tiny_temperature_gives_finite_statistics():
    logits = torch.tensor([[[3e38, -3e38, 1.0]]])
    statistics, invalid_M = triton_averaging(logits, torch.tensor([1]), [0], [1.0], 1e-30, False)
    assert invalid_M.item() == 0
    assert statistics.label_log_probability.item() < -3e38
    for name in ("label_log_probability", "entropy", "mutual_information", "confidence"):
        assert getattr(statistics, name).isfinite().all()


def test_invalid_logits_are_counted_in_every_block():
    logits = torch.zeros(1, 3, 2500)
    logits[0, 0, 2499] = logits[0, 2, 0] = -torch.inf
    _, invalid_M = triton_averaging(logits, None, [0], [1.0], 1.0, False)
    assert invalid_M.tolist() == [2]


def test_more_members_than_the_registers_hold_are_refused():
    with pytest.raises(ValueError, match="at most 64 members on CUDA, got 65: average them on the CPU"):
        tiles(torch.zeros(65, 3, 10))
