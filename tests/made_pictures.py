"""Pictures for tests, made by Pillow."""

from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth colours with some noise, so that JPEG has something to lose."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (3, 4, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + generator.integers(-8, 9, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    """Save `image`, making the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def folder_of_pictures(root: Path, train: int = 12, test: int = 4, classes: int = 2) -> Path:
    """train/ and val/ with JPEG and PNG files of several sizes, some of them grey, turned or transparent."""
    for split, count in (("train", train), ("val", test)):
        for number in range(count * classes):
            width, height = 40 + 7 * (number % 5), 36 + 5 * (number % 4)
            image = picture(width, height, seed=number + 1000 * (split == "val"))
            place = root / split / f"class {number % classes}"
            if number % 6 == 3:
                exif = Image.Exif()
                exif[0x0112] = 6
                save(image, place / f"turned {number}.JPG", exif=exif)
            elif number % 6 == 4:
                image.putalpha(picture(width, height, seed=number, mode="L"))
                save(image, place / "deeper" / f"clear {number}.png")
            else:
                save(image.convert("L") if number % 6 == 5 else image, place / f"it's {number}.jpeg")
    return root
