"""SnapshotCallback for Lightning: a SnapshotRecorder within trainer.fit. Needs the extra: fastsnap[lightning]."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastsnap.training.recorder import SnapshotRecorder

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("the callback needs Lightning: pip install 'fastsnap[lightning]'") from error


class SnapshotCallback(Callback):
    """Records trainer.fit; process 0 writes. Lightning's checkpoints are what the run goes on from.

    recorder  of the module, or of a network in it, made without an optimizer. The rate is the module's business:
              SnapshotSGD, or LambdaLR(optimizer, schedule.rate_after) with interval "step" and lr=1.0

    Raises what the recorder raises, and ValueError for a training of more updates than the recorder's schedule has.
    """

    def __init__(self, recorder: SnapshotRecorder) -> None:
        self.recorder = recorder
        self._loss: Tensor | None = None  # of the batches of this update

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where Lightning does."""
        self.recorder.require_steps_for(trainer.estimated_stepping_batches)
        if trainer.is_global_zero:
            self.recorder.start(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Hand the loss to the recorder, where this batch ended an update."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            # Lightning has divided it by the number of batches whose gradients are added up.
            self._loss = loss.detach() + (0 if self._loss is None else self._loss)
        if not trainer.is_global_zero or trainer.global_step == self.recorder.step:
            return
        if trainer.global_step != self.recorder.step + 1:
            raise ValueError(
                f"{trainer.global_step - self.recorder.step} updates in one batch: the recorder is for one optimizer"
            )
        self.recorder.update(torch.zeros(()) if self._loss is None else self._loss)
        self._loss = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let others write to the run folder, also after an error."""
        self.recorder.close()
