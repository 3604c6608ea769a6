"""What a run will take of memory and disk, known before it takes any, and refused where there is not as much.

The kernel kills a process that takes more memory than there is after minutes and without a word, and a disk that fills
up ends a run that has taken days. Both can be told at the start from the shapes of the network, made on PyTorch's meta
device, where tensors have no memory. tests/training/test_memory.py holds the estimate against what runs take.
"""

import bisect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsnap.limits import Room, format_bytes, free_disk, require_memory

FP32, HALF = 4, 2  # bytes of a number
LEAST_IMAGES = 2  # in a forward pass: BatchNorm refuses a single value per channel
SLACK = 1.2  # of what is kept: blocks of the allocator and reordered copies, between 0.9 and 1.5 as measured
SAVED_COPIES = 3  # of a checkpoint's tensors, at once, while it is hashed and written
PASSING_OUTPUTS = 4  # of the size of the largest, which live only while a layer is computed
LIBRARIES = 50 * 10**6  # bytes that oneDNN, cuDNN and the pipeline take at the first step
STATISTICS = 100  # bytes per image and ensemble, while the metrics are computed
COMPARING = 8  # numbers per image and class, while ways to combine the snapshots are compared
LOGS = 2 * 10**6  # bytes of plots, tables and JSON on disk


@dataclass(frozen=True)
class Footprint:
    """What the sizes follow from.

    parameters  bytes of the parameters and buffers in fp32
    outputs     numbers per image in the output of each layer that has parameters: training keeps them for the
                backward pass
    """

    parameters: int
    outputs: tuple[int, ...]


def footprint(network: nn.Module, image_shape: tuple[int, int, int]) -> Footprint:
    """Of `network`, on the meta device, for images of `image_shape` (channels, height, width)."""
    outputs: list[int] = []

    def count(_layer: nn.Module, _inputs: tuple[Tensor, ...], output: Any) -> None:
        outputs.append(_numbers(output) // LEAST_IMAGES)

    layers = [layer for layer in network.modules() if next(layer.parameters(recurse=False), None) is not None]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    network(torch.empty(LEAST_IMAGES, *image_shape, dtype=torch.float32, device="meta"))
    for hook in hooks:
        hook.remove()
    numbers = sum(tensor.numel() for tensor in [*network.parameters(), *network.buffers()])
    return Footprint(FP32 * numbers, tuple(outputs))


def _numbers(output: Any) -> int:
    """In what a layer returns: a tensor, or several, as attention does."""
    if isinstance(output, Tensor):
        return output.numel()
    parts = (
        output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    )
    return sum(map(_numbers, parts))


def training_needs(
    size: Footprint, images: int, *, half: bool, copied: int = 0, others: dict[str, int] | None = None
) -> dict[str, int]:
    """Bytes of memory that training takes at its peak, by what they are for.

    images  in the largest batch
    half    whether the network's outputs have 16 bits instead of 32
    copied  bytes of the data set, where the device needs a copy of it
    others  bytes of what else there is, by its name
    """
    own, number = size.parameters, HALF if half else FP32
    kept = math.ceil(SLACK * images * number * sum(size.outputs))
    gradients = own + (own // 2 if half else 0)  # and the weights in 16 bits
    saving = SAVED_COPIES * 2 * own - gradients - kept  # it comes between two steps, and takes what they left
    data = {"the data set": copied} if copied else {}
    return (
        data
        | (others or {})
        | {
            "parameters and momentum": 2 * own,
            "gradients": gradients,
            f"what {images:,} images leave for the backward pass": kept,
            "work space": _passing(size, images, number) + max(0, saving),
        }
    )


def evaluation_needs(size: Footprint, batch: int, images: int, classes: int, members: int) -> dict[str, int]:
    """Bytes of memory that an evaluation takes at its peak, by what they are for.

    batch   images of a forward pass
    images  of the split
    """
    batch = min(batch, images)
    return {
        "a network and its file": 3 * size.parameters,
        f"forward passes of {batch:,} images": _passing(size, batch, FP32),
        f"logits of {members:,} snapshots for {images:,} images": FP32 * members * images * classes,
        # Probabilities of all images at once, and the logits of those that are chosen.
        "comparing what they give": FP32 * (members + COMPARING) * images * classes,
        "statistics": STATISTICS * members * images,
    }


def _passing(size: Footprint, images: int, number: int) -> int:
    return images * number * PASSING_OUTPUTS * max(size.outputs) + LIBRARIES


def require_training_memory(
    size: Footprint,
    images: int,
    room: Room | None,
    *,
    half: bool,
    copied: int = 0,
    others: dict[str, int] | None = None,
) -> None:
    """Raise ValueError, with the figures and what would fit, if training takes more than `room`. See training_needs."""
    if room is None:
        return

    def needs(count: int) -> dict[str, int]:
        return training_needs(size, count, half=half, copied=copied, others=others)

    most = bisect.bisect_right(range(1, images + 1), room.bytes, key=lambda count: sum(needs(count).values()))
    remedy = f"--batch-size {most:,} would fit, or a smaller --net" if most else "use a smaller --net"
    require_memory("training", needs(images), room, remedy)


def require_disk(
    size: Footprint, folder: Path, snapshots: int, saved: int, *, averaged: bool = False
) -> None:
    """Raise ValueError, with the figures, if `snapshots` and a checkpoint do not fit on the disk of `folder`.

    While a checkpoint is replaced, there are two of them.
    saved     bytes of the run's snapshots and checkpoint that are there already
    averaged  whether there is a running average of the weights, in a file of its own and in the checkpoint
    """
    own, room = size.parameters, free_disk(folder)
    needed = (snapshots + 2 * 2 + (2 * 2 if averaged else 0)) * own + LOGS - saved
    if room and needed > room.bytes:
        raise ValueError(
            f"{snapshots:,} snapshots of {format_bytes(own)}, and a checkpoint twice as large of which there are two "
            f"while it is replaced, need {format_bytes(needed)} more on disk, but {format_bytes(room.bytes)} are "
            f"{room.reason}: free some space, choose another --out, or fewer --cycles"
        )
