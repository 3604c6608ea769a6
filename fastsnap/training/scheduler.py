"""A torch scheduler that shows and does nothing, for training loops that insist on one."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class ShownSchedule(LRScheduler):
    """What SnapshotSGD.scheduler() returns: the rates that the optimizer's own schedule gives, for logs.

    `step()` does nothing, since the update turns the schedule; and there is nothing to load, since the optimizer's
    state_dict holds the count of updates. On CUDA `last_epoch` and `state_dict()` wait for the device.
    """

    def __init__(self, optimizer: Optimizer, updates: Callable[[], int]) -> None:
        """updates: returns the number of updates that `optimizer` has done."""
        # Not super().__init__(), which would write into the optimizer's groups.
        self.optimizer = optimizer
        self._updates = updates
        self._step_count = 1  # accelerate counts it up while it accumulates gradients

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """Number of updates done."""
        return self._updates()

    def get_last_lr(self) -> list[float | Tensor]:
        """Learning rate of the next update, of each group: floats, on CUDA copies of tensors on the device."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]

    get_lr = get_last_lr

    def step(self, epoch: int | None = None) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, Any]:
        """For logs: the number of updates done and the rates of the next one, as floats."""
        return {"last_epoch": self.last_epoch, "_last_lr": [float(rate) for rate in self.get_last_lr()]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: load the optimizer's state."""
