"""From a picture to what a run's networks were shown in the evaluation, from config.json alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastsnap.data.archives import DataError
from fastsnap.data.decoding import centred, decode, seen
from fastsnap.ensemble.inputs import load_data
from fastsnap.run_files import RunError
from fastsnap.run_folder import RunFolder
from fastsnap.run_schema import is_own_loop

FACTS = ("class_names", "mean", "std", "image_shape")  # of config.json; runs of version 0.1.0 lack them
LARGEST = 255
Picture = str | Path | Image.Image | NDArray[np.uint8] | Tensor


@dataclass(frozen=True)
class Preprocessing:
    """What is done to a picture, and what the outputs are called.

    classes      names, in the order of the outputs
    image_shape  height, width and channels (1, grey, or 3, RGB) of what the networks see
    mean, std    per channel, 0 to 255
    resize       pixels that a picture's shorter side is brought to before the centre crop; None: the image's height
    background   the colour, 0 to 255 per channel, that transparent pixels show; None: the mean
    Raises ValueError for values that do not fit each other.
    """

    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    background: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        channels = self.image_shape[2] if len(self.image_shape) == 3 else 0
        if channels not in (1, 3) or min(self.image_shape) < 1:
            raise ValueError(
                f"image_shape must be height, width and 1 or 3 channels, got {list(self.image_shape)}"
            )
        if not len(self.mean) == len(self.std) == channels or not all(value > 0 for value in self.std):
            raise ValueError(
                f"mean and std need one value for each of the {channels} channels, and std above 0, "
                f"got {list(self.mean)} and {list(self.std)}"
            )
        if self.resize is not None and self.resize < max(self.image_shape[:2]):
            raise ValueError(
                f"resize must be at least the {max(self.image_shape[:2])} pixels of image_shape, got {self.resize}"
            )
        if len(self.classes) < 2:
            raise ValueError(f"classes must be at least 2 names, got {list(self.classes)}")

    def of(self, picture: Picture, name: str = "the image") -> NDArray[np.uint8]:
        """uint8 [H, W, C] of `image_shape`, from a picture of any size: its path, a PIL image, or its pixels uint8
        [h, w, C] or, grey, [h, w].

        name  of the picture, for messages
        Raises DamagedImage (a ValueError) for a file that cannot be decoded, ValueError for other pixels.
        """
        channels = self.image_shape[2]
        if isinstance(picture, str | Path):
            pixels = decode(Path(picture), channels, self._colour())
        elif isinstance(picture, Image.Image):
            try:
                pixels = seen(picture, channels, self._colour())
            except (ValueError, OSError) as error:
                raise ValueError(f"{name} cannot be used: {error}") from error
        else:
            return self.of_pixels(picture, name)
        return self.sized(pixels, name)

    def of_pixels(self, picture: Any, name: str = "the image") -> NDArray[np.uint8]:
        """As `of`, for pixels alone."""
        return self.sized(self._pixels(picture, name), name)

    def sized(self, pixels: NDArray[np.uint8], name: str = "the image") -> NDArray[np.uint8]:
        """The centre of pixels uint8 [h, w, C], brought to `image_shape` as the run's test images were."""
        height, width, _ = self.image_shape
        if height == width:
            return centred(pixels, self.resize or height, height)
        if pixels.shape != self.image_shape:
            raise ValueError(
                f"{name} must be {width}x{height} pixels, which are no square that a picture could be cropped to, "
                f"got {pixels.shape[1]}x{pixels.shape[0]}"
            )
        return pixels

    def batch(self, images: Tensor) -> Tensor:
        """uint8 [N, H, W, C] of `image_shape`: what has this size is taken as prepared, others by `sized`.

        Raises ValueError for another dtype, other dimensions or channels.
        """
        require_uint8(images, "images")
        channels = self.image_shape[2]
        if images.dim() != 4 or images.shape[3] != channels:
            raise ValueError(_wrong_shape("images", images.shape, f"[N, height, width, {channels}]"))
        if images.shape[1:] == self.image_shape:
            return images
        if not images.numel():
            if len(images):
                raise ValueError(f"images must have pixels, got {list(images.shape)}")
            return images.new_empty((0, *self.image_shape))
        sized = [self.sized(image) for image in images.cpu().numpy()]
        return torch.from_numpy(np.stack(sized)).to(images.device)

    def _pixels(self, picture: Any, name: str) -> NDArray[np.uint8]:
        if not isinstance(picture, Tensor | np.ndarray):
            raise ValueError(
                f"{name} must be a path, a PIL image, or its pixels as uint8 [height, width, channels], "
                f"got a {type(picture).__name__}"
            )
        require_uint8(picture, name)
        pixels = picture.cpu().numpy() if isinstance(picture, Tensor) else picture
        channels = self.image_shape[2]
        if pixels.ndim == 2 and channels == 1:
            pixels = pixels[..., None]
        if pixels.ndim != 3 or pixels.shape[2] != channels or not pixels.size:
            raise ValueError(_wrong_shape(name, pixels.shape, f"[height, width, {channels}]"))
        return pixels

    def _colour(self) -> tuple[int, ...]:
        colour = [round(min(value, LARGEST)) for value in self.mean]
        return tuple(colour) if self.background is None else self.background


def require_uint8(images: Tensor | NDArray[Any], name: str) -> None:
    """Raise ValueError, with the way to convert, unless the pixels are uint8."""
    if images.dtype in (torch.uint8, np.uint8):
        return
    kind = str(images.dtype).removeprefix("torch.")
    remedy = "convert them"
    if "float" in kind:
        remedy = (
            "of 0 to 1, (images * 255).round().clip(0, 255) and then uint8 gives them (NaN must be mended before); "
            "what was normalised must be had before that, since the ensemble does it"
        )
    raise ValueError(f"{name} must have pixels of uint8, 0 to 255, got {kind}: {remedy}")


def _wrong_shape(name: str, shape: Sequence[int], needed: str) -> str:
    found, channels = list(shape), needed.rstrip("]")[-1]
    remedy = "turn grey into RGB, or RGB into grey, with PIL: image.convert"
    if len(found) == 3 and needed.startswith("[N"):
        remedy = "a single image is images[None]"
    elif len(found) >= 3 and found[-1] > 4 and found[-3] == int(channels):
        axes = (0, 2, 3, 1) if len(found) == 4 else (1, 2, 0)
        remedy = f"channels come last: permute{axes}, in NumPy transpose{axes}"
    elif found and found[-1] == 4:
        remedy = 'blend the alpha channel away, or give PIL images: Image.fromarray(pixels, "RGBA")'
    return f"{name} must be {needed}, of the run's {channels} channels, got {found}: {remedy}"


def preprocessing_of(
    config: dict[str, Any], folder: RunFolder, data: str | Path | None = None
) -> Preprocessing:
    """What config.json says of the run's pictures; what a run of version 0.1.0 lacks comes from its data set.

    data  folder that holds the data sets; default: the run's
    Raises RunError where neither says it, naming what lacks and the remedy.
    """
    lacking = [name for name in FACTS if config.get(name) is None]
    if lacking:
        config = config | _facts_of_data(config, folder, lacking, data)
    background = config.get("background")
    try:
        return Preprocessing(
            classes=tuple(config["class_names"]),
            image_shape=tuple(config["image_shape"]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            resize=config.get("resize"),
            background=None if background is None else tuple(background),
        )
    except ValueError as error:
        raise RunError(f"{folder.path / 'config.json'} is damaged: {error}; put back a copy of it") from error


def _facts_of_data(
    config: dict[str, Any], folder: RunFolder, lacking: list[str], data: str | Path | None
) -> dict[str, Any]:
    names = ", ".join(lacking)
    if is_own_loop(config):
        raise RunError(
            f"{folder.path}, of a training loop of its own, does not say its {names}: give them to the recorder, or "
            "preprocessing=fastsnap.Preprocessing(...) here"
        )
    try:
        dataset = load_data(config, str(data) if data else None, folder)
    except DataError as error:
        raise RunError(
            f"{folder.path} is of an old version, which did not save its {names}; they come from its data set, but "
            f"{error}. Name its folder with data (--data), or give preprocessing=fastsnap.Preprocessing(...)"
        ) from error
    return {
        "class_names": dataset.classes,
        "mean": dataset.mean,
        "std": dataset.std,
        "image_shape": dataset.test.shape,
    }
