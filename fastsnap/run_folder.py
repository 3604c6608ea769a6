"""The run folder: everything that a training run leaves behind, and the only place where the stages meet.

    config.json            what was run, to repeat it
    metrics.jsonl          a line per epoch
    snapshots/             snapshot-01.safetensors ...: plain state_dicts, fp32
    manifest.json          per snapshot: file, sha256, step, cycle, epoch, learning_rate, train_loss
    checkpoint.safetensors the latest state, for resuming
    ensemble.json, report.html, *.png  written by the evaluation

Files are JSON and safetensors, never pickle. Each is written under a temporary name, synced and renamed, so that a
crash or a full disk leaves the previous file as it was.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fastsnap import run_lock, run_schema
from fastsnap.run_checkpoint import checkpoint_content, read_checkpoint
from fastsnap.run_files import (
    RunError,
    read_bounded,
    read_regular,
    remove_temporary,
    write_atomically,
)
from fastsnap.run_schema import MOST_BYTES, Manifest, SnapshotEntry
from fastsnap.snapshot import snapshot_content

RUNS = Path("runs")
CONFIG, MANIFEST, METRICS, CHECKPOINT = (
    "config.json",
    "manifest.json",
    "metrics.jsonl",
    "checkpoint.safetensors",
)
SNAPSHOTS = "snapshots"
RESULTS = (MANIFEST, CHECKPOINT, METRICS, SNAPSHOTS)  # what training made, and only training can make again
EVALUATION = (
    *(
        "ensemble*.json",
        "error-against-m*.png",
        "training.png",
        "members*.png",
        "reliability*.png",
        "cascade*.png",
    ),
    *("line-*.png", "against-*.png", "report*.html", "tensorboard"),
)


class DamagedSnapshot(RunError):
    """A snapshot whose file is missing or is not the one that was saved."""


class RunFolder:
    """A run folder at `path`. Making the object touches no file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._require_held = _held_by_nobody

    # -- reading

    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.has(CONFIG)

    def config(self) -> dict[str, Any]:
        """config.json, with all that run_schema.Config asks for. Raises RunError if it is missing or damaged."""
        content = self._read(CONFIG)
        if content is None:
            kind = "it is a file" if self.path.is_file() else f"it has no {CONFIG}"
            raise RunError(
                f"{self.path} is not a run folder: {kind}. Name a folder that python -m fastsnap.train made"
            )
        config = run_schema.parse(content, str(self.path / CONFIG))
        run_schema.check_config(config, str(self.path / CONFIG))
        return config

    def snapshots(self) -> list[SnapshotEntry]:
        """The manifest's entries in order; empty before the first snapshot.

        Raises RunError if the manifest is damaged, or missing although there are snapshots.
        """
        return self._manifest().snapshots

    def average(self) -> SnapshotEntry | None:
        """The running average of the weights, to be loaded as a snapshot is; its number is that of the snapshot that
        was saved with it. None in a run that keeps none. Raises as `snapshots` does.
        """
        return self._manifest().average

    def _manifest(self) -> Manifest:
        content = self._read(MANIFEST)
        if content is not None:
            place = str(self.path / MANIFEST)
            return run_schema.check_manifest(run_schema.parse(content, place), self.path, place)
        files = self._snapshot_files()
        if files:
            raise RunError(
                f"{self.path / MANIFEST} is missing, though {SNAPSHOTS}/ holds {len(files)} files: put a copy of it "
                "back. Without it nobody can tell whether they are what was trained; to train again, moving them "
                "aside, add --restart to the training command"
            )
        return Manifest([])

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a crash cut short is left out. Raises RunError for others."""
        return run_schema.check_metrics(self._read(METRICS) or b"", str(self.path / METRICS))

    def load_snapshot(self, entry: SnapshotEntry) -> dict[str, Tensor]:
        """The state_dict of a snapshot, on the CPU. Raises DamagedSnapshot if it is not, to the bit, what was saved."""
        content, damage = self._verified(entry)
        try:
            if content is not None:
                return safetensors.torch.load(content)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            damage = f"is no safetensors file ({error})"
        usable = [str(other.number) for other in self.snapshots() if self._verified(other)[0] is not None]
        remedy = f"; use the others with --snapshots {','.join(usable)}" if usable else ""
        raise DamagedSnapshot(f"snapshot {entry.number} ({self.path / entry.file}) {damage}{remedy}")

    def _verified(self, entry: SnapshotEntry) -> tuple[bytes | None, str]:
        """The content of a snapshot's file; or None, and what is wrong with it."""
        try:
            content = read_regular(self.path / entry.file)
        except OSError as error:
            return None, f"cannot be read: {error.strerror}"
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            return None, "is damaged or was swapped: its SHA-256 is not the manifest's"
        return content, ""

    def _snapshot_files(self) -> list[Path]:
        return sorted((self.path / SNAPSHOTS).glob("*.safetensors"))

    def bytes_of_tensors(self) -> int:
        """Of the snapshots and the checkpoint that are there."""
        total = 0
        for file in [*(self.path / "snapshots").glob("*.safetensors"), self.path / CHECKPOINT]:
            with contextlib.suppress(OSError):  # not there, or gone by now
                total += file.stat().st_size
        return total

    def has(self, name: str) -> bool:
        """Whether there is such a file in the folder."""
        try:
            return (self.path / name).exists()
        except OSError as error:
            raise RunError(f"{self.path / name} cannot be read: {error.strerror}") from error

    def _read(self, name: str) -> bytes | None:
        return None if self.path.is_file() else read_bounded(self.path / name, MOST_BYTES[name])

    # -- writing

    @contextlib.contextmanager
    def locked(self, say: run_lock.Say = run_lock.say_on_standard_error) -> Iterator[None]:
        """Hold the folder for writing; a killed process holds nothing.

        say  is told in a sentence what the user should know: of a file system without locks, of a run taken over
        Raises RunError if another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot write to the run folder {self.path}: {error.strerror}; choose another --out"
            ) from error
        with run_lock.hold(self.path, say) as self._require_held:
            # Only who holds the folder writes these, so what lies there half-written is of a process that was killed.
            for name in (CONFIG, MANIFEST, METRICS, CHECKPOINT):
                remove_temporary(self.path, name)
            remove_temporary(self.path / SNAPSHOTS, "")
            try:
                yield
            finally:
                self._require_held = _held_by_nobody

    def write_json(self, name: str, value: Any) -> None:
        """Replace the JSON file `name`. Raises ValueError for NaN or infinite values, which are not JSON."""
        self._write(name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def save_snapshot(
        self,
        state: Mapping[str, Tensor],
        *,
        step: int,
        cycle: int,
        epoch: int,
        learning_rate: float,
        train_loss: float,
        average: Mapping[str, Tensor] | None = None,
    ) -> SnapshotEntry:
        """Save a network's state_dict as the snapshot of `cycle` (from 1) and enter it in the manifest.

        average  a state_dict that is saved beside it, in the place of the last one
        """
        content = snapshot_content(state)
        entry = SnapshotEntry(
            number=cycle,
            file=f"{SNAPSHOTS}/snapshot-{cycle:02d}.safetensors",
            sha256=hashlib.sha256(content).hexdigest(),
            step=step,
            cycle=cycle,
            epoch=epoch,
            learning_rate=learning_rate,
            train_loss=train_loss,
        )
        earlier = [other for other in self.snapshots() if other.number < cycle]
        if not self.has(MANIFEST):
            self._write_manifest([])  # from now on, a manifest that is missing was removed
        self._write(entry.file, content)
        averaged = None
        if average is not None:
            averaged = self._save_average(average, entry)
        self._write_manifest([*earlier, entry], averaged)
        if averaged is not None:
            self._remove_averages(averaged)
        return entry

    def _save_average(self, state: Mapping[str, Tensor], entry: SnapshotEntry) -> SnapshotEntry:
        """Under a name of its own, so that the manifest's hash is never of another file."""
        content = snapshot_content(state)
        file = f"{SNAPSHOTS}/average-{entry.number:02d}.safetensors"
        self._write(file, content)
        return replace(entry, file=file, sha256=hashlib.sha256(content).hexdigest())

    def _remove_averages(self, kept: SnapshotEntry) -> None:
        for file in (self.path / SNAPSHOTS).glob("average-*.safetensors"):
            if file != self.path / kept.file:
                file.unlink(missing_ok=True)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        self._require_held()
        try:
            with (self.path / METRICS).open("a") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(
                f"cannot save {self.path / METRICS}: {error.strerror}; make room, then run the same command again"
            ) from error

    def save_checkpoint(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the checkpoint by `tensors` and a JSON-serialisable `state` (run_schema.CheckpointState)."""
        self._write(CHECKPOINT, checkpoint_content(tensors, state))

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The checkpoint's tensors, on the CPU, and its state; None if there is none.

        Raises RunError if it is damaged.
        """
        return read_checkpoint(self.path / CHECKPOINT) if self.has(CHECKPOINT) else None

    def forget_after(self, step: int) -> None:
        """Drop snapshots and metrics later than `step`: a run resumed there makes them again."""
        kept = [entry for entry in self.snapshots() if entry.step <= step]
        average = self.average()
        if len(kept) < len(self.snapshots()):
            self._write_manifest(kept, average if average and average.step <= step else None)
        records = self.metrics()
        lines = "".join(json.dumps(record) + "\n" for record in records if record["step"] <= step)
        if self.has(METRICS):
            self._write(METRICS, lines.encode())

    def _write_manifest(self, entries: list[SnapshotEntry], average: SnapshotEntry | None = None) -> None:
        averages = {} if average is None else {"average": asdict(average)}
        self.write_json(MANIFEST, {"snapshots": [asdict(entry) for entry in entries]} | averages)

    def _write(self, name: str, content: bytes) -> None:
        self._require_held()
        write_atomically(self.path / name, content)


def _held_by_nobody() -> None:
    """Nothing to check while nobody holds the folder: evaluations write what they alone write."""


def newest_run(root: str | os.PathLike[str] = RUNS) -> RunFolder:
    """The run under `root` that was written to last. Raises RunError, saying what makes one, if there is none."""
    configs = list(Path(root).glob("*/config.json"))
    if not configs:
        raise RunError(
            f"no run in {Path(root).resolve()}; name a run folder, or train one: python -m fastsnap.train"
        )
    newest = max(configs, key=lambda file: _last_written(file.parent))
    return RunFolder(newest.parent)


def _last_written(folder: Path) -> float:
    times = [0.0]
    for name in (CONFIG, MANIFEST):
        with contextlib.suppress(OSError):  # not there, or removed meanwhile
            times.append((folder / name).stat().st_mtime)
    return max(times)
