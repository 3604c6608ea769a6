"""What an ensemble says of images, as a small typed result."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Predictions:
    """Of N images, in their order; on the CPU.

    classes             names, in the order of the probabilities
    probabilities       float32 [N, C], averaged over the members
    entropy             float32 [N], of these, in nats: how unsure the ensemble is in all
    mutual_information  float32 [N], in nats: the part of it that comes from the members' differing
    disagreement        float32 [N], part of the members, 0 to 1, that predict another class than the ensemble
    members             float32 [M, N, C], each member's probabilities; None unless asked for
    asked               int64 [N], members that were asked of each image; None: all of them
    """

    classes: tuple[str, ...]
    probabilities: Tensor
    entropy: Tensor
    mutual_information: Tensor
    disagreement: Tensor
    members: Tensor | None = None
    asked: Tensor | None = None

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def names(self) -> list[str]:
        """The most probable class of each image; of equal ones the first."""
        return [self.classes[index] for index in self.probabilities.argmax(1).tolist()]

    def top(self, count: int) -> list[list[tuple[str, float]]]:
        """The most probable classes of each image, at most `count`, with their probabilities, the highest first."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        # Stable: of equal ones the first, as in `names`.
        order = self.probabilities.argsort(dim=1, descending=True, stable=True)[:, :count]
        rows = zip(order.tolist(), self.probabilities.gather(1, order).tolist(), strict=True)
        return [[(self.classes[index], value) for index, value in zip(*row, strict=True)] for row in rows]


def joined(parts: Sequence[Predictions]) -> Predictions:
    """One after the other; at least one."""
    kept = [part.members for part in parts if part.members is not None]
    asked = [part.asked for part in parts if part.asked is not None]
    return Predictions(
        parts[0].classes,
        torch.cat([part.probabilities for part in parts]),
        torch.cat([part.entropy for part in parts]),
        torch.cat([part.mutual_information for part in parts]),
        torch.cat([part.disagreement for part in parts]),
        torch.cat(kept, dim=1) if kept else None,
        torch.cat(asked) if asked else None,
    )
