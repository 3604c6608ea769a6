"""average_members on the CPU: against fp64, on hand-made ensembles, and on bad input."""

import pytest
import torch
from averaging_cases import cases, check_against_float64, large_cases
from hypothesis import given

from fastsnap.kernels.averaging import average_members
from fastsnap.kernels.averaging_cpu import cpu_averaging


@pytest.mark.needs_library
@given(cases(most_classes=2000))
def test_agrees_with_float64(case):
    check_against_float64(case, *cpu_averaging(**case))


@pytest.mark.needs_library
@pytest.mark.parametrize("case", large_cases())
def test_many_classes_or_members_agree_with_float64(case):
    check_against_float64(case, *cpu_averaging(**case))


def test_order_of_the_members_decides_which_join_first():
    logits = torch.tensor([[[4.0, 0.0, 0.0]], [[0.0, 5.0, 0.0]], [[0.0, 4.5, 4.6]]])
    assert average_members(logits, order="last").prediction.flatten().tolist() == [2, 1, 1]
    assert average_members(logits, order="first").prediction.flatten().tolist() == [0, 1, 1]


def test_ties_go_to_the_smallest_class():
    statistics = average_members(torch.zeros(2, 3, 5), torch.tensor([0, 2, 4]))
    assert statistics.prediction.eq(0).all()
    assert statistics.label_rank.tolist() == [[0, 2, 4]] * 2
    assert statistics.disagreement.eq(0).all()


def test_certain_members_that_are_as_many_for_one_class_as_for_another_tie():
    logits = torch.zeros(14, 1, 3)
    logits[:7, 0, 2] = logits[7:, 0, 1] = 1e4
    statistics = average_members(logits, order="first", weights=[0.3] * 14)
    assert statistics.prediction.flatten().tolist() == [2] * 13 + [1]


def test_disagreement_counts_the_members_against_their_ensemble():
    logits = torch.tensor([[[9.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
    statistics = average_members(logits, order="first")
    assert statistics.prediction.flatten().tolist() == [0, 0, 0]
    assert statistics.disagreement.flatten().tolist() == [0, 1, 2]


def test_equal_members_carry_no_mutual_information_and_opposed_ones_all():
    same = average_members(torch.randn(1, 50, 10).expand(3, 50, 10))
    assert same.mutual_information.max() < 1e-6
    opposed = average_members(torch.tensor([[[100.0, 0.0]], [[0.0, 100.0]]]))
    assert opposed.mutual_information[1].item() == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits_give_finite_statistics(size):
    statistics = average_members(
        torch.tensor([[[size, -size, 0.0]], [[size, 0.0, -size]]]), torch.tensor([1])
    )
    assert statistics.label_log_probability.isfinite().all()
    assert statistics.label_log_probability[1].item() == pytest.approx(
        -size + torch.log(torch.tensor(0.5)).item()
    )
    assert statistics.entropy.abs().max() < 1e-6
    assert statistics.prediction.eq(0).all()


def test_a_tiny_temperature_gives_finite_statistics():
    logits = torch.tensor([[[3e38, -3e38, 1.0]]])
    statistics = average_members(logits, torch.tensor([1]), temperature=1e-30)
    assert statistics.prediction.item() == 0
    assert statistics.label_log_probability.isfinite().all()
    assert statistics.entropy.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "weights", [[1e-87] * 3, [1e300] * 3, [5e-324] * 3, [1.7e308] * 3, torch.ones(3, dtype=torch.float16)]
)
def test_only_the_ratios_of_the_weights_matter(weights):
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 5), torch.arange(4)
    ours, equal = average_members(logits, labels, weights=weights), average_members(logits, labels)
    for name in ("confidence", "label_log_probability", "entropy", "mutual_information", "prediction"):
        assert torch.equal(getattr(ours, name), getattr(equal, name))


@pytest.mark.parametrize("order", ["first", "last"])
def test_a_member_that_outweighs_the_others_decides_alone_from_when_it_joins(order):
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 5)
    uneven = average_members(logits, weights=[1e39, 1.0, 1.0], order=order)
    heavy, light = average_members(logits[:1]), average_members(logits[1:], order=order)
    torch.testing.assert_close(uneven.confidence[-1], heavy.confidence[0])
    if order == "first":
        torch.testing.assert_close(uneven.confidence[0], heavy.confidence[0])
    else:
        torch.testing.assert_close(uneven.entropy[:2], light.entropy)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32]
)
def test_labels_of_any_integer_type(dtype):
    labels = torch.tensor([0, 1, 1])
    expected = average_members(LOGITS, labels).label_rank
    assert torch.equal(average_members(LOGITS, labels.to(dtype)).label_rank, expected)


def test_logits_and_labels_stored_negated():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4), torch.tensor([0, -1, -2])
    lazy = average_members(torch._neg_view(logits), torch._neg_view(labels))
    expected = average_members(-logits, -labels)
    assert torch.equal(lazy.confidence, expected.confidence)
    assert torch.equal(lazy.label_rank, expected.label_rank)


def test_label_probability_is_the_exponential():
    statistics = average_members(torch.zeros(1, 4, 5), torch.arange(4))
    torch.testing.assert_close(statistics.label_probability, torch.full((1, 4), 0.2))
    assert average_members(torch.zeros(1, 4, 5)).label_probability is None


def test_no_samples_give_empty_statistics():
    statistics = average_members(torch.zeros(3, 0, 5), torch.zeros(0, dtype=torch.int64), probabilities=True)
    assert statistics.prediction.shape == (3, 0)
    assert statistics.probabilities.shape == (0, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused_naming_the_members(value):
    logits = torch.randn(4, 10, 7)
    logits[1, 3, 6] = value
    logits[1, 5, 0] = value
    logits[3, 0, 0] = value
    with pytest.raises(ValueError, match=r"member 1 in 2 samples, member 3 in 1 samples of 10"):
        average_members(logits)


LOGITS = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("logits", "labels", "options", "message"),
    [
        (LOGITS.long(), None, {}, "logits must be floats"),
        (LOGITS[0], None, {}, "logits must be floats"),
        (LOGITS[:0], None, {}, "members >= 1"),
        (LOGITS[:, :, :1], None, {}, "classes >= 2"),
        (LOGITS, torch.zeros(2, dtype=torch.int64), {}, r"labels must be integers \[3\]"),
        (LOGITS, torch.zeros(3), {}, "labels must be integers"),
        (LOGITS, torch.tensor([0, 1, 4]), {}, r"0\.\.3, got 0\.\.4"),
        (LOGITS, torch.tensor([0, -1, 3]), {}, r"0\.\.3, got -1\.\.3"),
        (LOGITS, None, {"order": "best"}, "order must be"),
        ([LOGITS[0]], None, {}, "logits must be one tensor, got list"),
        (LOGITS.to(torch.float8_e4m3fn), None, {}, "logits must be floats of 16, 32 or 64 bits.*float8"),
        (LOGITS.to(torch.complex64), None, {}, "logits must be floats .*complex64"),
        (
            LOGITS.to("meta"),
            None,
            {},
            r"logits must be strided on cpu or cuda, got torch.strided on meta: .*cpu\(\)",
        ),
        (LOGITS.to_sparse(), None, {}, r"logits must be strided .*sparse_coo on cpu: .*to_dense\(\)"),
        (LOGITS, [0, 1, 2], {}, "labels must be a tensor, got list"),
        (LOGITS, torch.zeros(3, dtype=torch.complex64), {}, "labels must be integers .*complex64"),
        (LOGITS, torch.zeros(3, dtype=torch.int64, device="meta"), {}, "labels must be integers .*on meta"),
        (
            LOGITS,
            torch.ones(3, dtype=torch.int64).to_sparse(),
            {},
            "labels must be .*strided on cpu.*sparse_coo",
        ),
        (LOGITS, None, {"temperature": 0.0}, r"temperature must lie in 1\.2e-38\.\.3\.4e\+38, got 0\.0"),
        (LOGITS, None, {"temperature": float("nan")}, "temperature must lie in"),
        (LOGITS, None, {"temperature": 1e-50}, "temperature must lie in"),
        (LOGITS, None, {"temperature": 1e39}, "temperature must lie in"),
        (LOGITS, None, {"temperature": None}, "temperature must lie in"),
        (LOGITS, None, {"weights": [1.0]}, "weights must be 2"),
        (LOGITS, None, {"weights": [1.0, 0.0]}, "leave a member out"),
        (LOGITS, None, {"weights": [1.0, float("inf")]}, "weights must be 2 finite numbers"),
        (LOGITS, None, {"weights": "ab"}, "weights must be 2 finite numbers"),
        (LOGITS, None, {"weights": torch.ones(2, 2)}, "weights must be 2 finite numbers"),
        (LOGITS.double() + 1e300, None, {}, "logits must be finite in fp32"),
    ],
)
def test_bad_arguments_are_refused(logits, labels, options, message):
    with pytest.raises(ValueError, match=message):
        average_members(logits, labels, **options)
