"""Endless loops in processes of their own, which run a few steps when it is their turn and sleep otherwise.

So training loops that nobody can stop half-way, such as those of a library, are measured in turns, each in the main
thread of a fresh process, as its user would run it. A loop takes its batches through `Pace.batches`.
"""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

Batch = TypeVar("Batch")
CLOSE_SECONDS = 10.0


class ContenderFailed(ValueError):
    """A contender's process ended with an error."""


@dataclass(frozen=True)
class Chunk:
    """What some steps took, and the largest memory of the process so far, of the device where that is a GPU."""

    seconds: float
    peak_memory_mb: float


class _Finished(BaseException):
    """No more turns; ends the loop from inside, past any `except Exception` of a library."""


class Pace:
    """The loop's side: batches pass through here, and wait for their turn."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._steps_left = 0
        self._start: float | None = None

    def batches(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches. A step lasts from asking for its batch to asking for the next one."""
        iterator = iter(batches)
        while True:
            if self._steps_left == 0:
                self._wait_for_turn()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch
            self._steps_left -= 1

    def _wait_for_turn(self) -> None:
        if self._start is not None:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self._connection.send(Chunk(time.perf_counter() - self._start, peak_memory_mb()))
        try:
            self._steps_left = self._connection.recv()
        except EOFError:  # the measuring process is gone
            self._steps_left = 0
        if self._steps_left == 0:
            raise _Finished
        self._start = time.perf_counter()


def peak_memory_mb() -> float:
    """Largest GPU memory reserved, or else largest resident memory of this program.

    The latter is Linux's; getrusage's would count the program that started this one.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


class PacedProcess:
    """The measuring side: `loop(pace, *arguments)` in a fresh process. A context manager.

    loop  an importable function; it and its arguments are pickled
    """

    def __init__(self, name: str, loop: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, child = context.Pipe()
        self._process = context.Process(target=run_loop, args=(child, loop, arguments))
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the measuring process to answer
        self._process.start()
        signal.signal(signal.SIGINT, before)
        child.close()

    def run(self, steps: int) -> Chunk:
        """Run the next `steps` >= 1 steps; the first call waits until the loop is set up.

        Raises ContenderFailed if the loop fails or ends.
        """
        self.begin(steps)
        return self.end()

    def begin(self, steps: int) -> None:
        """The first half of `run`: where several processes have their turn at once, all begin before any ends."""
        with suppress(OSError):  # `end` says why
            self._connection.send(steps)

    def end(self) -> Chunk:
        """The second half of `run`."""
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            answer = "its process ended"
        if isinstance(answer, str):
            raise ContenderFailed(f"{self.name} failed: {answer}")
        return answer

    def seconds_per_step(self, steps: int) -> float:
        """Run the next `steps` steps and return how long one took. Raises as `run` does."""
        return self.run(steps).seconds / steps

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            self._connection.send(0)
        self._process.join(CLOSE_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    def __enter__(self) -> "PacedProcess":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def run_loop(connection: Connection, loop: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """The process's side: run `loop`, answering every number of steps that `connection` sends, until 0."""
    try:
        loop(Pace(connection), *arguments)
        connection.send("it ended before the measurement")
    except _Finished:
        return
    except Exception as error:
        with suppress(OSError):
            connection.send(f"{type(error).__name__}: {error}")
