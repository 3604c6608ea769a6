"""What a network costs: parameters and arithmetic per image, counted on shapes without memory."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastsnap.nets.build import build_network

IMAGES = 2  # in the pass that is counted: normalisation refuses one value per channel
BACKWARD = 2  # times the forward pass's arithmetic


@dataclass(frozen=True)
class Cost:
    """parameters: trained and frozen; gflop: 10^9 floating-point operations of a forward pass per image, where a
    multiplication and an addition are two.
    """

    parameters: int
    gflop: float

    @property
    def training_gflop(self) -> float:
        """Per image of a training step: forward, and twice as much backward."""
        return (1 + BACKWARD) * self.gflop


def cost_of(name: str, *, image_size: tuple[int, int], in_channels: int = 3, **options: Any) -> Cost:
    """Of `build_network`'s network; convolutions and matrix products are counted. Raises ValueError as it does."""
    network = build_network(name, image_size=image_size, in_channels=in_channels, device="meta", **options)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.empty(IMAGES, in_channels, *image_size, dtype=torch.float32, device="meta"))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Cost(parameters, counter.get_total_flops() / IMAGES / 1e9)
