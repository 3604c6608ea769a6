"""Signals become requests, and those that were ignored before stay ignored."""

import os
import signal
import threading

import pytest

from fastsnap.training.stopping import (
    INSISTING,
    STOP_SIGNALS,
    TrainingStopped,
    stop_signals,
    stop_signals_raised,
)


@pytest.fixture(autouse=True)
def heard():
    """Handlers as a program finds them, whatever the test runner was started with."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_is_a_request_and_only_insisting_interrupts(number):
    with stop_signals_raised(), stop_signals() as stop:
        assert stop.signal_number is None
        os.kill(os.getpid(), number)
        assert stop.signal_number == number
        for again in (signal.SIGHUP, signal.SIGUSR1):  # a terminal that closes may send several
            os.kill(os.getpid(), again)
        assert stop.signal_number == number
        for insisting in INSISTING:
            with pytest.raises(TrainingStopped, match=signal.Signals(insisting).name) as stopped:
                os.kill(os.getpid(), insisting)
            assert stopped.value.signal_number == insisting
    assert signal.getsignal(number) == signal.SIG_DFL


def test_what_is_ignored_stays_ignored():
    """nohup ignores SIGHUP, and a shell ignores SIGINT for what it starts in the background."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_signals_raised(), stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal_number is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_other_threads_change_nothing():
    def use() -> None:
        with stop_signals() as stop:
            found.append((signal.getsignal(signal.SIGTERM), stop.signal_number))

    found = []
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [(signal.SIG_DFL, None)]
