"""One run on many processes: who this process is among them, and what they tell each other.

torchrun starts the processes, the ranks, and restarts them; torch.distributed carries what they send. This module is
what the rest of the program sees of it. A process on its own is a rank of one, for which all of it is nothing to do,
and which imports nothing more.
"""

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")
TIMEOUT = 300.0  # seconds that ranks wait for each other within a step, unless asked for others


class RanksLost(Exception):
    """Other ranks did not answer: one of them failed, was killed, or hangs.

    where, remedy  for the user: when, and what to do
    """

    where, remedy = "outside of the training steps", ""


class Ranks:
    """This process alone. See process_group.ProcessGroup for many; what is said here of all ranks holds there.

    rank, count              this one, from 0, and how many there are
    local_rank, local_count  the same among those of this host
    """

    rank, count = 0, 1
    local_rank, local_count = 0, 1
    # Whether a signal has come that is not answered yet.
    is_stopping: Callable[[], bool] = staticmethod(lambda: False)
    name = ""  # " (rank 1 of 4, on that-host)", behind an error; a process alone needs none

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that speaks and writes."""
        return self.rank == 0

    def open(self, device: torch.device, timeout: float) -> None:
        """Begin to exchange tensors on `device`, on which a rank waits at most `timeout` seconds for another."""

    def close(self) -> None:
        """End it, in order; the first rank waits for the others."""

    def meet(self, where: str) -> None:
        """Wait, however long it takes, until all ranks are at the point that is called `where`."""

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What `make` returns on rank 0, a JSON value, on all ranks."""
        return make()

    def gather(self, value: Value) -> list[Value]:
        """The `value`s of all ranks, JSON values, in their order, on all of them."""
        return [value]

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest over all ranks of each of the values."""
        return list(values)

    def sum(self, tensor: Tensor) -> None:
        """Put the sum over all ranks into `tensor`, with the same bits on all."""

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Copy rank 0's tensors into those of all ranks."""

    def collect(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """On rank 0, the rows [N, ...] of all ranks one after the other; `counts` says how many each has."""
        return rows

    def remember(self, what: str) -> None:
        """For the processes that torchrun starts in the place of these ones, if it has to."""

    def remembers(self, what: str) -> bool:
        """Whether ranks that were here before had remembered it; of a process alone, whether there were any."""
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0

    def speaks_of_failure(self) -> bool:
        """Whether this rank is the one, of all that fail for one reason, to tell the user about it."""
        return True

    def explain(self, lost: RanksLost) -> str:
        """What the user should know of it."""
        return str(lost)
