"""Resized crops in plain PyTorch, on any device: what the CPU kernel is tested against, and what a GPU takes."""

import torch
from torch import Tensor


def reference_resized_crops(
    images: Tensor, indices: Tensor, boxes: Tensor, flips: Tensor, colours: Tensor, size: tuple[int, int]
) -> Tensor:
    """See resized_crop.resized_crops: here by matrices of weights, one for the rows and one for the columns."""
    height, width = images.shape[1:3]
    if images.device.type == "cpu":
        _require_inside(boxes, height, width)
    rows = _weights(boxes[:, 0], boxes[:, 2], height, size[0])
    columns = _weights(boxes[:, 1], boxes[:, 3], width, size[1])
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)
    pixels = images.index_select(0, indices).float()
    cropped = torch.einsum("byh,bhwc->bywc", rows, pixels)
    cropped = torch.einsum("bxw,bywc->byxc", columns, cropped)
    return coloured(cropped, colours)


def _require_inside(boxes: Tensor, height: int, width: int) -> None:
    top, left, rows, columns = boxes.unbind(1)
    inside = (top >= 0) & (left >= 0) & (rows >= 1) & (columns >= 1)
    inside &= (top + rows <= height) & (left + columns <= width)
    if not inside.all():
        wrong = boxes[int((~inside).nonzero()[0])].tolist()
        raise ValueError(f"boxes must lie within their images, got {wrong} of {height}x{width} pixels")


def coloured(images: Tensor, colours: Tensor) -> Tensor:
    """A x + K mean(x) + d of every pixel x.

    images   float32 [B, H, W, C]
    colours  float32 [B, 2 C + 1, C]: A, K and d below one another
    """
    channels = images.shape[3]
    matrix, of_mean, offset = (
        colours[:, :channels],
        colours[:, channels : 2 * channels],
        colours[:, 2 * channels],
    )
    mean = images.mean(dim=(1, 2), dtype=torch.float64).float()
    constant = offset + torch.einsum("bck,bk->bc", of_mean, mean)
    return torch.einsum("bck,bhwk->bhwc", matrix, images) + constant[:, None, None]


def _weights(starts: Tensor, lengths: Tensor, pixels: int, size: int) -> Tensor:
    """What each of `size` positions takes of each of `pixels`, float32 [B, size, pixels]: PyTorch's antialiased linear
    filter over `lengths` pixels from `starts` on.
    """
    scale = (lengths.double() / size)[:, None, None]
    support = scale.clamp(min=1)
    place = torch.arange(pixels, device=starts.device)[None, None] - starts[:, None, None] + 0.5
    centres = scale * (torch.arange(size, device=starts.device)[None, :, None] + 0.5)
    weights = (1 - ((place - centres) / support).abs()).clamp(min=0)
    weights = torch.where((place > 0) & (place < lengths[:, None, None]), weights, 0.0)
    return (weights / weights.sum(2, keepdim=True)).float()
