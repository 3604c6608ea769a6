"""The convolution whose weights get their gradient from convolution_cpu.cpp."""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .cpu import is_built, library

PADDING = (1, 1)


class ConvolutionArguments(ctypes.Structure):
    """`struct Convolution` of convolution_cpu.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("input", "output_gradient", "weight_gradient", "images", "height", "width", "in_channels"),
            *("out_height", "out_width", "out_channels", "stride", "threads"),
        )
    )


@functools.cache
def has_instructions() -> bool:
    """Whether there are kernels, and this processor and their compiler know AVX512-BF16."""
    return is_built() and bool(library().fastsnap_convolution_supported())


class Convolution(torch.autograd.Function):
    """3x3, padding 1, no bias; see convolution.is_supported for what it takes.

    input  [N, C, H, W], bf16; weight  [K, C, 3, 3], fp32, multiplied as bf16; output  bf16
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, stride: int) -> Tensor:
        """PyTorch's."""
        rounded = weight.to(torch.bfloat16)
        ctx.save_for_backward(input, rounded)
        ctx.stride = stride
        return functional.conv2d(input, rounded, None, stride, PADDING)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of forward's arguments."""
        input, weight = ctx.saved_tensors
        input = input.contiguous(
            memory_format=torch.channels_last
        )  # hooks on saved tensors may have changed it
        output_gradient = output_gradient.contiguous(memory_format=torch.channels_last)
        input_gradient = None
        if ctx.needs_input_grad[0]:
            stride = [ctx.stride, ctx.stride]
            input_gradient, *_ = torch.ops.aten.convolution_backward(
                *(output_gradient, input, weight, None, stride, PADDING, [1, 1], False, [0, 0], 1),
                [True, False, False],
            )
        return input_gradient, _weight_gradient(input, output_gradient, ctx.stride), None


def _weight_gradient(input: Tensor, output_gradient: Tensor, stride: int) -> Tensor:
    images, in_channels, height, width = input.shape
    _, out_channels, out_height, out_width = output_gradient.shape
    gradient = torch.empty(
        (out_channels, in_channels, 3, 3),
        dtype=torch.float32,
        device=input.device,
        memory_format=torch.channels_last,
    )
    arguments = ConvolutionArguments(
        input=input.data_ptr(),
        output_gradient=output_gradient.data_ptr(),
        weight_gradient=gradient.data_ptr(),
        images=images,
        height=height,
        width=width,
        in_channels=in_channels,
        out_height=out_height,
        out_width=out_width,
        out_channels=out_channels,
        stride=stride,
        threads=torch.get_num_threads(),
    )
    if not library().fastsnap_convolution_weight_gradient(ctypes.byref(arguments)):
        raise MemoryError(f"no memory for the gradient of a convolution of {list(input.shape)}")
    return gradient
