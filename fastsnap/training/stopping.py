"""Stopping a training run in order: signals become requests that the loop answers after its step.

SIGTERM and Ctrl-C, SIGHUP (the terminal is gone) and SIGUSR1 (what batch systems send some time before the end). One
that is ignored when the program starts, as SIGHUP is under nohup, stays ignored.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Those by which somebody insists. The others may well come twice, or after another, for one and the same reason.
INSISTING = (signal.SIGTERM, signal.SIGINT)


class TrainingStopped(Exception):
    """A stop was asked for: `signal_number` says by which signal, the text also what was saved, if anything was."""

    def __init__(self, signal_number: int, saved: str | None = None) -> None:
        super().__init__(signal.Signals(signal_number).name + (f"; {saved}" if saved else ""))
        self.signal_number = signal_number


@dataclass
class StopRequest:
    """The signal that arrived, or None."""

    signal_number: int | None = None


@contextmanager
def stop_signals(*, insisting: bool = True) -> Iterator[StopRequest]:
    """Turn the first signal into a request to stop. A second SIGTERM or Ctrl-C does what it would have done outside,
    unless `insisting` is False; a second one of the others does nothing.
    """
    request = StopRequest()
    outside = {number: signal.getsignal(number) for number in INSISTING} if insisting else {}

    def ask(number: int, frame: FrameType | None) -> None:
        if request.signal_number is None:
            request.signal_number = number
            for known, handler in outside.items():
                signal.signal(known, handler)

    with _handled_by(ask):
        yield request


@contextmanager
def stop_signals_raised() -> Iterator[None]:
    """Turn the signals into TrainingStopped, wherever the process is."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TrainingStopped(number)

    with _handled_by(stop):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Signals reach the main thread only; elsewhere this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
