"""DenseNets for small images (Huang et al. 2017, Densely Connected Convolutional Networks), as the snapshot-ensemble
paper trains them: no bottleneck and no compression.

Depth 3n+4: a 3x3 convolution to 16 channels, three blocks of n layers that each add `growth` channels to what they see,
between them a 1x1 convolution and a 2x2 average.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsnap.nets.resnet import FP32, STEM_CHANNELS, Operations, convolution, require_image_size

BLOCKS = 3


class DenseLayer(nn.Module):
    """Normalise and convolve what came so far; put the result behind it."""

    def __init__(self, in_channels: int, growth: int, dropout: float, operations: Operations) -> None:
        super().__init__()
        self.operations, self.dropout = operations, dropout
        self.bn = nn.BatchNorm2d(in_channels, **FP32)
        self.conv = convolution(in_channels, growth, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        new = self.operations.convolution(self.conv, self.operations.batch_norm_relu(self.bn, images))
        if self.dropout:
            new = functional.dropout(new, self.dropout, self.training)
        return torch.cat([images, new], dim=1)


class Transition(nn.Module):
    """Half the height and width, as many channels."""

    def __init__(self, channels: int, dropout: float, operations: Operations) -> None:
        super().__init__()
        self.operations, self.dropout = operations, dropout
        self.bn = nn.BatchNorm2d(channels, **FP32)
        self.conv = convolution(channels, channels, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv(self.operations.batch_norm_relu(self.bn, images))
        if self.dropout:
            hidden = functional.dropout(hidden, self.dropout, self.training)
        return functional.avg_pool2d(hidden, 2)


class DenseNet(nn.Module):
    """images [N, in_channels, H, W], H and W >= 8 -> logits [N, classes]."""

    def __init__(
        self,
        layers: int,
        growth: int,
        *,
        classes: int,
        in_channels: int,
        stem_stride: int,
        dropout: float,
        operations: Operations,
    ) -> None:
        super().__init__()
        self.operations, self.stem_stride = operations, stem_stride
        self.conv1 = convolution(in_channels, STEM_CHANNELS, 3, stem_stride)
        channels = STEM_CHANNELS
        parts: list[nn.Module] = []
        for block in range(BLOCKS):
            for _ in range(layers):
                parts.append(DenseLayer(channels, growth, dropout, operations))
                channels += growth
            if block + 1 < BLOCKS:
                parts.append(Transition(channels, dropout, operations))
        self.features = nn.Sequential(*parts)
        self.bn = nn.BatchNorm2d(channels, **FP32)
        self.linear = nn.Linear(channels, classes, **FP32)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        require_image_size(images, self.stem_stride)
        hidden = self.operations.batch_norm_relu(self.bn, self.features(self.conv1(images)))
        return self.linear(hidden.mean(dim=(2, 3)))
