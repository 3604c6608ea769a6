"""Loops of several ranks, as torchrun would start them, that have their turns together."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import distributed

from fastsnap.training.joining import join_ranks
from harness.paced import Pace, PacedProcess

TIMEOUT = 600.0  # seconds; between their turns ranks wait elsewhere


class PacedRanks:
    """`loop(pace, ranks, *arguments)` in `count` fresh processes that are one another's ranks, on the CPU.

    See PacedProcess. A context manager.
    """

    def __init__(self, name: str, count: int, loop: Callable[..., None], *arguments: Any) -> None:
        self._store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._stack = ExitStack()
        self.processes = [
            self._stack.enter_context(
                PacedProcess(f"{name}, rank {rank}", as_rank, rank, count, self._store.port, loop, arguments)
            )
            for rank in range(count)
        ]

    def seconds_per_step(self, steps: int) -> float:
        """Run the next `steps` steps and return how long one took, until the last rank had done it."""
        for process in self.processes:
            process.begin(steps)
        return max(process.end().seconds for process in self.processes) / steps

    def bytes_per_step(self, steps: int) -> float:
        """What a rank sends in a step, as the network interfaces count it: with headers, and with all that others on
        this machine send meanwhile.
        """
        before = bytes_sent()
        self.seconds_per_step(steps)
        return (bytes_sent() - before) / steps / len(self.processes)

    def __enter__(self) -> "PacedRanks":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()


def as_rank(
    pace: Pace, rank: int, count: int, port: int, loop: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """Run `loop` as one of the ranks, with one thread."""
    place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    ranks = join_ranks()
    ranks.open(torch.device("cpu"), TIMEOUT)
    loop(pace, ranks, *arguments)


def bytes_sent() -> int:
    """Through all network interfaces of this machine since it started (Linux)."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return sum(int(line.partition(":")[2].split()[8]) for line in lines)
