"""Other ways than the mean to combine what members say: geometric averaging and hard voting.

mean       the average of the probabilities: what the method is, and what the kernel computes
geometric  the average of the log-probabilities, normalised: a class that one member rules out is ruled out
vote       the class that most members predict; of equal ones the one with the higher mean probability. There are
           no probabilities, hence no NLL and no calibration
"""

import math
from dataclasses import fields, replace

import torch
from torch import Tensor

from fastsnap.kernels.averaging import Order, average_members
from fastsnap.kernels.averaging_reference import PER_SAMPLE, EnsembleStatistics

MEAN, GEOMETRIC, VOTE = "mean", "geometric", "vote"
COMBINATIONS = (MEAN, GEOMETRIC, VOTE)


def combined_statistics(
    logits_MNC: Tensor, labels_N: Tensor, combine: str = MEAN, order: Order = "last"
) -> EnsembleStatistics:
    """Of the ensembles of m = 1..M members, as average_members gives them.

    For "geometric", mutual information is that of the averaged probabilities; for "vote", what needs probabilities is
    NaN, and the rank of a label is 0 where it wins and else the number of classes. Raises ValueError as average_members
    does, and for another `combine`.
    """
    if combine not in COMBINATIONS:
        raise ValueError(f"combine must be one of {', '.join(COMBINATIONS)}, got {combine!r}")
    statistics = average_members(logits_MNC, labels_N, order=order)
    if combine == MEAN:
        return statistics
    joining = logits_MNC.flip(0) if order == "last" else logits_MNC
    if combine == GEOMETRIC:
        return _geometric(joining, labels_N, statistics)
    return _votes(joining, labels_N, statistics)


def _geometric(joining_MNC: Tensor, labels_N: Tensor, mean: EnsembleStatistics) -> EnsembleStatistics:
    """joining_MNC  in the order in which the members join"""
    total_NC = torch.zeros_like(joining_MNC[0], dtype=torch.float32)
    own_MN = joining_MNC.argmax(2)
    rows = []
    for count, logits_NC in enumerate(joining_MNC, start=1):
        total_NC += torch.log_softmax(logits_NC.float(), 1)
        rows.append(average_members((total_NC / count)[None], labels_N))
    joined = {name: torch.cat([getattr(row, name) for row in rows]) for name in PER_SAMPLE}
    others = [(own_MN[: m + 1] != row.prediction).sum(0) for m, row in enumerate(rows)]
    joined["disagreement"] = torch.stack(others).int()
    joined["mutual_information"] = mean.mutual_information
    return EnsembleStatistics(**joined, probabilities=None)


def _votes(joining_MNC: Tensor, labels_N: Tensor, mean: EnsembleStatistics) -> EnsembleStatistics:
    classes = joining_MNC.shape[2]
    votes_NC = torch.zeros_like(joining_MNC[0], dtype=torch.float64)
    total_NC = torch.zeros_like(votes_NC)
    predictions, others = [], []
    for count, logits_NC in enumerate(joining_MNC, start=1):
        own_N = logits_NC.argmax(1)
        votes_NC[torch.arange(len(own_N), device=own_N.device), own_N] += 1
        total_NC += torch.softmax(logits_NC.float(), 1)
        # A mean probability is at most 1, half of it never outweighs a vote.
        prediction_N = (votes_NC + total_NC / (2 * count)).argmax(1)
        predictions.append(prediction_N)
        others.append(count - votes_NC.gather(1, prediction_N[:, None])[:, 0])
    prediction_MN = torch.stack(predictions)
    nothing = {
        item.name: torch.full_like(getattr(mean, item.name), math.nan)
        for item in fields(mean)
        if item.name in PER_SAMPLE and PER_SAMPLE[item.name] == torch.float32
    }
    return replace(
        mean,
        **nothing,
        prediction=prediction_MN,
        label_rank=torch.where(prediction_MN == labels_N, 0, classes).int(),
        disagreement=torch.stack(others).int(),
    )
