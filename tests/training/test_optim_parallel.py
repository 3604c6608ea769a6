"""SnapshotSGD under DistributedDataParallel against torch.optim.SGD, made before it or, as is usual, after it."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from fastsnap.kernels.schedule import Schedule
from fastsnap.training.optim import SnapshotSGD

SCHEDULE = Schedule("snapshot", 20, 3, 0.1)
OPTIONS = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}


def network(seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(5, 7),
    ).to(dtype)


def train_ours(
    rank: int, *, first: str, bucket_view: bool, dtype: torch.dtype, channels_last: bool
) -> list[torch.Tensor]:
    """Parameters after a few updates; every rank starts from other weights, of which DDP takes rank 0's."""
    net = network(rank, dtype)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    if first == "optimizer":
        optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE, **OPTIONS)
    parallel = DistributedDataParallel(net, gradient_as_bucket_view=bucket_view)
    if first == "DDP":
        optimizer = SnapshotSGD(net.named_parameters(), SCHEDULE, **OPTIONS)
    for step in range(5):
        optimizer.zero_grad()
        parallel(images(step, rank).to(dtype)).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in net.parameters()]


def images(step: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2 * step + rank))


def train_torch(ranks: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """The same in one process: the gradient is the mean over the ranks."""
    net = network(0, dtype)
    optimizer = torch.optim.SGD(net.parameters(), 1.0, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, SCHEDULE.rate_after)
    for step in range(5):
        optimizer.zero_grad()
        for rank in range(ranks):
            (net(images(step, rank).to(dtype)).square().mean() / ranks).backward()
        optimizer.step()
        scheduler.step()
    return [parameter.detach() for parameter in net.parameters()]


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("first", ["optimizer", "DDP"])
def test_one_process(one_process, first, bucket_view, channels_last):
    options = {"first": first, "bucket_view": bucket_view, "channels_last": channels_last}
    ours = train_ours(0, dtype=torch.float32, **options)
    torch.testing.assert_close(ours, train_torch(1, torch.float32), rtol=1e-5, atol=1e-6)


def test_sharded_parameters_are_refused_with_the_way_out(one_process):
    net = network(0)
    fully_shard(net, mesh=distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(
        ValueError, match=r"0\.weight must be a plain dense tensor, got DTensor.*DistributedDataParallel"
    ):
        SnapshotSGD(net.named_parameters(), SCHEDULE)


def test_a_sharding_optimizer_around_it_is_refused_with_the_way_out(one_process):
    with pytest.raises(
        ValueError, match=r"schedule is an argument of SnapshotSGD.*ZeroRedundancy.*DistributedData"
    ):
        ZeroRedundancyOptimizer(network(0).parameters(), SnapshotSGD, schedule=SCHEDULE)


def train_as_one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    results = {}
    for first, dtype in itertools.product(("optimizer", "DDP"), (torch.float32, torch.bfloat16)):
        results[first, dtype] = train_ours(
            rank, first=first, bucket_view=False, dtype=dtype, channels_last=False
        )
    torch.save(results, f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes(tmp_path: Path):
    torch.multiprocessing.spawn(train_as_one_of_two, (str(tmp_path),), nprocs=2)
    of_rank = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for (first, dtype), ours in of_rank[0].items():
        other = of_rank[1][first, dtype]
        assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True)), (first, dtype)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(ours, train_torch(2, dtype), rtol=tolerance, atol=tolerance)
