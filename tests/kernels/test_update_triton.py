"""The Triton update kernel in Triton's interpreter, against the reference."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from update_cases import Case, cases, check_against_reference, layout_of, plain_factors, state_of

from fastsnap.kernels.schedule import Schedule
from fastsnap.kernels.update import Rule, State
from fastsnap.kernels.update_triton import TritonUpdate


@settings(max_examples=100)
@given(cases(largest=6000, masters=False))
def test_agrees_with_the_reference(case):
    check_against_reference(case, TritonUpdate)


PLAIN = Case(
    sizes=(1,),
    weights=torch.float32,
    gradients=torch.float32,
    schedule=Schedule("snapshot", 20, 3, 0.2),
    momentum=0.9,
    nesterov=True,
    copy=False,
    average_decay=None,
    scaled=False,
    seed=0,
)
RULE = Rule(PLAIN.schedule, 0.9, True)
SCHEDULES = [
    Schedule("snapshot", 1, 1, 0.2),
    Schedule("snapshot", 7, 7, 0.2),
    Schedule("snapshot", 20, 3, 0.2),
    Schedule("snapshot", 10**9 + 7, 5, 0.2),  # (step + 1) * cycles does not fit in 32 bits
    Schedule("step", 20, 3, 0.1),
    Schedule("step", 3, 1, 0.1),
    Schedule("step", 10**9, 1, 0.1),  # 3 * steps does not fit in 32 bits
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_rate_and_clock_on_the_device_follow_the_schedule(schedule):
    layout = layout_of((1,))
    state = state_of(dataclasses.replace(PLAIN, schedule=schedule), layout)
    update = TritonUpdate(state, Rule(schedule, 0.9, True), layout, plain_factors(2))
    last = schedule.steps - 1
    near_boundaries = {schedule.boundary(i) + d for i in range(schedule.cycles + 1) for d in (-2, -1, 0, 1)}
    for step in sorted({0, last // 2, 3 * schedule.steps // 4} | near_boundaries):
        if 1 <= step <= last:
            state.clock[0] = step - 1
            rate = update([None, None], torch.float32).clone()
            assert state.clock.tolist() == [step, 0, 0]
            assert rate.item() == pytest.approx(schedule.rate(step), rel=1e-6), step
            assert torch.equal(update.seek(step, 0), rate), step
    assert update.seek(schedule.steps, 0) == 0


@pytest.mark.parametrize("kind", ["snapshot", "step"])
def test_an_update_past_the_schedule_is_an_error_and_in_a_replayed_graph_changes_nothing(kind):
    rule = Rule(Schedule(kind, 2, 1, 0.1), 0.9, True, average_decay=1.0)
    layout = layout_of((64,))
    state = state_of(dataclasses.replace(PLAIN, schedule=rule.schedule, average_decay=1.0), layout)
    update = TritonUpdate(state, rule, layout, plain_factors(2))
    for _ in range(2):
        update([torch.ones(64), None], torch.float32)
    before = [tensor.clone() for tensor in (state.weights, state.momentum, state.average, state.clock)]
    with pytest.raises(ValueError, match="got 2: the schedule has 2 updates"):
        update([torch.ones(64), None], torch.float32)
    update.seek(1, 1)
    state.clock[0] = 2  # as after a replay, which the host does not see
    state.clock[1] = 2
    state.rate.zero_()
    assert update([torch.ones(64), None], torch.float32) == 0
    assert all(map(torch.equal, before, (state.weights, state.momentum, state.average, state.clock)))


def test_the_rate_of_every_group_is_shown():
    layout = layout_of((3, 5))
    state = state_of(PLAIN, layout)
    shown = torch.tensor([[1.0, 0.0], [0.25, 0.0], [3.0, 0.0]])
    factors = torch.tensor([[0.0, 0.25], [0.0, 1.0], [0.0, 3.0]])
    update = TritonUpdate(state, RULE, layout, factors, shown)
    for updates in (4, 5):
        rate = update.seek(4, 0) if updates == 4 else update([torch.ones(3), None, None], torch.float32)
        assert torch.equal(shown[:, 1], rate * shown[:, 0])
        assert rate.item() == pytest.approx(PLAIN.schedule.rate(updates), rel=1e-6)


def after_two_updates(case: Case, write: Callable[[torch.Tensor], None]) -> State:
    """The state after an update, `write` to the parameters, and an update of the first tensor alone."""
    torch.manual_seed(0)
    layout = layout_of(case.sizes)
    state = state_of(case, layout)
    state.weights.copy_(state.weights.bfloat16())
    gradients = [torch.randn(size) for size in layout.sizes]
    update = TritonUpdate(state, RULE, layout, plain_factors(len(layout.sizes), decay=0.1))
    update(gradients, torch.float32)
    write(state.weights if state.copy is None else state.copy)
    update([gradients[0], None, None], torch.float32)
    return state


def test_parameters_written_by_others_count_and_the_rest_keep_their_master_values():
    def write(parameters: torch.Tensor) -> None:
        parameters[60:64] = parameters[90:94] = torch.tensor([1.0, -2.0, 0.0, 7.0])

    expected = after_two_updates(dataclasses.replace(PLAIN, sizes=(70, 40)), write)
    masters = dataclasses.replace(PLAIN, sizes=(70, 40), weights=torch.bfloat16, master=True)
    got = after_two_updates(masters, write)
    assert torch.equal(got.weights, expected.weights)
    assert torch.equal(got.momentum, expected.momentum)
    torch.testing.assert_close(got.copy.float(), got.weights, rtol=2**-7, atol=0)
    assert not torch.equal(got.copy.float(), got.weights)


def test_the_average_is_of_the_weights_as_rounded():
    case = dataclasses.replace(PLAIN, sizes=(70,), weights=torch.bfloat16, average_decay=1.0)
    layout = layout_of(case.sizes)
    state = state_of(case, layout)
    rule = dataclasses.replace(RULE, average_decay=1.0)
    TritonUpdate(state, rule, layout, plain_factors(2))([torch.randn(70), None], torch.float32)
    assert torch.equal(state.average, state.weights.float())


def test_the_clock_turns_even_if_all_tensors_are_empty():
    layout = layout_of((0,))
    state = state_of(dataclasses.replace(PLAIN, sizes=(0,)), layout)
    rate = TritonUpdate(state, RULE, layout, plain_factors(2))([None, None], torch.float32)
    assert state.clock.tolist() == [1, 0, 0]
    assert rate.item() == pytest.approx(PLAIN.schedule.rate(1), rel=1e-6)


def test_every_gradient_alignment_gives_the_same_result():
    torch.manual_seed(0)
    gradient = torch.randn(4096)
    layout = layout_of((4096,))
    results = []
    for offset in (0, 1, 2):
        torch.manual_seed(1)
        state = state_of(PLAIN, layout)
        memory = torch.empty(4096 + 8)[offset : offset + 4096].copy_(gradient)
        TritonUpdate(state, RULE, layout, plain_factors(2))([memory, None], torch.float32)
        results.append(state.weights)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
