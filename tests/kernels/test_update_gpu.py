"""SnapshotSGD on a GPU in other people's hands: groups, storages, moves, the end of the schedule, resuming."""

import copy
import gc

import pytest
import safetensors.torch
import torch
from gpu_training import SCHEDULE, batch, network, train_step
from torch import nn

from fastsnap.kernels.schedule import Schedule
from fastsnap.training.optim import SnapshotSGD

pytestmark = pytest.mark.gpu


def test_groups_with_scaled_rates_agree_with_torch_sgd_and_show_their_rates():
    ours, theirs = network(), network()
    optimizer = SnapshotSGD(
        [
            {"params": ours[0].parameters(), "lr_scale": 0.25},
            {"params": ours[3].parameters(), "lr_scale": 2.0},
        ],
        SCHEDULE,
    )
    groups = [{"params": theirs[0].parameters(), "lr": 0.25}, {"params": theirs[3].parameters(), "lr": 2.0}]
    oracle = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(oracle, SCHEDULE.rate_after)
    shown = optimizer.scheduler()
    for step in range(30):
        rates = [rate.item() for rate in shown.get_last_lr()]
        assert rates == pytest.approx(scheduler.get_last_lr(), rel=1e-6), step
        train_step(ours, optimizer, batch(step))
        train_step(theirs, oracle, batch(step))
        scheduler.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert [rate.item() for rate in shown.get_last_lr()] == [0.0, 0.0]


def test_every_parameter_has_a_storage_object_of_its_own_in_one_memory(tmp_path):
    net, other = network(), network()
    optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE)
    train_step(net, optimizer, batch(0))
    parameters = list(net.parameters())
    assert len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == len(parameters)
    assert [p.untyped_storage().nbytes() for p in parameters] == [4 * p.numel() for p in parameters]
    contiguous = nn.Sequential(*(nn.Linear(300, 300) for _ in range(3))).cuda()
    SnapshotSGD(contiguous.named_parameters(), SCHEDULE)
    loaded = copy.deepcopy(contiguous)
    nn.init.zeros_(loaded[1].weight)
    safetensors.torch.save_model(contiguous, str(tmp_path / "model.safetensors"))
    safetensors.torch.load_model(loaded, tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(contiguous.parameters(), loaded.parameters(), strict=True))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other.load_state_dict(torch.load(tmp_path / "net.pt"))
    assert all(torch.equal(a, b) for a, b in zip(parameters, other.parameters(), strict=True))


def test_the_memory_outlives_the_optimizer():
    net = network()
    optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE)
    expected = [parameter.detach().clone() for parameter in net.parameters()]
    del optimizer
    gc.collect()
    others = [torch.zeros(2000, device="cuda") for _ in range(200)]  # would take its place
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), expected, strict=True)), others


def test_a_network_moved_to_the_gpu_after_the_optimizer_was_made_is_followed():
    late, early = network().cpu(), network()
    optimizer = SnapshotSGD(late.named_parameters(), SCHEDULE, average_decay=1.0)
    late.cuda()
    expected = SnapshotSGD(early.named_parameters(), SCHEDULE, average_decay=1.0)
    for step in range(5):
        train_step(late, optimizer, batch(step))
        train_step(early, expected, batch(step))
    assert optimizer.backend == "triton"
    for a, b in zip(late.parameters(), early.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    momentum = optimizer.momentum.cpu()
    late.cpu()
    late.zero_grad()
    optimizer.step()
    assert optimizer.backend == "cpu"
    assert optimizer.updates() == 6
    assert torch.equal(optimizer.momentum, momentum)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("kind", ["snapshot", "step"])
def test_past_the_schedule_eager_steps_are_errors_and_replays_change_nothing(kind):
    schedule = Schedule(kind, 6, 2, 0.1)
    net = network()
    optimizer = SnapshotSGD(net.named_parameters(), schedule, average_decay=1.0)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(5):
        graph.replay()
    before = [optimizer.flat.data.clone(), optimizer.momentum.clone(), optimizer.average.clone()]
    graph.replay()
    assert all(map(torch.equal, before, (optimizer.flat.data, optimizer.momentum, optimizer.average)))
    assert optimizer.updates() == 6
    assert optimizer.state_dict()["state"][0]["averaged"] == 6
    assert optimizer.param_groups[0]["lr"] == 0
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(ValueError, match="got 6: the schedule has 6 updates"):
        optimizer.step()
    eager = SnapshotSGD(network().named_parameters(), schedule)
    try:
        for _ in range(6):
            eager.step()
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(ValueError, match="got 6: the schedule has 6 updates"):
            eager.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "schedule", [Schedule("snapshot", 37, 5, 0.1), Schedule("step", 37, 5, 0.1)], ids=str
)
def test_a_resumed_optimizer_shows_and_uses_the_very_bits_of_the_rate(schedule):
    def made() -> SnapshotSGD:
        net = network()
        groups = [{"params": net[0].parameters(), "lr_scale": 0.3}, {"params": net[3].parameters()}]
        return SnapshotSGD(groups, schedule)

    running = made()
    for step in range(37):
        resumed = made()
        resumed.seek(step)
        assert [g["lr"].item() for g in resumed.param_groups] == [
            g["lr"].item() for g in running.param_groups
        ]
        assert torch.equal(resumed._state.rate, running._state.rate), step
        running.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_defaults_of_torch_change_nothing(dtype):
    def trained(dtype: torch.dtype, device: str | None) -> torch.Tensor:
        net = network()
        gradients = [torch.full_like(parameter, 0.1) for parameter in net.parameters()]
        before = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            torch.set_default_device(device)
            optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE)
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter.grad = gradient
            for _ in range(3):
                optimizer.step()
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                optimizer.step()
        finally:
            torch.set_default_dtype(before)
            torch.set_default_device(None)
        return optimizer.flat.data

    assert torch.equal(trained(dtype, "cuda"), trained(torch.float32, None))
