"""A picture file -> pixels as they are meant to be seen: EXIF orientation applied, alpha on a colour, grey or RGB.

Pictures are untrusted input: their size is read from the header before memory is taken, and only these formats are
tried, by content, whatever a file is called. torchvision decodes JPEG and WebP to the bits of Pillow, and faster in
threads; Pillow decodes the rest, PNG too, since a damaged one makes torchvision 0.29 crash.

Pixels of 16 bits become round(value / 257); half-transparent ones round((alpha * colour + (255 - alpha) * background) /
255); grey is Rec. 601's luma, as in Pillow.
"""

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import functional

from fastsnap.data.archives import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
MOST_PIXELS = 2**27  # 134 million: above any camera's, and 400 MB decoded
MOST_BYTES = 2**30  # of a file
GREY_MODES = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N", "I", "F")
PLAIN_MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "MPO": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "P", "RGB"),
    "WEBP": ("RGB",),
}
PNG = b"\x89PNG"
PNG_DEPTH = 24  # where a PNG says its bits per channel
ORIENTATION = 0x0112  # EXIF's tag
RED, GREEN, BLUE, HALF = 19595, 38470, 7471, 1 << 15  # Rec. 601 in 16 bits, as Pillow has it
TOO_SMALL = "it has no pixels"


class DamagedImage(DataError):
    """A file that holds no picture, or one that cannot be decoded; the message begins with its path."""


@dataclass(frozen=True)
class Header:
    """What a picture says of itself.

    height, width  as it is seen, its EXIF orientation applied
    orientation    EXIF's, 1 to 8; 1: as it is stored
    coloured       whether it can have colours, by its format
    transparent    whether pixels can be transparent
    plain          whether torchvision decodes it to the same bits as Pillow, its orientation aside
    """

    height: int
    width: int
    orientation: int
    coloured: bool
    transparent: bool
    plain: bool


def inspect(path: Path) -> Header:
    """The header of the picture in `path`, without decoding it. Raises DamagedImage with the path and the reason."""
    try:
        with _open_regular(path) as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise DamagedImage(f"{path}: it is empty")
            return _header(_open(file), file)
    except OSError as error:
        raise DamagedImage(f"{path}: cannot be read: {error.strerror or error}") from error
    except DamagedImage:
        raise
    except Exception as error:  # of a damaged header Pillow raises anything
        raise DamagedImage(f"{path}: {_reason(error)}") from error


def inspect_bytes(content: bytes, name: str) -> Header:
    """The header of the picture whose file has this content. Raises DamagedImage with the name and the reason."""
    try:
        return _header(_open(io.BytesIO(content)), io.BytesIO(content))
    except Exception as error:
        raise DamagedImage(f"{name}: {_reason(error)}") from error


def decode(path: Path, channels: int, background: tuple[int, ...] = (128, 128, 128)) -> NDArray[np.uint8]:
    """The picture in `path`: see `decode_bytes`."""
    return decode_bytes(read_picture(path), str(path), channels, background)


def read_picture(path: Path) -> bytes:
    """The content of a file. Raises DamagedImage for what cannot be read, is no regular file or larger than 1 GB."""
    try:
        with _open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise DamagedImage(f"{path}: cannot be read: {error.strerror or error}") from error


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
        image = _open(io.BytesIO(content))
        header = _header(image, io.BytesIO(content))
        if image.format == "PNG":
            _open(io.BytesIO(content)).verify()  # the checksums, at which decoders do not look
        if header.plain and not content.startswith(PNG):
            pixels = _torchvision(content, image.mode in GREY_MODES)
        elif _has_sixteen_bits(image, io.BytesIO(content)):
            image.load()  # raises where torchvision would crash
            pixels = _sixteen_bit_png(content, background)
        else:
            pixels = _pillow(image, background)
    except Exception as error:  # decoders raise anything for what is damaged
        raise DamagedImage(f"{name}: {_reason(error)}") from error
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
            pixels = _with_channels(_pillow(_open(io.BytesIO(content)), ()), channels)
        else:
            pixels = _torchvision(content, channels == 1)
    except Exception as error:
        raise DamagedImage(f"{name}: {_reason(error)}") from error
    return _plain_array(_oriented(pixels, orientation))


def seen(
    image: Image.Image, channels: int, background: tuple[int, ...] = (128, 128, 128)
) -> NDArray[np.uint8]:
    """A PIL image, as `decode` gives the file of one."""
    pixels = _with_channels(_pillow(image, background), channels)
    return _plain_array(_oriented(pixels, _orientation(image)))


def centred(image: NDArray[np.uint8], resize: int, size: int) -> NDArray[np.uint8]:
    """The square of `size` pixels in the centre of `image` uint8 [H, W, C], its shorter side first brought to `resize`
    pixels (antialiased bilinear, torchvision's): uint8 [size, size, C].
    """
    if image.shape[:2] == (size, size) and resize == size:
        return image
    pixels = torch.from_numpy(_plain_array(image)).permute(2, 0, 1)
    pixels = functional.center_crop(functional.resize(pixels, [resize], antialias=True), [size, size])
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def _plain_array(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """In rows, and writable, as PyTorch wants it: a copy only where it is not."""
    return np.require(pixels, requirements=["C", "W"])


def _open_regular(path: Path) -> BinaryIO:
    """For reading. Raises OSError for a pipe or a device, which would never end, and for what is far too large."""
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
    )  # or opening a pipe waits for its writer
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
        os.close(descriptor)
        raise OSError(None, "not a regular file" if not stat.S_ISREG(status.st_mode) else "larger than 1 GB")
    return os.fdopen(descriptor, "rb")


def _open(file: BinaryIO | io.BytesIO) -> Image.Image:
    """As Image.open, for these formats alone; it looks at the size itself, without a warning in between."""
    Image.init()
    start = file.read(16)
    failure: Exception | None = None
    for name in FORMATS:
        if name not in Image.OPEN:
            continue
        factory, accepts = Image.OPEN[name]
        if accepts and accepts(start) is not True:
            continue
        file.seek(0)
        try:
            image: Image.Image = factory(file, "")
        except Exception as error:  # of another format, or damaged: what plugins raise has no common type
            failure = error
            continue
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise ValueError(
                f"it has {width:,}x{height:,} pixels, more than the {MOST_PIXELS:,} that are read"
            )
        return image
    raise ValueError("its header is damaged" if failure else "it is no picture of a known format")


def _header(image: Image.Image, file: BinaryIO | io.BytesIO) -> Header:
    width, height = image.size
    if not width or not height:
        raise ValueError(TOO_SMALL)
    orientation = _orientation(image)
    if orientation > 4:
        width, height = height, width
    transparent = bool(image.has_transparency_data)
    name = image.format or ""
    plain = (
        image.mode in PLAIN_MODES.get(name, ())
        and not transparent
        and not getattr(image, "is_animated", False)
    )
    plain = plain and not _has_sixteen_bits(image, file)
    # An MPO is a JPEG with further pictures behind it, the first of which counts.
    plain = plain or (name == "MPO" and image.mode in PLAIN_MODES["MPO"])
    return Header(height, width, orientation, image.mode not in GREY_MODES, transparent, plain)


def _has_sixteen_bits(image: Image.Image, file: BinaryIO | io.BytesIO) -> bool:
    """Whether it is a PNG of 16 bits per channel, which Pillow's mode does not always say."""
    if image.format != "PNG":
        return False
    file.seek(PNG_DEPTH)
    return file.read(1) == b"\x10"


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # the picture is there, whatever its notes say
        return 1
    return value if value in range(1, 9) else 1


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


def _reason(error: Exception) -> str:
    """For a reader who knows no library of pictures."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    known = ("it is", "it has", "its ")
    return text if text.startswith(known) else "it is cut short or damaged"
