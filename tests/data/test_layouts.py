"""Layouts of folders: which classes and splits, what is left out, what is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastsnap.data.archives import DataError
from fastsnap.data.layouts import describe, find_layout, is_held_out


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def by_class(layout, split: str) -> dict[str, list[str]]:
    names = getattr(layout, split)
    result: dict[str, list[str]] = {}
    for name, label in zip(names.names, names.labels, strict=True):
        result.setdefault(layout.classes[label], []).append(name)
    return result


@pytest.mark.parametrize("test", ["val", "valid", "validation", "test"])
def test_train_and_test_folders(test, tmp_path):
    touch(
        tmp_path,
        "train/b/1.JPG",
        "train/a/x/y/2.png",
        "train/a/3.Jpeg",
        f"{test}/a/4.webp",
        f"{test}/b/5.bmp",
    )
    layout = find_layout(tmp_path)
    assert layout.kind == f"train/ and {test}/ folders"
    assert layout.classes == ("a", "b")
    assert by_class(layout, "train") == {"a": ["train/a/3.Jpeg", "train/a/x/y/2.png"], "b": ["train/b/1.JPG"]}
    assert by_class(layout, "test") == {"a": [f"{test}/a/4.webp"], "b": [f"{test}/b/5.bmp"]}
    assert layout.left_out == {}


def test_what_is_no_image_of_a_class_is_left_out_and_counted(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg")
    touch(tmp_path, "train/.DS_Store", "train/a/.hidden.jpg", "train/a/notes.txt", "train/loose.jpg")
    touch(tmp_path, "train/b/Thumbs.db", "train/b/__MACOSX/5.jpg", "test/a/6.jpg")
    (tmp_path / "train/a/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "train/a/back").symlink_to(tmp_path / "train/a")
    (tmp_path / "train/a/linked.jpg").symlink_to(tmp_path / "train/b/2.jpg")
    layout = find_layout(tmp_path)
    assert by_class(layout, "train")["a"] == ["train/a/1.jpg", "train/a/linked.jpg"]
    assert layout.left_out == {
        "hidden files and folders": 4,
        "files that are no image by their name": 1,
        "images outside of any class's folder": 1,
        "links that lead nowhere": 1,
        "links that lead back": 1,
        "other split folders (test/)": 1,
    }
    lines = describe(layout)
    assert "3 training images, 2 test images, 2 classes" in lines[0]
    assert "4 hidden files and folders" in lines[-1]


def test_a_class_may_be_a_link_to_a_folder_elsewhere(tmp_path):
    touch(tmp_path, "elsewhere/1.jpg", "data/train/a/2.jpg", "data/val/a/3.jpg")
    (tmp_path / "data/train/b").symlink_to(tmp_path / "elsewhere")
    assert find_layout(tmp_path / "data").classes == ("a", "b")


NAMES = st.lists(
    st.text("abcxyz'ä 0123456789", min_size=1, max_size=8), min_size=40, max_size=60, unique=True
)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=NAMES, more=st.text("qrst", min_size=1, max_size=5))
def test_adding_a_picture_moves_no_other(names, more, tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    for index, name in enumerate(names):
        touch(root, f"{'ab'[index % 2]}/{name}.jpg")
    try:
        before = find_layout(root)
    except DataError:
        return
    parts = set(before.train.names), set(before.test.names)
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {f"{'ab'[index % 2]}/{name}.jpg" for index, name in enumerate(names)}
    assert all(is_held_out(name) for name in parts[1])
    touch(root, f"a/{more}.png")
    after = find_layout(root)
    assert parts[0] <= set(after.train.names)
    assert parts[1] <= set(after.test.names)


def test_a_fifth_is_held_out():
    share = np.mean([is_held_out(f"class {number % 7}/{number}.jpg") for number in range(20_000)])
    assert share == pytest.approx(0.2, abs=0.01)


def tiny_imagenet(root: Path) -> Path:
    touch(root, "train/n01/images/n01_0.JPEG", "train/n02/images/n02_0.JPEG", "train/n02/n02_boxes.txt")
    touch(root, "val/images/val_0.JPEG", "val/images/val_1.JPEG", "test/images/test_0.JPEG")
    (root / "val/val_annotations.txt").write_text(
        "val_1.JPEG\tn01\t0\t0\t9\t9\nval_0.JPEG\tn02\t0\t0\t9\t9\n"
    )
    (root / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tcrane\nn03\tsomething else\n")
    return root


@pytest.mark.parametrize("inner", ["", "tiny-imagenet-200"])
def test_tiny_imagenet_as_published(inner, tmp_path):
    tiny_imagenet(tmp_path / inner)
    layout = find_layout(tmp_path)
    assert layout.kind == "Tiny ImageNet"
    assert layout.classes == ("goldfish, Carassius auratus", "crane")
    assert by_class(layout, "test") == {
        "crane": ["val/images/val_0.JPEG"],
        "goldfish, Carassius auratus": ["val/images/val_1.JPEG"],
    }
    assert layout.left_out["images without a label (test/)"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val_7.JPEG\tn01", "line 3: there is no picture val/images/val_7.JPEG"),
        ("val_0.JPEG\tn09", "line 3: 'n09' has no folder in train/"),
        ("val_0.JPEG", "line 3: should be a file's name, a tab and a class"),
        ("val_0.JPEG\tn01", "line 3: val_0.JPEG has another class in an earlier line"),
    ],
)
def test_annotations_that_do_not_fit_are_named_by_line(line, message, tmp_path):
    path = tiny_imagenet(tmp_path) / "val/val_annotations.txt"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        find_layout(tmp_path)


def test_imagenet_has_its_names_from_torchvisions_file(tmp_path):
    touch(tmp_path, "train/n1/1.JPEG", "train/n2/2.JPEG", "val/n1/3.JPEG", "val/n2/4.JPEG")
    torch.save(({"n1": ("crane",), "n2": ("crane",), "n3": ("tench", "Tinca")}, []), tmp_path / "meta.bin")
    layout = find_layout(tmp_path)
    assert layout.kind == "ImageNet"
    assert layout.classes == ("crane (n1)", "crane (n2)")
    (tmp_path / "meta.bin").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"meta.bin does not name the classes"):
        find_layout(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "no folders with images. The layouts are"),
        (("1.jpg", "2.jpg"), "2 images but no folders of classes"),
        (("a/1.jpg",), "1 image in all"),
        (("a/1.jpg", "a/2.jpg", "a/3.jpg"), "one class, 'a'"),
        (("a/1.jpg", "a/2.jpg", "b/notes.txt"), "the class 'b' .* is empty"),
        (("train/a/1.jpg", "train/b/2.jpg"), "has train/ but none of val/"),
        (("train/a/1.jpg", "train/b/2.jpg", "val/c/3.jpg"), "the class 'c', which .*train has not"),
        (("train/a/1.jpg", "val/a/2.jpg"), "one class"),
    ],
)
def test_folders_that_cannot_be_trained_on_are_errors_that_say_why(names, message, tmp_path):
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        find_layout(tmp_path)


def test_no_folder_and_a_file_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"there is no folder .*--data"):
        find_layout(tmp_path / "nothing")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file: name the folder"):
        find_layout(tmp_path / "file")


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_named(tmp_path):
    touch(tmp_path, "train/a/1.jpg", "val/a/2.jpg")
    (tmp_path / "train/a").chmod(0)
    with pytest.raises(DataError, match="cannot be read"):
        find_layout(tmp_path)
