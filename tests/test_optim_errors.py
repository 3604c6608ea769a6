"""What SnapshotSGD refuses, and that it says so."""

import copy

import pytest
import torch
from torch import nn

from fastsnap.flat import FlatParameters
from fastsnap.optim import SnapshotSGD
from fastsnap.schedule import Schedule

SCHEDULE = Schedule("snapshot", 200, 3, 0.05)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(36, 10))


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
    with pytest.raises(ValueError, match="no longer are views"):
        optimizer.step()
    with pytest.raises(ValueError, match="flat must hold exactly"):
        SnapshotSGD(net[0].parameters(), SCHEDULE, flat=FlatParameters(net))
    with pytest.raises(ValueError, match="got momentum="):
        SnapshotSGD([{"params": net.parameters(), "momentum": 0.1}], SCHEDULE)


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
