"""What a report says in sentences: the result, the decision and why, and what users should know besides."""

from fastsnap.ensemble.against import Against
from fastsnap.ensemble.choosing import Choice
from fastsnap.ensemble.combining import GEOMETRIC, VOTE
from fastsnap.ensemble.lines import gain_cells, ranges
from fastsnap.ensemble.metrics import Difference
from fastsnap.ensemble.results import Report
from fastsnap.ensemble.worth import AVERAGE, SOUP, Row, Worth


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
        subject = f"Snapshots {ranges(twins)} say" if len(twins) > 1 else f"Snapshot {twins[0]} says"
        texts.append(f"{subject} exactly the same as an earlier one.")
    if choice.missing:
        texts.append(
            f"No image is held out of {len(choice.missing):,} of the {report.classes:,} classes: what was decided "
            "knows nothing of them; --validation N with a larger N holds out more."
        )
    return texts


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


def further_texts(report: Report) -> list[str]:
    """Whatever else there is to say."""
    against = [] if report.against is None else [against_text(report.against)]
    return [*barrier_texts(report), *_advice(report), *against]


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
    points, interval = gain_cells(gain, digits)
    return f"{points} ({interval})"


def against_text(against: Against) -> str:
    """How well it tells the other set from the test split."""
    text = f"Against {against.name} ({against.images:,} images): AUROC {against.entropy:.4f} by entropy"
    if against.mutual_information is not None:
        text += f", {against.mutual_information:.4f} by mutual information"
    if against.skipped:
        text += f"; {against.skipped:,} pictures cannot be decoded"
    return text + "."
