"""Loops of ranks that have their turns together."""

import itertools

import pytest
import torch

from harness.paced import ContenderFailed
from harness.paced_ranks import PacedRanks

NUMBERS = 50_000


def summing(pace, ranks) -> None:
    for _ in pace.batches(itertools.count()):
        numbers = torch.full((NUMBERS,), float(ranks.rank + 1))
        ranks.sum(numbers)
        if numbers[0] != 3:
            raise ValueError(f"1 + 2 = {numbers[0]}")


def failing(pace, ranks) -> None:
    raise ValueError("no such thing")


def test_ranks_run_their_steps_together_and_what_they_send_is_counted() -> None:
    with PacedRanks("sums", 2, summing) as ranks:
        assert ranks.seconds_per_step(3) > 0
        # In a ring of two each rank sends every number once; others on this machine may send, too.
        assert ranks.bytes_per_step(20) >= 4 * NUMBERS


def test_a_rank_that_fails_says_why() -> None:
    with (
        PacedRanks("failing", 2, failing) as ranks,
        pytest.raises(ContenderFailed, match="failing, rank 0 failed: ValueError: no such thing"),
    ):
        ranks.seconds_per_step(1)
