"""What was decided on held-out images, kept in ensemble.json and taken by predictions and exports."""

from collections.abc import Sequence

from fastsnap.ensemble.choosing import Choice
from fastsnap.run_files import RunError, read_bounded
from fastsnap.run_folder import RunFolder
from fastsnap.run_schema import MOST_BYTES, Decision, Evaluation, SnapshotEntry, check, parse

FILE = "ensemble.json"


def decision_of(choice: Choice, entries: Sequence[SnapshotEntry], threshold: float | None = None) -> Decision:
    """A choice among the snapshots `entries`, whose order is that of its members; threshold: of a cascade."""
    members = choice.taken.members
    return Decision(
        method=choice.taken.method,
        snapshots=[entries[member].number for member in members],
        weights=[choice.taken.weights[member] for member in members],
        temperature=choice.temperature,
        images=choice.images,
        among=[(entry.number, entry.sha256) for entry in entries],
        threshold=threshold if len(members) > 1 else None,
    )


def read_decision(folder: RunFolder) -> Decision | None:
    """What the run's evaluation decided; None where it was not evaluated, or held no images out.

    Raises RunError for a file that is damaged, and for a decision among other snapshots than the run has now.
    """
    place = str(folder.path / FILE)
    content = read_bounded(folder.path / FILE, MOST_BYTES[FILE])
    if content is None:
        return None
    decision = check(parse(content, place), Evaluation, place).decision
    if decision is None:
        return None
    among = dict(decision.among)
    if len(decision.snapshots) != len(decision.weights) or not set(decision.snapshots) <= among.keys():
        raise RunError(
            f"{place} is damaged: decision: {len(decision.weights)} weights for snapshots "
            f"{', '.join(map(str, decision.snapshots))} of {', '.join(map(str, among))}; evaluate the run again"
        )
    if among != {entry.number: entry.sha256 for entry in folder.snapshots()}:
        raise RunError(
            f"{place} has decided among snapshots {', '.join(map(str, among))}, but the run has others by now: "
            f"evaluate it again (python -m fastsnap.ensemble_eval {folder.path}), or say which to take (--last, "
            "--snapshots)"
        )
    return decision
