"""A picture file -> pixels as they are meant to be seen: EXIF orientation applied, alpha on a colour, grey or RGB."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional

from fastsnap.data.archives import DataError


class DamagedImage(DataError):
    """A file that holds no picture, or one that cannot be decoded; the message begins with its path."""


def decode(path: Path, channels: int, background: tuple[int, ...] = (128, 128, 128)) -> NDArray[np.uint8]:
    """The picture in `path`: uint8 [H, W, channels].

    channels    1 (grey) or 3 (RGB)
    background  colour per channel, 0 to 255, that transparent pixels show
    Raises DamagedImage with the path and the reason.
    """
    try:
        with Image.open(path) as image:
            turned = ImageOps.exif_transpose(image)
            if turned.has_transparency_data:
                seen = turned.convert("RGBA")
                colour = background if channels == 3 else background[:1] * 3
                canvas = Image.new("RGBA", seen.size, (*colour, 255))
                turned = Image.alpha_composite(canvas, seen)
            pixels = np.asarray(turned.convert("RGB" if channels == 3 else "L"))
    except Exception as error:
        raise DamagedImage(f"{path}: {error}") from error
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], channels))


def centred(image: NDArray[np.uint8], resize: int, size: int) -> NDArray[np.uint8]:
    """The square of `size` pixels in the centre of `image` uint8 [H, W, C], its shorter side first brought to `resize`
    pixels (antialiased bilinear, torchvision's): uint8 [size, size, C].
    """
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    pixels = functional.center_crop(functional.resize(pixels, [resize], antialias=True), [size, size])
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())
