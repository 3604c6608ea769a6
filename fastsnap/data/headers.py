"""What a picture file says of itself, as untrusted input: its size is known before memory is taken, and only these
formats are tried, by content, whatever a file is called.
"""

import io
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

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
PNG_DEPTH = 24  # where a PNG says its bits per channel
ORIENTATION = 0x0112  # EXIF's tag
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
            return header_of(open_picture(file), file)
    except OSError as error:
        raise DamagedImage(f"{path}: cannot be read: {error.strerror or error}") from error
    except DamagedImage:
        raise
    except Exception as error:  # of a damaged header Pillow raises anything
        raise DamagedImage(f"{path}: {reason_of(error)}") from error


def inspect_bytes(content: bytes, name: str) -> Header:
    """The header of the picture whose file has this content. Raises DamagedImage with the name and the reason."""
    try:
        return header_of(open_picture(io.BytesIO(content)), io.BytesIO(content))
    except Exception as error:
        raise DamagedImage(f"{name}: {reason_of(error)}") from error


def read_picture(path: Path) -> bytes:
    """The content of a file. Raises DamagedImage for what cannot be read, is no regular file or larger than 1 GB."""
    try:
        with _open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise DamagedImage(f"{path}: cannot be read: {error.strerror or error}") from error


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


def open_picture(file: BinaryIO | io.BytesIO) -> Image.Image:
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


def header_of(image: Image.Image, file: BinaryIO | io.BytesIO) -> Header:
    width, height = image.size
    if not width or not height:
        raise ValueError(TOO_SMALL)
    orientation = orientation_of(image)
    if orientation > 4:
        width, height = height, width
    transparent = bool(image.has_transparency_data)
    name = image.format or ""
    plain = (
        image.mode in PLAIN_MODES.get(name, ())
        and not transparent
        and not getattr(image, "is_animated", False)
    )
    plain = plain and not has_sixteen_bits(image, file)
    # An MPO is a JPEG with further pictures behind it, the first of which counts.
    plain = plain or (name == "MPO" and image.mode in PLAIN_MODES["MPO"])
    return Header(height, width, orientation, image.mode not in GREY_MODES, transparent, plain)


def has_sixteen_bits(image: Image.Image, file: BinaryIO | io.BytesIO) -> bool:
    """Whether it is a PNG of 16 bits per channel, which Pillow's mode does not always say."""
    if image.format != "PNG":
        return False
    file.seek(PNG_DEPTH)
    return file.read(1) == b"\x10"


def orientation_of(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # the picture is there, whatever its notes say
        return 1
    return value if value in range(1, 9) else 1


def reason_of(error: Exception) -> str:
    """For a reader who knows no library of pictures."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    known = ("it is", "it has", "its ")
    return text if text.startswith(known) else "it is cut short or damaged"
