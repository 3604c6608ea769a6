"""A running average of the weights, kept beside training: one network at the price of one, better than the last."""

import torch
from torch import Tensor


class WeightAverage:
    """Of flat `parameters`, which training changes in place: average = decay * average + (1 - decay) * parameters.

    data  float32, like `parameters`; before the first update, these. It is part of a checkpoint
    """

    def __init__(self, parameters: Tensor, decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self.data = parameters.detach().clone()

    @torch.no_grad()
    def update(self) -> None:
        """After each step; it never waits for the device."""
        self.data.lerp_(self._parameters, 1 - self._decay)
