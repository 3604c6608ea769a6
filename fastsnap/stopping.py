"""Stopping a training run in order: SIGTERM and Ctrl-C become requests that the loop answers after its step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class TrainingStopped(Exception):
    """SIGTERM or Ctrl-C arrived, and a checkpoint was saved; `signal_number` says which."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


@dataclass
class StopRequest:
    """The signal that arrived, or None."""

    signal_number: int | None = None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn the first SIGTERM or Ctrl-C into a request to stop; a second one ends the process at once."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal_number = number
        for known, handler in handlers.items():
            signal.signal(known, handler)

    for number in handlers:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
