"""The training loop: from any step to the last, saving what the run folder keeps."""

import hashlib
import math
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsnap.data.archives import DataError
from fastsnap.data.plan import Pipeline
from fastsnap.kernels.schedule import Schedule
from fastsnap.run_folder import RunError, RunFolder
from fastsnap.run_schema import SnapshotEntry
from fastsnap.training.apex import ApexSGD
from fastsnap.training.distillation import Teacher
from fastsnap.training.exchange import running_statistics
from fastsnap.training.optim import SnapshotSGD
from fastsnap.training.pace import Pace
from fastsnap.training.progress import ProgressDisplay, Status, format_seconds
from fastsnap.training.ranks import Ranks, RanksLost
from fastsnap.training.records import LOG_STEPS, Records
from fastsnap.training.step import TrainStep
from fastsnap.training.stopping import StopRequest, TrainingStopped, stop_signals

LOG_SECONDS = 2.0  # most seconds between two looks, for slow steps
AGREE_SECONDS = 0.2  # about as often ranks ask each other whether to look, save or stop
CHECKPOINT_SECONDS = 180.0  # most seconds between two checkpoints, for long epochs
WARM_UP_STEPS = 3  # left out of the estimated time: compilation and first allocations
ESTIMATE_STEPS = 5  # steps after them from which the time is estimated
STEPS_PER_SEED = 2**40  # so that no step of one seed is a step of the next
# Odd, so that ranks have seeds of their own; rank 0 has those of a single process.
SEEDS_PER_RANK = 0x9E3779B97F4A7C15
Validate = Callable[[Sequence[SnapshotEntry]], dict[str, float]]
OnRecord = Callable[[dict[str, Any]], None]
LONG_RUN_SECONDS = 1200.0  # a longer estimate comes with the variables that shorten it


def _ignored(record: dict[str, Any]) -> None:
    """Of a line of metrics, where nobody asks for it."""


@dataclass
class Look:
    """What was read from the devices at the last look: sums over the images of the current epoch, of all ranks."""

    step: int
    time: float
    loss_sum: float = 0.0
    errors: float = 0.0
    images: int = 0


class Trainer:
    """A training run at some step.

    network    the plain module; its parameters are views of optimizer.flat
    optimizer  fastsnap.training.optim.SnapshotSGD, or fastsnap.training.apex.ApexSGD, which has the same state
    pipeline   batches of `images` training images
    random_seed  of what a step draws within the network; None: it draws nothing
    ranks      that train together, each with a trainer of its own; they do the same steps, and the first one writes.
               Whatever depends on time or on a signal is agreed on
    validate   figures of all snapshots so far, for the metrics of an epoch in which a cycle ended
    teacher    of a train_step with a distillation: what it says of each batch
    on_record  is given each line of metrics.jsonl that is written
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: SnapshotSGD | ApexSGD,
        train_step: TrainStep,
        pipeline: Pipeline,
        schedule: Schedule,
        images: int,
        folder: RunFolder,
        random_seed: int | None = None,
        ranks: Ranks | None = None,
        *,
        validate: Validate | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        self.teacher = teacher
        self.validate = validate
        self.on_record: OnRecord = _ignored
        self.network, self.optimizer, self.train_step = network, optimizer, train_step
        self.pipeline, self.schedule, self.images, self.folder = pipeline, schedule, images, folder
        self.records = Records(folder, schedule, pipeline.steps_per_epoch)
        self.random_seed, self.ranks = random_seed, ranks or Ranks()
        self.began_with_ranks = self.ranks.count  # of the checkpoint that it goes on from
        self.step = 0  # updates done
        self.seconds = 0.0  # spent training until the current session
        self._session_start = self._epoch_start = time.perf_counter()
        self.epoch_seconds = 0.0  # of them, in the current epoch

    # -- the loop

    def run(self, display: ProgressDisplay) -> None:
        """Train from `self.step` to the last.

        Raises TrainingStopped, TrainingDiverged, RunError if saving fails or ranks differ, RanksLost, and DataError for
        images that can no longer be read, in files that are decoded while training.
        """
        self._first_step = self.step
        self._session_start = self._epoch_start = self._checkpoint_time = time.perf_counter()
        self._warm = (self.step, self._session_start)
        self._shapes: set[tuple[int, ...]] = set()
        self._estimated = False
        self._look = Look(self.step, self._session_start)
        self._pace = Pace(self.step, self._session_start)
        self._agreed = (self.step, self._session_start)
        self._next_word = self.step  # the step after which ranks agree again
        try:
            self._train(display)
        except RanksLost as lost:
            lost.where = f"after step {self.step:,} of {self.schedule.steps:,}"
            lost.remedy = " (--timeout). The same command goes on from the last checkpoint"
            raise
        except DataError:
            # What is done is kept: the same command goes on from here once the images are there again. Other ranks
            # wait for this one's gradients; they go on from the last checkpoint.
            if self.step > self._first_step and self.ranks.count == 1:
                self._look_at_loss(display, epoch_ended=False, saving=True)
                self.save_checkpoint()
            raise

    def _train(self, display: ProgressDisplay) -> None:
        # torchrun repeats what the terminal or a batch system has sent to all, and kills those that do not listen.
        with stop_signals(insisting=self.ranks.count == 1) as stop:
            self.ranks.is_stopping = lambda: stop.signal_number is not None
            try:
                self._train_until(stop, display)
            finally:
                self.ranks.is_stopping = Ranks.is_stopping

    def _train_until(self, stop: StopRequest, display: ProgressDisplay) -> None:
        while self.step < self.schedule.steps:
            for images, labels in self.pipeline.epoch(*divmod(self.step, self.pipeline.steps_per_epoch)):
                self._seed_network()
                own, whole = self.pipeline.plan.share(self.step % self.pipeline.steps_per_epoch)
                self.train_step(images[:own], labels[:own], whole, self._taught(images[:own]))
                self.step += 1
                self._notice_warm_up(images.shape)
                lost = signal.SIGPIPE if display.lost else None
                self._after_step(display, stop.signal_number or lost)

    def _taught(self, images: Tensor) -> Tensor | None:
        """What the teacher says of this rank's images of the batch, if there is one."""
        if self.teacher is None or not len(images):
            return None
        batch = self.pipeline.plan.batch(*divmod(self.step, self.pipeline.steps_per_epoch))
        return self.teacher(images, batch.indices[: len(images)])

    def _seed_network(self) -> None:
        """Dropout and stochastic depth draw from PyTorch's generators: a function of seed and step, as all else is."""
        if self.random_seed is not None:
            seed = self.random_seed * STEPS_PER_SEED + self.step + self.ranks.rank * SEEDS_PER_RANK
            torch.manual_seed(seed % 2**63)

    def _notice_warm_up(self, shape: tuple[int, ...]) -> None:
        """Leave the first steps, and the first of a batch size (the compiler starts again), out of the estimate."""
        if self.step <= self._first_step + WARM_UP_STEPS or shape not in self._shapes:
            self._warm = (self.step, time.perf_counter())
            self._pace.restart(*self._warm)
        self._shapes.add(shape)

    def _after_step(self, display: ProgressDisplay, stop_signal: int | None) -> None:
        epoch_ended = self.step % self.pipeline.steps_per_epoch == 0
        cycle_ended = self.schedule.ends_cycle(self.step - 1)
        if not (epoch_ended or cycle_ended or self.step >= self._next_word):
            return
        stop_signal, late, look_due = self._agree(stop_signal or 0)
        checkpoint_due = bool(epoch_ended or stop_signal or late)
        saving = cycle_ended or checkpoint_due
        # Nothing is saved that was not looked at: a diverged network never replaces a good checkpoint or snapshot.
        if saving or look_due:
            self._look_at_loss(display, epoch_ended=epoch_ended, saving=saving)
        if cycle_ended:
            self._save_snapshot(display)
        if epoch_ended:
            self._end_epoch(display)
        if checkpoint_due:
            self.save_checkpoint()
        if saving:
            self._pace.restart(self.step, time.perf_counter())
        if stop_signal and self.step < self.schedule.steps:
            raise TrainingStopped(stop_signal, "a checkpoint is saved")

    def _validated(self, display: ProgressDisplay) -> dict[str, float]:
        """Figures of the held-out images, after an epoch in which a cycle ended; from the files, so that a run that
        goes on has them too.
        """
        first = self.step - self.pipeline.steps_per_epoch
        ends = (self.schedule.boundary(cycle) for cycle in range(1, self.schedule.cycles + 1))
        if self.validate is None or not any(first < end <= self.step for end in ends):
            return {}
        saved = self.ranks.from_first(lambda: [asdict(entry) for entry in self.folder.snapshots()])
        figures = self.validate([SnapshotEntry(**fields) for fields in saved])
        if figures:
            together = (
                f", all {len(saved)} together {figures['ensemble_error']:.2f} %" if len(saved) > 1 else ""
            )
            display.message(
                f"held-out images: snapshot {saved[-1]['number']} {figures['validation_error']:.2f} % error{together}"
            )
        return figures

    def _agree(self, stop_signal: int) -> tuple[int, bool, bool]:
        """What all ranks do after this step: the signal that stops them, 0 for none; whether a checkpoint and a look
        are due. A process alone asks itself after every step, ranks each other now and then.
        """
        now = time.perf_counter()
        late = now - self._checkpoint_time >= CHECKPOINT_SECONDS
        look_due = self.step - self._look.step >= LOG_STEPS or now - self._look.time >= LOG_SECONDS
        if self.ranks.count == 1:
            return stop_signal, late, look_due
        step, then = self._agreed
        steps = round(AGREE_SECONDS / max(now - then, 1e-9) * (self.step - step))
        words = [stop_signal, int(late), int(look_due), -min(max(1, steps), LOG_STEPS)]
        stop_signal, any_late, any_look, steps = self.ranks.largest(words)
        self._agreed, self._next_word = (self.step, now), self.step - steps
        return stop_signal, bool(any_late), bool(any_look)

    def _all_totals(self) -> Tensor:
        """train_step.totals, of all ranks."""
        totals = self.train_step.totals.clone()
        self.ranks.sum(totals)
        return totals

    def _look_at_loss(self, display: ProgressDisplay, *, epoch_ended: bool, saving: bool) -> None:
        loss_sum, errors = self._all_totals().tolist()  # waits for the device
        looked_before = self._look.step
        self._look = Look(self.step, time.perf_counter(), loss_sum, errors, self._images_seen())
        # The last update may have broken the weights after a loss that still was finite.
        if not math.isfinite(loss_sum) or (saving and not self.optimizer.flat.data.isfinite().all()):
            if not self.ranks.is_first:
                raise RanksLost("rank 0 says why")  # it knows the folder
            remedy = "Try a lower --lr or --precision fp32, with another --out"
            raise self.records.diverged(looked_before, self.step, remedy)
        status = self._status()
        display.show(status, epoch_ended=epoch_ended)
        if not self._estimated and self.step - self._warm[0] >= ESTIMATE_STEPS:
            self._estimated = True
            display.message(self._estimate(status))
        slower = self._pace.look(self.step, self._look.time)
        if slower is not None:
            display.message(self._slowness(slower))

    def _status(self) -> Status:
        look = self._look
        return Status(
            step=self.step,
            steps=self.schedule.steps,
            epoch=self._epoch(),
            epochs=self.schedule.steps // self.pipeline.steps_per_epoch,
            cycle=self._cycle(),
            cycles=self.schedule.cycles,
            learning_rate=self.schedule.rate(self.step - 1),
            loss=look.loss_sum / look.images,
            error=100 * look.errors / look.images,
            images_per_second=look.images / self._seconds_in_epoch(),
            seconds_left=self._seconds_left(),
        )

    def _seconds_left(self) -> float:
        step, start = self._warm
        if step == self.step:  # all that there is to go by
            step, start = self._first_step, self._session_start
        return (self._look.time - start) / (self.step - step) * (self.schedule.steps - self.step)

    def _estimate(self, status: Status) -> str:
        device = "GPU" if self.train_step.device.type == "cuda" else "CPU"
        text = f"estimated time: {format_seconds(status.seconds_left)} on this {device}"
        if status.seconds_left > LONG_RUN_SECONDS:
            text += (
                "; shorter with make variables EPOCHS=30, NET=resnet20 (--epochs, --net), with --train-images N, "
                "or on a GPU. Ctrl-C saves a checkpoint"
            )
        return text

    def _slowness(self, factor: float) -> str:
        text = f"steps take {factor:.0f} times what they took at their best: another program seems to use the same "
        if self.train_step.device.type == "cuda":
            return text + "GPU"
        return text + (
            "cores. If it goes on, stop this run with Ctrl-C, which saves a checkpoint, and go on with it by the same "
            "command and --threads 1 (make: ARGS='--threads 1'), as with the other program, so that they do not wait "
            "for each other's cores"
        )

    # -- saving

    def _save_snapshot(self, display: ProgressDisplay) -> None:
        if not self.ranks.is_first:
            return
        train_loss = self._look.loss_sum / self._look.images
        entry = self.records.save_snapshot(
            self.network.state_dict(), self.step, train_loss, average=self._averaged()
        )
        display.message(
            f"saved snapshot {entry.number} of {self.schedule.cycles}: {self.folder.path / entry.file}"
        )

    def _averaged(self) -> dict[str, Tensor] | None:
        """The state_dict of the running average of the weights. Its running statistics are those of the network."""
        if self.train_step.average is None:
            return None
        flat = self.optimizer.flat
        return self.network.state_dict() | dict(
            zip(flat.names, flat.views(self.train_step.average.data), strict=True)
        )

    def _end_epoch(self, display: ProgressDisplay) -> None:
        seconds = self._seconds_in_epoch()
        figures = {
            "train_loss": self._look.loss_sum / self.images,
            "train_error": 100 * self._look.errors / self.images,
            "images_per_second": self.images / seconds,
            "seconds": self._seconds_in_all(),
        }
        figures |= self._validated(display)
        if self.ranks.is_first:
            self.on_record(self.records.end_epoch(self.step, figures))
        self.train_step.totals.zero_()
        self._look = Look(self.step, self._look.time)
        self.epoch_seconds, self._epoch_start = 0.0, time.perf_counter()

    def save_checkpoint(self) -> None:
        """Save everything that the rest of the run depends on. Raises RunError if ranks have drifted apart."""
        self._require_equal_ranks()
        state = {
            "seconds": self._seconds_in_all(),
            "epoch_seconds": self._seconds_in_epoch(),
            "scaler": self.train_step.scaler.state_dict(),
            "ranks": self.ranks.count,
        }
        tensors = self._tensors() | {"totals": self._all_totals()}
        if self.ranks.is_first:
            self.records.save_checkpoint(tensors, self.step, state)
        self.ranks.meet("a checkpoint is saved")  # a disk may take longer than a step may
        self._checkpoint_time = time.perf_counter()

    def _require_equal_ranks(self) -> None:
        """Raise RunError, naming them, if ranks do not have rank 0's bits."""
        if self.ranks.count == 1:
            return
        digest = hashlib.blake2b(digest_size=16)
        # Of the buffers those of BatchNorm, which ranks exchange; rank 0 alone is asked for the others.
        for tensor in (self.optimizer.flat.data, self.optimizer.momentum, *running_statistics(self.network)):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        words = self.ranks.gather([digest.hexdigest(), socket.gethostname()])
        others = [f"{rank} on {host}" for rank, (bits, host) in enumerate(words) if bits != words[0][0]]
        if others:
            raise RunError(
                f"after step {self.step:,} rank {', '.join(others)} has other parameters than rank 0 on {words[0][1]}, "
                "though all make the same updates: processors of different kinds, or a fault of memory. Nothing was "
                "saved since the last checkpoint, from which the same command goes on"
            )

    def resume(self) -> bool:
        """Go to where the run in the folder is; False at its beginning, where it gets its first checkpoint.

        Of a finished run only `step` is set: its networks are the snapshots, and it needs no checkpoint.
        Raises RunError for a checkpoint that does not fit this run, and for results that are incomplete: none is
        trained again unasked.
        """
        state = self.ranks.from_first(self._restore)
        if state["step"] == self.schedule.steps and "scaler" not in state:
            self.step = self.schedule.steps
            return True
        # Those that do not read the folder, and may have no weights to begin with, get all from rank 0.
        self.ranks.send(list(self._tensors().values()))
        if not self.ranks.is_first:
            self.train_step.totals.zero_()
        if "scaler" not in state:
            # So a checkpoint that is missing later was removed.
            self.save_checkpoint()
            return False
        self.optimizer.seek(state["step"])
        self.train_step.scaler.load_state_dict(state["scaler"])
        self.step, self.seconds, self.epoch_seconds = state["step"], state["seconds"], state["epoch_seconds"]
        self.began_with_ranks = state.get("ranks", 1)
        return self.step > 0

    def _restore(self) -> dict[str, Any]:
        """Restore what the folder has; returns the checkpoint's state, or the step alone where there is none."""
        if self.records.finished():
            return {"step": self.schedule.steps}
        checkpoint = self.records.checkpoint()
        if checkpoint is None:
            return {"step": 0}
        tensors, state = checkpoint
        self.records.restore(self._tensors(), tensors, state["step"])
        self.folder.forget_after(state["step"])
        return state

    def _tensors(self) -> dict[str, Tensor]:
        buffers = {f"buffer.{name}": buffer for name, buffer in self.network.named_buffers()}
        # They never change, but the file of weights that they are from may be gone when a run goes on.
        frozen = {f"frozen.{n}": p for n, p in self.network.named_parameters() if not p.requires_grad}
        flat = {"parameters": self.optimizer.flat.data, "momentum": self.optimizer.momentum}
        average = {} if self.train_step.average is None else {"average": self.train_step.average.data}
        return flat | {"totals": self.train_step.totals} | buffers | frozen | average

    # -- where the run is

    def _epoch(self) -> int:
        return self.records.epoch(self.step)

    def _cycle(self) -> int:
        return self.records.cycle(self.step)

    def _images_seen(self) -> int:
        """Images of the current epoch trained on; all of them right after its last step."""
        steps = self.step - (self._epoch() - 1) * self.pipeline.steps_per_epoch
        return self.images if steps == self.pipeline.steps_per_epoch else steps * self.pipeline.batch_size

    def _seconds_in_all(self) -> float:
        return self.seconds + time.perf_counter() - self._session_start

    def _seconds_in_epoch(self) -> float:
        return self.epoch_seconds + time.perf_counter() - self._epoch_start
