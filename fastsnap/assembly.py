"""A run put together from its parts: what its configuration means on this machine, whether it fits, its trainer."""

import dataclasses
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fastsnap import __version__
from fastsnap.config import TrainConfig
from fastsnap.data.datasets import load_dataset
from fastsnap.data.fingerprint import fingerprints
from fastsnap.data.pictures import Wishes
from fastsnap.data.pipeline import choose_loader, make_pipeline
from fastsnap.data.plan import Pipeline, largest_batch, training_steps
from fastsnap.data.sources import Dataset, FileSet
from fastsnap.device import choose_device, choose_precision, free_device_memory
from fastsnap.ensemble.forwards import BATCH_SIZE
from fastsnap.ensemble.inputs import evaluation_precision
from fastsnap.ensemble.loading import load_ensemble
from fastsnap.ensemble.module import Ensemble
from fastsnap.ensemble.teaching import EnsembleTeacher, digest_of, keeps, require_fitting
from fastsnap.ensemble.validation import CycleValidation
from fastsnap.kernels.schedule import Schedule
from fastsnap.limits import Room, choose_threads, parse_bytes, require_memory, usual_budget
from fastsnap.nets.build import build_network, is_random
from fastsnap.nets.initial import begin_with, classifier_names
from fastsnap.nets.resnet import KERNEL_OPERATIONS, PLAIN_OPERATIONS
from fastsnap.nets.weights import InitialWeights
from fastsnap.run_folder import RunError, RunFolder
from fastsnap.training.distillation import Distillation
from fastsnap.training.exchange import Exchange
from fastsnap.training.memory import (
    evaluation_needs,
    footprint,
    require_disk,
    require_training_memory,
)
from fastsnap.training.progress import LoadingDisplay
from fastsnap.training.ranks import Ranks
from fastsnap.training.step import TrainStep, choose_compile
from fastsnap.training.trainer import Trainer
from fastsnap.training.updates import build_optimizer
from fastsnap.training.weight_average import WeightAverage


def settle(config: TrainConfig, *, sharing: int = 1) -> TrainConfig:
    """`config` with what is left to this machine replaced by what it means here; for the loader see `settle_loader`.

    sharing  ranks of the run on this host
    """
    device = choose_device(config.device)
    return dataclasses.replace(
        config,
        device=device.type,
        data=os.path.abspath(config.data),  # the run is evaluated from other folders too
        cache=config.cache and os.path.abspath(config.cache),
        initial=config.initial and os.path.abspath(config.initial),
        teacher=config.teacher and os.path.abspath(config.teacher),
        precision=choose_precision(config.precision, device).name,
        compile=choose_compile(config.compile, device),
        threads=choose_threads(config.threads, sharing=sharing).count,
    )


def settle_loader(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """`config` with the loader that suits the data set, where that is left to this machine."""
    files = isinstance(dataset.train, FileSet)
    loader = choose_loader(config.loader, torch.device(config.device), files=files)
    return dataclasses.replace(config, loader=loader)


def reasons_of(config: TrainConfig, *, sharing: int = 1) -> dict[str, str]:
    """Why `settle` makes of "threads" and "precision" what it does, for the summary.

    To be asked before the number of threads is set, from which it then could not be told any more.
    """
    precision = choose_precision(config.precision, choose_device(config.device))
    threads = choose_threads(config.threads, sharing=sharing)
    return {"threads": threads.reason, "precision": precision.reason}


def as_begun(config: TrainConfig, saved: dict[str, Any]) -> TrainConfig:
    """`config` with the precision and the loader of the run that is there, where they are left to the machine: others,
    on another processor, would be another run.
    """
    begun = {
        name: saved[name]
        for name in ("precision", "loader")
        if getattr(config, name) == "auto" and saved.get(name)
    }
    return dataclasses.replace(config, **begun)


def load_data(config: TrainConfig, saved: dict[str, Any], console: Console) -> Dataset:
    """The data set of a settled configuration; what is found in a folder of pictures is said on `console`.

    saved  config.json of the run that is there, if any: it goes on with the kind of storage that it began with
    Raises ValueError for what cannot be trained on.
    """
    with LoadingDisplay(console) as display:
        wishes = Wishes(
            image_size=config.image_size,
            storage=saved.get("storage"),
            memory=usual_budget() if config.memory is None else parse_bytes(config.memory),
            cache=config.cache,
            skip_damaged=config.skip_damaged,
            threads=config.threads or 1,
            say=display.message,
            on_progress=display.show,
        )
        return load_dataset(
            config.dataset,
            config.data,
            validation=config.validation,
            train_images=config.train_images,
            seed=config.seed,
            augment=config.augment,
            wishes=wishes,
        )


def require_room(
    config: TrainConfig,
    dataset: Dataset,
    folder: RunFolder,
    ranks: Ranks,
    teacher: Ensemble | None = None,
    *,
    restart: bool = False,
) -> None:
    """Raise ValueError, with the figures, for a run that memory or disk cannot hold: now rather than in some hours.

    restart  what the folder holds is moved aside: it gives no room
    """
    count = len(dataset.train.labels)
    height, width, channels = dataset.train.shape
    if config.batch_size > count:
        raise ValueError(
            f"batch_size must be at most the {count:,} training images, got {config.batch_size:,}: use --batch-size "
            f"{count}"
        )
    network = build_network(config.net, **network_options(config, dataset), device="meta")
    size = footprint(network, (channels, height, width))
    room = free_device_memory(torch.device(config.device))
    if room and config.device == "cpu" and ranks.local_count > 1:
        room = Room(room.bytes // ranks.local_count, f"{room.reason} for each of {ranks.local_count} ranks")
    copied = dataset.train.nbytes if config.device == "cuda" else 0
    largest = -(-largest_batch(count, config.batch_size) // ranks.count)
    others = {"the running average of the weights": size.parameters} if config.ema else {}
    if teacher is not None and keeps(dataset):
        others["what the teacher says of all images"] = 4 * count * len(dataset.classes)
    require_training_memory(
        size, largest, room, half=config.precision != "fp32", copied=copied, others=others
    )
    evaluation = evaluation_needs(
        size, BATCH_SIZE, len(dataset.test.labels), len(dataset.classes), config.cycles
    )
    require_memory("evaluating the snapshots", evaluation, room, "use fewer --cycles")
    if ranks.is_first:
        saved = 0 if restart else folder.bytes_of_tensors()
        require_disk(size, folder.path, config.cycles, saved, averaged=bool(config.ema))


def planned_steps(config: TrainConfig, dataset: Dataset) -> int:
    """Updates of the whole run."""
    return config.epochs * training_steps(len(dataset.train.labels), config.batch_size)


def network_options(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """What `build_network` is told besides the name, the seed and the operations."""
    height, width, channels = dataset.train.shape
    return {
        "classes": len(dataset.classes),
        "in_channels": channels,
        "image_size": (height, width),
        "shortcut": config.shortcut,
        "stem_stride": config.stem_stride,
        "dropout": config.dropout,
    }


def begin_with_initial(
    config: TrainConfig, dataset: Dataset, trainer: Trainer, initial: InitialWeights
) -> str:
    """Give the trainer's network the weights to begin with; returns what was done, for the summary."""
    options = network_options(config, dataset)

    def build(classes: int) -> nn.Module:
        return build_network(config.net, **options | {"classes": classes}, device="meta")

    return begin_with(trainer.network, initial, classifier_names(build, len(dataset.classes)))


def load_teacher(config: TrainConfig, dataset: Dataset, saved: dict[str, Any]) -> Ensemble | None:
    """The ensemble that the run learns from, where the networks of the run compute; None without one.

    saved  config.json of the run that is there, if any
    Raises ValueError for a teacher of other classes or images, and for another one than the run began with.
    """
    if saved and (config.teacher is None) != (saved.get("teacher") is None):
        raise RunError(
            f"{config.out} holds a run of another configuration (teacher: {config.teacher} asked for, "
            f"{saved.get('teacher')} there). Choose another --out (make: OUT=...), or give the same --teacher"
        )
    if config.teacher is None:
        return None
    device = torch.device(config.device)
    precision = evaluation_precision(config.precision, device).name
    ensemble = load_ensemble(config.teacher, device=device, precision=precision, resident="all")
    require_fitting(ensemble, dataset, config.teacher)
    if saved and saved.get("teacher_sha256") != digest_of(ensemble):
        raise RunError(
            f"{config.out} holds a run of another configuration (teacher: {config.teacher} has other snapshots, "
            "weights or another temperature than the run began with). Choose another --out (make: OUT=...)"
        )
    return ensemble


def build_trainer(
    config: TrainConfig,
    dataset: Dataset,
    folder: RunFolder,
    ranks: Ranks | None = None,
    teacher: Ensemble | None = None,
) -> Trainer:
    """A trainer at step 0. `config` has no "auto" left: see `settle`.

    ranks    that train together; default: this process alone
    teacher  see load_teacher
    Raises ValueError for sync_batch_norm where it cannot be had.
    """
    ranks = ranks or Ranks()
    device = torch.device(config.device)
    pipeline = make_pipeline(
        dataset.train,
        batch_size=config.batch_size,
        mean=dataset.mean,
        std=dataset.std,
        device=device,
        seed=config.seed,
        augmentation=dataset.augmentation,
        loader=config.loader,
        threads=config.threads,
        rank=ranks.rank,
        ranks=ranks.count,
    )
    schedule = Schedule(
        config.schedule, config.epochs * pipeline.steps_per_epoch, config.cycles, config.learning_rate
    )
    # The compiler fuses what is plain PyTorch, and cannot look into a kernel.
    operations = PLAIN_OPERATIONS if config.compile == "on" else KERNEL_OPERATIONS
    options = network_options(config, dataset)
    network = build_network(config.net, **options, seed=config.seed, operations=operations)
    if config.sync_batch_norm:
        _require_sync_batch_norm(device, pipeline, ranks)
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network = network.to(device).to(memory_format=torch.channels_last).train()
    optimizer = build_optimizer(
        config.update, network, schedule, momentum=config.momentum, weight_decay=config.weight_decay
    )
    distillation = Distillation(config.teacher_temperature, config.teacher_weight) if teacher else None
    train_step = TrainStep(
        network,
        optimizer,
        device,
        precision=config.precision,
        compiled=config.compile == "on",
        graphed=device.type == "cuda" and config.update == "fused" and ranks.count == 1 and not teacher,
        exchange=Exchange(network, optimizer.flat, ranks) if ranks.count > 1 else None,
        average=WeightAverage(optimizer.flat.data, config.ema) if config.ema else None,
        distillation=distillation,
    )
    random_seed = config.seed if is_random(config.net, config.dropout) else None
    images = len(dataset.train.labels)
    return Trainer(
        *(network, optimizer, train_step, pipeline, schedule, images, folder, random_seed, ranks),
        validate=_validation(config, dataset, folder, ranks) if dataset.validation is not None else None,
        teacher=_teacher(dataset, teacher, device) if teacher else None,
    )


def _validation(config: TrainConfig, dataset: Dataset, folder: RunFolder, ranks: Ranks) -> CycleValidation:
    device = torch.device(config.device)
    precision = evaluation_precision(config.precision, device).name
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "precision": precision, "ranks": ranks}
    return CycleValidation(dataclasses.asdict(config), dataset, folder, device, **options)


def _teacher(dataset: Dataset, ensemble: Ensemble, device: torch.device) -> EnsembleTeacher:
    if not keeps(dataset):
        return EnsembleTeacher(ensemble)
    images = make_pipeline(
        dataset.train, batch_size=BATCH_SIZE, mean=dataset.mean, std=dataset.std, device=device
    )
    return EnsembleTeacher(ensemble, images)


def _require_sync_batch_norm(device: torch.device, pipeline: Pipeline, ranks: Ranks) -> None:
    """Raise ValueError where BatchNorm cannot see the whole batch, or where a rank would miss its collectives."""
    if device.type != "cuda":
        raise ValueError(
            "sync_batch_norm (--sync-batch-norm) needs GPUs, got device cpu: leave it out; each rank then normalises "
            "its own images, and the running statistics are averaged"
        )
    smallest = min(pipeline.plan.share(step).whole for step in range(pipeline.steps_per_epoch))
    if smallest < ranks.count:
        raise ValueError(
            f"sync_batch_norm (--sync-batch-norm) needs an image for each of {ranks.count} ranks in every batch, but "
            f"the smallest has {smallest}: use another --batch-size, or fewer ranks"
        )


def describe(
    config: TrainConfig,
    dataset: Dataset,
    initial: InitialWeights | None = None,
    ranks: int = 1,
    teacher: Ensemble | None = None,
) -> dict[str, Any]:
    """config.json: the configuration, the data and the weights it began with, the number of ranks, and the versions."""
    images = {"train": len(dataset.train.labels), "test": len(dataset.test.labels)}
    if dataset.validation is not None:
        images["validation"] = len(dataset.validation.labels)
    return dataclasses.asdict(config) | {
        "images": images,
        "fingerprints": fingerprints(dataset),
        "classes": len(dataset.classes),
        "class_names": list(dataset.classes),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "image_shape": list(dataset.test.shape),
        "resize": dataset.resize,
        "background": None if dataset.background is None else list(dataset.background),
        "storage": dataset.storage,
        "initial_sha256": initial.sha256 if initial else None,
        "teacher_sha256": digest_of(teacher) if teacher else None,
        "ranks": ranks,
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
