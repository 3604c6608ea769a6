"""Layers that have a CPU kernel against PyTorch's: batch normalisation with shortcut and ReLU, convolution.

In the precision that the project takes on this processor by default, and in fp32. Of batch normalisation, forward and
backward. Of the convolution, in fp32 each direction, in bf16 the gradient of the weights, since the rest is PyTorch's.
The shapes are those of a ResNet's three stages.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from fastsnap.device import AUTOCAST_DTYPES, choose_precision
from fastsnap.kernels.convolution import is_supported, is_winograd_supported
from fastsnap.nets.resnet import KERNEL_OPERATIONS, PLAIN_OPERATIONS, Operations
from harness.measure import PROJECT, Result, Settings, alternate, compare
from harness.task import Task

NAME = "layers"
STAGES = ((16, 32), (32, 16), (64, 8))  # channels, pixels
ROUNDS, QUICK_ROUNDS = 25, 3
IN_A_ROW = 10  # calls timed together
WAYS = {PROJECT: KERNEL_OPERATIONS, "PyTorch": PLAIN_OPERATIONS}


def run(settings: Settings) -> Iterator[Result]:
    """Milliseconds of each layer in each stage."""
    if settings.device != "cpu":
        yield _not_measured("layers", "for CPUs: a GPU takes torch.compile's kernels")
        return
    default = choose_precision("auto", torch.device("cpu")).name
    for precision in dict.fromkeys((default, "fp32")):
        norm = f"batch normalisation + shortcut + ReLU, forward and backward, {precision}"
        yield from _layer(norm, partial(_batch_norm, precision), settings)
        for part, make in PARTS.items():
            convolution = f"3x3 convolution, {part}, {precision}"
            if has_kernel(part, precision):
                yield from _layer(convolution, partial(make, precision), settings)
            else:
                yield _not_measured(convolution, "has no kernel for this processor, which takes PyTorch's")


def has_kernel(part: str, precision: str) -> bool:
    """Whether the project has a kernel for `part` (of PARTS) of the first stage's convolution on this processor."""
    convolution, input = _make_convolution(STAGES[0][0]), _activations(precision, *STAGES[0])
    with _autocast(precision):
        of_weights = part == OF_WEIGHTS and is_supported(convolution, input)
        return of_weights or is_winograd_supported(convolution, input)


def _not_measured(case: str, reason: str) -> Result:
    return Result(NAME, case, PROJECT, "ms", "lower", missing=reason)


def _layer(
    layer: str, make: Callable[[Operations, int, int], Callable[[], object]], settings: Settings
) -> Iterator[Result]:
    for channels, pixels in STAGES:
        calls = {name: partial(_milliseconds, make(way, channels, pixels)) for name, way in WAYS.items()}
        alternate(calls, 2)  # warm up
        values = alternate(calls, QUICK_ROUNDS if settings.quick else ROUNDS)
        case = f"{layer}, [{Task.batch_size}, {channels}, {pixels}, {pixels}]"
        yield from compare(NAME, case, "ms", values, "lower")


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(IN_A_ROW):
        call()
    return 1000 * (time.perf_counter() - start) / IN_A_ROW


def _autocast(precision: str) -> AbstractContextManager[object]:
    dtype = AUTOCAST_DTYPES.get(precision)
    return torch.autocast("cpu", dtype, enabled=dtype is not None)


def _activations(precision: str, channels: int, pixels: int) -> Tensor:
    dtype = AUTOCAST_DTYPES.get(precision, torch.float32)
    values = torch.randn(Task.batch_size, channels, pixels, pixels).to(dtype)
    return values.contiguous(memory_format=torch.channels_last)


def _batch_norm(precision: str, operations: Operations, channels: int, pixels: int) -> Callable[[], object]:
    norm = nn.BatchNorm2d(channels)
    input, shortcut = (_activations(precision, channels, pixels).requires_grad_() for _ in range(2))
    gradient = _activations(precision, channels, pixels)
    taken = [input, shortcut, norm.weight, norm.bias]
    return lambda: torch.autograd.grad(operations.batch_norm_relu(norm, input, shortcut), taken, gradient)


def _make_convolution(channels: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return convolution.to(memory_format=torch.channels_last)


def _forward(precision: str, operations: Operations, channels: int, pixels: int) -> Callable[[], object]:
    convolution, input = _make_convolution(channels), _activations(precision, channels, pixels)

    @torch.no_grad()
    def call() -> Tensor:
        with _autocast(precision):
            return operations.convolution(convolution, input)

    return call


def _gradient(
    of_weights: bool, precision: str, operations: Operations, channels: int, pixels: int
) -> Callable[[], object]:
    """Of the weights or of the input; the other one needs none, so that it is not computed either."""
    convolution, input = _make_convolution(channels), _activations(precision, channels, pixels)
    convolution.weight.requires_grad_(of_weights)
    input.requires_grad_(not of_weights)
    with _autocast(precision):
        output = operations.convolution(convolution, input)
    gradient = _activations(precision, channels, pixels)
    taken = convolution.weight if of_weights else input
    return lambda: torch.autograd.grad(output, taken, gradient, retain_graph=True)


OF_WEIGHTS = "gradient of the weights"
PARTS: dict[str, Callable[..., Callable[[], object]]] = {
    "forward": _forward,
    "gradient of the input": partial(_gradient, False),
    OF_WEIGHTS: partial(_gradient, True),
}
