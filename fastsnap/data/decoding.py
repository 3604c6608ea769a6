"""A picture file -> pixels as they are meant to be seen: EXIF orientation applied, alpha on a colour, grey or RGB.

torchvision decodes JPEG and WebP to the bits of Pillow, and faster in
threads; Pillow decodes the rest, PNG too, since a damaged one makes torchvision 0.29 crash.

Pixels of 16 bits become round(value / 257); half-transparent ones round((alpha * colour + (255 - alpha) * background) /
255); grey is Rec. 601's luma, as in Pillow.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional

from fastsnap.data.headers import (
    GREY_MODES,
    DamagedImage,
    has_sixteen_bits,
    header_of,
    open_picture,
    orientation_of,
    read_picture,
    reason_of,
)

PNG = b"\x89PNG"
LONGEST = 64  # times the shorter side
RED, GREEN, BLUE, HALF = 19595, 38470, 7471, 1 << 15  # Rec. 601 in 16 bits, as Pillow has it


def decode(path: Path, channels: int, background: tuple[int, ...] = (128, 128, 128)) -> NDArray[np.uint8]:
    """The picture in `path`: see `decode_bytes`."""
    return decode_bytes(read_picture(path), str(path), channels, background)


def decode_bytes(
    content: bytes, name: str, channels: int, background: tuple[int, ...] = (128, 128, 128)
) -> NDArray[np.uint8]:
    """The picture whose file has this content: uint8 [H, W, channels], C-contiguous.

    name        of the file, for messages
    channels    1 (grey) or 3 (RGB)
    background  colour per channel, 0 to 255, that transparent pixels show
    Raises DamagedImage with the name and the reason. May run in many threads at once.
    """
    if not content:
        raise DamagedImage(f"{name}: it is empty")
    try:
        image = open_picture(io.BytesIO(content))
        header = header_of(image, io.BytesIO(content))
        if image.format == "PNG":
            open_picture(io.BytesIO(content)).verify()  # the checksums, at which decoders do not look
        if header.plain and not content.startswith(PNG):
            pixels = _torchvision(content, image.mode in GREY_MODES)
        elif has_sixteen_bits(image, io.BytesIO(content)):
            image.load()  # raises where torchvision would crash
            pixels = _sixteen_bit_png(content, background)
        else:
            pixels = _pillow(image, background)
    except Exception as error:  # decoders raise anything for what is damaged
        raise DamagedImage(f"{name}: {reason_of(error)}") from error
    return _plain_array(_oriented(_with_channels(pixels, channels), header.orientation))


def decode_checked(
    content: bytes, name: str, channels: int, background: tuple[int, ...], orientation: int
) -> NDArray[np.uint8]:
    """As `decode_bytes`, whose header was read before.

    orientation  EXIF's, where the header was plain; 0 elsewhere
    """
    if orientation and not content.startswith(PNG):
        return decode_direct(content, name, channels, orientation)
    return decode_bytes(content, name, channels, background)


def decode_direct(content: bytes, name: str, channels: int, orientation: int) -> NDArray[np.uint8]:
    """As `decode_bytes`, of a file whose header was found to be plain, without looking at it again."""
    try:
        if content.startswith(PNG):
            pixels = _with_channels(_pillow(open_picture(io.BytesIO(content)), ()), channels)
        else:
            pixels = _torchvision(content, channels == 1)
    except Exception as error:
        raise DamagedImage(f"{name}: {reason_of(error)}") from error
    return _plain_array(_oriented(pixels, orientation))


def seen(
    image: Image.Image, channels: int, background: tuple[int, ...] = (128, 128, 128)
) -> NDArray[np.uint8]:
    """A PIL image, as `decode` gives the file of one."""
    pixels = _with_channels(_pillow(image, background), channels)
    return _plain_array(_oriented(pixels, orientation_of(image)))


def centred(image: NDArray[np.uint8], resize: int, size: int) -> NDArray[np.uint8]:
    """The square of `size` pixels in the centre of `image` uint8 [H, W, C], its shorter side first brought to `resize`
    pixels (antialiased bilinear, torchvision's): uint8 [size, size, C].
    """
    if image.shape[:2] == (size, size) and resize == size:
        return image
    pixels = torch.from_numpy(_plain_array(_without_ends(image))).permute(2, 0, 1)
    pixels = functional.center_crop(functional.resize(pixels, [resize], antialias=True), [size, size])
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def _without_ends(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image that is far longer than a crop of its middle needs, without what would be resized only to be cropped
    away: one of 1x10,000 pixels, its shorter side brought to 256, would take gigabytes.
    """
    longest = LONGEST * min(image.shape[:2])
    cut = max(0, max(image.shape[:2]) - longest) // 2
    if not cut:
        return image
    middle = slice(cut, max(image.shape[:2]) - cut)
    return image[middle] if image.shape[0] > image.shape[1] else image[:, middle]


def _plain_array(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """In rows, and writable, as PyTorch wants it: a copy only where it is not."""
    return np.require(pixels, requirements=["C", "W"])


def _torchvision(content: bytes, grey: bool) -> NDArray[np.uint8]:
    """uint8 [H, W, 1 or 3]."""
    # A copy: from_dlpack and frombuffer want memory that may be written to.
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return decode_image(data, ImageReadMode.GRAY if grey else ImageReadMode.RGB).permute(1, 2, 0).numpy()


def _pillow(image: Image.Image, background: tuple[int, ...]) -> NDArray[np.uint8]:
    """uint8 [H, W, 1 or 3]."""
    image.load()
    if image.mode.startswith("I"):
        return _eight_bits(np.asarray(image))[..., None]
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of no known range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        return _blended(np.asarray(image.convert("RGBA")), background)
    pixels = np.asarray(image.convert("L" if image.mode in GREY_MODES else "RGB"))
    return pixels.reshape(*pixels.shape[:2], -1)


def _sixteen_bit_png(content: bytes, background: tuple[int, ...]) -> NDArray[np.uint8]:
    """uint8 [H, W, 1 or 3]; Pillow would clip grey ones, and drop the lower byte of coloured ones."""
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    pixels = _eight_bits(decode_image(data, ImageReadMode.UNCHANGED).permute(1, 2, 0).numpy())
    if pixels.shape[2] in (1, 3):
        return pixels
    colours = np.broadcast_to(pixels[..., :-1], (*pixels.shape[:2], 3))
    return _blended(np.concatenate([colours, pixels[..., -1:]], axis=2), background)


def _eight_bits(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """round(value / 257) of 16 bits. Raises ValueError for values beyond them."""
    if pixels.size and (pixels.min() < 0 or pixels.max() > 65535):
        raise ValueError("its pixels have more than 16 bits: save it with 8 or 16")
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _blended(rgba: NDArray[np.uint8], background: tuple[int, ...]) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] from [H, W, 4]."""
    alpha = rgba[..., 3:].astype(np.uint32)
    below = np.asarray(background if len(background) == 3 else background * 3, np.uint32)
    return ((rgba[..., :3] * alpha + below * (255 - alpha) + 127) // 255).astype(np.uint8)


def _with_channels(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    weights = np.array([RED, GREEN, BLUE], np.uint32)
    return ((pixels @ weights + HALF) >> 16).astype(np.uint8)[..., None]


def _oriented(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turned as EXIF's orientation says: 2 mirrored, 3 upside down, 4 flipped, 5 to 8 with rows as columns."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
