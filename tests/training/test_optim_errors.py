"""What SnapshotSGD refuses, and that it says so."""

import copy

import pytest
import torch
from torch import nn

from fastsnap.kernels.schedule import Schedule
from fastsnap.training.flat import FlatParameters
from fastsnap.training.optim import SnapshotSGD

SCHEDULE = Schedule("snapshot", 200, 3, 0.05)


def network(hidden: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, hidden, 3), nn.BatchNorm2d(hidden), nn.Flatten(), nn.Linear(36, 10))


def test_learning_rate_set_from_outside_is_refused():
    net = network()
    optimizer = SnapshotSGD(net.parameters(), SCHEDULE)
    optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(ValueError, match="comes from the schedule"):
        optimizer.step()
    other = SnapshotSGD(net.parameters(), SCHEDULE)
    torch.optim.lr_scheduler.ConstantLR(other, factor=1.0)
    with pytest.raises(ValueError, match="remove the lr_scheduler"):
        other.step()


def test_what_cannot_work_is_refused():
    net = network()
    optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE)
    with pytest.raises(ValueError, match="give all groups to a new SnapshotSGD"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(TypeError, match="use state_dict"):
        copy.deepcopy(optimizer)
    optimizer.param_groups[0]["momentum"] = 0.5
    with pytest.raises(ValueError, match="are fixed"):
        optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    SnapshotSGD(net.parameters(), SCHEDULE)
    with pytest.raises(ValueError, match=r"no longer are views of flat.data \(0.weight, 6 in all\)"):
        optimizer.step()
    with pytest.raises(
        ValueError, match=r"flat must hold exactly.*; only in it: \['1.weight', '1.bias', '3.wei"
    ):
        SnapshotSGD(net[0].parameters(), SCHEDULE, flat=FlatParameters(net))
    with pytest.raises(ValueError, match=r"flat must hold exactly.*; not in it: \['3.weight', '3.bias'\]$"):
        SnapshotSGD(net.named_parameters(), SCHEDULE, flat=FlatParameters(net[:3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "momentum must be"),
        ({"momentum": float("nan")}, "momentum must be"),
        ({"momentum": 0.0}, "nesterov needs"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"average_decay": 0.0}, "average_decay must be"),
    ],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SnapshotSGD(network().parameters(), SCHEDULE, **options)


def test_unusable_gradients_are_refused_by_name():
    net = network()
    optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE)
    net[3].weight.grad = torch.zeros(10, 36).to_sparse()
    with pytest.raises(
        ValueError, match=r"gradient of parameter 3\.weight must be dense .* got torch.sparse_coo"
    ):
        optimizer.step()
    net[3].weight.grad_dtype = None
    net[3].weight.grad = torch.zeros(10, 36, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"3\.weight must be .* got torch.strided torch.float64"):
        optimizer.step()
    net[3].weight.grad = torch.zeros(10, 36, dtype=torch.bfloat16)
    net[3].bias.grad = torch.zeros(10)
    with pytest.raises(ValueError, match="of one dtype"):
        optimizer.step()
    assert optimizer.updates() == 0


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"momentum": 0.1}, "got momentum=0.1 where 0.9 is in force"),
        ({"nesterov": False}, "got nesterov=False where True is in force"),
        ({"lr": 5.0}, "got lr=5.0 where 0.05 is in force"),
        ({"dampening": 0.5}, r"got \['dampening'\], which would be ignored"),
        ({"maximize": True, "foreach": True}, r"got \['foreach', 'maximize'\]"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and at least 0, got -1.0"),
    ],
)
def test_groups_that_ask_for_what_would_be_ignored_are_refused(own, message):
    with pytest.raises(ValueError, match=message):
        SnapshotSGD([{"params": network().parameters(), **own}], SCHEDULE)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("maximize", True, r"got \['maximize'\], which would be ignored"),
        ("nesterov", False, "are fixed"),
        ("weight_decay", -1.0, "weight_decay must be finite and at least 0, got -1.0"),
        ("weight_decay", float("nan"), "weight_decay must be"),
    ],
)
def test_groups_changed_later_into_what_would_be_ignored_are_refused(name, value, message):
    optimizer = SnapshotSGD(network().parameters(), SCHEDULE)
    optimizer.step()
    optimizer.param_groups[0][name] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    assert optimizer.updates() == 1


def test_memory_of_a_single_parameter_replaced_is_noticed():
    net = network()
    optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE)
    net[1].weight.data = net[1].weight.data.clone()
    with pytest.raises(ValueError, match=r"1\.weight, 1 in all.* copy_\(\) instead of assigning"):
        optimizer.step()


def saved_by(net: nn.Module, **options) -> dict:
    optimizer = SnapshotSGD(net.parameters(), SCHEDULE, **options)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def saved_by_torch() -> dict:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def with_other_decay() -> dict:
    saved = saved_by(network())
    saved["param_groups"][0]["weight_decay"] = -1.0
    return saved


@pytest.mark.parametrize(
    ("make_state", "options", "message"),
    [
        (
            saved_by_torch,
            {},
            r"no 'step' of each parameter.*copy the momentum buffers .* call seek\(updates\)",
        ),
        (lambda: saved_by(network()), {"average_decay": 0.9}, "of parameter 0, .* the same average_decay"),
        (lambda: saved_by(network(), average_decay=0.9), {}, "of parameter 0, .* the same average_decay"),
        (lambda: saved_by(network()), {"momentum": 0.5}, "saved with momentum=0.9, this optimizer has 0.5"),
        (lambda: saved_by(network(), nesterov=False), {}, "saved with nesterov=False"),
        (lambda: saved_by(network().bfloat16()), {}, r"holds \['master', 'momentum_buffer'\] of parameter 0"),
        (lambda: saved_by(network()[:2]), {}, r"groups of \[4\] parameters, this optimizer of \[6\]"),
        (
            lambda: saved_by(network(hidden=18)),
            {},
            r"momentum_buffer of shape \[18, 3, 3, 3\] for parameter 0,",
        ),
        (with_other_decay, {}, "weight_decay must be"),
    ],
)
def test_a_saved_state_that_does_not_fit_is_refused_and_changes_nothing(make_state, options, message):
    net = network()
    optimizer = SnapshotSGD(net.parameters(), SCHEDULE, **options)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(make_state())
    after = optimizer.state_dict()
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    assert {n: v for n, v in after.items() if n != "state"} == {
        n: v for n, v in before.items() if n != "state"
    }
    optimizer.step()
