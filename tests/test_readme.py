"""What the README shows works: its example runs, its commands and links exist."""

import itertools
import re
from pathlib import Path

import pytest
import safetensors.torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_of_an_own_loop_has_at_most_15_lines_and_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(example.splitlines()) <= 15
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 4
    states = [safetensors.torch.load_file(file) for file in files]
    weights = [next(iter(state.values())) for state in states]
    assert all((first != second).any() for first, second in itertools.pairwise(weights))


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", README, flags=re.MULTILINE))
    assert {"train", "test", "apex"} <= named <= targets


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith(("http", "#"))]
    assert links
    assert all((ROOT / link).exists() for link in links)
