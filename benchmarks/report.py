"""The report: report.md with its pictures, and report.html in one file, from all results of a folder.

    python benchmarks/report.py [OUT]

writes them again without measuring.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import throughput
from fastsnap.device import choose_precision
from fastsnap.run_files import write_atomically
from harness import figures, tables
from harness.measure import PROJECT
from harness.pages import Section, table_to_markdown, to_html, to_markdown
from harness.precisions import by_default
from harness.results import Record, latest
from harness.verdicts import Verdict, verdicts
from targets import targets_for

TITLE = "fastsnap: benchmark report"
DOCS = Path(__file__).parent.parent / "docs" / "results.md"
START, END = "<!-- results -->", "<!-- /results -->"
NOTES = (
    "Contenders take turns in one run, A B A B, each at its best setting. A value is the median with its quartiles; "
    "ratios are taken round by round, and then their median: on a noisy machine they are steadier than the values. "
    "`times as good` above 1: fastsnap wins; below 1: the opponent wins.",
)


def one_line(record: Record) -> str:
    """A result, for the terminal."""
    place = f"{record['case']}: {record['opponent']}"
    if record["missing"]:
        return f"{place}: not measured, {record['missing']}"
    text = f"{place}: {tables.range_of(record)} {record['unit']}, n = {record['n']}"
    return text + (f", fastsnap {tables.range_of(record['ratio'])} times as good" if record["ratio"] else "")


def write(folder: Path, *, docs: bool) -> list[Path]:
    """Write the report on all results in `folder`, and with `docs` the section of docs/results.md; returns the files.

    Raises ValueError if there is no result, if the files cannot be written, or if docs/results.md has no place for it.
    """
    records = latest(folder)
    sections = make_sections(records, folder)
    contents = {"report.md": to_markdown(sections), "report.html": to_html(TITLE, sections)}
    for name, content in contents.items():
        write_atomically(folder / name, content.encode())
    written = [folder / name for name in contents]
    if docs:
        write_atomically(DOCS, with_results(DOCS.read_text(), docs_section(records)).encode())
        written.append(DOCS)
    return written


def check_docs() -> None:
    """Raise ValueError if docs/results.md has no place for the results."""
    with_results(DOCS.read_text(), "")


def make_sections(records: Sequence[Record], folder: Path) -> list[Section]:
    """The report's sections; draws their pictures into `folder`."""
    opening = Section(TITLE, [*_machine_lines(records), *NOTES], [tables.origins(records)], level=1)
    sections = [opening, Section("Targets", tables=[tables.targets(verdicts_here(records))])]
    names = dict.fromkeys(record["benchmark"] for record in records)
    for name in names:
        sections.append(_section(name, [r for r in records if r["benchmark"] == name], folder))
    return sections


def verdicts_here(records: Sequence[Record]) -> list[Verdict]:
    """What the records say about the targets of the processor that they were measured on; without any, of this one."""
    measured = [
        record["details"]["precision"]
        for record in records
        if (record["benchmark"], record["opponent"]) == (throughput.NAME, PROJECT)
        and record["machine"]["gpu"] is None
        and by_default(record["details"].get("precision", "")) in record["case"]
    ]
    default = measured[0] if measured else choose_precision("auto", torch.device("cpu")).name
    return verdicts(targets_for(default), records)


def _machine_lines(records: Sequence[Record]) -> list[str]:
    lines = [f"Machine: {line}." for line in tables.machines(records)]
    if any(record["quick"] for record in records):
        lines.append(
            "With results of quick runs, which show that everything works; their figures say little."
        )
    return lines


def _section(name: str, records: list[Record], folder: Path) -> Section:
    picture = folder / f"{name}.png"
    title, *text = _explanation(name)
    measured = [record for record in records if record["n"]]
    if not measured:  # there is nothing to draw
        return Section(title, text, [tables.measurements(records)])
    if name == "accuracy":
        figures.errors(measured, picture)
        gains = [tables.gain(rows) for rows in tables.by_case(measured).values()]
        return Section(title, [*text, *gains], tables.accuracy(measured), [picture])
    if name == "scaling":
        figures.series(measured, picture)
        return Section(title, text, [tables.series(measured)], [picture])
    figures.bars(measured, picture)
    return Section(title, text, [tables.measurements(records)], [picture])


def _explanation(name: str) -> list[str]:
    """The benchmark's own words on what it measures: its docstring, by paragraph; the first is the title."""
    documentation = importlib.import_module(name).__doc__ or name
    paragraphs = documentation.strip().split("\n\n")
    return [
        " ".join(paragraph.split()).removesuffix("." if place == 0 else "")
        for place, paragraph in enumerate(paragraphs)
    ]


def docs_section(records: Sequence[Record]) -> str:
    """The short results: the targets, what the ensemble gains, and where the figures come from.

    Raises ValueError if nothing but quick runs was measured.
    """
    records = [record for record in records if not record["quick"]]
    if not records:
        raise ValueError("quick runs have no result for docs/results.md: run without --quick")
    regimes = tables.by_case([r for r in records if r["benchmark"] == "accuracy" and r["n"]])
    paragraphs = [
        table_to_markdown(tables.targets(verdicts_here(records))),
        *(tables.gain(rows) for rows in regimes.values()),
        *_machine_lines(records),
        table_to_markdown(tables.origins(records)),
    ]
    return "\n\n".join(paragraphs)


def with_results(page: str, section: str) -> str:
    """`page` with `section` between its two marker comments. Raises ValueError if it lacks them."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"docs/results.md has no {START} ... {END} to write the results between")
    return f"{before}{start}\n{section}\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for an error of use."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/report.py", description="Write the report again without measuring."
    )
    parser.add_argument(
        "out", metavar="OUT", nargs="?", type=Path, default=Path("reports"), help="default: reports"
    )
    parser.add_argument(
        "--update-docs", action="store_true", help="write the short results into docs/results.md as well"
    )
    options = parser.parse_args(arguments)
    try:
        for path in write(options.out, docs=options.update_docs):
            print(f"saved {path}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
