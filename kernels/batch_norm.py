"""relu(batch_norm(input) + shortcut): on a CPU half of what a small ResNet does besides its convolutions.

On a GPU torch.compile makes fused kernels of the reference, so there is none of the project's own.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .cpu import has_library

DTYPES = (torch.float32, torch.bfloat16)
# In evaluation: below, one pass instead of two or three saves less than calling the kernel takes.
FEWEST_ELEMENTS = 2**16
CHANNELS_MULTIPLE, ELEMENTS_MULTIPLE = 16, 32  # what the CPU kernel handles at a time


def reference_batch_norm_relu(norm: nn.BatchNorm2d, input: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """relu(norm(input) + shortcut) in plain PyTorch, in training and evaluation: what the kernel is tested against.

    input, shortcut  [N, C, H, W]; the shortcut may be missing
    """
    normalized = norm(input)
    return functional.relu(normalized if shortcut is None else normalized + shortcut, inplace=True)


def fused_batch_norm_relu(norm: nn.BatchNorm2d, input: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """The same, in the CPU kernel where it can be used: see `is_fusible`. Sums are taken in fp32 or better, and
    nothing is rounded in between. Backward once.
    """
    # torch.compile cannot look into a kernel, and a graph that asks for the number of elements is for that number.
    if torch.compiler.is_compiling() or not is_fusible(norm, input, shortcut):
        return reference_batch_norm_relu(norm, input, shortcut)
    from .batch_norm_cpu import BatchNormRelu, infer

    if not norm.training:
        return infer(norm, input, shortcut)
    return BatchNormRelu.apply(norm, input, shortcut, norm.weight, norm.bias)


def is_fusible(norm: nn.BatchNorm2d, input: Tensor, shortcut: Tensor | None) -> bool:
    """Whether the kernel takes it: in training, or in evaluation without gradients and not for little, on a CPU, in
    fp32 or bf16, channels-last, a multiple of 16 channels; weights and running statistics in fp32.
    """
    return (
        (norm.training or (input.numel() >= FEWEST_ELEMENTS and not torch.is_grad_enabled()))
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and all(
            _is_vector(values) for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
        and input.device.type == "cpu"
        and input.dtype in DTYPES
        and input.shape[1] % CHANNELS_MULTIPLE == 0
        and input.numel() % ELEMENTS_MULTIPLE == 0
        and input.numel() > input.shape[1]  # one value per channel: PyTorch refuses it
        and input.is_contiguous(memory_format=torch.channels_last)
        and (shortcut is None or _is_like(shortcut, input))
        and has_library()  # last: it warns where there is none
    )


def _is_vector(values: Tensor | None) -> bool:
    """Of fp32 in the CPU's memory, one after the other."""
    return (
        values is not None
        and values.device.type == "cpu"
        and values.dtype == torch.float32
        and values.is_contiguous()
    )


def _is_like(shortcut: Tensor, input: Tensor) -> bool:
    return shortcut.device == input.device and shortcut.dtype == input.dtype and shortcut.shape == input.shape
