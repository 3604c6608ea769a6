"""Evaluating M snapshots, each alone and the ensembles of every m: one forward per member against other ways.

The project's time is that of ensemble.evaluate.evaluate_run, in a process of its own: reading and verifying the
snapshots, normalising the images, forward passes, and all metrics of all m. The opponents have networks and
normalised images in memory already and compute the error only. The labels are what plain PyTorch's ensemble predicts,
so that an error is a disagreement.

By default the project takes the precision that its command line would, and the channels-last forwards the faster one of
fp32 and bf16. In a case whose precision is `asked of all`, both are held to it. All others compute in fp32 in any case.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsnap.data.datasets import Dataset
from fastsnap.data.pipeline import make_pipeline
from fastsnap.device import AUTOCAST_DTYPES
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.ensemble.results import Report
from fastsnap.run_folder import RunFolder
from fastsnap.training.allocator import keep_freed_memory
from harness.measure import PROJECT, Result, Settings, alternate, compare, not_installed
from harness.paced import Pace, PacedProcess
from harness.precisions import compared, text_of, tried_by_hand
from harness.project import configure, random_networks, random_run, threads_of
from harness.task import Task, describe_data, load_images, shortened
from opponents import evaluators

NAME = "evaluation"
NET = "resnet20"
MEMBERS = 5
IMAGES, QUICK_IMAGES = 500, 50
ROUNDS, QUICK_ROUNDS = 3, 1
ROUNDS_TO_CHOOSE = 2  # the better turn counts
MOST_DISAGREEMENT = {
    "fp32": 0.2,
    "bf16": 10.0,
    "fp16": 2.0,
}  # percent of the images; untrained networks have many near ties
TWICE = f"{2 * MEMBERS} forwards, plain PyTorch"
CHANNELS_LAST = f"{2 * MEMBERS} forwards, channels-last"


@dataclass(frozen=True)
class Contender:
    """A way to evaluate. error: does it, and returns the error of all M together in percent"""

    precision: str
    error: Callable[[], float]

    def seconds(self) -> float:
        """How long it takes."""
        start = time.perf_counter()
        self.error()  # ends with a figure on the host, so a GPU has finished too
        return time.perf_counter() - start


class ContendersDisagree(ValueError):
    """Contenders that should compute the same did not."""


def run(settings: Settings) -> Iterator[Result]:
    """Seconds of every way, by default and, where that is another precision, in fp32."""
    base = Task(NET, settings.device, settings.data, cycles=MEMBERS)
    dataset = shortened(load_images(settings.data), test=QUICK_IMAGES if settings.quick else IMAGES)
    pixels = _normalised(dataset, base.device)
    networks = random_networks(NET, MEMBERS)
    plain = [copy.deepcopy(network).to(base.device) for network in networks]
    with torch.inference_mode():
        labels = evaluators.ensemble_prediction(plain, pixels)
        dataset = replace(dataset, test=replace(dataset.test, labels=labels.cpu().numpy()))
        with tempfile.TemporaryDirectory() as temporary:
            folder = random_run(Path(temporary) / "run", base, dataset, networks)
            for precision in compared(settings.precision, settings.device):
                task = replace(base, precision=precision)
                opponents = _opponents(task, plain, pixels, labels)
                yield from _measure(task, folder, dataset, opponents, settings.quick)


def case_of(precision: str) -> str:
    """The members, for the report. precision: a text of harness.precisions"""
    return f"{MEMBERS} x {NET}, {precision}"


def evaluation_loop(pace: Pace, folder: RunFolder, dataset: Dataset, task: Task) -> None:
    """The project in a process of its own, set up as its command line is."""
    keep_freed_memory()
    for _ in pace.batches(repeat(None)):
        _evaluate(folder, dataset, task)


def _evaluate(folder: RunFolder, dataset: Dataset, task: Task) -> Report:
    with threads_of(configure(task)):
        return evaluate_run(
            folder, dataset=dataset, device=torch.device(task.device), precision=task.precision
        )


def _normalised(dataset: Dataset, device: str) -> Tensor:
    """The test images float32 [N, C, H, W], row-major."""
    pipeline = make_pipeline(
        dataset.test,
        batch_size=len(dataset.test.labels),
        mean=dataset.mean,
        std=dataset.std,
        device=torch.device(device),
        loader="torch",
    )
    images, _ = next(iter(pipeline.epoch(0)))
    return images.contiguous()


def _opponents(task: Task, plain: list[nn.Module], pixels: Tensor, labels: Tensor) -> dict[str, Contender]:
    tiled = pixels.contiguous(memory_format=torch.channels_last)
    careful = [copy.deepcopy(network).to(memory_format=torch.channels_last) for network in plain]
    opponents = {
        TWICE: Contender(
            "fp32", partial(evaluators.authors_way, plain, pixels, labels, evaluators.plain_forward)
        ),
        CHANNELS_LAST: fastest(
            [
                Contender(
                    precision, partial(evaluators.authors_way, careful, tiled, labels, _forward(precision))
                )
                for precision in tried_by_hand(task.precision, task.device)
            ]
        ),
        "vmap over the members": Contender("fp32", partial(evaluators.vmapped, plain, pixels, labels)),
    }
    if not not_installed("torchensemble"):
        way = partial(evaluators.torchensemble_way, plain, pixels, labels)
        opponents["torchensemble"] = Contender("fp32", way)
    return opponents


def _forward(precision: str) -> evaluators.Forward:
    if precision == "fp32":
        return evaluators.plain_forward
    return partial(evaluators.autocast_forward, AUTOCAST_DTYPES[precision])


def fastest(contenders: Sequence[Contender]) -> Contender:
    """The fastest of one or more, in the best of its turns after a warm-up."""
    if len(contenders) == 1:
        return contenders[0]
    for contender in contenders:
        contender.error()
    seconds = alternate({contender: contender.seconds for contender in contenders}, ROUNDS_TO_CHOOSE)
    return min(contenders, key=lambda contender: min(seconds[contender]))


def _measure(
    task: Task, folder: RunFolder, dataset: Dataset, opponents: dict[str, Contender], quick: bool
) -> list[Result]:
    report = _evaluate(folder, dataset, task)
    precisions = {PROJECT: report.precision} | {name: way.precision for name, way in opponents.items()}
    errors = {PROJECT: report.metrics.last_m[-1].error}
    errors |= {name: way.error() for name, way in opponents.items()}  # warms up as well
    case = case_of(text_of(task.precision, task.device))
    _check(case, errors, precisions)
    turns: dict[str, Callable[[], float]] = {}
    with PacedProcess(PROJECT, evaluation_loop, folder, dataset, task) as process:
        turns[PROJECT] = partial(process.seconds_per_step, 1)
        turns |= {name: way.seconds for name, way in opponents.items()}
        process.run(1)  # warms up
        seconds = alternate(turns, QUICK_ROUNDS if quick else ROUNDS)
    details: dict[str, dict[str, Any]] = {
        name: {"precision": precisions[name], "% of images predicted unlike plain PyTorch": error}
        for name, error in errors.items()
    }
    details[PROJECT] |= {"images": len(dataset.test.labels), "data": describe_data(task.data)}
    results = compare(NAME, case, "s", seconds, "lower", details)
    reason = not_installed("torchensemble")
    missing = [Result(NAME, case, "torchensemble", "s", "lower", missing=reason)] if reason else []
    return [*results, *missing]


def _check(case: str, errors: dict[str, float], precisions: dict[str, str]) -> None:
    far = {name: error for name, error in errors.items() if error > MOST_DISAGREEMENT[precisions[name]]}
    if far:
        raise ContendersDisagree(
            f"contenders of {case} disagree with plain PyTorch on these percentages of the images: {far}"
        )
