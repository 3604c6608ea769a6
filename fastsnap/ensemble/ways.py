"""Ways to weigh members, from their log-probabilities of the labels alone: float64 [M, N], in nats.

Each is a function of these that returns weights, float64 [M], adding up to 1; 0 leaves a member out.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

ALL, LAST, SUBSET, GREEDY, WEIGHTED = "all", "last m", "subset", "greedy", "weighted"
MOST_FOR_SUBSETS = 12  # members of which all subsets are tried: 4,095
GREEDY_STEPS = 50  # members taken one after the other, each as often as it helps
EM_STEPS, EM_GAP = 5000, 1e-6  # iterations at most, and nats from the optimum at which they end
LEAST_WEIGHT = 1e-3  # below it a member is left out: it would cost a forward pass and change next to nothing
# Of a label's average probability, in parts of the best member's: below, fp64 soon has no digits left.
TOO_SMALL = 1e-290
Way = Callable[[Tensor], Tensor]
ROWS_AT_ONCE = 256  # weightings, whose averages [rows, images] are in memory together


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


def ways_of(members: int) -> dict[str, Way]:
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
