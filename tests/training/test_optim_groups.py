"""Groups with rates and decays of their own, against torch.optim.SGD."""

import copy

import pytest
import torch
from torch import nn

from fastsnap.kernels.schedule import Schedule
from fastsnap.training.optim import SnapshotSGD

SCHEDULE = Schedule("snapshot", 50, 3, 0.1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 4))


def layer_decay_groups(net: nn.Sequential) -> list[dict]:
    """As timm's param_groups_layer_decay makes them: by layer, weights and biases apart."""
    groups: list[dict] = []
    for depth, layer in enumerate((net[0], net[2], net[4])):
        scale = 0.65 ** (2 - depth)
        groups.append({"params": [layer.bias], "weight_decay": 0.0, "lr_scale": scale})
        groups.append({"params": [layer.weight], "weight_decay": 0.05, "lr_scale": scale})
    return groups


def give_gradients(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(5, 12, generator=generator)
    net.zero_grad()
    net(images).square().mean().backward()


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, False)])
def test_scaled_rates_agree_with_torch_sgd_and_a_scheduler(momentum, nesterov):
    ours, theirs = network(), network()
    options = {"momentum": momentum, "nesterov": nesterov}
    optimizer = SnapshotSGD(layer_decay_groups(ours), SCHEDULE, **options)
    groups = [
        {"params": g["params"], "weight_decay": g["weight_decay"], "lr": g["lr_scale"]}
        for g in layer_decay_groups(theirs)
    ]
    oracle = torch.optim.SGD(groups, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(oracle, SCHEDULE.rate_after)
    for step in range(50):
        shown = [group["lr"] for group in optimizer.param_groups]
        assert shown == pytest.approx(scheduler.get_last_lr(), rel=1e-15)
        for net, used in ((ours, optimizer), (theirs, oracle)):
            give_gradients(net, step)
            used.step()
        scheduler.step()
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0] * 6


def test_a_scale_of_one_changes_no_bit():
    plain, scaled = network(), network()
    optimizers = (
        SnapshotSGD(plain.parameters(), SCHEDULE),
        SnapshotSGD([{"params": scaled.parameters(), "lr_scale": 1.0}], SCHEDULE),
    )
    for step in range(5):
        for net, optimizer in zip((plain, scaled), optimizers, strict=True):
            give_gradients(net, step)
            optimizer.step()
    assert torch.equal(optimizers[0].flat.data, optimizers[1].flat.data)


def test_scales_are_saved_loaded_and_may_change_between_updates():
    net, other = network(), network()
    optimizer = SnapshotSGD(layer_decay_groups(net), SCHEDULE, momentum=0.0, nesterov=False)
    saved = copy.deepcopy(optimizer.state_dict())
    assert [group["lr_scale"] for group in saved["param_groups"]] == [0.65**2] * 2 + [0.65] * 2 + [1.0] * 2
    groups = [{"params": group["params"]} for group in layer_decay_groups(other)]
    loaded = SnapshotSGD(groups, SCHEDULE, momentum=0.0, nesterov=False)
    loaded.load_state_dict(saved)
    for net_, used in ((net, optimizer), (other, loaded)):
        give_gradients(net_, 0)
        used.param_groups[0]["lr_scale"] = 4.0
        before = net_[0].bias.detach().clone()
        used.step()
        torch.testing.assert_close(net_[0].bias, before - 4 * SCHEDULE.rate(0) * net_[0].bias.grad)
        assert used.param_groups[0]["lr"] == 4 * SCHEDULE.rate(1)
    assert torch.equal(optimizer.flat.data, loaded.flat.data)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-60, 1e60])
def test_a_scale_out_of_range_is_refused_when_made_and_when_changed(scale):
    with pytest.raises(ValueError, match=r"lr_scale must be finite and above 0 .* requires_grad_\(False\)"):
        SnapshotSGD([{"params": network().parameters(), "lr_scale": scale}], SCHEDULE)
    optimizer = SnapshotSGD(network().parameters(), SCHEDULE)
    optimizer.param_groups[0]["lr_scale"] = scale
    for _ in range(2):
        with pytest.raises(ValueError, match="lr_scale must be"):
            optimizer.step()


def test_a_parameter_given_twice_is_named():
    net = network()
    with pytest.raises(ValueError, match=r"one parameter twice, as 0\.weight and as again: give it once"):
        SnapshotSGD([*net.named_parameters(), ("again", net[0].weight)], SCHEDULE)
    with pytest.raises(ValueError, match="one parameter twice, as 0 and as 2"):
        SnapshotSGD([net[0].weight, net[0].bias, net[0].weight], SCHEDULE)
    with pytest.raises(ValueError, match="more than one parameter group"):
        SnapshotSGD([{"params": [net[0].weight]}, {"params": [net[0].weight]}], SCHEDULE)


def replaced(optimizer: SnapshotSGD) -> None:  # as DeepSpeed's ZeRO does, by its own part of all parameters
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(100))]


@pytest.mark.parametrize(
    "change", [replaced, lambda o: o.param_groups[0]["params"].pop(), lambda o: o.param_groups.pop()]
)
def test_parameters_replaced_or_removed_are_noticed(change):
    optimizer = SnapshotSGD(layer_decay_groups(network()), SCHEDULE)
    change(optimizer)
    with pytest.raises(
        ValueError, match=r"were replaced or removed.*DeepSpeed's ZeRO.*DistributedDataParallel"
    ):
        optimizer.step()
