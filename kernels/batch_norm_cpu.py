"""The fused batch normalisation on a CPU: a call into batch_norm_cpu.cpp for each direction."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .cpu import address, library

POINTERS = (
    *("input", "shortcut", "output", "weight", "bias", "mean", "inverse_deviation", "running_mean"),
    *("running_variance", "output_gradient", "input_gradient", "shortcut_gradient", "weight_gradient"),
    "bias_gradient",
)


class BatchNormArguments(ctypes.Structure):
    """`struct BatchNorm` of batch_norm_cpu.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (*POINTERS, "rows", "channels", "bfloat16", "training", "threads")
        ),
        *((name, ctypes.c_double) for name in ("momentum", "epsilon")),
    )


def infer(norm: nn.BatchNorm2d, input: Tensor, shortcut: Tensor | None) -> Tensor:
    """relu(norm(input) + shortcut) in evaluation, without gradients; see batch_norm.is_fusible for what it takes."""
    assert norm.running_var is not None
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    output = torch.empty_like(input)
    tensors = {
        "shortcut": shortcut,
        "output": output,
        "weight": norm.weight,
        "bias": norm.bias,
        "mean": norm.running_mean,
        "inverse_deviation": (norm.running_var + norm.eps).rsqrt(),
    }
    _call("fastsnap_batch_norm_forward", input, tensors, training=False)
    return output


def _call(function: str, input: Tensor, tensors: dict[str, Tensor | None], **numbers: float) -> None:
    arguments = BatchNormArguments(
        **{name: address(tensor) for name, tensor in tensors.items()},
        input=input.data_ptr(),
        rows=input.numel() // input.shape[1],
        channels=input.shape[1],
        bfloat16=input.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        **numbers,
    )
    getattr(library(), function)(ctypes.byref(arguments))


class BatchNormRelu(torch.autograd.Function):
    """relu(norm(input) + shortcut); see batch_norm.is_fusible for what it takes.

    input, shortcut, output  [N, C, H, W], fp32 or bf16; weight, bias and the statistics  [C], fp32
    """

    @staticmethod
    def forward(
        ctx: Any, norm: nn.BatchNorm2d, input: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor
    ) -> Tensor:
        """Also updates the running statistics of `norm`."""
        assert norm.num_batches_tracked is not None
        assert norm.momentum is not None
        norm.num_batches_tracked.add_(1)
        if shortcut is not None:
            shortcut = shortcut.contiguous(memory_format=torch.channels_last)
        output = torch.empty_like(input)
        statistics = torch.empty(2, input.shape[1], dtype=torch.float32, device=input.device)
        mean, inverse_deviation = statistics.unbind()
        tensors = {
            "shortcut": shortcut,
            "output": output,
            "weight": weight,
            "bias": bias,
            "mean": mean,
            "inverse_deviation": inverse_deviation,
            "running_mean": norm.running_mean,
            "running_variance": norm.running_var,
        }
        numbers = {"momentum": norm.momentum, "epsilon": norm.eps}
        _call("fastsnap_batch_norm_forward", input, tensors, training=True, **numbers)
        ctx.save_for_backward(input, output, weight, mean, inverse_deviation)
        ctx.has_shortcut = shortcut is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of forward's arguments."""
        input, output, weight, mean, inverse_deviation = ctx.saved_tensors
        input, output = (
            saved.contiguous(memory_format=torch.channels_last) for saved in (input, output)
        )  # hooks on saved tensors may have changed it
        input_gradient = torch.empty_like(input)
        shortcut_gradient = torch.empty_like(input) if ctx.has_shortcut else None
        weight_gradient, bias_gradient = torch.empty_like(weight), torch.empty_like(weight)
        tensors = {
            "output": output,
            "weight": weight,
            "mean": mean,
            "inverse_deviation": inverse_deviation,
            "output_gradient": output_gradient.contiguous(memory_format=torch.channels_last),
            "input_gradient": input_gradient,
            "shortcut_gradient": shortcut_gradient,
            "weight_gradient": weight_gradient,
            "bias_gradient": bias_gradient,
        }
        _call("fastsnap_batch_norm_backward", input, tensors)
        return None, input_gradient, shortcut_gradient, weight_gradient, bias_gradient
