"""SnapshotSGD as users of torch.optim know optimizers: oracle, checkpoints, GradScaler, clipping, DDP, errors."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastsnap.kernels.schedule import Schedule
from fastsnap.training.optim import SnapshotSGD

SCHEDULE = Schedule("snapshot", 200, 3, 0.05)  # 3 does not divide 200


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten()),
        nn.Linear(36, 10),
    )
    return net.to(memory_format=torch.channels_last)


def train(net, optimizer, steps, *, first=0, scaler=None, after=lambda: None):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(4, 3, 10, 10, generator=generator)
        labels = torch.randint(10, (4,), generator=generator)
        loss = functional.cross_entropy(net(images).float(), labels)
        optimizer.zero_grad(set_to_none=True)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        after()


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, False)])
def test_200_steps_agree_with_torch_sgd_and_its_scheduler(momentum, nesterov):
    ours, theirs = network(), network()
    options = {"momentum": momentum, "nesterov": nesterov, "weight_decay": 1e-3}
    optimizer = SnapshotSGD(ours.parameters(), SCHEDULE, **options)
    oracle = torch.optim.SGD(theirs.parameters(), 1.0, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(oracle, SCHEDULE.rate_after)
    for step in range(200):
        assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
        train(ours, optimizer, 1, first=step)
        train(theirs, oracle, 1, first=step, after=scheduler.step)
        if SCHEDULE.ends_cycle(step):
            for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert optimizer.updates() == 200


def test_groups_with_their_own_weight_decay():
    ours, theirs = network(), network()
    groups = [
        [
            {"params": [p for p in net.parameters() if p.ndim > 1]},
            {"params": [p for p in net.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        for net in (ours, theirs)
    ]
    optimizer = SnapshotSGD(groups[0], SCHEDULE, weight_decay=0.1)
    oracle = torch.optim.SGD(groups[1], 0.05, momentum=0.9, nesterov=True, weight_decay=0.1)
    train(ours, optimizer, 1)
    train(theirs, oracle, 1)
    optimizer.param_groups[1]["weight_decay"] = oracle.param_groups[1]["weight_decay"] = 0.5
    for group in oracle.param_groups:
        group["lr"] = SCHEDULE.rate(1)
    train(ours, optimizer, 1, first=1)
    train(theirs, oracle, 1, first=1)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("average_decay", [None, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_continues_bit_for_bit(dtype, average_decay):
    def make():
        net = nn.Sequential(nn.Flatten(), nn.Linear(300, 10)).to(dtype)
        cast = nn.Sequential(Cast(dtype), net)
        return cast, SnapshotSGD(net.named_parameters(), SCHEDULE, average_decay=average_decay)

    torch.manual_seed(0)
    net, optimizer = make()
    train(net, optimizer, 20)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(net, optimizer, 20, first=20)

    other, resumed = make()
    file.seek(0)
    saved = torch.load(file)
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.param_groups[0]["lr"] == SCHEDULE.rate(20)
    train(other, resumed, 20, first=20)
    assert equal(net, other)
    assert torch.equal(optimizer.momentum, resumed.momentum)
    assert torch.equal(optimizer.weights, resumed.weights)
    if average_decay is not None:
        assert torch.equal(optimizer.average, resumed.average)


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(self.dtype)


def test_state_fits_torch_sgd_and_flat_tensors_restore_too():
    net = network()
    optimizer = SnapshotSGD(net.parameters(), SCHEDULE)
    train(net, optimizer, 5)
    theirs = torch.optim.SGD(copy.deepcopy(net).parameters(), 0.1, momentum=0.9)
    theirs.load_state_dict(optimizer.state_dict())
    other = network(seed=1)
    restored = SnapshotSGD(other.parameters(), SCHEDULE)
    restored.flat.data.copy_(optimizer.flat.data)
    restored.momentum.copy_(optimizer.momentum)
    other[1].load_state_dict(net[1].state_dict())
    restored.seek(5)
    train(net, optimizer, 5, first=5)
    train(other, restored, 5, first=5)
    assert equal(net, other)


def test_parameters_without_gradient_stay_as_torch_leaves_them():
    ours, theirs = network(), network()
    optimizer = SnapshotSGD(ours.parameters(), SCHEDULE)
    oracle = torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    for net, used in ((ours, optimizer), (theirs, oracle)):
        net(torch.ones(2, 3, 10, 10)).sum().backward()
        net[5].weight.grad = None
        used.step()
    assert torch.equal(ours[5].weight, theirs[5].weight)
    torch.testing.assert_close(ours[0].weight, theirs[0].weight)


def test_gradscaler_divides_and_skips_but_the_schedule_goes_on():
    plain, scaled = network(), network()
    optimizer, other = SnapshotSGD(plain.parameters(), SCHEDULE), SnapshotSGD(scaled.parameters(), SCHEDULE)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    train(plain, optimizer, 3)
    train(scaled, other, 3, scaler=scaler)
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    before = other.flat.data.clone()
    scaler.scale(scaled(torch.full((2, 3, 10, 10), torch.inf)).sum()).backward()
    scaler.step(other)
    scaler.update()
    assert torch.equal(before, other.flat.data)
    assert other.updates() == 4
    assert scaler.get_scale() == 512.0
    assert other.param_groups[0]["lr"] == SCHEDULE.rate(4)


def test_clipping_closure_and_zero_grad():
    net = network()
    optimizer = SnapshotSGD(net.parameters(), SCHEDULE, momentum=0, nesterov=False, weight_decay=0)
    before = optimizer.flat.data.clone()

    def closure():
        optimizer.zero_grad()
        loss = net(torch.randn(2, 3, 10, 10)).square().sum()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
        return loss

    assert optimizer.step(closure).item() > 0
    assert (optimizer.flat.data - before).norm().item() == pytest.approx(SCHEDULE.rate(0) * 1e-3, rel=1e-3)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_step_past_the_schedule_is_an_error_and_the_last_snapshot_stays():
    net = network()
    optimizer = SnapshotSGD(net.parameters(), Schedule("snapshot", 10, 2, 0.1))
    shown = []
    for _ in range(10):
        train(net, optimizer, 1)
        shown.append(optimizer.param_groups[0]["lr"])
    assert shown[-3:] == pytest.approx([0.034549, 0.009549, 0.0], rel=1e-4)
    before = optimizer.flat.data.clone()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"got 10: the schedule has 10 updates .* make one with more steps"
        ):
            optimizer.step()
    assert torch.equal(optimizer.flat.data, before)
    assert optimizer.updates() == 10
    with pytest.raises(ValueError, match="got 11"):
        optimizer.seek(11)
