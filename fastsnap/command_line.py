"""What the commands share: arguments with one meaning everywhere, and exit statuses."""

import argparse
import signal
from collections.abc import Callable

from fastsnap.device import DEVICES, PRECISION_HELP, PRECISIONS
from fastsnap.limits import THREADS_HELP
from fastsnap.printing import OutputLost, print_error, print_failure
from fastsnap.training.stopping import TrainingStopped, stop_signals_raised


def exit_status(work: Callable[[], int]) -> int:
    """What `work` returns; 2 for an error of use, which is printed, 128 + signal if stopped by one. An output that
    closes counts as SIGPIPE.
    """
    try:
        with stop_signals_raised():
            return work()
    except OutputLost:
        return 128 + signal.SIGPIPE
    except TrainingStopped as stopped:
        print_error(f"stopped by {stopped}")
        return 128 + stopped.signal_number
    except ValueError as error:
        print_failure(error)
        return 2


def snapshot_numbers(text: str) -> list[int]:
    """For argparse: "3,5"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be numbers separated by commas, such as 3,5; got {text!r}"
        ) from None


def add_members(parser: argparse.ArgumentParser) -> None:
    """--last and --snapshots: which members."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--last", metavar="m", type=int, help="the last m snapshots only (default: all that are saved)"
    )
    which.add_argument(
        "--snapshots", metavar="N,N,...", type=snapshot_numbers, help="these snapshots only, numbered from 1"
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """--data, which only runs of version 0.1.0 need."""
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder that holds the data sets, for a run of version 0.1.0, which did not save its classes",
    )


def add_computing(parser: argparse.ArgumentParser, batch_size: int, precision: str, note: str = "") -> None:
    """--batch-size, --device, --precision and --threads.

    batch_size, precision  the defaults
    note                   more about the precision
    """
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, help=f"images per forward pass (default: {batch_size})"
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="auto: CUDA if there is one (default: auto)"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=precision,
        help=f"of the forward passes{note}; {PRECISION_HELP} (default: {precision})",
    )
    parser.add_argument("--threads", type=int, help=THREADS_HELP)
