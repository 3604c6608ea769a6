"""What a training run is told: one frozen dataclass, which is also the command line, and a recipe per data set."""

import argparse
import dataclasses
import math
import struct
from dataclasses import dataclass, field
from typing import Any

from fastsnap import __version__
from fastsnap.data import datasets
from fastsnap.data.pipeline import LOADERS
from fastsnap.data.sources import AUGMENTATIONS
from fastsnap.device import DEVICES, PRECISION_HELP, PRECISIONS
from fastsnap.kernels import schedule
from fastsnap.limits import MOST_THREADS, THREADS_HELP
from fastsnap.nets import build, resnet
from fastsnap.printing import ArgumentParser
from fastsnap.run_folder import RUNS
from fastsnap.training.step import COMPILE
from fastsnap.training.updates import UPDATES


@dataclass(frozen=True)
class Recipe:
    """What a data set is trained with where the user does not say otherwise."""

    net: str
    epochs: int
    learning_rate: float
    cycles: int = 5
    batch_size: int = 64
    augment: str = "crop"
    stem_stride: int = 1


LARGEST = 2**31 - 1  # of a number that is counted with; products of two fit into 64 bits
STANDARD_RATE = 0.1  # of --schedule step, whatever the data set (REFERENCE.md's baseline)

RECIPES = {
    # The paper's: Huang et al. 2017, ResNet-110, the better of its two rates.
    "cifar10": Recipe("resnet110", epochs=200, learning_rate=0.2),
    "cifar100": Recipe("resnet110", epochs=200, learning_rate=0.2),
    "fashion-mnist": Recipe("resnet20", epochs=50, learning_rate=0.1),
    # Small enough for a first try: about a minute on two CPU cores.
    "digits": Recipe("resnet20", epochs=60, learning_rate=0.1),
}


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
        "resnet<6n+2>, optionally x<width multiplier>: resnet20, resnet110, resnet32x4", default=RECIPE
    )
    batch_size: int = _option("images per update", default=RECIPE)
    learning_rate: float = _option(
        "initial learning rate of every cycle (of the run, with --schedule step)", flag="lr", default=RECIPE
    )
    out: str = _option(f"run folder (default: {RUNS}/<dataset>-<net>-M<cycles>-s<seed>)", default=RECIPE)
    seed: int = _option("seed of the initialisation, the order, the crops and the flips", default=0)
    data: str = _option("folder that holds the data sets; downloads go there", default="data")
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
    augment: str = _option(
        "training images: crop at random of a padded image; resized-crop: of 8 to 100 %% of the area, with colour "
        "jitter and lighting; none",
        choices=AUGMENTATIONS,
        default=RECIPE,
    )
    momentum: float = _option("Nesterov momentum, from 0 up to below 1; 0 is plain SGD", default=0.9)
    weight_decay: float = _option("L2 penalty per update, on all parameters", default=1e-4)
    validation: int = _option(
        "training images to hold out, stratified by class, for --split validation", default=0
    )
    train_images: int | None = _option(
        "training images to keep, stratified by class (default: all)", default=None
    )
    device: str = _option("where to train; auto: CUDA if there is one", choices=DEVICES, default="auto")
    precision: str = _option(
        f"of the forward and backward pass; {PRECISION_HELP}",
        choices=PRECISIONS,
        default="auto",
    )
    loader: str = _option(
        "data pipeline, with the same batches; auto: DALI on CUDA if installed, else PyTorch's",
        choices=LOADERS,
        default="auto",
    )
    threads: int | None = _option(
        THREADS_HELP,
        default=None,
    )
    compile: str = _option("torch.compile; auto: on CUDA only", choices=COMPILE, default="auto")
    update: str = _option(
        "fused: the project's kernel; apex: NVIDIA's FusedSGD (make apex), for comparison",
        choices=UPDATES,
        default="fused",
    )

    def __post_init__(self) -> None:
        datasets.check_name(self.dataset)
        build.check_name(self.net)
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
        _require(self, "validation", f"from 0 to {LARGEST}", lambda value: 0 <= value <= LARGEST)
        _require(self, "stem_stride", "1 or 2", lambda value: value in (1, 2))
        _require(self, "seed", "from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63)
        for name, metadata in _metadata().items():
            if metadata["choices"] and name != "dataset" and getattr(self, name) not in metadata["choices"]:
                raise ValueError(
                    f"{name} must be one of {', '.join(metadata['choices'])}, got {getattr(self, name)!r}"
                )


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
    recipe = dataclasses.asdict(RECIPES[dataset])
    if given.get("schedule") == "step":
        recipe["learning_rate"] = STANDARD_RATE
    values = recipe | {name: value for name, value in given.items() if value is not None}
    default_name = "{}-{net}-M{cycles}-s{seed}".format(dataset, **{"seed": 0} | values)
    return TrainConfig(dataset=dataset, **{"out": str(RUNS / default_name)} | values)


def _metadata() -> dict[str, Any]:
    return {item.name: item.metadata for item in dataclasses.fields(TrainConfig)}


def _require(config: TrainConfig, name: str, condition: str, holds: Any) -> None:
    value = getattr(config, name)
    if value is not None and not holds(value):
        flag = _metadata()[name]["flag"]
        raise ValueError(f"{name}{f' (--{flag})' if flag else ''} must be {condition}, got {value}")


# Where the files lie does not change the result, and threads only its last bits, which a resumed run says. All
# else is another run.
FREE_FIELDS = ("data", "out", "threads")
# What came after version 0.1.0, and what it means for a run that knows nothing of it.
ADDED_FIELDS: dict[str, Any] = {"augment": "crop", "stem_stride": 1}


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
        f"  {name:14s} {recipe.net:10s} {recipe.epochs:4d} epochs, batch {recipe.batch_size}, "
        f"lr {recipe.learning_rate} ({STANDARD_RATE} with --schedule step), {recipe.cycles} cycles"
        for name, recipe in RECIPES.items()
    ]
    return "recipes, for what is left unset:\n" + "\n".join(rows)
