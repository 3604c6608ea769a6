"""Stopping a training run in order: SIGTERM and Ctrl-C become requests that the loop answers after its step."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingStopped(Exception):
    """SIGTERM or Ctrl-C arrived: `signal_number` says which, the text also what was saved, if anything was."""

    def __init__(self, signal_number: int, saved: str | None = None) -> None:
        super().__init__(signal.Signals(signal_number).name + (f"; {saved}" if saved else ""))
        self.signal_number = signal_number


@dataclass
class StopRequest:
    """The signal that arrived, or None."""

    signal_number: int | None = None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn the first SIGTERM or Ctrl-C into a request to stop; a second one does what it would have done outside."""
    request = StopRequest()
    outside = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        for known, handler in outside.items():
            signal.signal(known, handler)

    with _handled_by(ask):
        yield request


@contextmanager
def stop_signals_raised() -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into TrainingStopped, wherever the process is."""

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
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
