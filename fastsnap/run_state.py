"""Where the run in a folder is, and whether it can go on: nothing that was trained is trained over unasked."""

from collections.abc import Sequence
from pathlib import Path

from fastsnap.run_files import RunError, move_aside
from fastsnap.run_folder import CHECKPOINT, CONFIG, EVALUATION, RESULTS, RunFolder

RESTART = "add --restart to move what is there aside and train again from the start"


def require_config(folder: RunFolder, restart: str = RESTART) -> None:
    """Raise RunError for a folder that holds what a run made, but not its configuration.

    restart  here and below: how the user trains again from the start
    """
    found = [name for name in RESULTS if folder.has(name)]
    if found and not folder.exists():
        raise RunError(
            f"{folder.path / CONFIG} is missing, though {', '.join(found)} of a run are there: put a copy of it "
            f"back, choose another --out, or {restart}"
        )


def is_finished(folder: RunFolder, steps: int) -> bool:
    """Whether all that a run of `steps` updates saves is saved. Raises RunError for damaged files.

    A run of version 0.1.0, which made a batch of the last few images, has some steps more.
    """
    entries = folder.snapshots()
    if not entries or entries[-1].step < steps:
        return False
    # A crash between the last snapshot and its line of metrics; without a checkpoint nothing could be mended.
    records = folder.metrics()
    return not folder.has(CHECKPOINT) or bool(records and records[-1]["step"] >= steps)


def require_nothing_trained(folder: RunFolder, restart: str = RESTART) -> None:
    """Raise RunError if there are snapshots or epochs of a run that has no checkpoint any more to go on from."""
    entries, records = folder.snapshots(), folder.metrics()
    if entries or records:
        raise RunError(
            f"{folder.path} holds {len(entries)} snapshots and {len(records)} epochs of an unfinished run, but its "
            f"{CHECKPOINT} is missing: put a copy of it back to go on, or {restart}"
        )


def require_snapshots(folder: RunFolder, ends: Sequence[int], step: int, restart: str = RESTART) -> None:
    """Raise RunError unless the manifest has a snapshot for each of the cycles' `ends` up to `step`."""
    saved = {entry.number for entry in folder.snapshots()}
    missing = [number for number, end in enumerate(ends, start=1) if end <= step and number not in saved]
    if missing:
        raise RunError(
            f"{folder.path} is at step {step}, but its manifest.json lacks snapshot "
            f"{', '.join(map(str, missing))}: put a copy of it back, or {restart}"
        )


def set_aside(folder: RunFolder) -> Path | None:
    """Move all that a run made to a folder of its own in this one, and return that; None if there is nothing."""
    # config.json last: until then it says that a run is here.
    return move_aside(folder.path, (*RESULTS, *EVALUATION, CONFIG))
