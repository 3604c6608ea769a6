"""The run folder: everything that a training run leaves behind, and the only place where the stages meet.

    config.json            what was run, to repeat it
    metrics.jsonl          a line per epoch
    snapshots/             snapshot-01.safetensors ...: plain state_dicts, fp32
    manifest.json          per snapshot: file, sha256, step, cycle, epoch, learning_rate, train_loss
    checkpoint.safetensors the latest state, for resuming
    ensemble.json, *.png   written by the evaluation

Files are JSON and safetensors, never pickle. Each is written under a temporary name, synced and renamed, so that a
crash or a full disk leaves the previous file as it was.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

RUNS = Path("runs")
# What the evaluation needs of config.json.
CONFIG_FIELDS = (
    *("dataset", "data", "net", "shortcut", "cycles", "epochs", "batch_size", "learning_rate", "schedule"),
    *("seed", "validation", "train_images", "precision"),
)


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


class DamagedSnapshot(RunError):
    """A snapshot whose file is missing or is not the one that was saved."""


@dataclass(frozen=True)
class SnapshotEntry:
    """A line of the manifest. `number`, `cycle` and `epoch` count from 1; `step` is the number of updates done."""

    number: int
    file: str
    sha256: str
    step: int
    cycle: int
    epoch: int
    learning_rate: float
    train_loss: float


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, synced to disk. Raises RunError, leaving the old file, when that fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        remedy = (
            "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Make the folder writable"
        )
        raise RunError(
            f"cannot save {path}: {error.strerror}; what was saved before is intact. "
            f"{remedy}, then run the same command again"
        ) from error


class RunFolder:
    """A run folder at `path`. Making the object touches no file."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    # -- reading

    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.path / "config.json").exists()

    def config(self) -> dict[str, Any]:
        """config.json. Raises RunError if it is missing or damaged."""
        config = self._read_json("config.json")
        missing = set(CONFIG_FIELDS) - set(config if isinstance(config, dict) else ())
        if missing:
            raise RunError(f"{self.path / 'config.json'} is damaged: it lacks {', '.join(sorted(missing))}")
        return config

    def snapshots(self) -> list[SnapshotEntry]:
        """The manifest's entries in order; empty before the first snapshot. Raises RunError if it is damaged."""
        if not (self.path / "manifest.json").exists():
            return []
        try:
            return [SnapshotEntry(**entry) for entry in self._read_json("manifest.json")["snapshots"]]
        except (TypeError, KeyError) as error:
            raise RunError(f"{self.path / 'manifest.json'} is damaged: {error}") from error

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line that a crash cut short is left out."""
        file = self.path / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number < len(lines):
                    raise RunError(f"{file}, line {number} is not JSON: {error}") from error
        return records

    def load_snapshot(self, entry: SnapshotEntry) -> dict[str, Tensor]:
        """The state_dict of a snapshot, on the CPU. Raises DamagedSnapshot if it is not, to the bit, what was saved."""
        damage = self._damage(entry)
        if damage:
            usable = [str(other.number) for other in self.snapshots() if not self._damage(other)]
            remedy = f"; use the others with --snapshots {','.join(usable)}" if usable else ""
            raise DamagedSnapshot(f"snapshot {entry.number} ({self.path / entry.file}) {damage}{remedy}")
        return safetensors.torch.load((self.path / entry.file).read_bytes())

    def _damage(self, entry: SnapshotEntry) -> str | None:
        try:
            content = (self.path / entry.file).read_bytes()
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        if hashlib.sha256(content).hexdigest() == entry.sha256:
            return None
        return "is damaged or was swapped: its SHA-256 is not the manifest's"

    def _read_json(self, name: str) -> Any:
        file = self.path / name
        try:
            return json.loads(file.read_text())
        except FileNotFoundError:
            raise RunError(f"{self.path} is not a run folder: it has no {name}") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RunError(f"{file} is damaged: {error}") from error

    # -- writing

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for writing. Raises RunError if another process holds it; a killed process holds nothing."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise RunError(
                f"cannot write to the run folder {self.path}: {error.strerror}; choose another --out"
            ) from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.read(lock, 20).decode() or "unknown"
                raise RunError(
                    f"{self.path} is being written by process {holder}; "
                    "wait for it, stop it, or choose another --out"
                ) from None
            with contextlib.suppress(OSError):  # a full disk: the number is for the message above only
                os.truncate(lock, 0)
                os.write(lock, str(os.getpid()).encode())
            yield
        finally:
            os.close(lock)

    def write_json(self, name: str, value: Any) -> None:
        """Replace the JSON file `name`. Raises ValueError for NaN or infinite values, which are not JSON."""
        write_atomically(self.path / name, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())

    def save_snapshot(
        self,
        state: dict[str, Tensor],
        *,
        step: int,
        cycle: int,
        epoch: int,
        learning_rate: float,
        train_loss: float,
    ) -> SnapshotEntry:
        """Save a network's state_dict as the snapshot of `cycle` (from 1) and enter it in the manifest."""
        content = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in state.items()})
        entry = SnapshotEntry(
            number=cycle,
            file=f"snapshots/snapshot-{cycle:02d}.safetensors",
            sha256=hashlib.sha256(content).hexdigest(),
            step=step,
            cycle=cycle,
            epoch=epoch,
            learning_rate=learning_rate,
            train_loss=train_loss,
        )
        write_atomically(self.path / entry.file, content)
        self._write_manifest([other for other in self.snapshots() if other.number < cycle] + [entry])
        return entry

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        try:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise RunError(f"cannot save {self.path / 'metrics.jsonl'}: {error.strerror}") from error

    def save_checkpoint(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the checkpoint by `tensors` and a small JSON-serialisable `state`."""
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        text = json.dumps(state)
        metadata = {"state": text, "sha256": _checkpoint_hash(tensors, text)}
        content = safetensors.torch.save(tensors, metadata=metadata)
        write_atomically(self.path / "checkpoint.safetensors", content)

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The checkpoint's tensors, on the CPU, and its state; None if there is none.

        Raises RunError if it is damaged.
        """
        file = self.path / "checkpoint.safetensors"
        if not file.exists():
            return None
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                text, sha256 = (opened.metadata()[name] for name in ("state", "sha256"))
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if _checkpoint_hash(tensors, text) != sha256:
                raise ValueError("its SHA-256 is not the one that was saved with it")
            return tensors, json.loads(text)
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{file} is damaged ({error}); remove it to train again from the start, the snapshots stay until then"
            ) from error

    def forget_after(self, step: int) -> None:
        """Drop snapshots and metrics later than `step`: a run resumed there makes them again."""
        kept = [entry for entry in self.snapshots() if entry.step <= step]
        if len(kept) < len(self.snapshots()):
            self._write_manifest(kept)
        records = self.metrics()
        lines = "".join(json.dumps(record) + "\n" for record in records if record["step"] <= step)
        if (self.path / "metrics.jsonl").exists():
            write_atomically(self.path / "metrics.jsonl", lines.encode())

    def _write_manifest(self, entries: list[SnapshotEntry]) -> None:
        self.write_json("manifest.json", {"snapshots": [asdict(entry) for entry in entries]})


def _checkpoint_hash(tensors: dict[str, Tensor], state: str) -> str:
    return hashlib.sha256(safetensors.torch.save(tensors) + state.encode()).hexdigest()


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
    return max(
        (folder / name).stat().st_mtime
        for name in ("config.json", "manifest.json")
        if (folder / name).exists()
    )
