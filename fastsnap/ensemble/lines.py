"""A report as rows of text, for tables on a console and on a page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastsnap.ensemble.combining import GEOMETRIC, MEAN, VOTE
from fastsnap.ensemble.comparison import RunComparison, Spread
from fastsnap.ensemble.metrics import Difference, Metrics
from fastsnap.ensemble.results import Report
from fastsnap.ensemble.ways import ALL, LAST
from fastsnap.ensemble.worth import AVERAGE, DECIDED, WAYS, Cost, Row, Worth

METRIC_COLUMNS = ("error %", "top-5 %", "NLL", "ECE", "Brier")
COST_COLUMNS = ("forwards", "MB", "ms/image")  # per image; of what is kept


@dataclass(frozen=True)
class Lines:
    """A table: its caption, the names of its columns, of which the first `texts` are no numbers, and its rows.

    marked  the row that matters most
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    marked: int | None = None


def members_lines(report: Report) -> Lines:
    """Each snapshot alone."""
    rows = []
    for entry, metrics in zip(report.snapshots, report.metrics.alone, strict=True):
        place = (f"{entry.number}", f"{entry.epoch}", f"{entry.learning_rate:.2g}", f"{entry.train_loss:.4f}")
        rows.append((*place, *_cells(metrics)))
    columns = ("snapshot", "epoch", "end lr", "train loss", *METRIC_COLUMNS)
    return Lines("Each snapshot alone", columns, rows, texts=0)


def last_m_lines(report: Report) -> Lines:
    """The last m together, for each m."""
    how = {MEAN: "averaged", GEOMETRIC: "in the geometric mean", VOTE: "voting"}[report.metrics.combine]
    numbers = [entry.number for entry in report.snapshots]
    rows = [
        (f"{m}", ranges(numbers[-m:]), *_cells(metrics))
        for m, metrics in enumerate(report.metrics.last_m, start=1)
    ]
    return Lines(f"The last m {how}", ("m", "snapshots", *METRIC_COLUMNS), rows, texts=0)


def worth_lines(report: Report, worth: Worth) -> Lines:
    """What each way to use the snapshots is worth, and costs."""
    numbers = [entry.number for entry in report.snapshots]
    rows = [
        (
            way_name(row),
            ranges([numbers[member] for member in row.members]),
            number(row.metrics.error, 2),
            number(row.metrics.nll, 4),
            number(row.metrics.ece, 4),
            *_cost_cells(row.cost),
        )
        for row in worth.rows
    ]
    columns = ("way", "snapshots", "error %", "NLL", "ECE", *COST_COLUMNS)
    caption = "What each way to use them is worth, and costs"
    return Lines(caption, columns, rows, marked=_decided(worth.rows))


def gains_lines(worth: Worth) -> Lines:
    """What each way gains against all snapshots with equal weights."""
    others = [row for row in worth.rows if row.name != ALL]
    rows = [(way_name(row), *gain_cells(row.error_gain, 2), *gain_cells(row.nll_gain, 4)) for row in others]
    caption = "Differences from all with equal weights, image by image"
    columns = ("way", "error", "95 % interval", "NLL", "95 % interval")
    return Lines(caption, columns, rows, marked=_decided(others))


def _cost_cells(cost: Cost) -> tuple[str, str, str]:
    return f"{cost.forwards:.3g}", f"{cost.bytes / 1e6:.3g}", f"{cost.milliseconds:.3g}"


def _decided(rows: Sequence[Row]) -> int | None:
    return next((place for place, row in enumerate(rows) if row.name == DECIDED), None)


def runs_lines(comparison: RunComparison) -> Lines:
    """Runs side by side."""
    rows = [
        (row.run, WAYS.get(row.way, row.way), f"{row.error:.2f}", f"{row.nll:.4f}", *_cost_cells(row.cost))
        for row in comparison.rows
    ]
    columns = ("run", "way", "error %", "NLL", *COST_COLUMNS)
    return Lines("Runs on the same test images", columns, rows, texts=2)


def run_differences_lines(comparison: RunComparison) -> Lines:
    """How the others differ from the first run."""
    others = [row for row in comparison.rows if row.run != comparison.rows[0].run]
    rows = [
        (
            *(row.run, WAYS.get(row.way, row.way)),
            *(*gain_cells(row.error_difference, 2), *gain_cells(row.nll_difference, 4)),
        )
        for row in others
    ]
    columns = ("run", "way", "error", "95 % interval", "NLL", "95 % interval")
    caption = f"Differences from the same way in {comparison.rows[0].run}, image by image"
    return Lines(caption, columns, rows, texts=2)


def groups_lines(comparison: RunComparison) -> Lines:
    """Groups of runs that differ in their seeds alone."""
    rows = []
    for group in comparison.groups:
        for way, error in group.errors.items():
            against = group.against_first.get(way)
            cells = ("", "") if against is None else _spread(against, "+.2f")
            seeds = f"{len(group.seeds)}"
            rows.append((group.name, WAYS.get(way, way), seeds, *_spread(error, ".2f"), *cells))
    columns = ("group", "way", "seeds", "error %", "95 % interval", "error diff.", "95 % interval")
    return Lines("Over seeds, and how groups differ from the first one", columns, rows, texts=2)


def way_name(row: Row) -> str:
    """As a table calls it."""
    name = WAYS.get(row.name, row.name)
    if row.name == LAST:
        name = f"last {len(row.members)}"
    elif row.name == AVERAGE:
        name = f"weights, last {len(row.members)}"
    elif row.name == DECIDED:
        name = f"decided, T {row.temperature:.3g}"
    return name


def gain_cells(gain: Difference | None, digits: int) -> tuple[str, str]:
    """A difference, and the interval around it."""
    if gain is None:
        return "-", "-"
    low, high = gain.interval
    return f"{gain.points:+.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}"


def _spread(value: Spread, form: str) -> tuple[str, str]:
    if value.interval is None:
        return f"{value.mean:{form}}", "-"
    low, high = value.interval
    return f"{value.mean:{form}}", f"{low:{form}} to {high:{form}}"


def number(value: float, digits: int) -> str:
    """With so many digits; "-" for NaN: there is none."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _cells(metrics: Metrics) -> tuple[str, ...]:
    percents = (number(metrics.error, 2), number(metrics.top5_error, 2))
    return (*percents, *(number(value, 4) for value in (metrics.nll, metrics.ece, metrics.brier)))


def ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 5] -> "1-3, 5"."""
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(f"{start}" if start == end else f"{start}-{end}" for start, end in pairs)
