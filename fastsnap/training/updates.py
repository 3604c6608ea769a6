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
    """SGD for the parameters of `network` that need a gradient, with Nesterov momentum unless that is 0.

    update  "fused": the project's kernel; "apex": NVIDIA's FusedSGD. Raises ValueError where apex is missing
    """
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    options: dict[str, Any] = {
        "momentum": momentum,
        "weight_decay": weight_decay,
        "nesterov": momentum > 0,
        "flat": FlatParameters(trained),
    }
    if update == "apex":
        return ApexSGD([parameter for _, parameter in trained], schedule, **options)
    return SnapshotSGD(trained, schedule, **options)
