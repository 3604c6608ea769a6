"""The update of SGD with (Nesterov) momentum: learning rate, weight decay, momentum, weights, all tensors, one launch.

Bytes per parameter, fp32 weights and momentum: read weight, momentum and gradient, write weight and momentum: 20 with
fp32 gradients, 18 with bf16; a bf16 copy of the weights adds 2, a running average 8.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """What stays the same during a run.

    kind, steps, cycles, learning_rate   the schedule: "snapshot" or "step", T, M and a0 as in fastsnap.schedule
    momentum, nesterov                   momentum coefficient, dampening is 0
    average_decay                        None: no running average of the weights; 1: the mean of all updates (SWA);
                                         below 1: exponential (EMA), as a mean until 1 / (1 - decay) updates are in it
    """

    kind: str
    steps: int
    cycles: int
    learning_rate: float
    momentum: float
    nesterov: bool
    average_decay: float | None = None


@dataclass(frozen=True)
class State:
    """What an update changes: flat tensors of one size, and the clock. All on one device.

    weights    fp32 or bf16
    momentum   fp32
    copy       bf16 or None: the weights rounded
    average    fp32 or None: running average of the weights
    clock      int64 [3]: updates done, updates in the average, programs of the running launch that have finished
    rate       fp32 [1]: learning rate of the next update
    """

    weights: Tensor
    momentum: Tensor
    copy: Tensor | None
    average: Tensor | None
    clock: Tensor
    rate: Tensor


def reference_update(
    state: State,
    rule: Rule,
    offsets: Sequence[int],
    gradients: Sequence[Tensor | None],
    decays: Sequence[float],
    rate_of: Callable[[int], float],
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One update in plain PyTorch, tensor by tensor: what the kernels are tested against.

    offsets     start of each tensor in the flat tensors, in elements
    gradients   one per tensor, dense in the memory order of the weights; None leaves the tensor as it is
    decays      weight decay of each tensor
    rate_of     learning rate of an update number
    scale       fp32 scalar that the gradients are divided by; found_inf: fp32 scalar, not 0 skips the update, but the
                schedule goes on (torch.amp.GradScaler)
    """
    if found_inf is None or not found_inf.item():
        inverse = 1.0 if scale is None else 1.0 / scale.item()
        for offset, gradient, decay in zip(offsets, gradients, decays, strict=True):
            if gradient is not None:
                _update_tensor(state, rule, offset, gradient, decay, inverse)
        _update_copies(state, rule)
    state.clock[0] += 1
    state.rate.fill_(rate_of(int(state.clock[0])))


def _update_tensor(
    state: State, rule: Rule, offset: int, gradient: Tensor, decay: float, inverse: float
) -> None:
    """Weight decay, momentum and step of one tensor in fp32, in the order of torch.optim.SGD."""
    segment = slice(offset, offset + gradient.numel())
    weights, momentum = state.weights[segment].float(), state.momentum[segment]
    direction = gradient.as_strided((gradient.numel(),), (1,)).float() * inverse
    direction = direction.add(weights, alpha=decay)
    momentum.mul_(rule.momentum).add_(direction)
    direction = direction.add(momentum, alpha=rule.momentum) if rule.nesterov else momentum
    state.weights[segment] = weights.add(direction, alpha=-state.rate.item()).to(state.weights.dtype)


def _update_copies(state: State, rule: Rule) -> None:
    if state.copy is not None:
        state.copy.copy_(state.weights)
    if state.average is not None and rule.average_decay is not None:
        state.clock[1] += 1
        state.average.lerp_(state.weights.float(), max(1 / int(state.clock[1]), 1 - rule.average_decay))


def cosine_rate(step: int, steps: int, cycles: int, learning_rate: float) -> float:
    """Rate of `step` as the kernel computes it: a0 * sin^2(pi/2 * share of the cycle that is left).

    The same as a0/2 * (cos(pi * phase) + 1), without the cancellation that would cost fp32 its digits near the end.
    """
    cycle = ((step + 1) * cycles - 1) // steps
    start, end = cycle * steps // cycles, (cycle + 1) * steps // cycles
    return learning_rate * math.sin(math.pi / 2 * (end - step) / (end - start)) ** 2


def new_clock(device: torch.device) -> Tensor:
    """Clock at the first update."""
    return torch.zeros(3, dtype=torch.int64, device=device)
