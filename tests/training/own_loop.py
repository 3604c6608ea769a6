"""A training loop that is not the project's: random images, a small network, and any optimizer."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsnap import Schedule, SnapshotRecorder, SnapshotSGD

SCHEDULE = Schedule("snapshot", steps=23, cycles=2, learning_rate=0.1)
STEPS_PER_EPOCH = 4
CLASSES = 5
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def make_network(seed: int = 0) -> nn.Module:
    """With dropout, which draws from PyTorch's generator, and batch normalisation, which has buffers."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 36, CLASSES))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """16 images and their labels."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 3, 8, 8, generator=generator), torch.randint(CLASSES, (16,), generator=generator)


def snapshot_sgd(network: nn.Module) -> torch.optim.Optimizer:
    """The project's own."""
    return SnapshotSGD(network.named_parameters(), SCHEDULE)


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    """Whose rate a scheduler tells."""
    return torch.optim.SGD(network.parameters(), 1.0, momentum=0.9)


def adamw(network: nn.Module) -> torch.optim.Optimizer:
    """With two moments, and a step of its own."""
    return torch.optim.AdamW(network.parameters(), 1.0)


def record(path: Path, make_optimizer: MakeOptimizer, until: int | None = None) -> SnapshotRecorder:
    """Train in the run folder `path`, from where it is, to the step `until`: the end, unless the loop is stopped."""
    network = make_network()
    optimizer = make_optimizer(network)
    recorder = SnapshotRecorder(
        path, network, SCHEDULE, classes=CLASSES, steps_per_epoch=STEPS_PER_EPOCH, optimizer=optimizer
    )
    with recorder:
        begin = recorder.resume()
        scheduler = None
        if not isinstance(optimizer, SnapshotSGD):
            scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, SCHEDULE.rate_after, last_epoch=begin - 1
            )
        for step in range(begin, SCHEDULE.steps if until is None else until):
            images, labels = batch(step)
            loss = functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler:
                scheduler.step()
            recorder.update(loss)
    return recorder
