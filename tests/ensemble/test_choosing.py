"""Deciding on held-out images, against SciPy, scikit-learn and plain loops."""

import itertools

import numpy as np
import pytest
import torch
from made_logits import members_of
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp, softmax
from sklearn.metrics import log_loss

from fastsnap.ensemble.choosing import (
    averaged_log_probabilities,
    best_temperature,
    choose,
    halves,
    tempered_nll,
)
from fastsnap.ensemble.ways import (
    GREEDY_STEPS,
    LEAST_WEIGHT,
    best_last,
    best_subset,
    convex_weights,
    equal_weights,
    greedy,
    harmful,
    label_log_probabilities,
    negative_log_likelihoods,
)

EXACT = 1e-9  # nats, of sums in fp64
FP32 = 2e-6  # nats, of softmax in fp32


def nll_by_scipy(logits_MNC, labels_N, weights):
    """In fp64, in logarithms throughout."""
    logits = logits_MNC.double().numpy()
    log = logits - logsumexp(logits, axis=2, keepdims=True)
    own = log[:, np.arange(len(labels_N)), labels_N.numpy()]
    return -logsumexp(own, axis=0, b=np.array(weights)[:, None]).mean()


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3])
def test_the_likelihood_of_an_average_is_scipys(scale):
    logits, labels = members_of(0.5, 1.0, 3.0, scale=scale)
    log_MN = label_log_probabilities(logits, labels)
    weights_SM = torch.tensor([[1 / 3] * 3, [0.7, 0.3, 0], [0, 0, 1]], dtype=torch.float64)
    expected = [nll_by_scipy(logits, labels, weights) for weights in weights_SM.tolist()]
    found = negative_log_likelihoods(weights_SM, log_MN)
    assert found.tolist() == pytest.approx(expected, abs=FP32, rel=1e-6)
    assert torch.isfinite(found).all()


def test_the_likelihood_of_one_member_is_scikit_learns():
    logits, labels = members_of(1.0)
    expected = log_loss(labels.numpy(), softmax(logits[0].double().numpy(), axis=1), labels=range(7))
    log_MN = label_log_probabilities(logits, labels)
    assert float(negative_log_likelihoods(equal_weights(log_MN)[None], log_MN)) == pytest.approx(
        expected, abs=FP32
    )


def test_the_best_subset_is_that_of_a_loop_over_all():
    logits, labels = members_of(2.0, 0.6, 4.0, 0.8, 0.7)
    log_MN = label_log_probabilities(logits, labels)
    subsets = [subset for size in range(1, 6) for subset in itertools.combinations(range(5), size)]

    def nll(subset):
        return nll_by_scipy(logits, labels, [(member in subset) / len(subset) for member in range(5)])

    best = min(subsets, key=nll)
    found = best_subset(log_MN)
    assert tuple(torch.nonzero(found)[:, 0].tolist()) == best
    assert found[list(best)].tolist() == pytest.approx([1 / len(best)] * len(best))


def test_the_best_m_is_that_of_a_loop():
    logits, labels = members_of(3.0, 2.0, 0.5, 0.5)
    log_MN = label_log_probabilities(logits, labels)
    nlls = [nll_by_scipy(logits, labels, [0] * (4 - m) + [1 / m] * m) for m in range(1, 5)]
    m = 1 + int(np.argmin(nlls))
    assert best_last(log_MN).tolist() == pytest.approx([0] * (4 - m) + [1 / m] * m)


def test_greedy_selection_is_that_of_a_plain_loop():
    logits, labels = members_of(1.5, 0.8, 2.5, 0.7)
    log_MN = label_log_probabilities(logits, labels)
    taken, way = [], []
    for _ in range(GREEDY_STEPS):

        def nll(member, taken=tuple(taken)):
            counts = np.bincount([*taken, member], minlength=4)
            return nll_by_scipy(logits, labels, counts / counts.sum())

        taken.append(min(range(4), key=nll))
        counts = np.bincount(taken, minlength=4)
        way.append((nll_by_scipy(logits, labels, counts / counts.sum()), counts / counts.sum()))
    assert greedy(log_MN).tolist() == pytest.approx(min(way, key=lambda step: step[0])[1].tolist())


@pytest.mark.parametrize("noises", [(1.0, 0.9, 1.2), (0.5, 4.0, 0.6, 5.0), (1.0,) * 6])
def test_convex_weights_are_the_optimum_that_scipy_finds(noises):
    logits, labels = members_of(*noises)
    log_MN = label_log_probabilities(logits, labels)
    count = len(noises)
    found = convex_weights(log_MN)
    assert float(found.sum()) == pytest.approx(1)
    assert not ((found > 0) & (found < LEAST_WEIGHT)).any()
    best = minimize(
        lambda weights: nll_by_scipy(logits, labels, np.abs(weights)),
        np.full(count, 1 / count),
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    # What is below LEAST_WEIGHT is left out.
    assert float(negative_log_likelihoods(found[None], log_MN)) == pytest.approx(best.fun, abs=2e-5)
    assert found.tolist() == pytest.approx(best.x, abs=0.02)


def test_the_temperature_is_the_one_that_scipy_finds():
    logits, labels = members_of(1.0, 1.5, scale=4)
    weights = [0.3, 0.7]
    log_NC = averaged_log_probabilities(logits, weights)
    probabilities = sum(
        weight * softmax(member.double().numpy(), axis=1)
        for weight, member in zip(weights, logits, strict=True)
    )
    assert log_NC.exp().numpy() == pytest.approx(probabilities, abs=1e-6)

    def nll(logarithm):
        powers = probabilities ** (1 / np.exp(logarithm))
        return log_loss(labels.numpy(), powers / powers.sum(1, keepdims=True), labels=range(7))

    expected = minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-7})
    found = best_temperature(log_NC, labels)
    assert found == pytest.approx(float(np.exp(expected.x)), rel=0.01)
    assert tempered_nll(log_NC, labels, found) == pytest.approx(expected.fun, abs=1e-5)
    assert found > 1.5  # members that are as sure as these are too sure


def test_halves_share_no_image_and_have_every_class_alike():
    labels = torch.randint(9, (301,), generator=torch.Generator().manual_seed(1))
    first = halves(labels)
    for label in range(9):
        ones, others = int((first & (labels == label)).sum()), int((~first & (labels == label)).sum())
        assert abs(ones - others) <= 1
    assert abs(int(first.sum()) - int((~first).sum())) <= 9
    single = halves(torch.arange(30))  # one image per class: both halves have some
    assert int(single.sum()) == 15


def test_what_is_taken_is_the_best_of_the_second_half_and_fitted_again_on_all():
    logits, labels = members_of(3.0, 0.6, 0.6, images=900)
    choice = choose(logits, labels)
    first = halves(labels)
    log_MN = label_log_probabilities(logits, labels)
    for candidate, fit in zip(
        choice.candidates, (equal_weights, best_last, best_subset, greedy, convex_weights), strict=True
    ):
        fitted = fit(log_MN[:, first])
        assert candidate.half_nll == pytest.approx(
            float(negative_log_likelihoods(fitted[None], log_MN[:, ~first])), abs=EXACT
        )
        assert list(candidate.weights) == pytest.approx(fit(log_MN).tolist())
    assert choice.taken.half_nll == min(candidate.half_nll for candidate in choice.candidates)
    assert choice.taken.method != "all"  # the first member is bad
    assert choice.images == 900


def test_a_member_that_only_harms_is_found():
    logits, labels = members_of(0.6, 0.7, 0.6)
    # Sure, and wrong.
    harm = torch.nn.functional.one_hot((labels + 1) % 7, 7).float() * 20
    bad = torch.cat([logits[:1], harm[None], logits[1:]])
    assert choose(bad, labels).harmful == (1,)
    assert choose(logits, labels).harmful == ()
    many = torch.cat([logits] * 4 + [harm[None]])
    assert choose(many, labels).harmful == (12,)  # of more than 12 members, where not all subsets are tried
    assert "subset" not in [candidate.method for candidate in choose(many, labels).candidates]


def test_harm_is_judged_by_every_subset():
    logits, labels = members_of(0.6, 2.0, 0.6)
    log_MN = label_log_probabilities(logits, labels)

    def nll(subset):
        return nll_by_scipy(logits, labels, [(member in subset) / len(subset) for member in range(3)])

    expected = []
    for member in range(3):
        others = [other for other in range(3) if other != member]
        subsets = [subset for size in (1, 2) for subset in itertools.combinations(others, size)]
        if all(nll((*subset, member)) > nll(subset) for subset in subsets):
            expected.append(member)
    assert harmful(log_MN) == expected


def test_one_member_leaves_the_temperature_to_choose():
    logits, labels = members_of(1.0, scale=5)
    choice = choose(logits, labels)
    assert [candidate.method for candidate in choice.candidates] == ["all"]
    assert choice.taken.weights == (1.0,)
    assert choice.temperature > 1.5
    assert choice.half_nlls[1] < choice.half_nlls[0]


def test_equal_members_are_named_and_break_nothing():
    logits, labels = members_of(1.0, 0.8)
    choice = choose(torch.cat([logits, logits[1:]]), labels)
    assert choice.equal == (2,)
    assert sum(choice.taken.weights) == pytest.approx(1)
    same = choose(torch.cat([logits[:1]] * 3), labels)
    assert same.equal == (1, 2)
    assert same.harmful == ()


def test_classes_without_an_image_are_named():
    logits, labels = members_of(1.0, 0.8)
    labels = torch.where(labels == 3, 2, labels)
    assert choose(logits, labels).missing == (3,)


def test_bad_input_is_refused_by_name():
    logits, labels = members_of(1.0, 0.8)
    broken = logits.clone()
    broken[1, 5, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity from member 1"):
        choose(broken, labels)
    with pytest.raises(ValueError, match="19 held-out images are too few to choose on: 20 would do"):
        choose(logits[:, :19], labels[:19])
    many = torch.randn(2, 50, 60)
    with pytest.raises(ValueError, match="50 held-out images are too few to choose on: 60 would do"):
        choose(many, torch.zeros(50, dtype=torch.int64))
