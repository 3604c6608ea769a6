"""Progress of a training run: a live bar on a terminal, plain lines in a file."""

import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.text import Text

from fastsnap.printing import is_lost, print_line

LINE_SECONDS = 5.0  # least time between two lines in a file, so that short epochs do not flood it
SILENCE_SECONDS = 60.0  # longest time without a line, so that long epochs show that they go on


@dataclass(frozen=True)
class Status:
    """Where a run is. `step` counts updates done; `epoch` and `cycle` count from 1.

    loss (nats), error (%) and images_per_second are of the current epoch so far.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    cycle: int
    cycles: int
    learning_rate: float
    loss: float
    error: float
    images_per_second: float
    seconds_left: float


def format_seconds(seconds: float) -> str:
    """A duration to two units: "45 s", "12 min 5 s", "3 h 20 min", "4 d 2 h"."""
    whole = round(seconds)
    for unit, size, lower, lower_size in (
        ("d", 86400, "h", 3600),
        ("h", 3600, "min", 60),
        ("min", 60, "s", 1),
    ):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // lower_size} {lower}"
    return f"{whole} s"


def format_status(status: Status) -> str:
    """One line with everything but the bar."""
    return (
        f"epoch {status.epoch:>{len(str(status.epochs))}}/{status.epochs}  cycle {status.cycle}/{status.cycles}  "
        f"lr {status.learning_rate:.4f}  loss {status.loss:.3f}  error {status.error:4.1f} %  "
        f"{status.images_per_second:,.0f} images/s  {format_seconds(status.seconds_left)} left"
    )


class ProgressDisplay:
    """Shows `Status`es; a context manager. Messages go above the bar."""

    def __init__(self, console: Console, first_step: int, steps: int) -> None:
        self.console = console
        self._line_time = time.monotonic()
        self._live: Live | None = None
        if console.is_terminal:
            self._bar = ProgressBar(total=steps, completed=first_step)
            self._text = Text("starting")  # above the bar, where it can wrap on a narrow terminal
            self._live = Live(Group(self._text, self._bar), console=console)

    def __enter__(self) -> "ProgressDisplay":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    @property
    def lost(self) -> bool:
        """Whether nobody can read this any more."""
        return is_lost(self.console)

    def show(self, status: Status, *, epoch_ended: bool) -> None:
        """Move the bar; in a file, add a line when an epoch has ended or much time has passed, but not too often."""
        if self._live:
            self._bar.update(status.step)
            self._text.plain = format_status(status)
            return
        silent = time.monotonic() - self._line_time
        if silent >= SILENCE_SECONDS or (
            epoch_ended and (silent >= LINE_SECONDS or status.step == status.steps)
        ):
            self._line_time = time.monotonic()
            self.message(f"{100 * status.step / status.steps:3.0f} %  {format_status(status)}")

    def message(self, text: str) -> None:
        """A line that stays."""
        print_line(self.console, text)


class LoadingDisplay:
    """Progress of what comes before the training: a bar on a terminal, a line now and then in a file."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._line_time = time.perf_counter()

    def __enter__(self) -> "LoadingDisplay":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def message(self, text: str) -> None:
        """A line of its own."""
        print_line(self._console, text)

    def show(self, what: str, done: int, total: int) -> None:
        """`done` of `total` are done of what takes long."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done)
        if not self._console.is_terminal and time.perf_counter() - self._line_time >= SILENCE_SECONDS / 4:
            self._line_time = time.perf_counter()
            print_line(self._console, f"{what}: {done:,} of {total:,}")
