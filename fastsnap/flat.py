"""One contiguous tensor for all trainable parameters of a network.

The parameters stay ordinary `nn.Parameter`s, but their memory becomes views into one tensor: a snapshot is one copy, a
checkpoint one tensor, an average of weights one lerp, an update one launch. Gradients stay where autograd puts them:
gradient views assigned in advance would make autograd accumulate in place, one more kernel for every tensor.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

ALIGNMENT = 16  # elements between possible starts: 32 bytes in bf16, so that 128-bit accesses are aligned


class FlatParameters:
    """Storage [numel, padded] fp32 or bf16, whose views the trainable parameters of a network become.

    parameters  a module, or (name, parameter) pairs such as `module.named_parameters()`; those that need no gradient
                are left alone, those that share one tensor count once
    device      where the storage lies; default: where the parameters are

    data        the storage; the gaps between parameters are zero and stay zero
    names, parameters, offsets
                one entry per parameter, in the order given; offsets are in elements, multiples of ALIGNMENT
    Convolution weights (4 dimensions) are laid out channels-last, everything else row-major.
    Raises ValueError for parameters of several dtypes or devices, other dtypes, and when there is none.
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[tuple[str, nn.Parameter]],
        device: torch.device | str | None = None,
    ) -> None:
        named = parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters
        unique = {parameter: name for name, parameter in named if parameter.requires_grad}
        self.names = list(unique.values())
        self.parameters = list(unique)
        _require_one_kind(self.names, self.parameters)
        self.offsets, numel = [], 0
        for parameter in self.parameters:
            self.offsets.append(numel)
            numel += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        first = self.parameters[0]
        self.data = torch.zeros(numel, dtype=first.dtype, device=first.device if device is None else device)
        self._attach()

    def _attach(self) -> None:
        views = self.views(self.data)
        with torch.no_grad():
            for parameter, view in zip(self.parameters, views, strict=True):
                view.copy_(parameter)
                parameter.data = view
        self.strides = [view.stride() for view in views]
        self._addresses = [view.data_ptr() for view in views]

    def views(self, flat: Tensor) -> list[Tensor]:
        """Views of `flat`, a tensor of the size of `data`, with the shapes and strides of the parameters."""
        if flat.shape != self.data.shape:
            raise ValueError(f"flat must have shape {tuple(self.data.shape)}, got {tuple(flat.shape)}")
        return [
            flat.as_strided(parameter.shape, _strides(parameter.shape), flat.storage_offset() + offset)
            for parameter, offset in zip(self.parameters, self.offsets, strict=True)
        ]

    def attached(self) -> bool:
        """Whether every parameter still is a view of `data`: moving or re-assigning the network breaks it."""
        return [parameter.data_ptr() for parameter in self.parameters] == self._addresses


def _strides(shape: torch.Size) -> tuple[int, ...]:
    """Strides of a dense tensor of `shape`: channels-last for 4 dimensions, else row-major."""
    memory_format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, device="meta", memory_format=memory_format).stride()


def _require_one_kind(names: list[str], parameters: list[nn.Parameter]) -> None:
    if not parameters:
        raise ValueError("parameters must hold at least one that needs a gradient, got none")
    first = parameters[0]
    for name, parameter in zip(names, parameters, strict=True):
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"parameter {name} must be float32 or bfloat16, got {parameter.dtype}")
        if parameter.dtype != first.dtype or parameter.device != first.device:
            raise ValueError(
                f"parameter {name} is {parameter.dtype} on {parameter.device}, but {names[0]} is {first.dtype} on "
                f"{first.device}: flat storage needs one dtype and one device; convert the network with .to(...) first"
            )
