"""Layers that have a CPU kernel against PyTorch's, in bf16: batch normalisation with shortcut and ReLU, convolution.

Of batch normalisation, forward and backward; of the convolution, the gradient of the weights, since the rest is
PyTorch's. The shapes are those of a ResNet's three stages.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from fastsnap.kernels.convolution_cpu import has_instructions
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
    yield from _layer("batch normalisation + shortcut + ReLU, forward and backward", _batch_norm, settings)
    convolution = "3x3 convolution, gradient of the weights"
    if has_instructions():
        yield from _layer(convolution, _convolution, settings)
    else:
        yield _not_measured(convolution, "needs a CPU with AVX512-BF16")


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


def _activations(channels: int, pixels: int) -> Tensor:
    values = torch.randn(Task.batch_size, channels, pixels, pixels).bfloat16()
    return values.contiguous(memory_format=torch.channels_last)


def _batch_norm(operations: Operations, channels: int, pixels: int) -> Callable[[], object]:
    norm = nn.BatchNorm2d(channels)
    input, shortcut = (_activations(channels, pixels).requires_grad_() for _ in range(2))
    gradient = _activations(channels, pixels)
    taken = [input, shortcut, norm.weight, norm.bias]
    return lambda: torch.autograd.grad(operations.batch_norm_relu(norm, input, shortcut), taken, gradient)


def _convolution(operations: Operations, channels: int, pixels: int) -> Callable[[], object]:
    convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(
        memory_format=torch.channels_last
    )
    with torch.autocast("cpu", torch.bfloat16):
        output = operations.convolution(convolution, _activations(channels, pixels))
    gradient = _activations(channels, pixels)
    return lambda: torch.autograd.grad(output, convolution.weight, gradient, retain_graph=True)
