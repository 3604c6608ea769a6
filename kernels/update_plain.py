"""The update where there is no kernel: the reference, bound to the tensors of a run."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .update import Layout, Rule, State, reference_update


class PlainUpdate:
    """`reference_update` with the interface of `CpuUpdate`."""

    def __init__(self, state: State, rule: Rule, layout: Layout, factors: Tensor) -> None:
        """factors: fp32 [tensors, 2], weight decay and scale of the rate of each, read at every update."""
        self._state, self._rule, self._layout, self._factors = state, rule, layout, factors

    def __call__(
        self,
        gradients: Sequence[Tensor | None],
        gradient_dtype: torch.dtype,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> float:
        """Update from dense gradients, one per tensor or None; returns the next rate.

        Raises ValueError if all updates of the schedule are done.
        """
        factors = self._factors.tolist()
        reference_update(self._state, self._rule, self._layout, gradients, factors, scale, found_inf)
        return self._rule.schedule.rate_after(int(self._state.clock[0]))

    def seek(self, updates: int, averaged: int) -> float:
        """Go on as after `updates` updates, `averaged` of them in the average; returns the next rate."""
        rate = self._rule.schedule.rate_after(updates)
        self._state.clock.copy_(torch.tensor([updates, averaged, 0], dtype=torch.int64, device="cpu"))
        self._state.rate.fill_(rate)
        return rate
