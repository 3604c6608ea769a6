"""Measuring on a noisy machine: contenders take turns, A B A B, and what counts is their ratio within each round.

A result is a line of JSON that says what was measured, how often, on what, from which commit, with which command.
"""

import functools
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from fastsnap.device import choose_device, processor_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = "fastsnap"
# What an opponent needs, by the name that is imported, and the command that installs it.
INSTALL = {
    "torchensemble": "make bench-peers",
    "timm": "make bench-peers",
    "onnxruntime": "pip install 'fastsnap[onnx]'",
    "nvidia.dali": "pip install nvidia-dali-cuda130",
}
PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "nvidia-dali-cuda130",
    "torchensemble",
    "timm",
    "onnxruntime",
)
SETTINGS = (  # that change speed
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "ONEDNN_MAX_CPU_ISA"),
    *("LD_PRELOAD", "MALLOC_CONF", "CUDA_VISIBLE_DEVICES"),
)
Better = Literal["higher", "lower"]
Name = TypeVar("Name")


@dataclass(frozen=True)
class Settings:
    """What every benchmark is told.

    data       folder that holds CIFAR-100; None: the benchmarks that measure speed use noise of its shape, and say so
    out        folder of the results and of the accuracy runs
    device     "cpu" or "cuda"
    quick      small enough for all benchmarks together in a few minutes
    full       the paper's setting, where a benchmark has one
    seeds      how many seeds the accuracy is measured with; None: the benchmark's own number
    precision  in which throughput and evaluation compare; None: see precisions.compared
    images     folders of pictures that the pipelines are measured on; none: made-up ones
    """

    data: Path | None = None
    out: Path = Path("reports")
    device: str = field(default_factory=lambda: choose_device("auto").type)
    quick: bool = False
    full: bool = False
    seeds: int | None = None
    precision: str | None = None
    images: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    low, median, high = np.percentile(np.asarray(values, np.float64), [25, 50, 75]).tolist()
    return Spread(median, low, high)


def alternate(contenders: Mapping[Name, Callable[[], float]], rounds: int) -> dict[Name, list[float]]:
    """Call every contender once a round, in turn; returns the values that each gave, by round."""
    values: dict[Name, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            values[name].append(contender())
    return values


def times_better(project: Sequence[float], opponent: Sequence[float], better: Better) -> Spread:
    """How many times better the project did, round by round: above 1 the project wins, below 1 the opponent."""
    pairs = zip(project, opponent, strict=True)
    return spread([own / other if better == "higher" else other / own for own, other in pairs])


@dataclass(frozen=True)
class Result:
    """What one contender did in one case.

    opponent  the contender: PROJECT, or what it is compared with
    values    one per round (or per seed), in `unit`; none if it was not measured
    better    which values are better
    ratio     times_better of the project against this opponent; None for the project itself
    details   what else the report shows, JSON-serialisable
    missing   why it was not measured; None if it was
    """

    benchmark: str
    case: str
    opponent: str
    unit: str
    better: Better
    values: tuple[float, ...] = ()
    ratio: Spread | None = None
    details: dict[str, Any] = field(default_factory=dict)
    missing: str | None = None

    def as_json(self, settings: Settings) -> dict[str, Any]:
        """A line of results.jsonl."""
        place = {name: getattr(self, name) for name in ("benchmark", "case", "opponent", "unit", "better")}
        figures = {"n": len(self.values)} | (asdict(spread(self.values)) if self.values else {})
        return (
            place
            | figures
            | {
                "values": list(self.values),
                "ratio": asdict(self.ratio) if self.ratio else None,
                "details": self.details,
                "missing": self.missing,
            }
            | provenance(settings)
        )


def compare(
    benchmark: str,
    case: str,
    unit: str,
    values: Mapping[str, Sequence[float]],
    better: Better,
    details: Mapping[str, dict[str, Any]] | None = None,
) -> list[Result]:
    """A result per contender, the first of which is the project, from values that were measured in turns."""
    project, *_ = values
    return [
        Result(
            benchmark,
            case,
            name,
            unit,
            better,
            tuple(own),
            None if name == project else times_better(values[project], own, better),
            (details or {}).get(name, {}),
        )
        for name, own in values.items()
    ]


def not_installed(module: str) -> str | None:
    """Why an opponent that needs `module` (one of INSTALL) cannot be measured; None if it can."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the package around it
        found = None
    return None if found else f"not installed: {INSTALL[module]}"


def provenance(settings: Settings) -> dict[str, Any]:
    """Machine, versions, commit, date, and the command that measures it again."""
    return {
        "quick": settings.quick,
        "machine": machine(settings.device),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "run": _start_of_run(),
        "command": " ".join(["python", *(_relative(argument) for argument in sys.argv)]),
    }


@functools.cache
def _start_of_run() -> str:
    """The same for all results of a process."""
    return datetime.now(timezone.utc).isoformat()


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on of the machine."""
    return {
        "cpu": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, those that are installed."""
    found = {"python": platform.python_version(), "fastsnap": importlib.metadata.version("fastsnap")}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str | None:
    """The revision of the source tree, marked if it has changes; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _relative(argument: str) -> str:
    """Arguments as a reader would type them: nobody else has this machine's folders."""
    path = Path(argument)
    if path.exists() and not path.resolve().is_relative_to(ROOT):
        return "FOLDER"
    return os.path.relpath(path) if path.is_absolute() else argument
