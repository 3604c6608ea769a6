"""The command line of prediction: the same answers as the evaluation's, three forms, and pictures that are none."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_pictures import folder_of_pictures, picture, save
from PIL import Image
from small_run import small_run

from fastsnap import ensemble_eval, load_ensemble, train
from fastsnap.predict import main

FACTS: dict[str, Any] = {
    "class_names": [f"digit {number}" for number in range(9)] + ["=nine, \x1b[1m"],
    "mean": [77.87],
    "std": [95.87],
    "image_shape": [8, 8, 1],
}


@pytest.fixture(autouse=True)
def threads_as_before():
    """The command line sets the process's threads; here, other tests follow in it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of them turned, grey or transparent."""
    return folder_of_pictures(tmp_path_factory.mktemp("my pictures"), train=12, test=20)


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder alone: pictures and cache are elsewhere."""
    run = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        flags = ["--dataset", "folder", "--data", str(pictures), "--net", "resnet8", "--image-size", "24"]
        length = ["--epochs", "4", "--cycles", "2", "--batch-size", "8", "--lr", "0.05"]
        assert train.main([*flags, *length, "--loader", "torch", "--out", str(run)]) == 0
        evaluation = ["--device", "cpu", "--precision", "fp32", "--json", str(run / "fp32.json")]
        assert ensemble_eval.main([str(run), *evaluation]) == 0
    return run


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    return small_run(tmp_path / "digits", snapshots=3, **FACTS).path


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_answers_are_the_evaluations(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of resized crops, from files that are turned, grey and transparent, without the data set."""
    assert main([str(trained), str(pictures / "val"), "--device", "cpu", "--csv"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = rows_of(out)
    assert len(rows) == 40
    wrong = [row for row in rows if row["class"] != Path(row["image"]).relative_to(pictures / "val").parts[0]]
    evaluated = json.loads((trained / "fp32.json").read_text())["last_m"][-1]
    assert 100 * len(wrong) / len(rows) == pytest.approx(evaluated["error"], abs=1e-12)
    ensemble = load_ensemble(trained, device="cpu")
    names = sorted(row["image"] for row in rows)
    labels = [ensemble.classes.index(Path(name).relative_to(pictures / "val").parts[0]) for name in names]
    probabilities = ensemble.predict(names).probabilities.double()
    nll = -probabilities.log()[range(40), labels].mean().item()
    assert nll == pytest.approx(evaluated["nll"], abs=1e-5)


def test_the_table_has_a_row_per_picture_in_order(
    trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trained), str(pictures / "val"), "--top", "2", "--batch-size", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "image",
        "class",
        "prob.",
        "class",
        "prob.",
        "entropy",
        "mut.",
        "inf.",
        "disagree",
    ]
    assert len(lines) == 41
    assert len({len(line) for line in lines}) == 1
    names = [line.split(".")[0] for line in lines[1:]]
    assert names == sorted(names)
    ensemble = load_ensemble(trained, device="cpu")
    first = lines[1].split("  ")[0].strip()
    best = ensemble.predict(first).top(2)[0]
    shown = lines[1].removeprefix(first).split()
    assert shown[0] + " " + shown[1] == best[0][0]
    assert float(shown[2]) == pytest.approx(best[0][1], abs=1e-4)


def test_json_lines(trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sorted((pictures / "val").rglob("*.png"))[0]
    assert main([str(trained), str(file), "--jsonl", "--top", "9", "--device", "cpu", "--last", "1"]) == 0
    row = json.loads(capsys.readouterr().out)
    predictions = load_ensemble(trained, device="cpu", last=1).predict(file)
    assert row["image"] == str(file)
    assert [entry["class"] for entry in row["top"]] == [name for name, _ in predictions.top(2)[0]]
    assert sum(entry["probability"] for entry in row["top"]) == pytest.approx(1, abs=1e-6)
    assert row["entropy"] == pytest.approx(predictions.entropy.item(), rel=1e-6)
    assert row["mutual_information"] == row["disagreement"] == 0


def test_names_come_on_standard_input(digits: Path, tmp_path: Path) -> None:
    """Also those that are no UTF-8; and a folder among them."""
    odd = os.fsdecode(b"\xff odd.png")
    save(picture(9, 9), tmp_path / "pictures" / odd)
    save(picture(9, 9), tmp_path / "a b.png")
    names = f"{tmp_path / 'a b.png'}\r\n\n{tmp_path / 'pictures'}\n"
    command = [sys.executable, "-m", "fastsnap.predict", str(digits), "-", "--jsonl"]
    done = subprocess.run(command, input=os.fsencode(names), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    found = [json.loads(line)["image"] for line in done.stdout.splitlines()]
    assert found == [str(tmp_path / "a b.png"), str(tmp_path / "pictures" / odd)]


@pytest.mark.parametrize("form", [[], ["--csv"], ["--jsonl"]])
def test_what_is_no_picture_is_named_and_the_others_go_on(
    digits: Path, tmp_path: Path, form: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    save(picture(30, 20), folder / "a.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    (folder / "empty.png").touch()
    save(picture(1, 1), folder / "inner" / "one pixel.png")
    (folder / "notes.txt").write_text("left out: not an image by its name")
    (folder / "hollow").mkdir()
    missing = tmp_path / "missing.png"
    arguments = [str(digits), str(folder), str(missing), str(folder / "hollow"), *form, "--batch-size", "1"]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == (2 if "--jsonl" in form else 3)
    lines = err.splitlines()
    assert len(lines) == 5
    assert sum(line.startswith(f"error: {folder / 'broken.jpg'}: ") for line in lines) == 1
    assert f"error: {folder / 'empty.png'}: it is empty" in lines
    assert sum(str(missing) in line and "No such file" in line for line in lines) == 1
    assert f"error: {folder / 'hollow'}: it holds no image" in lines
    assert lines[-1] == "4 could not be used; of 5 images"


def test_pictures_of_any_size(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [(1, 1), (1, 10_000), (10_000, 1), (10_000, 10_000)]
    for width, height in sizes:
        save(Image.new("L", (width, height), 200), tmp_path / "pictures" / f"{width}x{height}.png")
    assert main([str(digits), str(tmp_path / "pictures"), "--csv"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert len(rows) == 4
    assert len({row["probability"] for row in rows}) == 1  # of one colour, all of them
    expected = load_ensemble(digits, device="cpu")(torch.full((1, 8, 8, 1), 200, dtype=torch.uint8))
    assert float(rows[0]["probability"]) == pytest.approx(expected.max().item(), abs=1e-6)


def test_names_of_classes_are_no_commands_to_the_terminal(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save(picture(8, 8), tmp_path / "a.png")
    for form in ("--csv", "--jsonl"):
        assert main([str(digits), str(file), "--top", "10", form]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out
        if form == "--csv":
            assert "=nine, \\x1b[1m" in rows_of(out)[0].values()
        else:
            assert "=nine, \x1b[1m" in [entry["class"] for entry in json.loads(out)["top"]]


def test_a_link_that_leads_back_is_walked_once(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(picture(8, 8), tmp_path / "pictures" / "a.png")
    (tmp_path / "pictures" / "again").symlink_to(tmp_path / "pictures")
    assert main([str(digits), str(tmp_path / "pictures"), "--jsonl"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top", "0"], "--top must be at least 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--last", "7"], "last must be from 1 to the 3 snapshots"),
        (["--snapshots", "1,x"], "must be numbers separated by commas"),
        (["--last", "1", "--snapshots", "1"], "not allowed with"),
        (["--csv", "--jsonl"], "not allowed with"),
    ],
)
def test_other_options_are_refused(
    digits: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main([str(digits), "a.png", *arguments])
    except SystemExit as error:
        status = int(error.code or 0)
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert message in err


def test_a_reader_that_leaves_ends_it(digits: Path, tmp_path: Path) -> None:
    for number in range(30):
        save(picture(8, 8), tmp_path / "pictures" / f"{number}.png")
    command = f"{sys.executable} -m fastsnap.predict {digits} {tmp_path / 'pictures'} --jsonl --batch-size 1"
    piped = subprocess.run(
        ["bash", "-c", f"{command} | head -n 1; exit ${{PIPESTATUS[0]}}"], capture_output=True, check=False
    )
    assert piped.returncode == 128 + 13
    assert len(piped.stdout.splitlines()) == 1
    assert piped.stderr == b""


def test_the_whole_run_folder_may_be_moved(
    trained: Path, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = Path(shutil.copytree(trained, tmp_path / "elsewhere"))
    file = sorted((pictures / "val").rglob("*.png"))[0]
    assert main([str(moved), str(file), "--jsonl"]) == 0
    first = capsys.readouterr().out
    assert main([str(trained), str(file), "--jsonl"]) == 0
    assert first == capsys.readouterr().out


def test_the_background_of_training_is_behind_transparent_pixels(trained: Path, tmp_path: Path) -> None:
    background = json.loads((trained / "config.json").read_text())["background"]
    clear = Image.new("RGBA", (24, 24), (10, 20, 30, 0))
    opaque = Image.new("RGB", (24, 24), tuple(background))
    ensemble = load_ensemble(trained, device="cpu")
    found = ensemble.predict([clear, opaque]).probabilities
    assert np.array_equal(found[0], found[1])


def test_the_data_folder_of_an_old_run_may_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data set of this one is within scikit-learn, so naming a folder is refused; without, it is asked."""
    old = small_run(tmp_path / "old", snapshots=1).path
    file = str(save(picture(8, 8), tmp_path / "a.png"))
    assert main([str(old), file, "--data", str(tmp_path)]) == 2
    assert "data (--data) has no effect" in capsys.readouterr().err
    assert main([str(old), file]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1] in tuple("0123456789")


def test_line_breaks_in_names_break_no_row(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python takes more characters for line breaks than CSV does."""
    for name in ("two\nlines.png", "a\x1cb.png", "c\u2028d, e.png"):
        save(picture(8, 8), tmp_path / "pictures" / name)
    assert main([str(digits), str(tmp_path / "pictures"), "--csv"]) == 0
    rows = rows_of(capsys.readouterr().out)
    assert sorted(Path(row["image"]).name for row in rows) == [
        "a\\x1cb.png",
        "c\\u2028d, e.png",
        "two\\nlines.png",
    ]
    assert all(0 < float(row["probability"]) <= 1 for row in rows)
