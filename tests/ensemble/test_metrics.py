"""Metrics against float64 computations written out class by class, and against values worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastsnap.ensemble.metrics import (
    brier_score,
    error_difference,
    expected_calibration_error,
    measure_members,
    summarise,
    top_k_error,
)
from fastsnap.kernels.averaging import average_members


def plain_metrics(logits_MNC: Tensor, labels: Tensor) -> dict[str, float]:
    """The figures of the average of all members, image by image in float64."""
    members, images, _ = logits_MNC.shape
    probabilities = logits_MNC.double().softmax(2)
    mean = probabilities.mean(0)
    wrong, wrong5, nll, brier, entropy, information, disagree = (0.0,) * 7
    bins = [[0, 0.0, 0.0] for _ in range(15)]  # images, correct, sum of confidences
    for image in range(images):
        row, label = mean[image], int(labels[image])
        order = sorted(range(len(row)), key=lambda index, row=row: (-row[index].item(), index))
        wrong += order[0] != label
        wrong5 += label not in order[:5]
        nll -= math.log(row[label].item())
        brier += sum((row[index].item() - (index == label)) ** 2 for index in range(len(row)))
        entropy -= sum(p * math.log(p) for p in row.tolist())
        own = [
            -sum(p * math.log(p) for p in probabilities[member, image].tolist()) for member in range(members)
        ]
        information += -sum(p * math.log(p) for p in row.tolist()) - sum(own) / members
        disagree += (
            sum(int(probabilities[member, image].argmax()) != order[0] for member in range(members)) / members
        )
        confidence = row[order[0]].item()
        bin_ = bins[math.ceil(confidence * 15) - 1]
        bin_[0] += 1
        bin_[1] += order[0] == label
        bin_[2] += confidence
    gaps = sum(abs(correct / count - total / count) * count for count, correct, total in bins if count)
    sums = {"error": 100 * wrong, "top5_error": 100 * wrong5, "nll": nll, "ece": gaps, "brier": brier}
    sums |= {"entropy": entropy, "mutual_information": information, "disagreement": disagree}
    return {name: value / images for name, value in sums.items()}


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.integers(2, 12),
    st.integers(0, 10**6),
    st.sampled_from([0.1, 1.0, 6.0]),
)
def test_every_metric_of_every_ensemble_agrees_with_plain_float64(members, images, classes, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(members, images, classes, generator=generator) * scale
    labels = torch.randint(classes, (images,), generator=generator)
    measured = measure_members(logits, labels)
    for m in range(1, members + 1):
        for found, chosen in (
            (measured.last_m[m - 1], logits[-m:]),
            (measured.first_m[m - 1], logits[:m]),
            (measured.alone[m - 1], logits[m - 1 : m]),
        ):
            expected = plain_metrics(chosen, labels)
            for name, value in expected.items():
                assert getattr(found, name) == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_calibration_error_of_bins_worked_out_by_hand():
    confidence = torch.tensor([[1.0, 0.95, 0.5, 0.5]])
    correct = torch.tensor([[True, False, True, False]])
    # 1.0 and 0.95 share the last bin: |1/2 - 0.975| * 2; the others are right half of the time, as they say.
    assert expected_calibration_error(confidence, correct).item() == pytest.approx(0.95 / 4)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_and_zero_to_the_first():
    edge = torch.tensor([[0.2, 0.19]], dtype=torch.float64)  # 0.2 = 3/15
    correct = torch.tensor([[True, False]])
    together = abs(1 - 0.2 - 0.19) / 2
    assert expected_calibration_error(edge, correct).item() == pytest.approx(together)
    assert expected_calibration_error(torch.tensor([[0.0]]), torch.tensor([[False]])).item() == 0


def test_brier_score_spans_zero_to_two():
    right, wrong = torch.tensor([[1.0]]), torch.tensor([[0.0]])
    assert brier_score(torch.tensor([[1.0]]), right).item() == 0
    assert brier_score(torch.tensor([[1.0]]), wrong).item() == 2


def test_top_five_counts_ranks_from_zero():
    ranks = torch.tensor([[0, 4, 5, 9]], dtype=torch.int32)
    assert top_k_error(ranks).item() == 50
    assert top_k_error(ranks, k=1).item() == 75


def test_top_five_error_is_zero_with_five_classes():
    logits, labels = torch.randn(2, 50, 5), torch.randint(5, (50,))
    assert [metrics.top5_error for metrics in measure_members(logits, labels).last_m] == [0, 0]


def test_a_hopeless_prediction_has_a_finite_nll():
    logits = torch.tensor([[[200.0, -200.0]]])
    assert measure_members(logits, torch.tensor([1])).alone[0].nll == pytest.approx(400)


def test_difference_is_paired_image_by_image():
    labels = torch.zeros(8, dtype=torch.long)
    baseline = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    improved = torch.tensor(
        [0, 0, 0, 1, 0, 0, 1, 1]
    )  # three images change: one for the worse, two for the better
    difference = error_difference(improved, baseline, labels)
    assert difference.points == pytest.approx(-100 / 8)
    assert difference.standard_error == pytest.approx(100 * math.sqrt((3 / 8 - 1 / 64) / 8))
    assert error_difference(baseline, baseline, labels).standard_error == 0


def test_statistics_without_labels_are_refused():
    with pytest.raises(ValueError, match="labels"):
        summarise(average_members(torch.randn(1, 3, 4)), torch.zeros(3, dtype=torch.long))
