"""A report as a person reads it: the tables of the members and of the last m, and what they say in a sentence."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastsnap.ensemble.evaluate import Report
from fastsnap.ensemble.metrics import Metrics
from fastsnap.ensemble.views import ONE, VIEWS
from fastsnap.printing import print_line

WIDEST_TABLE = (
    200  # characters; terminals and files that are narrower than a table get whole lines, no cut cells
)
METRIC_COLUMNS = ("error %", "top-5 %", "NLL", "ECE", "Brier")


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
    for table in (_members_table(report), _last_m_table(report)):
        table.width = console.measure(table, options=console.options.update(width=WIDEST_TABLE)).maximum
        console.print(table, crop=False)
        console.print()
    print_line(console, summary(report))
    advice = _advice(report)
    if advice:
        print_line(console, advice)


def _members_table(report: Report) -> Table:
    table = _table("Each snapshot alone", "snapshot", "epoch", "end lr", "train loss")
    for entry, metrics in zip(report.snapshots, report.metrics.alone, strict=True):
        place = (f"{entry.number}", f"{entry.epoch}", f"{entry.learning_rate:.2g}", f"{entry.train_loss:.4f}")
        table.add_row(*place, *_cells(metrics))
    return table


def _last_m_table(report: Report) -> Table:
    table = _table("The last m averaged", "m", "snapshots")
    numbers = [entry.number for entry in report.snapshots]
    for m, metrics in enumerate(report.metrics.last_m, start=1):
        table.add_row(f"{m}", ranges(numbers[-m:]), *_cells(metrics))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1),
    )
    for name in columns + METRIC_COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(metrics: Metrics) -> tuple[str, ...]:
    percents = (f"{metrics.error:.2f}", f"{metrics.top5_error:.2f}")
    return (*percents, f"{metrics.nll:.4f}", f"{metrics.ece:.4f}", f"{metrics.brier:.4f}")


def ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 5] -> "1-3, 5"."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(f"{start}" if start == end else f"{start}-{end}" for start, end in pairs)


def summary(report: Report) -> str:
    """One sentence: what all members together gain or lose against the last one alone."""
    together, last = report.metrics.last_m[-1].error, report.metrics.alone[-1].error
    count = len(report.snapshots)
    if count == 1:
        return f"1 snapshot: {last:.2f} % error; an ensemble needs at least 2."
    difference = report.metrics.all_against_last
    points, spread = difference.points, difference.standard_error
    if points == 0:
        return f"{count} snapshots together: {together:.2f} % error, the same as the last one alone."
    relation = "below" if points < 0 else "above"
    text = (
        f"{count} snapshots together: {together:.2f} % error, {abs(points):.2f} ± {spread:.2f} points "
        f"{relation} the last one alone ({last:.2f} %)"
    )
    if abs(points) < 2 * spread:
        return text + f"; with {report.images:,} images that is within the noise (±: standard error)."
    return text + " (±: standard error over the images)."


def _advice(report: Report) -> str | None:
    """How many to average: which m validates best, or why the test images must not choose it."""
    if len(report.snapshots) == 1:
        return None
    nlls = [metrics.nll for metrics in report.metrics.last_m]
    if report.split == "validation":
        return f"Lowest NLL on the validation images: the last {nlls.index(min(nlls)) + 1}."
    return "To choose m, use --split validation (of a run trained with --validation N), not the test images."
