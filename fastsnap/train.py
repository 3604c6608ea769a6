"""Train a snapshot ensemble: `python -m fastsnap.train --help`.

One run trains, saves a snapshot at the end of each learning-rate cycle, and evaluates the ensemble. The same command
again goes on with an unfinished run, to the same bits, and evaluates a finished one.
"""

import dataclasses
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from rich.console import Console

from fastsnap import __version__
from fastsnap.config import TrainConfig, differences, parse_arguments
from fastsnap.data.datasets import Dataset, load_dataset
from fastsnap.data.pipeline import choose_loader, make_pipeline
from fastsnap.device import choose_device, choose_precision, free_device_memory
from fastsnap.ensemble.evaluate import BATCH_SIZE
from fastsnap.ensemble.report import report_run
from fastsnap.kernels.schedule import Schedule
from fastsnap.limits import choose_threads
from fastsnap.nets.resnet import KERNEL_OPERATIONS, PLAIN_OPERATIONS, build_network
from fastsnap.run_folder import RunError, RunFolder
from fastsnap.training.allocator import keep_freed_memory
from fastsnap.training.memory import (
    evaluation_needs,
    footprint,
    require_disk,
    require_memory,
    require_training_memory,
)
from fastsnap.training.progress import Output, ProgressDisplay
from fastsnap.training.step import TrainStep, choose_compile
from fastsnap.training.stopping import TrainingStopped, stop_signals_raised
from fastsnap.training.trainer import Trainer
from fastsnap.training.updates import build_optimizer


def build_trainer(config: TrainConfig, dataset: Dataset, folder: RunFolder) -> Trainer:
    """A trainer at step 0. `config` has no "auto" left: see `settle`."""
    device = torch.device(config.device)
    pipeline = make_pipeline(
        dataset.train,
        batch_size=config.batch_size,
        mean=dataset.mean,
        std=dataset.std,
        device=device,
        seed=config.seed,
        padding=dataset.padding,
        flip=dataset.flip,
        loader=config.loader,
    )
    schedule = Schedule(
        config.schedule, config.epochs * pipeline.steps_per_epoch, config.cycles, config.learning_rate
    )
    network = build_network(
        config.net,
        classes=len(dataset.classes),
        in_channels=dataset.train.images.shape[3],
        shortcut=config.shortcut,
        seed=config.seed,
        # The compiler fuses what is plain PyTorch, and cannot look into a kernel.
        operations=PLAIN_OPERATIONS if config.compile == "on" else KERNEL_OPERATIONS,
    )
    network = network.to(device).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(
        config.update, network, schedule, momentum=config.momentum, weight_decay=config.weight_decay
    )
    train_step = TrainStep(
        network,
        optimizer,
        device,
        precision=config.precision,
        compiled=config.compile == "on",
        graphed=device.type == "cuda" and config.update == "fused",
    )
    return Trainer(network, optimizer, train_step, pipeline, schedule, len(dataset.train.labels), folder)


def settle(config: TrainConfig) -> TrainConfig:
    """`config` with everything that is left to this machine replaced by what it means here."""
    device = choose_device(config.device)
    return dataclasses.replace(
        config,
        device=device.type,
        data=os.path.abspath(config.data),  # the run is evaluated from other folders too
        precision=choose_precision(config.precision, device).name,
        compile=choose_compile(config.compile, device),
        loader=choose_loader(config.loader, device),
        threads=choose_threads(config.threads).count,
    )


def train(config: TrainConfig, console: Console) -> tuple[RunFolder, Dataset]:
    """Train, or go on training, what `config` describes; returns the run folder and the data set.

    Raises ValueError for anything that cannot be done as asked, TrainingStopped after SIGTERM or Ctrl-C.
    """
    asked, config = config, settle(config)
    torch.set_num_threads(config.threads or 1)
    folder = RunFolder(config.out)
    if folder.exists():
        _require_same(config, folder)
    dataset = load_dataset(
        config.dataset,
        config.data,
        validation=config.validation,
        train_images=config.train_images,
        seed=config.seed,
    )
    require_room(config, dataset, folder)
    with folder.locked():
        if folder.exists():  # a process that held the lock until now may have made it
            _require_same(config, folder)
        trainer = build_trainer(config, dataset, folder)
        _print_summary(console, asked, config, dataset, trainer)
        if not folder.exists():
            folder.write_json("config.json", describe(config, dataset))
        resumed = trainer.resume()
        if trainer.step == trainer.schedule.steps:
            console.print(f"this run is finished: {folder.path}", highlight=False)
            return folder, dataset
        if resumed:
            epoch = trainer.step // trainer.pipeline.steps_per_epoch
            console.print(
                f"going on after step {trainer.step:,} (epoch {epoch:,} done): {folder.path}", highlight=False
            )
            _print_changes(console, folder.config())
        with ProgressDisplay(console, trainer.step, trainer.schedule.steps) as display:
            trainer.run(display)
    return folder, dataset


def require_room(config: TrainConfig, dataset: Dataset, folder: RunFolder) -> None:
    """Raise ValueError, with the figures, for a run that memory or disk cannot hold: now rather than in some hours."""
    count, height, width, channels = dataset.train.images.shape
    if config.batch_size > count:
        raise ValueError(
            f"batch_size must be at most the {count:,} training images, got {config.batch_size:,}: use --batch-size "
            f"{count}"
        )
    with torch.device("meta"):
        network = build_network(
            config.net, classes=len(dataset.classes), in_channels=channels, shortcut=config.shortcut
        )
    size, room = (
        footprint(network, (channels, height, width)),
        free_device_memory(torch.device(config.device)),
    )
    require_training_memory(size, config.batch_size, room, half=config.precision != "fp32")
    evaluation = evaluation_needs(
        size, BATCH_SIZE, len(dataset.test.labels), len(dataset.classes), config.cycles
    )
    require_memory("evaluating the snapshots", evaluation, room, "use fewer --cycles")
    require_disk(size, folder.path, config.cycles)


def _require_same(config: TrainConfig, folder: RunFolder) -> None:
    different = differences(config, folder.config())
    if different:
        fields = "; ".join(
            f"{name}: {asked} asked for, {saved} there" for name, (asked, saved) in different.items()
        )
        raise RunError(
            f"{folder.path} holds a run of another configuration ({fields}). Choose another --out (make: OUT=...), "
            "or give the same values to go on with it"
        )


def _print_changes(console: Console, began: dict[str, Any]) -> None:
    """Say what differs from where the run began, if that can change the last bits of its result."""
    then = (began.get("threads"), began.get("versions", {}).get("torch"))
    now = (torch.get_num_threads(), torch.__version__)
    if then != now:
        console.print(
            f"note: this run began with {then[0]} threads and torch {then[1]}, and goes on with {now[0]} and {now[1]}: "
            "the snapshots can differ in their last bits from those of an uninterrupted run",
            highlight=False,
            soft_wrap=True,
        )


def describe(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """config.json: the configuration, the data it was trained on, and the versions that trained it."""
    images = {"train": len(dataset.train.labels), "test": len(dataset.test.labels)}
    if dataset.validation is not None:
        images["validation"] = len(dataset.validation.labels)
    return dataclasses.asdict(config) | {
        "images": images,
        "classes": len(dataset.classes),
        "data_source": dataset.source,
        "versions": {
            "fastsnap": __version__,
            "git": _git_revision(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


def _git_revision() -> str | None:
    """The revision of this source tree; None for an installed package."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _print_summary(
    console: Console, asked: TrainConfig, config: TrainConfig, dataset: Dataset, trainer: Trainer
) -> None:
    """asked: as the user gave it, with what is left to the machine; config: settled."""
    parameters = sum(parameter.numel() for parameter in trainer.network.parameters())
    size = "x".join(str(length) for length in dataset.train.images.shape[1:])
    device = torch.device(config.device)
    precision, threads = choose_precision(asked.precision, device), choose_threads(asked.threads)
    rows = {
        "data": f"{config.dataset}: {len(dataset.train.labels):,} training images {size}, {config.validation:,} held "
        f"out, {len(dataset.test.labels):,} test images, {len(dataset.classes)} classes",
        "source": dataset.source,
        "net": f"{config.net}, {parameters:,} parameters, shortcut {config.shortcut}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "threads": f"{config.threads} ({threads.reason})",
        "precision": f"{config.precision} ({precision.reason})",
        "step": f"channels-last, torch.compile {config.compile}, batches from {trainer.pipeline.name}",
        "update": f"{config.update}, momentum {config.momentum}, weight decay {config.weight_decay}",
        "schedule": f"{config.schedule}: {trainer.schedule.steps:,} steps of {config.batch_size} images, "
        f"{config.epochs} epochs, {config.cycles} cycles, lr {config.learning_rate}",
        "run": f"{trainer.folder.path}, seed {config.seed}",
    }
    for name, text in rows.items():
        console.print(f"{name:9s} {text}", highlight=False, markup=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 2 for an error of use, 128 + signal if stopped by one.

    An output that closes counts as SIGPIPE.
    """
    output = Output(sys.stdout)
    console = Console(file=cast(TextIO, output))
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        return _refuse_many_processes()
    keep_freed_memory()
    try:
        with stop_signals_raised():
            config = parse_arguments(arguments)
            folder, dataset = train(config, console)
            report_run(
                folder,
                dataset=dataset,
                device=choose_device(config.device),
                precision=config.precision,
                console=console,
            )
    except TrainingStopped as stopped:
        text = f"stopped by {stopped}. Run the same command again to go on"
        console.print(text, highlight=False)
        if output.lost:
            _print_error(text)
        return 128 + stopped.signal_number
    except ValueError as error:
        _print_error(f"error: {error}")
        return 2
    return 128 + signal.SIGPIPE if output.lost else 0


def _refuse_many_processes() -> int:
    """One line from the first of the processes that torchrun started, and the exit status of all."""
    if os.environ.get("RANK", "0") == "0":
        _print_error(
            f"error: training on {os.environ['WORLD_SIZE']} processes (torchrun) is not supported: run python "
            "-m fastsnap.train without torchrun; one process uses all cores of the CPU, or one GPU"
        )
    return 2


def _print_error(text: str) -> None:
    """A line to standard error, if anyone can read it."""
    error = Output(sys.stderr)
    error.write(text + "\n")
    error.flush()


if __name__ == "__main__":
    sys.exit(main())
