"""What SnapshotSGD keeps beside the parameters: fp32 master values, a bf16 copy, a running average."""

import pytest
import torch
from torch import nn

from fastsnap.kernels.schedule import Schedule
from fastsnap.training.optim import SnapshotSGD

SCHEDULE = Schedule("snapshot", 200, 3, 0.05)


def give_gradients(net: nn.Module, value: float) -> None:
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, value)


def test_bf16_copy_and_mean_of_the_weights_are_kept():
    net = nn.Linear(30, 10)
    optimizer = SnapshotSGD(net.parameters(), SCHEDULE, bf16_copy=True, average_decay=1.0)
    seen = []
    for step in range(7):
        give_gradients(net, 0.1 * step)
        optimizer.step()
        seen.append(optimizer.flat.data.clone())
    assert torch.equal(optimizer.copy, optimizer.flat.data.bfloat16())
    torch.testing.assert_close(optimizer.average, torch.stack(seen).mean(0), rtol=1e-5, atol=1e-6)


def test_bf16_parameters_follow_fp32_master_values():
    parameter = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = SnapshotSGD(
        [parameter], Schedule("step", 100, 1, 1e-4), momentum=0, nesterov=False, weight_decay=0
    )
    for _ in range(40):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()  # each step alone is less than bf16 resolves
    torch.testing.assert_close(optimizer.weights[:8], torch.full((8,), 0.996))
    assert torch.equal(parameter.detach(), optimizer.weights[:8].bfloat16())


@pytest.mark.parametrize("write", ["load_state_dict", "data.copy_", "flat.data"])
def test_what_is_written_into_bf16_parameters_is_trained_on(write):
    torch.manual_seed(0)
    net = nn.Linear(30, 10).bfloat16()
    loaded = {name: torch.randn_like(tensor) for name, tensor in net.state_dict().items()}
    optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE, weight_decay=0)
    give_gradients(net, 1.0)
    optimizer.step()
    if write == "load_state_dict":
        net.load_state_dict(loaded)
    elif write == "data.copy_":
        for name, parameter in net.named_parameters():
            parameter.data.copy_(loaded[name])
    else:
        for view, tensor in zip(optimizer.flat.views(optimizer.flat.data), loaded.values(), strict=True):
            view.copy_(tensor)
    saved = optimizer.state_dict()
    for index, tensor in enumerate(loaded.values()):
        assert torch.equal(saved["state"][index]["master"].bfloat16(), tensor)
    give_gradients(net, 0.0)
    optimizer.step()
    for name, parameter in net.named_parameters():
        step = SCHEDULE.rate(1) * 0.9 * 0.9  # what is left of the first gradient in Nesterov's momentum
        torch.testing.assert_close(parameter, loaded[name] - step, rtol=2**-8, atol=1e-3)


def test_seek_makes_the_copy_follow_the_weights():
    net = nn.Linear(30, 10)
    optimizer = SnapshotSGD(net.parameters(), SCHEDULE, bf16_copy=True)
    net.load_state_dict(nn.Linear(30, 10).state_dict())
    optimizer.seek(3)
    assert torch.equal(optimizer.copy, optimizer.flat.data.bfloat16())
    rounded = nn.Linear(30, 10).bfloat16()
    with_masters = SnapshotSGD(rounded.parameters(), SCHEDULE)
    with_masters.weights.copy_(torch.randn_like(with_masters.weights))
    with_masters.seek(3)
    assert torch.equal(with_masters.flat.data, with_masters.weights.bfloat16())
