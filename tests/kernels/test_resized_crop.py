"""Resized crops: the kernel against the reference and torchvision, to the bit at every repetition."""

import pytest
import torch
from torchvision.transforms.v2 import functional

from fastsnap.kernels.cpu import instruction_sets, using_instructions
from fastsnap.kernels.resized_crop import resized_crops, resized_crops_of
from fastsnap.kernels.resized_crop_reference import reference_resized_crops

SHAPES = [  # of images, and the size that they are brought to
    ((64, 64), (64, 64)),
    ((97, 130), (32, 40)),
    ((20, 20), (50, 60)),
    ((5, 1), (7, 3)),
    ((1, 1), (4, 4)),
    ((300, 37), (10, 11)),
]
TOLERANCE = 2e-3  # of 255: torchvision computes its weights in fp32


def case(height, width, channels, crops=7, images=4, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(most):
        return torch.randint(0, most, (crops,), generator=generator)

    pixels = torch.randint(0, 256, (images, height, width, channels), generator=generator, dtype=torch.uint8)
    heights, widths = 1 + draw(height), 1 + draw(width)
    heights[0], widths[0] = height, width
    fractions = torch.rand(2, crops, generator=generator)
    tops = (fractions[0] * (height - heights + 1)).long()
    lefts = (fractions[1] * (width - widths + 1)).long()
    boxes = torch.stack([tops, lefts, heights, widths], dim=1)
    colours = torch.randn(crops, 2 * channels + 1, channels, generator=generator)
    return pixels, draw(images), boxes, draw(2).bool(), colours


def plain_colours(crops, channels):
    """Which change nothing."""
    colours = torch.zeros(crops, 2 * channels + 1, channels)
    colours[:, :channels] = torch.eye(channels)
    return colours


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_crops_are_torchvisions_antialiased_ones(shape, size, channels):
    images, indices, boxes, flips, _ = case(*shape, channels)
    found = resized_crops(images, indices, boxes, flips, plain_colours(len(boxes), channels), size)
    for crop, index, box, flip in zip(found, indices, boxes.tolist(), flips, strict=True):
        image = images[index].permute(2, 0, 1).float()
        expected = functional.resized_crop(image, *box, list(size), antialias=True)
        expected = expected.flip(2) if flip else expected
        torch.testing.assert_close(crop.permute(2, 0, 1), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_the_kernel_agrees_with_the_reference_in_colours_too(shape, size, channels):
    arguments = case(*shape, channels, seed=1)
    found = resized_crops(*arguments, size)
    expected = reference_resized_crops(*arguments, size)
    assert found.shape == (7, *size, channels)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.needs_library
@pytest.mark.parametrize("channels", [1, 3])
def test_neither_threads_nor_instructions_nor_the_way_in_change_a_bit(channels):
    images, indices, boxes, flips, colours = case(61, 47, channels, crops=9)
    expected = resized_crops(images, indices, boxes, flips, colours, (24, 31), threads=1)
    for name in instruction_sets():
        with using_instructions(name):
            for threads in (1, 2, 3):
                found = resized_crops(images, indices, boxes, flips, colours, (24, 31), threads=threads)
                assert torch.equal(found, expected)
    own = resized_crops_of([images[index] for index in indices], boxes, flips, colours, (24, 31))
    assert torch.equal(own, expected)


def test_images_of_their_own_sizes():
    parts = [
        case(height, width, 3, crops=1, images=1, seed=height)
        for height, width in ((9, 30), (40, 12), (1, 2))
    ]
    images = [part[0][0] for part in parts]
    boxes, flips, colours = (torch.cat([part[index] for part in parts]) for index in (2, 3, 4))
    found = resized_crops_of(images, boxes, flips, colours, (8, 8))
    for crop, part in zip(found, parts, strict=True):
        pixels, _, box, flip, colour = part
        expected = reference_resized_crops(
            pixels, torch.zeros(1, dtype=torch.int64), box, flip, colour, (8, 8)
        )
        torch.testing.assert_close(crop, expected[0], rtol=0, atol=TOLERANCE)


def test_no_crops_are_no_error():
    images, indices, boxes, flips, colours = case(8, 8, 3)
    assert resized_crops(images, indices[:0], boxes[:0], flips[:0], colours[:0], (4, 4)).shape == (0, 4, 4, 3)
    assert resized_crops_of([], boxes[:0], flips[:0], colours[:0], (4, 4)).shape == (0, 4, 4, 3)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(4, 8, 8, 3), "images must be uint8"),
        (0, torch.zeros(4, 8, 8, 2, dtype=torch.uint8), "images must be uint8"),
        (1, torch.full((7,), 4), "indices must lie within 4 images"),
        (1, torch.zeros(7, dtype=torch.int32), "indices must be"),
        (2, torch.tensor([[0, 0, 9, 1]] * 7), "boxes must lie within their images"),
        (2, torch.tensor([[-1, 0, 1, 1]] * 7), "boxes must lie within"),
        (2, torch.tensor([[0, 0, 0, 1]] * 7), "boxes must lie within"),
        (3, torch.zeros(7), "flips must be"),
        (4, torch.zeros(7, 3, 3), "colours must be"),
        (5, (0, 4), "size must be at least 1x1"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(position, value, message):
    arguments = [*case(8, 8, 3), (4, 4)]
    arguments[position] = value
    with pytest.raises(ValueError, match=message):
        resized_crops(*arguments)


@pytest.mark.parametrize(
    ("box", "message"),
    [([0, 0, 9, 1], "boxes must lie within their images"), ([0, -1, 1, 1], "boxes must lie")],
)
def test_boxes_beyond_an_image_of_its_own_size_are_errors(box, message):
    images, _, _, flips, colours = case(8, 8, 3, crops=1)
    with pytest.raises(ValueError, match=message):
        resized_crops_of([images[0]], torch.tensor([box]), flips, colours, (4, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_crops_on_the_gpu_are_those_of_the_cpu(shape, size, channels):
    arguments = case(*shape, channels, seed=2)
    found = resized_crops(*(tensor.cuda() for tensor in arguments), size)
    torch.testing.assert_close(found.cpu(), resized_crops(*arguments, size), rtol=0, atol=TOLERANCE)
