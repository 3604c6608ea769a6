"""One contiguous tensor for all trainable parameters of a network.

The parameters stay ordinary `nn.Parameter`s, but their memory becomes part of one tensor: a snapshot is one copy, a
checkpoint one tensor, an average of weights one lerp, an update one launch. Each keeps a storage object of its own,
because savers (torch.save, safetensors, accelerate) take tensors of one storage for aliases of each other, and write
all of it or leave them out. Gradients stay where autograd puts them: gradient views assigned in advance would make it
accumulate in place, a kernel more for every tensor.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastsnap.kernels.update import Layout

GRADIENT_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
ALIGNMENT = 16  # elements; 32 bytes in bf16, so 128-bit accesses are aligned at the start of every parameter


class FlatParameters:
    """Memory that the parameters of a network share, one after the other.

    parameters  a module (those of its parameters that need a gradient) or (name, parameter) pairs (all of them);
                a parameter that comes twice counts once
    device      where the memory lies; default: where the parameters are

    data        fp32 or bf16 [numel, padded]; the gaps between parameters are zero and stay zero
    names, parameters, offsets, strides
                one entry per parameter, in the order given; offsets in elements, multiples of ALIGNMENT
    Dense parameters keep their strides, which DistributedDataParallel may already have built on: for channels-last
    storage, make the network channels-last before. Others become dense. Existing gradients stay.
    Nobody is told that `data` and the parameters share memory: a compiled function must not write one and read another.
    Raises ValueError for parameters of several or other dtypes, of several devices, that are no plain tensors (FSDP2's
    DTensors, lazy ones), and for none at all.
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[tuple[str, nn.Parameter]],
        device: torch.device | str | None = None,
    ) -> None:
        if isinstance(parameters, nn.Module):
            parameters = [(name, p) for name, p in parameters.named_parameters() if p.requires_grad]
        unique = {parameter: name for name, parameter in parameters}
        self.names = list(unique.values())
        self.parameters = list(unique)
        self.attach(device)

    def attach(self, device: torch.device | str | None = None) -> None:
        """Bring the parameters, as and where they are now, into a new `data`: at first, and after they were moved.

        Raises ValueError, and changes nothing, for parameters that do not fit together.
        """
        _require_one_kind(self.names, self.parameters)
        self.offsets, numel = [], 0
        for parameter in self.parameters:
            self.offsets.append(numel)
            numel += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
        first = self.parameters[0]
        self.strides = [torch.empty_like(parameter, device="meta").stride() for parameter in self.parameters]
        self._shapes = [parameter.shape for parameter in self.parameters]
        # Of the gradients; those of dimensions of size 1 may differ from the parameters'.
        self._usual_strides = self.strides
        self.data = torch.zeros(numel, dtype=first.dtype, device=first.device if device is None else device)
        views = self.views(self.data)
        self._addresses = [view.data_ptr() for view in views]
        with torch.no_grad():
            for parameter, view in zip(self.parameters, views, strict=True):
                view.copy_(parameter)
                parameter.data = view

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parts of `flat`, a tensor of the size of `data`, with the shapes and strides of the parameters.

        The same memory, in both directions, but each with a storage object of its own; it lives as long as they do.
        """
        if flat.shape != self.data.shape:
            raise ValueError(f"flat must have shape {list(self.data.shape)}, got {list(flat.shape)}")
        return [
            own_storage(flat.as_strided(parameter.shape, strides, flat.storage_offset() + offset))
            for parameter, strides, offset in zip(self.parameters, self.strides, self.offsets, strict=True)
        ]

    def layout(self) -> Layout:
        """Starts and sizes of the parameters, as the update kernels take them."""
        return Layout(tuple(self.offsets), tuple(parameter.numel() for parameter in self.parameters))

    def detached(self) -> list[str]:
        """Names of the parameters that no longer lie in `data`: net.to(...) and `parameter.data = ...` do it."""
        addresses = list(map(Tensor.data_ptr, self.parameters))
        if addresses == self._addresses:
            return []
        return [self.names[i] for i, address in enumerate(addresses) if address != self._addresses[i]]

    def moved(self) -> bool:
        """Whether all parameters together are on another device, or of another dtype, than `data`.

        Then the network was moved or converted as a whole. Parameters elsewhere on the same device may be somebody
        else's by now.
        """
        places = {(parameter.device, parameter.dtype) for parameter in self.parameters}
        return len(places) == 1 and places != {(self.data.device, self.data.dtype)}

    def gradients(self) -> tuple[list[Tensor | None], torch.dtype]:
        """The gradients, dense and in the memory order of `data`, and their dtype; None where there is none.

        A gradient of other strides, or whose sign is still to be turned (torch.imag of a conjugate), is copied.
        Raises ValueError naming the parameter for one that is sparse, of another shape, on another device or neither
        fp32, bf16 nor fp16, and for several dtypes.
        """
        gradients = [parameter.grad for parameter in self.parameters]
        dtypes = {gradient.dtype for gradient in gradients if gradient is not None}
        if not (dtypes <= GRADIENT_DTYPES and self._usual(gradients)):
            gradients = [None if g is None else self._usable(i, g) for i, g in enumerate(gradients)]
            self._usual_strides = [gradient.stride() for gradient in gradients if gradient is not None]
        if len(dtypes) > 1:
            raise ValueError(f"gradients must be of one dtype, got {sorted(map(str, dtypes))}")
        return gradients, dtypes.pop() if dtypes else torch.float32

    def _usual(self, gradients: list[Any]) -> bool:
        """Whether all are as autograd leaves them, dtypes aside; in whole passes, since this runs at every step."""
        try:
            strides = list(map(Tensor.stride, gradients))
        except (TypeError, RuntimeError):  # None, or sparse
            return False
        return (
            strides == self._usual_strides
            and [gradient.shape for gradient in gradients] == self._shapes
            and set(map(Tensor.get_device, gradients)) == {self.data.get_device()}
            and not any(map(Tensor.is_neg, gradients))
        )

    def _usable(self, index: int, gradient: Tensor) -> Tensor:
        device, shape = self.data.device, self._shapes[index]
        if gradient.layout is not torch.strided or gradient.dtype not in GRADIENT_DTYPES:
            wanted, got = "dense float32, bfloat16 or float16", f"{gradient.layout} {gradient.dtype}"
        elif gradient.device != device or gradient.shape != shape:
            wanted, got = f"{list(shape)} on {device}", f"{list(gradient.shape)} on {gradient.device}"
        else:
            strides = self.strides[index]
            if self.parameters[index].stride() != strides:
                raise ValueError(
                    f"parameter {self.names[index]} must keep its strides {strides}: transpose a copy"
                )
            if _same_order(shape, gradient.stride(), strides):
                return gradient.resolve_neg()
            return torch.empty_strided(shape, strides, dtype=gradient.dtype, device=device).copy_(gradient)
        raise ValueError(f"the gradient of parameter {self.names[index]} must be {wanted}, got {got}")


def _same_order(shape: torch.Size, one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether strides `one` and `other` put the elements in one order: those of dimensions of size 1 do not matter."""
    return all(size == 1 or a == b for size, a, b in zip(shape, one, other, strict=True))


def own_storage(view: Tensor) -> Tensor:
    """The memory of `view` behind a storage object of its own, which keeps that memory alive; CPU or CUDA.

    PyTorch's allocator does not know this storage, so Tensor.record_stream has no effect on it: who frees the network
    while another stream still reads it, has to wait for that stream.
    """
    # DLPack's strides of dimensions of size 1 are those of PyTorch only by luck.
    return torch.from_dlpack(view).as_strided(view.shape, view.stride())


def _require_one_kind(names: list[str], parameters: list[nn.Parameter]) -> None:
    if not parameters:
        raise ValueError("parameters must hold at least one that needs a gradient, got none")
    first = parameters[0]
    for name, parameter in zip(names, parameters, strict=True):
        _require_plain(name, parameter)
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"parameter {name} must be float32 or bfloat16, got {parameter.dtype}")
        if parameter.dtype != first.dtype or parameter.device != first.device:
            raise ValueError(
                f"parameter {name} is {parameter.dtype} on {parameter.device}, but {names[0]} is {first.dtype} "
                f"on {first.device}: flat storage needs one of each; convert the network with .to(...) before"
            )


def _require_plain(name: str, parameter: nn.Parameter) -> None:
    if is_lazy(parameter):
        raise ValueError(
            f"parameter {name} has no shape yet: send a batch through the network before the optimizer is made"
        )
    kind = type(parameter.data)
    if kind is not Tensor or parameter.layout is not torch.strided:
        raise ValueError(
            f"parameter {name} must be a plain dense tensor, got {kind.__name__}, {parameter.layout}: flat storage "
            "holds whole parameters. Instead of FSDP or tensor parallelism (fully_shard, parallelize_module) use "
            "DistributedDataParallel, or torch.optim.SGD with LambdaLR(optimizer, schedule.rate_after)"
        )
    if parameter.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"parameter {name} must be on cpu or cuda, got {parameter.device}: move the network there (from meta: "
            "network.to_empty(device=...)) in a line before the one that makes the optimizer"
        )
