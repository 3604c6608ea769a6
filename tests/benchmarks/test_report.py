"""The report of a folder, and the page that it writes the short results into."""

import itertools
import re
from pathlib import Path

import pytest
from made_up import record

import report
import scaling
from harness import results
from harness.measure import PROJECT, Result, Settings, compare


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """Results of made-up measurements: a throughput, an opponent that is missing, a series."""
    settings = Settings(out=tmp_path, device="cpu")
    series = scaling.Series("time of a step", "depth", "ms", "lower", {8: [1, 2, 3], 14: [4, 4, 4]})
    made_up = itertools.chain(
        compare(
            "throughput",
            "resnet20, fp32 asked of all, batch 64",
            "images/s",
            {PROJECT: [310, 320, 330], "plain PyTorch loop": [100, 100, 100]},
            "higher",
        ),
        [
            Result(
                "throughput",
                "resnet20, fp32 asked of all, batch 64",
                "torchensemble",
                "images/s",
                "higher",
                missing="not installed: make bench-peers",
            )
        ],
        scaling.results_of(series),
    )
    for result in made_up:
        results.append(result, settings)
    return tmp_path


def test_the_report_shows_values_ratios_and_what_is_missing(measured: Path) -> None:
    report.write(measured, docs=False)
    text = (measured / "report.md").read_text()
    assert "| resnet20, fp32 asked of all, batch 64 | fastsnap | 320 (315 to 325) images/s |" in text
    assert "|  | plain PyTorch loop | 100 images/s | 3.20 (3.15 to 3.25) | 3 |" in text
    assert "not measured: not installed: make bench-peers" in text
    assert "| exponent ± standard error | 1.24 |" in text  # log(4 / 2) / log(14 / 8)
    assert {file.name for file in measured.glob("*.png")} == {"throughput.png", "scaling.png"}


def test_the_html_page_needs_no_other_file(measured: Path) -> None:
    report.write(measured, docs=False)
    page = (measured / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2
    assert not re.search(r"https?://|<link|<script|url\(|@import", page)
    assert re.findall(r'src="(?!data:)', page) == []


def test_the_page_gets_its_results_between_the_markers(measured: Path) -> None:
    section = report.docs_section(results.latest(measured))
    row = (
        "in fp32, times the images/s of: plain PyTorch loop | at least 1.7 | 3.20 (3.15 to 3.25) | reached |"
    )
    assert row in section
    assert re.search(r"Machine: .*torch", section)
    before = f"# x\n{report.START}\nold\n{report.END}\nrest\n"
    after = report.with_results(before, section)
    assert after == f"# x\n{report.START}\n{section}\n{report.END}\nrest\n"
    assert report.with_results(after, section) == after
    with pytest.raises(ValueError, match="has no <!-- results -->"):
        report.with_results("# x\n", section)
    with pytest.raises(ValueError, match="quick runs"):
        report.docs_section([record(quick=True)])


def test_the_page_has_a_place_for_the_results() -> None:
    report.check_docs()
