"""The fp32 convolution on a CPU: a call into winograd_cpu.cpp for the output and for each gradient."""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cpu import library

POINTERS = ("input", "weight", "output", "output_gradient", "weight_gradient")
SIZES = ("images", "height", "width", "in_channels", "out_channels")


class WinogradArguments(ctypes.Structure):
    """`struct Winograd` of winograd_cpu.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_int64) for name in (*POINTERS, *SIZES, "turned", "instructions", "threads")
    )


def instructions() -> int:
    """The instruction set in force: 2 AVX-512, 1 AVX2, 0 neither, with which there is no kernel."""
    return int(library().fastsnap_winograd_instructions())


class WinogradConvolution(torch.autograd.Function):
    """3x3, stride 1, padding 1, no bias; see convolution.is_winograd_supported for what it takes.

    input  [N, C, H, W], weight  [K, C, 3, 3], output  [N, K, H, W]; fp32
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        """The convolution."""
        ctx.save_for_backward(input, weight)
        return _convolve(input, weight, weight.shape[0], turned=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of forward's arguments."""
        # A caller chooses the memory order of gradients, and hooks on saved tensors may change theirs.
        input, weight, output_gradient = (
            tensor.contiguous(memory_format=torch.channels_last)
            for tensor in (*ctx.saved_tensors, output_gradient)
        )
        input_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:  # a convolution with the taps turned around and the channels exchanged
            input_gradient = _convolve(output_gradient, weight, input.shape[1], turned=True)
        if ctx.needs_input_grad[1]:
            weight_gradient = torch.empty_like(weight)
            _call(
                "fastsnap_winograd_weight_gradient",
                input,
                weight.shape[0],
                output_gradient=output_gradient,
                weight_gradient=weight_gradient,
            )
        return input_gradient, weight_gradient


def convolve(input: Tensor, weight: Tensor) -> Tensor:
    """The convolution, where no gradient is wanted: autograd's part takes as long as a small image."""
    return _convolve(input, weight, weight.shape[0], turned=False)


def _convolve(input: Tensor, weight: Tensor, out_channels: int, *, turned: bool) -> Tensor:
    images, _, *pixels = input.shape
    output = torch.empty(
        *(images, out_channels, *pixels),
        dtype=input.dtype,
        device=input.device,
        memory_format=torch.channels_last,
    )
    _call("fastsnap_winograd_convolution", input, out_channels, turned, weight=weight, output=output)
    return output


def _call(function: str, input: Tensor, out_channels: int, turned: bool = False, **tensors: Tensor) -> None:
    images, in_channels, height, width = input.shape
    arguments = WinogradArguments(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        input=input.data_ptr(),
        images=images,
        height=height,
        width=width,
        in_channels=in_channels,
        out_channels=out_channels,
        turned=turned,
        instructions=instructions(),
        threads=torch.get_num_threads(),
    )
    if not getattr(library(), function)(ctypes.byref(arguments)):
        raise MemoryError(f"no memory for a convolution of {list(input.shape)}")
