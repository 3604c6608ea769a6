"""The update where there is no kernel: the reference, bound to the tensors of a run."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .update import Layout, Rule, State, reference_update


class PlainUpdate:
    """`reference_update` with the interface of `CpuUpdate`."""

    def __init__(self, state: State, rule: Rule, layout: Layout, decays: Tensor) -> None:
        """decays: fp32 [tensors], weight decays, read at every update."""
        self._state, self._rule, self._layout, self._decays = state, rule, layout, decays

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
        decays = self._decays.tolist()
        reference_update(self._state, self._rule, self._layout, gradients, decays, scale, found_inf)
        return self._rule.schedule.rate_after(int(self._state.clock[0]))

    def seek(self, updates: int, averaged: int) -> float:
        """Go on as after `updates` updates, `averaged` of them in the average; returns the next rate."""
        rate = self._rule.schedule.rate_after(updates)
        self._state.clock.copy_(torch.tensor([updates, averaged, 0], dtype=torch.int64, device="cpu"))
        self._state.rate.fill_(rate)
        return rate
