"""Networks whose blocks normalise before they convolve: pre-activation ResNets and wide ones, for small images.

He et al. 2016, Identity Mappings in Deep Residual Networks: depth 6n+2, widths 16, 32, 64. Zagoruyko and Komodakis
2016, Wide Residual Networks: depth 6n+4, widths 16k, 32k, 64k, dropout between the convolutions of a block. Both
normalise and convolve a block's input once where the shape changes, and add what they did not touch elsewhere.
"""

from torch import Tensor, nn
from torch.nn import functional

from fastsnap.nets.resnet import (
    FP32,
    STEM_CHANNELS,
    Operations,
    PaddedIdentity,
    convolution,
    require_image_size,
)


class PreActivationBlock(nn.Module):
    """Normalise, 3x3 convolution, normalise, 3x3 convolution, and a shortcut around them."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        shortcut: str,
        dropout: float,
        operations: Operations,
    ) -> None:
        super().__init__()
        self.operations, self.dropout = operations, dropout
        self.bn1 = nn.BatchNorm2d(in_channels, **FP32)
        self.conv1 = convolution(in_channels, out_channels, 3, stride)
        self.bn2 = nn.BatchNorm2d(out_channels, **FP32)
        self.conv2 = convolution(out_channels, out_channels, 3, 1)
        self.shortcut = _shortcut(shortcut, in_channels, out_channels, stride)

    def forward(self, images: Tensor) -> Tensor:
        convolve, batch_norm_relu = self.operations.convolution, self.operations.batch_norm_relu
        normalised = batch_norm_relu(self.bn1, images)
        hidden = batch_norm_relu(self.bn2, convolve(self.conv1, normalised))
        if self.dropout:
            hidden = functional.dropout(hidden, self.dropout, self.training)
        projects = isinstance(self.shortcut, nn.Conv2d)
        return convolve(self.conv2, hidden) + self.shortcut(normalised if projects else images)


def _shortcut(kind: str, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    same_shape = in_channels == out_channels and stride == 1
    if kind == "C" or (kind == "B" and not same_shape):
        return convolution(in_channels, out_channels, 1, stride)
    return nn.Identity() if same_shape else PaddedIdentity(out_channels - in_channels, stride)


class PreActivationNet(nn.Module):
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
        dropout: float,
        operations: Operations,
    ) -> None:
        super().__init__()
        self.operations, self.stem_stride = operations, stem_stride
        self.conv1 = convolution(in_channels, STEM_CHANNELS, 3, stem_stride)
        channels = STEM_CHANNELS
        stages = []
        for stage in range(3):
            out_channels = STEM_CHANNELS * width * 2**stage
            layers = []
            for stride in [2 if stage else 1] + [1] * (blocks - 1):
                layers.append(
                    PreActivationBlock(channels, out_channels, stride, shortcut, dropout, operations)
                )
                channels = out_channels
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels, **FP32)
        self.linear = nn.Linear(channels, classes, **FP32)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        require_image_size(images, self.stem_stride)
        hidden = self.operations.batch_norm_relu(self.bn, self.stages(self.conv1(images)))
        return self.linear(hidden.mean(dim=(2, 3)))
