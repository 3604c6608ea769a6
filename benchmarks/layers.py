"""Layers that have a CPU kernel against PyTorch's: batch normalisation with shortcut and ReLU, convolution.

Of batch normalisation, forward and backward in bf16. Of the convolution, in bf16 the gradient of the weights, since the
rest is PyTorch's, and in fp32 each direction. The shapes are those of a ResNet's three stages.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from measure import PROJECT, Result, Settings, alternate, compare
from task import Task
from torch import Tensor, nn

from fastsnap.kernels.convolution_cpu import has_instructions
from fastsnap.kernels.winograd_cpu import instructions
from fastsnap.nets.resnet import KERNEL_OPERATIONS, PLAIN_OPERATIONS, Operations

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
    for part, make in FP32_PARTS.items():
        convolution = f"3x3 convolution in fp32, {part}"
        if instructions():
            yield from _layer(convolution, make, settings)
        else:
            yield _not_measured(convolution, "needs a CPU with AVX2")


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


def _activations(channels: int, pixels: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    values = torch.randn(Task.batch_size, channels, pixels, pixels).to(dtype)
    return values.contiguous(memory_format=torch.channels_last)


def _batch_norm(operations: Operations, channels: int, pixels: int) -> Callable[[], object]:
    norm = nn.BatchNorm2d(channels)
    input, shortcut = (_activations(channels, pixels).requires_grad_() for _ in range(2))
    gradient = _activations(channels, pixels)
    taken = [input, shortcut, norm.weight, norm.bias]
    return lambda: torch.autograd.grad(operations.batch_norm_relu(norm, input, shortcut), taken, gradient)


def _make_convolution(channels: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return convolution.to(memory_format=torch.channels_last)


def _convolution(operations: Operations, channels: int, pixels: int) -> Callable[[], object]:
    convolution = _make_convolution(channels)
    with torch.autocast("cpu", torch.bfloat16):
        output = operations.convolution(convolution, _activations(channels, pixels))
    gradient = _activations(channels, pixels)
    return lambda: torch.autograd.grad(output, convolution.weight, gradient, retain_graph=True)


def _fp32_forward(operations: Operations, channels: int, pixels: int) -> Callable[[], object]:
    convolution, input = _make_convolution(channels), _activations(channels, pixels, torch.float32)
    return torch.no_grad()(lambda: operations.convolution(convolution, input))


def _fp32_gradient(
    of_input: bool, operations: Operations, channels: int, pixels: int
) -> Callable[[], object]:
    """Of the input or of the weights; the other one needs none, so that it is not computed either."""
    convolution, input = _make_convolution(channels), _activations(channels, pixels, torch.float32)
    convolution.weight.requires_grad_(not of_input)
    input.requires_grad_(of_input)
    output = operations.convolution(convolution, input)
    gradient = _activations(channels, pixels, torch.float32)
    taken = input if of_input else convolution.weight
    return lambda: torch.autograd.grad(output, taken, gradient, retain_graph=True)


FP32_PARTS: dict[str, Callable[[Operations, int, int], Callable[[], object]]] = {
    "forward": _fp32_forward,
    "gradient of the input": partial(_fp32_gradient, True),
    "gradient of the weights": partial(_fp32_gradient, False),
}
