"""The update on a GPU: one Triton launch for all tensors, one program for each chunk of at most CHUNK elements."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .schedule import STEP_DECAY
from .schedule_triton import next_rate, rate_kernel, store_rate
from .update import Layout, Rule, State, capturing

BLOCK = 1024  # elements that a program handles at a time
WARPS = 8
CAPTURES_SET_ASIDE = 4  # how many captures may follow each other without an update outside of one
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ALIGNMENT = tl.constexpr(16)  # elements, of every tensor in the flat tensors


@triton.jit
def update_kernel(
    chunks,  # int64 [programs, 4]: tensor, start in the tensor, start in the flat tensors, length
    addresses,  # int64 [tensors], of the gradients; 0: none
    factors,  # fp32 [tensors, 2]: weight decay, and what the rate is multiplied by
    weights,  # fp32 or bf16 [numel]
    momentum,  # fp32 [numel]
    copy,  # bf16 [numel] or None
    average,  # fp32 [numel] or None
    clock,  # int64 [3]
    rate,  # fp32 [1]
    shown,  # fp32 [groups, 2]: what the rate is multiplied by; written here: the rate of the group
    scale,  # fp32 [] or None
    found_inf,  # fp32 [] or None
    groups,
    steps,
    cycles,
    learning_rate,
    momentum_coefficient,
    average_decay,  # how much of the average decays: 1 - rule.average_decay, which fp32 could not compute exactly
    GRADIENT: tl.constexpr,
    NESTEROV: tl.constexpr,
    STEP_SCHEDULE: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
    MASTER: tl.constexpr,  # `copy` holds the parameters, `weights` their values in fp32
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 4 * program)
    begin = tl.multiple_of(tl.load(chunks + 4 * program + 1), ALIGNMENT)
    flat = tl.multiple_of(tl.load(chunks + 4 * program + 2), ALIGNMENT)
    length = tl.load(chunks + 4 * program + 3)
    address = tl.load(addresses + tensor)
    now = tl.load(rate)
    applied = now > 0.0  # 0: past the schedule, which the host cannot know of while a CUDA graph is replayed
    if found_inf is not None:
        applied = applied & (tl.load(found_inf) == 0.0)
    if applied:
        decay = tl.load(factors + 2 * tensor)
        now = now * tl.load(factors + 2 * tensor + 1)
        inverse_scale = 1.0 if scale is None else 1.0 / tl.load(scale)
        # Flat tensors are padded with zeros up to ALIGNMENT, so their accesses are always whole vectors.
        padded = tl.multiple_of((length + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT, ALIGNMENT)
        gradient = address.to(tl.pointer_type(GRADIENT)) + begin
        whole = (address % 16 == 0) & (length % ALIGNMENT == 0)
        for first in range(0, length, BLOCK):
            index = first + tl.arange(0, BLOCK)
            inside = index < padded
            weight = tl.load(weights + flat + index, mask=inside, other=0.0).to(tl.float32)
            if (
                MASTER
            ):  # a parameter that no longer is its master value rounded was written by others: it counts
                parameter = tl.load(copy + flat + index, mask=inside, other=0.0).to(tl.float32)
                weight = tl.where(weight.to(tl.bfloat16).to(tl.float32) == parameter, weight, parameter)
            if address != 0:
                if whole:
                    g = tl.load(tl.multiple_of(gradient, 16) + index, mask=inside, other=0.0).to(tl.float32)
                else:
                    g = tl.load(gradient + index, mask=index < length, other=0.0).to(tl.float32)
                velocity = tl.load(momentum + flat + index, mask=inside, other=0.0)
                direction = tl.fma(weight, decay, g * inverse_scale)
                velocity = tl.fma(velocity, momentum_coefficient, direction)
                move = tl.fma(velocity, momentum_coefficient, direction) if NESTEROV else velocity
                stored = tl.fma(move, -now, weight).to(weights.dtype.element_ty)
                tl.store(momentum + flat + index, velocity, mask=inside)
                tl.store(weights + flat + index, stored, mask=inside)
                weight = stored.to(tl.float32)
            elif MASTER:
                tl.store(weights + flat + index, weight, mask=inside)
            if copy is not None:
                tl.store(copy + flat + index, weight.to(tl.bfloat16), mask=inside)
            if average is not None:
                share = tl.maximum(1.0 / (tl.load(clock + 1) + 1).to(tl.float32), average_decay)
                mean = tl.load(average + flat + index, mask=inside, other=0.0)
                tl.store(average + flat + index, tl.fma(weight - mean, share, mean), mask=inside)
    # The last program to finish turns the clock. All its warps, and all other programs, have read it by then.
    tl.debug_barrier()
    finished = tl.atomic_add(clock + 2, 1)
    if finished == tl.num_programs(0) - 1:
        step = tl.minimum(tl.load(clock) + 1, steps)
        tl.store(clock, step)
        tl.store(clock + 2, 0)
        if average is not None:
            tl.store(clock + 1, tl.load(clock + 1) + applied)
        store_rate(next_rate(step, steps, cycles, learning_rate, STEP_SCHEDULE, DECAY), rate, shown, groups)


class TritonUpdate:
    """`reference_update` as one launch, bound to the tensors of a run, safe to capture in a CUDA graph.

    The kernel finds the gradients through a table of their addresses on the device. Outside a capture the table is
    copied there when an address has changed since the last update; the copy comes from fresh pinned memory, which
    PyTorch's allocator does not give out again before the copy is done. A captured copy is repeated by every replay,
    so each capture gets a table and pinned memory of its own, which nobody else writes to and which live as long as
    this object. They are set aside beforehand, because pinned memory cannot be allocated during a capture.
    (The replays' copies, 8 bytes per tensor, are the price of safety: a copy beside the capture would have to be done
    before the first replay, on whatever stream that runs, and a capture can wait for nothing outside of itself.)
    """

    def __init__(
        self, state: State, rule: Rule, layout: Layout, factors: Tensor, shown: Tensor | None = None
    ) -> None:
        """What each update reads, and shows.

        factors  fp32 [tensors, 2], weight decay and scale of the rate of each
        shown    fp32 [groups, 2], scale of the rate of each group; written: its rate in the next update
        """
        self._state, self._rule, self._factors = state, rule, factors
        self._shown = (
            torch.empty(0, 2, dtype=torch.float32, device=factors.device) if shown is None else shown
        )
        self._calls = 0  # no more than the clock says: replays of a CUDA graph are not seen here
        device = state.weights.device
        self._chunks = layout.chunks().to(device)
        self._table = torch.zeros(len(layout.sizes), dtype=torch.int64, device=device)
        self._in_table = [0] * len(layout.sizes)
        self._set_aside: list[tuple[Tensor, Tensor]] = []
        self._captured: list[tuple[Tensor, Tensor]] = []

    def __call__(
        self,
        gradients: Sequence[Tensor | None],
        gradient_dtype: torch.dtype,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> Tensor:
        """Update from dense gradients, one per tensor or None, all of `gradient_dtype`; returns the next rate.

        Raises ValueError if all updates of the schedule are done, as far as the host knows without waiting for the
        device; past them, the kernel changes nothing.
        """
        addresses = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        device = self._state.weights.device
        with _current(device):
            captured = capturing(device)
            if not captured:
                self._rule.schedule.check(self._calls)
                self._calls += 1
            table = self._captured_table(addresses) if captured else self._current_table(addresses)
            self._launch(table, DTYPES[gradient_dtype], scale, found_inf)
        return self._state.rate[0]

    def _launch(self, table: Tensor, gradient: Any, scale: Tensor | None, found_inf: Tensor | None) -> None:
        state, rule, schedule = self._state, self._rule, self._rule.schedule
        update_kernel[(len(self._chunks),)](
            self._chunks,
            table,
            self._factors,
            state.weights,
            state.momentum,
            state.copy,
            state.average,
            state.clock,
            state.rate,
            self._shown,
            scale,
            found_inf,
            len(self._shown),
            schedule.steps,
            schedule.cycles,
            schedule.learning_rate,
            rule.momentum,
            1.0 - (rule.average_decay or 0.0),
            GRADIENT=gradient,
            NESTEROV=rule.nesterov,
            STEP_SCHEDULE=schedule.kind == "step",
            DECAY=STEP_DECAY,
            BLOCK=BLOCK,
            MASTER=state.master,
            num_warps=WARPS,
        )

    def seek(self, updates: int, averaged: int) -> Tensor:
        """Go on as after `updates` updates, `averaged` of them in the average; returns the next rate.

        Raises ValueError for more updates than the schedule has.
        """
        state, schedule = self._state, self._rule.schedule
        schedule.rate_after(updates)
        self._calls = updates
        state.clock.copy_(torch.tensor([updates, averaged, 0], dtype=torch.int64, device="cpu"))
        with _current(state.clock.device):
            rate_kernel[(1,)](
                state.clock,
                state.rate,
                self._shown,
                len(self._shown),
                schedule.steps,
                schedule.cycles,
                schedule.learning_rate,
                STEP_SCHEDULE=schedule.kind == "step",
                DECAY=STEP_DECAY,
            )
        return state.rate[0]

    def _current_table(self, addresses: list[int]) -> Tensor:
        if self._table.is_cuda:
            while len(self._set_aside) < CAPTURES_SET_ASIDE:
                pinned = torch.empty(len(addresses), dtype=torch.int64, device="cpu", pin_memory=True)
                self._set_aside.append((pinned, torch.empty_like(self._table)))
        if addresses != self._in_table:
            self._table.copy_(_host_table(addresses, self._table.is_cuda), non_blocking=True)
            self._in_table = addresses
        return self._table

    def _captured_table(self, addresses: list[int]) -> Tensor:
        if not self._set_aside:
            raise RuntimeError("call step() once outside of the capture: it sets memory aside for captures")
        pinned, table = self._set_aside.pop()
        self._captured.append((pinned, table))
        pinned.copy_(_host_table(addresses, pinned=False))
        return table.copy_(pinned, non_blocking=True)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the one of the parameters."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _host_table(addresses: list[int], pinned: bool) -> Tensor:
    table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
    return table.pin_memory() if pinned else table
