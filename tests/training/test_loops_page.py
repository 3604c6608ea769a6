"""The examples of docs/loops.md run as they stand there, where their libraries are installed."""

import re
from pathlib import Path

import pytest

from fastsnap.run_folder import RunFolder

PAGE = (Path(__file__).parents[2] / "docs" / "loops.md").read_text()
EXAMPLES = dict(re.findall(r"^## (\w+)\n\n```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))


def test_the_page_has_an_example_of_each() -> None:
    assert EXAMPLES.keys() == {"timm", "accelerate", "Lightning", "transformers"}
    assert PAGE.count("```python") == len(EXAMPLES)


@pytest.mark.filterwarnings("ignore")  # the libraries', of themselves and of what they use
@pytest.mark.parametrize("library", EXAMPLES)
def test_an_example_makes_a_run_of_two_snapshots(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library.lower())
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[library], "loops.md", "exec"), {"__name__": "example"})
    folder = RunFolder(tmp_path / "runs" / library.lower())
    assert [entry.step for entry in folder.snapshots()] == [10, 20]
    assert folder.metrics()[-1]["step"] == 20
    assert (folder.path / "ensemble.json").exists() == (library == "accelerate")
