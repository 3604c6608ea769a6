"""Curves and pictures for TensorBoard, beside the run's metrics.jsonl; only where it is asked for and installed."""

from pathlib import Path
from typing import Any

FOLDER = "tensorboard"
MISSING = "tensorboard (--tensorboard) needs the package tensorboard: pip install 'fastsnap[tensorboard]'"
SCALARS = {
    "train_loss": "loss/training",
    "validation_loss": "loss/validation of the fresh snapshot",
    "ensemble_loss": "loss/validation of all snapshots so far",
    "train_error": "error %/training",
    "validation_error": "error %/validation of the fresh snapshot",
    "ensemble_error": "error %/validation of all snapshots so far",
    "lr": "learning rate",
    "images_per_second": "images per second",
}


def require_tensorboard() -> None:
    """Raise ValueError, naming the extra, where it is not installed."""
    try:
        import tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{MISSING} ({error})") from error


class TensorBoard:
    """Writes into `run`/tensorboard. What an earlier process wrote after the `step` that the run goes on from is
    hidden.
    """

    def __init__(self, run: Path, step: int) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter  # here, since it need not be installed

        self._writer = SummaryWriter(str(run / FOLDER), purge_step=step + 1)

    def add(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        for name, tag in SCALARS.items():
            if record.get(name) is not None:
                self._writer.add_scalar(tag, record[name], record["step"])
        self._writer.flush()

    def add_picture(self, name: str, figure: Any, step: int) -> None:
        """A figure of matplotlib's, which stays open."""
        self._writer.add_figure(name, figure, step, close=False)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
