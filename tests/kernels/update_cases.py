"""Random inputs for the update kernels, and one comparison with the reference: shared by the CPU and GPU tests."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies
from torch import Tensor

from fastsnap.kernels.schedule import Schedule
from fastsnap.kernels.update import Layout, Rule, State, new_state, reference_update

ALIGNMENT = 16
TOLERANCES = {
    torch.float32: 2e-6,
    torch.bfloat16: 2**-7,
}  # relative to values of about 1: roundings of a few updates


@dataclass(frozen=True)
class Case:
    sizes: tuple[int, ...]
    weights: torch.dtype
    gradients: torch.dtype
    schedule: Schedule
    momentum: float
    nesterov: bool
    copy: bool
    average_decay: float | None
    scaled: bool
    seed: int
    master: bool = False


@strategies.composite
def cases(draw: Any, largest: int, *, masters: bool) -> Case:
    """Few or many tensors, from empty up to `largest` elements, of every dtype, with every option.

    masters   with fp32 master values too: not in Triton's interpreter, which rounds to bf16 otherwise than torch
    """
    size = strategies.one_of(strategies.integers(0, 40), strategies.integers(0, largest))
    weights = draw(strategies.sampled_from([torch.float32, torch.bfloat16]))
    momentum = draw(strategies.sampled_from([0.0, 0.9]))
    steps = draw(strategies.integers(1, 50))
    kind, cycles = draw(strategies.sampled_from(["snapshot", "step"])), draw(strategies.integers(1, steps))
    return Case(
        sizes=(*draw(strategies.sampled_from([(0,), (1,)])), *draw(strategies.lists(size, max_size=6))),
        weights=weights,
        gradients=draw(strategies.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        schedule=Schedule(kind, steps, cycles, 0.3),
        momentum=momentum,
        nesterov=momentum > 0 and draw(strategies.booleans()),
        copy=weights == torch.float32 and draw(strategies.booleans()),
        average_decay=draw(strategies.sampled_from([None, 1.0, 0.7, 0.999])),
        scaled=draw(strategies.booleans()),
        seed=draw(strategies.integers(0, 1000)),
        master=masters and weights == torch.bfloat16 and draw(strategies.booleans()),
    )


def layout_of(sizes: tuple[int, ...]) -> Layout:
    offsets, numel = [], 0
    for size in sizes:
        offsets.append(numel)
        numel += -(-size // ALIGNMENT) * ALIGNMENT
    return Layout((*offsets, numel), (*sizes, 0))  # the last one, empty, marks the end


def plain_factors(tensors: int, decay: float = 0.0) -> Tensor:
    """Of tensors that are updated at the schedule's own rate."""
    return torch.tensor([[decay, 1.0]] * tensors)


def state_of(case: Case, layout: Layout, device: str = "cpu") -> State:
    data = torch.zeros(layout.offsets[-1])
    for offset, size in zip(layout.offsets, layout.sizes, strict=True):
        data[offset : offset + size] = torch.randn(size)
    data = data.to(device=device, dtype=case.weights)
    state = new_state(data, bf16_copy=case.copy, master=case.master, average_decay=case.average_decay)
    state.rate.fill_(case.schedule.rate(0))
    return state


def check_against_reference(case: Case, make_update: Any, device: str = "cpu", updates: int = 4) -> State:
    """A few updates by both, with some gradients missing and, with GradScaler, one skipped; returns the state."""
    torch.manual_seed(case.seed)
    schedule = case.schedule
    rule = Rule(schedule, case.momentum, case.nesterov, case.average_decay)
    layout = layout_of(case.sizes)
    state = state_of(case, layout, device)
    expected = copy.deepcopy(state)
    factors = torch.rand(len(layout.sizes), 2, device=device) * torch.tensor([0.1, 2.0], device=device)
    update = make_update(state, rule, layout, factors)
    for step in range(min(updates, schedule.steps)):
        if case.master and step > 0:
            _write_parameters(state, expected)
        gradients = [_gradient(case, size, device) for size in layout.sizes]
        scale = torch.tensor(8.0, device=device) if case.scaled else None
        found_inf = torch.tensor(float(step == 2), device=device) if case.scaled else None
        update(gradients, case.gradients, scale, found_inf)
        reference_update(expected, rule, layout, gradients, factors.tolist(), scale, found_inf)
        _check_close(state, expected)
    return state


def _write_parameters(state: State, expected: State) -> None:
    """As net.load_state_dict does: new values into some parameters, behind the back of the optimizer."""
    assert state.copy is not None
    assert expected.copy is not None
    written = torch.randn(state.copy.shape).to(state.copy)
    chosen = (torch.rand(written.shape) < 0.3).to(written.device) & (
        state.copy != 0
    )  # the padding stays zero
    for one in (state.copy, expected.copy):
        one[chosen] = written[chosen]


def _gradient(case: Case, size: int, device: str) -> Tensor | None:
    missing = torch.rand(()) < 0.2
    gradient = torch.randn(size + 1).to(case.gradients).to(device)[1:]  # starts where no vector may
    return None if missing else gradient if torch.rand(()) < 0.5 else gradient.clone()


def _check_close(state: State, expected: State) -> None:
    assert state.clock.tolist() == expected.clock.tolist()
    torch.testing.assert_close(state.rate, expected.rate, rtol=1e-6, atol=0)
    for name in ("weights", "momentum", "copy", "average"):
        got, wanted = getattr(state, name), getattr(expected, name)
        if wanted is not None:
            tolerance = TOLERANCES[torch.bfloat16 if name == "copy" else expected.weights.dtype]
            torch.testing.assert_close(
                got, wanted, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )
            wanted.copy_(got)  # the next update starts from the same values
