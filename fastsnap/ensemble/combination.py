"""What the members say together: averaged probabilities, and how sure they are, by the kernel or in plain PyTorch."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsnap.kernels.averaging import average_members

TINY = torch.finfo(torch.float32).tiny  # below any probability that counts


class Combination(NamedTuple):
    """Of N images.

    probabilities       float32 [N, C], each row adds up to 1
    entropy             float32 [N], of these probabilities, in nats
    mutual_information  float32 [N], of the averaged probabilities at temperature 1: their entropy less the members'
                        average entropy, in nats; 0 where all members say the same
    disagreement        float32 [N], part of the members, 0 to 1, that predict another class than they do together
    """

    probabilities: Tensor
    entropy: Tensor
    mutual_information: Tensor
    disagreement: Tensor


def combine(logits_MNC: Tensor, weights: Sequence[float], temperature: float) -> Combination:
    """The averaged softmax of logits [M, N, C], float32, by the project's kernel.

    weights      [M], > 0; normalised here
    temperature  p -> p^(1 / temperature), normalised again, of the averaged probabilities
    Raises ValueError for NaN and infinite logits, naming the members from 0.
    """
    statistics = average_members(logits_MNC, weights=weights, probabilities=True)
    assert statistics.probabilities is not None
    probabilities, entropy = statistics.probabilities, statistics.entropy[-1]
    if temperature != 1:
        probabilities, entropy = tempered(probabilities, temperature)
    disagreement = statistics.disagreement[-1].float() / len(logits_MNC)
    return Combination(probabilities, entropy, statistics.mutual_information[-1], disagreement)


def combine_plainly(logits_MNC: Tensor, weights: Sequence[float], temperature: float) -> Combination:
    """The same by tensor operations that torch.compile and torch.export can look into; NaN stays NaN."""
    total = sum(weights)
    log_probabilities = torch.log_softmax(logits_MNC.float(), dim=2)
    members = log_probabilities.exp()
    average = sum(member * (weight / total) for member, weight in zip(members.unbind(), weights, strict=True))
    assert isinstance(average, Tensor)
    entropies = entropy_of(members)
    own = sum(part * (weight / total) for part, weight in zip(entropies.unbind(), weights, strict=True))
    entropy = entropy_of(average)
    information = (entropy - own).clamp_min(0)
    others = (members.argmax(2) != average.argmax(1)).float().mean(0)
    if temperature != 1:
        average, entropy = tempered(average, temperature)
    return Combination(average, entropy, information, others)


def tempered(probabilities: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """p^(1 / temperature), normalised, and its entropy."""
    changed = torch.softmax(probabilities.clamp_min(TINY).log() / temperature, dim=-1)
    return changed, entropy_of(changed)


def entropy_of(probabilities: Tensor) -> Tensor:
    """In nats, of the last dimension; 0 log 0 is 0."""
    return -(probabilities * probabilities.clamp_min(TINY).log()).sum(-1)
