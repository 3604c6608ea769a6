"""Where the time of a training run goes: images/s, time outside forward and backward, first step, peak memory.

    python benchmarks/training.py --dataset cifar100 --net resnet20 --epochs 1 --data DATA

takes the flags of `python -m fastsnap.train`, trains for real into a temporary folder, saving included, and prints one
line of JSON. On a CPU only: on a GPU the host does not wait, so that times taken on it say nothing.
"""

import dataclasses
import json
import os
import platform
import resource
import sys
import tempfile
import time
from typing import Any

PROCESS_START = os.stat("/proc/self").st_ctime  # before torch is imported

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from fastsnap.assembly import build_trainer, describe, settle  # noqa: E402
from fastsnap.config import parse_arguments  # noqa: E402
from fastsnap.data.datasets import load_dataset  # noqa: E402
from fastsnap.run_folder import RunFolder  # noqa: E402
from fastsnap.training.allocator import keep_freed_memory  # noqa: E402
from fastsnap.training.progress import ProgressDisplay  # noqa: E402
from fastsnap.training.trainer import Trainer  # noqa: E402


class Stopwatch:
    """Seconds spent in each part of the steps of a trainer, by hooks and a wrapped pipeline."""

    def __init__(self, trainer: Trainer) -> None:
        self.seconds = {"data": 0.0, "forward_backward": 0.0, "update": 0.0}
        self.first_step: float | None = None
        self._started = 0.0
        self._pipeline = trainer.pipeline
        self.batch_size, self.steps_per_epoch = trainer.pipeline.batch_size, trainer.pipeline.steps_per_epoch
        self.name, self.plan = trainer.pipeline.name, trainer.pipeline.plan
        trainer.pipeline = self
        trainer.network.register_forward_pre_hook(lambda *_: self._start())
        trainer.optimizer.register_step_pre_hook(lambda *_: self._stop("forward_backward"))
        trainer.optimizer.register_step_post_hook(lambda *_: self._stop("update"))

    def epoch(self, epoch: int, first_step: int = 0) -> Any:
        """The pipeline's batches, timed."""
        batches = iter(self._pipeline.epoch(epoch, first_step))
        while True:
            self._start()
            batch = next(batches, None)
            self._stop("data")
            if batch is None:
                return
            yield batch

    def _start(self) -> None:
        self._started = time.perf_counter()

    def _stop(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] += now - self._started
        self._started = now
        if part == "update" and self.first_step is None:
            self.first_step = time.time() - PROCESS_START


def measure(arguments: list[str]) -> dict[str, Any]:
    """Train as `arguments` say and return what it cost."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        asked, _ = parse_arguments([*arguments, "--out", temporary])
        config = settle(asked)
        if config.device != "cpu":
            raise ValueError("this benchmark measures on a CPU: add --device cpu")
        torch.set_num_threads(config.threads or torch.get_num_threads())
        dataset = load_dataset(
            config.dataset,
            config.data,
            validation=config.validation,
            train_images=config.train_images,
            seed=config.seed,
        )
        trainer = build_trainer(config, dataset, RunFolder(temporary))
        watch = Stopwatch(trainer)
        start = time.perf_counter()
        with ProgressDisplay(Console(stderr=True), 0, trainer.schedule.steps) as display:
            trainer.run(display)
        total = time.perf_counter() - start
        revision = describe(config, dataset)["versions"]
    steps = trainer.schedule.steps
    other = total - sum(watch.seconds.values())
    milliseconds = {
        part: 1000 * seconds / steps for part, seconds in (watch.seconds | {"other": other}).items()
    }
    return {
        "benchmark": "training",
        "images_per_second": config.epochs * len(dataset.train.labels) / total,
        "milliseconds_per_step": milliseconds,
        "percent_outside_forward_and_backward": 100 * (1 - watch.seconds["forward_backward"] / total),
        "seconds_to_first_step": watch.first_step,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "steps": steps,
        "config": {
            name: value for name, value in dataclasses.asdict(config).items() if name not in ("data", "out")
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": revision,
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1:])))
