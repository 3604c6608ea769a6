"""Flat storage: the network keeps working, its memory is one tensor."""

import copy
import gc
import io
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from fastsnap.training.flat import ALIGNMENT, FlatParameters


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
        assert before.stride() == after.stride()
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
    assert flat.detached() == []


def test_every_parameter_has_a_storage_object_of_its_own_in_one_memory():
    net = network()
    flat = FlatParameters(net)
    storages = [parameter.untyped_storage() for parameter in net.parameters()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    assert [storage.nbytes() for storage in storages] == [4 * p.numel() for p in net.parameters()]
    with torch.no_grad():
        net[4].weight.fill_(3)
    assert torch.equal(flat.data[flat.offsets[6] :][:108], torch.full((108,), 3.0))
    flat.data.fill_(5)
    assert all((parameter == 5).all() for parameter in net.parameters())


def test_savers_that_tell_tensors_apart_by_their_storage_keep_all(tmp_path):
    net, other = network(), network()
    FlatParameters(net)
    with torch.no_grad():
        net[0].weight.mul_(2)
    safetensors.torch.save_model(net, str(tmp_path / "model.safetensors"))
    assert safetensors.torch.load_model(other, tmp_path / "model.safetensors") == (set(), [])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_a_part_is_saved_without_the_rest():
    net = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 10))
    FlatParameters(net)
    file = io.BytesIO()
    torch.save(net[1].state_dict(), file)
    assert file.tell() < 4 * 10_010 + 2000


def test_the_memory_lives_as_long_as_any_parameter():
    net = network()
    expected = net[0].weight.clone()
    flat = FlatParameters(net)
    weight = net[0].weight
    del net, flat
    gc.collect()
    others = [torch.zeros(900) for _ in range(100)]  # would take its place
    assert torch.equal(weight, expected), others


@pytest.mark.parametrize("empty", [(0,), (3, 0)])
def test_empty_parameters(empty):
    flat = FlatParameters([("a", nn.Parameter(torch.ones(3))), ("b", nn.Parameter(torch.zeros(empty)))])
    assert flat.parameters[1].shape == empty
    assert flat.detached() == []


def test_a_compiled_network_sees_what_is_written_into_the_flat_memory():
    net = nn.Linear(4, 4)
    flat = FlatParameters(net)
    compiled = torch.compile(net, backend="aot_eager")
    images = torch.randn(2, 4)
    for value in (0.0, 1.0):
        flat.data.fill_(value)
        torch.testing.assert_close(compiled(images), value * (images.sum(1, keepdim=True) + 1).expand(2, 4))


def test_dense_parameters_keep_their_strides_and_others_become_dense():
    channels_last = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    transposed = nn.Parameter(torch.randn(3, 5).t())
    with_gaps = nn.Parameter(torch.randn(6, 6)[::2, ::3])
    repeated = nn.Parameter(torch.randn(1, 3).expand(2, 3))
    parameters = {"a": channels_last, "b": transposed, "c": with_gaps, "d": repeated}
    before = [parameter.clone() for parameter in parameters.values()]
    flat = FlatParameters(parameters.items())
    assert flat.strides == [(12, 1, 6, 3), (1, 5), (2, 1), (3, 1)]
    assert all(torch.equal(a, b) for a, b in zip(before, parameters.values(), strict=True))


def square_network() -> tuple[nn.Sequential, FlatParameters]:
    """A network whose gradients are all there and as autograd leaves them."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    for number, parameter in enumerate(net.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    return net, FlatParameters(net)


@pytest.mark.parametrize(
    "view",
    [
        lambda gradient: gradient.t().contiguous().t(),
        lambda gradient: gradient[:1].expand(8, 8),
        lambda gradient: torch.stack([gradient, gradient], -1)[..., 0],
        lambda gradient: torch._neg_view(-gradient),
        lambda gradient: torch.complex(gradient, -gradient).conj().imag,
    ],
)
def test_a_single_unusual_gradient_among_usual_ones_is_copied(view):
    net, flat = square_network()
    unusual = view(net[1].weight.grad)
    wanted = unusual.clone(memory_format=torch.contiguous_format)
    net[1].weight.grad = unusual
    for _ in range(2):  # the second time is no more usual than the first
        gradients, _ = flat.gradients()
        assert gradients[2].data_ptr() != unusual.data_ptr()
        assert not gradients[2].is_neg()
        assert torch.equal(gradients[2].as_strided((64,), (1,)), wanted.flatten())
        assert all(gradients[i] is p.grad for i, p in enumerate(net.parameters()) if i != 2)


@pytest.mark.parametrize("shape", [(2, 8), (16, 8), (8,)])
def test_a_gradient_of_another_shape_is_refused_even_with_the_same_strides(shape):
    net, flat = square_network()
    net[1].weight.grad.data = torch.ones(shape)
    with pytest.raises(ValueError, match=r"of parameter 1\.weight must be \[8, 8\] on cpu, got \["):
        flat.gradients()


def test_strides_of_dimensions_of_size_1_do_not_matter():
    parameters = [nn.Parameter(torch.randn(shape)) for shape in ((1, 1, 1, 4), (5, 3, 1, 1), (3, 5))]
    flat = FlatParameters((str(i), parameter) for i, parameter in enumerate(parameters))
    strides = [(7, 5, 9, 1), (3, 1, 3, 3), (5, 1)]
    for parameter, other in zip(parameters, strides, strict=True):
        parameter.grad = torch.randn(parameter.numel()).as_strided(parameter.shape, other)
    for _ in range(2):
        gradients, _ = flat.gradients()
        assert all(a is p.grad for a, p in zip(gradients, parameters, strict=True))
    parameters[2].grad = torch.randn(5, 3).t()
    gradients, _ = flat.gradients()
    assert gradients[2].is_contiguous()


def test_a_transposed_parameter_is_refused():
    net, flat = square_network()
    net[1].weight.data = net[1].weight.data.t()  # the address stays
    net[1].weight.grad = torch.ones(8, 8).t()
    with pytest.raises(ValueError, match=r"1\.weight must keep its strides"):
        flat.gradients()


def replace_data(net):
    for parameter in net.parameters():
        parameter.data = torch.zeros_like(parameter)


@pytest.mark.parametrize(
    "detach",
    [
        lambda net: net.double(),
        lambda net: net.bfloat16().float(),
        lambda net: net.to(memory_format=torch.channels_last),
        lambda net: net[2].double(),
        lambda net: setattr(net[2].weight, "data", net[2].weight.data.clone()),
        lambda net: net.share_memory(),
        replace_data,
    ],
)
def test_moving_the_memory_of_any_parameter_is_noticed(detach):
    net = network()
    flat = FlatParameters(net)
    net.load_state_dict(network().state_dict())
    assert flat.detached() == []
    before = [parameter.data_ptr() for parameter in net.parameters()]
    detach(net)
    moved = [
        name
        for (name, p), address in zip(net.named_parameters(), before, strict=True)
        if p.data_ptr() != address
    ]
    assert moved
    assert flat.detached() == moved


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
        (nn.LazyLinear(3), "parameter weight has no shape yet: send a batch"),
        (nn.Linear(3, 3, device="meta"), r"weight must be on cpu or cuda, got meta.*to_empty\(device"),
        (
            [("a", nn.Parameter(torch.ones(2, 2).to_sparse()))],
            "a must be a plain dense tensor, got Tensor, torch.sp",
        ),
    ],
)
def test_parameters_that_do_not_fit_together_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        FlatParameters(parameters)
