"""What ranks send each other in every step: their gradients, and what BatchNorm has seen, in one collective.

The gradients are copied into one packed tensor, in the order and with the gaps of the flat parameters, which is summed
over the ranks; the update then reads the sums where they are. DistributedDataParallel, with gradients as views of its
buckets, does the same by hooks at every parameter: measured in docs/scaling.md. Running statistics travel behind the
gradients, each rank's weighted by its share of the images, so that all ranks keep the same ones after every step, and
what is saved does not depend on when.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastsnap.training.flat import FlatParameters
from fastsnap.training.ranks import Ranks


class Exchange:
    """Of the ranks that train `network`, whose trained parameters are `flat`'s.

    Every parameter has a gradient in every step, or in none: raises ValueError where that changes.
    """

    def __init__(self, network: nn.Module, flat: FlatParameters, ranks: Ranks) -> None:
        self._flat, self._ranks = flat, ranks
        self._statistics = running_statistics(network)
        size, more = len(flat.data), sum(tensor.numel() for tensor in self._statistics)
        self._packed = torch.zeros(size + more, device=flat.data.device)
        self._gradients = flat.views(self._packed[:size])
        self._tail = self._packed[size:]
        parts = self._tail.split([tensor.numel() for tensor in self._statistics])
        self._seen = [part.view_as(of) for part, of in zip(parts, self._statistics, strict=True)]
        self._used: list[int] | None = None  # numbers of the parameters that have gradients

    @property
    def bytes(self) -> int:
        """Of the tensor that is summed."""
        return self._packed.nbytes

    @torch.no_grad()
    def __call__(self, share: float) -> None:
        """Leave in every parameter's `grad` the sum over all ranks, and in BatchNorm the average of what they saw.

        share  of this rank's images among the batch's, 0 to 1; the gradients are weighted already
        """
        used = self._parameters_used(share)
        gradients = [self._gradients[number] for number in used]
        if share:
            found: list[Any] = [self._flat.parameters[number].grad for number in used]
            torch._foreach_copy_(gradients, found)
        else:
            self._packed.zero_()
        if self._seen:
            torch._foreach_copy_(self._seen, self._statistics)
            self._tail.mul_(share)
        self._ranks.sum(self._packed)
        for number, gradient in zip(used, gradients, strict=True):
            self._flat.parameters[number].grad = gradient
        if self._seen:
            torch._foreach_copy_(self._statistics, self._seen)

    def _parameters_used(self, share: float) -> list[int]:
        """As rank 0, which has images in every batch, saw it in the first."""
        found = [
            number for number, parameter in enumerate(self._flat.parameters) if parameter.grad is not None
        ]
        if self._used is None:
            self._used = self._ranks.from_first(lambda: found)
        if share and found != self._used:
            changed = min(set(found) ^ set(self._used))
            raise ValueError(
                f"on several ranks every parameter needs a gradient in every step or in none, but that of "
                f"{self._flat.names[changed]} comes and goes: train this net on one process"
            )
        return self._used


def running_statistics(network: nn.Module) -> list[Tensor]:
    """Those of BatchNorm, in fp32, that differ from rank to rank; SyncBatchNorm's do not."""
    norms = [
        module
        for module in network.modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
    ]
    found = [statistic for norm in norms for statistic in (norm.running_mean, norm.running_var)]
    return [statistic for statistic in found if statistic is not None]
