"""The convolution's gradient of the weights against float64."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastsnap.kernels import convolution_cpu
from fastsnap.kernels.convolution import fast_convolution, is_supported, reference_convolution
from fastsnap.kernels.convolution_cpu import has_instructions
from fastsnap.nets.build import build_network
from fastsnap.nets.resnet import KERNEL_OPERATIONS, PLAIN_OPERATIONS

needs_instructions = pytest.mark.skipif(
    not has_instructions(), reason="no C++ kernels, or a CPU without AVX512-BF16"
)


def make_convolution(in_channels: int, out_channels: int, stride: int = 1, **options) -> nn.Conv2d:
    options = {"padding": 1, "bias": False} | options
    return nn.Conv2d(in_channels, out_channels, 3, stride, **options).to(memory_format=torch.channels_last)


def activations(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()


def train(function, convolution: nn.Conv2d, input: Tensor, gradient: Tensor | None = None) -> list[Tensor]:
    """The output, and the gradients of the weights and the input."""
    with torch.autocast("cpu", torch.bfloat16):
        output = function(convolution, input)
    output.backward(torch.randn_like(output) if gradient is None else gradient)
    gradients = convolution.weight.grad, input.grad
    convolution.weight.grad = input.grad = None
    return [output, *gradients]


@needs_instructions
@given(
    images=st.integers(1, 40),
    in_channels=st.sampled_from([16, 32, 48, 64]),
    out_channels=st.sampled_from([16, 32, 48, 64]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    stride=st.sampled_from([1, 2]),
)
def test_gradient_of_the_weights_agrees_with_float64(
    images, in_channels, out_channels, height, width, stride
):
    torch.manual_seed(0)
    convolution = make_convolution(in_channels, out_channels, stride)
    input = activations(images, in_channels, height, width)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_supported(convolution, input)
        plain = reference_convolution(convolution, input)
    gradient = torch.randn_like(plain)
    output, weight_gradient, input_gradient = train(fast_convolution, convolution, input, gradient)
    assert torch.equal(output, plain)
    *_, plain_input_gradient = train(reference_convolution, convolution, input, gradient)
    assert torch.equal(input_gradient, plain_input_gradient)

    exact = nn.grad.conv2d_weight(
        input.detach().double(), convolution.weight.shape, gradient.double(), stride, padding=1
    )
    assert weight_gradient.dtype == torch.float32
    # In the worst case the roundings of a sum add up; of images * height * width terms these are few.
    torch.testing.assert_close(weight_gradient.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max())


@needs_instructions
@pytest.mark.parametrize("channels", [16, 64])
def test_bits_do_not_depend_on_the_number_of_threads(channels):
    convolution, input = make_convolution(channels, channels), activations(24, channels, 8, 8)
    gradient = torch.randn(24, channels, 8, 8).bfloat16()
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        try:
            torch.set_num_threads(count)
            results.append(train(fast_convolution, convolution, input, gradient)[1])
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@needs_instructions
def test_gradients_in_another_memory_order_are_taken():
    convolution, input = make_convolution(16, 16), activations(2, 16, 4, 4)
    row_major = torch.randn(2, 16, 4, 4).bfloat16()
    tiled = row_major.contiguous(memory_format=torch.channels_last)
    found, expected = (
        train(fast_convolution, convolution, input, gradient) for gradient in (row_major, tiled)
    )
    assert torch.equal(found[1], expected[1])


@needs_instructions
def test_an_input_that_needs_no_gradient_gets_none():
    convolution, input = make_convolution(16, 16), activations(2, 16, 4, 4).detach()
    _, weight_gradient, input_gradient = train(fast_convolution, convolution, input)
    assert weight_gradient.abs().sum() > 0
    assert input_gradient is None


@needs_instructions
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value):
    convolution, input = make_convolution(16, 16), activations(2, 16, 5, 5)
    with torch.no_grad():
        input[1, 3, 2, 2] = value
    _, weight_gradient, _ = train(fast_convolution, convolution, input)
    others = [channel for channel in range(16) if channel != 3]
    assert not weight_gradient[:, 3].isfinite().any()
    assert weight_gradient[:, others].isfinite().all()


@needs_instructions
def test_saved_tensors_may_come_back_in_another_memory_order():
    convolution, input = make_convolution(16, 16), activations(2, 16, 4, 4)
    gradient = torch.randn(2, 16, 4, 4).bfloat16()
    expected = train(fast_convolution, convolution, input, gradient)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.contiguous):
        found = train(fast_convolution, convolution, input, gradient)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@needs_instructions
def test_a_lack_of_memory_is_an_error(monkeypatch):
    monkeypatch.setattr(
        convolution_cpu, "library", lambda: SimpleNamespace(fastsnap_convolution_weight_gradient=lambda _: 0)
    )
    with pytest.raises(MemoryError, match=r"gradient of a convolution of \[2, 16, 4, 4\]"):
        train(fast_convolution, make_convolution(16, 16), activations(2, 16, 4, 4))


ROW_MAJOR = nn.Conv2d(16, 16, 3, padding=1, bias=False)
UNSUPPORTED = {
    "3 channels": (make_convolution(3, 16), activations(2, 3, 4, 4)),
    "wide": (make_convolution(16, 128), activations(2, 16, 4, 4)),
    "5x5": (nn.Conv2d(16, 16, 5, padding=1, bias=False), activations(2, 16, 4, 4)),
    "bias": (make_convolution(16, 16, bias=True), activations(2, 16, 4, 4)),
    "padding": (make_convolution(16, 16, padding=0), activations(2, 16, 4, 4)),
    "circular": (make_convolution(16, 16, padding_mode="circular"), activations(2, 16, 4, 4)),
    "dilation": (make_convolution(16, 16, dilation=2), activations(2, 16, 4, 4)),
    "groups": (make_convolution(32, 32, groups=2), activations(2, 32, 4, 4)),
    "stride": (make_convolution(16, 16, 3), activations(2, 16, 7, 7)),
    "fp32": (make_convolution(16, 16), torch.randn(2, 16, 4, 4, requires_grad=True)),
    "row-major input": (make_convolution(16, 16), torch.randn(2, 16, 4, 4).bfloat16().requires_grad_()),
    "row-major weights": (ROW_MAJOR, activations(2, 16, 4, 4)),
}


@pytest.mark.parametrize("case", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_the_kernel_does_not_take_goes_through_pytorch(case):
    convolution, input = case
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_supported(convolution, input)
    results = []
    for function in (fast_convolution, reference_convolution):
        torch.manual_seed(0)
        results.append(train(function, convolution, input))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@needs_instructions
def test_it_is_for_gradients_of_weights_under_autocast_to_bf16():
    convolution, input = make_convolution(16, 16), activations(2, 16, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_supported(convolution, input)
        with torch.no_grad():
            assert not is_supported(convolution, input)
        frozen = make_convolution(16, 16)
        frozen.weight.requires_grad_(False)
        assert not is_supported(frozen, input)
    assert not is_supported(convolution, input)
    with torch.autocast("cpu", torch.float16):
        assert not is_supported(convolution, input)


def gradients_of(network: nn.Module, images: Tensor, *, autocast: bool) -> Tensor:
    """Of all parameters, one after another."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = network(images).double().logsumexp(1).sum()
    loss.backward()
    return torch.cat([parameter.grad.double().flatten() for parameter in network.parameters()])


@needs_instructions
def test_with_the_kernels_the_gradients_of_a_network_are_no_farther_from_float64(monkeypatch):
    torch.manual_seed(0)
    images = torch.randn(32, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    plain, fast = (
        build_network("resnet8", classes=10, operations=operations).to(memory_format=torch.channels_last)
        for operations in (PLAIN_OPERATIONS, KERNEL_OPERATIONS)
    )
    exact = gradients_of(copy.deepcopy(plain).double(), images.double(), autocast=False)
    plain_error = (gradients_of(plain, images, autocast=True) - exact).norm()
    calls, kernel = [], convolution_cpu._weight_gradient
    monkeypatch.setattr(
        convolution_cpu, "_weight_gradient", lambda *arguments: calls.append(arguments) or kernel(*arguments)
    )
    fast_error = (gradients_of(fast, images, autocast=True) - exact).norm()
    assert len(calls) == 6  # all but the first convolution, which has 3 channels
    assert 0 < fast_error < 1.1 * plain_error < 0.1 * exact.norm()
