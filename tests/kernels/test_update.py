"""The update kernel of the CPU against the reference, and the reference against fp64."""

import dataclasses

import pytest
import torch
from hypothesis import given
from update_cases import Case, cases, check_against_reference, layout_of, plain_factors, state_of

from fastsnap.kernels.schedule import Schedule
from fastsnap.kernels.update import CHUNK, Layout, Rule, reference_update
from fastsnap.kernels.update_cpu import CpuUpdate
from fastsnap.kernels.update_plain import PlainUpdate

PLAIN = Case(
    sizes=(5, 4096, 10_001),
    weights=torch.float32,
    gradients=torch.float32,
    schedule=Schedule("snapshot", 20, 3, 0.3),
    momentum=0.9,
    nesterov=True,
    copy=False,
    average_decay=None,
    scaled=False,
    seed=0,
)
RULE = Rule(PLAIN.schedule, 0.9, True)


@pytest.mark.needs_library
@given(cases(largest=10_000, masters=True))
def test_agrees_with_the_reference(case):
    check_against_reference(case, CpuUpdate)


@given(cases(largest=1000, masters=True))
def test_the_update_without_a_kernel_agrees_with_the_reference(case):
    check_against_reference(case, PlainUpdate)


def test_reference_agrees_with_float64():
    torch.manual_seed(0)
    weight, gradient = torch.randn(1000), torch.randn(1000)
    layout = layout_of((1000,))
    state = state_of(PLAIN, layout)
    state.weights[:1000] = weight
    w, m = weight.double(), torch.zeros(1000, dtype=torch.float64)
    for step in range(10):
        reference_update(state, RULE, layout, [gradient, None], [(0.01, 0.5), (0, 1)])
        direction = gradient.double() + 0.01 * w
        m = 0.9 * m + direction
        w = w - 0.5 * PLAIN.schedule.rate(step) * (direction + 0.9 * m)
    torch.testing.assert_close(state.weights[:1000].double(), w, rtol=1e-6, atol=1e-6)


@pytest.mark.needs_library
def test_result_does_not_depend_on_the_number_of_threads():
    results = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.manual_seed(0)
        layout = layout_of(PLAIN.sizes)
        state = state_of(PLAIN, layout)
        update = CpuUpdate(state, RULE, layout, plain_factors(4))
        try:
            torch.set_num_threads(count)
            update([torch.randn(size) for size in layout.sizes], torch.float32)
        finally:
            torch.set_num_threads(threads)
        results.append(state.weights)
    assert torch.equal(*results)


@pytest.mark.needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_every_bit_pattern_are_read_as_torch_reads_them(dtype):
    gradient = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    gradient = gradient[gradient.isfinite()].clone()
    layout = layout_of((len(gradient),))
    state = state_of(PLAIN, layout)
    CpuUpdate(state, RULE, layout, plain_factors(2))([gradient, None], dtype)
    assert torch.equal(state.momentum[: len(gradient)], gradient.float())


@pytest.mark.needs_library
def test_bf16_copy_rounds_as_torch_does_and_keeps_nan():
    case = dataclasses.replace(PLAIN, copy=True)
    layout = layout_of((70_000,))
    state = state_of(case, layout)
    state.weights[:65536] = (torch.arange(65536, dtype=torch.int32) * 65537).view(torch.float32)
    update = CpuUpdate(state, RULE, layout, plain_factors(2))
    update([None, None], torch.float32)
    torch.testing.assert_close(state.copy, state.weights.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.needs_library
def test_parameters_written_by_others_count_and_the_rest_keep_their_master_values():
    case = dataclasses.replace(PLAIN, weights=torch.bfloat16, master=True)
    layout = layout_of((64,))
    state = state_of(case, layout)
    rule = dataclasses.replace(RULE, momentum=0.0, nesterov=False)
    update = CpuUpdate(state, rule, layout, plain_factors(2))
    update([torch.full((64,), 1e-5), None], torch.float32)  # less than bf16 resolves
    before = state.weights.clone()
    state.copy[:3] = torch.tensor([5.0, torch.nan, -torch.inf])
    update([None, None], torch.float32)
    torch.testing.assert_close(
        state.weights[:3], torch.tensor([5.0, torch.nan, -torch.inf]), equal_nan=True, rtol=0, atol=0
    )
    assert torch.equal(state.weights[3:], before[3:])
    assert not torch.equal(state.weights[3:], state.copy[3:].float())


@pytest.mark.needs_library
@pytest.mark.parametrize("kind", ["snapshot", "step"])
def test_an_update_past_the_schedule_is_an_error_and_changes_nothing(kind):
    rule = Rule(Schedule(kind, 2, 1, 0.1), 0.9, True, average_decay=1.0)
    layout = layout_of((64,))
    state = state_of(dataclasses.replace(PLAIN, schedule=rule.schedule, average_decay=1.0), layout)
    update = CpuUpdate(state, rule, layout, plain_factors(2))
    for _ in range(2):
        update([torch.ones(64), None], torch.float32)
    assert state.rate == 0
    before = [tensor.clone() for tensor in (state.weights, state.momentum, state.average, state.clock)]
    for past in (
        lambda: update([torch.ones(64), None], torch.float32),
        lambda: reference_update(state, rule, layout, [torch.ones(64), None], plain_factors(2).tolist()),
        lambda: update.seek(3, 0),
    ):
        with pytest.raises(ValueError, match=r"got [23]: the schedule has 2 updates"):
            past()
    assert all(map(torch.equal, before, (state.weights, state.momentum, state.average, state.clock)))


def test_chunks_cover_every_element_once():
    layout = Layout((0, 16, 16 + 3 * CHUNK), (7, 2 * CHUNK + 1, 0))
    assert layout.chunks().tolist() == [
        [0, 0, 0, 7],
        [1, 0, 16, CHUNK],
        [1, CHUNK, 16 + CHUNK, CHUNK],
        [1, 2 * CHUNK, 16 + 2 * CHUNK, 1],
    ]
    assert Layout((0, 0), (0, 0)).chunks().tolist() == [[0, 0, 0, 0]]
