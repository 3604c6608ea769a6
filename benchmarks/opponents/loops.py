"""Training loops that a user would write by hand: the usual one, a careful one, and one of timm's parts."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from fastsnap.device import AUTOCAST_DTYPES, choose_precision
from fastsnap.nets.build import build_network
from harness.paced import Pace
from harness.task import CLASSES, Task
from opponents.loaders import make_loader


def plain_loop(pace: Pace, task: Task) -> None:
    """DataLoader, torch.optim.SGD, a scheduler; float32."""
    network = build_network(task.net, classes=CLASSES).to(task.device).train()
    optimizer = _sgd(network, task)
    loader = make_loader(task)
    scheduler = _warm_restarts(optimizer, task, loader)
    for _ in range(task.epochs):
        for images, labels in pace.batches(loader):
            images, labels = images.to(task.device), labels.to(task.device)
            optimizer.zero_grad()
            loss = functional.cross_entropy(network(images), labels)
            loss.backward()
            optimizer.step()
            scheduler.step()


def careful_loop(pace: Pace, task: Task) -> None:
    """The same with channels-last memory, autocast to the task's precision and fused SGD; compiled on CUDA."""
    network = _channels_last(task)
    optimizer = _sgd(network, task, fused=True)
    loader = make_loader(task)
    scheduler = _warm_restarts(optimizer, task, loader)
    _train_carefully(pace, task, network, optimizer, loader, lambda step: scheduler.step())


def timm_loop(pace: Pace, task: Task) -> None:
    """The careful loop with timm's optimizer factory and its cosine scheduler with cycles, stepped per update."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    network = _channels_last(task)
    optimizer = create_optimizer_v2(
        network,
        opt="sgd",  # with Nesterov momentum
        lr=task.learning_rate,
        momentum=task.momentum,
        weight_decay=task.weight_decay,
        filter_bias_and_bn=False,
        fused=True,
    )
    loader = make_loader(task)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=_steps_per_cycle(task, loader),
        cycle_limit=task.cycles,
        t_in_epochs=False,
    )
    _train_carefully(pace, task, network, optimizer, loader, scheduler.step_update)


def _sgd(network: nn.Module, task: Task, *, fused: bool | None = None) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        network.parameters(),
        task.learning_rate,
        momentum=task.momentum,
        weight_decay=task.weight_decay,
        nesterov=True,
        fused=fused,
    )


def _channels_last(task: Task) -> nn.Module:
    network = build_network(task.net, classes=CLASSES).to(task.device)
    return network.to(memory_format=torch.channels_last).train()


def _steps_per_cycle(task: Task, loader: DataLoader) -> int:
    return -(-task.epochs * len(loader) // task.cycles)


def _warm_restarts(
    optimizer: torch.optim.Optimizer, task: Task, loader: DataLoader
) -> torch.optim.lr_scheduler.LRScheduler:
    schedulers = torch.optim.lr_scheduler
    return schedulers.CosineAnnealingWarmRestarts(optimizer, _steps_per_cycle(task, loader))


def _train_carefully(
    pace: Pace,
    task: Task,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader,
    set_rate: Callable[[int], None],
) -> None:
    """set_rate  called after each update with the number of updates done"""
    precision = choose_precision(task.precision, torch.device(task.device)).name
    dtype = AUTOCAST_DTYPES.get(precision)
    scaler = torch.amp.GradScaler(task.device, enabled=precision == "fp16")
    forward: Callable[[Tensor], Tensor] = torch.compile(network) if task.device == "cuda" else network
    step = 0
    for _ in range(task.epochs):
        for images, labels in pace.batches(loader):
            images = images.to(task.device, memory_format=torch.channels_last, non_blocking=True)
            labels = labels.to(task.device, non_blocking=True)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(task.device, dtype, enabled=dtype is not None):
                loss = functional.cross_entropy(forward(images), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            step += 1
            set_rate(step)
