"""config.json of a run whose network, data and loop are the user's own: what it says, and which run is the same."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastsnap import __version__
from fastsnap.device import PRECISIONS
from fastsnap.kernels.schedule import Schedule
from fastsnap.run_folder import RunError, RunFolder


@dataclass(frozen=True)
class Facts:
    """Of the data, for tables and for who uses the networks later; `precision` is that of the loop's arithmetic.

    mean, std    per channel, 0 to 255
    image_shape  height, width, channels
    Raises ValueError for what cannot be meant.
    """

    dataset: str
    precision: str
    classes: int
    class_names: Sequence[str] | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    image_shape: Sequence[int] | None

    def __post_init__(self) -> None:
        _require("dataset", self.dataset, "a name", bool(self.dataset))
        known = [name for name in PRECISIONS if name != "auto"]
        _require("precision", self.precision, f"one of {', '.join(known)}", self.precision in known)
        _require("classes", self.classes, "at least 1", self.classes >= 1)
        names = self.class_names
        fits = names is None or (not isinstance(names, str) and len(set(names)) == len(names) == self.classes)
        _require("class_names", names, f"{self.classes} different names, as classes says", fits)
        _require("std", self.std, "above 0", self.std is None or min(self.std) > 0)
        channels = {len(item) for item in (self.mean, self.std) if item is not None}
        if self.image_shape is not None:
            whole = len(self.image_shape) == 3 and min(self.image_shape) >= 1
            _require("image_shape", self.image_shape, "height, width and channels", whole)
            channels.add(self.image_shape[2])
        _require("mean and std", (self.mean, self.std), "of one value per channel", len(channels) <= 1)


def _require(name: str, value: Any, condition: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name} must be {condition}, got {value!r}")


def describe(
    facts: Facts, network: nn.Module, schedule: Schedule, steps_per_epoch: int, optimizer: Optimizer | None
) -> dict[str, Any]:
    """config.json: see run_schema.OwnLoopConfig. Raises ValueError for steps_per_epoch below 1."""
    _require("steps_per_epoch", steps_per_epoch, "at least 1", steps_per_epoch >= 1)
    listed = {name: getattr(facts, name) for name in ("class_names", "mean", "std", "image_shape")}
    return {
        "loop": "own",
        "net": type(network).__name__,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "optimizer": None if optimizer is None else type(optimizer).__name__,
        "cycles": schedule.cycles,
        "steps": schedule.steps,
        "steps_per_epoch": steps_per_epoch,
        "learning_rate": schedule.learning_rate,
        "schedule": schedule.kind,
        "dataset": facts.dataset,
        "precision": facts.precision,
        "classes": facts.classes,
        **{name: None if value is None else list(value) for name, value in listed.items()},
        "versions": {
            "fastsnap": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


def require_same(config: dict[str, Any], folder: RunFolder) -> None:
    """Raise RunError, naming the fields, unless the run in `folder` has this configuration, versions aside."""
    saved = folder.config()
    names = [name for name in config if name != "versions" and config[name] != saved.get(name)]
    if names:
        fields = "; ".join(f"{name}: {config[name]} asked for, {saved.get(name)} there" for name in names)
        raise RunError(
            f"{folder.path} holds a run of another configuration ({fields}). Choose another folder, or give the same "
            "values to go on with it"
        )
