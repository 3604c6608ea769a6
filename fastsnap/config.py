"""What a training run is told: one frozen dataclass, which is also the command line, and a recipe per data set."""

import argparse
import dataclasses
import math
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastsnap import __version__
from fastsnap.data import datasets
from fastsnap.data.pipeline import LOADERS
from fastsnap.data.sources import AUGMENTATIONS
from fastsnap.device import DEVICES, PRECISION_HELP, PRECISIONS
from fastsnap.kernels import schedule
from fastsnap.limits import MOST_THREADS, THREADS_HELP, parse_bytes
from fastsnap.nets import build, resnet
from fastsnap.printing import ArgumentParser
from fastsnap.recipes import RECIPES, STANDARD_RATE
from fastsnap.run_folder import RUNS
from fastsnap.training.ranks import TIMEOUT
from fastsnap.training.step import COMPILE
from fastsnap.training.updates import UPDATES

LARGEST = 2**31 - 1  # of a number that is counted with; products of two fit into 64 bits


def _option(
    help: str, *, flag: str | None = None, choices: tuple[str, ...] | None = None, default: Any
) -> Any:
    """A field of TrainConfig with what its flag needs; `help` gives the unit."""
    return field(default=default, metadata={"help": help, "flag": flag, "choices": choices})


RECIPE = dataclasses.MISSING  # no default of its own: the recipe has one


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines a training run; `make_config` fills in the recipe.

    Raises ValueError, naming the field, for values that cannot be used.
    """

    dataset: str = _option("data set to train on", choices=datasets.DATASETS, default="digits")
    cycles: int = _option("M, learning-rate cycles = snapshots saved", default=RECIPE)
    epochs: int = _option("passes over the training images", default=RECIPE)
    net: str = _option(
        "resnet<6n+2>[x<width>], preresnet<6n+2>, wrn-<6n+4>-<width>, densenet-<3n+4>-<growth>, torchvision:<name>, "
        "timm:<name>; resnet50 alone is the CIFAR net of that depth",
        default=RECIPE,
    )
    batch_size: int = _option("images per update, of all ranks together", default=RECIPE)
    learning_rate: float = _option(
        "initial learning rate of every cycle (of the run, with --schedule step)", flag="lr", default=RECIPE
    )
    out: str = _option(f"run folder (default: {RUNS}/<dataset>-<net>-M<cycles>-s<seed>)", default=RECIPE)
    seed: int = _option("seed of the initialisation, the order, crops, flips and colours", default=0)
    data: str = _option(
        "folder that holds the data sets, or the pictures; downloads go there", default="data"
    )
    schedule: str = _option(
        "snapshot: cosine cycles; step: the standard schedule, a tenth at 50 %% and again at 75 %%",
        choices=schedule.KINDS,
        default="snapshot",
    )
    shortcut: str = _option(
        "residual shortcut: A zero-padded identity, B 1x1 convolution where the shape changes, C everywhere",
        choices=resnet.SHORTCUTS,
        default="A",
    )
    stem_stride: int = _option(
        "of the first convolution of a CIFAR network: 1, or 2 for larger images", default=RECIPE
    )
    initial: str | None = _option(
        "weights to begin with: a run (its last snapshot), a snapshot, a safetensors or a PyTorch file; a classifier "
        "of another size is made anew (default: fresh ones)",
        default=None,
    )
    dropout: float = _option("of wrn and densenet nets, from 0 up to below 1", default=0.0)
    augment: str = _option(
        "training images: crop at random of a padded image; resized-crop: of 8 to 100 %% of the area, with colour "
        "jitter and lighting; none",
        choices=AUGMENTATIONS,
        default=RECIPE,
    )
    ema: float = _option(
        "decay per update of a running average of the weights that is saved beside the snapshots, such as 0.999; 0: "
        "none is kept",
        default=0.0,
    )
    teacher: str | None = _option(
        "run folder of an ensemble that this network learns from (distillation), as its ensemble.json decided "
        "(default: none)",
        default=None,
    )
    teacher_temperature: float = _option(
        "at which the teacher's and the student's probabilities are compared, above 0", default=2.0
    )
    teacher_weight: float = _option(
        "of the teacher's part of the loss, from 0 to 1; the labels have the rest", default=0.7
    )
    tensorboard: bool = _option(
        "also write curves and pictures for TensorBoard into the run folder (pip install 'fastsnap[tensorboard]')",
        default=False,
    )
    momentum: float = _option("Nesterov momentum, from 0 up to below 1; 0 is plain SGD", default=0.9)
    weight_decay: float = _option("L2 penalty per update, on all parameters", default=1e-4)
    validation: int = _option(
        "training images to hold out, stratified by class, for --split validation", default=RECIPE
    )
    train_images: int | None = _option(
        "training images to keep, stratified by class (default: all)", default=None
    )
    image_size: int | None = _option(
        "pixels of the side of the square that pictures are brought to (default: the median shorter side, at most "
        "224; imagenet: 224)",
        default=RECIPE,
    )
    skip_damaged: bool = _option(
        "leave out pictures that cannot be decoded, instead of an error", default=False
    )
    memory: str | None = _option(
        "most that decoded pictures may take, such as 8GB; above it they are decoded while training "
        "(default: a quarter of the machine's)",
        default=None,
    )
    cache: str | None = _option(
        "folder that keeps decoded pictures (default: fastsnap in XDG_CACHE_HOME, else in ~/.cache)",
        default=None,
    )
    device: str = _option("where to train; auto: CUDA if there is one", choices=DEVICES, default="auto")
    precision: str = _option(
        f"of the forward and backward pass; {PRECISION_HELP}",
        choices=PRECISIONS,
        default="auto",
    )
    loader: str = _option(
        "data pipeline, with the same batches; auto: DALI, if installed, on CUDA and for pictures decoded while "
        "training, else PyTorch's",
        choices=LOADERS,
        default="auto",
    )
    threads: int | None = _option(
        THREADS_HELP,
        default=None,
    )
    timeout: float = _option(
        "seconds that a rank of several (torchrun) waits for the others within a step, before all of them end",
        default=TIMEOUT,
    )
    sync_batch_norm: bool = _option(
        "of several ranks on GPUs: BatchNorm sees the whole batch instead of each rank's part of it",
        default=False,
    )
    compile: str = _option("torch.compile; auto: on CUDA only", choices=COMPILE, default="auto")
    update: str = _option(
        "fused: the project's kernel; apex: NVIDIA's FusedSGD (make apex), for comparison",
        choices=UPDATES,
        default="fused",
    )

    def __post_init__(self) -> None:
        datasets.check_name(self.dataset)
        _require(self, "stem_stride", "1 or 2", lambda value: value in (1, 2))
        _require(self, "dropout", "at least 0 and below 1", lambda value: 0 <= value < 1)
        build.check_options(self.net, self.shortcut, self.stem_stride, self.dropout)
        for name in ("cycles", "epochs", "batch_size", "train_images"):
            _require(self, name, f"from 1 to {LARGEST}", lambda value: 1 <= value <= LARGEST)
        _require(self, "threads", f"from 1 to {MOST_THREADS}", lambda value: 1 <= value <= MOST_THREADS)
        # As the update has them, in fp32.
        _require(
            self, "learning_rate", "finite and above 0 in fp32", lambda value: 0 < _fp32(value) < math.inf
        )
        _require(
            self, "momentum", "at least 0 and below 1 in fp32", lambda value: value >= 0 and _fp32(value) < 1
        )
        _require(
            self,
            "weight_decay",
            "finite in fp32 and at least 0",
            lambda value: value >= 0 and _fp32(value) < math.inf,
        )
        _require(self, "ema", "at least 0 and below 1", lambda value: 0 <= value < 1)
        _require(self, "teacher_temperature", "from 0.01 to 1,000", lambda value: 0.01 <= value <= 1000)
        _require(self, "teacher_weight", "from 0 to 1", lambda value: 0 <= value <= 1)
        _require(self, "validation", f"from 0 to {LARGEST}", lambda value: 0 <= value <= LARGEST)
        _require(self, "timeout", "finite and above 0", lambda value: 0 < value < math.inf)
        _require(self, "image_size", "from 8 to 4096", lambda value: 8 <= value <= 4096)
        if self.memory is not None:
            _as_argument("memory", parse_bytes, self.memory)
        _require(self, "seed", "from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)
        for name, metadata in _metadata().items():
            if metadata["choices"] and name != "dataset" and getattr(self, name) not in metadata["choices"]:
                raise ValueError(
                    f"{name} must be one of {', '.join(metadata['choices'])}, got {getattr(self, name)!r}"
                )


def _as_argument(name: str, parse: Callable[[str], Any], text: str) -> None:
    """Raise ValueError that begins with the argument's name unless `parse` takes the text."""
    try:
        parse(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _fp32(value: float) -> float:
    """The nearest number of fp32, which may be infinity."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.inf


def make_config(dataset: str = "digits", **given: Any) -> TrainConfig:
    """A configuration from the values given; what is None or left out comes from the data set's recipe.

    Raises ValueError for values that cannot be used, and for one that would have no effect.
    """
    datasets.check_name(dataset)
    if dataset == "digits" and given.get("data") is not None:
        others = ", ".join(name for name in datasets.DATASETS if name != "digits")
        raise ValueError(
            f"data (--data, make: DATA) has no effect with the data set digits, which is scikit-learn's; got "
            f"{given['data']}: leave it out, or choose another --dataset (make: DATASET) of {others}"
        )
    if dataset not in datasets.FOLDERS:
        _require_no_effect(dataset, given)
    elif given.get("data") is None:
        raise ValueError(
            f"data (--data, make: DATA) must name the folder of the pictures for the data set {dataset}, got nothing"
        )
    recipe = dataclasses.asdict(RECIPES[dataset])
    if given.get("schedule") == "step":
        recipe["learning_rate"] = STANDARD_RATE
    if given.get("net") and ":" in given["net"]:
        recipe["stem_stride"] = 1  # a library's net has its own
    values = recipe | {name: value for name, value in given.items() if value is not None}
    what = _folder_name(values["data"]) if dataset == "folder" else dataset
    default_name = "{}-{net}-M{cycles}-s{seed}".format(what, **{"seed": 0} | values).replace(":", "-")
    return TrainConfig(dataset=dataset, **{"out": str(RUNS / default_name)} | values)


def _folder_name(data: str) -> str:
    """Of a folder of pictures, for the name of a run: "folder-my-images"."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", os.path.basename(os.path.abspath(data))).strip("-.")
    return f"folder-{name[:60]}" if name else "folder"


def _require_no_effect(dataset: str, given: dict[str, Any]) -> None:
    """Raise ValueError for what only folders of pictures have."""
    for name in ("image_size", "skip_damaged", "memory", "cache"):
        if given.get(name):
            raise ValueError(
                f"{name} (--{name.replace('_', '-')}) has no effect with the data set {dataset}, whose images are of "
                f"one size and in memory; got {given[name]}: leave it out"
            )


def _metadata() -> dict[str, Any]:
    return {item.name: item.metadata for item in dataclasses.fields(TrainConfig)}


def _require(config: TrainConfig, name: str, condition: str, holds: Any) -> None:
    value = getattr(config, name)
    if value is not None and not holds(value):
        flag = _metadata()[name]["flag"]
        raise ValueError(f"{name}{f' (--{flag})' if flag else ''} must be {condition}, got {value}")


# Where the files lie does not change the result, and threads only its last bits, which a resumed run says. The initial
# weights are compared by their hash. All
# else is another run.
FREE_FIELDS = ("data", "out", "threads", "memory", "cache", "initial", "teacher", "timeout", "tensorboard")
# What came after version 0.1.0, and what it means for a run that knows nothing of it.
ADDED_FIELDS: dict[str, Any] = {
    "augment": "crop",
    "stem_stride": 1,
    "dropout": 0.0,
    "ema": 0.0,
    "teacher_temperature": 2.0,
    "teacher_weight": 0.7,
    "image_size": None,
    "skip_damaged": False,
    "sync_batch_norm": False,
}


def differences(config: TrainConfig, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields in which `config` and a run folder's config.json differ: name -> (asked for, in the folder)."""
    asked = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE_FIELDS}
    saved = ADDED_FIELDS | saved
    return {name: (value, saved.get(name)) for name, value in asked.items() if saved.get(name) != value}


def parse_arguments(arguments: list[str] | None = None) -> tuple[TrainConfig, bool]:
    """The configuration that a command line asks for, and whether --restart was given.

    Exits as argparse does; raises ValueError for bad values.
    """
    parser = ArgumentParser(
        prog="python -m fastsnap.train",
        description="Train a snapshot ensemble: one training run, M snapshots, and a table of what they are worth.",
        epilog=_recipes_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastsnap {__version__}")
    for item in dataclasses.fields(TrainConfig):
        flag = "--" + (item.metadata["flag"] or item.name).replace("_", "-")
        choices = item.metadata["choices"]
        if item.type is bool:
            parser.add_argument(
                flag, dest=item.name, action="store_true", default=None, help=item.metadata["help"]
            )
            continue
        parser.add_argument(
            flag,
            dest=item.name,
            type=next(kind for kind in (int, float, str) if kind.__name__ in str(item.type)),
            metavar="{" + ",".join(choices) + "}" if choices else flag.strip("-").upper().replace("-", "_"),
            help=item.metadata["help"] + _default_text(item),
        )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="move what an earlier run left in the run folder to replaced-<date> in it, and train from the start",
    )
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    restart = given.pop("restart")
    return make_config(**given), restart


def _default_text(item: dataclasses.Field) -> str:
    if "default" in item.metadata["help"]:
        return ""
    return (
        " (default: the recipe's)" if item.default is dataclasses.MISSING else f" (default: {item.default})"
    )


def _recipes_text() -> str:
    rows = [
        f"  {name:14s} {recipe.net:20s} {recipe.epochs:4d} epochs, batch {recipe.batch_size}, "
        f"lr {recipe.learning_rate} ({STANDARD_RATE} with --schedule step), {recipe.cycles} cycles"
        for name, recipe in RECIPES.items()
    ]
    return "recipes, for what is left unset:\n" + "\n".join(rows)
