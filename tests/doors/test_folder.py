"""A folder of the user's own pictures, from the command line to the table: arrays and files, resuming, fine-tuning."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_pictures import folder_of_pictures

from fastsnap import ensemble_eval, train
from fastsnap.run_folder import RunFolder

USUAL = [
    "--dataset",
    "folder",
    "--net",
    "resnet8",
    "--image-size",
    "24",
    "--batch-size",
    "8",
    "--loader",
    "torch",
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of_pictures(tmp_path_factory.mktemp("my pictures"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def flags(pictures: Path, run: Path, *more: str, epochs: int = 2, cycles: int = 2) -> list[str]:
    length = ["--epochs", str(epochs), "--cycles", str(cycles)]
    return [*USUAL, *length, "--data", str(pictures), "--out", str(run), *more]


@pytest.mark.parametrize("memory", ["1GB", "0"])
def test_a_folder_is_trained_on_evaluated_and_described(
    memory: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train.main(flags(pictures, run, "--memory", memory)) == 0
    output = capsys.readouterr().out
    assert "train/ and val/ folders in" in output
    assert "24 training images, 8 test images, 2 classes, 12 training images in each" in output
    assert "pixels, median shorter side 41, coloured" in output
    assert "image size 24 pixels (as asked for)" in output
    assert ("decoded while training" if memory == "0" else "decoded once") in output
    assert "2 snapshots together" in output
    config = json.loads((run / "config.json").read_text())
    assert config["class_names"] == ["class 0", "class 1"]
    assert (config["image_shape"], config["resize"]) == ([24, 24, 3], 27)
    assert config["storage"] == ("files" if memory == "0" else "arrays")
    before = json.loads((run / "ensemble.json").read_text())["last_m"]
    assert ensemble_eval.main([str(run)]) == 0
    assert json.loads((run / "ensemble.json").read_text())["last_m"] == before
    assert ensemble_eval.main([str(run), "--ten-crop"]) == 0
    assert "averaged over members and 10 views" in capsys.readouterr().out
    assert json.loads((run / "ensemble-ten-crop.json").read_text())["views"] == "ten-crop"
    # The kind of storage is the run's, whatever fits now.
    assert train.main(flags(pictures, run)) == 0
    assert "this run is finished" in capsys.readouterr().out


def start(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastsnap.train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)


def test_a_file_that_goes_away_ends_a_run_that_goes_on_to_the_same_bits(
    pictures: Path, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(pictures, tmp_path / "data"))
    whole, broken = (flags(root, tmp_path / name, "--memory", "0", epochs=4) for name in ("whole", "broken"))
    assert train.main(whole) == 0
    # Removed once the run has begun to train: at the first line of its progress.
    command = [sys.executable, "-m", "fastsnap.train", *broken]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    victim = next((root / "train").rglob("*.jpeg"))
    for line in process.stdout:
        if line.startswith("run "):
            victim.rename(tmp_path / "kept.jpeg")
            break
    _, errors = process.communicate()
    assert process.returncode == 2
    assert f"error: {victim} is gone. Put it back" in errors
    (tmp_path / "kept.jpeg").rename(victim)
    done = start(broken)
    assert done.returncode == 0, done.stderr
    files = [sorted((tmp_path / name / "snapshots").iterdir()) for name in ("whole", "broken")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_fine_tuning_begins_with_another_runs_snapshot(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train.main(flags(pictures, first)) == 0
    capsys.readouterr()
    again = flags(pictures, second, "--initial", str(first), cycles=1)
    assert train.main(again) == 0
    assert "initial   " in capsys.readouterr().out
    config = RunFolder(second).config()
    assert config["initial_sha256"] == RunFolder(first).snapshots()[-1].sha256
    shutil.rmtree(first)
    assert train.main(again) == 0  # finished: what it began with is not needed any more
    assert "this run is finished" in capsys.readouterr().out
    assert train.main(flags(pictures, second, cycles=1)) == 2
    assert "initial: None asked for" in capsys.readouterr().err


def test_damaged_pictures_are_listed_one_to_a_line(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(pictures, tmp_path / "data"))
    for number in range(3):
        (root / f"train/class 0/bad {number}.jpg").write_text("no picture")
    assert train.main(flags(root, tmp_path / "run")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: 3 files cannot be decoded")
    assert [
        line.startswith(f"  {root}/train/class 0/bad {number}.jpg: ") for number, line in enumerate(lines[1:])
    ] == [True] * 3
    assert not (tmp_path / "run").exists()
    assert train.main(flags(root, tmp_path / "run", "--skip-damaged")) == 0
    assert "left out: 3 files that cannot be decoded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "folder"], "data (--data, make: DATA) must name the folder of the pictures"),
        (["--dataset", "digits", "--image-size", "32"], "image_size (--image-size) has no effect"),
        (["--dataset", "digits", "--memory", "1GB"], "memory (--memory) has no effect"),
        (
            ["--dataset", "folder", "--data", ".", "--memory", "lots"],
            "memory: a size must be a number of bytes",
        ),
        (["--dataset", "folder", "--data", ".", "--image-size", "4"], "image_size must be from 8 to 4096"),
        (["--dataset", "folder", "--data", "nowhere"], "there is no folder"),
        (["--dataset", "tiny-imagenet", "--data", "nowhere"], "tiny-imagenet-200.zip in "),
        (["--dataset", "imagenet", "--data", "nowhere"], "torchvision.datasets.ImageNet"),
        (["--dataset", "folder", "--data", ".", "--augment", "mixup"], "augment must be one of"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
