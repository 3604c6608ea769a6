"""SnapshotRecorder: a run folder of a training loop that is not ours, with any network and any optimizer."""

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastsnap.kernels.schedule import Schedule
from fastsnap.run_folder import CONFIG, RunError, RunFolder
from fastsnap.run_state import require_config
from fastsnap.snapshot import load_plain, plain_network
from fastsnap.training.own_checkpoint import (
    NETWORK,
    all_finite,
    loop_state,
    network_tensors,
    restore_loop,
)
from fastsnap.training.own_run import Facts, describe, require_same
from fastsnap.training.records import LOG_STEPS, Records

RESTART = "move the folder away to train again from the start"


class SnapshotRecorder:
    """Saves what `python -m fastsnap.train` saves of a run, for a loop that calls `update(loss)` after each update.

    folder           of the run; `resume()` makes it
    network          any; snapshots are its state_dict in fp32, from within torch.compile and DistributedDataParallel
    schedule         whose cycles end in a snapshot. The rate is the loop's business: SnapshotSGD has it built in; to
                     others give lr=1.0 and, once `resume()` has told the step,
                     LambdaLR(optimizer, schedule.rate_after, last_epoch=step - 1)
    classes          that the network tells apart
    steps_per_epoch  updates between two lines of metrics.jsonl, each with a checkpoint
    optimizer        to be saved in checkpoints: SnapshotSGD or any of torch's. None: the loop saves and restores
                     itself, no checkpoint is made, and `start(step)` takes the place of `resume()`
    scaler           the loop's GradScaler, if it has one, to be saved as well
    dataset, precision, class_names, mean, std, image_shape
                     what config.json should say of data (mean and std per channel, 0 to 255; height, width, channels)
                     and of the loop's arithmetic, for tables and for who uses the networks later

    step             updates done
    A run goes on from its last checkpoint, at the end of an epoch, to the same bits if the batches of an epoch are a
    function of its number, or drawn from PyTorch's generators: those of the CPU and of the network's GPU are restored.
    Losses are added up on their device and looked at every 50 steps and before anything is saved.

    Raises ValueError for values that cannot be meant.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        network: nn.Module,
        schedule: Schedule,
        *,
        classes: int,
        steps_per_epoch: int,
        optimizer: Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
        dataset: str = "own data",
        precision: str = "fp32",
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        facts = Facts(dataset, precision, classes, class_names, mean, std, image_shape)
        self.folder, self.network, self.schedule = RunFolder(folder), plain_network(network), schedule
        self.optimizer, self.scaler = optimizer, scaler
        self.step = 0
        self._config = describe(facts, self.network, schedule, steps_per_epoch, optimizer)
        self._records = Records(self.folder, schedule, steps_per_epoch, restart=RESTART)
        self._lock: contextlib.ExitStack | None = None
        self._seconds, self._session_start = 0.0, time.perf_counter()  # trained until this session, and since
        self._loss_sum, self._losses = torch.zeros((), dtype=torch.float64), 0  # of the current epoch

    # -- beginning and end

    def resume(self) -> int:
        """Begin, or restore network, optimizer and generators as the last checkpoint has them; returns the step.

        Of a finished run the step is the last, and the network gets the weights of the last snapshot.
        Raises RunError (a ValueError) for a folder of another configuration, naming the fields, for one that another
        process writes to, and for results that are incomplete.
        """
        if self.optimizer is None:
            raise ValueError(
                "resume() needs the optimizer: give SnapshotRecorder optimizer=..., or call start(step) in a loop that "
                "restores itself"
            )
        self._require_no_scheduler(self.optimizer)
        with self._begin():
            if self._records.finished():
                self.step = self.schedule.steps
                load_plain(self.network, self.folder.load_snapshot(self.folder.snapshots()[-1]))
            else:
                self._restore(self.optimizer)
        return self.step

    def start(self, step: int = 0) -> None:
        """Go on after `step` updates, for a loop that has restored itself; what was saved after them is dropped.

        Raises RunError as `resume` does, and where nothing was restored (step 0) though something was trained.
        """
        if step and step != self.schedule.steps:
            self.schedule.check(step)
        with self._begin():
            self._require_not_behind(step)
            self._records.require_snapshots(step)
            self.folder.forget_after(step)
            self.step = step

    def require_steps_for(self, updates: float) -> None:
        """Raise ValueError, before hours are spent, for a training of more updates than the schedule has."""
        if updates > self.schedule.steps:
            raise ValueError(
                f"the training has {updates} updates, the recorder's schedule {self.schedule.steps}: make them equal "
                "(Schedule's steps, the trainer's max_steps or epochs)"
            )

    def _require_not_behind(self, step: int) -> None:
        """Raise RunError for a loop that would train again, unasked, what is finished, or all that there is."""
        trained = [entry.step for entry in self.folder.snapshots()]
        trained += [record["step"] for record in self.folder.metrics()]
        finished = step < self.schedule.steps and self._records.finished()
        if finished or (trained and not step):
            raise RunError(
                f"{self.folder.path} holds a {'finished ' if finished else ''}run of {max(trained):,} steps, and the "
                f"loop begins at step {step:,}: restore the loop's own checkpoint to go on, choose another folder, or "
                f"{RESTART}"
            )

    def close(self) -> None:
        """Let others write to the folder. Done by the last update, and at the end of a `with` block."""
        if self._lock:
            self._lock.close()
        self._lock = None

    def __enter__(self) -> "SnapshotRecorder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @contextlib.contextmanager
    def _begin(self) -> Iterator[None]:
        """Hold the folder, which is then of this run; what fails within lets it go."""
        if self._lock:
            raise ValueError(f"the recorder of {self.folder.path} has begun already, at step {self.step}")
        with contextlib.ExitStack() as lock:
            lock.enter_context(self.folder.locked())
            require_config(self.folder, RESTART)
            if self.folder.exists():
                require_same(self._config, self.folder)
            else:
                self.folder.write_json(CONFIG, self._config)
            yield
            self._session_start = time.perf_counter()
            self._looked_at = self.step
            self._loss_sum, self._losses = torch.zeros((), dtype=torch.float64), 0
            self._lock = lock.pop_all()
        if self.step == self.schedule.steps:
            self.close()

    @staticmethod
    def _require_no_scheduler(optimizer: Optimizer) -> None:
        """A scheduler that is made before counts from 0, wherever the run is, and nobody would notice."""
        if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
            raise ValueError(
                "resume() comes before the learning-rate scheduler is made, so that this begins at the right step: "
                "step = recorder.resume(); LambdaLR(optimizer, schedule.rate_after, last_epoch=step - 1)"
            )

    # -- after each update

    def update(self, loss: Tensor | float) -> None:
        """To be called after each update; `loss` is the mean over its batch, a tensor of one number on any device.

        Raises ValueError past the schedule's last step, TrainingDiverged (a RunError) for a loss or weights that are
        NaN or infinite, with nothing saved of them, and RunError if saving fails.
        """
        self.schedule.check(self.step)
        if not self._lock:
            raise ValueError(
                "update() comes after resume() or start(step), which tell the step to go on from"
            )
        self._add(loss)
        self.step += 1
        epoch_ended = self.step % self._records.steps_per_epoch == 0 or self.step == self.schedule.steps
        cycle_ended = self.schedule.ends_cycle(self.step - 1)
        if epoch_ended or cycle_ended or self.step - self._looked_at >= LOG_STEPS:
            train_loss = self._look(saving=epoch_ended or cycle_ended)
        if cycle_ended:
            self._records.save_snapshot(self.network.state_dict(), self.step, train_loss)
        if epoch_ended:
            figures = {"train_loss": train_loss, "seconds": self._seconds_in_all()}
            self._records.end_epoch(self.step, figures)
            self._loss_sum, self._losses = torch.zeros_like(self._loss_sum), 0
            self._save_checkpoint()
        if self.step == self.schedule.steps:
            self.close()

    def _add(self, loss: Tensor | float) -> None:
        value = torch.as_tensor(loss).detach()
        if value.numel() != 1:
            raise ValueError(
                f"loss must be one number, the mean over the batch, got shape {tuple(value.shape)}"
            )
        if self._loss_sum.device != value.device:
            self._loss_sum = self._loss_sum.to(value.device)
        self._loss_sum += value.reshape(())
        self._losses += 1

    def _look(self, *, saving: bool) -> float:
        """The mean loss of the epoch so far; waits for the device."""
        mean = self._loss_sum.item() / self._losses
        # The last update may have broken the weights after a loss that still was finite.
        if not math.isfinite(mean) or (saving and not all_finite(self.network)):
            remedy = "Try a lower learning rate, or fp32, with another folder"
            self.close()
            raise self._records.diverged(self._looked_at, self.step, remedy)
        self._looked_at = self.step
        return mean

    def _seconds_in_all(self) -> float:
        return self._seconds + time.perf_counter() - self._session_start

    # -- checkpoints

    def _save_checkpoint(self) -> None:
        if self.optimizer is None:
            return
        tensors, state = loop_state(self.network, self.optimizer, self.scaler)
        times = {"seconds": self._seconds_in_all(), "epoch_seconds": 0.0}  # it lies at the end of an epoch
        self._records.save_checkpoint(tensors, self.step, state | times)

    def _restore(self, optimizer: Optimizer) -> None:
        checkpoint = self._records.checkpoint()
        if checkpoint is None:
            self._save_checkpoint()  # so one that is missing later was removed
            return
        tensors, state = checkpoint
        saved = {name: tensor for name, tensor in tensors.items() if name.startswith(NETWORK)}
        self._records.restore(network_tensors(self.network), saved, state["step"])
        restore_loop(tensors, state, self.network, optimizer, self.scaler, str(self.folder.path))
        self.step, self._seconds = state["step"], state["seconds"]
        self.folder.forget_after(self.step)
