"""Random parts of images, brought to one size and coloured, in one pass: what training on photographs takes per image.

From the uint8 image to the normalised network input: crop, antialiased bilinear resize, mirror, colour jitter, lighting
and normalisation. The last three are affine in a pixel and the mean colour of its image, A x + K mean(x) + d, so they
cost as much as a normalisation.

This file is the way in: it checks the arguments and chooses the CPU kernel or the reference.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .cpu import has_library
from .resized_crop_reference import reference_resized_crops


def resized_crops(
    images: Tensor,
    indices: Tensor,
    boxes: Tensor,
    flips: Tensor,
    colours: Tensor,
    size: tuple[int, int],
    threads: int | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """Float32 [B, height, width, C], C-contiguous, on the device of the images.

    images   uint8 [N, H, W, C], C-contiguous, C 1 or 3
    indices  int64 [B], into the images
    boxes    int64 [B, 4]: top, left, height and width of the part that is taken, at least one pixel
    flips    bool [B], mirrored or not
    colours  float32 [B, 2 C + 1, C]: the matrices A and K and the vector d, below one another
    size     height and width of the result
    threads  of the CPU; default: PyTorch's number
    output   where a CPU kernel puts the result, float32 [B, height, width, C], C-contiguous; default: new memory
    Raises ValueError for what does not fit.
    """
    _check(images, indices, boxes, flips, colours, size)
    if images.device.type == "cpu" and has_library():
        from .resized_crop_cpu import cpu_resized_crops

        threads = threads or torch.get_num_threads()
        return cpu_resized_crops(images, indices, boxes, flips, colours, size, threads, output)
    return reference_resized_crops(images, indices, boxes, flips, colours, size)


def resized_crops_of(
    images: Sequence[Tensor],
    boxes: Tensor,
    flips: Tensor,
    colours: Tensor,
    size: tuple[int, int],
    threads: int | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """The same of images that each have a size of their own: B of uint8 [H, W, C], C-contiguous, on the CPU."""
    if has_library() and images:
        from .resized_crop_cpu import cpu_resized_crops_of

        _check_own_sizes(images, boxes, flips, colours, size)
        threads = threads or torch.get_num_threads()
        return cpu_resized_crops_of(images, boxes, flips, colours, size, threads, output)
    zero = torch.zeros(1, dtype=torch.int64, device="cpu")
    crops = [
        resized_crops(image[None], zero, boxes[i : i + 1], flips[i : i + 1], colours[i : i + 1], size)
        for i, image in enumerate(images)
    ]
    return torch.cat(crops) if crops else torch.empty(0, *size, colours.shape[2], device="cpu")


def _check_own_sizes(
    images: Sequence[Tensor], boxes: Tensor, flips: Tensor, colours: Tensor, size: tuple[int, int]
) -> None:
    channels = images[0].shape[-1]
    wanted = {
        "boxes": (boxes, torch.int64),
        "flips": (flips, torch.bool),
        "colours": (colours, torch.float32),
    }
    for name, (tensor, dtype) in wanted.items():
        if tensor.dtype != dtype or len(tensor) != len(images):
            raise ValueError(
                f"{name} must be {dtype} of {len(images)} images, got {tensor.dtype} {list(tensor.shape)}"
            )
    if channels not in (1, 3) or boxes.shape[1:] != (4,) or colours.shape[1:] != (2 * channels + 1, channels):
        raise ValueError(
            f"colours must be [{len(images)}, {2 * channels + 1}, {channels}] and boxes [{len(images)}, 4], got "
            f"{list(colours.shape)} and {list(boxes.shape)}, with images of {channels} channels"
        )
    if min(size) < 1:
        raise ValueError(f"size must be at least 1x1, got {list(size)}")
    for image in images:
        if (
            image.dtype != torch.uint8
            or image.dim() != 3
            or image.shape[2] != channels
            or not image.is_contiguous()
        ):
            raise ValueError(
                f"images must be uint8 [H, W, {channels}], C-contiguous, got {image.dtype} {list(image.shape)}"
            )


def _check(
    images: Tensor, indices: Tensor, boxes: Tensor, flips: Tensor, colours: Tensor, size: tuple[int, int]
) -> None:
    if (
        images.dtype != torch.uint8
        or images.dim() != 4
        or images.shape[3] not in (1, 3)
        or not images.is_contiguous()
    ):
        raise ValueError(
            f"images must be uint8 [N, H, W, 1 or 3], C-contiguous, got {images.dtype} {list(images.shape)}"
        )
    count, channels = len(indices), images.shape[3]
    wanted = {
        "indices": (indices, torch.int64, (count,)),
        "boxes": (boxes, torch.int64, (count, 4)),
        "flips": (flips, torch.bool, (count,)),
        "colours": (colours, torch.float32, (count, 2 * channels + 1, channels)),
    }
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor.dtype != dtype or tensor.shape != shape or tensor.device != images.device:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} on {images.device}, got {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}"
            )
    if min(size) < 1:
        raise ValueError(f"size must be at least 1x1, got {list(size)}")
    # On a GPU nobody waits for the answer: an index out of range is an error there by itself. Boxes are checked by the
    # kernel.
    if images.device.type == "cpu" and count:
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= len(images):
            raise ValueError(f"indices must lie within {len(images)} images, got {low} to {high}")
