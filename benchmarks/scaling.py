"""How the cost grows with the work: images/s against batch size, time against M and depth, memory against net size.

Each series gets an exponent e, from y ~ x^e: least squares on the logarithms of the medians, with its standard error.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from scipy import stats

from fastsnap.assembly import build_trainer
from fastsnap.data.datasets import Dataset
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.nets.build import build_network
from fastsnap.run_folder import RunFolder
from harness.measure import PROJECT, Better, Result, Settings, alternate, spread
from harness.paced import PacedProcess
from harness.project import (
    batches_loop,
    configure,
    random_networks,
    random_run,
    seconds_of_a_run,
    threads_of,
    train_loop,
    warm_up,
)
from harness.task import CLASSES, Task, load_images, shortened

NAME = "scaling"
NET = "resnet20"
BATCH_SIZES, QUICK_BATCH_SIZES = (16, 32, 64, 128, 256), (16, 64)
DEPTHS, QUICK_DEPTHS = (8, 14, 26, 56), (8, 14)
MEMBERS, QUICK_MEMBERS = (1, 2, 4, 8), (1, 2)
WIDTHS, QUICK_WIDTHS = (1, 2, 4, 8), (1, 2)
IMAGES_OF_A_TURN = 256
QUICK_IMAGES_OF_A_TURN = 64
TEST_IMAGES, QUICK_TEST_IMAGES = 500, 100
ROUNDS, QUICK_ROUNDS = 3, 2
STEPS_FOR_MEMORY = 3


@dataclass(frozen=True)
class Series:
    """Something measured at several sizes x. quantity: what y is; axis: what x is."""

    quantity: str
    axis: str
    unit: str
    better: Better
    values: Mapping[int, Sequence[float]]


def run(settings: Settings) -> Iterator[Result]:
    """A result per point, and one per exponent."""
    dataset = load_images(settings.data)
    for series in (
        _batch_size(dataset, settings),
        _depth(dataset, settings),
        _cycles(dataset, settings),
        _members(dataset, settings),
        _memory(settings),
    ):
        yield from results_of(series)


def results_of(series: Series) -> Iterator[Result]:
    """The points of a series, and its exponent."""
    name = f"{series.quantity} against {series.axis}"
    for x, values in series.values.items():
        details = {"series": name, "axis": series.axis, "x": x}
        case = f"{series.quantity}, {series.axis} {x:,}"
        yield Result(NAME, case, PROJECT, series.unit, series.better, tuple(values), details=details)
    medians = [spread(values).median for values in series.values.values()]
    exponent, standard_error = fit_exponent(list(series.values), medians)
    details = {"series": name, "standard_error": standard_error}
    yield Result(NAME, name, PROJECT, "exponent", series.better, (exponent,), details=details)


def fit_exponent(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float | None]:
    """e of values ~ sizes^e by least squares on the logarithms, and its standard error (None for two points).

    Raises ValueError for fewer than two sizes, and for sizes or values that are not above 0.
    """
    if len(sizes) < 2 or min(*sizes, *values) <= 0:
        raise ValueError(f"an exponent needs two or more sizes and values above 0, got {sizes} and {values}")
    fit = stats.linregress([math.log(size) for size in sizes], [math.log(value) for value in values])
    return float(fit.slope), float(fit.stderr) if len(sizes) > 2 else None


def _rounds(settings: Settings) -> int:
    return QUICK_ROUNDS if settings.quick else ROUNDS


def _alternate(turns: Mapping[int, Callable[[], float]], settings: Settings) -> dict[int, list[float]]:
    """`alternate` after a warm-up round, by size."""
    alternate(turns, rounds=1)
    return alternate(turns, _rounds(settings))


def _batch_size(dataset: Dataset, settings: Settings) -> Series:
    sizes = QUICK_BATCH_SIZES if settings.quick else BATCH_SIZES
    turns = {size: _step_turn(dataset, settings, NET, size) for size in sizes}
    seconds = _alternate(turns, settings)
    rates = {size: [size / value for value in seconds[size]] for size in sizes}
    return Series(f"images/s of {NET}", "batch size", "images/s", "higher", rates)


def _depth(dataset: Dataset, settings: Settings) -> Series:
    depths = QUICK_DEPTHS if settings.quick else DEPTHS
    turns = {depth: _step_turn(dataset, settings, f"resnet{depth}", Task.batch_size) for depth in depths}
    seconds = _alternate(turns, settings)
    milliseconds = {depth: [1000 * value for value in seconds[depth]] for depth in depths}
    return Series("time of a step", "depth", "ms", "lower", milliseconds)


def _step_turn(dataset: Dataset, settings: Settings, net: str, batch_size: int) -> Callable[[], float]:
    """Seconds per training step, on one batch."""
    task = Task(net, settings.device, settings.data, batch_size=batch_size)
    config = configure(task)
    trainer = build_trainer(config, dataset, RunFolder("unused"))
    with threads_of(config):
        warm_up(trainer)
    images, labels = next(iter(trainer.pipeline.epoch(0)))
    steps = max(1, (QUICK_IMAGES_OF_A_TURN if settings.quick else IMAGES_OF_A_TURN) // batch_size)

    def turn() -> float:
        with threads_of(config):
            start = time.perf_counter()
            for _ in range(steps):
                trainer.train_step(images, labels)
            trainer.train_step.totals.tolist()  # waits for the device
            return (time.perf_counter() - start) / steps

    return turn


def _cycles(dataset: Dataset, settings: Settings) -> Series:
    """Whole training runs of the same length with more and more snapshots."""
    members = QUICK_MEMBERS if settings.quick else MEMBERS
    images = QUICK_IMAGES_OF_A_TURN if settings.quick else IMAGES_OF_A_TURN
    short = shortened(dataset, train=images)
    task = Task(NET, settings.device, settings.data, epochs=2)
    turns = {m: partial(seconds_of_a_run, replace(task, cycles=m), short) for m in members}
    quantity = f"training {NET} on {task.epochs * images:,} images"
    return Series(quantity, "M", "s", "lower", _alternate(turns, settings))


def _members(dataset: Dataset, settings: Settings) -> Series:
    members = QUICK_MEMBERS if settings.quick else MEMBERS
    images = QUICK_TEST_IMAGES if settings.quick else TEST_IMAGES
    short = shortened(dataset, test=images)
    task = Task(NET, settings.device, settings.data)
    with tempfile.TemporaryDirectory() as temporary:
        turns = {}
        for m in members:
            path = Path(temporary) / str(m)
            folder = random_run(path, task, short, random_networks(NET, m))
            turns[m] = partial(_evaluation_seconds, folder, short, task)
        seconds = _alternate(turns, settings)
    return Series(f"evaluating {NET} on {images:,} images", "M", "s", "lower", seconds)


def _evaluation_seconds(folder: RunFolder, dataset: Dataset, task: Task) -> float:
    with threads_of(configure(task)):
        return evaluate_run(folder, dataset=dataset, device=torch.device(task.device)).seconds


def _memory(settings: Settings) -> Series:
    """Peak memory of training beyond what a process takes that only makes batches, against the parameters."""
    task = Task(NET, settings.device, settings.data)
    with PacedProcess("batches alone", batches_loop, task, configure(task).loader) as process:
        before = process.run(STEPS_FOR_MEMORY).peak_memory_mb
    values = {}
    for width in QUICK_WIDTHS if settings.quick else WIDTHS:
        net = NET if width == 1 else f"{NET}x{width}"
        parameters = sum(p.numel() for p in build_network(net, classes=CLASSES).parameters())
        with PacedProcess(net, train_loop, replace(task, net=net)) as process:
            values[parameters] = [process.run(STEPS_FOR_MEMORY).peak_memory_mb - before]
    quantity = f"memory of training {NET} of growing width"
    return Series(quantity, "parameters", "MB", "lower", values)
