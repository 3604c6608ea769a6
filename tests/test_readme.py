"""What the README and the pages under docs/ show works: the example runs, commands and links exist."""

import itertools
import re
from pathlib import Path

import pytest
import safetensors.torch

from fastsnap.run_folder import RunFolder

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_example_of_an_own_loop_has_at_most_15_lines_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = EXAMPLES[0]
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
    assert len(EXAMPLES) == 2
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[1], "README.md", "exec"), {})
    folder = RunFolder(tmp_path / "runs" / "my-loop")
    assert [entry.step for entry in folder.snapshots()] == [10, 20, 30, 40]
    assert (folder.path / "ensemble.json").exists()
    assert "saved ensemble.json" in capsys.readouterr().out


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
