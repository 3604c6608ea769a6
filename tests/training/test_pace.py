"""When steps have become slow enough for a line, with made-up times."""

from collections.abc import Iterable

from fastsnap.training.pace import SLOW_SECONDS, WINDOW_STEPS, Pace


def told(windows: Iterable[float]) -> list[tuple[int, float]]:
    """Windows in which a line was due, with its factor; each is given by its seconds per step."""
    pace, time, found = Pace(0, 0.0), 0.0, []
    for number, seconds in enumerate(windows, start=1):
        time += seconds * WINDOW_STEPS
        factor = pace.look(number * WINDOW_STEPS, time)
        if factor is not None:
            found.append((number, round(factor, 6)))
    return found


LONG = SLOW_SECONDS / WINDOW_STEPS  # seconds per step of a window that is long enough by itself


def test_steady_steps_are_worth_no_line() -> None:
    assert told([LONG] * 20) == []
    assert told([0.01, 0.012, 0.02, 0.029] * 10_000) == []


def test_slow_steps_are_told_once_and_how_slow() -> None:
    assert told([LONG / 40, LONG / 40, LONG, LONG, LONG]) == [(3, 40.0)]


def test_what_counts_is_the_fastest_so_far() -> None:
    assert told([LONG, LONG / 10, LONG / 5, LONG]) == [(4, 10.0)]


def test_a_short_disturbance_is_worth_no_line() -> None:
    assert told([LONG / 40, LONG * 0.9, LONG / 40, LONG * 0.9]) == []
    assert told([LONG / 40, LONG * 0.9, LONG * 0.9]) == [(3, 36.0)]


def test_what_is_left_out_does_not_count() -> None:
    pace = Pace(0, 0.0)
    assert pace.look(WINDOW_STEPS, 1.0) is None
    pace.restart(WINDOW_STEPS, 100.0)  # 99 seconds of saving
    assert pace.look(2 * WINDOW_STEPS, 101.0) is None


def test_few_steps_are_no_measure() -> None:
    pace = Pace(0, 0.0)
    assert pace.look(WINDOW_STEPS, 1.0) is None
    assert pace.look(WINDOW_STEPS + 1, 100.0) is None
