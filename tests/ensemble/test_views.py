"""Views of a test image, averaged over views and members, against loops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from made_pictures import folder_of_pictures
from PIL import Image
from small_run import NET, small_dataset, small_run, snapshot_weights
from torch.nn import functional

from fastsnap.data.datasets import load_dataset
from fastsnap.data.decoding import decode
from fastsnap.data.pictures import Wishes
from fastsnap.data.sources import Augmentation
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.ensemble.views import VIEWS, CornerFiles, average_views, require_views, views_of
from fastsnap.nets.build import build_network


def by_hand(images, kind, padding):
    """uint8-like float images [N, C, H, W], normalised already: the views, by index."""
    padded = np.pad(images, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    height, width = images.shape[2:]
    corners = [(padding, padding)]
    if kind == "ten-crop":
        corners = [(0, 0), (0, 2 * padding), (2 * padding, 0), (2 * padding, 2 * padding), (padding, padding)]
    for top, left in corners:
        crop = padded[:, :, top : top + height, left : left + width]
        yield crop
        if kind != "one":
            yield crop[..., ::-1].copy()


@pytest.mark.parametrize("kind", VIEWS)
def test_views_are_corners_centre_and_mirror_images(kind):
    images = torch.randn(3, 2, 6, 7)
    found = list(views_of(kind, images, 2))
    expected = list(by_hand(images.numpy(), kind, 2))
    assert len(found) == len(expected) == VIEWS[kind]
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.numpy(), other)


@pytest.mark.parametrize("kind", ["mirror", "ten-crop"])
def test_probabilities_are_averaged_over_views_and_members(kind, tmp_path):
    folder = small_run(tmp_path / "run", snapshots=3)
    dataset = small_dataset()
    report = evaluate_run(folder, dataset=dataset, views=kind, precision="fp32")
    images = (dataset.test.images.astype(np.float32) - np.float32(dataset.mean)) / np.float32(dataset.std)
    images = images.transpose(0, 3, 1, 2)
    members = []
    for number in (1, 2, 3):
        network = build_network(NET, classes=10, in_channels=1).eval()
        network.load_state_dict(snapshot_weights(number))
        with torch.inference_mode():
            logits = [
                network(torch.from_numpy(view))
                for view in by_hand(images, kind, dataset.augmentation.padding)
            ]
        members.append(torch.stack([one.double().softmax(1) for one in logits]).mean(0))
    labels = torch.from_numpy(dataset.test.labels)
    for metrics, probabilities in zip(report.metrics.alone, members, strict=True):
        assert metrics.nll == pytest.approx(functional.nll_loss(probabilities.log(), labels).item(), abs=1e-4)
        assert metrics.error == pytest.approx(
            100 * (probabilities.argmax(1) != labels).double().mean().item(), abs=0.3
        )
    together = torch.stack(members).mean(0)
    assert report.metrics.last_m[-1].nll == pytest.approx(
        functional.nll_loss(together.log(), labels).item(), abs=1e-4
    )
    assert report.views == kind
    assert report.as_json()["views"] == kind


def test_a_probability_of_zero_has_a_finite_logarithm():
    logits = average_views(iter([torch.tensor([[0.0, -400.0]])] * 2))
    assert torch.isfinite(logits).all()
    assert logits.softmax(1)[0, 0] == 1


def test_corners_of_files_are_those_of_the_whole_picture(tmp_path):
    root = folder_of_pictures(tmp_path / "data")
    wishes = Wishes(image_size=24, storage="files", cache=str(tmp_path / "cache"), threads=2)
    dataset = load_dataset("folder", root, wishes=wishes)
    source = dataset.test
    batches = list(CornerFiles(source, 3, dataset.mean, dataset.std, torch.device("cpu"), 2).epoch(0))
    images = torch.cat([images for images, _ in batches])
    assert images.shape == (8, 5, 3, 24, 24)
    assert torch.cat([labels for _, labels in batches]).tolist() == source.labels.tolist()
    for views, name in zip(images, source.names, strict=True):
        picture = Image.fromarray(decode(source.root / name, 3, source.background))
        scale = dataset.resize / min(picture.size)
        size = (
            max(dataset.resize, int(picture.width * scale)),
            max(dataset.resize, int(picture.height * scale)),
        )
        resized = np.asarray(picture.resize(size, Image.Resampling.BILINEAR), np.float32)
        corner = (resized[-24:, -24:] - np.float32(dataset.mean)) / np.float32(dataset.std)
        assert np.abs(views[3].permute(1, 2, 0).numpy() - corner).max() < 0.05  # Pillow rounds otherwise
    assert list(views_of("ten-crop", images, 0))[8].shape == (8, 3, 24, 24)


def test_a_run_on_whole_images_has_no_corners(tmp_path: Path):
    with pytest.raises(ValueError, match=r"--ten-crop needs a run that was trained on crops.*--mirror"):
        require_views("ten-crop", Augmentation("none"))
    require_views("mirror", Augmentation("none"))
    with pytest.raises(ValueError, match="views must be one of one, mirror, ten-crop, got 'two'"):
        require_views("two", Augmentation("crop"))
