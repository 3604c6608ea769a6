"""The fp32 convolution and its gradients against float64."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fastsnap.kernels import winograd_cpu
from fastsnap.kernels.convolution import fast_convolution, is_winograd_supported, reference_convolution
from fastsnap.kernels.cpu import INSTRUCTION_SETS, is_built, using_instructions
from fastsnap.nets.build import build_network
from fastsnap.nets.resnet import KERNEL_OPERATIONS, PLAIN_OPERATIONS

AVX2, AVX512 = 1, 2
BEST = winograd_cpu.instructions() if is_built() else 0
RESULTS = ("output", "gradient of the input", "gradient of the weights")

needs_instructions = pytest.mark.skipif(BEST < AVX2, reason="a CPU without AVX2")
needs_avx512 = pytest.mark.skipif(BEST < AVX512, reason="a CPU without AVX-512")
each_instruction_set = pytest.mark.parametrize(
    "instructions", [pytest.param(AVX2, marks=needs_instructions), pytest.param(AVX512, marks=needs_avx512)]
)


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def make_convolution(in_channels: int, out_channels: int, **options) -> nn.Conv2d:
    options = {"kernel_size": 3, "padding": 1, "bias": False} | options
    return nn.Conv2d(in_channels, out_channels, **options).to(memory_format=torch.channels_last)


def results_of(function, input: Tensor, weight: Tensor, output_gradient: Tensor) -> list[Tensor]:
    """RESULTS of function(input, weight)."""
    input, weight = (tensor.detach().requires_grad_() for tensor in (input, weight))
    output = function(input, weight)
    return [output.detach(), *torch.autograd.grad(output, (input, weight), output_gradient)]


def plain(input: Tensor, weight: Tensor) -> Tensor:
    return functional.conv2d(input, weight, padding=1)


def winograd(
    input: Tensor, weight: Tensor, output_gradient: Tensor, *, instructions: int = BEST
) -> list[Tensor]:
    """RESULTS from the kernel."""
    with using_instructions(INSTRUCTION_SETS[instructions]):
        return results_of(winograd_cpu.WinogradConvolution.apply, input, weight, output_gradient)


def exact(*tensors: Tensor) -> list[Tensor]:
    """RESULTS in float64."""
    return results_of(plain, *(tensor.double() for tensor in tensors))


def case(images: int, in_channels: int, out_channels: int, height: int, width: int) -> tuple[Tensor, ...]:
    """Input, weights and the gradient of the output."""
    torch.manual_seed(0)
    return (
        channels_last(images, in_channels, height, width),
        channels_last(out_channels, in_channels, 3, 3),
        channels_last(images, out_channels, height, width),
    )


@each_instruction_set
@given(
    images=st.integers(1, 9),
    in_channels=st.sampled_from([16, 32, 48, 64]),
    out_channels=st.sampled_from([16, 32, 48, 64]),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
)
def test_output_and_gradients_agree_with_float64(
    instructions, images, in_channels, out_channels, height, width
):
    tensors = case(images, in_channels, out_channels, height, width)
    for found, expected in zip(winograd(*tensors, instructions=instructions), exact(*tensors), strict=True):
        assert found.dtype == torch.float32
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=4e-6 * expected.abs().max())


@needs_instructions
@pytest.mark.parametrize(("channels", "pixels"), [(16, 32), (64, 8)])
def test_it_is_about_as_exact_as_pytorch(channels, pixels):
    tensors = case(32, channels, channels, pixels, pixels)
    both = zip(RESULTS, winograd(*tensors), results_of(plain, *tensors), exact(*tensors), strict=True)
    for name, found, other, expected in both:
        assert (found - expected).norm() < 3 * (other - expected).norm(), name


@needs_avx512
def test_instruction_sets_give_the_same_bits():
    tensors = case(5, 32, 48, 7, 9)
    for one, other in zip(
        winograd(*tensors, instructions=AVX2), winograd(*tensors, instructions=AVX512), strict=True
    ):
        assert torch.equal(one, other)


@needs_instructions
@pytest.mark.parametrize("channels", [16, 64])
def test_bits_do_not_depend_on_the_number_of_threads(channels):
    tensors, threads, results = case(24, channels, channels, 8, 8), torch.get_num_threads(), []
    for count in (1, 2, 3):
        try:
            torch.set_num_threads(count)
            results.append(winograd(*tensors))
        finally:
            torch.set_num_threads(threads)
    for one, two, three in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@needs_instructions
def test_gradients_in_another_memory_order_are_taken():
    input, weight, gradient = case(2, 16, 32, 5, 4)
    found, expected = winograd(input, weight, gradient.contiguous()), winograd(input, weight, gradient)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@needs_instructions
def test_saved_tensors_may_come_back_in_another_memory_order():
    tensors = case(2, 16, 32, 5, 4)
    expected = winograd(*tensors)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, Tensor.contiguous):
        found = winograd(*tensors)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@needs_instructions
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none(frozen):
    input, weight, gradient = case(2, 16, 16, 4, 4)
    expected = winograd(input, weight, gradient)[1:]
    taken = [input, weight]
    taken[1 - frozen].requires_grad_()
    winograd_cpu.WinogradConvolution.apply(*taken).backward(gradient)
    assert taken[frozen].grad is None
    assert torch.equal(taken[1 - frozen].grad, expected[1 - frozen])


@needs_instructions
def test_without_gradients_the_output_is_the_same():
    convolution, input = make_convolution(32, 16), channels_last(8, 32, 8, 8)
    assert is_winograd_supported(convolution, input)
    with_gradients = fast_convolution(convolution, input)
    with torch.no_grad():
        without = fast_convolution(convolution, input)
    assert not without.requires_grad
    assert torch.equal(without, with_gradients)


@needs_instructions
def test_a_second_derivative_is_refused():
    input, weight, _ = case(2, 16, 16, 4, 4)
    output = winograd_cpu.WinogradConvolution.apply(input.requires_grad_(), weight)
    (gradient,) = torch.autograd.grad(output.square().sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@needs_instructions
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value):
    input, weight, gradient = case(2, 16, 16, 8, 8)
    input[1, 3, 2, 2] = value
    output, _, weight_gradient = winograd(input, weight, gradient)
    assert not output[1, :, 1:4, 1:4].isfinite().any()
    assert output[0].isfinite().all()
    assert output[1, :, 4:].isfinite().all()  # those that no shared window leads to
    others = [channel for channel in range(16) if channel != 3]
    assert not weight_gradient[:, 3].isfinite().any()
    assert weight_gradient[:, others].isfinite().all()


@needs_instructions
@pytest.mark.parametrize("failing", ["fastsnap_winograd_convolution", "fastsnap_winograd_weight_gradient"])
def test_a_lack_of_memory_is_an_error(monkeypatch, failing):
    kernels = ("instructions", "convolution", "weight_gradient")
    functions = {
        f"fastsnap_winograd_{name}": getattr(winograd_cpu.library(), f"fastsnap_winograd_{name}")
        for name in kernels
    }
    library = SimpleNamespace(**functions | {failing: lambda _: 0})
    monkeypatch.setattr(winograd_cpu, "library", lambda: library)
    with pytest.raises(MemoryError, match=r"convolution of \[2, 16, 4, 4\]"):
        winograd(*case(2, 16, 16, 4, 4))


UNSUPPORTED = {
    "3 channels": (make_convolution(3, 16), channels_last(8, 3, 8, 8)),
    "wide": (make_convolution(16, 128), channels_last(8, 16, 8, 8)),
    "1x1": (make_convolution(16, 16, kernel_size=1, padding=0), channels_last(8, 16, 8, 8)),
    "5x5": (make_convolution(16, 16, kernel_size=5), channels_last(8, 16, 8, 8)),
    "bias": (make_convolution(16, 16, bias=True), channels_last(8, 16, 8, 8)),
    "padding": (make_convolution(16, 16, padding=0), channels_last(8, 16, 8, 8)),
    "circular": (make_convolution(16, 16, padding_mode="circular"), channels_last(8, 16, 8, 8)),
    "dilation": (make_convolution(16, 16, dilation=2), channels_last(8, 16, 8, 8)),
    "groups": (make_convolution(32, 32, groups=2), channels_last(8, 32, 8, 8)),
    "stride": (make_convolution(16, 16, stride=2), channels_last(8, 16, 8, 8)),
    "bf16": (make_convolution(16, 16).bfloat16(), channels_last(8, 16, 8, 8).bfloat16()),
    "float64": (make_convolution(16, 16).double(), channels_last(8, 16, 8, 8).double()),
    "few pixels": (make_convolution(16, 16), channels_last(7, 16, 8, 8)),
    "row-major input": (make_convolution(16, 16), torch.randn(8, 16, 8, 8)),
    "row-major weights": (nn.Conv2d(16, 16, 3, padding=1, bias=False), channels_last(8, 16, 8, 8)),
}


@pytest.mark.parametrize("layer", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_the_kernel_does_not_take_goes_through_pytorch(layer):
    convolution, input = layer
    assert not is_winograd_supported(convolution, input)
    assert torch.equal(fast_convolution(convolution, input), reference_convolution(convolution, input))


@pytest.mark.parametrize("channels", [3, 32, 128])
def test_images_of_other_channels_are_pytorch_s_error(channels):
    with pytest.raises(
        RuntimeError, match=f"got input\\[8, {channels}, 8, 8\\]|expected input.*{channels} channels"
    ):
        fast_convolution(make_convolution(16, 16), channels_last(8, channels, 8, 8))


@needs_instructions
def test_it_is_not_for_autocast_nor_for_processors_without_the_instructions():
    convolution, input = make_convolution(16, 16), channels_last(8, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_winograd_supported(convolution, input)
    with using_instructions("avx2"):
        assert is_winograd_supported(convolution, input)
    with using_instructions("plain"):
        assert not is_winograd_supported(convolution, input)


def gradients_of(network: nn.Module, images: Tensor) -> Tensor:
    """Of all parameters, one after another."""
    network(images).double().logsumexp(1).sum().backward()
    return torch.cat([parameter.grad.double().flatten() for parameter in network.parameters()])


@needs_instructions
def test_with_the_kernels_the_gradients_of_a_network_are_about_as_exact(monkeypatch):
    torch.manual_seed(0)
    images = channels_last(32, 3, 16, 16)
    plain_network, fast = (
        build_network("resnet8", classes=10, operations=operations).to(memory_format=torch.channels_last)
        for operations in (PLAIN_OPERATIONS, KERNEL_OPERATIONS)
    )
    expected = gradients_of(copy.deepcopy(plain_network).double(), images.double())
    plain_error = (gradients_of(plain_network, images) - expected).norm()
    calls, kernel = [], winograd_cpu._call
    monkeypatch.setattr(
        winograd_cpu,
        "_call",
        lambda *arguments, **tensors: calls.append(arguments[0]) or kernel(*arguments, **tensors),
    )
    fast_error = (gradients_of(fast, images) - expected).norm()
    assert (
        len(calls) == 12
    )  # three for each convolution but the first, of 3 channels, and the two that stride
    assert fast_error < 3 * plain_error < 1e-4 * expected.norm()
