"""What the snapshot schedule costs against the standard one: images/s, time per epoch, saving, first step, memory."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastsnap.assembly import build_trainer
from fastsnap.data.datasets import Dataset
from fastsnap.run_folder import RunFolder
from harness.measure import PROJECT, Result, Settings, alternate, compare, spread
from harness.paced import PacedProcess
from harness.project import configure, seconds_of_a_run, train_loop
from harness.task import Task, describe_data, load_images, shortened
from opponents.loops import careful_loop, plain_loop

NAME = "schedules"
NET = "resnet20"
STANDARD = "standard schedule"
EPOCHS = 2
STEPS_PER_EPOCH, QUICK_STEPS_PER_EPOCH = 25, 6  # on a CPU; on a GPU all images are one epoch
ROUNDS, QUICK_ROUNDS = 3, 2
SAVES, QUICK_SAVES = 30, 5
STARTS, QUICK_STARTS = 3, 1
STEPS_FOR_MEMORY = 5
EPOCH_IMAGES = 50_000  # of CIFAR
SHARE_CASE = f"{NET}, saving a snapshot, in percent of an epoch of {EPOCH_IMAGES:,} images"


def run(settings: Settings) -> Iterator[Result]:
    """Everything but the accuracy."""
    task = Task(NET, settings.device, settings.data, epochs=EPOCHS, cycles=EPOCHS)
    dataset = load_images(settings.data)
    if settings.device == "cpu":
        steps = QUICK_STEPS_PER_EPOCH if settings.quick else STEPS_PER_EPOCH
        dataset = shortened(dataset, train=steps * task.batch_size)
    training = list(_training(task, dataset, settings.quick))
    yield from training
    yield from _saving(task, dataset, spread(training[0].values).median, settings)
    yield from _start(replace(task, epochs=Task.epochs), settings)


def _training(task: Task, dataset: Dataset, quick: bool) -> Iterator[Result]:
    """Images/s and seconds per epoch of whole runs that save a snapshot after every epoch, the same with both."""
    images = len(dataset.train.labels)
    runs = {
        PROJECT: partial(seconds_of_a_run, task, dataset),
        STANDARD: partial(seconds_of_a_run, task, dataset, "step"),
    }
    alternate(runs, rounds=1)  # warm-up
    seconds = alternate(runs, QUICK_ROUNDS if quick else ROUNDS)
    details = {PROJECT: {"images": images, "data": describe_data(task.data)}}
    rates = {name: [task.epochs * images / value for value in own] for name, own in seconds.items()}
    yield from compare(NAME, f"{task.net}, training and saving", "images/s", rates, "higher", details)
    per_epoch = {name: [value / task.epochs for value in own] for name, own in seconds.items()}
    yield from compare(NAME, f"{task.net}, epoch of {images:,} images", "s", per_epoch, "lower", details)


def _saving(task: Task, dataset: Dataset, images_per_second: float, settings: Settings) -> Iterator[Result]:
    """A snapshot into a run folder, against torch.save, which neither waits for the disk nor takes a hash."""
    settings.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.out) as temporary:  # the disk that counts
        folder = RunFolder(temporary)
        plain = Path(temporary) / "plain.pt"
        network = build_trainer(configure(task), dataset, folder).network

        def save() -> None:
            folder.save_snapshot(
                network.state_dict(), step=1, cycle=1, epoch=1, learning_rate=0.1, train_loss=1.0
            )

        ways: dict[str, Callable[[], None]] = {
            PROJECT: save,
            "torch.save": lambda: torch.save(network.state_dict(), plain),
        }
        turns = {name: partial(_milliseconds, way) for name, way in ways.items()}
        values = alternate(turns, QUICK_SAVES if settings.quick else SAVES)
    yield from compare(NAME, f"{task.net}, saving a snapshot", "ms", values, "lower")
    epoch_ms = 1000 * EPOCH_IMAGES / images_per_second
    shares = {PROJECT: [100 * value / epoch_ms for value in values[PROJECT]]}
    yield from compare(NAME, SHARE_CASE, "%", shares, "lower")


def _milliseconds(way: Callable[[], None]) -> float:
    start = time.perf_counter()
    way()
    return 1000 * (time.perf_counter() - start)


def _start(task: Task, settings: Settings) -> Iterator[Result]:
    """Time to the first step of fresh processes, Python's start and reading the data included, and their memory."""
    loops: dict[str, tuple[Any, ...]] = {
        PROJECT: (train_loop, task),
        STANDARD: (train_loop, task, "step"),
        "plain PyTorch loop": (plain_loop, task),
        "careful PyTorch loop": (careful_loop, task),
    }
    memory: dict[str, list[float]] = {name: [] for name in loops}

    def first_step(name: str) -> float:
        start = time.perf_counter()
        with PacedProcess(name, *loops[name]) as process:
            process.run(1)
            seconds = time.perf_counter() - start
            memory[name].append(process.run(STEPS_FOR_MEMORY).peak_memory_mb)
        return seconds

    seconds = alternate(
        {name: partial(first_step, name) for name in loops}, QUICK_STARTS if settings.quick else STARTS
    )
    details = {PROJECT: {"data": describe_data(task.data)}}
    yield from compare(NAME, f"{task.net}, time to first step", "s", seconds, "lower", details)
    yield from compare(NAME, f"{task.net}, peak memory", "MB", memory, "lower", details)
