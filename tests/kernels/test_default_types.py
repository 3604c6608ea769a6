"""The kernels in programs with another default dtype or device: what they read and write is their own matter."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from batch_norm_cases import activations, make_norm
from torch import Tensor, nn

from fastsnap.kernels.averaging import average_members
from fastsnap.kernels.averaging_reference import reference_averaging
from fastsnap.kernels.averaging_triton import triton_averaging
from fastsnap.kernels.batch_norm import fused_batch_norm_relu
from fastsnap.kernels.convolution import fast_convolution

DEFAULTS = ["bfloat16", "float64", "meta"]


@contextlib.contextmanager
def defaults(name: str) -> Iterator[None]:
    """Within, torch's default dtype, or device, is `name`."""
    dtype = torch.get_default_dtype()
    try:
        if name == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, name))
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("labels", [None, torch.arange(500) % 10])
def test_averaging_of_members(default, labels):
    torch.manual_seed(0)
    logits = torch.randn(3, 500, 10, dtype=torch.float32) * 100  # some labels are ranked by log-probabilities
    expected = average_members(logits, labels, probabilities=True)
    with defaults(default):
        for _ in range(20):  # memory written beyond its end is not always noticed at once
            found = average_members(logits, labels, probabilities=True)
    for name, values in vars(expected).items():
        if values is not None:
            assert_same([getattr(found, name)], [values])


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("averaging", [triton_averaging, reference_averaging])
@pytest.mark.parametrize("classes", [10, 1500])
def test_averaging_on_a_gpu_and_by_the_reference(default, averaging, classes):
    torch.manual_seed(0)
    case = (torch.randn(2, 3, classes) * 100, torch.arange(3), [1, 0], [1.0, 0.3], 0.7, True)
    expected, expected_invalid = averaging(*case)
    with defaults(default):
        found, found_invalid = averaging(*case)
    assert_same([*vars(found).values(), found_invalid], [*vars(expected).values(), expected_invalid])


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_normalisation(default, dtype):
    def train_and_evaluate() -> list[Tensor]:
        norm.load_state_dict(state)
        norm.train()
        output = fused_batch_norm_relu(norm, input)
        gradients = torch.autograd.grad(output, [input, norm.weight, norm.bias], gradient)
        with torch.no_grad():
            evaluated = fused_batch_norm_relu(norm.eval(), input)
        return [output, *gradients, evaluated, norm.running_mean.clone(), norm.running_var.clone()]

    torch.manual_seed(0)
    norm, input = make_norm(16), activations((2, 16, 4, 4), dtype)
    gradient, state = (
        torch.randn_like(input),
        {name: value.clone() for name, value in norm.state_dict().items()},
    )
    expected = train_and_evaluate()
    with defaults(default):
        found = train_and_evaluate()
    assert_same(found, expected)


@pytest.mark.parametrize("default", DEFAULTS)
def test_gradient_of_a_convolution(default):
    def train() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            output = fast_convolution(convolution, input)
        return [output, *torch.autograd.grad(output, [convolution.weight, input], gradient)]

    torch.manual_seed(0)
    convolution = nn.Conv2d(16, 16, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    input = activations((4, 16, 5, 5), torch.bfloat16)
    gradient = torch.randn_like(input)
    expected = train()
    with defaults(default):
        found = train()
    assert_same(found, expected)
