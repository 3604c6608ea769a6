"""A network that is converted after the optimizer was made, and what torch's defaults may be."""

import copy

import pytest
import torch
from torch import nn

from fastsnap.kernels.schedule import Schedule
from fastsnap.training.optim import SnapshotSGD

SCHEDULE = Schedule("snapshot", 20, 3, 0.1)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(5 * 16, 3))


def train(net: nn.Module, optimizer: SnapshotSGD, steps: int) -> None:
    for _ in range(steps):
        generator = torch.Generator().manual_seed(optimizer.updates())
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        optimizer.step()


@pytest.mark.parametrize("average_decay", [None, 1.0])
def test_a_network_converted_before_the_first_update_is_as_if_the_optimizer_had_been_made_after(
    average_decay,
):
    late, early = network(), network().bfloat16()
    optimizer = SnapshotSGD(late.named_parameters(), SCHEDULE, average_decay=average_decay)
    flat = optimizer.flat
    late.bfloat16()
    expected = SnapshotSGD(early.named_parameters(), SCHEDULE, average_decay=average_decay)
    train(late, optimizer, 5)
    train(early, expected, 5)
    assert optimizer.flat is flat
    assert flat.data.dtype == torch.bfloat16
    assert torch.equal(flat.data, expected.flat.data)
    assert torch.equal(optimizer.weights, expected.weights)
    saved, wanted = optimizer.state_dict(), expected.state_dict()
    torch.testing.assert_close(saved["state"], wanted["state"], rtol=0, atol=0)
    assert saved["param_groups"] == wanted["param_groups"]


def test_momentum_average_and_count_come_along_later_and_other_strides_do_not_matter():
    net = network()
    optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE, average_decay=1.0)
    train(net, optimizer, 4)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    net.to(torch.bfloat16, memory_format=torch.channels_last)
    net.zero_grad()
    optimizer.step()  # without gradients: all stays, but the count
    after = optimizer.state_dict()["state"]
    for index, of_parameter in before.items():
        assert torch.equal(after[index]["momentum_buffer"], of_parameter["momentum_buffer"])
        assert after[index]["step"] == 5
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[net[0].weight]["momentum_buffer"].stride() == net[0].weight.stride()


def test_a_state_loaded_after_the_conversion_goes_where_the_network_is():
    net, other = network().bfloat16(), network(seed=1)
    saving = SnapshotSGD(net.named_parameters(), SCHEDULE)
    train(net, saving, 3)
    optimizer = SnapshotSGD(other.named_parameters(), SCHEDULE)
    other.bfloat16()
    optimizer.load_state_dict(copy.deepcopy(saving.state_dict()))
    for used, its in ((net, saving), (other, optimizer)):
        train(used, its, 2)
    assert torch.equal(optimizer.weights, saving.weights)
    assert torch.equal(other[0].weight, net[0].weight)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (
            lambda net: net.to(memory_format=torch.channels_last),
            r"\(0\.weight, .*\.to\(memory_format=\.\.\.\)",
        ),
        (lambda net: net[2].bfloat16(), r"\(2\.weight, 2 in all\)\. Put the line that converts the network"),
        (lambda net: net.bfloat16().float(), r"convert a copy\.deepcopy\(network\)"),
        (lambda net: net.share_memory(), r"share_memory_\(\).* before the one that makes this optimizer"),
        (lambda net: net.double(), "parameter 0.weight must be float32 or bfloat16, got torch.float64"),
        (lambda net: SnapshotSGD(net.parameters(), SCHEDULE), "another optimizer"),
    ],
)
def test_what_may_be_a_mistake_is_an_error_that_says_which_line_to_move(convert, message):
    net = network()
    optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE)
    train(net, optimizer, 1)
    convert(net)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    assert optimizer.updates() == 1


@pytest.fixture(params=[(torch.bfloat16, None), (torch.float64, None), (torch.float32, "meta")], ids=str)
def other_defaults(request):
    """Sets torch's default dtype and device when called, and puts them back in the end."""
    before = torch.get_default_dtype()

    def switch() -> None:
        torch.set_default_dtype(request.param[0])
        torch.set_default_device(request.param[1])

    yield switch
    torch.set_default_dtype(before)
    torch.set_default_device(None)


def test_other_defaults_of_torch_change_nothing(other_defaults):
    expected, net, resumed = network(), network(), network(seed=1)
    plain = SnapshotSGD(expected.named_parameters(), SCHEDULE, average_decay=0.9)
    gradients = [[torch.randn_like(parameter) for parameter in net.parameters()] for _ in range(4)]

    def update(net: nn.Module, optimizer: SnapshotSGD, step: int) -> None:
        for parameter, gradient in zip(net.parameters(), gradients[step], strict=True):
            parameter.grad = gradient
        optimizer.step()

    for step in range(4):
        update(expected, plain, step)
    other_defaults()
    optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE, average_decay=0.9)
    for step in range(2):
        update(net, optimizer, step)
    other = SnapshotSGD(resumed.named_parameters(), SCHEDULE, average_decay=0.9)
    other.load_state_dict(optimizer.state_dict())
    other.flat.data.copy_(optimizer.flat.data)
    for step in range(2, 4):
        update(resumed, other, step)
    assert torch.equal(plain.flat.data, other.flat.data)
    assert torch.equal(plain.average, other.average)
    assert other.param_groups[0]["lr"] == SCHEDULE.rate(4)
