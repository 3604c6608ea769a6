"""What only a GPU can show: python -m pytest -m gpu"""

import copy

import pytest
import torch
from averaging_cases import cases as averaging_cases
from averaging_cases import check_against_float64
from gpu_training import SCHEDULE, batch, network, train_step
from hypothesis import given, settings
from torch import nn
from update_cases import cases as update_cases
from update_cases import check_against_reference

from fastsnap.kernels.schedule import Schedule
from fastsnap.training.optim import SnapshotSGD

pytestmark = pytest.mark.gpu


@settings(max_examples=30)
@given(update_cases(largest=100_000, masters=True))
def test_update_agrees_with_the_reference(case):
    from fastsnap.kernels.update_triton import TritonUpdate

    check_against_reference(case, TritonUpdate, device="cuda")


def test_the_share_of_the_average_keeps_its_digits():
    parameter = nn.Parameter(torch.ones(100, device="cuda"))
    schedule = Schedule("snapshot", 2 * 10**6, 2, 0.1)
    optimizer = SnapshotSGD([parameter], schedule, average_decay=0.99999)
    optimizer.seek(10**6, averaged=10**6)
    optimizer.step()
    torch.testing.assert_close(optimizer.average[:100], torch.full_like(parameter, 1e-5), rtol=1e-6, atol=0)


def test_parameters_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    parameter = nn.Parameter(torch.ones(100, device="cuda:1"))
    optimizer = SnapshotSGD([parameter], SCHEDULE, momentum=0, nesterov=False, weight_decay=0)
    parameter.grad = torch.ones_like(parameter)
    with torch.cuda.device(0):
        optimizer.step()
    torch.testing.assert_close(parameter, torch.full_like(parameter, 1 - SCHEDULE.rate(0)))


def test_weights_loaded_between_replays_count_although_there_are_master_values():
    net = network().bfloat16()
    optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE, weight_decay=0)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    loaded = {name: torch.randn_like(tensor) for name, tensor in net.state_dict().items()}
    net.load_state_dict(loaded)
    graph.replay()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in net.state_dict().items())


@settings(max_examples=30)
@given(averaging_cases(most_classes=5000))
def test_averaging_agrees_with_float64(case):
    from fastsnap.kernels.averaging_triton import triton_averaging

    on_gpu = {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in case.items()}
    check_against_float64(on_gpu, *triton_averaging(**on_gpu))


def test_averaging_of_imagenet_21k():
    from fastsnap.kernels.averaging_triton import triton_averaging

    torch.manual_seed(0)
    case = {
        "logits": torch.randn(5, 64, 21_841, device="cuda") * 4,
        "labels": torch.randint(21_841, (64,), device="cuda"),
        "joining": [4, 3, 2, 1, 0],
        "weights_M": [1.0] * 5,
        "temperature": 1.0,
        "probabilities": True,
    }
    check_against_float64(case, *triton_averaging(**case))


def test_training_agrees_with_torch_sgd_and_its_scheduler():
    ours, theirs = network(), network()
    optimizer = SnapshotSGD(ours.named_parameters(), SCHEDULE)
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    oracle = torch.optim.SGD(theirs.parameters(), 1.0, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(oracle, SCHEDULE.rate_after)
    for step in range(30):
        assert optimizer.param_groups[0]["lr"].item() == pytest.approx(SCHEDULE.rate(step), rel=1e-6)
        train_step(ours, optimizer, batch(step))
        train_step(theirs, oracle, batch(step))
        scheduler.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_graph_capture_and_replay_equal_eager_steps(scaled):
    eager, graphed = network(), network()
    optimizers = [SnapshotSGD(net.named_parameters(), SCHEDULE) for net in (eager, graphed)]
    scalers = [torch.amp.GradScaler("cuda", init_scale=16.0) if scaled else None for _ in optimizers]
    for step in range(20):
        train_step(eager, optimizers[0], batch(step), scalers[0])

    static = batch(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(3):
            train_step(graphed, optimizers[1], static.copy_(batch(step)), scalers[1])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train_step(graphed, optimizers[1], static, scalers[1])
    for step in range(3, 10):
        static.copy_(batch(step))
        graph.replay()
    train_step(
        graphed, optimizers[1], batch(10), scalers[1]
    )  # an eager step must not disturb the graph's addresses
    for step in range(11, 20):
        static.copy_(batch(step))
        graph.replay()
    for a, b in zip(eager.parameters(), graphed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert optimizers[1].updates() == 20
    assert optimizers[1].param_groups[0]["lr"].item() == pytest.approx(SCHEDULE.rate(20), rel=1e-6)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_without_an_update_before_is_refused():
    net = network()
    optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE)
    with (
        pytest.raises(RuntimeError, match="once outside of the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_weight_decay_changed_right_before_a_capture_is_refused():
    net = network()
    optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE)
    optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.5
    with (
        pytest.raises(RuntimeError, match="weight_decay or lr_scale has changed"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    optimizer.step()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_one_launch_per_update_and_no_wait_for_the_device():
    net = network()
    optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE)
    train_step(net, optimizer, batch(0))
    optimizer.step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [
        event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    assert kernels == ["update_kernel"]


def test_gradscaler_skips_on_the_device_and_a_checkpoint_continues_bit_for_bit():
    net = network()
    optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    train_step(net, optimizer, batch(0), scaler)
    before = optimizer.flat.data.clone()
    train_step(net, optimizer, torch.full_like(batch(1), torch.inf), scaler)
    assert torch.equal(before, optimizer.flat.data)
    assert optimizer.updates() == 2

    other = network()
    other.load_state_dict(net.state_dict())
    resumed = SnapshotSGD(other.named_parameters(), SCHEDULE)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    gradients = [torch.randn_like(parameter) for parameter in net.parameters()]
    for current, used in ((net, optimizer), (other, resumed)):
        for parameter, gradient in zip(current.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for _ in range(5):
            used.step()
    assert torch.equal(optimizer.flat.data, resumed.flat.data)
