"""The fingerprint of images and labels: the same for the same, another for any change."""

import dataclasses

import numpy as np
import pytest

from fastsnap.data.archives import DataError
from fastsnap.data.datasets import load_dataset
from fastsnap.data.fingerprint import fingerprint, fingerprints, image_sets, require_same_images
from fastsnap.data.sources import ImageSet

DIGITS = load_dataset("digits", validation=100)
SAVED = {"fingerprints": fingerprints(DIGITS)}


def test_it_depends_on_every_pixel_label_shape_and_order_and_on_nothing_else() -> None:
    whole = DIGITS.test
    changed = whole.images.copy()
    changed[-1, -1, -1, -1] ^= 1
    labels = whole.labels.copy()
    labels[3] = (labels[3] + 1) % 10
    others = [
        ImageSet(changed, whole.labels),
        ImageSet(whole.images, labels),
        ImageSet(whole.images[::-1], whole.labels[::-1]),
        ImageSet(whole.images[:-1], whole.labels[:-1]),
        ImageSet(whole.images.reshape(-1, 4, 16, 1), whole.labels),
    ]
    found = {fingerprint(images) for images in others}
    assert len(found) == len(others)
    assert fingerprint(whole) not in found
    strided = ImageSet(np.asfortranarray(whole.images), whole.labels.astype(">i8"))
    assert fingerprint(strided) == fingerprint(whole)


def test_the_same_images_are_the_same_run_after_loading_again() -> None:
    again = load_dataset("digits", validation=100)
    require_same_images(image_sets(again), SAVED, "run")
    assert SAVED["fingerprints"].keys() == {"train", "validation", "test"}


def test_the_split_that_differs_is_named() -> None:
    wrong = ImageSet(DIGITS.train.images, np.zeros_like(DIGITS.train.labels))
    other = dataclasses.replace(DIGITS, train=wrong)
    with pytest.raises(DataError, match=r"the training images or labels are not those that runs/a .*--data"):
        require_same_images(image_sets(other), SAVED, "runs/a")
    other = dataclasses.replace(DIGITS, train=wrong, test=DIGITS.train)
    with pytest.raises(DataError, match="the training and test images"):
        require_same_images(image_sets(other), SAVED, "runs/a")


def test_old_runs_have_none_and_go_on() -> None:
    require_same_images(image_sets(DIGITS), {}, "run")
