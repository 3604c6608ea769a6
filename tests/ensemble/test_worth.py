"""What ways to use the snapshots are worth, against scikit-learn, torchmetrics, SciPy and plain loops."""

import math

import numpy as np
import pytest
import torch
from made_logits import members_of
from scipy import stats
from scipy.special import log_softmax, softmax
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from torchmetrics.classification import MulticlassCalibrationError

from fastsnap.ensemble.cascade import answers, choose_threshold, curve
from fastsnap.ensemble.choosing import choose
from fastsnap.ensemble.combining import combined_statistics
from fastsnap.ensemble.metrics import measure_members, summarise
from fastsnap.ensemble.worth import Comparison, MemberCost, measure_worth
from fastsnap.kernels.averaging import average_members

COST = MemberCost(parameters=1000, bytes=4000, milliseconds=0.5)
CLASSES = 7


def worth_of(logits, labels, *decided, **options):
    return measure_worth(Comparison(logits, labels, COST), *decided, **options)


def probabilities(logits_MNC):
    return softmax(logits_MNC.double().numpy(), axis=2)


def power_mean(logits_MNC, weights, temperature):
    average = np.tensordot(np.array(weights), probabilities(logits_MNC), 1)
    powers = average ** (1 / temperature)
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_rows_are_what_scikit_learn_torchmetrics_and_scipy_say(scale):
    held_out = members_of(2.0, 0.8, 1.2, seed=1, scale=scale)
    logits, labels = members_of(2.0, 0.8, 1.2, seed=2, images=500, scale=scale)
    choice = choose(*held_out)
    worth = worth_of(logits, labels, choice)
    equal = power_mean(logits, [1 / 3] * 3, 1)
    for candidate in choice.candidates:
        check_row(
            worth.row(candidate.method), power_mean(logits, candidate.weights, 1), equal, labels.numpy()
        )
    decided = worth.row("decided")
    assert decided.temperature == choice.temperature != 1
    check_row(decided, power_mean(logits, choice.taken.weights, choice.temperature), equal, labels.numpy())
    check_row(worth.row("newest alone"), probabilities(logits)[-1], equal, labels.numpy())


def check_row(row, expected, baseline, labels):
    metrics, classes = row.metrics, range(CLASSES)
    predicted = expected.argmax(1)
    # Members that are sure of different classes tie in fp32, where a probability above 1 - 6e-8 is 1.
    best = np.sort(expected, axis=1)
    ties = 100 * (best[:, -1] - best[:, -2] < 1e-6).mean()
    assert metrics.error == pytest.approx(100 * (1 - accuracy_score(labels, predicted)), abs=ties + 1e-9)
    assert metrics.top5_error == pytest.approx(
        100 * (1 - top_k_accuracy_score(labels, expected, k=5, labels=classes))
    )
    assert metrics.nll == pytest.approx(log_loss(labels, expected, labels=classes), abs=1e-5)
    calibration = MulticlassCalibrationError(CLASSES, n_bins=15, norm="l1")
    expected_ece = float(calibration(torch.from_numpy(expected).float(), torch.from_numpy(labels)))
    assert metrics.ece == pytest.approx(expected_ece, abs=1e-5)
    wrong, base = 100.0 * (predicted != labels), 100.0 * (baseline.argmax(1) != labels)
    check_gain(row.error_gain, wrong, base, 2 * ties + 1e-9)
    own = -np.log(expected[np.arange(len(labels)), labels])
    check_gain(row.nll_gain, own, -np.log(baseline[np.arange(len(labels)), labels]), 1e-4)


def check_gain(gain, values, baseline, tolerance):
    assert gain.points == pytest.approx((values - baseline).mean(), abs=tolerance)
    if (values == baseline).all() or np.allclose(values, baseline):
        return
    interval = stats.ttest_rel(values, baseline).confidence_interval(0.95)
    # Student's distribution is 0.3 % wider than the normal one with 500 images.
    assert gain.interval == pytest.approx((interval.low, interval.high), rel=0.02, abs=0.01 + tolerance)


def test_costs_follow_from_what_is_computed():
    logits, labels = members_of(2.0, 0.8, 1.2)
    worth = worth_of(logits, labels, choose(logits, labels), threshold=0.6, thresholds=[0.6])
    three, one = worth.row("all").cost, worth.row("newest alone").cost
    assert (three.forwards, three.parameters, three.bytes, three.milliseconds) == (3, 3000, 12000, 1.5)
    assert (one.forwards, one.parameters, one.bytes, one.milliseconds) == (1, 1000, 4000, 0.5)
    cascade = worth.row("cascade").cost
    assert 1 < cascade.forwards < 3
    assert cascade.milliseconds == pytest.approx(0.5 * cascade.forwards)
    assert cascade.bytes == 12000
    with pytest.raises(KeyError):
        worth.row("another")


def test_without_a_choice_there_are_the_ways_that_need_none():
    logits, labels = members_of(1.0, 0.8)
    worth = worth_of(logits, labels)
    assert [row.name for row in worth.rows] == ["newest alone", "all", "geometric", "vote"]
    single = worth_of(logits[:1], labels)
    assert [row.name for row in single.rows] == ["all"]


@pytest.mark.parametrize("order", ["last", "first"])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_geometric_averaging_is_numpys(order, scale):
    logits, labels = members_of(1.0, 0.8, 2.0, scale=scale)
    statistics = combined_statistics(logits, labels, "geometric", order)
    log = log_softmax(logits.double().numpy(), axis=2)
    for m in (1, 2, 3):
        chosen = log[-m:] if order == "last" else log[:m]
        expected = log_softmax(chosen.mean(0), axis=1)
        assert statistics.prediction[m - 1].numpy().tolist() == expected.argmax(1).tolist()
        own = expected[np.arange(len(labels)), labels.numpy()]
        assert statistics.label_log_probability[m - 1].numpy() == pytest.approx(own, rel=1e-4, abs=1e-4)
        differing = (chosen.argmax(2) != expected.argmax(1)).sum(0)
        assert statistics.disagreement[m - 1].tolist() == differing.tolist()


@pytest.mark.parametrize("order", ["last", "first"])
def test_voting_counts_votes_and_breaks_ties_by_probability(order):
    logits, labels = members_of(2.0, 1.5, 2.5, 1.0)
    statistics = combined_statistics(logits, labels, "vote", order)
    all_probabilities = probabilities(logits)
    for m in (1, 2, 3, 4):
        chosen = all_probabilities[-m:] if order == "last" else all_probabilities[:m]
        for image in range(len(labels)):
            votes = np.bincount(chosen[:, image].argmax(1), minlength=CLASSES)
            mean = chosen[:, image].mean(0)
            best = max(range(CLASSES), key=lambda label, v=votes, p=mean: (v[label], p[label]))
            assert int(statistics.prediction[m - 1, image]) == best
            assert int(statistics.disagreement[m - 1, image]) == m - votes[best]
    metrics = summarise(statistics, labels)[-1]
    assert metrics.error == pytest.approx(
        100 * (1 - accuracy_score(labels.numpy(), statistics.prediction[-1].numpy()))
    )
    assert all(
        math.isnan(getattr(metrics, name)) for name in ("nll", "ece", "brier", "top5_error", "entropy")
    )
    vote = worth_of(logits, labels).row("vote")
    assert vote.nll_gain is None
    assert vote.metrics.error == metrics.error


def test_members_can_be_combined_in_another_way():
    logits, labels = members_of(2.0, 0.8, 1.2)
    mean, geometric = measure_members(logits, labels), measure_members(logits, labels, "geometric")
    assert mean.alone == geometric.alone
    assert mean.last_m[0].error == geometric.last_m[0].error
    assert mean.last_m[-1].nll != geometric.last_m[-1].nll
    with pytest.raises(ValueError, match="combine must be one of mean, geometric, vote, got 'median'"):
        measure_members(logits, labels, "median")


def test_a_cascade_asks_until_one_is_sure():
    logits, labels = members_of(2.0, 0.8, 1.2)
    statistics = average_members(logits, labels, order="last")
    members = probabilities(logits)
    for threshold in (0.0, 0.4, 0.7, 1.1):
        found = answers(statistics, threshold)
        for image in range(len(labels)):
            for asked in (1, 2, 3):
                average = members[-asked:, image].mean(0)
                if asked == 3 or average.max() >= threshold + 1e-6:
                    break
            if abs(average.max() - threshold) > 1e-5:
                assert int(found.forwards[image]) == asked
                assert int(found.prediction[image]) == average.argmax()
                assert float(found.nll[image]) == pytest.approx(-np.log(average[labels[image]]), abs=1e-4)


def test_the_threshold_is_the_cheapest_that_loses_nothing_on_the_held_out_images():
    logits, labels = members_of(2.0, 0.8, 1.2)
    weights = [0.2, 0.5, 0.3]
    threshold, thresholds = choose_threshold(logits, labels, weights)
    statistics = average_members(logits, labels, order="last", weights=weights)
    points = curve(statistics, labels, thresholds)
    assert points[0].forwards == 1
    assert points[-1].forwards == pytest.approx(3, abs=0.1)
    assert [point.forwards for point in points] == sorted(point.forwards for point in points)
    fewest = min(point.forwards for point in points if point.error <= points[-1].error)
    assert next(point for point in points if point.threshold == threshold).forwards == fewest
