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
    output: Tensor | None,
) -> Tensor:
    """See resized_crop.resized_crops. Other threads of Python run meanwhile."""
    height, width, channels = images.shape[1:]
    addresses = images.data_ptr() + indices * (height * width * channels)
    sizes = (
        torch.tensor([[height, width]], dtype=torch.int64, device="cpu").expand(len(indices), 2).contiguous()
    )
    return _run(addresses, width * channels, sizes, boxes, flips, colours, size, threads, output)


def cpu_resized_crops_of(
    images: Sequence[Tensor],
    boxes: Tensor,
    flips: Tensor,
    colours: Tensor,
    size: tuple[int, int],
    threads: int,
    output: Tensor | None,
) -> Tensor:
    """See resized_crop.resized_crops_of."""
    facts = [(image.data_ptr(), image.stride(0), *image.shape[:2]) for image in images]
    places = torch.tensor(facts, dtype=torch.int64, device="cpu")
    sizes = places[:, 2:].contiguous()
    return _run(places[:, 0], places[:, 1], sizes, boxes, flips, colours, size, threads, output)


def _run(
    addresses: Tensor,
    row_bytes: Tensor | int,
    sizes: Tensor,
    boxes: Tensor,
    flips: Tensor,
    colours: Tensor,
    size: tuple[int, int],
    threads: int,
    output: Tensor | None,
) -> Tensor:
    count, channels = len(boxes), colours.shape[2]
    if output is None:
        output = torch.empty(count, *size, channels, dtype=torch.float32, device="cpu")
    # A row for each crop: address of its image, bytes of a row, box, flip.
    crops = torch.empty(count, 7, dtype=torch.int64, device="cpu")
    crops[:, 0], crops[:, 1], crops[:, 2:6], crops[:, 6] = addresses, row_bytes, boxes, flips
    colours = colours.contiguous()
    run = library().fastsnap_resized_crops
    run.restype = ctypes.c_int64
    outside = run(
        *(ctypes.c_void_p(address(tensor)) for tensor in (crops, sizes, colours, output)),
        *(ctypes.c_int64(number) for number in (count, *size, channels, threads)),
    )
    if outside >= 0:
        height, width = sizes[outside].tolist()
        raise ValueError(
            f"boxes must lie within their images, got {boxes[outside].tolist()} of {height}x{width} pixels"
        )
    return output
