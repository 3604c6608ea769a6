"""The training step, as far as the tests of whole runs do not see it."""

import copy

import torch
from torch import nn

from fastsnap.kernels.schedule import Schedule
from fastsnap.training.optim import SnapshotSGD
from fastsnap.training.step import TrainStep


def compiled_step(network: nn.Module, updates: int) -> TrainStep:
    """A step with a compiler that has seen nothing yet, as in a process that has just started."""
    torch._dynamo.reset()
    optimizer = SnapshotSGD(network.named_parameters(), Schedule("snapshot", 10, 1, 0.1))
    optimizer.seek(updates)
    return TrainStep(network, optimizer, torch.device("cpu"), precision="fp32", compiled=True, graphed=False)


def batch(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 33, generator=generator), torch.randint(7, (size,), generator=generator)


def test_a_compiled_run_resumes_to_the_bit_after_a_partial_batch() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(33, 65), nn.BatchNorm1d(65), nn.ReLU(), nn.Linear(65, 7))
    step = compiled_step(network, 0)
    for seed, size in enumerate((64, 29)):
        step(*batch(size, seed))
    resumed = copy.deepcopy(network)
    momentum = step.optimizer.momentum.clone()
    step(*batch(64, 2))

    other = compiled_step(resumed, 2)
    other.optimizer.momentum.copy_(momentum)
    other(*batch(64, 2))
    for (name, expected), found in zip(
        network.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), name
