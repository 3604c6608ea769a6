"""Resized crops on a CPU: a call into resized_crop_cpu.cpp."""

import ctypes

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
    output = torch.empty(len(indices), *size, channels, dtype=torch.float32, device="cpu")
    # A row for each crop: address of its image, bytes of a row, box, flip.
    crops = torch.empty(len(indices), 7, dtype=torch.int64, device="cpu")
    crops[:, 0] = images.data_ptr() + indices * (height * width * channels)
    crops[:, 1] = width * channels
    crops[:, 2:6] = boxes
    crops[:, 6] = flips
    colours = colours.contiguous()
    library().fastsnap_resized_crops(
        *(ctypes.c_void_p(address(tensor)) for tensor in (crops, colours, output)),
        *(ctypes.c_int64(number) for number in (len(indices), *size, channels, threads)),
    )
    return output
