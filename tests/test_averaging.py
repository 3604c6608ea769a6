"""average_members on the CPU: against fp64, on hand-made ensembles, and on bad input."""

import pytest
import torch
from averaging_cases import cases, check_against_float64
from hypothesis import given

from fastsnap.kernels.averaging import average_members
from fastsnap.kernels.averaging_cpu import cpu_averaging


@given(cases(most_classes=2000))
def test_agrees_with_float64(case):
    check_against_float64(case, *cpu_averaging(**case))


def test_imagenet_21k_and_64_members_agree_with_float64():
    torch.manual_seed(0)
    for members, samples, classes in ((2, 3, 21_841), (64, 5, 10)):
        case = {
            "logits": torch.randn(members, samples, classes) * 4,
            "labels": torch.randint(classes, (samples,)),
            "joining": range(members),
            "weights_M": [1.0] * members,
            "temperature": 1.0,
            "probabilities": True,
        }
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
        (LOGITS, None, {"temperature": 0.0}, "temperature must be"),
        (LOGITS, None, {"temperature": float("nan")}, "temperature must be"),
        (LOGITS, None, {"weights": [1.0]}, "weights must be 2"),
        (LOGITS, None, {"weights": [1.0, 0.0]}, "leave a member out"),
    ],
)
def test_bad_arguments_are_refused(logits, labels, options, message):
    with pytest.raises(ValueError, match=message):
        average_members(logits, labels, **options)
