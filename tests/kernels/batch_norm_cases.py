"""Random batch normalisations, and one comparison with fp64: shared by the tests of the kernel and of its versions."""

import copy
from dataclasses import dataclass

import torch
from hypothesis import strategies
from torch import Tensor, nn

from fastsnap.kernels.batch_norm import fused_batch_norm_relu, is_fusible

# Of one rounding to the type: 2^-8 for bf16's 8 bits; in fp32 a few more happen on the way.
RELATIVE = {torch.float32: 4e-6, torch.bfloat16: 2**-8}


@dataclass(frozen=True)
class Case:
    images: int
    channels: int
    size: int
    dtype: torch.dtype
    with_shortcut: bool
    mean: float


def batch_norm_cases() -> strategies.SearchStrategy[Case]:
    return strategies.builds(
        Case,
        images=strategies.integers(1, 5).map(lambda half: 2 * half),
        channels=strategies.sampled_from([16, 32, 48, 64, 112]),
        size=strategies.integers(2, 9),
        dtype=strategies.sampled_from(list(RELATIVE)),
        with_shortcut=strategies.booleans(),
        mean=strategies.sampled_from([0.0, -3.0, 100.0]),
    )


def make_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
        norm.running_mean.normal_()
    return norm


def activations(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    values = (torch.randn(shape) + mean).to(dtype).contiguous(memory_format=torch.channels_last)
    return values.requires_grad_()


def agrees(found: Tensor, expected: Tensor, relative: float) -> bool:
    scale = expected.abs().max().clamp_min(1e-3)
    return bool(((found.double() - expected).abs() <= relative * (expected.abs() + scale)).all())


def check_against_float64(case: Case) -> list[Tensor]:
    """A training step; returns output, gradients and running statistics."""
    torch.manual_seed(0)
    shape = (case.images, case.channels, case.size, case.size)
    norm, relative = make_norm(case.channels), RELATIVE[case.dtype]
    exact = copy.deepcopy(norm).double()
    input = activations(shape, case.dtype, case.mean)
    shortcut = activations(shape, case.dtype) if case.with_shortcut else None
    assert is_fusible(norm, input, shortcut)
    output = fused_batch_norm_relu(norm, input, shortcut)
    gradient = torch.randn_like(output)
    output.backward(gradient)

    exact_input = input.detach().double().requires_grad_()
    exact_shortcut = None if shortcut is None else shortcut.detach().double().requires_grad_()
    normalized = exact(exact_input)
    exact_sum = normalized if exact_shortcut is None else normalized + exact_shortcut
    exact_sum.backward(gradient.double() * (output > 0))  # a sum near 0 may round to either side
    assert agrees(output, exact_sum.relu(), relative)
    assert agrees(input.grad, exact_input.grad, 2 * relative)
    assert agrees(norm.weight.grad, exact.weight.grad, 1e-4 if case.mean else 1e-5)
    assert agrees(norm.bias.grad, exact.bias.grad, 1e-5)
    if shortcut is not None:
        assert torch.equal(shortcut.grad, gradient * (output > 0))
    assert agrees(norm.running_mean, exact.running_mean, 1e-6)
    assert agrees(norm.running_var, exact.running_var, 1e-5)
    assert norm.num_batches_tracked == 1
    gradients = [input.grad, norm.weight.grad, norm.bias.grad]
    return [output, *gradients, norm.running_mean, norm.running_var]
