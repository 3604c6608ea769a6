"""What a training run keeps in its folder as it goes, whoever runs the loop: snapshots, metrics and checkpoints."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastsnap.kernels.schedule import Schedule
from fastsnap.run_files import RunError
from fastsnap.run_folder import RunFolder
from fastsnap.run_schema import SnapshotEntry
from fastsnap.run_state import RESTART, is_finished, require_nothing_trained, require_snapshots

LOG_STEPS = 50  # most steps between two looks at the loss: each one waits for the device


class TrainingDiverged(RunError):
    """The loss became NaN or infinite."""


class Records:
    """Of a run of `schedule`, in `folder`; `steps_per_epoch` updates make an epoch, the last one may be shorter.

    restart  how the user trains again from the start, as errors put it
    """

    def __init__(
        self, folder: RunFolder, schedule: Schedule, steps_per_epoch: int, *, restart: str = RESTART
    ) -> None:
        self.folder, self.schedule, self.steps_per_epoch = folder, schedule, steps_per_epoch
        self.restart = restart

    def epoch(self, step: int) -> int:
        """From 1, that the last of `step` updates belongs to."""
        return (step - 1) // self.steps_per_epoch + 1

    def cycle(self, step: int) -> int:
        """From 1, that the last of `step` updates belongs to."""
        return self.schedule.cycle(step - 1) + 1

    # -- saving

    def save_snapshot(
        self,
        state: Mapping[str, Tensor],
        step: int,
        train_loss: float,
        average: Mapping[str, Tensor] | None = None,
    ) -> SnapshotEntry:
        """Save a network's state_dict as it is after `step` updates, which end a cycle.

        average  the state_dict of the running average of the weights, which replaces the last one
        """
        return self.folder.save_snapshot(
            state,
            step=step,
            cycle=self.cycle(step),
            epoch=self.epoch(step),
            learning_rate=self.schedule.rate(step - 1),
            train_loss=train_loss,
            average=average,
        )

    def end_epoch(self, step: int, figures: Mapping[str, float]) -> dict[str, Any]:
        """Add a line of `figures`, run_schema.MetricsRecord's, to the metrics; returns the line."""
        place = {"step": step, "epoch": self.epoch(step), "cycle": self.cycle(step)}
        record = place | {"lr": self.schedule.rate(step - 1)} | dict(figures)
        self.folder.append_metrics(record)
        return record

    def save_checkpoint(self, tensors: dict[str, Tensor], step: int, state: Mapping[str, Any]) -> None:
        """Save everything that the rest of the run depends on: see run_schema.CheckpointState."""
        self.folder.save_checkpoint(tensors, {"step": step, "steps": self.schedule.steps} | dict(state))

    def diverged(self, looked_before: int, step: int, remedy: str) -> TrainingDiverged:
        """The error for a loss or weights that became NaN or infinite since `looked_before` updates."""
        return TrainingDiverged(
            f"the loss became NaN or infinite between steps {looked_before + 1} and {step} "
            f"(epoch {self.epoch(step)}, cycle {self.cycle(step)}); the {len(self.folder.snapshots())} snapshots saved "
            f"before are kept in {self.folder.path}. {remedy}"
        )

    # -- going on

    def finished(self) -> bool:
        """Whether all is saved. Raises RunError for a finished run that has lost snapshots."""
        if not is_finished(self.folder, self.schedule.steps):
            return False
        self.require_snapshots(self.schedule.steps)
        return True

    def require_snapshots(self, step: int) -> None:
        """Raise RunError unless there is one for each of the cycles that end by `step`."""
        ends = [self.schedule.boundary(cycle) for cycle in range(1, self.schedule.cycles + 1)]
        require_snapshots(self.folder, ends, step, self.restart)

    def checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Of an unfinished run, its tensors and its state; None at the beginning.

        Raises RunError for one of a run of another length, and if it is missing although something was trained.
        """
        checkpoint = self.folder.load_checkpoint()
        if checkpoint is None:
            require_nothing_trained(self.folder, self.restart)
            self.folder.forget_after(0)
            return None
        _, state = checkpoint
        if state["steps"] != self.schedule.steps:
            raise RunError(
                f"the checkpoint in {self.folder.path} is of a run of {state['steps']:,} steps, this one has "
                f"{self.schedule.steps:,}: it is of another data set, or of fastsnap 0.1.0, where the last few images "
                "of an epoch were a batch of their own. Choose another --out, or go on with the version that began it"
            )
        return checkpoint

    @torch.no_grad()
    def restore(self, own: Mapping[str, Tensor], saved: Mapping[str, Tensor], step: int) -> None:
        """Copy a checkpoint's tensors, of `step` updates, into a run's own.

        Raises RunError, and changes nothing, if they do not fit or snapshots are missing.
        """
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in saved.items()}:
            raise RunError(
                f"the checkpoint in {self.folder.path} is of another network or version; choose another --out"
            )
        self.require_snapshots(step)
        for name, tensor in own.items():
            tensor.copy_(saved[name])
