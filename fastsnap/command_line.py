"""What the commands share: arguments with one meaning everywhere, and exit statuses."""

import argparse
import contextlib
import io
import signal
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from fastsnap.device import DEVICES, PRECISION_HELP, PRECISIONS
from fastsnap.limits import THREADS_HELP
from fastsnap.printing import OutputLost, print_error, print_failure
from fastsnap.training.joining import join_ranks
from fastsnap.training.ranks import Ranks, RanksLost
from fastsnap.training.stopping import TrainingStopped, stop_signals_raised

Parsed = TypeVar("Parsed")


def exit_status(work: Callable[[], int]) -> int:
    """What `work` returns; 2 for an error of use, which is printed, 128 + signal if stopped by one. An output that
    closes counts as SIGPIPE.
    """
    return _reported(lambda _: until_stopped(work), Ranks)


def until_stopped(work: Callable[[], int]) -> int:
    """What `work` returns; 128 + signal if stopped by one."""
    try:
        with stop_signals_raised():
            return work()
    except OutputLost:
        return 128 + signal.SIGPIPE
    except TrainingStopped as stopped:
        print_error(f"stopped by {stopped}")
        return 128 + stopped.signal_number


def on_ranks(work: Callable[[Ranks], int]) -> int:
    """What `work` returns on this process's rank among those that torchrun started; errors as in `exit_status`, 1 for
    lack of memory and for lost ranks. Of all ranks that fail, one prints why.
    """
    return _reported(work, join_ranks)


def _reported(work: Callable[[Ranks], int], join: Callable[[], Ranks]) -> int:
    ranks = Ranks()
    try:
        ranks = join()
        status = work(ranks)
        if not status:
            ranks.close()
        return status
    except RanksLost as lost:
        text = ranks.explain(lost)
        if ranks.speaks_of_failure():
            print_error(f"error: {text}")
        return 1
    except ValueError as error:
        if ranks.speaks_of_failure():
            print_failure(error, ranks.name)
        return 2
    except Exception as error:
        if not is_out_of_memory(error) and ranks.count == 1:
            raise
        if ranks.speaks_of_failure():
            _print_fault(error, ranks)
        return 1


def _print_fault(error: Exception, ranks: Ranks) -> None:
    if is_out_of_memory(error):
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        print_error(
            f"error: out of memory{ranks.name} ({reason}): use a smaller --batch-size, or a smaller network"
        )
        return
    print_error(f"error: a fault of the program{ranks.name}:")
    traceback.print_exception(error)


def is_out_of_memory(error: Exception) -> bool:
    """PyTorch's allocator for the CPU has no kind of error of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def parsed_once(parse: Callable[[], Parsed], ranks: Ranks) -> Parsed:
    """What `parse` returns; what argparse prints before it exits, errors and help, is printed by one rank only."""
    if ranks.count == 1:
        return parse()
    said, failed = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(failed):
            return parse()
    except SystemExit:
        if ranks.speaks_of_failure():
            sys.stdout.write(said.getvalue())
            sys.stderr.write(failed.getvalue())
        raise


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
        "--last",
        metavar="m",
        type=int,
        help="the last m snapshots, equal weights (default: what ensemble_eval has decided on held-out images; all, "
        "equal weights, where nothing was decided)",
    )
    which.add_argument(
        "--snapshots",
        metavar="N,N,...|all",
        type=lambda text: "all" if text == "all" else snapshot_numbers(text),
        help="these snapshots, numbered from 1, equal weights",
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
