"""Distillation: a student learns from a teacher's probabilities besides the labels.

Hinton, Vinyals and Dean, Distilling the Knowledge in a Neural Network (2015), section 2: both sides at a temperature,
the soft part multiplied by its square, so that its gradients keep their size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

# Images as the student gets them, float32 [B, C, H, W], and which ones of the training images they are, int64 [B] ->
# log-probabilities, float32 [B, classes].
Teacher = Callable[[Tensor, NDArray[np.int64]], Tensor]


@dataclass(frozen=True)
class Distillation:
    """(1 - weight) * cross-entropy with the labels + weight * temperature^2 * KL(teacher || student), in nats.

    temperature  > 0, of both: p^(1 / temperature), normalised again
    weight       of the teacher's part, 0 to 1
    """

    temperature: float
    weight: float

    def loss(self, logits: Tensor, labels: Tensor, teacher: Tensor, reduction: str) -> Tensor:
        """Over the images, "mean" or "sum"; logits and the teacher's log-probabilities float32 [B, classes], labels
        int64 [B].
        """
        soft_BC = torch.log_softmax(teacher / self.temperature, 1)
        student_BC = torch.log_softmax(logits / self.temperature, 1)
        divergences = functional.kl_div(student_BC, soft_BC, reduction="sum", log_target=True)
        soft = self.temperature**2 * divergences / (len(labels) if reduction == "mean" else 1)
        hard = functional.cross_entropy(logits, labels, reduction=reduction)
        return (1 - self.weight) * hard + self.weight * soft
