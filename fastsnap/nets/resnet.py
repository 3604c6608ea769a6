"""ResNets for small images, as the snapshot-ensemble paper trains them (He et al. 2016, section 4.2).

Depth 6n+2: a 3x3 convolution to 16 channels, three stages of n basic blocks with 16k, 32k and 64k channels (k: the
width multiplier), global average pooling and a linear layer. Initialisation and shortcuts follow the authors' code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsnap.kernels.batch_norm import fused_batch_norm_relu, reference_batch_norm_relu
from fastsnap.kernels.convolution import fast_convolution, reference_convolution

STEM_CHANNELS = 16
SHORTCUTS = ("A", "B", "C")
FP32: dict[str, Any] = {"dtype": torch.float32}  # the weights, whatever torch's default is
SMALLEST_IMAGE = 8  # pixels; the last stage then still sees 2x2


@dataclass(frozen=True)
class Operations:
    """What a network computes its layers with: see fastsnap.kernels.convolution and .batch_norm."""

    convolution: Callable[[nn.Conv2d, Tensor], Tensor]
    batch_norm_relu: Callable[..., Tensor]


# Plain PyTorch, for any device and for torch.compile, which cannot look into a kernel.
PLAIN_OPERATIONS = Operations(reference_convolution, reference_batch_norm_relu)
# The CPU kernels where they can be used, elsewhere PyTorch.
KERNEL_OPERATIONS = Operations(fast_convolution, fused_batch_norm_relu)


def convolution(in_channels: int, out_channels: int, kernel: int, stride: int) -> nn.Conv2d:
    """Without a bias, initialised as the authors' code does: N(0, sqrt(2 / (k k out_channels)))."""
    convolution = nn.Conv2d(
        in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False, **FP32
    )
    nn.init.normal_(convolution.weight, std=math.sqrt(2 / (kernel * kernel * out_channels)))
    return convolution


def require_image_size(images: Tensor, stem_stride: int) -> None:
    """Raise ValueError for images [N, C, H, W] of which the last stage would see less than 2x2."""
    smallest = SMALLEST_IMAGE * stem_stride
    if min(images.shape[2:]) < smallest:
        raise ValueError(f"images must be at least {smallest} pixels wide and high, got {list(images.shape)}")


class PaddedIdentity(nn.Module):
    """Shortcut A: the identity, strided, with zeros for the new channels; it has no parameters."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, images: Tensor) -> Tensor:
        strided = images[:, :, :: self.stride, :: self.stride]
        return functional.pad(strided, (0, 0, 0, 0, 0, self.new_channels))


def _shortcut(kind: str, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    same_shape = in_channels == out_channels and stride == 1
    if kind == "C" or (kind == "B" and not same_shape):
        return nn.Sequential(
            convolution(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels, **FP32)
        )
    return nn.Identity() if same_shape else PaddedIdentity(out_channels - in_channels, stride)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and a shortcut around them."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, shortcut: str, operations: Operations
    ) -> None:
        super().__init__()
        self.operations = operations
        self.conv1 = convolution(in_channels, out_channels, 3, stride)
        self.bn1 = nn.BatchNorm2d(out_channels, **FP32)
        self.conv2 = convolution(out_channels, out_channels, 3, 1)
        self.bn2 = nn.BatchNorm2d(out_channels, **FP32)
        self.shortcut = _shortcut(shortcut, in_channels, out_channels, stride)

    def forward(self, images: Tensor) -> Tensor:
        convolution, batch_norm_relu = self.operations.convolution, self.operations.batch_norm_relu
        hidden = batch_norm_relu(self.bn1, convolution(self.conv1, images))
        return batch_norm_relu(self.bn2, convolution(self.conv2, hidden), self.shortcut(images))


class ResNet(nn.Module):
    """images [N, in_channels, H, W], H and W >= 8 -> logits [N, classes]."""

    def __init__(
        self,
        blocks: int,
        width: int,
        *,
        classes: int,
        in_channels: int,
        shortcut: str,
        stem_stride: int,
        operations: Operations,
    ) -> None:
        super().__init__()
        self.operations, self.stem_stride = operations, stem_stride
        self.conv1 = convolution(in_channels, STEM_CHANNELS, 3, stem_stride)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS, **FP32)
        channels = STEM_CHANNELS
        stages = []
        for stage in range(3):
            out_channels = STEM_CHANNELS * width * 2**stage
            strides = [2 if stage else 1] + [1] * (blocks - 1)
            layers = []
            for stride in strides:
                layers.append(BasicBlock(channels, out_channels, stride, shortcut, operations))
                channels = out_channels
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(channels, classes, **FP32)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        require_image_size(images, self.stem_stride)
        hidden = self.operations.batch_norm_relu(self.bn1, self.conv1(images))
        return self.linear(self.stages(hidden).mean(dim=(2, 3)))
