"""Networks by name: what a name means, the nearest ones for a name that means nothing, and initial weights."""

from torch import nn

from fastsnap.nets import resnet
from fastsnap.nets.resnet import PLAIN_OPERATIONS, Operations


def check_name(name: str) -> None:
    """Raise ValueError, with the nearest names, unless `name` is a network."""
    resnet.parse_name(name)


def build_network(
    name: str,
    *,
    classes: int,
    in_channels: int = 3,
    image_size: tuple[int, int] | None = None,
    shortcut: str = "A",
    stem_stride: int = 1,
    dropout: float = 0.0,
    seed: int = 0,
    operations: Operations = PLAIN_OPERATIONS,
    device: str = "cpu",
) -> nn.Module:
    """A freshly initialised network, fp32; the same seed gives the same weights, whatever was drawn before.

    name         see `check_name`
    classes      >= 1
    in_channels  1 to 3
    image_size   height and width that it will see, where that is known; some networks cannot do with any size
    shortcut     of resnet: see resnet.build_network
    stem_stride  of the first convolution of the CIFAR networks: 1, or 2 for larger images
    dropout      between the convolutions of a wide network's block, 0 to below 1
    operations   PLAIN_OPERATIONS or KERNEL_OPERATIONS, which on a CPU trains faster
    device       "cpu", or "meta": shapes without memory, to see what the network would need
    Raises ValueError for other values.
    """
    return resnet.build_network(
        name,
        classes=classes,
        in_channels=in_channels,
        shortcut=shortcut,
        stem_stride=stem_stride,
        seed=seed,
        operations=operations,
        device=device,
    )
