"""Networks by name, freshly initialised."""

from functools import partial

import torch
from torch import nn

from fastsnap.nets.densenet import DenseNet
from fastsnap.nets.foreign import build_foreign
from fastsnap.nets.names import NetName, parse_name
from fastsnap.nets.preactivation import PreActivationNet
from fastsnap.nets.resnet import PLAIN_OPERATIONS, SHORTCUTS, Operations, ResNet

DROPS = ("wrn", "densenet")  # families that take dropout
SHORTENS = ("resnet", "preresnet")  # families that take a kind of shortcut


def check_options(name: str, shortcut: str, stem_stride: int, dropout: float) -> None:
    """Raise ValueError for a name that is no network's, and for an option that would have no effect on it."""
    net = parse_name(name)
    if dropout and net.family not in DROPS:
        raise ValueError(
            f"dropout has no effect on net {name}, only on wrn and densenet nets; got {dropout}: drop it"
        )
    if shortcut != "A" and net.family not in SHORTENS:
        raise ValueError(
            f"shortcut has no effect on net {name}, only on resnet and preresnet nets; got {shortcut}: leave it out"
        )
    if stem_stride != 1 and net.is_foreign:
        raise ValueError(
            f"stem_stride has no effect on net {name}, whose library decides it; got {stem_stride}: drop it"
        )


def is_random(name: str, dropout: float) -> bool:
    """Whether a training step may draw random numbers within the network: dropout, stochastic depth."""
    return dropout > 0 or parse_name(name).is_foreign


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

    name         see names.parse_name
    classes      >= 1
    in_channels  1 to 3
    image_size   height and width that it will see, where that is known; some networks cannot do with any size
    shortcut     of resnet and preresnet: "A": strided identity and zero-padded channels; "B": 1x1 convolution where the
                 shape changes, in resnet with normalisation; "C": everywhere
    stem_stride  of the first convolution of a net for small images: 1, or 2 for larger ones
    dropout      of wrn, between the convolutions of a block, and of densenet, after each: 0 to below 1
    operations   PLAIN_OPERATIONS or KERNEL_OPERATIONS, which on a CPU trains faster
    device       "cpu", or "meta": shapes without memory, to see what the network would need
    Raises ValueError for other values, and for images that the network cannot take.
    """
    net = parse_name(name)
    if shortcut not in SHORTCUTS:
        raise ValueError(f"shortcut must be one of {', '.join(SHORTCUTS)}, got {shortcut!r}")
    if not 1 <= in_channels <= 3:
        raise ValueError(f"in_channels must be 1, 2 or 3, got {in_channels}")
    if stem_stride not in (1, 2):
        raise ValueError(f"stem_stride must be 1 or 2, got {stem_stride}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}")
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        if net.is_foreign:
            make = partial(
                build_foreign,
                net.family,
                net.model,
                classes=classes,
                in_channels=in_channels,
                image_size=image_size,
                operations=operations,
            )
            try:
                return make()
            except NotImplementedError:  # some compute with what they have initialised, which needs memory
                with torch.device("cpu"):
                    return make().to(device)
        return _own(net, classes, in_channels, shortcut, stem_stride, dropout, operations)


def _own(
    net: NetName,
    classes: int,
    in_channels: int,
    shortcut: str,
    stem_stride: int,
    dropout: float,
    operations: Operations,
) -> nn.Module:
    shape = {"classes": classes, "in_channels": in_channels, "stem_stride": stem_stride}
    if net.family == "densenet":
        return DenseNet(net.blocks, net.width, **shape, dropout=dropout, operations=operations)
    if net.family == "resnet":
        return ResNet(net.blocks, net.width, **shape, shortcut=shortcut, operations=operations)
    # A wide network's shortcut is a 1x1 convolution where the shape changes.
    shortcut = "B" if net.family == "wrn" else shortcut
    return PreActivationNet(
        net.blocks, net.width, **shape, shortcut=shortcut, dropout=dropout, operations=operations
    )
