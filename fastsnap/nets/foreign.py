"""Networks of torchvision and timm by name, freshly initialised, with the project's CPU kernels where they fit.

Their weights are never fetched: see --initial for weights to begin with.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models import resnet as torchvision_resnet

from fastsnap.kernels.convolution import fast_convolution
from fastsnap.nets.resnet import KERNEL_OPERATIONS, Operations

LIBRARIES = ("torchvision", "timm")
TIMM_MISSING = "needs timm: pip install 'fastsnap[timm]' (or pip install timm)"
# Arguments of builders that have them: auxiliary outputs are for a loss of their own.
OPTIONS: dict[str, Any] = {"aux_logits": False, "init_weights": True}


def has_timm() -> bool:
    """Whether timm is installed."""
    return importlib.util.find_spec("timm") is not None


@cache
def names(library: str) -> tuple[str, ...]:
    """The classification networks of "torchvision" or "timm", without the library's name before them."""
    if library == "torchvision":
        return tuple(models.list_models(module=models))
    return tuple(importlib.import_module("timm").list_models()) if has_timm() else ()


def build_foreign(
    library: str,
    name: str,
    *,
    classes: int,
    in_channels: int,
    image_size: tuple[int, int] | None,
    operations: Operations,
    check: bool = True,
) -> nn.Module:
    """The network, fp32. Raises ValueError if it cannot be had for these images.

    check  try a forward pass, without memory, on images of `image_size`
    """
    with _default_fp32():
        make = _torchvision if library == "torchvision" else _timm
        try:
            network = make(name, classes, in_channels, image_size)
        except NotImplementedError:
            raise
        except (ValueError, AssertionError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"net {library}:{name} cannot be made for {_what(image_size)}: {error}"
            ) from error
    if operations is KERNEL_OPERATIONS:
        _take_kernels(network)
    if check and image_size:
        _try(network, f"{library}:{name}", in_channels, image_size, classes)
    return network


def _torchvision(name: str, classes: int, in_channels: int, image_size: tuple[int, int] | None) -> nn.Module:
    builder = models.get_model_builder(name)
    options = {key: value for key, value in OPTIONS.items() if key in _parameters(builder)}
    if image_size and name.startswith("vit_"):
        options["image_size"] = image_size[0]
    if image_size and name.startswith("maxvit"):
        options["input_size"] = image_size
    network = builder(weights=None, num_classes=classes, **options)
    if in_channels != 3:
        _change_first_convolution(network, in_channels)
    return network


def _timm(name: str, classes: int, in_channels: int, image_size: tuple[int, int] | None) -> nn.Module:
    if not has_timm():
        raise ValueError(TIMM_MISSING)
    timm = importlib.import_module("timm")
    options = {"pretrained": False, "num_classes": classes, "in_chans": in_channels}
    if image_size:
        try:
            return timm.create_model(name, img_size=image_size, **options)
        except TypeError:  # most take any size, and no argument for it
            pass
    return timm.create_model(name, **options)


def _parameters(builder: Callable[..., Any]) -> set[str]:
    """Names that the builder, or the class that it makes, takes."""
    module = importlib.import_module(builder.__module__)
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__
    ]
    return {
        name
        for value in classes
        if issubclass(value, nn.Module)
        for name in inspect.signature(value).parameters
    }


def _change_first_convolution(network: nn.Module, in_channels: int) -> None:
    """For images of other than three channels; initialised as PyTorch initialises a convolution."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            fresh = nn.Conv2d(
                in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                bias=module.bias is not None,
            )
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, fresh)
            return
    raise ValueError(f"it has no convolution of three channels that could take {in_channels}")


def _try(network: nn.Module, name: str, in_channels: int, image_size: tuple[int, int], classes: int) -> None:
    """Raise ValueError unless the network gives logits for such images."""
    training = network.training
    try:
        output = _on_meta(network)(torch.empty(2, in_channels, *image_size, device="meta"))
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"net {name} cannot take images of {_what(image_size)}: {reason}") from error
    finally:
        network.train(training)
    if not isinstance(output, Tensor) or output.shape != (2, classes):
        shape = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"net {name} gives {shape} instead of a logit for each of {classes} classes: choose another"
        )


def _on_meta(network: nn.Module) -> Callable[[Tensor], Any]:
    """The network with parameters that have no memory, in evaluation: small batches are no fault then."""
    state = {
        name: value.to("meta") for name, value in [*network.named_parameters(), *network.named_buffers()]
    }
    network.eval()

    def forward(images: Tensor) -> Any:
        with torch.no_grad():
            return torch.func.functional_call(network, state, (images,))

    return forward


def _what(image_size: tuple[int, int] | None) -> str:
    return f"{image_size[0]}x{image_size[1]} pixels" if image_size else "images of any size"


@contextmanager
def _default_fp32() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class FastConvolution(nn.Conv2d):
    """A convolution in the CPU kernels where they take it."""

    def forward(self, input: Tensor) -> Tensor:
        return fast_convolution(self, input, super().forward)


class FusedBasicBlock(torchvision_resnet.BasicBlock):
    """torchvision's block with normalisation, shortcut and ReLU in one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        batch_norm_relu = KERNEL_OPERATIONS.batch_norm_relu
        shortcut = x if self.downsample is None else self.downsample(x)
        hidden = batch_norm_relu(self.bn1, self.conv1(x))
        return batch_norm_relu(self.bn2, self.conv2(hidden), shortcut)


class FusedBottleneck(torchvision_resnet.Bottleneck):
    """torchvision's block with normalisation, shortcut and ReLU in one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        batch_norm_relu = KERNEL_OPERATIONS.batch_norm_relu
        shortcut = x if self.downsample is None else self.downsample(x)
        hidden = batch_norm_relu(self.bn1, self.conv1(x))
        hidden = batch_norm_relu(self.bn2, self.conv2(hidden))
        return batch_norm_relu(self.bn3, self.conv3(hidden), shortcut)


def _take_kernels(network: nn.Module) -> None:
    """Give modules of these very classes the forward of their fast versions; names and weights stay as they are."""
    fast: Sequence[tuple[type[nn.Module], type[nn.Module]]] = (
        (nn.Conv2d, FastConvolution),
        (torchvision_resnet.BasicBlock, FusedBasicBlock),
        (torchvision_resnet.Bottleneck, FusedBottleneck),
    )
    for module in network.modules():
        for plain, faster in fast:
            plain_norm = plain is nn.Conv2d or isinstance(
                module.__dict__["_modules"].get("bn1"), nn.BatchNorm2d
            )
            if type(module) is plain and plain_norm:
                module.__class__ = faster
