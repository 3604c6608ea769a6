"""The loop with a last batch that is larger than the others: where it can stop, what it counts, what it refuses."""

import io
import os
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console

from fastsnap.assembly import build_trainer, settle
from fastsnap.config import make_config
from fastsnap.data.datasets import load_dataset
from fastsnap.run_folder import RunError, RunFolder
from fastsnap.training.progress import ProgressDisplay
from fastsnap.training.stopping import TrainingStopped
from fastsnap.training.trainer import WARM_UP_STEPS, Trainer

IMAGES, BATCH_SIZE, STEPS_PER_EPOCH, EPOCHS = 130, 43, 3, 2  # 43, 43 and 44 images


def make(path: Path, batch_size: int = BATCH_SIZE) -> Trainer:
    config = settle(
        make_config(
            net="resnet8",
            epochs=EPOCHS,
            cycles=1,
            batch_size=batch_size,
            train_images=IMAGES,
            threads=1,
            out=str(path),
        )
    )
    return build_trainer(config, load_dataset("digits", train_images=IMAGES), RunFolder(path))


class StoppingPipeline:
    """The batches of a pipeline; a SIGTERM comes with the batch of one step."""

    def __init__(self, pipeline, stop_step: int) -> None:
        self.pipeline, self.stop_step = pipeline, stop_step
        self.steps_per_epoch, self.batch_size = pipeline.steps_per_epoch, pipeline.batch_size
        self.plan = pipeline.plan

    def epoch(self, epoch: int, first_step: int = 0):
        for step, batch in enumerate(self.pipeline.epoch(epoch, first_step), start=first_step):
            if epoch * self.steps_per_epoch + step == self.stop_step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def run(trainer: Trainer) -> None:
    with ProgressDisplay(Console(quiet=True), trainer.step, trainer.schedule.steps) as display:
        trainer.run(display)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    trainer = make(tmp_path_factory.mktemp("run"))
    assert trainer.schedule.steps == EPOCHS * STEPS_PER_EPOCH
    run(trainer)
    return trainer.folder


class SlowPipeline(StoppingPipeline):
    """The batches of a pipeline; from one step on they come so late that each takes 5 times the longest before."""

    def epoch(self, epoch: int, first_step: int = 0):
        longest, before = 0.0, time.perf_counter()
        for step, batch in enumerate(self.pipeline.epoch(epoch, first_step), start=first_step):
            if step >= self.stop_step:
                time.sleep(4 * longest if epoch == 0 else 0)
            yield batch
            if WARM_UP_STEPS <= step < self.stop_step:
                longest = max(longest, time.perf_counter() - before)
            before = time.perf_counter()


def test_steps_that_become_slow_are_told_once_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr("fastsnap.training.pace.SLOW_SECONDS", 0.0)
    trainer = make(tmp_path, batch_size=8)  # 16 steps an epoch
    trainer.pipeline = SlowPipeline(trainer.pipeline, 10)
    monkeypatch.setattr("fastsnap.training.trainer.LOG_STEPS", 5)
    console = Console(file=io.StringIO())
    with ProgressDisplay(console, 0, trainer.schedule.steps) as display:
        trainer.run(display)
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith("steps take ")]
    assert len(lines) == 1
    assert "times what they took at their best" in lines[0]
    assert "--threads 1" in lines[0]


def results(folder: RunFolder) -> tuple[list[bytes], list[dict[str, float]]]:
    """What does not depend on time."""
    snapshots = [(folder.path / entry.file).read_bytes() for entry in folder.snapshots()]
    names = ("step", "epoch", "train_loss", "train_error")
    return snapshots, [{name: record[name] for name in names} for record in folder.metrics()]


@pytest.mark.parametrize("stop_step", range(EPOCHS * STEPS_PER_EPOCH - 1))
def test_a_run_stopped_at_any_step_ends_with_the_same_bits(uninterrupted, tmp_path, stop_step):
    trainer = make(tmp_path)
    trainer.pipeline = StoppingPipeline(trainer.pipeline, stop_step)
    with pytest.raises(TrainingStopped):
        run(trainer)
    resumed = make(tmp_path)
    assert resumed.resume()
    assert resumed.step == stop_step + 1
    run(resumed)
    assert results(resumed.folder) == results(uninterrupted)


def test_the_loss_of_an_epoch_is_that_of_all_its_images(uninterrupted):
    errors = [record["train_error"] * IMAGES / 100 for record in uninterrupted.metrics()]
    assert errors == pytest.approx([round(count) for count in errors])
    assert uninterrupted.snapshots()[0].train_loss == uninterrupted.metrics()[-1]["train_loss"]


def test_a_checkpoint_of_other_steps_is_told_apart(uninterrupted, tmp_path):
    """Version 0.1.0 took 4 steps an epoch here, the last with one image."""
    checkpoint = uninterrupted.load_checkpoint()
    assert checkpoint is not None
    tensors, state = checkpoint
    RunFolder(tmp_path).save_checkpoint(tensors, state | {"steps": EPOCHS * (STEPS_PER_EPOCH + 1)})
    with pytest.raises(RunError, match=r"a run of 8 steps, this one has 6: .*0\.1\.0.* Choose another --out"):
        make(tmp_path).resume()
