"""A report as a person reads it on a console: tables, and what they say in sentences."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastsnap.ensemble.comparison import RunComparison
from fastsnap.ensemble.lines import (
    Lines,
    gains_lines,
    groups_lines,
    last_m_lines,
    members_lines,
    run_differences_lines,
    runs_lines,
    worth_lines,
)
from fastsnap.ensemble.results import Report
from fastsnap.ensemble.sentences import decision_texts, further_texts, summary
from fastsnap.ensemble.views import ONE, VIEWS
from fastsnap.printing import literal, print_line

# Characters; terminals and files that are narrower than a table get whole lines, no cut cells.
WIDEST_TABLE = 200


def print_report(report: Report, console: Console) -> None:
    """What was evaluated, the tables, and a sentence that sums them up."""
    paragraphs = [
        f"{report.run}: {report.net} on {report.dataset} {report.split}, {report.images:,} images "
        f"({report.device}, {report.precision}, {report.seconds:.1f} s)"
    ]
    if report.precision != report.trained_precision:
        paragraphs.append(
            f"Evaluated in {report.precision} ({report.precision_reason}), trained in {report.trained_precision}."
        )
    if report.views != ONE:
        paragraphs.append(
            f"Probabilities are averaged over members and {VIEWS[report.views]} views of each image ({report.views})."
        )
    if report.views != ONE and not report.trained_mirrored:
        paragraphs.append(
            "Training saw no mirror images: where they change what an image means, these views harm."
        )
    if report.saved < report.planned:
        paragraphs.append(
            f"The run is not finished: {report.saved} of its {report.planned} snapshots are saved."
        )
    console.print()
    for text in paragraphs:
        print_line(console, text)
        console.print()
    worth = report.worth if len(report.snapshots) > 1 else None
    tables = [members_lines(report), last_m_lines(report)]
    tables += [] if worth is None else [worth_lines(report, worth), gains_lines(worth)]
    for lines in tables:
        _print_table(lines, console)
    for text in (summary(report), *decision_texts(report), *further_texts(report)):
        print_line(console, text)


def print_comparison(comparison: RunComparison, console: Console) -> None:
    """The runs, and the groups of runs that differ only in their seeds."""
    console.print()
    print_line(console, f"{comparison.dataset} test, {comparison.images:,} images")
    console.print()
    _print_table(runs_lines(comparison), console)
    _print_table(run_differences_lines(comparison), console)
    if comparison.groups:
        _print_table(groups_lines(comparison), console)
        print_line(
            console, "Intervals over seeds are Student's, paired where the seeds are the same, else Welch's."
        )


def _print_table(lines: Lines, console: Console) -> None:
    table = Table(
        title=lines.caption,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1),
    )
    for place, name in enumerate(lines.columns):
        table.add_column(name, justify="left" if place < lines.texts else "right", no_wrap=True)
    for row in lines.rows:
        table.add_row(*(Text(literal(cell, console.encoding)) for cell in row))
    table.width = console.measure(table, options=console.options.update(width=WIDEST_TABLE)).maximum
    console.print(table, crop=False)
    console.print()
