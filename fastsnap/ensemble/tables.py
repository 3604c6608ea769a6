"""A report as a person reads it: the tables of the members and of the last m, and what they say in a sentence."""

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastsnap.ensemble.against import Against
from fastsnap.ensemble.choosing import ALL, LAST, Choice
from fastsnap.ensemble.combining import GEOMETRIC, MEAN, VOTE
from fastsnap.ensemble.comparison import RunComparison, Spread
from fastsnap.ensemble.evaluate import Report
from fastsnap.ensemble.metrics import Difference, Metrics
from fastsnap.ensemble.views import ONE, VIEWS
from fastsnap.ensemble.worth import AVERAGE, DECIDED, SOUP, WAYS, Row, Worth
from fastsnap.printing import literal, print_line

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
    against = [] if report.against is None else [against_text(report.against)]
    worth = report.worth if len(report.snapshots) > 1 else None
    worths = [] if worth is None else [_worth_table(report, worth), _gains_table(worth)]
    for table in (_members_table(report), _last_m_table(report), *worths):
        table.width = console.measure(table, options=console.options.update(width=WIDEST_TABLE)).maximum
        console.print(table, crop=False)
        console.print()
    for text in (
        summary(report),
        *decision_texts(report),
        *barrier_texts(report),
        *_advice(report),
        *against,
    ):
        print_line(console, text)


def _members_table(report: Report) -> Table:
    table = _table("Each snapshot alone", "snapshot", "epoch", "end lr", "train loss")
    for entry, metrics in zip(report.snapshots, report.metrics.alone, strict=True):
        place = (f"{entry.number}", f"{entry.epoch}", f"{entry.learning_rate:.2g}", f"{entry.train_loss:.4f}")
        table.add_row(*place, *_cells(metrics))
    return table


def _last_m_table(report: Report) -> Table:
    how = {MEAN: "averaged", GEOMETRIC: "in the geometric mean", VOTE: "voting"}[report.metrics.combine]
    table = _table(f"The last m {how}", "m", "snapshots")
    numbers = [entry.number for entry in report.snapshots]
    for m, metrics in enumerate(report.metrics.last_m, start=1):
        table.add_row(f"{m}", ranges(numbers[-m:]), *_cells(metrics))
    return table


def _worth_table(report: Report, worth: Worth) -> Table:
    columns = ("error %", "NLL", "ECE", "forwards", "MB", "ms/image")
    table = _table("What each way to use them is worth, and costs", "way", "snapshots", metrics=columns)
    table.columns[0].justify = "left"
    numbers = [entry.number for entry in report.snapshots]
    for row in worth.rows:
        table.add_row(
            way_name(row),
            ranges([numbers[member] for member in row.members]),
            _number(row.metrics.error, 2),
            _number(row.metrics.nll, 4),
            _number(row.metrics.ece, 4),
            f"{row.cost.forwards:.3g}",
            f"{row.cost.bytes / 1e6:.3g}",
            f"{row.cost.milliseconds:.3g}",
        )
    return table


def _gains_table(worth: Worth) -> Table:
    columns = ("error", "95 % interval", "NLL", "95 % interval")
    table = _table("Differences from all with equal weights, image by image", "way", metrics=columns)
    table.columns[0].justify = "left"
    for row in worth.rows:
        if row.name != ALL:
            table.add_row(way_name(row), *_gain(row.error_gain, 2), *_gain(row.nll_gain, 4))
    return table


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


def _gain(gain: Difference | None, digits: int) -> tuple[str, str]:
    """A difference, and the interval around it."""
    if gain is None:
        return "-", "-"
    low, high = gain.interval
    return f"{gain.points:+.{digits}f}", f"{low:+.{digits}f} to {high:+.{digits}f}"


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def print_comparison(comparison: RunComparison, console: Console) -> None:
    """The runs, and the groups of runs that differ only in their seeds."""
    console.print()
    print_line(console, f"{comparison.dataset} test, {comparison.images:,} images")
    console.print()
    of_runs = ("error %", "NLL", "error diff.", "95 % interval", "NLL diff.", "95 % interval")
    table = _table(
        "Runs, and how they differ from the first one, image by image", "run", "way", metrics=of_runs
    )
    for row in comparison.rows:
        gains: tuple[str, ...] = ("",) * 4
        if row.run != comparison.rows[0].run:
            gains = (*_gain(row.error_difference, 2), *_gain(row.nll_difference, 4))
        run = literal(row.run, console.encoding)
        table.add_row(run, WAYS.get(row.way, row.way), f"{row.error:.2f}", f"{row.nll:.4f}", *gains)
    tables = [table]
    if comparison.groups:
        columns = ("seeds", "error %", "95 % interval", "error diff.", "95 % interval")
        table = _table(
            "Over seeds, and how groups differ from the first one", "group", "way", metrics=columns
        )
        for group in comparison.groups:
            for way, error in group.errors.items():
                against = group.against_first.get(way)
                cells = ("", "") if against is None else _spread(against, "+.2f")
                table.add_row(
                    literal(group.name, console.encoding),
                    WAYS.get(way, way),
                    f"{len(group.seeds)}",
                    *_spread(error, ".2f"),
                    *cells,
                )
        tables.append(table)
    for table in tables:
        for column in table.columns[:2]:
            column.justify = "left"
        table.width = console.measure(table, options=console.options.update(width=WIDEST_TABLE)).maximum
        console.print(table, crop=False)
        console.print()
    if comparison.groups:
        print_line(
            console, "Intervals over seeds are Student's, paired where the seeds are the same, else Welch's."
        )


def _spread(value: Spread, form: str) -> tuple[str, str]:
    if value.interval is None:
        return f"{value.mean:{form}}", "-"
    low, high = value.interval
    return f"{value.mean:{form}}", f"{low:{form}} to {high:{form}}"


def against_text(against: Against) -> str:
    """How well it tells the other set from the test split."""
    text = f"Against {against.name} ({against.images:,} images): AUROC {against.entropy:.4f} by entropy"
    if against.mutual_information is not None:
        text += f", {against.mutual_information:.4f} by mutual information"
    if against.skipped:
        text += f"; {against.skipped:,} pictures cannot be decoded"
    return text + "."


def _table(title: str, *columns: str, metrics: tuple[str, ...] = METRIC_COLUMNS) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 0, 0, 1),
    )
    for name in columns + metrics:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(metrics: Metrics) -> tuple[str, ...]:
    percents = (_number(metrics.error, 2), _number(metrics.top5_error, 2))
    return (*percents, *(_number(value, 4) for value in (metrics.nll, metrics.ece, metrics.brier)))


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


def decision_texts(report: Report) -> list[str]:
    """What was decided on the held-out images, or in one line why nothing was; which snapshots only harm."""
    choice = report.choice
    if choice is None:
        reason = f"Nothing was chosen, weights are equal: {report.no_choice}."
        return [reason] if report.split == "test" and len(report.snapshots) > 1 else []
    numbers = [entry.number for entry in report.snapshots]
    texts = [f"{decision(report, choice)}, as decided on {choice.images:,} held-out images."]
    if choice.harmful:
        named = ranges([numbers[member] for member in choice.harmful])
        plural = len(choice.harmful) > 1
        texts.append(
            f"Snapshot{'s' if plural else ''} {named} only harm{'' if plural else 's'}: on the held-out images no "
            f"average with equal weights becomes better by {'them' if plural else 'it'}."
        )
    twins = [numbers[member] for member in choice.equal]
    if twins:
        texts.append(f"Snapshots {ranges(twins)} say the same as an earlier one: they are one network.")
    if choice.missing:
        texts.append(
            f"No image is held out of {len(choice.missing):,} of the {report.classes:,} classes: what was decided "
            "knows nothing of them; --validation N with a larger N holds out more."
        )
    return texts


def barrier_texts(report: Report) -> list[str]:
    """Where averaged weights are worse than a member is, whether a barrier makes them so, and what a line shows."""
    texts = []
    rows = report.worth.rows if report.worth else ()
    for barred in (True, False):
        found = [
            row for row in rows if row.name in (AVERAGE, SOUP) and _is_worse(row, report) == (True, barred)
        ]
        if not found:
            continue
        each = ", ".join(f"{_members_of(row, report)}: {row.metrics.error:.2f} %" for row in found)
        best = min(report.metrics.alone[member].error for row in found for member in row.members)
        why = "they are worse than their members are on average: a barrier of loss lies between these"
        if not barred:
            why = "no barrier of loss, older snapshots are just weaker"
        texts.append(
            f"warning: the averaged weights of snapshots {each} are worse than the best of them alone ({best:.2f} %); "
            f"{why}."
        )
    if report.line is not None:
        low, high = sorted((report.line.first, report.line.second))
        texts.append(
            f"Between snapshots {low} and {high} the error rises {max(0.0, report.line.barrier):.2f} points above the "
            "straight line, with BatchNorm's statistics gathered anew."
        )
    return texts


def _is_worse(row: Row, report: Report) -> tuple[bool, bool]:
    """Whether averaged weights are worse than the best of the members, and than they are on average."""
    errors = [report.metrics.alone[member].error for member in row.members]
    return row.metrics.error > min(errors), row.metrics.error > sum(errors) / len(errors)


def _members_of(row: Row, report: Report) -> str:
    return ranges([report.snapshots[member].number for member in row.members])


def decision(report: Report, choice: Choice) -> str:
    """The decision as a sentence without its end."""
    numbers = [entry.number for entry in report.snapshots]
    members = choice.taken.members
    weights = [choice.taken.weights[member] for member in members]
    temperature = f"temperature {choice.temperature:.3g}"
    if len(members) == 1:
        return f"Use snapshot {numbers[members[0]]} alone, {temperature}"
    which = f"snapshots {ranges([numbers[member] for member in members])}"
    if len(members) == len(numbers):
        which = f"all {len(numbers)} snapshots"
    if len(set(weights)) == 1:
        return f"Use {which}, equal weights, {temperature}"
    return f"Use {which}, weights {', '.join(f'{weight:.2f}' for weight in weights)}, {temperature}"


def _advice(report: Report) -> list[str]:
    """How the ways to combine compare; which m validates best."""
    if len(report.snapshots) == 1:
        return []
    if report.split == "validation" and report.metrics.combine != VOTE:
        nlls = [metrics.nll for metrics in report.metrics.last_m]
        return [f"Lowest NLL on the validation images: the last {nlls.index(min(nlls)) + 1}."]
    if report.worth is None:
        return []
    return [combining_text(report.worth)]


def combining_text(worth: Worth) -> str:
    """Which way to combine all members is better, by how much."""
    parts = []
    for name in (GEOMETRIC, VOTE):
        row = worth.row(name)
        text = f"{name} {_signed(row.error_gain, 2)} points of error"
        if row.nll_gain is not None:
            text += f" and {_signed(row.nll_gain, 4)} nats of NLL"
        parts.append(text)
    return f"Against the mean of the probabilities of all: {', '.join(parts)} (--combine)."


def _signed(gain: Difference, digits: int) -> str:
    points, interval = _gain(gain, digits)
    return f"{points} ({interval})"
