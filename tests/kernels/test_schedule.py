"""The cycle plan: integer boundaries, annealed cycle ends, the standard schedule."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastsnap.kernels.schedule import Schedule

plans = st.integers(1, 5000).flatmap(lambda steps: st.tuples(st.just(steps), st.integers(1, min(steps, 64))))


@given(plans)
def test_cycles_partition_the_steps(plan: tuple[int, int]) -> None:
    steps, cycles = plan
    schedule = Schedule("snapshot", steps, cycles, 0.2)
    boundaries = [schedule.boundary(cycle) for cycle in range(cycles + 1)]
    assert boundaries[0] == 0
    assert boundaries[-1] == steps
    lengths = [end - start for start, end in itertools.pairwise(boundaries)]
    assert max(lengths) - min(lengths) <= 1
    for step in {0, steps - 1, *boundaries[1:-1], *(end - 1 for end in boundaries[1:])}:
        cycle = schedule.cycle(step)
        assert boundaries[cycle] <= step < boundaries[cycle + 1]


@given(plans)
def test_a_snapshot_is_due_once_a_cycle_and_at_the_last_step(plan: tuple[int, int]) -> None:
    steps, cycles = plan
    schedule = Schedule("snapshot", steps, cycles, 0.2)
    due = [step for step in range(steps) if schedule.ends_cycle(step)]
    assert len(due) == cycles
    assert due[-1] == steps - 1


def test_rate_is_equation_2_when_the_cycles_divide_the_steps() -> None:
    steps, cycles, initial_rate = 1000, 5, 0.2
    schedule = Schedule("snapshot", steps, cycles, initial_rate)
    length = math.ceil(steps / cycles)
    for t in range(1, steps + 1):  # the paper counts from 1
        expected = initial_rate / 2 * (math.cos(math.pi * ((t - 1) % length) / length) + 1)
        assert schedule.rate(t - 1) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@given(plans)
def test_every_cycle_falls_from_the_initial_rate_and_ends_annealed(plan: tuple[int, int]) -> None:
    steps, cycles = plan
    schedule = Schedule("snapshot", steps, cycles, 0.2)
    for cycle in range(cycles):
        start, end = schedule.boundary(cycle), schedule.boundary(cycle + 1)
        assert schedule.rate(start) == 0.2
        last_phase = (end - start - 1) / (end - start)
        assert schedule.rate(end - 1) == pytest.approx(0.1 * (math.cos(math.pi * last_phase) + 1))
        rates = [schedule.rate(step) for step in range(start, min(end, start + 50))]
        assert rates == sorted(rates, reverse=True)


def test_standard_schedule_drops_tenfold_at_half_and_three_quarters() -> None:
    schedule = Schedule("step", 7, 3, 0.1)
    rates = [schedule.rate(step) for step in range(7)]
    # 50 % of 7 steps is 3.5 and 75 % is 5.25: the first whole steps past them are 4 and 6.
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001])
    assert [step for step in range(7) if schedule.ends_cycle(step)] == [1, 3, 6]


@given(plans)
def test_a_step_outside_of_the_schedule_is_an_error(plan: tuple[int, int]) -> None:
    steps, cycles = plan
    schedule = Schedule("snapshot", steps, cycles, 0.2)
    for step in (-1, steps, steps + 1):
        for function in (schedule.rate, schedule.cycle, schedule.ends_cycle):
            with pytest.raises(ValueError, match=f"step must be from 0 to {steps - 1}, got {step}"):
                function(step)
    assert schedule.rate_after(steps - 1) == schedule.rate(steps - 1)
    assert schedule.rate_after(steps) == 0
    with pytest.raises(ValueError, match="to train for longer"):
        schedule.rate_after(steps + 1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("cosine", 10, 2, 0.1), "schedule"),
        (("snapshot", 0, 1, 0.1), "steps"),
        (("snapshot", 10, 0, 0.1), "cycles"),
        (("snapshot", 10, 11, 0.1), "cycles"),
        (("snapshot", 10, 2, 0.0), "learning rate"),
        (("snapshot", 10, 2, -0.1), "learning rate"),
        (("snapshot", 10, 2, math.nan), "learning rate"),
        (("snapshot", 10, 2, math.inf), "learning rate"),
    ],
)
def test_bad_values_are_named(arguments: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Schedule(*arguments)
