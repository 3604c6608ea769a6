"""Layers that have a CPU kernel against PyTorch's: batch normalisation with shortcut and ReLU, convolution.

In the precision that the project takes on this processor by default, and in fp32. Of batch normalisation, forward and
backward; of the convolution, the gradient of the weights. The shapes are those of a ResNet's three stages.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from fastsnap.device import AUTOCAST_DTYPES, choose_precision
from fastsnap.kernels.convolution import is_supported
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
        convolution = f"3x3 convolution, gradient of the weights, {precision}"
        if has_convolution(precision):
            yield from _layer(convolution, partial(_convolution, precision), settings)
        else:
            yield _not_measured(convolution, "has no kernel for this processor, which takes PyTorch's")


def has_convolution(precision: str) -> bool:
    """Whether the project's convolution in the first stage has a kernel on this processor."""
    with _autocast(precision):
        return is_supported(_layer_of(STAGES[0][0]), _activations(precision, *STAGES[0]))


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


def _layer_of(channels: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return convolution.to(memory_format=torch.channels_last)


def _convolution(precision: str, operations: Operations, channels: int, pixels: int) -> Callable[[], object]:
    convolution = _layer_of(channels)
    with _autocast(precision):
        output = operations.convolution(convolution, _activations(precision, channels, pixels))
    gradient = _activations(precision, channels, pixels)
    return lambda: torch.autograd.grad(output, convolution.weight, gradient, retain_graph=True)
