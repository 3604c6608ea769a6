"""Which snapshots to use, what each counts, and at which temperature: decided on held-out images, and on no others.

All of it follows from the members' logits for these images, kept from one forward pass each. Ways that fit something
are fitted on one half of the images and compared on the other; the way that is taken is then fitted again on all.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from fastsnap.ensemble.combination import TINY
from fastsnap.ensemble.ways import harmful, label_log_probabilities, negative_log_likelihoods, ways_of
from fastsnap.kernels.averaging import average_members

TEMPERATURES = 0.05, 20.0  # within which the best one is looked for
LEAST_IMAGES = 20  # held out, below which nothing is chosen


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
    ways = ways_of(members)
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
        tuple(_twins(logits_MNC, log_MN)),
    )


def _twins(logits_MNC: Tensor, log_MN: Tensor) -> list[int]:
    """Members that say exactly the same as an earlier one."""
    pairs = itertools.combinations(range(len(logits_MNC)), 2)
    alike = [pair for pair in pairs if torch.equal(*log_MN[list(pair)])]  # which is told with less to look at
    return sorted({later for earlier, later in alike if torch.equal(logits_MNC[earlier], logits_MNC[later])})


def halves(labels_N: Tensor) -> Tensor:
    """bool [N]: the first half, which has every other image of each class."""
    order = torch.argsort(labels_N, stable=True)
    ordered = labels_N[order]
    starts = torch.searchsorted(ordered, ordered)
    first = torch.empty(len(labels_N), dtype=torch.bool, device=labels_N.device)
    # Classes alternate which half has the odd image, so that the halves are of one size where classes are small.
    first[order] = (torch.arange(len(ordered), device=labels_N.device) - starts + ordered) % 2 == 0
    return first


def averaged_log_probabilities(logits_MNC: Tensor, weights: Sequence[float]) -> Tensor:
    """Of the members with weight, averaged: the logarithm, float32 [N, C]."""
    members = [member for member, weight in enumerate(weights) if weight]
    counting = [weights[member] for member in members]
    statistics = average_members(of_members(logits_MNC, members), weights=counting, probabilities=True)
    assert statistics.probabilities is not None
    return statistics.probabilities.clamp_min(TINY).log()


def of_members(logits_MNC: Tensor, members: Sequence[int]) -> Tensor:
    """Of some of them, in ascending order; where they are in a row, in the same memory, which is much."""
    first, last = members[0], members[-1]
    return logits_MNC[first : last + 1] if last - first + 1 == len(members) else logits_MNC[list(members)]


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
