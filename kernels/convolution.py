"""3x3 convolutions of few channels that are faster than PyTorch's on a CPU: in fp32 all of it, in bf16 a gradient.

In fp32, with AVX-512 or AVX2, by Winograd's method, which takes 16 products where 36 are usual (winograd_cpu.cpp).
Output and gradients are about as near to the exact ones as PyTorch's, but what is not finite becomes NaN and spreads
to the neighbours that are computed together with it.

In bf16, with AVX512-BF16, the gradient of the weights (convolution_cpu.cpp), a sum of products over all pixels; the
kernel gives it in fp32, where autocast's is rounded to bf16. Forward and the gradient of the input stay PyTorch's,
which come near what the processor can do.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .convolution_cpu import Convolution, has_instructions
from .cpu import has_library
from .winograd_cpu import WinogradConvolution, convolve, instructions

MOST_CHANNELS = 64  # in bf16, from 128 on PyTorch's kernel is at least as fast; in fp32 more were not tried
CHANNELS_MULTIPLE = 16  # what the CPU kernels handle at a time
FEWEST_PIXELS = 512  # of all images, in fp32: below, transforming the weights takes what the method saves


def reference_convolution(convolution: nn.Conv2d, input: Tensor) -> Tensor:
    """convolution(input) in plain PyTorch: what the kernels are tested against.

    input  [N, C, H, W]
    """
    return convolution(input)


def fast_convolution(
    convolution: nn.Conv2d, input: Tensor, otherwise: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The same, in a CPU kernel where one can be used: see `is_winograd_supported` and `is_supported`. Then backward
    once, and hooks on `convolution` are not called.

    otherwise  takes what no kernel does; default: the reference
    """
    if torch.compiler.is_compiling():  # which cannot look into a kernel
        return reference_convolution(convolution, input) if otherwise is None else otherwise(input)
    if is_winograd_supported(convolution, input):
        if torch.is_grad_enabled():
            return WinogradConvolution.apply(input, convolution.weight)
        return convolve(input, convolution.weight)
    if is_supported(convolution, input):
        return Convolution.apply(input, convolution.weight, convolution.stride[0])
    return reference_convolution(convolution, input) if otherwise is None else otherwise(input)


def is_winograd_supported(convolution: nn.Conv2d, input: Tensor) -> bool:
    """Whether the fp32 kernels take it: without autocast, on a CPU with AVX-512 or AVX2.

    convolution  3x3, padding 1 with zeros, stride 1, one group, no bias; 16, 32, 48 or 64 channels in and out;
                 weights fp32, channels-last
    input        fp32, channels-last, at least 512 pixels in all images together
    """
    return (
        input.numel()
        >= FEWEST_PIXELS * input.shape[1]  # first: small inputs are done in less than the rest takes
        and input.device.type == convolution.weight.device.type == "cpu"
        and input.dtype == convolution.weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and convolution.stride == (1, 1)
        and _has_layout(convolution, input)
        and has_library()
        and instructions() > 0
    )


def is_supported(convolution: nn.Conv2d, input: Tensor) -> bool:
    """Whether the bf16 kernel takes it: with a gradient of the weights, under autocast to bf16, on a CPU that can
    multiply bf16 (AVX512-BF16).

    convolution  3x3, padding 1 with zeros, stride 1 or 2, one group, no bias; 16, 32, 48 or 64 channels in and out;
                 weights fp32, channels-last
    input        bf16, channels-last
    """
    weight = convolution.weight
    return (
        weight.requires_grad
        and torch.is_grad_enabled()
        and input.device.type == weight.device.type == "cpu"
        and input.dtype == torch.bfloat16
        and weight.dtype == torch.float32
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and convolution.stride in ((1, 1), (2, 2))
        and _has_layout(convolution, input)
        and has_library()  # late: it warns where there is none
        and has_instructions()
    )


def _has_layout(convolution: nn.Conv2d, input: Tensor) -> bool:
    """What all kernels ask for."""
    weight = convolution.weight
    return (
        input.dim() == 4
        and input.shape[1] == weight.shape[1]
        and convolution.kernel_size == (3, 3)
        and convolution.padding == convolution.dilation == (1, 1)
        and convolution.padding_mode == "zeros"
        and convolution.groups == 1
        and convolution.bias is None
        and max(weight.shape[:2]) <= MOST_CHANNELS
        and all(channels % CHANNELS_MULTIPLE == 0 for channels in weight.shape[:2])
        and input.numel() > 0
        and input.is_contiguous(memory_format=torch.channels_last)
        and weight.is_contiguous(memory_format=torch.channels_last)
    )
