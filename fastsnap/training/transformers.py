"""SnapshotCallback for transformers' Trainer: a SnapshotRecorder within it. Needs the extra: fastsnap[transformers]."""

from typing import Any

import torch
from torch import Tensor, nn

from fastsnap.training.recorder import SnapshotRecorder

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("the callback needs transformers: pip install 'fastsnap[transformers]'") from error


class SnapshotCallback(TrainerCallback):
    """Records Trainer.train; process 0 writes. The Trainer's checkpoints are what the run goes on from.

    recorder  of the Trainer's model, made without an optimizer. The rate is the Trainer's business: give it
              optimizers=(optimizer, optimizer.scheduler()) of SnapshotSGD, or of another one with
              lr=1.0 (optimizer, LambdaLR(optimizer, schedule.rate_after))

    The loss is the model's own, with labels among its inputs, of process 0.
    Raises what the recorder raises, and ValueError for a training of more updates than the recorder's schedule has.
    """

    def __init__(self, recorder: SnapshotRecorder) -> None:
        self.recorder = recorder
        self._losses: list[Tensor] = []  # of the batches of this update
        self._parts = False  # whether they are to be added, not averaged
        self._hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on where the Trainer does."""
        self.recorder.require_steps_for(state.max_steps)
        if state.is_world_process_zero:
            self.recorder.start(state.global_step)
            self._hook = self.recorder.network.register_forward_hook(self._keep_loss, with_kwargs=True)

    def _keep_loss(self, module: nn.Module, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
        loss = output["loss"] if isinstance(output, dict) and "loss" in output else None
        if module.training and loss is not None:
            self._losses.append(loss.detach())
            # Then the batches' losses of an update, whose gradients are added up, are parts of a sum.
            self._parts = kwargs.get("num_items_in_batch") is not None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand the loss to the recorder."""
        if not state.is_world_process_zero:
            return
        if not self._losses:
            raise ValueError("the model returned no loss: give it labels, or use the recorder in a loop")
        losses = torch.stack(self._losses)
        self.recorder.update(losses.sum() if self._parts else losses.mean())
        self._losses = []

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let others write to the run folder."""
        self.recorder.close()
        if self._hook:
            self._hook.remove()
