"""`--update apex`: NVIDIA's FusedSGD as the update, to compare with. Not measured: it needs a GPU and `make apex`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fastsnap.kernels.schedule import Schedule
from fastsnap.training.flat import FlatParameters

REMEDY = (
    "build NVIDIA's apex with `make apex` on a machine with a GPU and nvcc (PyPI's `apex` is an unrelated web "
    "toolkit), or use --update fused"
)


def apex_fused_sgd() -> Any:
    """apex.optimizers.FusedSGD. Raises ValueError where NVIDIA's apex or its CUDA extension is missing."""
    try:
        import amp_C  # noqa: F401  the extension: without it apex imports, and FusedSGD raises only when used
        from apex.optimizers import FusedSGD
    except ImportError as error:
        raise ValueError(f"update apex is not available ({error}): {REMEDY}") from error
    return FusedSGD


class ApexSGD(torch.optim.Optimizer):
    """FusedSGD with what the trainer needs of SnapshotSGD; the host sets the rate at every step.

    The arguments are SnapshotSGD's, but parameters in no groups of their own. Raises ValueError for groups, whose
    options would be ignored, where apex is missing, and for a step past the schedule.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        schedule: Schedule,
        *,
        momentum: float,
        weight_decay: float,
        nesterov: bool,
        flat: FlatParameters,
    ) -> None:
        super().__init__(params, {})
        if len(self.param_groups) > 1 or self.param_groups[0].keys() - {"params", "param_names"}:
            raise ValueError(
                "update apex takes no groups with a weight_decay or lr_scale of their own: use --update fused"
            )
        self.flat, self.momentum = flat, torch.zeros_like(flat.data)
        self._schedule, self._updates = schedule, 0
        self._inner = apex_fused_sgd()(
            flat.parameters,
            lr=schedule.rate(0),
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
        )
        for parameter, buffer in zip(flat.parameters, flat.views(self.momentum), strict=True):
            self._inner.state[parameter]["momentum_buffer"] = buffer

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update, at the rate of its number."""
        for group in self._inner.param_groups:
            group["lr"] = self._schedule.rate(self._updates)
        self._updates += 1
        return self._inner.step(closure)

    def seek(self, updates: int) -> None:
        """Go on after `updates` updates."""
        self._updates = updates
