"""What the README and the pages under docs/ show works: the example runs, commands and links exist."""

import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from made_pictures import picture, save
from small_run import small_run

from fastsnap.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = {  # by their last line of imports
    re.findall(r"^(?:from|import) (.*)", example, flags=re.MULTILINE)[-1]: example
    for example in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
}
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_example_of_an_own_loop_has_at_most_15_lines_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = EXAMPLES["fastsnap import Schedule, SnapshotSGD, save_snapshot"]
    assert len(example.splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 4
    states = [safetensors.torch.load_file(file) for file in files]
    weights = [next(iter(state.values())) for state in states]
    assert all((first != second).any() for first, second in itertools.pairwise(weights))


def test_the_example_of_a_recorded_loop_makes_a_run_and_evaluates_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    example = EXAMPLES["fastsnap import Schedule, SnapshotRecorder, SnapshotSGD, evaluate"]
    exec(compile(example, "README.md", "exec"), {})
    folder = RunFolder(tmp_path / "runs" / "my-loop")
    assert [entry.step for entry in folder.snapshots()] == [10, 20, 30, 40]
    assert (folder.path / "ensemble.json").exists()
    assert "saved ensemble.json" in capsys.readouterr().out


@pytest.fixture
def own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the section "Use it" speaks of: runs/my-run and pictures."""
    monkeypatch.chdir(tmp_path)
    facts = {"class_names": list("abcdefghij"), "mean": [77.87], "std": [95.87], "image_shape": [8, 8, 1]}
    small_run(tmp_path / "runs" / "my-run", snapshots=3, **facts)
    for number, name in enumerate(("cat.jpg", "dog.png", "photos/one.webp", "photos/two.gif")):
        save(picture(40, 30, seed=number), tmp_path / name)
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # of the exporter, about itself
def test_the_three_ways_to_use_it_work_as_they_stand(
    own_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    variables: dict[str, Any] = {}
    exec(compile(EXAMPLES["fastsnap"], "README.md", "exec"), variables)
    predictions = variables["predictions"]
    assert predictions.probabilities.shape == (2, 10)
    assert capfd.readouterr().out.startswith(str(predictions.names))
    section = README.partition("## Use it")[2].partition("\n## ")[0]
    predict, export = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)[0].splitlines()
    for command in (predict, export):
        assert (
            subprocess.run(
                command.replace(".venv/bin/python", sys.executable), shell=True, check=False
            ).returncode
            == 0
        )
    out, err = capfd.readouterr()
    assert err == ""
    rows = out.splitlines()
    assert [row.split()[0] for row in rows[:4]] == ["image", "cat.jpg", "photos/one.webp", "photos/two.gif"]
    assert rows[1].split()[1] == predictions.names[0]
    assert rows[4].startswith("ensemble.onnx: 3 members, fp32")
    stranger: dict[str, Any] = {}
    exec(compile(EXAMPLES["onnxruntime"], "README.md", "exec"), stranger)
    black = torch.zeros(2, 8, 8, 1, dtype=torch.uint8)
    expected = variables["ensemble"].cpu()(black)
    assert np.abs(stranger["probabilities"] - expected.numpy()).max() < 1e-5
    assert stranger["classes"] == list("abcdefghij")


def test_every_make_target_that_the_pages_name_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        page: set(re.findall(r"(?:`|^)make\s([a-z][a-z-]*)", page.read_text(), re.MULTILINE))
        for page in PAGES
    }
    assert {"train", "test", "apex"} <= named[ROOT / "README.md"]
    assert set().union(*named.values()) <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, heading = link.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), link
        assert file.is_relative_to(ROOT), link
        assert not heading or heading in anchors(file), link


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_leads_to_every_page_and_shows_the_pictures() -> None:
    linked = {(ROOT / link).resolve() for link in re.findall(r"\]\(([^)#]+)\)", README)}
    assert set(PAGES) - {ROOT / "README.md"} <= linked
    assert set((ROOT / "docs" / "pictures").glob("*.png")) <= linked


def test_flags_of_the_benchmarks_that_the_pages_name_exist() -> None:
    flags = set(re.findall(r'"(--[a-z-]+)"', (ROOT / "benchmarks" / "run.py").read_text()))
    pages = "".join(page.read_text() for page in PAGES)
    # The results name the commands of the commits that they were measured at.
    pages = re.sub(r"<!-- (results|earlier) -->.*?<!-- /\1 -->", "", pages, flags=re.DOTALL)
    commands = re.findall(r"benchmarks/run\.py([^`\n]*)", pages)
    assert commands
    assert {flag for command in commands for flag in re.findall(r"--[a-z-]+", command)} <= flags
