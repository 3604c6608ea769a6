"""3x3 convolutions with a gradient of the weights that is faster than PyTorch's: on a CPU with AVX512-BF16, for bf16.

Forward and the gradient of the input stay PyTorch's, which come near what the processor can do. The gradient of the
weights is a sum of products over all pixels; the kernel gives it in fp32, where autocast's is rounded to bf16.
"""

import torch
from torch import Tensor, nn

from .convolution_cpu import Convolution, has_instructions
from .cpu import has_library

MOST_CHANNELS = 64  # from 128 on PyTorch's kernel is at least as fast
CHANNELS_MULTIPLE = 16  # what the CPU kernel handles at a time


def reference_convolution(convolution: nn.Conv2d, input: Tensor) -> Tensor:
    """convolution(input) in plain PyTorch: what the kernel is tested against.

    input  [N, C, H, W]
    """
    return convolution(input)


def fast_convolution(convolution: nn.Conv2d, input: Tensor) -> Tensor:
    """The same; the gradient of the weights comes from the CPU kernel where it can be used: see `is_supported`. Then
    backward once, and hooks on `convolution` are not called.
    """
    if not is_supported(convolution, input):
        return reference_convolution(convolution, input)
    return Convolution.apply(input, convolution.weight, convolution.stride[0])


def is_supported(convolution: nn.Conv2d, input: Tensor) -> bool:
    """Whether the kernel takes it: with a gradient of the weights, under autocast to bf16, on a CPU that can multiply
    bf16 (AVX512-BF16).

    convolution  3x3, padding 1 with zeros, stride 1 or 2, one group, no bias; 16, 32, 48 or 64 channels in and out;
                 weights fp32, channels-last
    input        bf16, channels-last
    """
    weight = convolution.weight
    if not (
        weight.requires_grad
        and torch.is_grad_enabled()
        and input.device.type == weight.device.type == "cpu"
        and input.dtype == torch.bfloat16
        and weight.dtype == torch.float32
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    ):
        return False
    return (
        convolution.kernel_size == (3, 3)
        and convolution.padding == convolution.dilation == (1, 1)
        and convolution.padding_mode == "zeros"
        and convolution.stride in ((1, 1), (2, 2))
        and convolution.groups == 1
        and convolution.bias is None
        and max(weight.shape[:2]) <= MOST_CHANNELS
        and all(channels % CHANNELS_MULTIPLE == 0 for channels in weight.shape[:2])
        and input.numel() > 0
        and input.is_contiguous(memory_format=torch.channels_last)
        and weight.is_contiguous(memory_format=torch.channels_last)
        and has_library()  # late: it warns where there is none
        and has_instructions()
    )
