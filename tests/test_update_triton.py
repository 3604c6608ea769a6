"""The Triton update kernel in Triton's interpreter, against the reference."""

import pytest
import torch
from hypothesis import given, settings
from update_cases import Case, cases, check_against_reference, layout_of, state_of

from fastsnap.kernels.update import Rule
from fastsnap.kernels.update_triton import TritonUpdate
from fastsnap.schedule import Schedule


@settings(max_examples=100)
@given(cases(largest=6000))
def test_agrees_with_the_reference(case):
    check_against_reference(case, TritonUpdate)


SCHEDULES = [
    Schedule("snapshot", 1, 1, 0.2),
    Schedule("snapshot", 7, 7, 0.2),
    Schedule("snapshot", 20, 3, 0.2),
    Schedule("snapshot", 10**9 + 7, 5, 0.2),  # (step + 1) * cycles does not fit in 32 bits
    Schedule("step", 20, 3, 0.1),
    Schedule("step", 3, 1, 0.1),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_rate_and_clock_on_the_device_follow_the_schedule(schedule):
    layout = layout_of((1,))
    case = Case((1,), torch.float32, torch.float32, schedule, 0.9, True, False, None, False, 0)
    state = state_of(case, layout)
    rule = Rule(schedule.kind, schedule.steps, schedule.cycles, schedule.learning_rate, 0.9, True)
    update = TritonUpdate(state, rule, layout, torch.zeros(2))
    last = schedule.steps - 1
    near_boundaries = {schedule.boundary(i) + d for i in range(schedule.cycles + 1) for d in (-2, -1, 0, 1)}
    for step in sorted({0, last // 2, 3 * schedule.steps // 4} | near_boundaries):
        if 0 <= step <= last:
            state.clock[0] = step - 1
            rate = update([None, None], torch.float32)
            assert state.clock.tolist() == [step, 0, 0]
            assert rate.item() == pytest.approx(schedule.rate(step), rel=1e-6), step


def test_every_gradient_alignment_gives_the_same_result():
    torch.manual_seed(0)
    gradient = torch.randn(4096)
    layout = layout_of((4096,))
    case = Case((4096,), torch.float32, torch.float32, SCHEDULES[2], 0.9, True, False, None, False, 0)
    results = []
    for offset in (0, 1, 2):
        torch.manual_seed(1)
        state = state_of(case, layout)
        rule = Rule("snapshot", 20, 3, 0.2, 0.9, True)
        memory = torch.empty(4096 + 8)[offset : offset + 4096].copy_(gradient)
        TritonUpdate(state, rule, layout, torch.zeros(2))([memory, None], torch.float32)
        results.append(state.weights)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
