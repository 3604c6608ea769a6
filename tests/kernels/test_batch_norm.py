"""The fused batch normalisation, shortcut and ReLU against float64."""

import copy

import pytest
import torch
from batch_norm_cases import (
    RELATIVE,
    activations,
    agrees,
    batch_norm_cases,
    check_against_float64,
    make_norm,
)
from hypothesis import given
from torch import Tensor, nn

from fastsnap.kernels.batch_norm import fused_batch_norm_relu, is_fusible, reference_batch_norm_relu
from fastsnap.nets.build import build_network
from fastsnap.nets.resnet import KERNEL_OPERATIONS, PLAIN_OPERATIONS


@pytest.mark.needs_library
@given(batch_norm_cases())
def test_output_statistics_and_gradients_agree_with_float64(case):
    check_against_float64(case)


@pytest.mark.needs_library
@pytest.mark.parametrize("dtype", list(RELATIVE))
@pytest.mark.parametrize("with_shortcut", [False, True])
def test_evaluation_agrees_with_float64_and_leaves_the_statistics(dtype, with_shortcut):
    torch.manual_seed(0)
    shape = (2, 48, 27, 29)  # of less, evaluation leaves PyTorch to do it
    norm, input = make_norm(48).eval(), activations(shape, dtype).detach()
    with torch.no_grad():
        norm.running_var.uniform_(0.1, 3)
    shortcut = activations(shape, dtype).detach() if with_shortcut else None
    before = copy.deepcopy(norm.state_dict())
    with torch.no_grad():
        assert is_fusible(norm, input, shortcut)
        output = fused_batch_norm_relu(norm, input, shortcut)
        exact = copy.deepcopy(norm).double()
        expected = reference_batch_norm_relu(
            exact, input.double(), None if shortcut is None else shortcut.double()
        )
    assert agrees(output, expected, RELATIVE[dtype])
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.mark.needs_library
@pytest.mark.parametrize("dtype", list(RELATIVE))
def test_bits_do_not_depend_on_the_number_of_threads(dtype):
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.manual_seed(0)
        norm, input = make_norm(16), activations((8, 16, 32, 32), dtype)
        try:
            torch.set_num_threads(count)
            output = fused_batch_norm_relu(norm, input, None)
            output.backward(torch.randn_like(output))
        finally:
            torch.set_num_threads(threads)
        results.append([output, input.grad, norm.weight.grad, norm.bias.grad, norm.running_var])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradients_in_another_memory_order_are_taken():
    norm, input = make_norm(16), activations((2, 16, 4, 4), torch.float32)
    fused_batch_norm_relu(norm, input).mean(
        dim=(2, 3)
    ).square().sum().backward()  # expanded, with strides of 0
    found = input.grad.clone()
    input.grad = None
    reference_batch_norm_relu(norm, input).mean(dim=(2, 3)).square().sum().backward()
    torch.testing.assert_close(found, input.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(value):
    norm, input = make_norm(32), activations((2, 32, 4, 4), torch.bfloat16)
    with torch.no_grad():
        input[0, 5, 1, 1] = value
    output = fused_batch_norm_relu(norm, input)
    assert output[:, 5].isnan().any()
    assert output[:, :5].isfinite().all()
    assert not norm.running_var[5].isfinite()


def not_fusible():
    norm = make_norm(16)
    yield "gradients in evaluation", make_norm(16).eval(), activations((2, 16, 4, 4), torch.float32)
    yield "float64", make_norm(16).double(), activations((2, 16, 4, 4), torch.float64)
    yield "channels", make_norm(12), activations((2, 12, 4, 4), torch.float32)
    yield "odd", norm, activations((1, 16, 3, 3), torch.float32)
    yield "contiguous", norm, torch.randn(2, 16, 4, 4)
    yield (
        "no statistics",
        nn.BatchNorm2d(16, track_running_stats=False),
        activations((2, 16, 4, 4), torch.float32),
    )


@pytest.mark.parametrize(
    ("norm", "input"), [case[1:] for case in not_fusible()], ids=[c[0] for c in not_fusible()]
)
def test_what_the_kernel_does_not_take_goes_through_pytorch(norm, input):
    assert not is_fusible(norm, input, None)
    other = copy.deepcopy(norm)
    assert torch.equal(fused_batch_norm_relu(norm, input), reference_batch_norm_relu(other, input))


@pytest.mark.needs_library
def test_little_goes_through_pytorch_in_evaluation_only():
    norm, input = make_norm(16), activations((2, 16, 4, 4), torch.float32).detach()
    with torch.no_grad():
        assert is_fusible(norm, input, None)
        norm.eval()
        assert not is_fusible(norm, input, None)
        assert torch.equal(fused_batch_norm_relu(norm, input), reference_batch_norm_relu(norm, input))


@pytest.mark.needs_library
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64, "meta", "strided"])
def test_parameters_and_statistics_are_read_in_fp32_on_the_cpu_or_not_at_all(name, other):
    norm, input = make_norm(16), activations((2, 16, 4, 4), torch.float32)
    assert is_fusible(norm, input, None)
    values = torch.zeros(32)[::2] if other == "strided" else getattr(norm, name).detach().to(other)
    setattr(norm, name, nn.Parameter(values) if name in ("weight", "bias") else values)
    assert not is_fusible(norm, input, None)
    assert not is_fusible(make_norm(16), input, torch.zeros_like(input, device="meta"))


@pytest.mark.needs_library
def test_saved_tensors_may_come_back_in_another_memory_order():
    norm, input = make_norm(16), activations((2, 16, 4, 4), torch.float32)
    gradient, found = torch.randn_like(input), []
    for unpack in (Tensor.clone, Tensor.contiguous):
        with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, unpack):
            output = fused_batch_norm_relu(norm, input)
        found.append(torch.autograd.grad(output, [input, norm.weight, norm.bias], gradient))
    assert all(map(torch.equal, *found))


def test_a_network_with_it_has_the_same_state_and_nearly_the_same_gradients():
    torch.manual_seed(0)
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    networks = [
        build_network("resnet8", classes=10, operations=operations).to(memory_format=torch.channels_last)
        for operations in (PLAIN_OPERATIONS, KERNEL_OPERATIONS)
    ]
    plain, fused = networks
    for network in networks:
        network(images).square().sum().backward()
    assert plain.state_dict().keys() == fused.state_dict().keys()
    for (name, expected), found in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-3, msg=name)
    for expected, found in zip(plain.buffers(), fused.buffers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
