"""Rows of networks whose weights are averages of the snapshots', or of all that training passed through."""

from collections.abc import Sequence

from fastsnap.data.pipeline import make_pipeline
from fastsnap.data.plan import Pipeline
from fastsnap.ensemble.forwards import BATCH_SIZE, Forwards
from fastsnap.ensemble.weight_space import WeightSpace, mean_of
from fastsnap.ensemble.worth import AVERAGE, RUNNING, SOUP, Comparison, Row
from fastsnap.run_folder import RunFolder
from fastsnap.run_schema import SnapshotEntry


def training_batches(part: Forwards, seed: int) -> Pipeline:
    """Of the training images as training saw them, for running statistics."""
    dataset = part.dataset
    return make_pipeline(
        dataset.train,
        batch_size=min(BATCH_SIZE, len(dataset.train.labels)),
        mean=dataset.mean,
        std=dataset.std,
        device=part.device,
        seed=seed,
        augmentation=dataset.augmentation,
    )


def average_rows(
    space: WeightSpace,
    comparison: Comparison,
    folder: RunFolder,
    entries: Sequence[SnapshotEntry],
    soup: Sequence[SnapshotEntry],
) -> list[Row]:
    """Rows of networks whose weights are averages: of the last m for each m, of those chosen, of training's own."""
    rows = []
    count = len(entries)
    for m in range(2, count + 1):
        rows.append(_average_row(AVERAGE, space, comparison, entries, entries[-m:]))
    if len(soup) > 1:
        rows.append(_average_row(SOUP, space, comparison, entries, soup))
    running = folder.average()
    if running is not None:
        logits_NC = space.logits([(running, 1.0)])
        weights = [float(entry.number == running.number) for entry in entries]
        rows.append(comparison.network(RUNNING, logits_NC, weights, space.forwards.seconds))
    return rows


def _average_row(
    name: str,
    space: WeightSpace,
    comparison: Comparison,
    entries: Sequence[SnapshotEntry],
    chosen: Sequence[SnapshotEntry],
) -> Row:
    logits_NC = space.logits(mean_of(chosen))
    weights = [1 / len(chosen) if entry in chosen else 0.0 for entry in entries]
    return comparison.network(name, logits_NC, weights, space.forwards.seconds)
