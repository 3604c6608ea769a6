"""Deciding on held-out images what to use of M snapshots: what it adds to the forward passes.

The project's time is that of ensemble.evaluate.evaluate_run on a run that held images out: all forward passes, the
choice of snapshots, weights and temperature, the cascade's thresholds, and every figure of every way on the test
images. The other contender makes the same forward passes and stops there. Networks are untrained, which costs the same.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fastsnap.data.datasets import Dataset
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.ensemble.forwards import BATCH_SIZE, Forwards, Passes
from fastsnap.run_folder import RunFolder
from fastsnap.training.ranks import Ranks
from harness.measure import PROJECT, Result, Settings, alternate, compare
from harness.project import configure, random_networks, random_run, threads_of
from harness.task import Task, describe_data, load_images, shortened

NAME = "deciding"
NET = "resnet20"
MEMBERS = 5
TEST, VALIDATION = 10_000, 5_000
QUICK_IMAGES = 200  # of each
ROUNDS, QUICK_ROUNDS = 5, 1
FORWARDS = "the forward passes alone"
FLOAT = 4  # bytes of a logit


def run(settings: Settings) -> Iterator[Result]:
    """Seconds of both."""
    task = Task(NET, settings.device, settings.data, cycles=MEMBERS)
    counts = (QUICK_IMAGES, QUICK_IMAGES) if settings.quick else (TEST, VALIDATION)
    dataset = _with_held_out(load_images(settings.data), *counts)
    device = torch.device(settings.device)
    with tempfile.TemporaryDirectory() as temporary, threads_of(configure(task)):
        folder = random_run(Path(temporary) / "run", task, dataset, random_networks(NET, MEMBERS))

        def whole() -> float:
            start = time.perf_counter()
            report = evaluate_run(folder, dataset=dataset, device=device)
            if report.choice is None:
                raise ValueError(f"nothing was decided: {report.no_choice}")
            return time.perf_counter() - start

        precision = evaluate_run(folder, dataset=dataset, device=device).precision  # warms up
        turns = {PROJECT: whole, FORWARDS: lambda: _forwards(folder, dataset, precision, device)}
        turns[FORWARDS]()
        seconds = alternate(turns, QUICK_ROUNDS if settings.quick else ROUNDS)
    shares = [whole / alone for whole, alone in zip(seconds[PROJECT], seconds[FORWARDS], strict=True)]
    classes = len(dataset.classes)
    details = {
        PROJECT: {
            "precision": precision,
            "test images": counts[0],
            "held-out images": counts[1],
            "times the forwards' time, median": float(np.median(shares)),
            "least": min(shares),
            "most": max(shares),
            # Those of the held-out images are gone when the test images' are there.
            "MB of logits at most": FLOAT * MEMBERS * max(counts) * classes / 1e6,
            "data": describe_data(task.data),
        }
    }
    yield from compare(NAME, f"{MEMBERS} x {NET}, {classes} classes", "s", seconds, "lower", details)


def _with_held_out(dataset: Dataset, test: int, held_out: int) -> Dataset:
    """The first of the test images, and of the training images as held-out ones."""
    train = dataset.train
    return replace(
        shortened(dataset, test=test), validation=train.part(slice(0, min(held_out, len(train.labels))))
    )


def _forwards(folder: RunFolder, dataset: Dataset, precision: str, device: torch.device) -> float:
    start = time.perf_counter()
    for split in ("validation", "test"):
        entries = folder.snapshots()
        passes = Passes.of(folder.config(), entries, split=split, batch_size=BATCH_SIZE, precision=precision)
        part = Forwards(passes, folder, dataset, None, device, Ranks(), check_memory=True)
        part.logits(entries).sum().item()  # a GPU has finished then
    return time.perf_counter() - start
