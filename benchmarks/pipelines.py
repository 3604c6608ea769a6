"""The data pipeline alone: batches, shuffled, cropped, flipped and normalised, per second; nothing trains.

Each pipeline runs in a process of its own, in turns with the others, and so does a training step without loading (its
batch is there already): what share of a step the loading costs follows round by round.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import repeat
from typing import Any

import torch

import pictures
from fastsnap.assembly import build_trainer
from fastsnap.data.pipeline import choose_loader
from fastsnap.run_folder import RunFolder
from harness.measure import PROJECT, Result, Settings, alternate, compare, not_installed
from harness.paced import Pace, PacedProcess
from harness.project import batches_loop, configure, threads_of
from harness.task import Task, describe_data, load_images
from opponents.loaders import make_loader

NAME = "pipelines"
UNIT = "images/s"
NET = "resnet20"
OTHER = {"torch": "fastsnap's DALI pipeline", "dali": "fastsnap's PyTorch pipeline"}  # than the default
DATALOADERS = {
    0: "torchvision in a DataLoader without workers",
    2: "torchvision in a DataLoader with 2 workers",
}
CASE = f"batch {Task.batch_size}"
SHARE_CASE = f"a batch, in percent of a {NET} step without loading"
STEP = "training step"
BATCHES, QUICK_BATCHES = 100, 20  # of a turn
STEPS, QUICK_STEPS = 20, 3  # training steps of a turn
WARM_UP = 6
ROUNDS, QUICK_ROUNDS = 7, 3


def run(settings: Settings) -> Iterator[Result]:
    """Images/s of every pipeline, and the share of a training step that the project's default takes."""
    task = Task(NET, settings.device, settings.data)
    default = choose_loader("auto", torch.device(task.device))
    other = "dali" if default == "torch" else "torch"
    missing = not_installed("nvidia.dali") if other == "dali" else None
    loops: dict[str, tuple[Any, ...]] = {PROJECT: (batches_loop, task, default)}
    if not missing:
        loops[OTHER[default]] = (batches_loop, task, other)
    for workers, name in DATALOADERS.items():
        loops[name] = (dataloader_loop, replace(task, workers=workers))
    loops[STEP] = (step_loop, task)
    with ExitStack() as stack:
        processes = {name: stack.enter_context(PacedProcess(name, *loop)) for name, loop in loops.items()}
        for process in processes.values():
            process.run(WARM_UP)
        seconds = _seconds_per_step(processes, settings.quick)
    yield from _results(task, default, seconds)
    if missing:
        yield Result(NAME, CASE, OTHER[default], UNIT, "higher", missing=missing)
    yield from pictures.run(settings)


def _seconds_per_step(processes: dict[str, PacedProcess], quick: bool) -> dict[str, list[float]]:
    batches, steps = (QUICK_BATCHES, QUICK_STEPS) if quick else (BATCHES, STEPS)
    turns = {
        name: partial(process.seconds_per_step, steps if name == STEP else batches)
        for name, process in processes.items()
    }
    return alternate(turns, QUICK_ROUNDS if quick else ROUNDS)


def _results(task: Task, default: str, seconds: dict[str, list[float]]) -> Iterator[Result]:
    step = seconds.pop(STEP)
    details = {PROJECT: {"pipeline": default, "data": describe_data(task.data)}}
    rates = {name: [task.batch_size / value for value in own] for name, own in seconds.items()}
    yield from compare(NAME, CASE, UNIT, rates, "higher", details)
    shares = {
        name: [100 * batch / whole for batch, whole in zip(own, step, strict=True)]
        for name, own in seconds.items()
    }
    yield from compare(NAME, SHARE_CASE, "%", shares, "lower", details)


def dataloader_loop(pace: Pace, task: Task) -> None:
    """The DataLoader alone."""
    loader = make_loader(task)
    for _ in range(task.epochs):
        for _ in pace.batches(loader):
            pass


def step_loop(pace: Pace, task: Task) -> None:
    """Training steps of the project on one batch, which is there already."""
    config = configure(task)
    with threads_of(config):
        trainer = build_trainer(config, load_images(task.data), RunFolder("unused"))
        images, labels = next(iter(trainer.pipeline.epoch(0)))
        for _ in pace.batches(repeat(None)):
            trainer.train_step(images, labels)
