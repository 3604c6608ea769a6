"""Evaluating M snapshots, each alone and the ensembles of every m: one forward per member against other ways.

The project's time is that of ensemble.evaluate.evaluate_run, in a process of its own: reading and verifying the
snapshots, normalising the images, forward passes, and all metrics of all m. The opponents have networks and
normalised images in memory already and compute the error only. The labels are what plain PyTorch's ensemble predicts,
so that an error is a disagreement.
"""

import copy
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsnap.data.datasets import Dataset
from fastsnap.data.pipeline import make_pipeline
from fastsnap.ensemble.evaluate import evaluate_run
from fastsnap.nets.resnet import build_network
from fastsnap.run_folder import RunFolder
from fastsnap.train import describe
from fastsnap.training.allocator import keep_freed_memory
from harness.measure import PROJECT, Result, Settings, alternate, compare, not_installed
from harness.paced import Pace, PacedProcess
from harness.project import configure
from harness.task import CLASSES, Task, describe_data, load_images, shortened
from opponents import evaluators

NAME = "evaluation"
NET = "resnet20"
MEMBERS = 5
IMAGES, QUICK_IMAGES = 500, 50
ROUNDS, QUICK_ROUNDS = 3, 1
MOST_DISAGREEMENT = {
    "fp32": 0.2,
    "bf16": 10.0,
}  # percent of the images; untrained networks have many near ties
TWICE = f"{2 * MEMBERS} forwards, plain PyTorch"
Contender = partial[float]  # () -> error, percent


class ContendersDisagree(ValueError):
    """Contenders that should compute the same did not."""


def run(settings: Settings) -> Iterator[Result]:
    """Seconds of every way, in float32 and in bf16."""
    task = Task(NET, settings.device, settings.data, cycles=MEMBERS)
    images = QUICK_IMAGES if settings.quick else IMAGES
    networks = random_networks(NET, MEMBERS)
    dataset = shortened(load_images(settings.data), test=images)
    pixels = _normalised(dataset, task.device)
    plain = [copy.deepcopy(network).to(task.device) for network in networks]
    with torch.inference_mode():
        labels = evaluators.ensemble_prediction(plain, pixels)
        dataset = replace(dataset, test=replace(dataset.test, labels=labels.cpu().numpy()))
        with tempfile.TemporaryDirectory() as temporary:
            for precision, opponents in _opponents(plain, pixels, labels).items():
                folder = random_run(Path(temporary) / precision, task, dataset, networks, precision)
                contenders = {PROJECT: partial(_project, folder, dataset, task.device)} | opponents
                yield from _measure(task, precision, contenders, settings.quick, images)
    if reason := not_installed("torchensemble"):
        yield Result(NAME, case_of("fp32"), "torchensemble", "s", "lower", missing=reason)


def case_of(precision: str) -> str:
    """The members and their precision, for the report."""
    return f"{MEMBERS} x {NET}, {precision}"


def random_networks(net: str, members: int) -> list[nn.Module]:
    """Untrained networks, in evaluation mode: what they cost does not depend on what they know."""
    return [build_network(net, classes=CLASSES, seed=seed).eval() for seed in range(members)]


def random_run(
    path: Path, task: Task, dataset: Dataset, networks: list[nn.Module], precision: str
) -> RunFolder:
    """A run folder whose snapshots are `networks`."""
    folder = RunFolder(path)
    config = replace(configure(replace(task, cycles=len(networks))), precision=precision)
    path.mkdir(parents=True)
    folder.write_json("config.json", describe(config, dataset))
    for number, network in enumerate(networks, start=1):
        folder.save_snapshot(
            network.state_dict(), step=number, cycle=number, epoch=number, learning_rate=0.1, train_loss=1.0
        )
    return folder


def evaluation_loop(pace: Pace, folder: RunFolder, dataset: Dataset, device: str) -> None:
    """The project in a process of its own, set up as its command line is."""
    keep_freed_memory()
    for _ in pace.batches(repeat(None)):
        evaluate_run(folder, dataset=dataset, device=torch.device(device))


def _project(folder: RunFolder, dataset: Dataset, device: str) -> float:
    report = evaluate_run(folder, dataset=dataset, device=torch.device(device))
    return report.metrics.last_m[-1].error


def _normalised(dataset: Dataset, device: str) -> Tensor:
    """The test images float32 [N, C, H, W], row-major."""
    pipeline = make_pipeline(
        dataset.test,
        batch_size=len(dataset.test.labels),
        mean=dataset.mean,
        std=dataset.std,
        device=torch.device(device),
        augment=False,
        loader="torch",
    )
    images, _ = next(iter(pipeline.epoch(0)))
    return images.contiguous()


def _opponents(plain: list[nn.Module], pixels: Tensor, labels: Tensor) -> dict[str, dict[str, Contender]]:
    """By precision."""
    careful = [copy.deepcopy(network).to(memory_format=torch.channels_last) for network in plain]
    tiled = pixels.contiguous(memory_format=torch.channels_last)
    float32, bfloat16 = evaluators.float32_forward, evaluators.bfloat16_forward
    single: dict[str, Contender] = {
        TWICE: partial(evaluators.authors_way, plain, pixels, labels, float32),
        f"{2 * MEMBERS} forwards, channels-last": partial(
            evaluators.authors_way, careful, tiled, labels, float32
        ),
        "vmap over the members": partial(evaluators.vmapped, plain, pixels, labels),
    }
    if not not_installed("torchensemble"):
        single["torchensemble"] = partial(evaluators.torchensemble_way, plain, pixels, labels)
    half: dict[str, Contender] = {
        f"{TWICE}, fp32": single[TWICE],
        f"{2 * MEMBERS} forwards, channels-last, bf16": partial(
            evaluators.authors_way, careful, tiled, labels, bfloat16
        ),
    }
    return {"fp32": single, "bf16": half}


def _measure(
    task: Task, precision: str, contenders: dict[str, Contender], quick: bool, images: int
) -> list[Result]:
    errors = {name: contender() for name, contender in contenders.items()}  # warms up as well
    if max(errors.values()) > MOST_DISAGREEMENT[precision]:
        raise ContendersDisagree(
            f"the contenders of evaluation, {precision}, disagree with plain PyTorch on these percentages of the "
            f"images: {errors}"
        )
    turns = {name: partial(_seconds, contender) for name, contender in contenders.items()}
    with PacedProcess(PROJECT, evaluation_loop, *contenders[PROJECT].args) as process:
        turns[PROJECT] = partial(process.seconds_per_step, 1)
        process.run(1)  # warms up
        seconds = alternate(turns, QUICK_ROUNDS if quick else ROUNDS)
    details: dict[str, dict[str, Any]] = {
        name: {"% of images predicted unlike plain PyTorch": error} for name, error in errors.items()
    }
    details[PROJECT] |= {"images": images, "data": describe_data(task.data)}
    return compare(NAME, case_of(precision), "s", seconds, "lower", details)


def _seconds(contender: Contender) -> float:
    start = time.perf_counter()
    contender()  # ends with a figure on the host, so a GPU has finished too
    return time.perf_counter() - start
