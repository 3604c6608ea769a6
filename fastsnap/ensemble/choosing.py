"""Which snapshots to use, what each counts, and at which temperature: decided on held-out images, and on no others.

All of it follows from the members' logits for these images, kept from one forward pass each. Ways that fit something
are fitted on one half of the images and compared on the other; the way that is taken is then fitted again on all.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from fastsnap.ensemble.combination import TINY
from fastsnap.kernels.averaging import average_members

ALL, LAST, SUBSET, GREEDY, WEIGHTED = "all", "last m", "subset", "greedy", "weighted"
MOST_FOR_SUBSETS = 12  # members of which all subsets are tried: 4,095
GREEDY_STEPS = 50  # members taken one after the other, each as often as it helps
EM_STEPS, EM_GAP = 5000, 1e-6  # iterations at most, and nats from the optimum at which they end
LEAST_WEIGHT = 1e-3  # below it a member is left out: it would cost a forward pass and change next to nothing
TEMPERATURES = 0.05, 20.0  # within which the best one is looked for
LEAST_IMAGES = 20  # held out, below which nothing is chosen
TOO_SMALL = (
    1e-290  # of a label's average probability, in parts of the best member's: fp64 soon has no digits left
)
Way = Callable[[Tensor], Tensor]
ROWS_AT_ONCE = 256  # weightings, whose averages [rows, images] are in memory together


@dataclass(frozen=True)
class Candidate:
    """A way to choose, and what it gives.

    method    "all" (equal weights), "last m", "subset" (the best of all), "greedy" (with replacement) or "weighted"
    weights   of the M members, adding up to 1; 0: left out. Fitted on all held-out images
    half_nll  of the second half of the held-out images, nats, where the weights are fitted on the first
    """

    method: str
    weights: tuple[float, ...]
    half_nll: float

    @property
    def members(self) -> list[int]:
        """Those that count, from 0."""
        return [member for member, weight in enumerate(self.weights) if weight]


@dataclass(frozen=True)
class Choice:
    """What was decided on `images` held-out images.

    candidates   the ways that were compared, the simplest first
    taken        the one with the lowest half_nll; of equal ones the first
    temperature  of the averaged probabilities, p -> p^(1 / temperature); 1 where none helped on the second half
    half_nlls    of the second half, before and after a temperature fitted on the first
    harmful      members, from 0, that only harm: no ensemble becomes better by one of them
    missing      classes of which no image is held out
    equal        members, from 0, that say exactly the same as an earlier one
    """

    images: int
    candidates: tuple[Candidate, ...]
    taken: Candidate
    temperature: float
    half_nlls: tuple[float, float]
    harmful: tuple[int, ...]
    missing: tuple[int, ...]
    equal: tuple[int, ...]


def reason_against(images: int, classes: int) -> str | None:
    """Why nothing can be chosen on so many held-out images; None: it can."""
    least = max(classes, LEAST_IMAGES)
    if images >= least:
        return None
    return (
        f"{images:,} held-out images are too few to choose on: {least:,} would do, one per class and no fewer than "
        f"{LEAST_IMAGES}"
    )


def choose(logits_MNC: Tensor, labels_N: Tensor) -> Choice:
    """Decide on the members' logits (finite floats) for held-out images and their labels (int64).

    Raises ValueError for NaN and infinite logits, naming the members from 0, and for too few images.
    """
    members, images, classes = logits_MNC.shape
    reason = reason_against(images, classes)
    if reason:
        raise ValueError(reason)
    if not torch.isfinite(logits_MNC).all():
        bad = [index for index, logits in enumerate(logits_MNC) if not torch.isfinite(logits).all()]
        raise ValueError(f"logits must be finite, got NaN or infinity from member {', '.join(map(str, bad))}")
    labels_N = labels_N.to(logits_MNC.device)
    first_N = halves(labels_N)
    log_MN = label_log_probabilities(logits_MNC, labels_N)
    ways = _ways(members)
    trials = {method: fit(log_MN[:, first_N]) for method, fit in ways.items()}
    half_nlls = {
        method: float(negative_log_likelihoods(weights[None], log_MN[:, ~first_N])[0])
        for method, weights in trials.items()
    }
    candidates = tuple(
        Candidate(method, tuple(fit(log_MN).tolist()), half_nlls[method]) for method, fit in ways.items()
    )
    taken = min(candidates, key=lambda candidate: candidate.half_nll)
    temperature, before, after = _choose_temperature(
        logits_MNC, labels_N, first_N, trials[taken.method].tolist(), taken.weights
    )
    missing = set(range(classes)) - set(labels_N.unique().tolist())
    return Choice(
        images,
        candidates,
        taken,
        temperature,
        (before, after),
        tuple(harmful(log_MN)),
        tuple(sorted(missing)),
        tuple(_twins(logits_MNC)),
    )


def _twins(logits_MNC: Tensor) -> list[int]:
    """Members that say exactly the same as an earlier one."""
    pairs = itertools.combinations(range(len(logits_MNC)), 2)
    return sorted({later for earlier, later in pairs if torch.equal(logits_MNC[earlier], logits_MNC[later])})


def halves(labels_N: Tensor) -> Tensor:
    """bool [N]: the first half, which has every other image of each class."""
    order = torch.argsort(labels_N, stable=True)
    ordered = labels_N[order]
    starts = torch.searchsorted(ordered, ordered)
    first = torch.empty(len(labels_N), dtype=torch.bool, device=labels_N.device)
    # Classes alternate which half has the odd image, so that the halves are of one size where classes are small.
    first[order] = (torch.arange(len(ordered), device=labels_N.device) - starts + ordered) % 2 == 0
    return first


def label_log_probabilities(logits_MNC: Tensor, labels_N: Tensor) -> Tensor:
    """Each member's log-probability of each image's label, float64 [M, N], in nats."""
    rows = []
    for logits_NC in logits_MNC:
        log_probabilities_NC = torch.log_softmax(logits_NC.float(), dim=1)
        rows.append(log_probabilities_NC.gather(1, labels_N[:, None])[:, 0].double())
    return torch.stack(rows).clamp_min(-torch.finfo(torch.float32).max)


def negative_log_likelihoods(weights_SM: Tensor, log_MN: Tensor) -> Tensor:
    """Mean NLL, float64 [S], nats, of the averages of members' probabilities with S weightings.

    weights_SM  float64, >= 0, each row adding up to 1
    log_MN      see label_log_probabilities
    """
    largest_N, scaled_MN = _scaled(log_MN)
    parts = []
    for weights in weights_SM.split(ROWS_AT_ONCE):
        averages = weights @ scaled_MN
        rows, images = torch.nonzero(averages < TOO_SMALL, as_tuple=True)
        averages.log_()
        if len(rows):
            terms = log_MN[:, images] - largest_N[images] + weights[rows].T.log()
            averages[rows, images] = torch.logsumexp(terms, 0)
        parts.append(averages.mean(1))
    return -(torch.cat(parts) + largest_N.mean())


def _scaled(log_MN: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each image [N], and probabilities in parts of it [M, N]: those of labels can be 1e-1000."""
    largest_N = log_MN.amax(0)
    return largest_N, (log_MN - largest_N).exp()


# -- ways to choose: each takes log_MN and returns weights, float64 [M]


def _ways(members: int) -> dict[str, Way]:
    """By their names, the simplest first."""
    if members == 1:
        return {ALL: equal_weights}
    ways: dict[str, Way] = {ALL: equal_weights, LAST: best_last}
    if members <= MOST_FOR_SUBSETS:
        ways[SUBSET] = best_subset
    return ways | {GREEDY: greedy, WEIGHTED: convex_weights}


def equal_weights(log_MN: Tensor) -> Tensor:
    """All members alike."""
    return log_MN.new_full((len(log_MN),), 1 / len(log_MN))


def best_last(log_MN: Tensor) -> Tensor:
    """The last m, for the m with the lowest NLL; of equal ones the smallest."""
    members = len(log_MN)
    weights_SM = log_MN.new_ones(members, members).triu().flip(0)
    return _best(weights_SM, log_MN)


def best_subset(log_MN: Tensor) -> Tensor:
    """The subset with the lowest NLL of all 2^M - 1; of equal ones that of fewest members."""
    return _best(_subsets(log_MN), log_MN)


def _subsets(log_MN: Tensor) -> Tensor:
    """0 or 1, float64 [2^M - 1, M]: fewer members first."""
    members = len(log_MN)
    sizes = range(1, members + 1)
    chosen = [subset for size in sizes for subset in itertools.combinations(range(members), size)]
    rows = torch.zeros(len(chosen), members, dtype=torch.float64)
    for row, subset in zip(rows, chosen, strict=True):
        row[list(subset)] = 1
    return rows.to(log_MN.device)


def _best(counts_SM: Tensor, log_MN: Tensor) -> Tensor:
    weights_SM = counts_SM / counts_SM.sum(1, keepdim=True)
    return weights_SM[negative_log_likelihoods(weights_SM, log_MN).argmin()]


def greedy(log_MN: Tensor) -> Tensor:
    """Forward selection with replacement: the member that helps most joins, again and again; the best of the way.

    Caruana et al., Ensemble Selection from Libraries of Models (ICML 2004).
    """
    counts = log_MN.new_zeros(len(log_MN))
    best, best_nll = counts, float("inf")
    one_more_MM = torch.eye(len(log_MN), dtype=torch.float64, device=log_MN.device)
    for size in range(1, GREEDY_STEPS + 1):
        nlls = negative_log_likelihoods((counts + one_more_MM) / size, log_MN)
        joining = int(nlls.argmin())
        counts = counts + one_more_MM[joining]
        if float(nlls[joining]) < best_nll:
            best, best_nll = counts, float(nlls[joining])
    return best / best.sum()


def convex_weights(log_MN: Tensor) -> Tensor:
    """The weights with the lowest NLL of all, by expectation-maximisation of a mixture whose parts are given.

    The NLL is convex in them, and at any weights no more than EM_GAP above its minimum once no member's mean
    responsibility per weight exceeds 1 by more.
    """
    _, scaled_MN = _scaled(log_MN)
    weights = equal_weights(log_MN)
    for _ in range(EM_STEPS):
        factors = (scaled_MN / (weights @ scaled_MN).clamp_min(TOO_SMALL)).mean(1)
        if float(factors.max()) <= 1 + EM_GAP:
            break
        weights = weights * factors
    weights = torch.where(weights < LEAST_WEIGHT, 0.0, weights)
    return weights / weights.sum()


def harmful(log_MN: Tensor) -> list[int]:
    """Members, from 0, that only harm: whatever they join, of all subsets, has a higher NLL then.

    Of more than MOST_FOR_SUBSETS members: those that harm all the others together and get no weight.
    """
    members = len(log_MN)
    if members == 1:
        return []
    if members > MOST_FOR_SUBSETS:
        without_SM = log_MN.new_ones(members, members).fill_diagonal_(0) / (members - 1)
        better = negative_log_likelihoods(without_SM, log_MN)
        whole = negative_log_likelihoods(equal_weights(log_MN)[None], log_MN)
        weights = convex_weights(log_MN)
        return [index for index in range(members) if better[index] < whole and not weights[index]]
    counts_SM = _subsets(log_MN)
    weights_SM = counts_SM / counts_SM.sum(1, keepdim=True)
    codes = (
        (counts_SM @ (2.0 ** torch.arange(members, dtype=torch.float64).to(log_MN.device))).long().tolist()
    )
    nll_of = dict(zip(codes, negative_log_likelihoods(weights_SM, log_MN).tolist(), strict=True))
    found = []
    for index in range(members):
        bit = 1 << index
        pairs = [(nll_of[code], nll_of[code | bit]) for code in codes if not code & bit]
        if all(joined > alone for alone, joined in pairs):
            found.append(index)
    return found


# -- temperature


def averaged_log_probabilities(logits_MNC: Tensor, weights: Sequence[float]) -> Tensor:
    """Of the members with weight, averaged: the logarithm, float32 [N, C]."""
    members = [member for member, weight in enumerate(weights) if weight]
    statistics = average_members(
        logits_MNC[members], weights=[weights[member] for member in members], probabilities=True
    )
    assert statistics.probabilities is not None
    return statistics.probabilities.clamp_min(TINY).log()


def tempered_nll(log_NC: Tensor, labels_N: Tensor, temperature: float) -> float:
    """Mean NLL, nats, of probabilities p^(1 / temperature), normalised again, of which `log_NC` is log p."""
    scaled = log_NC / temperature
    labels = scaled.gather(1, labels_N[:, None])[:, 0]
    return (torch.logsumexp(scaled, 1) - labels).double().mean().item()


def best_temperature(log_NC: Tensor, labels_N: Tensor) -> float:
    """The temperature with the lowest NLL; the NLL is convex in its inverse. Guo et al. (ICML 2017), section 4.2."""
    found = minimize_scalar(
        lambda inverse: tempered_nll(log_NC, labels_N, 1 / inverse),
        bounds=(1 / TEMPERATURES[1], 1 / TEMPERATURES[0]),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return 1 / float(found.x)


def _choose_temperature(
    logits_MNC: Tensor,
    labels_N: Tensor,
    first_N: Tensor,
    half_weights: Sequence[float],
    weights: Sequence[float],
) -> tuple[float, float, float]:
    """The temperature to use, and the NLL of the second half without and with one fitted on the first.

    half_weights  fitted on the first half, so that the second has a say of its own
    """
    log_NC = averaged_log_probabilities(logits_MNC, half_weights)
    trial = best_temperature(log_NC[first_N], labels_N[first_N])
    before = tempered_nll(log_NC[~first_N], labels_N[~first_N], 1.0)
    after = tempered_nll(log_NC[~first_N], labels_N[~first_N], trial)
    if after >= before:
        return 1.0, before, after
    return best_temperature(averaged_log_probabilities(logits_MNC, weights), labels_N), before, after
