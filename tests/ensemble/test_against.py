"""Telling foreign images apart, against SciPy and torchmetrics."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from small_run import small_dataset, small_run
from torchmetrics.functional.classification import binary_auroc

import fastsnap
from fastsnap.ensemble.against import measure_against, with_channels
from fastsnap.ensemble_eval import main
from fastsnap.run_folder import RunError


@pytest.fixture
def run(tmp_path):
    return small_run(tmp_path / "run", snapshots=3)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for index in range(30):
        pixels = noise.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ("deeper" if index % 2 else "") / f"{index}.png")
    return folder


def test_the_area_is_scipys_and_torchmetrics(run, pictures):
    ensemble = fastsnap.load_ensemble(run.path, weights=[0.5, 0.3, 0.2], device="cpu")
    test = ensemble.combined(torch.from_numpy(small_dataset().test.images))
    found = measure_against(ensemble, test, "folder", pictures, batch_size=7, threads=1)
    other = ensemble.predict(sorted(str(path) for path in pictures.rglob("*.png")))
    assert (found.images, found.skipped) == (30, 0)
    for name, area in (("entropy", found.entropy), ("mutual_information", found.mutual_information)):
        own, foreign = getattr(test, name), getattr(other, name)
        rank = stats.mannwhitneyu(foreign.numpy(), own.numpy()).statistic / (len(own) * len(foreign))
        assert area == pytest.approx(rank, abs=1e-6)
        scores = torch.cat([own, foreign]) / 10  # torchmetrics wants 0 to 1
        labels = torch.cat([torch.zeros(len(own)), torch.ones(len(foreign))]).long()
        assert area == pytest.approx(float(binary_auroc(scores, labels)), abs=1e-5)


def test_the_command_takes_a_folder_and_the_run_behind_it(run, pictures, capsys):
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    assert main(["--device", "cpu", "--against", "folder", str(pictures), str(run.path)]) == 0
    text = capsys.readouterr().out
    assert f"Against {pictures} (30 images): AUROC 0." in text.replace("\n", " ")
    assert "1 pictures cannot be decoded" in text
    written = json.loads((run.path / "ensemble.json").read_text())["against"]
    assert written["images"] == 30
    assert 0 <= written["auroc_by_entropy"] <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder"], "--against folder needs the folder of the pictures"),
        (["cifar11"], "unknown data set 'cifar11'"),
        (["imagenet"], "--against folder DIR"),
        (["svhn"], "svhn"),
    ],
)
def test_other_sets_are_refused_by_name(run, capsys, arguments, message):
    assert main([str(run.path), "--device", "cpu", "--against", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_pictures_is_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    ensemble = fastsnap.load_ensemble(run.path, device="cpu")
    test = ensemble.combined(torch.from_numpy(small_dataset().test.images))
    with pytest.raises(RunError, match="no picture that can be decoded"):
        measure_against(ensemble, test, "folder", tmp_path / "empty", 10, 1)


def test_a_single_member_has_no_mutual_information(run, pictures):
    ensemble = fastsnap.load_ensemble(run.path, last=1, device="cpu")
    test = ensemble.combined(torch.from_numpy(small_dataset().test.images))
    assert measure_against(ensemble, test, "folder", pictures, 10, 1).mutual_information is None


def test_channels_are_brought_to_those_of_the_run_as_pillow_does():
    colours = np.random.default_rng(1).integers(0, 256, (4, 9, 7, 3), dtype=np.uint8)
    expected = np.stack([np.asarray(Image.fromarray(pixels).convert("L")) for pixels in colours])
    assert np.array_equal(with_channels(colours, 1)[..., 0], expected)
    grey = with_channels(colours, 1)
    assert np.array_equal(with_channels(grey, 3), np.repeat(grey, 3, 3))
    assert np.array_equal(with_channels(colours, 3), colours)
