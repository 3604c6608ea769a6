"""Ask an ensemble about pictures: `python -m fastsnap.predict --help`."""

from fastsnap.waiting import spin_shortly

if __name__ == "__main__":
    spin_shortly()

import argparse
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastsnap import __version__
from fastsnap.command_line import add_computing, add_data, add_members, exit_status
from fastsnap.device import choose_device
from fastsnap.ensemble.decision import read_decision
from fastsnap.ensemble.loading import load_ensemble
from fastsnap.ensemble.module import Ensemble
from fastsnap.ensemble.predictions import Predictions
from fastsnap.ensemble.reading import BATCH_SIZE, Batch, read_batches
from fastsnap.ensemble.rows import write_csv, write_jsonl, write_table
from fastsnap.ensemble.walking import NoPicture, pictures_of
from fastsnap.limits import choose_threads
from fastsnap.printing import ArgumentParser, OutputLost, is_lost, make_console, print_line
from fastsnap.run_folder import RunFolder

DECIDED = -1.0  # for --cascade without a number
SOME_FAILED = 1  # exit status
SILENCE_SECONDS = 30  # after which a log gets a line


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m fastsnap.predict",
        description="Ask the ensemble of a run about pictures: the most probable classes, how unsure it is (entropy), "
        "and how much its members differ (mutual information in nats, disagreement as a part of the members). The run "
        "folder is enough, its data set is not needed.",
        epilog="What cannot be decoded is named on standard error, one line each; the others go on, and the exit "
        "status is then 1.",
    )
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="picture, folder of pictures (at any depth), or -: names of either on standard input, one a line",
    )
    parser.add_argument(
        "--top", metavar="K", type=int, default=1, help="most probable classes to show (default: 1)"
    )
    parser.add_argument(
        "--cascade",
        metavar="T",
        type=float,
        nargs="?",
        const=DECIDED,
        help="ask the newest snapshot first, and others only while the most probable class has less than T, 0 to 1 "
        "(default: what ensemble_eval has decided on held-out images)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="comma-separated values instead of a table")
    form.add_argument("--jsonl", action="store_true", help="a JSON object per line instead of a table")
    add_members(parser)
    add_computing(parser, BATCH_SIZE, "fp32")
    add_data(parser)
    parser.add_argument("--version", action="version", version=f"fastsnap {__version__}")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if a picture could not be used, 2 for an error of use, 128 + signal
    if stopped by one. An output that closes counts as SIGPIPE.
    """
    options = _parser().parse_args(arguments)
    return exit_status(lambda: _predict(options))


def _predict(options: argparse.Namespace) -> int:
    for name, value in (("--top", options.top), ("--batch-size", options.batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    threads = choose_threads(options.threads).count
    torch.set_num_threads(threads)
    ensemble = load_ensemble(
        options.run,
        snapshots=options.snapshots,
        last=options.last,
        device=choose_device(options.device),
        precision=options.precision,
        data=options.data,
    )
    threshold = _threshold(options, ensemble)
    output, complaints = make_console(), Complaints()
    found = complaints.without_faults(pictures_of(options.paths))
    write = write_csv if options.csv else write_jsonl if options.jsonl else write_table
    # On a terminal the rows themselves are the progress.
    with Progress(
        TextColumn("predicting"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=complaints.console,
        transient=True,
        disable=output.is_terminal or not complaints.console.is_terminal,
    ) as progress:
        task = progress.add_task("predicting", total=None)
        widths: dict[str, int] = {}
        for batch in read_batches(ensemble.preprocessing, found, options.batch_size, threads):
            named = complaints.usable(ensemble, batch, threshold)
            if named:
                write(output, *named, options.top, widths)
            if is_lost(output):
                raise OutputLost
            progress.update(task, completed=complaints.looked_at)
            complaints.break_silence()
    complaints.sum_up()
    return SOME_FAILED if complaints.failed else 0


def _threshold(options: argparse.Namespace, ensemble: Ensemble) -> float | None:
    """Of the cascade that is asked for; None without one. Raises ValueError where none was decided."""
    asked = options.cascade
    if asked is None or len(ensemble.members) == 1:
        return None
    if asked != DECIDED:
        if not 0 <= asked <= 1:
            raise ValueError(f"--cascade must be from 0 to 1, got {asked}")
        return asked
    decision = None
    if options.last is None and options.snapshots is None:
        decision = read_decision(RunFolder(options.run))
    if decision is None or decision.threshold is None:
        raise ValueError(
            "no threshold was decided for these snapshots: give one, such as --cascade 0.9, or train with --validation "
            "N and evaluate the run"
        )
    return decision.threshold


class Complaints:
    """What is said on standard error: a line for what cannot be used, and how far it is where nothing else says it."""

    def __init__(self) -> None:
        self.console = make_console(stderr=True)
        self.failed = self.looked_at = 0
        self.answered = self.asked = 0  # images of a cascade, and the forward passes that they took together
        self._line_time = time.monotonic()

    def without_faults(self, found: Iterator[str | NoPicture]) -> Iterator[str]:
        """The names; what is none is named."""
        for name in found:
            if isinstance(name, NoPicture):
                self._complain(name.reason)
            else:
                yield name

    def usable(
        self, ensemble: Ensemble, batch: Batch, threshold: float | None
    ) -> tuple[list[str], Predictions] | None:
        """The names of the pictures that could be decoded, and what the ensemble says of them; None without any."""
        names, arrays = [], []
        for picture, pixels in batch:
            if isinstance(pixels, ValueError):
                self._complain(str(pixels))
            else:
                names.append(str(picture))
                arrays.append(pixels)
        self.looked_at += len(batch)
        if not names:
            return None
        predictions = ensemble.describe(torch.from_numpy(np.stack(arrays)), threshold=threshold)
        if predictions.asked is not None:
            self.answered += len(predictions)
            self.asked += int(predictions.asked.sum())
        return names, predictions

    def break_silence(self) -> None:
        """A line now and then, where there is no bar."""
        if not self.console.is_terminal and time.monotonic() - self._line_time >= SILENCE_SECONDS:
            self._line_time = time.monotonic()
            print_line(self.console, f"{self.looked_at:,} images")

    def sum_up(self) -> None:
        """Where something failed, how much; what a cascade saved."""
        if self.answered:
            print_line(self.console, f"{self.asked / self.answered:.2f} forward passes per image")
        if self.failed:
            print_line(self.console, f"{self.failed:,} could not be used; of {self.looked_at:,} images")

    def _complain(self, reason: str) -> None:
        self.failed += 1
        print_line(self.console, f"error: {reason}")


if __name__ == "__main__":
    sys.exit(main())
