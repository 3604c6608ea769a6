"""The update of SGD with (Nesterov) momentum: rate, weight decay, momentum, weights; all tensors in one launch.

Bytes per parameter with fp32 weights: read weight, momentum and gradient, write weight and momentum, which is
20 with fp32 gradients and 18 with bf16; a bf16 copy of the weights adds 2 (4 as master values' parameters, which are
also read), a running average 8.

This file is the contract and the reference; `update_cpu` and `update_triton` hold the two kernels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule import Schedule

CHUNK = 4096  # elements of one unit of work: small enough that small networks still fill a device


@dataclass(frozen=True)
class Rule:
    """What stays the same during a run. Raises ValueError for values out of range.

    schedule            the learning rate of every update, and how many there are
    momentum, nesterov  momentum coefficient; dampening is 0
    average_decay       None: no running average of the weights; 1: the mean over all updates (SWA); below 1:
                        exponential (EMA), a plain mean until 1 / (1 - decay) updates are in it
    """

    schedule: Schedule
    momentum: float
    nesterov: bool
    average_decay: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0, got 0: pass nesterov=False for plain SGD")
        if self.average_decay is not None and not 0 < self.average_decay <= 1:
            raise ValueError(f"average_decay must be above 0 and at most 1, got {self.average_decay}")


@dataclass(frozen=True)
class State:
    """What an update changes: flat tensors of one size, and the clock; all on one device.

    weights    fp32 or bf16
    momentum   fp32
    copy       bf16 or None: fp32 weights rounded
    master     whether `copy` is the network's parameters, and `weights` their values in fp32. Where somebody has
               written another value into `copy` since the last update, the next one goes on from that value
    average    fp32 or None: running average of the weights
    clock      int64 [3]: updates done, updates in the average, programs of the running launch that have finished
    rate       fp32 [1]: learning rate of the next update; 0 after the last
    """

    weights: Tensor
    momentum: Tensor
    copy: Tensor | None
    average: Tensor | None
    clock: Tensor
    rate: Tensor
    master: bool = False


@dataclass(frozen=True)
class Layout:
    """Where the tensors lie in the flat tensors: start and size of each, in elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def chunks(self) -> Tensor:
        """int64 [chunks, 4], on the CPU: tensor, start in it, start in the flat tensors, length (at most CHUNK).

        At least one, of length 0 if all tensors are empty: a launch needs a program, which then turns the clock.
        """
        return torch.tensor(list(self._chunks()) or [(0, 0, 0, 0)], dtype=torch.int64, device="cpu")

    def _chunks(self) -> Iterator[tuple[int, int, int, int]]:
        for tensor, (offset, size) in enumerate(zip(self.offsets, self.sizes, strict=True)):
            for begin in range(0, size, CHUNK):
                yield tensor, begin, offset + begin, min(CHUNK, size - begin)


def new_state(data: Tensor, bf16_copy: bool, master: bool, average_decay: float | None) -> State:
    """State before the first update of the flat parameters `data`; the arguments are SnapshotSGD's."""
    rounded = data.dtype == torch.bfloat16
    if rounded and bf16_copy:
        raise ValueError("bf16_copy=True is for float32 parameters, got bfloat16 ones")
    return State(
        weights=data.float() if rounded and master else data,
        momentum=torch.zeros_like(data, dtype=torch.float32),
        copy=data if rounded and master else data.bfloat16() if bf16_copy else None,
        average=None if average_decay is None else torch.zeros_like(data, dtype=torch.float32),
        clock=torch.zeros(3, dtype=torch.int64, device=data.device),
        rate=torch.zeros(1, dtype=torch.float32, device=data.device),
        master=rounded and master,
    )


def take_over_parameters(state: State) -> None:
    """With master values: go on from the parameters where they no longer are the master values rounded."""
    if state.master and state.copy is not None:
        unchanged = state.weights.bfloat16() == state.copy
        state.weights.copy_(torch.where(unchanged, state.weights, state.copy.float()))


def capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def reference_update(
    state: State,
    rule: Rule,
    layout: Layout,
    gradients: Sequence[Tensor | None],
    factors: Sequence[Sequence[float]],
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One update in plain PyTorch, tensor by tensor: what both kernels are tested against.

    gradients   one per tensor, dense, in the memory order of the weights; None leaves the tensor as it is
    factors     of each tensor: its weight decay, and what the schedule's rate is multiplied by
    scale       fp32 [] or None: divides the gradients; found_inf: fp32 [] or None: not 0 skips the update, while
                the schedule goes on (both are torch.amp.GradScaler's)
    Raises ValueError if all updates of the schedule are done.
    """
    rule.schedule.check(int(state.clock[0]))
    if found_inf is None or not found_inf.item():
        take_over_parameters(state)
        inverse_scale = 1.0 if scale is None else 1.0 / scale.item()
        for offset, gradient, (decay, rate_scale) in zip(layout.offsets, gradients, factors, strict=True):
            if gradient is not None:
                rate = state.rate.item() * rate_scale
                _update_tensor(state, rule, offset, gradient, decay, rate, inverse_scale)
        _update_copies(state, rule)
    state.clock[0] += 1
    state.rate.fill_(rule.schedule.rate_after(int(state.clock[0])))


def _update_tensor(
    state: State, rule: Rule, offset: int, gradient: Tensor, decay: float, rate: float, inverse_scale: float
) -> None:
    """Weight decay, momentum and step of one tensor in fp32, in the order of torch.optim.SGD."""
    segment = slice(offset, offset + gradient.numel())
    weights, momentum = state.weights[segment].float(), state.momentum[segment]
    in_memory_order = gradient.as_strided((gradient.numel(),), (1,)).float()
    direction = (in_memory_order * inverse_scale).add(weights, alpha=decay)
    momentum.mul_(rule.momentum).add_(direction)
    move = direction.add(momentum, alpha=rule.momentum) if rule.nesterov else momentum
    state.weights[segment] = weights.add(move, alpha=-rate).to(state.weights.dtype)


def _update_copies(state: State, rule: Rule) -> None:
    if state.copy is not None:
        state.copy.copy_(state.weights)
    if state.average is not None and rule.average_decay is not None:
        state.clock[1] += 1
        share = max(1 / int(state.clock[1]), 1 - rule.average_decay)
        state.average.add_(state.weights.float() - state.average, alpha=share)
