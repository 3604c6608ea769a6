"""Resized crops on a CPU: a call into resized_crop_cpu.cpp."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .cpu import address, library


def cpu_resized_crops(
    images: Tensor,
    indices: Tensor,
    boxes: Tensor,
    flips: Tensor,
    colours: Tensor,
    size: tuple[int, int],
    threads: int,
) -> Tensor:
    """See resized_crop.resized_crops. Other threads of Python run meanwhile."""
    height, width, channels = images.shape[1:]
    addresses = images.data_ptr() + indices * (height * width * channels)
    return _run(addresses, width * channels, boxes, flips, colours, size, threads)


def cpu_resized_crops_of(
    images: Sequence[Tensor],
    boxes: Tensor,
    flips: Tensor,
    colours: Tensor,
    size: tuple[int, int],
    threads: int,
) -> Tensor:
    """See resized_crop.resized_crops_of."""
    places = torch.tensor(
        [(image.data_ptr(), image.stride(0)) for image in images], dtype=torch.int64, device="cpu"
    )
    return _run(places[:, 0], places[:, 1], boxes, flips, colours, size, threads)


def _run(
    addresses: Tensor,
    row_bytes: Tensor | int,
    boxes: Tensor,
    flips: Tensor,
    colours: Tensor,
    size: tuple[int, int],
    threads: int,
) -> Tensor:
    count, channels = len(boxes), colours.shape[2]
    output = torch.empty(count, *size, channels, dtype=torch.float32, device="cpu")
    # A row for each crop: address of its image, bytes of a row, box, flip.
    crops = torch.empty(count, 7, dtype=torch.int64, device="cpu")
    crops[:, 0], crops[:, 1], crops[:, 2:6], crops[:, 6] = addresses, row_bytes, boxes, flips
    colours = colours.contiguous()
    library().fastsnap_resized_crops(
        *(ctypes.c_void_p(address(tensor)) for tensor in (crops, colours, output)),
        *(ctypes.c_int64(number) for number in (count, *size, channels, threads)),
    )
    return output
