"""Figures of an ensemble's outputs, against scikit-learn, torchmetrics, NumPy and plain loops."""

import numpy as np
import pytest
import torch
from made_logits import members_of
from scipy.special import log_softmax, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix
from torchmetrics.regression import PearsonCorrCoef

from fastsnap.ensemble.analysis import (
    analyse,
    class_errors,
    correlations,
    coverage_at,
    disagreements,
    most_confused,
    reliability,
    risk_curve,
)

NAMES = [f"class {index}" for index in range(7)]


def outputs(scale=1.0):
    logits, labels = members_of(2.0, 0.8, 1.2, images=600, scale=scale)
    log = log_softmax(logits.double().numpy(), axis=2).mean(0)
    return logits, labels, torch.from_numpy(log).float()


def test_errors_per_class_and_confusions_are_scikit_learns():
    _, labels, log = outputs()
    predicted = log.argmax(1)
    matrix = confusion_matrix(labels.numpy(), predicted.numpy(), labels=range(7))
    for row, found in zip(matrix, class_errors(predicted, labels, NAMES), strict=True):
        index = NAMES.index(found.name)
        assert found.images == row.sum()
        assert found.error == pytest.approx(100 * (1 - row[index] / row.sum()))
    np.fill_diagonal(matrix, 0)
    pairs = most_confused(predicted, labels, NAMES)
    assert [pair.images for pair in pairs] == sorted(matrix.ravel(), reverse=True)[: len(pairs)]
    for pair in pairs:
        assert matrix[NAMES.index(pair.true), NAMES.index(pair.predicted)] == pair.images
    missing = class_errors(torch.zeros(3).long(), torch.zeros(3).long(), ["a", "b"])
    assert (missing[1].images, missing[1].error) == (0, None)


def test_reliability_is_scikit_learns():
    _, labels, log = outputs()
    probabilities = log.softmax(1)
    confidence, predicted = probabilities.max(1)
    correct = predicted == labels
    bins = reliability(confidence, correct)
    accuracy, mean = calibration_curve(correct.numpy(), confidence.double().numpy(), n_bins=15)
    filled = [cell for cell in bins if cell.images]
    assert [cell.accuracy for cell in filled] == pytest.approx(accuracy)
    assert [cell.confidence for cell in filled] == pytest.approx(mean)
    assert sum(cell.images for cell in bins) == 600


@pytest.mark.parametrize("scale", [0.5, 40.0])
def test_risk_and_coverage_are_those_of_a_loop(scale):
    _, labels, log = outputs(scale)
    confidence, predicted = log.softmax(1).max(1)
    wrong = predicted != labels
    order = np.argsort(-confidence.numpy(), kind="stable")
    sorted_confidence, sorted_wrong = confidence.numpy()[order], wrong.numpy()[order].astype(float)
    # Images that are equally sure (in fp32, all that are sure enough) count with their mean.
    for value in np.unique(sorted_confidence):
        same = sorted_confidence == value
        sorted_wrong[same] = sorted_wrong[same].mean()
    expected = [sorted_wrong[: k + 1].mean() for k in range(600)]
    curve = risk_curve(confidence, wrong)
    assert curve.tolist() == pytest.approx(expected)
    assert curve[-1].item() == pytest.approx(wrong.double().mean().item())
    for risk in (0.0, 0.05, 0.2, 0.9):
        fine = [k + 1 for k in range(600) if expected[k] <= risk + 1e-12]
        assert coverage_at(curve, risk) == pytest.approx(max(fine, default=0) / 600)


def test_an_order_among_equally_sure_images_changes_nothing():
    wrong = torch.tensor([True, False, True, False])
    same = torch.full((4,), 0.9)
    assert torch.equal(risk_curve(same, wrong), risk_curve(same, ~wrong))


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_correlation_is_numpys_and_torchmetrics(scale):
    logits, _, _ = outputs(scale)
    flat = softmax(logits.double().numpy(), axis=2).reshape(3, -1)
    found = correlations(logits)
    assert found.numpy() == pytest.approx(np.corrcoef(flat), abs=1e-6)
    pearson = PearsonCorrCoef()
    assert float(pearson(torch.from_numpy(flat[0]), torch.from_numpy(flat[1]))) == pytest.approx(
        float(found[0, 1]), abs=1e-5
    )


def test_members_that_say_the_same_of_every_image_have_correlations_too():
    constant = torch.zeros(2, 5, 4)
    assert torch.isfinite(correlations(constant)).all()


def test_disagreement_counts_images():
    logits, _, _ = outputs()
    predicted = logits.argmax(2)
    found = disagreements(logits)
    for i in range(3):
        for j in range(3):
            assert float(found[i, j]) == pytest.approx((predicted[i] != predicted[j]).double().mean().item())


def test_mended_and_broken_images_are_told_surest_first():
    logits, labels, log = outputs()
    analysis = analyse(logits, labels, NAMES, log, temperature=1.7)
    probabilities = (log / 1.7).softmax(1)
    right, last = probabilities.argmax(1) == labels, logits[-1].argmax(1) == labels
    assert set(analysis.mended) == set(torch.nonzero(right & ~last)[:, 0].tolist())
    assert set(analysis.broken) == set(torch.nonzero(~right & last)[:, 0].tolist())
    confidence = probabilities.amax(1)[list(analysis.mended)]
    assert torch.equal(confidence, confidence.sort(descending=True).values)
    written = analysis.as_json()
    assert written["mended"] == len(analysis.mended)
    assert written["coverage"].keys() == {"0.01", "0.05", "0.1"}
    # A temperature changes how sure the ensemble is of an image, and hardly which ones it is surest of.
    assert analysis.untempered != analysis.tempered
