"""The opponents' images."""

import numpy as np
import torch

from fastsnap.data.sources import ImageSet
from harness.task import synthetic_images
from opponents.loaders import TransformedImages


def test_the_opponents_images_are_normalised_and_padded_with_the_mean_colour() -> None:
    dataset = synthetic_images(train=8, test=1)
    colour = np.round(dataset.mean).astype(np.uint8)
    flat = np.broadcast_to(colour, (8, 32, 32, 3)).copy()
    images = TransformedImages(type(dataset)(**vars(dataset) | {"train": ImageSet(flat, np.arange(8))}))
    for index in range(8):
        image, label = images[index]
        assert (image.shape, image.dtype, label) == ((3, 32, 32), torch.float32, index)
        assert image.abs().max() < 0.01
    noise, _ = TransformedImages(dataset)[0]
    assert 0.8 < noise.std() < 1.3  # uniform noise of 0 to 255 has a deviation of 74, the data set's is 68
