"""The optimisers that a run can be updated by."""

from typing import Any

from torch import nn

from fastsnap.kernels.schedule import Schedule
from fastsnap.training.apex import ApexSGD
from fastsnap.training.flat import FlatParameters
from fastsnap.training.optim import SnapshotSGD

UPDATES = ("fused", "apex")


def build_optimizer(
    update: str, network: nn.Module, schedule: Schedule, *, momentum: float, weight_decay: float
) -> SnapshotSGD | ApexSGD:
    """SGD for `network`, with Nesterov momentum unless that is 0.

    update  "fused": the project's kernel; "apex": NVIDIA's FusedSGD. Raises ValueError where apex is missing
    """
    options: dict[str, Any] = {
        "momentum": momentum,
        "weight_decay": weight_decay,
        "nesterov": momentum > 0,
        "flat": FlatParameters(network.named_parameters()),
    }
    if update == "apex":
        return ApexSGD(network.parameters(), schedule, **options)
    return SnapshotSGD(network.named_parameters(), schedule, **options)
