"""A small network on a GPU, its batches and a step of training: shared by the tests that need one."""

import torch
from torch import nn

from fastsnap.kernels.schedule import Schedule

SCHEDULE = Schedule("snapshot", 30, 3, 0.1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    return net.cuda().to(memory_format=torch.channels_last)


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 8, 8, generator=generator).cuda().to(memory_format=torch.channels_last)


def train_step(net, optimizer, images, scaler=None):
    optimizer.zero_grad(set_to_none=True)
    loss = net(images).square().mean()
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
