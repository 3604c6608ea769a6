"""report.html, in a real browser without a window."""

import base64
import dataclasses
import io
import re

import browser
import numpy as np
import pytest
import torch
from made_pictures import folder_of_pictures
from PIL import Image
from small_run import small_dataset, small_run

from fastsnap.data.folder import load_folder
from fastsnap.data.pictures import Wishes
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.ensemble.page import page, pixels_of
from fastsnap.ensemble.plots import figures_of
from fastsnap.ensemble_eval import main
from fastsnap.train import main as train

pytest.importorskip(
    "PySide6.QtWebEngineWidgets", reason="no browser: pip install PySide6-WebEngine", exc_type=ImportError
)
HARD_NAMES = [
    "<b>bold</b>",
    "$x_1$",
    "a & b",
    "'quoted\"",
    "Käse",
    "中文",
    "</script><script>boom()",
    "7",
    "8",
    "9",
]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A run with all figures, whose snapshots err differently."""
    run = tmp_path_factory.mktemp("runs") / "a run's <folder>"
    command = "--epochs 4 --cycles 3 --validation 200 --net resnet8 --device cpu --ema 0.9"
    assert train([*command.split(), "--out", str(run)]) == 0
    assert main([str(run), "--device", "cpu", "--averages", "--interpolate"]) == 0
    return run


@pytest.mark.parametrize(("width", "dark"), [(400, False), (1400, False), (400, True)])
def test_a_browser_shows_the_page_without_complaint(evaluated, width, dark):
    found = browser.ask(evaluated / "report.html", width, dark=dark)
    assert found["console"] == []
    assert found["requests"] == []
    assert found["broken"] == 0
    assert found["images"] > 0
    assert found["width"] == width
    assert found["content"] <= width  # nothing sticks out; tables scroll by themselves
    figures = [name for name, _, _ in found["figures"]]
    assert figures == [
        f"figure-{name}"
        for name in ("error-against-m", "training", "members", "reliability", "cascade", "line-2-3")
        if name != "cascade" or "figure-cascade" in figures
    ]
    assert all(0 < shown <= width and paths > 5 for _, shown, paths in found["figures"])
    assert len(found["ids"]) == len(set(found["ids"]))
    assert "as decided on 200 held-out images" in found["decision"]
    for text in ("Each snapshot alone", "Images that the ensemble", "What was run", "Use it"):
        assert text in found["text"]
    assert f"load_ensemble({str(evaluated.resolve())!r})" in found["text"]
    text, background = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in found["colours"])
    assert (text > background) == dark


def test_tables_sort_by_a_click_on_their_heads(evaluated):
    found = browser.ask(evaluated / "report.html", 1400)
    names = [name for name, _, _ in found["sorted"]]
    assert names == ["way", "snapshots", "error %", "NLL", "ECE", "forwards", "MB", "ms/image"]
    for name, up, down in found["sorted"]:
        if name not in ("way", "snapshots"):
            numbers = [float(cell) for cell in up if cell != "-"]
            assert numbers == sorted(numbers)
            assert [float(cell) for cell in down if cell != "-"] == numbers[::-1]
            assert up[len(numbers) :] == down[len(numbers) :] == ["-"] * (len(up) - len(numbers))
    ways = found["sorted"][0]
    assert ways[1] == ways[2][::-1] == sorted(ways[1], key=str.casefold)


def test_names_of_classes_cannot_break_the_page(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=3)
    dataset = dataclasses.replace(small_dataset(), classes=tuple(HARD_NAMES))
    report = evaluate_run(folder, dataset=dataset, device=torch.device("cpu"), precision="fp32")
    file = tmp_path / "page.html"
    file.write_text(page(report, folder.config(), figures_of(folder, report), folder.path))
    found = browser.ask(file, 1400)
    assert found["console"] == []
    for name in HARD_NAMES:
        assert name in found["text"]


def test_the_images_are_those_of_the_split(evaluated):
    text = (evaluated / "report.html").read_text()
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))
        for content in re.findall(r"<img alt=[^>]+base64,([^\"]+)", text)
    ]
    images = small_dataset().test.images[..., 0]
    assert pictures
    assert all((images == picture).all((1, 2)).any() for picture in pictures)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text)


def test_pictures_in_files_are_seen_as_the_network_sees_them(tmp_path):
    root = folder_of_pictures(tmp_path / "pictures")
    test = load_folder("folder", root, None, Wishes(storage="files", image_size=24)).test
    assert pixels_of(test, 0).shape == (24, 24, 3)


def test_a_run_of_one_snapshot_has_a_page_too(tmp_path):
    folder = small_run(tmp_path / "run", snapshots=1, planned=1)
    assert main([str(folder.path), "--device", "cpu"]) == 0
    found = browser.ask(folder.path / "report.html", 400)
    assert found["console"] == []
    assert found["content"] <= 400
