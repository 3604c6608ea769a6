"""SVHN's MATLAB files: read, checked, and refused where they are something else."""

import numpy as np
import pytest
import scipy.io

from fastsnap.config import make_config
from fastsnap.data.archives import DataError
from fastsnap.data.datasets import load_dataset
from fastsnap.data.sources import Augmentation


def write(folder, train=60, test=30, **changes):
    """Files in the published format: X [32, 32, 3, N], y [N, 1] with 10 for the digit 0."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("test", test)):
        content = {
            "X": generator.integers(0, 256, (32, 32, 3, count), np.uint8),
            "y": (np.arange(count, dtype=np.uint8) % 10 + 1)[:, None],
        }
        content = {key: value for key, value in (content | changes).items() if value is not None}
        scipy.io.savemat(folder / f"{name}_32x32.mat", content, do_compression=True)
    return folder


@pytest.mark.parametrize("inner", ["", "svhn"])
def test_svhn_is_read_from_torchvisions_layout(inner, tmp_path):
    write(tmp_path / inner)
    data = load_dataset("svhn", tmp_path, download=False)
    assert data.train.images.shape == (60, 32, 32, 3)
    assert data.train.images.flags.c_contiguous
    assert data.train.labels[:11].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    content = scipy.io.loadmat(tmp_path / inner / "test_32x32.mat")["X"]
    assert np.array_equal(data.test.images[7], content[..., 7])
    assert data.augmentation == Augmentation("none")
    assert data.classes[0] == "0"
    assert "not the published files" in data.source
    held_out = load_dataset("svhn", tmp_path, download=False, validation=20)
    assert (len(held_out.train.labels), len(held_out.validation.labels)) == (40, 20)


def test_the_recipe_is_the_papers():
    config = make_config("svhn")
    assert (config.epochs, config.cycles, config.validation, config.augment) == (40, 5, 6000, "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X": np.zeros((32, 32, 1, 5), np.uint8)}, r"X is uint8 \[32, 32, 1, 5\]"),
        ({"X": np.zeros((32, 32, 3, 5), np.float64)}, "X is double"),
        ({"y": np.ones((7, 1), np.uint8)}, r"y is \[7, 1\] instead of"),
        ({"y": None}, "it lacks 'y'"),
        (
            {"y": np.full((60, 1), 11, np.uint8), "X": np.zeros((32, 32, 3, 60), np.uint8)},
            "labels from 11 to 11",
        ),
    ],
)
def test_files_of_something_else_are_refused(changes, message, tmp_path):
    write(tmp_path, **changes)
    with pytest.raises(DataError, match=f"train_32x32.mat .*{message}"):
        load_dataset("svhn", tmp_path, download=False)


def test_a_damaged_file_is_refused(tmp_path):
    path = write(tmp_path) / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"train_32x32.mat is no file of SVHN .*get it again"):
        load_dataset("svhn", tmp_path, download=False)


def test_where_it_is_missing_the_error_says_where_to_get_it(tmp_path):
    with pytest.raises(
        DataError, match=r"SVHN was not found in .*put train_32x32.mat and test_32x32.mat of http"
    ):
        load_dataset("svhn", tmp_path, download=False)
