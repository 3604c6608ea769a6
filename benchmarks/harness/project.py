"""The project itself as a contender: its own trainer, at its defaults."""

import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from fastsnap.assembly import build_trainer, describe, settle
from fastsnap.config import TrainConfig, differences, make_config
from fastsnap.data.datasets import Dataset
from fastsnap.data.pipeline import make_pipeline
from fastsnap.data.plan import Pipeline
from fastsnap.nets.build import build_network
from fastsnap.run_folder import RunFolder
from fastsnap.training.allocator import keep_freed_memory
from fastsnap.training.progress import ProgressDisplay
from fastsnap.training.ranks import Ranks
from fastsnap.training.trainer import Trainer
from harness.paced import Pace
from harness.task import CLASSES, DATASET, Task, load_images

WARM_UP_STEPS = 5  # compilation, first allocations, the CUDA graph


class PacedPipeline:
    """See fastsnap.data.pipeline.Pipeline."""

    def __init__(self, pipeline: Pipeline, pace: Pace) -> None:
        self._pipeline, self._pace, self.name = pipeline, pace, pipeline.name
        self.batch_size, self.steps_per_epoch = pipeline.batch_size, pipeline.steps_per_epoch
        self.plan = pipeline.plan

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The pipeline's batches, in turns."""
        return self._pace.batches(self._pipeline.epoch(epoch, first_step))


def configure(task: Task, schedule: str = "snapshot") -> TrainConfig:
    """The task as the project's command line would say it; everything else at its default."""
    return settle(
        make_config(
            DATASET,
            net=task.net,
            epochs=task.epochs,
            cycles=task.cycles,
            batch_size=task.batch_size,
            learning_rate=task.learning_rate,
            momentum=task.momentum,
            weight_decay=task.weight_decay,
            device=task.device,
            precision=task.precision,
            schedule=schedule,
        )
    )


@contextmanager
def threads_of(config: TrainConfig) -> Iterator[None]:
    """Compute with the threads of a settled `config`, as the command line does; afterwards with PyTorch's own number,
    which opponents in this process have.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_loop(
    pace: Pace,
    task: Task,
    schedule: str = "snapshot",
    *,
    threads: int | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Training without end; what it saves goes to a temporary folder.

    threads  default: all; ranks  that train together: see fastsnap.training.ranks
    """
    keep_freed_memory()  # as fastsnap.train's main does
    config = configure(task, schedule)
    config = replace(config, threads=threads or config.threads)
    with tempfile.TemporaryDirectory() as folder, threads_of(config):
        trainer = build_trainer(config, load_images(task.data), RunFolder(folder), ranks)
        trainer.pipeline = PacedPipeline(trainer.pipeline, pace)
        run_silently(trainer)


def train_run(config: TrainConfig, dataset: Dataset, folder: RunFolder) -> None:
    """Train into `folder` as `python -m fastsnap.train` does, or go on; a finished run is left as it is.

    Unlike there, the data set need not be the one that the configuration would load. Raises ValueError for a folder
    that holds a run of another configuration, TrainingStopped after SIGTERM or Ctrl-C.
    """
    if folder.exists() and (different := differences(config, folder.config())):
        raise ValueError(
            f"{folder.path} holds a run of another {', '.join(different)}: choose another --out, or remove it"
        )
    with folder.locked(), threads_of(config):
        trainer = build_trainer(config, dataset, folder)
        if not folder.exists():
            folder.write_json("config.json", describe(config, dataset))
        trainer.resume()
        if trainer.step < trainer.schedule.steps:
            run_silently(trainer)


def seconds_of_a_run(task: Task, dataset: Dataset, schedule: str = "snapshot") -> float:
    """How long a whole run of `task.epochs` takes, saving included, making and warming up the trainer not."""
    config = configure(task, schedule)
    with tempfile.TemporaryDirectory() as folder, threads_of(config):
        trainer = build_trainer(config, dataset, RunFolder(folder))
        warm_up(trainer)
        start = time.perf_counter()
        run_silently(trainer)  # ends with a snapshot on disk, so a GPU has finished too
        return time.perf_counter() - start


def warm_up(trainer: Trainer) -> None:
    """A few steps before the first, in which what happens once happens; the run then starts at its beginning."""
    images, labels = next(iter(trainer.pipeline.epoch(0)))
    for _ in range(WARM_UP_STEPS):
        trainer.train_step(images, labels)
    trainer.optimizer.seek(0)
    trainer.train_step.totals.zero_()


def run_silently(trainer: Trainer) -> None:
    """Trainer.run, with its progress shown to nobody."""
    with open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere)
        with ProgressDisplay(console, trainer.step, trainer.schedule.steps) as display:
            trainer.run(display)


def batches_loop(pace: Pace, task: Task, loader: str) -> None:
    """A pipeline alone. loader: "dali" or "torch"."""
    dataset = load_images(task.data)
    with threads_of(configure(task)):
        pipeline = make_pipeline(
            dataset.train,
            batch_size=task.batch_size,
            mean=dataset.mean,
            std=dataset.std,
            device=torch.device(task.device),
            augmentation=dataset.augmentation,
            loader=loader,
        )
        for epoch in range(task.epochs):
            for _ in pace.batches(pipeline.epoch(epoch)):
                pass


def random_networks(net: str, members: int) -> list[nn.Module]:
    """Untrained networks, in evaluation mode: what they cost does not depend on what they know."""
    return [build_network(net, classes=CLASSES, seed=seed).eval() for seed in range(members)]


def random_run(path: Path, task: Task, dataset: Dataset, networks: Sequence[nn.Module]) -> RunFolder:
    """A run folder whose snapshots are `networks`."""
    folder = RunFolder(path)
    path.mkdir(parents=True)
    folder.write_json("config.json", describe(configure(replace(task, cycles=len(networks))), dataset))
    for number, network in enumerate(networks, start=1):
        folder.save_snapshot(
            network.state_dict(), step=number, cycle=number, epoch=number, learning_rate=0.1, train_loss=1.0
        )
    return folder
