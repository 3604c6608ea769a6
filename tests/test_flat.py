"""Flat storage: the network keeps working, its memory is one tensor."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastsnap.flat import ALIGNMENT, FlatParameters


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 1, 1), nn.Flatten(), nn.Linear(36, 3, bias=False)
    )


def test_parameters_become_aligned_views_with_equal_values():
    plain, flattened = network(), network()
    flat = FlatParameters(flattened)
    for before, after, offset in zip(plain.parameters(), flattened.parameters(), flat.offsets, strict=True):
        assert torch.equal(before, after)
        assert offset % ALIGNMENT == 0
        assert after.data_ptr() == flat.data[offset:].data_ptr()
    assert flattened[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert flat.names == [name for name, _ in plain.named_parameters()]
    assert flat.data.count_nonzero() == sum(p.count_nonzero() for p in plain.parameters())
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(flattened(images), plain(images))


def test_gradients_come_in_the_memory_order_of_the_storage():
    net = network()
    flat = FlatParameters(net)
    net(torch.randn(2, 3, 8, 8)).sum().backward()
    left_by_autograd = [parameter.grad for parameter in net.parameters()]
    gradients, dtype = flat.gradients()
    assert all(a is b for a, b in zip(gradients, left_by_autograd, strict=True))
    assert dtype == torch.float32


def test_gradients_of_other_strides_are_copied_into_the_order_of_the_storage():
    net = network()
    flat = FlatParameters(net)
    net[0].weight.grad = torch.randn(5, 3, 3, 3)
    gradients, _ = flat.gradients()
    assert gradients[0].stride() == net[0].weight.stride()
    assert torch.equal(gradients[0], net[0].weight.grad)
    assert gradients[1:] == [None] * (len(gradients) - 1)


def test_frozen_and_shared_parameters():
    net = network()
    net[1].requires_grad_(False)
    net.again = net[4]
    flat = FlatParameters(net)
    assert flat.names == ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight"]
    assert len(FlatParameters(net.named_parameters(remove_duplicate=False)).names) == 7


def test_copies_and_pickles_of_the_network_are_whole_and_independent():
    net = network()
    flat = FlatParameters(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        before = [parameter.clone() for parameter in other.parameters()]
        flat.data.add_(1)
        assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    assert flat.attached()


def replace_data(net):
    for parameter in net.parameters():
        parameter.data = torch.zeros_like(parameter)


@pytest.mark.parametrize(
    "detach", [lambda net: net.double(), lambda net: net.bfloat16().float(), replace_data]
)
def test_moving_the_memory_of_the_network_is_noticed(detach):
    net = network()
    flat = FlatParameters(net)
    net.load_state_dict(network().state_dict())
    assert flat.attached()
    assert flat.ends_attached()
    detach(net)
    assert not flat.attached()
    assert not flat.ends_attached()


def test_views_of_another_flat_tensor():
    flat = FlatParameters(network())
    other = torch.arange(float(flat.data.numel()))
    views = flat.views(other)
    assert [view.shape for view in views] == [parameter.shape for parameter in flat.parameters]
    assert views[2][0].item() == flat.offsets[2]
    with pytest.raises(ValueError, match="flat must have shape"):
        flat.views(other[1:])


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([], "got none"),
        (
            [("a", nn.Parameter(torch.zeros(2, dtype=torch.float64)))],
            "parameter a must be float32 or bfloat16",
        ),
        (
            [("a", nn.Parameter(torch.zeros(2))), ("b", nn.Parameter(torch.zeros(2).bfloat16()))],
            r"parameter b is torch.bfloat16 .* but a is torch.float32",
        ),
    ],
)
def test_parameters_that_do_not_fit_together_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        FlatParameters(parameters)
